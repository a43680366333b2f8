"""An adapter for one kind: `python -m train.adapter --kind person --config train/configs/storybook.toml`.

Reads the section `[adapter]` of the config. `--init` starts from another run's adapter: for a base that was trained
further, or for a second stage at another resolution.
"""

import argparse
import tomllib
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import CLIPVisionModelWithProjection

from nested_attention import NestedAttentionPipeline
from nested_attention.adapters import WEIGHTS, Adapter, AdapterConfig, read_weights
from nested_attention.encoder import ImageConfig, QFormerConfig
from nested_attention.loading import load_base
from train.loop import LoopConfig, fit
from train.objective import Diffusion
from train.personalizer import Personalizer, StorybookTask
from train.storybook.kinds import KINDS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.adapter", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--base", default="storybook")
    parser.add_argument("--init", type=Path, help="adapter folder to start from, such as runs/adapter-person/adapter")
    parser.add_argument("--out", type=Path, help="runs/adapter-KIND if not given")
    options = parser.parse_args()
    out = options.out or Path(f"runs/adapter-{options.kind}")
    config = tomllib.loads(options.config.read_text())["adapter"]
    torch.manual_seed(0)
    preset, stock = load_base(options.base, torch.float32)
    pipe = NestedAttentionPipeline(preset, stock, {}, {})
    assert preset.adapters is not None
    source = (preset.adapters / options.kind / config["image_encoder"]).resolve()
    encoder = CLIPVisionModelWithProjection.from_pretrained(source, dtype=torch.float32)
    sizes = QFormerConfig(**config["qformer"], feature_dim=encoder.config.hidden_size, output_dim=stock.unet.config.cross_attention_dim)
    described = AdapterConfig(
        options.kind, options.kind, preset.name, config["image_encoder"], value_norm=config["value_norm"], lam=config["lam"],
        qformer=sizes, image=ImageConfig(encoder.config.image_size),
    )  # fmt: skip
    adapter = Adapter(described, stock.unet)
    if options.init:
        adapter.load_state_dict(read_weights(options.init / WEIGHTS))
    task = StorybookTask(Personalizer(stock, adapter, encoder), pipe, Diffusion(**config["diffusion"]))
    trained = fit(task, LoopConfig(**config["loop"]), out, {**config, "adapter": asdict(described)})
    assert isinstance(trained, Personalizer)
    trained.adapter.save(out / "adapter")


if __name__ == "__main__":
    main()
