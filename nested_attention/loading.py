"""Loading base models and adapters."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError

import nested_attention.patches  # noqa: F401  (diffusers finds Storybook's patch autoencoder in loaded modules only)
from nested_attention.adapters import Adapter, list_adapters, read_config
from nested_attention.bases import Base, find_base
from nested_attention.errors import NestedAttentionError


def best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_base(name: str, device: str | torch.device | None, dtype: torch.dtype | None) -> tuple[Base, DiffusionPipeline]:
    """The preset and its stock diffusers pipeline, frozen, on `device` in `dtype`."""
    preset = find_base(name)
    if preset.revision is None and not (Path(preset.source) / "model_index.json").is_file():
        raise NestedAttentionError(
            f"the base model {preset.name} is not in {preset.source}; get it back with `git checkout -- {preset.source}` or download it again."
        )
    target = torch.device(device) if device is not None else best_device()
    precision = dtype or (torch.float32 if target.type == "cpu" else torch.float16)
    try:
        stock = DiffusionPipeline.from_pretrained(preset.source, revision=preset.revision, torch_dtype=precision)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise NestedAttentionError(
            f"the base model {preset.name} in {preset.source} cannot be loaded ({error}); "
            f"get it back with `git checkout -- {preset.source}` or download it again."
        ) from error
    stock = stock.to(target)
    for part in stock.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return preset, stock


def load_adapters(preset: Base, unet: UNet2DConditionModel, adapter: str | Path | None) -> tuple[Mapping[str, Path], Mapping[str, Adapter]]:
    """Kind -> folder and kind -> adapter: the one in the folder `adapter`, else all that come with the base."""
    if adapter is not None:
        folders = {read_config(Path(adapter)).kind: Path(adapter)}
    else:
        folders = list_adapters(preset.adapters) if preset.adapters is not None else {}
    return folders, {kind: Adapter.load(folder, unet) for kind, folder in folders.items()}
