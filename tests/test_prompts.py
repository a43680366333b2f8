"""Placeholders: a replaced word is the same as a token that was added with that word's embedding."""

import copy

import torch
from transformers import CLIPTextModel

from nested_attention.prompts import fill, placeholders
from tests import tiny


def test_replacing_equals_adding_a_token() -> None:
    torch.manual_seed(0)
    words, encoder = tiny.tokenizer(), CLIPTextModel(tiny.text_config()).eval()
    prompt = "a drawing of <person> smiling, wearing a red hoodie, in the snow"
    filled = fill(prompt, {"<person>": "person"})
    added, longer = copy.deepcopy(words), copy.deepcopy(encoder)
    added.add_tokens(["<person>"])
    longer.resize_token_embeddings(len(added))
    table = longer.get_input_embeddings().weight.data
    table[-1] = table[words.convert_tokens_to_ids("person</w>")]

    def states(model: CLIPTextModel, tokenizer, text: str) -> torch.Tensor:
        return model(tokenizer(text, padding="max_length", return_tensors="pt").input_ids).last_hidden_state

    assert torch.equal(states(encoder, words, filled.text), states(longer, added, prompt))
    ids = added(prompt, padding="max_length").input_ids
    assert filled.columns("<person>", words) == (ids.index(added.convert_tokens_to_ids("<person>")),)


def test_spans_point_at_the_words() -> None:
    prompt = "<cat>, <person>'s friend, and <cat> again"
    filled = fill(prompt, {"<person>": "person", "<cat>": "cat"})
    assert filled.text == "cat, person's friend, and cat again"
    assert [filled.text[a:b] for a, b in filled.spans["<cat>"]] == ["cat", "cat"]
    assert [filled.text[a:b] for a, b in filled.spans["<person>"]] == ["person"]
    assert placeholders(prompt.upper()) == ("<cat>", "<person>")
