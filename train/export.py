"""From runs to the shipped folders: `python -m train.export --config train/configs/storybook.toml`.

Takes the moving averages of the last checkpoints in `runs/` and writes them as fp16 safetensors in diffusers layout:
`assets/storybook/{base,image_encoder,judge,adapters/KIND}`. What has no run stays as it is shipped; adapters of
other bases are left out. A run that goes on from another one lies in a folder of its own, named with `--runs`.
"""

import argparse
import inspect
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from nested_attention import patches
from nested_attention.adapters import read_config
from nested_attention.bases import ASSETS
from nested_attention.encoding import load_image_encoder
from nested_attention.errors import NestedAttentionError, spoken_at_exit
from nested_attention.files import replaced
from train.base import read_forms
from train.judge import Judge, save_judge
from train.objective import flow_scheduler
from train.settings import read_section
from train.state import Checkpoint, learning, load_weights

STORYBOOK = ASSETS / "storybook"


def export_base(config: dict, run: Path, out: Path) -> None:
    """A diffusers pipeline folder. Its VAE is `nested_attention.patches`, of which the folder carries a copy.

    Raises:
        NestedAttentionError: something of the run is missing or damaged.
    """
    unet, text_encoder, tokenizer = read_forms(run)
    load_average(nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}), run)  # as `train.base.TextToImage` calls them
    stock = StableDiffusionPipeline(
        vae=patches.PatchAutoencoder(config["patch"]), text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
        scheduler=flow_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    with replaced(out) as fresh:
        stock.to(dtype=torch.float16).save_pretrained(fresh)
        index = fresh / "model_index.json"
        index.write_text(index.read_text().replace('"nested_attention.patches"', '"patches"'))
        shutil.copy(inspect.getfile(patches), fresh / "vae/patches.py")


def load_average(model: nn.Module, run: Path) -> None:
    """Gives `model` the average that the checkpoint of a run holds.

    Raises:
        NestedAttentionError: there is none, or it is damaged, or that of another model.
    """
    loaded = Checkpoint(run / "state").load()
    if loaded is None:
        raise NestedAttentionError(f"{run} holds no checkpoint; train it first.")
    load_weights(learning(model), loaded[0]["average"])
    print(f"{run}: step {loaded[1]['step']}, {loaded[1]['seconds'] / 3600:.1f} hours")


def adapters_of(runs: Path) -> dict[str, Path]:
    """Kind -> the folder of Storybook's adapter for it in `runs`; those of other bases are named on the terminal.

    Raises:
        NestedAttentionError: there are two of a kind, or a config is damaged.
    """
    found: dict[str, Path] = {}
    for adapter in sorted(runs.glob("adapter-*/adapter")):
        config = read_config(adapter)
        if config.base != "storybook":
            print(
                f"{adapter} is left out, since its base is {config.base}; `python -m train.push {adapter.parent} user/name` publishes it."
            )
        elif (other := found.setdefault(config.kind, adapter)) != adapter:
            raise NestedAttentionError(
                f"{other} and {adapter} are both for {config.kind}; move the one that is not to be shipped to another folder than {runs}."
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.export", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=STORYBOOK)
    options = parser.parse_args()
    runs, out = options.runs, options.out
    config, adapters = read_section(options.config, "base"), adapters_of(runs)
    if (runs / "base/state").is_dir():
        export_base(config, runs / "base", out / "base")
    if (runs / "encoder/image_encoder").is_dir():
        with replaced(out / "image_encoder") as fresh:
            load_image_encoder(runs / "encoder/image_encoder").half().save_pretrained(fresh)
    if (runs / "judge/state").is_dir():
        judge = Judge()
        load_average(judge, runs / "judge")
        save_judge(judge, out / "judge")
    for kind, adapter in adapters.items():
        with replaced(out / "adapters" / kind) as fresh:
            shutil.copytree(adapter, fresh)


if __name__ == "__main__":
    with spoken_at_exit():
        main()
