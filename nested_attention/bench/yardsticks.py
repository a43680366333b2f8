"""What the nested attention is measured against. Nothing else uses these."""

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from nested_attention.attention import split_heads


class Yardstick(nn.Module):
    """A layer's own projection of the subject's tokens, done anew at every step."""

    def __init__(self, attention: Attention, tokens: Tensor):
        super().__init__()
        dtype, inner = attention.to_k.weight.dtype, attention.to_k.out_features
        self.to_k, self.to_v = (nn.Linear(tokens.shape[-1], inner, bias=False, dtype=dtype, device=tokens.device) for _ in range(2))
        self.tokens = tokens

    def project(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor) -> list[Tensor]:
        """Query, text keys and values, the subject's keys and values; each `(B, heads, n, d)`, for the whole batch."""
        tokens = self.tokens.expand(hidden_states.shape[0], -1, -1)
        states = (
            attn.to_q(hidden_states),
            attn.to_k(encoder_hidden_states),
            attn.to_v(encoder_hidden_states),
            self.to_k(tokens),
            self.to_v(tokens),
        )
        return [split_heads(state, attn.heads) for state in states]


class DirectProcessor:
    """Nested attention as one would write it first: projected at every step, both maps materialized, both halves."""

    def __init__(self, attention: Attention, tokens: Tensor, column: int):
        self.layer, self.column = Yardstick(attention, tokens), column

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: object) -> Tensor:
        query, key, value, nested_key, nested_value = self.layer.project(attn, hidden_states, encoder_hidden_states)
        scale = query.shape[-1] ** -0.5
        nested = (query @ nested_key.mT * scale).softmax(-1) @ nested_value
        shares = (query @ key.mT * scale).softmax(-1)
        s = slice(self.column, self.column + 1)
        out = shares @ value + shares[..., s] * (nested - value[:, :, s])
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class DecoupledProcessor:
    """Decoupled cross-attention (IP-Adapter, arXiv 2308.06721): a parallel attention whose result is added."""

    def __init__(self, attention: Attention, tokens: Tensor):
        self.layer = Yardstick(attention, tokens)

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: object) -> Tensor:
        query, key, value, image_key, image_value = self.layer.project(attn, hidden_states, encoder_hidden_states)
        out = F.scaled_dot_product_attention(query, key, value) + F.scaled_dot_product_attention(query, image_key, image_value)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


@torch.no_grad()
def randomize(module: nn.Module) -> None:
    """Small random weights in place: matrices keep the variance of what passes through them."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
        else:
            parameter.fill_(0)
    for part in module.modules():
        if isinstance(part, nn.GroupNorm | nn.LayerNorm) and part.weight is not None:
            part.weight.fill_(1)
