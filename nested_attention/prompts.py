"""Placeholders in prompts: from `"<person> on the beach"` to text, and the columns where each subject's word stands.

A placeholder is a token whose embedding is a frozen copy of an ordinary word's (`<person>` of `person`). So the text
encoder is simply given that word, and the place is remembered: the states are the same to the bit, and no tokenizer or
embedding table is ever changed. A test compares this with tokens that were really added.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from nested_attention.errors import NestedAttentionError

PLACEHOLDER = re.compile(r"<[a-z][a-z0-9_-]{0,31}>", re.IGNORECASE)


@dataclass(frozen=True)
class Prompt:
    """A prompt with its placeholders replaced by words.

    `text`: what the text encoder reads. `spans`: placeholder -> where its words stand in `text`.
    """

    text: str
    spans: Mapping[str, tuple[tuple[int, int], ...]]

    def columns(self, placeholder: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """The token positions of a placeholder's words; empty if they were cut off at the end."""
        encoded = tokenizer(
            self.text, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_offsets_mapping=True
        )
        found = []
        for start, end in self.spans[placeholder]:
            found += last_token(encoded["offset_mapping"], start, end)
        return tuple(found)


def last_token(offsets: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
    """The number of the last token between `start` and `end` of a text, which has read the others; none if it was cut off.

    `offsets`: where each token starts and ends in the text, twice the same place for those that stand for no text.
    """
    return [k for k, (a, b) in enumerate(offsets) if b > a and a < end and b > start][-1:]


def placeholders(prompt: str) -> tuple[str, ...]:
    """The placeholders in a prompt, in order, each once, in lower case."""
    return tuple(dict.fromkeys(match.group().lower() for match in PLACEHOLDER.finditer(prompt)))


def slot_names(kinds: Sequence[str]) -> list[str]:
    """A placeholder for each of several subjects: `<person>`, `<cat>`, and `<person2>` for a second person."""
    return [f"<{kind}{'' if kinds[:k].count(kind) == 0 else kinds[:k].count(kind) + 1}>" for k, kind in enumerate(kinds)]


def fill(prompt: str, words: Mapping[str, str]) -> Prompt:
    """Replaces every placeholder by its word: `words["<person>"] == "person"`.

    Raises:
        NestedAttentionError: a placeholder that no subject has, or a subject whose placeholder is not in the prompt.
    """
    found = placeholders(prompt)
    if unknown := [name for name in found if name not in words]:
        known = f"the subjects are {', '.join(words)}" if words else "no subject was given"
        raise NestedAttentionError(f"the prompt names {', '.join(unknown)}, but {known}; add that subject or take the word out.")
    if unused := [name for name in words if name not in found]:
        raise NestedAttentionError(
            f'the prompt does not say where {", ".join(unused)} should be; write it into the prompt, as in "{unused[0]} on the beach".'
        )
    text, end = "", 0
    spans: dict[str, list[tuple[int, int]]] = {name: [] for name in words}
    for match in PLACEHOLDER.finditer(prompt):
        name = match.group().lower()
        text = apart(text + prompt[end : match.start()])
        spans[name].append((len(text), len(text) + len(words[name])))
        text += words[name]
        end = match.end()
        if prompt[end : end + 1].isalpha():
            text += " "
    return Prompt(text + prompt[end:], {name: tuple(places) for name, places in spans.items()})


def apart(text: str) -> str:
    """`text` with a space where the tokenizer would read its end and a word behind it as one: after a letter, and after an
    apostrophe, which takes a first letter as in "it's"."""
    return text + " " if text[-1:].isalpha() or text.endswith("'") else text
