"""An adapter for one kind of subject, on Storybook's pictures or on photos:

    python -m train.adapter --kind cat
    python -m train.adapter --base sdxl --data PREPARED_FOLDER

`--data` is a folder from `train.prepare`, a data set, or tar shards (`train.photos.sources`). Reads the section `[adapter]`
of the config, which is `train/configs/BASE.toml` if not given; its stages follow each other, each a run of its own below the
last. `--init` starts from another adapter than the config's `start`, which has had its first lessons (`train.reader`,
`train.keys`), and keeps its image encoder, its lambda and its licence.
Several GPUs: `accelerate launch --config_file train/configs/accelerate/ddp.yaml -m train.adapter ...`.
"""

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nested_attention import NestedAttentionError, NestedAttentionPipeline
from nested_attention.adapters import WEIGHTS, Adapter, AdapterConfig, read_config, read_weights, save_adapter
from nested_attention.bases import BASES, find_base
from nested_attention.encoder import ImageConfig, QFormerConfig, feature_dim
from nested_attention.encoding import ImageEncoders, on_hub
from nested_attention.faces import SEARCHES
from nested_attention.hub import commit_of
from nested_attention.loading import load_base
from train.loop import LoopConfig, Share, fit, last_logged
from train.objective import Diffusion
from train.personalizer import AdapterTask, Personalizer
from train.photos.cache import FeatureCache
from train.photos.dataset import buckets
from train.photos.sample import Source
from train.photos.sources import open_source
from train.photos.task import PhotoTask
from train.processes import asked_to_shard, this_process, training_command
from train.settings import check, read_section
from train.start import noted

CONFIGS = Path(__file__).parent / "configs"
METRICS = {"loss": "last loss", "held_out": "held-out loss"}  # in the log -> in the adapter's config
OFTEN = 2000  # a run that shows every photo more often is far too long for them


