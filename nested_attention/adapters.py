"""An adapter: one kind of subject for one base model, in a folder of `config.json` and `adapter.safetensors`.

It holds what is trained: the Q-Former and, for every cross-attention layer of the U-Net, a nested `to_k, to_v`.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nested_attention.attention import ValueNorm, split_heads
from nested_attention.encoder import ImageConfig, QFormer, QFormerConfig
from nested_attention.errors import NestedAttentionError, get_back
from nested_attention.files import is_there, replaced

CONFIG, WEIGHTS = "config.json", "adapter.safetensors"
Framing = Literal["whole", "face"]
KeyValue = tuple[Tensor, Tensor]  # nested keys and values of a layer, each (B, heads, N, d)
LayerKV = dict[str, KeyValue]  # by layer name


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter is.

    Attributes:
        kind: what it personalizes: "person", "cat", ...; also the default placeholder `<kind>`.
        word: the ordinary word whose embedding the placeholder copies. One token in the base's tokenizers.
        base: name of the base it was trained on.
        image_encoder: folder of the frozen image encoder, relative to the adapter's, or a Hub repo id.
        image_subfolder, image_revision: where in that repo, and at which commit.
        value_norm, lam: see `attention.LayerSubject`; `lam` is the default that a request may override.
        framing: what of a picture it was trained to read: "whole", or the aligned "face".
        qformer, image: sizes.
        licence: of the weights; `credit`: whose weights they were made of, if that licence asks to name them.
        metrics: what the training measured, for people.
    """

    kind: str
    word: str
    base: str
    image_encoder: str
    image_subfolder: str = ""
    image_revision: str | None = None
    value_norm: ValueNorm = "none"
    lam: float = 1.0
    framing: Framing = "whole"
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    licence: str = "MIT"
    credit: str = ""
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "AdapterConfig":
        sizes, image = QFormerConfig(**content["qformer"]), ImageConfig.from_dict(content["image"])
        return cls(**content | {"qformer": sizes, "image": image})


def cross_attention_layers(unet: UNet2DConditionModel) -> dict[str, Attention]:
    """The U-Net's cross-attention layers by their names in `unet.attn_processors`, in that order."""
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    return {name: unet.get_submodule(name.removesuffix(".processor")) for name in names}  # type: ignore[misc]


class NestedLayer(nn.Module):
    """The nested projections of one cross-attention layer; they start from the layer's own (paper, section 3.3)."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.heads = attention.heads
        self.to_k, self.to_v = (self.copied(own) for own in (attention.to_k, attention.to_v))

    @staticmethod
    def copied(own: nn.Linear) -> nn.Linear:
        copy = nn.Linear(own.in_features, own.out_features, bias=False, device=own.weight.device)
        copy.weight.data.copy_(own.weight)
        return copy

    def forward(self, tokens: Tensor) -> KeyValue:
        """Tokens `(B, N, C)` -> keys and values `(B, heads, N, d)`, laid out as attention reads them at every step."""
        projected = self.to_k(tokens), self.to_v(tokens)
        key, value = (split_heads(x, self.heads).contiguous() for x in projected)
        return key, value


class Adapter(nn.Module):
    """Q-Former and nested projections for one U-Net."""

    def __init__(self, config: AdapterConfig, unet: UNet2DConditionModel):
        super().__init__()
        layers = cross_attention_layers(unet)
        width = next(iter(layers.values())).to_k.in_features
        if config.qformer.output_dim != width:
            raise NestedAttentionError(
                f"the {config.kind} adapter makes tokens of width {config.qformer.output_dim}, but this base model has {width}; "
                f"it was made for the base {config.base!r}."
            )
        self.config = config
        self.names = tuple(layers)
        self.qformer = QFormer(config.qformer)
        self.layers = nn.ModuleList(NestedLayer(attention) for attention in layers.values())
        self.revision = ""  # content hash of its two files, once loaded

    def project(self, tokens: Tensor) -> LayerKV:
        """Subject tokens `(B, N, C)` -> keys and values of every layer. They do not depend on the step."""
        return {name: layer(tokens) for name, layer in zip(self.names, self.layers, strict=True)}

    def save(self, folder: Path, dtype: torch.dtype | None = torch.float16) -> None:
        """Writes the folder, see `save_adapter`."""
        save_adapter(folder, self.config, self.state_dict(), dtype)

    @classmethod
    def load(cls, folder: Path, unet: UNet2DConditionModel) -> "Adapter":
        """Reads an adapter folder for this U-Net, on its device and in its dtype.

        Raises:
            NestedAttentionError: a file is missing or damaged, or the adapter was made for another base.
        """
        adapter = cls(read_config(folder), unet)
        path = folder / WEIGHTS
        tensors = read_weights(path)
        wanted = {name: tuple(value.shape) for name, value in adapter.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in tensors.items()}
        if wanted != found:
            wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            raise NestedAttentionError(
                f"{path} does not fit this base model: {len(wrong)} tensors differ, first {wrong[0]} "
                f"(needed {wanted.get(wrong[0])}, found {found.get(wrong[0])}); it was made for the base {adapter.config.base!r}."
            )
        adapter.load_state_dict(tensors)
        adapter.revision = hashlib.sha256((folder / CONFIG).read_bytes() + path.read_bytes()).hexdigest()[:16]
        return adapter.to(unet.device, unet.dtype).eval().requires_grad_(False)


def save_adapter(folder: Path, config: AdapterConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = torch.float16) -> None:
    """Writes an adapter folder; what breaks a save leaves the old one whole. `dtype`: None for what every tensor has.

    Raises:
        NestedAttentionError: it cannot be written.
    """
    with replaced(folder) as fresh:
        fresh.mkdir()
        save_file({name: value.detach().to("cpu", dtype).contiguous() for name, value in tensors.items()}, fresh / WEIGHTS)
        (fresh / CONFIG).write_text(json.dumps(asdict(config), indent=2) + "\n")


def read_config(folder: Path) -> AdapterConfig:
    """The config of an adapter folder.

    Raises:
        NestedAttentionError: it is missing, damaged, or of something else.
    """
    path = folder / CONFIG
    if not is_there(path):
        raise NestedAttentionError(f"{path} is missing, so {folder} is not an adapter; name the folder or repo of one.")
    try:
        return AdapterConfig.from_dict(json.loads(path.read_text()))
    except (TypeError, KeyError) as error:
        raise NestedAttentionError(f"{path} is not the config of an adapter ({error}); name the folder or repo of one.") from error
    except (ValueError, OSError) as error:
        raise NestedAttentionError(f"{path} is damaged or cannot be read ({error}); {get_back(path)}.") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        NestedAttentionError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise NestedAttentionError(f"the weights file {path} is missing; {get_back(path)}.") from error
    except (SafetensorError, ValueError, OSError) as error:
        raise NestedAttentionError(f"the weights file {path} is damaged or cut off ({error}); {get_back(path)}.") from error


def list_adapters(folder: Path) -> dict[str, Path]:
    """Kind -> adapter folder, for the adapters that come along in `folder`.

    Raises:
        NestedAttentionError: there are none, or one lacks its config or has a damaged one.
    """
    found = sorted(path for path in folder.glob("*/") if "." not in path.name)  # with a dot: what `files.replaced` may have left
    lost = next((path / CONFIG for path in found if not (path / CONFIG).is_file()), None if found else folder)
    if lost is not None:
        raise NestedAttentionError(f"{lost}, of the adapters that come with a base, is missing or empty; {get_back(lost)}.")
    return {read_config(path).kind: path for path in found}
