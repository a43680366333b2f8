"""What a base model and an adapter would cost on this machine, before anything is fetched or loaded."""

import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from nested_attention.adapters import CONFIG, WEIGHTS, read_config
from nested_attention.bases import Base
from nested_attention.encoding import encoder_files, on_hub
from nested_attention.errors import NestedAttentionError
from nested_attention.files import is_there
from nested_attention.hub import commit_of, fetch, is_repo
from nested_attention.loading import base_folder, best_dtype, few_steps_folder
from nested_attention.memory import LADDER, choose, free_gigabytes, needed
from nested_attention.released import REPO, converted

SIDE = 2048  # of the matrices that are multiplied to see how fast the device is
EFFICIENCY = 0.6  # of that speed that a U-Net reaches
BUS = 6.0  # gigabytes a second that a GPU gets from the machine's memory
IMAGE_ENCODER = 2.5  # gigabytes of the largest image encoder that adapters use, CLIP ViT-H/14 in 32 bit


@dataclass(frozen=True)
class Estimate:
    """What to expect of a base and an adapter on a device.

    Attributes:
        fetched: nothing has to be downloaded.
        download: gigabytes to download otherwise.
        memory: gigabytes that it takes on the device, with an adapter of full size and a subject.
        placement: how it will be placed there.
        seconds: for one picture with the base's default settings; right to a factor of about two.
        free: gigabytes that are free on the device.
    """

    fetched: bool
    download: float
    memory: float
    placement: str
    seconds: float
    free: float

    @property
    def fits(self) -> bool:
        """False if it would have to run out of memory."""
        return self.memory <= self.free


def estimate(base: Base, device: torch.device, adapter: str | None = None) -> Estimate:
    """`adapter`: a folder or repo, or None for those that come with the base.

    Raises:
        NestedAttentionError: the adapter is on this machine and damaged, or a folder that is none.
    """
    dtype = best_dtype(device)
    beside, free = base.adapter_gigabytes * dtype.itemsize / 2, free_gigabytes(device)
    rung = LADDER[choose(base, free - beside, device, dtype)]
    seconds = base.steps * base.teraflops / (EFFICIENCY * teraflops_per_second(device))
    if rung is LADDER[-1]:  # at every step the whole U-Net, the largest part, comes to the device
        seconds += base.steps * base.gigabytes * LADDER[-2].share * dtype.itemsize / 2 / BUS
    download = missing_gigabytes(base) + (0.0 if adapter is None else missing_beside(base, adapter))
    return Estimate(download == 0, download, needed(base, rung, dtype) + beside, rung.name, seconds, free)


def adapter_here(adapter: str) -> Path | None:
    """The folder that `loading.adapter_folder` gives; None if it would have to be fetched. Nobody is asked."""
    repo, _, revision = adapter.partition("@")
    if repo != REPO and (is_there(adapter) or not is_repo(repo)):
        return Path(adapter)
    with suppress(NestedAttentionError):
        if repo == REPO:
            folder = converted(commit_of(repo, revision or None, local=True))
        else:
            folder = fetch(repo, revision or None, [CONFIG, WEIGHTS], local=True)
        return folder if all((folder / name).is_file() for name in (CONFIG, WEIGHTS)) else None
    return None


def missing_beside(base: Base, adapter: str) -> float:
    """What of an adapter and its image encoder would have to be downloaded; of what was never here, what such usually take."""
    image_encoder = min(IMAGE_ENCODER, 2 * base.subject_gigabytes)  # repos have it in 32 bit
    folder = adapter_here(adapter)
    if folder is None:
        return base.adapter_gigabytes + image_encoder
    config = read_config(folder)
    if on_hub(folder, config.image_encoder):
        with suppress(NestedAttentionError):
            files = encoder_files(config.image_subfolder)
            encoder = fetch(config.image_encoder, config.image_revision, files, local=True) / config.image_subfolder
            if (encoder / "config.json").is_file() and any(encoder.glob("model*.safetensors")):
                return 0.0
        return image_encoder
    return 0.0


def missing_gigabytes(base: Base) -> float:
    """What of a base would have to be downloaded. Nobody is asked."""
    missing = base.gigabytes
    with suppress(NestedAttentionError):
        base_folder(base, local=True)
        missing = 0.0
    if base.few_steps is not None:
        missing += base.few_steps.gigabytes
        with suppress(NestedAttentionError):
            if (few_steps_folder(base.few_steps, local=True) / base.few_steps.file).is_file():
                missing -= base.few_steps.gigabytes
    return missing


@cache
def teraflops_per_second(device: torch.device) -> float:
    """How fast the device multiplies matrices in the dtype that would be used; measured once, in a fraction of a second."""
    a = torch.randn(SIDE, SIDE, device=device).to(best_dtype(device))
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # reading a number waits for the device
        taken.append(time.perf_counter() - start)
    return 2 * SIDE**3 / min(taken) / 1e12
