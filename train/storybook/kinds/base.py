"""What a kind of subject is."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from train.storybook.layers import Drawing

Values = dict[str, str]  # field -> value, for instance {"hair": "bob", "skin": "tan"}


@dataclass(frozen=True)
class Kind:
    """A kind of subject: what stays (identity), what a prompt may change (attributes), how it looks and is said.

    Attributes:
        name: the kind's name; also the word whose embedding its placeholder starts from.
        identity: field -> its possible values. A character keeps these for ever.
        attributes: field -> its possible values. Every picture chooses them anew.
        parts: names of the parts in its masks; part `k` of the list has number `k + 1` in `Drawing.parts`.
        held_out: pairs of attribute values that no training picture shows together.
        draw: `(identity, attributes) -> Drawing`, standing on the bottom edge, centred.
        noun: `(identity, rng) -> "a man"`: the subject's name with its article.
        phrases: `(attributes, mentioned, rng) -> ["wearing a red hoodie", ...]` for the fields in `mentioned`.
    """

    name: str
    identity: dict[str, tuple[str, ...]]
    attributes: dict[str, tuple[str, ...]]
    parts: tuple[str, ...]
    held_out: frozenset[tuple[str, str]]
    draw: Callable[[Values, Values], Drawing]
    noun: Callable[[Values, random.Random], str]
    phrases: Callable[[Values, frozenset[str], random.Random], list[str]]
    normal: Callable[[Values], Values] = dict

    def allowed(self, attributes: Values) -> bool:
        """False if two of the values are a held-out pair."""
        values = set(attributes.values())
        return not any(first in values and second in values for first, second in self.held_out)


def article(words: str) -> str:
    """`"orange scarf"` -> `"an orange scarf"`."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
