"""Loading base models and adapters, from folders or from the Hub."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import constants
from safetensors import SafetensorError

from nested_attention import released
from nested_attention.adapters import CONFIG, WEIGHTS, Adapter, list_adapters, read_config
from nested_attention.bases import ASSETS, FILES, Base, FewSteps, find_base, of_architecture
from nested_attention.errors import NestedAttentionError, get_back
from nested_attention.hub import fetch


def best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def usable_device(wanted: str | torch.device | None) -> torch.device:
    """`wanted`, or the best there is.

    Raises:
        NestedAttentionError: CUDA or MPS was asked for and is not there, or there is no such kind of device.
    """
    if wanted is None:
        return best_device()
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise NestedAttentionError(f"there is no device called {wanted!r}; use cuda, mps or cpu.") from error
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not there.get(device.type, False):
        raise NestedAttentionError(
            f'{device.type} was asked for, but PyTorch finds none on this machine; use device="{best_device().type}".'
        )
    return device


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16. A CPU without them computes in it all the same, six times slower
    than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return device.type == "cpu" and bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def best_dtype(device: torch.device) -> torch.dtype:
    """float16 on a GPU; on a CPU bfloat16 where it computes in it, else float32."""
    if device.type != "cpu":
        return torch.float16
    return torch.bfloat16 if computes_bfloat16(device) else torch.float32


def base_folder(base: Base) -> Path:
    """The folder of a base model, fetched if it is on the Hub.

    Raises:
        NestedAttentionError: it is not there and cannot be fetched.
    """
    folder = Path(base.source)
    if not folder.is_absolute():
        return fetch(base.source, base.revision, FILES)
    if not (folder / "model_index.json").is_file():
        raise NestedAttentionError(f"the base model {base.name} is not in {folder}; {get_back(folder)}.")
    return folder


def load_base(name: str, dtype: torch.dtype) -> tuple[Base, DiffusionPipeline]:
    """The preset and its stock diffusers pipeline, frozen, in the machine's memory, in `dtype`."""
    preset = find_base(name)
    folder = base_folder(preset)
    architecture = of_architecture(preset.name, folder / "model_index.json")
    if architecture.pipeline != preset.pipeline:
        preset = replace(architecture, name=preset.name, source=preset.source, revision=preset.revision, variant=preset.variant)
    try:
        stock = DiffusionPipeline.from_pretrained(
            folder, torch_dtype=dtype, variant=preset.variant,
            trust_remote_code=ASSETS in folder.parents,  # Storybook's patches.py, which is ours; nobody else's code is run
        )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise NestedAttentionError(f"the base model {preset.name} in {folder} cannot be loaded ({error}); {get_back(folder)}.") from error
    for part in stock.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    if preset.few_steps is not None:
        make_quick(stock, preset.few_steps)
    return preset, stock


def make_quick(stock: DiffusionPipeline, few: FewSteps) -> None:
    """Fuses a few-step LoRA into `stock` and gives it the scheduler that belongs to it.

    Raises:
        NestedAttentionError: the LoRA cannot be had or does not fit.
    """
    folder = Path(few.repo) if Path(few.repo).is_dir() else fetch(few.repo, few.revision, [few.file])
    try:
        stock.load_lora_weights(folder, weight_name=few.file)
        stock.fuse_lora()
        stock.unload_lora_weights()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise NestedAttentionError(
            f"the few-step weights {few.file} of {few.repo} cannot be used ({error}); {get_back(folder / few.file)}."
        ) from error
    stock.scheduler = getattr(diffusers, few.scheduler).from_config(stock.scheduler.config, **few.config)


def adapter_folder(adapter: str | Path, unet: UNet2DConditionModel) -> Path:
    """The folder of an adapter: a folder, the released weights, or a Hub repo `user/name[@revision]` that `train.push` made."""
    if str(adapter) == released.REPO:
        return released.import_released(unet, Path(constants.HF_HOME) / "nested_attention/released")
    repo, _, revision = str(adapter).partition("@")
    if Path(adapter).exists() or repo.count("/") != 1:
        return Path(adapter)
    return fetch(repo, revision or None, [CONFIG, WEIGHTS, "image_encoder/*"])


def load_adapters(
    preset: Base, unet: UNet2DConditionModel, adapter: str | Path | None, device: torch.device
) -> tuple[Mapping[str, Path], Mapping[str, Adapter]]:
    """Kind -> folder and kind -> adapter on `device`: the one that `adapter` names, else all that come with the base."""
    if adapter is not None:
        folder = adapter_folder(adapter, unet)
        folders = {read_config(folder).kind: folder}
    else:
        folders = list_adapters(preset.adapters) if preset.adapters is not None else {}
    return folders, {kind: Adapter.load(folder, unet).to(device) for kind, folder in folders.items()}
