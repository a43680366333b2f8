"""A subject: who stands for a placeholder, in the form that the U-Net's layers use."""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from threading import Lock

import torch
from PIL import Image
from torch import Tensor

from nested_attention.adapters import KeyValue, LayerKV
from nested_attention.attention import LayerSubject, ValueNorm
from nested_attention.errors import NestedAttentionError

MAX_STRENGTH, MAX_LAM, MAX_TOKEN_WEIGHT = 2.0, 4.0, 8.0


@dataclass(frozen=True)
class EncodedImage:
    """One reference picture, encoded once by one adapter.

    `picture`: what the encoder saw; `reading (N, P)`: where each token was read from, rows sum to 1;
    `layers`: nested keys and values of every layer, `(1, heads, N, d)` each.
    """

    picture: Image.Image
    reading: Tensor
    layers: LayerKV

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for pair in self.layers.values() for x in pair)


@dataclass(frozen=True)
class Subject:
    """Who stands for a placeholder. Made by `pipe.encode`; change a knob with `subject.but(strength=0.8)`.

    Attributes:
        placeholder: how prompts name it, for instance "<person>".
        kind, word: of the adapter that encoded it.
        images: its reference pictures; their tokens answer together.
        strength: 0 (an ordinary word) .. 1 (the subject) .. 2 (exaggerated): how far the word's value moves from its
            own to the nested one. The first knob to turn if the picture does not look like the subject.
        lam: the length of the nested value; relative to the word's own for adapters trained with a value norm.
            Larger pushes identity harder, also where it does not belong.
        token_weight: how strongly the word competes with other words for attention; 1 leaves that to the model.
        muted: numbers of tokens that may not answer, to test what a map claims.
    """

    placeholder: str
    kind: str
    word: str
    images: tuple[EncodedImage, ...] = field(repr=False)
    strength: float = 1.0
    lam: float = 1.0
    token_weight: float = 1.0
    value_norm: ValueNorm = "none"
    muted: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for name, low, high in (("strength", 0.0, MAX_STRENGTH), ("lam", 0.0, MAX_LAM), ("token_weight", 0.05, MAX_TOKEN_WEIGHT)):
            number = getattr(self, name)
            if not isinstance(number, int | float) or not low <= number <= high:
                raise NestedAttentionError(f"{name} of {self.placeholder} is {number}; choose a number from {low:g} to {high:g}.")
        if self.muted and not set(range(self.num_tokens)) - self.muted:
            raise NestedAttentionError(
                f"all {self.num_tokens} tokens of {self.placeholder} are muted; leave at least one, or set strength to 0."
            )

    def but(self, **changes: object) -> "Subject":
        """The same subject with other settings; nothing is encoded again."""
        return replace(self, **changes)  # type: ignore[arg-type]

    @property
    def num_tokens(self) -> int:
        return sum(image.reading.shape[0] for image in self.images)

    def reading(self) -> Tensor:
        """Where each token was read from, `(N, P)` over the patches of all pictures; rows sum to 1."""
        return torch.block_diag(*(image.reading for image in self.images))

    def layer_subjects(self, columns: Tensor) -> dict[str, LayerSubject]:
        """The subject as each layer sees it. `columns (1, L)`: where its word stands in the prompt."""
        strength, lam, weight = (torch.tensor(float(x), device=columns.device) for x in (self.strength, self.lam, self.token_weight))
        answering = None
        if self.muted:
            answering = torch.tensor([k not in self.muted for k in range(self.num_tokens)], device=columns.device)
        return {
            name: LayerSubject(columns, *self.keys_and_values(name), strength, lam, weight, self.value_norm, answering)
            for name in self.images[0].layers
        }

    def keys_and_values(self, layer: str) -> KeyValue:
        """Of all pictures; those of a single one are the cached tensors themselves, which for SDXL are hundreds of megabytes."""
        if len(self.images) == 1:
            return self.images[0].layers[layer]
        keys, values = zip(*(image.layers[layer] for image in self.images), strict=True)
        return torch.cat(keys, 2), torch.cat(values, 2)


class SubjectCache:
    """Encoded pictures by content and adapter, the least recently used dropped beyond `max_bytes`.

    A picture of a face is personal: keep one cache per session and let it go with the session.
    """

    def __init__(self, max_bytes: int = 2 << 30):
        self.max_bytes = max_bytes
        self._entries: OrderedDict[tuple[str, str], EncodedImage] = OrderedDict()
        self._lock = Lock()

    @staticmethod
    def key(picture: Image.Image, revision: str) -> tuple[str, str]:
        return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest(), revision

    def get(self, key: tuple[str, str]) -> EncodedImage | None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: tuple[str, str], image: EncodedImage) -> None:
        with self._lock:
            self._entries[key] = image
            while len(self._entries) > 1 and sum(entry.bytes for entry in self._entries.values()) > self.max_bytes:
                self._entries.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)