@dataclass(frozen=True)
class Job:
    """What is to be trained: the command's arguments and the config's section `[adapter]`."""

    kind: str
    word: str
    base: str
    data: str | None
    init: Path | None
    cache: Path | None
    out: Path
    config: dict[str, Any]

    def model(self) -> tuple[Personalizer, NestedAttentionPipeline]:
        """Base, image encoder and a fresh adapter, or the one to start from.

        Raises:
            NestedAttentionError: one of them cannot be had, or they do not fit each other.
        """
        config, device = self.config, this_process().device
        dtype = getattr(torch, config.get("frozen", "float32"))
        preset, stock = load_base(self.base, dtype)
        if config.get("checkpointing"):
            stock.unet.enable_gradient_checkpointing()
        comes_along, start = (preset.adapters or Path()) / self.kind, self.start()
        described = AdapterConfig(
            self.kind, self.word, preset.name, config["image_encoder"], config.get("image_subfolder", ""),
            value_norm=config["value_norm"], lam=config["lam"], licence=config["licence"], image=ImageConfig.from_dict(config["image"]),
            framing=config.get("framing", "whole") if self.kind in SEARCHES else "whole",  # as `train.prepare` makes references
        )  # fmt: skip
        if start is not None:
            described = going_on(described, start, preset.adapters)
        if described.image_revision is None and on_hub(comes_along, described.image_encoder):
            described = replace(described, image_revision=commit_of(described.image_encoder))
        encoder = ImageEncoders({self.kind: comes_along}, device, dtype).get(described)
        width = stock.unet.config.cross_attention_dim
        sizes = QFormerConfig(**config["qformer"], feature_dim=feature_dim(encoder), output_dim=width)
        adapter = Adapter(replace(described, qformer=sizes), stock.unet)
        if start is not None:
            try:
                adapter.load_state_dict(read_weights(start / WEIGHTS))
            except RuntimeError as error:
                raise NestedAttentionError(
                    f"{start / WEIGHTS} has other sizes than the config and the base {preset.name} ask for; start from an adapter that was "
                    "trained with them, or give its sizes in [adapter.qformer]."
                ) from error
        return Personalizer(stock.to(device), adapter.float(), encoder, config.get("even", False)), NestedAttentionPipeline(
            preset, stock, {}, {}, device
        )

    def start(self) -> Path | None:
        """The folder of the adapter to start from; None for a fresh one.

        Raises:
            NestedAttentionError: it is not there.
        """
        start = self.init or (Path(self.config["start"].format(kind=self.kind)) if "start" in self.config else None)
        if start is not None and not (start / WEIGHTS).is_file():
            raise NestedAttentionError(
                f"{start / WEIGHTS} is not there, and this run starts from it; make it first (Storybook's: python -m train.keys "
                f"--kind {self.kind}), or go on from another with --init, such as assets/storybook/adapters/{self.kind}."
            )
        return start

    def photos(self) -> Source | None:
        """The photos to train on; None to train on Storybook's pictures.

        Raises:
            NestedAttentionError: they cannot be used, or the config is made for the other one of both; Storybook's packages
                are missing.
        """
        if self.data is None:
            if "diffusion" not in self.config:
                raise NestedAttentionError("this config is for photos, it has no [adapter.diffusion]; name them with --data.")
            if self.kind not in (kinds := storybook_kinds()):
                raise NestedAttentionError(f"Storybook has no {self.kind!r}, only {', '.join(kinds)}; name photos with --data.")
            return None
        if any("resolution" not in stage for stage in self.config["stages"]):
            raise NestedAttentionError(
                "this config is for Storybook's own pictures, its stages have no resolution; name a base for photos, such as --base sdxl, "
                "or leave out --data."
            )
        source, samples = open_source(self.data, self.kind), count_samples(self.config)
        if (often := samples // len(source)) > OFTEN:
            few = CONFIGS / "sdxl-few.toml"
            shorter = f"for few photos and one GPU there is --config {few}" if samples > count_samples(read_section(few, "adapter")) else ""
            this_process().print(f"this config would show each of the {len(source)} photos {often} times; {shorter or 'lower its steps'}.")
        return source

    def loops(self) -> list[LoopConfig]:
        """The settings of all stages; what the last one cannot do is said before the first one has run for days.

        Raises:
            NestedAttentionError: a setting cannot be used.
        """
        stages = self.config["stages"]
        loops = [LoopConfig.from_dict(stage["loop"]) for stage in stages]
        for loop in loops:
            check(loop, this_process().num_processes, asked_to_shard())
        if len(precisions := {loop.mixed_precision for loop in loops}) > 1:
            raise NestedAttentionError(
                f"the stages name more than one mixed_precision, {' and '.join(sorted(map(repr, precisions)))}, but all run in one process; "
                "give all of them the same."
            )
        for stage in stages:
            if "resolution" in stage:
                buckets(stage["resolution"])
        return loops

    def task(self, model: Personalizer, pipe: NestedAttentionPipeline, photos: Source | None, stage: dict[str, Any]) -> AdapterTask:
        if photos is None:
            from train.storybook.task import StorybookTask  # here, see `storybook_kinds`

            return StorybookTask(model, pipe, Diffusion(**self.config["diffusion"]))
        return PhotoTask(model, pipe, photos, stage["resolution"], None if self.cache is None else FeatureCache(self.cache))

    def run(self) -> Path:
        """Trains stage after stage; returns the folder of the finished adapter.

        Raises:
            NestedAttentionError: photos, base, a setting or a checkpoint cannot be used; the disk is full.
        """
        loops, photos, start = self.loops(), self.photos(), self.start()  # before the base is fetched, which takes longest
        made_of = {
            "data": self.data or "Storybook", "photos": None if photos is None else len(photos),
            "start": None if start is None else noted(start),
            "settings": {name: value for name, value in self.config.items() if name != "stages"},
        }  # fmt: skip
        state, learned = this_process(), None
        for number, (stage, loop) in enumerate(zip(stages := self.config["stages"], loops, strict=True), 1):
            folder = self.out if number == len(stages) else self.out / f"stage-{number}"
            torch.manual_seed(0)
            model, pipe = self.model()
            if learned is not None:
                model.load_state_dict(learned, strict=False)
            task = self.task(model, pipe, photos, stage)
            if isinstance(task, PhotoTask) and task.cache is not None:
                task.cache_features(Share(rank=state.process_index, processes=state.num_processes))
                state.wait_for_everyone()
            learned = fit(task, loop, folder, made_of | {"stage": stage, "adapter": asdict(model.adapter.config)})
        assert learned is not None
        if state.is_main_process:
            logged = last_logged(self.out)
            metrics = {said: logged[name] for name, said in METRICS.items() if name in logged}
            weights = {name.removeprefix("adapter."): value for name, value in learned.items()}
            save_adapter(self.out / "adapter", replace(model.adapter.config, metrics=metrics), weights)
        return self.out / "adapter"


def storybook_kinds() -> tuple[str, ...]:
    """The kinds of subject that Storybook can draw.

    Raises:
        NestedAttentionError: a package that it draws with is missing.
    """
    try:
        from train.storybook.kinds import KINDS  # here, because whoever trains on photos need not have what Storybook draws with
    except ModuleNotFoundError as error:
        raise NestedAttentionError(
            f"Storybook is drawn with packages of which {error.name} is missing; `pip install -r requirements-dev.txt`, or name photos "
            "with --data."
        ) from error
    return tuple(KINDS)


def count_samples(config: dict[str, Any]) -> int:
    """How many samples all stages of a section `[adapter]` train on."""
    return sum(stage["loop"]["steps"] * stage["loop"]["batch_size"] for stage in config["stages"])


def going_on(described: AdapterConfig, start: Path, shipped: Path | None) -> AdapterConfig:
    """`described`, where it goes on from the adapter in the folder `start`: with its image encoder, its lambda, and under its licence.

    A folder that the start names is named as it is if it lies so from the adapters that come with the base, in `shipped`; else by
    its whole path. MIT leaves the licence to the config; any other one binds what is made of the adapter, and so does its credit.

    Raises:
        NestedAttentionError: the adapter in `start` has learned with other settings, or its config is missing or damaged.
    """
    known = read_config(start)
    before, now = (
        {"value_norm": config.value_norm, "framing": config.framing}
        | {f"image.{key}": value for key, value in asdict(config.image).items()}
        for config in (known, described)
    )
    if differing := [name for name in now if before[name] != now[name]]:
        name = differing[0]
        raise NestedAttentionError(
            f"the adapter in {start} has learned with {name} {before[name]!r}, and this run would go on with {now[name]!r}; write the former "
            "into the section [adapter] of the config, or start from another adapter."
        )
    encoder = known.image_encoder
    comes_along = shipped is not None and (shipped / described.kind / encoder).resolve().is_dir()
    if not on_hub(start, encoder) and not comes_along:
        encoder = str((start / encoder).resolve())
    licence = described.licence if known.licence == "MIT" else known.licence
    return replace(
        described, image_encoder=encoder, image_subfolder=known.image_subfolder, image_revision=known.image_revision, lam=known.lam,
        licence=licence, credit=known.credit,
    )  # fmt: skip


def default_config(base: str) -> Path:
    """`train/configs/BASE.toml`; SDXL's for other bases of its architecture.

    Raises:
        NestedAttentionError: there is none, or no such base.
    """
    there = {path.stem: path for path in CONFIGS.glob("*.toml")}
    if base in there:
        return there[base]
    if find_base(base).pipeline == BASES["sdxl"].pipeline:
        return there["sdxl"]
    raise NestedAttentionError(f"there is no config for the base {base}; write one after {there['sdxl']} and name it with --config.")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.adapter", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", type=Path, help="train/configs/BASE.toml if not given; for others of SDXL's architecture sdxl.toml")
    parser.add_argument("--kind", default="person", help="what is personalized, person if not given; also its placeholder <KIND>")
    parser.add_argument("--word", help="the ordinary word in its place, if it is not KIND")
    parser.add_argument("--base", default="storybook", help="a base model by name, folder or repo id")
    parser.add_argument("--data", help="photos; Storybook's own pictures if not given")
    parser.add_argument("--init", type=Path, help="adapter folder to start from, such as runs/adapter-person/adapter")
    parser.add_argument("--cache", type=Path, help="folder for the photos' text and image features, computed once")
    parser.add_argument("--out", type=Path, help="runs/adapter-KIND if not given")
    options = parser.parse_args()
    out = options.out or Path(f"runs/adapter-{options.kind}")
    word = options.word or options.kind
    with training_command():
        config = read_section(options.config or default_config(options.base), "adapter")
        folder = Job(options.kind, word, options.base, options.data, options.init, options.cache, out, config).run()
        this_process().print(f"the adapter is in {folder}")


if __name__ == "__main__":
    main()
