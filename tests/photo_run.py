"""A tiny training on photos as a process of its own: `python -m tests.photo_run PHOTOS OUT STEPS ACCUMULATION [shard]`."""

import sys
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

RESOLUTION = 64


class TinyPhotoTask(PhotoTask):
    def grid(self) -> None:
        """At SDXL's size they take too long; the test of `Job.run` draws small ones."""


def task(photos: str, cache: FeatureCache | None = None) -> PhotoTask:
    """On the tiny SDXL."""
    stock = tiny.stock("sdxl")
    torch.manual_seed(3)
    width = stock.unet.config.cross_attention_dim
    sizes = QFormerConfig(num_tokens=4, width=32, depth=1, heads=2, head_dim=16, feature_dim=tiny.WIDTH, output_dim=width)
    config = AdapterConfig("person", "person", "tiny", "vision", value_norm="full", qformer=sizes, image=ImageConfig(32))
    pipe = NestedAttentionPipeline(BASES["sdxl"], stock, {}, {})
    return TinyPhotoTask(
        Personalizer(stock, Adapter(config, stock.unet), tiny.vision()), pipe, open_source(photos, "person"), RESOLUTION, cache
    )


def loop(steps: int, accumulation: int = 1, shard: bool = False) -> LoopConfig:
    return LoopConfig(
        steps, 4, lr=1e-3, muon_lr=0.0, warmup=1, cooldown=0.0, mixed_precision="no", workers=0, log_every=1, save_minutes=0.0, grid_every=10**6,
        accumulation=accumulation, held_out_every=2, shard=shard,
    )  # fmt: skip


def main() -> None:
    photos, out, steps, accumulation, *shard = sys.argv[1:]
    torch.set_num_threads(1)
    fit(task(photos), loop(int(steps), int(accumulation), bool(shard)), Path(out), {})


if __name__ == "__main__":
    main()
