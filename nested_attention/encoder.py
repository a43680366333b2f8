"""From pictures of a subject to its tokens: a frozen image encoder and a trained Q-Former (paper, section 3.2).

features = image encoder(picture)              (B, P, feature_dim), P = patches (+ a class token)
tokens   = Q-Former(features)                  (B, N, output_dim), N learned queries
beta     = the Q-Former's attention to patches (B, N, P'), rows sum to 1: where token n was read from
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from nested_attention.attention import split_heads


@dataclass(frozen=True)
class QFormerConfig:
    """Sizes of a Q-Former. The released weights have 1024 tokens of width 1280, depth 4, 20 heads, output 2048."""

    num_tokens: int = 16
    width: int = 256
    depth: int = 2
    heads: int = 4
    head_dim: int = 64
    feature_dim: int = 256
    output_dim: int = 256
    ff_mult: int = 4


class PerceiverAttention(nn.Module):
    """The queries look at the picture and at each other."""

    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.norm_features, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def project(self, features: Tensor, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `(B, heads, N, d)`; keys and values `(B, heads, P + N, d)`."""
        features, latents = self.norm_features(features), self.norm_latents(latents)
        key, value = self.to_kv(torch.cat([features, latents], 1)).chunk(2, -1)
        split = (split_heads(x, self.heads) for x in (self.to_q(latents), key, value))
        query, key, value = split
        return query, key, value

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*self.project(features, latents))
        return self.to_out(out.transpose(1, 2).flatten(2))

    def shares(self, features: Tensor, latents: Tensor) -> Tensor:
        """The share of each query's attention that goes to each patch, mean over heads: `(B, N, P)`."""
        query, key, _ = self.project(features, latents)
        shares = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        return shares[..., : features.shape[1]].mean(1)


class QFormer(nn.Module):
    """A Perceiver resampler: learned queries read the picture's features layer by layer."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.latents = nn.Parameter(torch.randn(1, config.num_tokens, width) / width**0.5)
        self.proj_in = nn.Linear(config.feature_dim, width)
        self.proj_out = nn.Linear(width, config.output_dim)
        self.norm_out = nn.LayerNorm(config.output_dim)
        self.attentions = nn.ModuleList(PerceiverAttention(width, config.heads, config.head_dim) for _ in range(config.depth))
        self.feed_forwards = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, config.ff_mult * width, bias=False), nn.GELU(),
                nn.Linear(config.ff_mult * width, width, bias=False),
            )
            for _ in range(config.depth)
        )  # fmt: skip

    def blocks(self) -> Iterator[tuple[PerceiverAttention, nn.Module]]:
        for attention, feed_forward in zip(self.attentions, self.feed_forwards, strict=True):
            assert isinstance(attention, PerceiverAttention)
            yield attention, feed_forward

    def trail(self, features: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The features as the blocks read them, and the latents before the first block, after it, ... `(B, N, width)`."""
        features = self.proj_in(features)
        latents = [self.latents.expand(len(features), -1, -1)]
        for attention, feed_forward in self.blocks():
            seen = latents[-1] + attention(features, latents[-1])
            latents.append(seen + feed_forward(seen))
        return features, latents

    def forward(self, features: Tensor) -> Tensor:
        """`(B, P, feature_dim)` -> tokens `(B, N, output_dim)`."""
        return self.tokens(self.trail(features)[1])

    def tokens(self, latents: list[Tensor]) -> Tensor:
        """What comes out of a trail's last latents."""
        return self.norm_out(self.proj_out(latents[-1]))

    def read(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens, and where each was read from: attention to patches, mean over layers, `(B, N, P)`, rows sum to 1.

        Attention that the queries pay to each other is left out and the rest is brought back to a sum of 1.
        """
        features, latents = self.trail(features)
        shares = [block.shares(features, before).float() for (block, _), before in zip(self.blocks(), latents[:-1], strict=True)]
        total = torch.stack(shares).sum(0)
        return self.tokens(latents), total / total.sum(-1, keepdim=True)


@dataclass(frozen=True)
class ImageConfig:
    """How a picture becomes the image encoder's input, and which of its layers is read.

    Attributes:
        size: side in pixels. Pictures are padded to a square, never cropped.
        mean, std: of the input's normalization, per channel.
        layer: -1 the last hidden layer, -2 the one before it.
    """

    size: int = 128
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    layer: int = -1

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "ImageConfig":
        """As JSON and TOML hold it, with lists for tuples."""
        return cls(**content | {name: tuple(content[name]) for name in ("mean", "std") if name in content})


CLIP_VIT_H = ImageConfig(224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), -2)


def image_features(encoder: PreTrainedModel, pixels: Tensor, layer: int) -> Tensor:
    """Features of every patch, behind the class token where a transformer has one: `(B, P, feature_dim)`."""
    states = encoder(pixels, output_hidden_states=True).hidden_states[layer]
    return states.flatten(2).mT if states.ndim == 4 else states  # a convolutional network gives (B, feature_dim, h, w)


def feature_dim(encoder: PreTrainedModel) -> int:
    """The width of `image_features`."""
    sizes = getattr(encoder.config, "hidden_sizes", None)
    return sizes[-1] if sizes else encoder.config.hidden_size
