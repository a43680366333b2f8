"""A tiny training on photos as a process of its own: `python -m tests.photo_run PHOTOS OUT STEPS ACCUMULATION [CACHE]`."""

import sys
from pathlib import Path

import torch
from torch import nn

from nested_attention import NestedAttentionPipeline
from nested_attention.adapters import Adapter, AdapterConfig
from nested_attention.bases import BASES
from nested_attention.encoder import ImageConfig, QFormerConfig
from tests import tiny
from train.loop import LoopConfig, Share, fit
from train.personalizer import Personalizer
from train.photos.sources import open_source
from train.photos.task import PhotoTask

RESOLUTION = 64


class TinyPhotoTask(PhotoTask):
    def grid(self, model: nn.Module, path: Path) -> None:
        """Grids are tested elsewhere."""


def task(photos: str, cache: Path | None = None) -> PhotoTask:
    """On the tiny SDXL."""
    stock = tiny.stock("sdxl")
    torch.manual_seed(3)
    width = stock.unet.config.cross_attention_dim
    sizes = QFormerConfig(num_tokens=4, width=32, depth=1, heads=2, head_dim=16, feature_dim=tiny.WIDTH, output_dim=width)
    config = AdapterConfig("person", "person", "tiny", "vision", value_norm="full", qformer=sizes, image=ImageConfig(32))
    pipe = NestedAttentionPipeline(BASES["sdxl"], stock, {}, {})
    return TinyPhotoTask(Personalizer(stock, Adapter(config, stock.unet), tiny.vision()), pipe, open_source(photos), RESOLUTION, cache)


def loop(steps: int, accumulation: int = 1) -> LoopConfig:
    return LoopConfig(
        steps, 4, lr=1e-3, muon_lr=0.0, warmup=1, mixed_precision="no", workers=0, log_every=1, save_minutes=0.0, grid_every=10**6,
        accumulation=accumulation,
    )  # fmt: skip


def main() -> None:
    photos, out, steps, accumulation, *cache = sys.argv[1:]
    torch.set_num_threads(1)
    made = task(photos, Path(cache[0]) if cache else None)
    if made.cache is not None:
        made.cache_features(Share())
    fit(made, loop(int(steps), int(accumulation)), Path(out), {})


if __name__ == "__main__":
    main()
