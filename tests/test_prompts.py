"""Placeholders: a replaced word is the same as a token that was added with that word's embedding."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTextModel

from nested_attention import NestedAttentionPipeline
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


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("<person><cat>", "person cat"),
        ("a<cat>, <person>s", "a cat, person s"),
        ("'<cat>' and \"<person>\"", "' cat' and \"person\""),
        ("(<cat>:2)<person>'s", "(cat:2)person's"),
    ],
)
def test_words_never_grow_together(prompt: str, text: str) -> None:
    words = tiny.tokenizer()
    filled = fill(prompt, {name: name[1:-1] for name in placeholders(prompt)})
    assert filled.text == text
    for name, places in filled.spans.items():
        assert [filled.text[a:b] for a, b in places] == [name[1:-1]]
        (column,) = filled.columns(name, words)
        ids = words(filled.text, padding="max_length").input_ids
        assert words.convert_ids_to_tokens(ids[column]) == f"{name[1:-1]}</w>"


def with_token(stock: StableDiffusionXLPipeline) -> StableDiffusionXLPipeline:
    """A copy with `<person>` really added to both tokenizers, its embedding in both encoders a copy of the word's."""
    longer = copy.deepcopy(stock)
    for words, encoder in ((longer.tokenizer, longer.text_encoder), (longer.tokenizer_2, longer.text_encoder_2)):
        words.add_tokens(["<person>"])
        encoder.resize_token_embeddings(len(words))
        table = encoder.get_input_embeddings().weight.data
        table[-1] = table[words.convert_tokens_to_ids("person</w>")]
    return longer


def test_both_text_encoders_of_sdxl_read_the_word_as_they_would_the_token() -> None:
    stock, prompt = tiny.stock("sdxl"), "a drawing of <person> smiling, in the snow"
    filled = fill(prompt, {"<person>": "person"})
    ours, added = stock.encode_prompt(filled.text, device="cpu"), with_token(stock).encode_prompt(prompt, device="cpu")
    assert ours[0].shape[-1] == 2 * tiny.WIDTH
    for states, expected in zip(ours, added, strict=True):  # states and pooled, of the prompt and of the empty one
        assert torch.equal(states, expected)
    assert filled.columns("<person>", stock.tokenizer) == filled.columns("<person>", stock.tokenizer_2)


def test_loading_twice_and_drawing_leave_every_vocabulary_as_long_as_it_was(tmp_path: Path) -> None:
    stock = tiny.stock("sdxl")
    stock.save_pretrained(tmp_path / "base")
    tiny.adapter(stock.unet, "person").save(tmp_path / "person")
    tiny.vision().save_pretrained(tmp_path / "person/vision")
    before = len(tiny.tokenizer())
    for _ in range(2):
        pipe = NestedAttentionPipeline.from_pretrained(str(tmp_path / "base"), tmp_path / "person", "cpu", torch.float32)
        pipe.base = replace(pipe.base, sizes=(32, 32, 8))
        pipe("<person> on the beach", [pipe.encode("person", tiny.photo(1))], steps=1, height=32, width=32)
        stock = pipe.stock
        for words, encoder in ((stock.tokenizer, stock.text_encoder), (stock.tokenizer_2, stock.text_encoder_2)):
            assert len(words) == before == len(encoder.get_input_embeddings().weight)
