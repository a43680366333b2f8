"""A tiny training on Storybook's pictures."""

import json
from pathlib import Path

import torch

from nested_attention import NestedAttentionPipeline
from nested_attention.adapters import Adapter, AdapterConfig
from nested_attention.bases import BASES
from nested_attention.encoder import ImageConfig, QFormerConfig
from tests import tiny
from train.loop import LoopConfig
from train.objective import Diffusion
from train.personalizer import Personalizer
from train.storybook.task import StorybookTask

LOOP = LoopConfig(steps=4, batch_size=2, warmup=1, mixed_precision="no", workers=0, log_every=1, save_minutes=0.0, grid_every=1000)


class Stopped(Exception):
    pass


class SmallTask(StorybookTask):
    """Adapter training on tiny Storybook components; draws no grids and can be made to stop."""

    sampled = 8
    stop_after = 10**9

    def loss(self, model, batch):
        if self.stop_after == 0:
            raise Stopped
        self.stop_after -= 1
        return super().loss(model, batch)

    def grid(self) -> None:
        pass


def task() -> SmallTask:
    pipe = NestedAttentionPipeline(BASES["storybook"], tiny.storybook(), {}, {})
    torch.manual_seed(3)
    sizes = QFormerConfig(num_tokens=4, width=32, depth=1, heads=2, head_dim=16, feature_dim=tiny.WIDTH, output_dim=tiny.WIDTH)
    config = AdapterConfig("cat", "cat", "storybook", "vision", qformer=sizes, image=ImageConfig(128))
    return SmallTask(Personalizer(pipe.stock, Adapter(config, pipe.stock.unet), tiny.vision(128)), pipe, Diffusion())


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
