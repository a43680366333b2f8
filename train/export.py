"""From runs to the shipped folders: `python -m train.export --config train/configs/storybook.toml`.

Takes the moving averages of the last checkpoints in `runs/` and writes them as fp16 safetensors in diffusers layout:
`assets/storybook/{base,image_encoder,judge,adapters/KIND}`. What has no run stays as it is shipped; adapters of
other bases are left out.
"""

import argparse
import inspect
import shutil
import tomllib
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from nested_attention import patches
from nested_attention.adapters import read_config
from nested_attention.bases import ASSETS
from nested_attention.encoder import feature_dim
from nested_attention.encoding import load_image_encoder
from nested_attention.files import replaced
from train.base import build, image_encoder
from train.judge import Judge, save_judge
from train.objective import flow_scheduler
from train.state import Checkpoint

STORYBOOK = ASSETS / "storybook"


def export_base(config: dict, run: Path, text_run: Path, out: Path) -> None:
    """A diffusers pipeline folder. Its VAE is `nested_attention.patches`, of which the folder carries a copy."""
    model, tokenizer = build(config, text_run, feature_dim(image_encoder()))
    load_average(model, run)
    stock = StableDiffusionPipeline(
        vae=patches.PatchAutoencoder(config["patch"]), text_encoder=model.text_encoder, tokenizer=tokenizer, unet=model.unet,
        scheduler=flow_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    with replaced(out) as fresh:
        stock.to(dtype=torch.float16).save_pretrained(fresh)
        index = fresh / "model_index.json"
        index.write_text(index.read_text().replace('"nested_attention.patches"', '"patches"'))
        shutil.copy(inspect.getfile(patches), fresh / "vae/patches.py")


def load_average(model: torch.nn.Module, run: Path) -> None:
    loaded = Checkpoint(run / "state").load()
    if loaded is None:
        raise SystemExit(f"{run} holds no checkpoint; train it first.")
    model.load_state_dict(loaded[0]["average"], strict=False)
    print(f"{run}: step {loaded[1]['step']}, {loaded[1]['seconds'] / 3600:.1f} hours")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.export", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=STORYBOOK)
    options = parser.parse_args()
    config = tomllib.loads(options.config.read_text())
    runs, out = options.runs, options.out
    if (runs / "base/state").is_dir():
        export_base(config["base"], runs / "base", runs / "text", out / "base")
    if (runs / "encoder/image_encoder").is_dir():
        with replaced(out / "image_encoder") as fresh:
            load_image_encoder(runs / "encoder/image_encoder").half().save_pretrained(fresh)
    if (runs / "judge/state").is_dir():
        judge = Judge()
        load_average(judge, runs / "judge")
        save_judge(judge, out / "judge")
    for adapter in sorted(runs.glob("adapter-*/adapter")):
        if (base := read_config(adapter).base) != "storybook":
            print(f"{adapter} is left out, since its base is {base}; `python -m train.push {adapter.parent} user/name` publishes it.")
            continue
        with replaced(out / "adapters" / adapter.parent.name.removeprefix("adapter-")) as fresh:
            shutil.copytree(adapter, fresh)


if __name__ == "__main__":
    main()
