"""A tiny training on photos as a process of its own, up to each of STEPS in turn: `python -m tests.photo_run PHOTOS OUT STEPS...`."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from nested_attention import NestedAttentionPipeline
from nested_attention.adapters import Adapter, AdapterConfig
from nested_attention.bases import BASES
from nested_attention.encoder import ImageConfig, QFormerConfig
from tests import tiny
from train.loop import LoopConfig, fit
from train.personalizer import Personalizer
from train.photos.cache import FeatureCache
from train.photos.sources import open_source
from train.photos.task import PhotoTask
from train.processes import training_command

RESOLUTION = 64
SMALL = replace(BASES["sdxl"], size=32, sizes=(16, 64, 8), steps=1)


def task(photos: str, cache: FeatureCache | None = None) -> PhotoTask:
    """On the tiny SDXL; its pictures are small and drawn in one step."""
    stock = tiny.stock("sdxl")
    torch.manual_seed(3)
    width = stock.unet.config.cross_attention_dim
    sizes = QFormerConfig(num_tokens=4, width=32, depth=1, heads=2, head_dim=16, feature_dim=tiny.WIDTH, output_dim=width)
    config = AdapterConfig("person", "person", "tiny", "vision", value_norm="full", qformer=sizes, image=ImageConfig(32))
    pipe = NestedAttentionPipeline(SMALL, stock, {}, {})
    return PhotoTask(
        Personalizer(stock, Adapter(config, stock.unet), tiny.vision()), pipe, open_source(photos, "person"), RESOLUTION, cache
    )


def loop(steps: int, accumulation: int = 1) -> LoopConfig:
    return LoopConfig(
        steps, 4, lr=1e-3, muon_lr=0.0, warmup=1, cooldown=0.0, mixed_precision="no", workers=0, log_every=1, save_minutes=0.0, grid_every=10**6,
        accumulation=accumulation, held_out_every=2,
    )  # fmt: skip


def main() -> None:
    photos, out, *stops = sys.argv[1:]
    torch.set_num_threads(1)
    for steps in map(int, stops):
        fit(task(photos), loop(steps, accumulation=2), Path(out), {})
    if torch.distributed.is_initialized():
        for _ in range(20):  # nobody waits for these or holds what they send, so that gloo's threads are at it as the command ends
            torch.distributed.all_reduce(torch.ones(200_000), async_op=True)


if __name__ == "__main__":
    with training_command():
        main()
