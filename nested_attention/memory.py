"""Fitting a large base into the memory there is: a ladder of measures, each slower and smaller than the one before.

The rung is chosen from the free memory of the device when a base is loaded. After an out-of-memory error the pipeline
steps down once, says so, and tries again. Fused attention holds no scores, so slices save most where it is missing (MPS).
A CPU works in the memory where the weights lie already, so it starts on the first rung, and nothing can wait outside.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from diffusers import DiffusionPipeline

from nested_attention.bases import Base
from nested_attention.errors import NestedAttentionError

WORKING = 0.25  # what a step needs besides the weights, relative to the weights of the base
DECODE = 5 * 256 * 4e-9  # gigabytes a pixel: of float32 with 256 channels SD's and SDXL's VAE holds three tensors at last, cuDNN two more
SLICE = 1024  # queries that attend at a time
TILE = 512  # pixels a side that the VAE decodes at a time; SD 1.5 was made for that many, so that its usual pictures stay whole


@dataclass(frozen=True)
class Rung:
    """One measure, instead of the one before it.

    Attributes:
        name: how people are told.
        share: part of the base's weights that lies on the device at one time.
        slice: so many queries attend at a time, and the VAE decodes tile by tile; None for everything at once.
        place: puts a pipeline that lies in the machine's memory to where it works.
    """

    name: str
    share: float
    slice: int | None
    place: Callable[[DiffusionPipeline, torch.device], object]


def whole(stock: DiffusionPipeline, device: torch.device) -> None:
    one_by_one(stock)
    stock.to(device)


def tiled(stock: DiffusionPipeline, device: torch.device) -> None:
    """The VAE works tile by tile."""
    tile(stock)
    stock.to(device)


def part_by_part(stock: DiffusionPipeline, device: torch.device) -> None:
    """Only the part that is at work lies on the device; the largest is the U-Net."""
    tile(stock)
    stock.enable_model_cpu_offload(device=device)


def layer_by_layer(stock: DiffusionPipeline, device: torch.device) -> None:
    """Only the layer that is at work lies on the device."""
    tile(stock)
    stock.enable_sequential_cpu_offload(device=device)


def one_by_one(stock: DiffusionPipeline) -> None:
    """The VAE decodes picture by picture, however many are asked for."""
    if hasattr(stock.vae, "enable_slicing"):  # Storybook's patches need none
        stock.vae.enable_slicing()


def tile(stock: DiffusionPipeline) -> None:
    """It decodes each picture tile by tile, in smaller ones than its own. Tones may shift a little from tile to tile."""
    one_by_one(stock)
    if hasattr(stock.vae, "enable_tiling"):
        stock.vae.enable_tiling()
        stock.vae.tile_sample_min_size, stock.vae.tile_latent_min_size = TILE, TILE // stock.vae_scale_factor


LADDER = (
    Rung("everything on the device", 1.0, None, whole),
    Rung("everything on the device, attention in slices and VAE in tiles", 1.0, SLICE, tiled),
    Rung("model offload, one part on the device at a time", 0.75, SLICE, part_by_part),
    Rung("sequential offload, one layer on the device at a time (slow)", 0.05, SLICE, layer_by_layer),
)


def rungs(device: torch.device) -> tuple[Rung, ...]:
    """Those of the ladder that `device` can take: from a CPU no part can be sent anywhere else."""
    return LADDER[:2] if device.type == "cpu" else LADDER


def free_gigabytes(device: torch.device) -> float:
    """Free memory of a device: of a GPU its own, of MPS what the system grants it, of a CPU the machine's."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch, for whatever comes next
        return (torch.cuda.mem_get_info(device)[0] + kept) / 1e9
    if device.type == "mps":
        return (torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()) / 1e9
    return psutil.virtual_memory().available / 1e9


def needed(base: Base, rung: Rung, dtype: torch.dtype) -> float:
    """Gigabytes on the device for the base and a subject of full size, without the adapter, in `dtype`.

    Beside the weights a step and the decoding of a picture work one after the other. SDXL's VAE decodes in float32 whatever `dtype` is.
    """
    wide = dtype.itemsize / 2
    side = base.size if rung.slice is None else min(base.size, TILE)
    work = max(base.gigabytes * WORKING * wide, DECODE * side**2)
    return (base.gigabytes * rung.share + base.subject_gigabytes) * wide + work


def choose(base: Base, free: float, device: torch.device, dtype: torch.dtype) -> int:
    """The number of the first rung that fits into `free` gigabytes of `device`, the last one if none does."""
    if device.type == "cpu":
        return 0
    fits = (number for number, rung in enumerate(LADDER) if needed(base, rung, dtype) <= free)
    return next(fits, len(LADDER) - 1)


def settle(stock: DiffusionPipeline, device: torch.device, rung: int) -> int:
    """Moves a pipeline, from wherever it is, to `device` by the first rung from `rung` on that has room. Returns its number.

    Raises:
        NestedAttentionError: there is no room even on the last one that `device` can take.
    """
    for number in range(rung, len(rungs(device))):
        stock.remove_all_hooks()
        stock.to("cpu", silence_dtype_warnings=True)  # it only passes through: float16 is for where it goes next
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        try:
            LADDER[number].place(stock, device)
            return number
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
    raise NestedAttentionError(
        f"{device} has too little memory even for {rungs(device)[-1].name}; close what else uses it, or load the model on another device."
    )


def is_out_of_memory(error: RuntimeError) -> bool:
    """CUDA raises a class of its own; MPS and a CPU only say it."""
    said = "out of memory", "DefaultCPUAllocator"
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in said)


@contextmanager
def spoken_shortage(sentence: str) -> Iterator[None]:
    """Turns an out-of-memory error into `sentence`, which says what was too little for what, and the next step.

    Raises:
        NestedAttentionError: the memory did not suffice.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise NestedAttentionError(sentence) from error


def too_little(device: torch.device, purpose: str) -> str:
    """The sentence for a device whose memory does not suffice to `purpose`."""
    return f"{device} has too little memory to {purpose}; close what else uses it, or load the model on another device."
