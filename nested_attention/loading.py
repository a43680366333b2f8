"""Loading base models and adapters, from folders or from the Hub."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError

from nested_attention import patches, released
from nested_attention.adapters import CONFIG, WEIGHTS, Adapter, list_adapters, read_config
from nested_attention.bases import BASES, INDEX, Base, FewSteps, brought_code, find_base, of_architecture, of_size, parts
from nested_attention.encoding import encoder_files
from nested_attention.errors import NestedAttentionError, get_back
from nested_attention.files import first_damaged, is_there
from nested_attention.hub import commit_of, fetch, is_repo
from nested_attention.memory import spoken_shortage, too_little

HALF = "fp16"  # how diffusers names weight files in 16 bit
OURS = Path(patches.__file__)  # the only code that a base may bring; Storybook's do, so that diffusers alone loads them


def best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def usable_device(wanted: str | torch.device | None) -> torch.device:
    """`wanted`, or the best there is.

    Raises:
        NestedAttentionError: CUDA or MPS was asked for and is not there, or there is no such device.
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
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise NestedAttentionError(
            f"{device} was asked for, but the last GPU of this machine is cuda:{torch.cuda.device_count() - 1}; name one that is there."
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


def base_folder(base: Base, local: bool = False) -> Path:
    """The folder of a base model. Of one on the Hub only what is loaded is fetched: of each part one set of safetensors.

    `local`: nothing is fetched, and nobody asked.

    Raises:
        NestedAttentionError: it is not there and cannot be fetched, is of another architecture, or has no safetensors; with `local`,
            a file is missing.
    """
    folder = Path(base.source)
    if folder.is_absolute():
        if not (folder / INDEX).is_file():
            raise NestedAttentionError(f"the base model {base.name} is not in {folder}; {get_back(folder)}.")
        return folder
    index = fetch(base.source, base.revision, [INDEX], local=local) / INDEX
    of_architecture(base.name, index)  # before gigabytes of something else are fetched
    weights = f".{base.variant}*.safetensors" if base.variant else ".safetensors"
    wanted = [f"{part}/*{ending}" for part in parts(index) for ending in (".json", ".txt", ".py", weights)]
    folder = fetch(base.source, base.revision, wanted, [] if base.variant else ["*.*.safetensors"], local)  # two dots: a variant
    if local and (lost := missing_file(folder) or next(iter(without_weights(folder, base.variant)), None)):
        raise NestedAttentionError(f"{base.source} is not whole in the Hub's cache, {lost} is missing; connect to the Hub to fetch it.")
    if bare := without_weights(folder):  # some repos have nothing but weights in 16 bit
        fetch(base.source, base.revision, [f"{part}/*.{HALF}*.safetensors" for part in bare], local=local)
    if bare := without_weights(folder):
        raise NestedAttentionError(
            f"{base.source} has no safetensors for {' and '.join(bare)}, and other weights, such as pickles, are not read; "
            "choose another repo or revision, or convert it."
        )
    return folder


def without_weights(folder: Path, variant: str | None = None) -> list[str]:
    """The parts of a base that are described, but have no safetensors, or none of `variant`."""
    weights = f"*.{variant}*.safetensors" if variant else "*.safetensors"
    described = [part for part in parts(folder / INDEX) if (folder / part / "config.json").is_file()]
    return [part for part in described if not any((folder / part).glob(weights))]


def known_base(name: str) -> Base:
    """`find_base`, with the numbers of the true architecture: that of a repo is read in its index, which is fetched.

    Raises:
        NestedAttentionError: there is no such base, its index cannot be had, or the architecture is another one.
    """
    preset = find_base(name)
    if name in BASES or Path(preset.source).is_absolute():
        return preset
    architecture = of_architecture(name, fetch(preset.source, preset.revision, [INDEX]) / INDEX)
    own = {field: getattr(preset, field) for field in ("name", "source", "revision", "variant", "licence")}
    return replace(architecture, **own)


def variant_of(base: Base, folder: Path) -> str | None:
    """Which weight files to load: the preset's, or those in 16 bit where a part has no others."""
    weights = ([path.name for path in (folder / part).glob("*.safetensors")] for part in parts(folder / INDEX))
    halved = any(names and all(f".{HALF}" in name for name in names) for names in weights)
    return base.variant or (HALF if halved else None)


def missing_file(folder: Path) -> Path | None:
    """The first file that a part of a base lacks: its description, or of a tokenizer the words, without which it reads nothing."""
    for part in parts(folder / INDEX):
        there = {path.name for path in (folder / part).glob("*.json")}
        if part.startswith("tokenizer") and not there & {"tokenizer.json", "vocab.json"}:
            return folder / part / "tokenizer.json"
        if not any(name.endswith("config.json") for name in there):
            return folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    return None


def load_base(name: str, dtype: torch.dtype) -> tuple[Base, DiffusionPipeline]:
    """The preset and its stock diffusers pipeline, frozen, in the machine's memory, in `dtype`.

    Raises:
        NestedAttentionError: there is no such base, it cannot be fetched, or a file of it is missing or damaged.
    """
    preset = known_base(name)
    folder = base_folder(preset)
    if (missing := missing_file(folder)) is not None:
        raise NestedAttentionError(f"the base model {preset.name} cannot be loaded ({missing} is missing); {get_back(missing)}.")
    code = brought_code(folder)
    if (foreign := next((file for file in code if file.read_bytes() != OURS.read_bytes()), None)) is not None:
        raise NestedAttentionError(f"the base model {preset.name} brings code of its own, {foreign}, which is not run; choose another one.")
    try:
        stock = DiffusionPipeline.from_pretrained(
            folder, dtype=dtype, variant=variant_of(preset, folder), use_safetensors=True, trust_remote_code=bool(code)
        )
    except Exception as error:  # nothing narrower: the library tokenizers raises just that
        broken = first_damaged(folder) or folder
        raise NestedAttentionError(f"the base model {preset.name} in {broken} cannot be loaded ({error}); {get_back(broken)}.") from error
    for part in stock.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    if preset.few_steps is not None:
        make_quick(stock, preset.few_steps)
    most = stock.scheduler.config.get("original_inference_steps", preset.most_steps)  # LCM's draws some of so many that it learned
    side = stock.unet.config.sample_size  # of latents; not every U-Net tells it
    preset = of_size(preset, side * stock.vae_scale_factor) if isinstance(side, int) else preset
    return replace(preset, most_steps=most), stock


def few_steps_folder(few: FewSteps, local: bool = False) -> Path:
    """The folder with the LoRA of `few`, fetched if it is on the Hub, unless `local`."""
    return Path(few.repo) if Path(few.repo).is_dir() else fetch(few.repo, few.revision, [few.file], local=local)


def make_quick(stock: DiffusionPipeline, few: FewSteps) -> None:
    """Fuses a few-step LoRA into `stock` and gives it the scheduler that belongs to it.

    Raises:
        NestedAttentionError: the LoRA cannot be had or does not fit.
    """
    folder = few_steps_folder(few)
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
    """The folder of an adapter: a folder, the released weights, or a Hub repo `user/name[@revision]` that `train.push` made.

    Raises:
        NestedAttentionError: it cannot be fetched, or is the released one and `unet` is not SDXL's.
    """
    repo, _, revision = str(adapter).partition("@")
    if repo == released.REPO:
        if unet.config.addition_embed_type != "text_time":  # of the architectures here, only SDXL's has it
            raise NestedAttentionError(
                f"{repo} was made for SDXL, and this base model is another one; choose the base sdxl, or another adapter."
            )
        commit = commit_of(repo, revision or None)
        return released.import_released(unet, released.converted(commit), revision=commit)
    if is_there(adapter) or not is_repo(repo):
        return Path(adapter)
    try:
        return fetch(repo, revision or None, [CONFIG, WEIGHTS, *encoder_files("image_encoder")])
    except NestedAttentionError as error:  # it may have been meant as a folder
        raise NestedAttentionError(f"there is no folder {adapter} here, and as a repo: {error}") from error


def folders_by_kind(adapters: Sequence[str | Path], unet: UNet2DConditionModel) -> dict[str, Path]:
    """Kind -> folder of each of `adapters`.

    Raises:
        NestedAttentionError: as of `adapter_folder`; two are of one kind.
    """
    folders: dict[str, Path] = {}
    names: dict[str, str | Path] = {}
    for adapter in adapters:
        folder = adapter_folder(adapter, unet)
        kind = read_config(folder).kind
        if kind in folders:
            raise NestedAttentionError(f"{names[kind]} and {adapter} are both adapters for {kind!r}; choose one of them.")
        folders[kind], names[kind] = folder, adapter
    return folders


def load_adapters(
    preset: Base, unet: UNet2DConditionModel, adapter: str | Path | Sequence[str | Path] | None, device: torch.device
) -> tuple[Mapping[str, Path], Mapping[str, Adapter]]:
    """Kind -> folder and kind -> adapter on `device`: the one or the several that `adapter` names, else all that come with the base.

    Raises:
        NestedAttentionError: one cannot be fetched, is missing or damaged, was made for another base, or finds no room on `device`; two
            are of one kind.
    """
    if adapter is None:
        folders = list_adapters(preset.adapters) if preset.adapters is not None else {}
    else:
        folders = folders_by_kind([adapter] if isinstance(adapter, str | Path) else adapter, unet)
    with spoken_shortage(too_little(device, f"hold the adapters for {', '.join(folders)}")):
        return folders, {kind: Adapter.load(folder, unet).to(device) for kind, folder in folders.items()}
