"""A finished adapter onto the Hugging Face Hub: `python -m train.push runs/adapter-cat user/name`.

Writes the folder `RUN/push` (weights, config, image encoder, model card, sample grids) and uploads it as one commit to a
private repo. The same command resumes: what the Hub already has is not sent again. The token is the one of
`hf auth login` or HF_TOKEN.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData, ModelInfo
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

from nested_attention.adapters import CONFIG, WEIGHTS, AdapterConfig, read_config, read_weights
from nested_attention.bases import ASSETS, BASES, Base, find_base
from nested_attention.encoding import image_encoder_folders
from nested_attention.errors import NestedAttentionError, spoken_at_exit
from nested_attention.files import replaced
from nested_attention.hub import is_repo, record_file, spoken_errors
from train.loop import last_logged
from train.photos.shards import WEB

CARD, IMAGE_ENCODER = "README.md", "image_encoder"
STORYBOOK = "the Storybook world (`train.storybook`), drawn on the fly: a picture, its caption, and another picture of the same subject"


@dataclass(frozen=True)
class Stage:
    """One stage of a run, from what it left in its folder.

    Attributes:
        data: what it learned from, or None if that was not written down; `photos`: how many, where it were photos.
        start: the folder that it started from, or None.
        hours: the last ones in its log, on so many `processes`.
        grids: step -> its sample grid.
    """

    data: str | None
    photos: int | None
    start: Path | None
    steps: int
    batch_size: int
    processes: int
    hours: float
    grids: dict[int, Path]

    @classmethod
    def read(cls, folder: Path) -> "Stage":
        """Raises:
        NestedAttentionError: a file is missing or damaged.
        """
        try:
            made = json.loads((folder / "config.json").read_text())
            loop, grids = made["loop"], {int(path.stem): path for path in sorted((folder / "grids").glob("[0-9]*.png"))}
            start = Path(made["start"]["folder"]) if made.get("start") else None
            hours = last_logged(folder)["hours"]
            return cls(made.get("data"), made.get("photos"), start, loop["steps"], loop["batch_size"], made["processes"], hours, grids)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise NestedAttentionError(f"the run {folder} is damaged ({error}); call `train.adapter` again, it resumes.") from error


@dataclass(frozen=True)
class Run:
    """A finished adapter run, `stages` in their order."""

    adapter: Path
    config: AdapterConfig
    base: Base
    parameters: int
    stages: list[Stage]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Reads what `train.adapter` left in `folder`.

        Raises:
            NestedAttentionError: it is no finished run, or a file is damaged.
        """
        adapter = folder / "adapter"
        if not (adapter / WEIGHTS).is_file():
            raise NestedAttentionError(f"{folder} holds no finished adapter; let `train.adapter` train it to its last step first.")
        config = read_config(adapter)
        stages = [Stage.read(stage) for stage in (*sorted(folder.glob("stage-*")), folder)]
        parameters = sum(value.numel() for value in read_weights(adapter / WEIGHTS).values())
        return cls(adapter, config, find_base(config.base), parameters, stages)

    @property
    def called(self) -> str:
        """What others call the base: of one in a folder its last part, since nobody else has a use for the path."""
        local = self.base.name not in BASES and Path(self.base.source).is_absolute()
        return Path(self.base.source).name if local else self.base.name

    @property
    def grids(self) -> dict[int, Path]:
        """The first, middle and last of the sample grids, by step, counted through all stages."""
        drawn: dict[int, Path] = {}
        before = 0
        for stage in self.stages:
            drawn |= {before + step: grid for step, grid in stage.grids.items()}
            before += stage.steps
        steps = sorted(drawn)
        return {step: drawn[step] for step in sorted({steps[0], steps[len(steps) // 2], steps[-1]})} if steps else {}


def find_image_encoder(run: Run, given: Path | None) -> Path | None:
    """The folder of the image encoder that has to come along: `given`, or where the adapter or its training found it.

    None if the image encoder is a repo of its own.

    Raises:
        NestedAttentionError: it is a folder, and not there.
    """
    folders = [given] if given else image_encoder_folders(run.adapter, run.config)
    if found := next((folder for folder in folders if (folder / "config.json").is_file()), None):
        return found
    if given or run.config.image_encoder.startswith("."):
        raise NestedAttentionError(f"there is no image encoder in {' or '.join(map(str, folders))}; name its folder by --image-encoder.")
    return None


def write_folder(run: Run, repo: str, image_encoder: Path | None, out: Path) -> list[str]:
    """Writes what is to be uploaded into `out`, in place of what an earlier push wrote. Returns the names of the files.

    Raises:
        NestedAttentionError: `out` is something else, or cannot be written.
    """
    if out.exists() and not all((out / name).is_file() for name in (CARD, WEIGHTS)):
        raise NestedAttentionError(f"{out} is there and was not written by train.push; remove it, or give another folder with --out.")
    config, sources = replace(run.config, base=run.called), {WEIGHTS: run.adapter / WEIGHTS}
    if image_encoder is not None:
        config = replace(config, image_encoder=IMAGE_ENCODER, image_subfolder="", image_revision=None)
        files = [*image_encoder.glob("*.json"), *image_encoder.glob("*.safetensors")]
        sources |= {f"{IMAGE_ENCODER}/{file.name}": file for file in files}
    sources |= {f"grids/{step:06d}.png": grid for step, grid in run.grids.items()}
    with replaced(out) as fresh:
        for name, source in sources.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, fresh / name)
        (fresh / CONFIG).write_text(json.dumps(asdict(config), indent=2) + "\n")
        (fresh / CARD).write_text(card(run, repo))
    return [*sources, CONFIG, CARD]


def published(data: str) -> str:
    """What the card calls the `--data` of a training: of what lies on this machine the last part of its path."""
    elsewhere = data.startswith(WEB) or (is_repo(data.partition("@")[0]) and not Path(data).exists())
    return data if elsewhere else Path(data).name


def whereabouts(base: Base) -> str:
    """Where a reader of the card gets the base model."""
    source = Path(base.source)
    if not source.is_absolute():
        return f"[{base.source}](https://huggingface.co/{base.source})"
    return "which comes with the code" if ASSETS in source.parents else "a folder of the one who trained this, which is on no Hub"


def called_start(start: Path) -> str:
    """How the card calls the folder that a run started from: by a run's name, or its last part."""
    return f"`{start.parent.name if start.name == 'adapter' else start.name}`"


FRAMED = """from nested_attention.faces import frame
from nested_attention.images import read_image
"""


def card(run: Run, repo: str) -> str:
    """The model card. It says nothing that changes from one call to the next, so that a second push sends nothing."""
    config, base, called, kind, last = run.config, run.base, run.called, run.config.kind, run.stages[-1]
    header = ModelCardData(
        license=config.licence.lower(), library_name="nested-attention", pipeline_tag="text-to-image",
        base_model=None if Path(base.source).is_absolute() else base.source,  # the Hub accepts repo ids only
        tags=["nested-attention", "personalization", "adapter", called, kind],
    )  # fmt: skip
    face, steps = config.framing == "face", [stage.steps for stage in run.stages]
    picture = f'frame(read_image("picture.png"), "{kind}").image' if face else '"picture.png"'
    facts = {
        "base model": f"`{called}`, {whereabouts(base)}",
        "data": published(last.data) if last.data else (STORYBOOK if config.base == "storybook" else "not recorded"),
        **({"photos": f"{last.photos:,}"} if last.photos else {}),
        **({"started from": called_start(last.start)} if last.start else {}),
        "steps": f"{sum(steps):,}" + (f" ({' + '.join(f'{count:,}' for count in steps)})" if len(steps) > 1 else ""),
        "batch size": " and ".join(dict.fromkeys(f"{stage.batch_size:,}" for stage in run.stages)),
        "hours": f"{sum(stage.hours for stage in run.stages):g}",
        "processes": " and ".join(dict.fromkeys(f"{stage.processes}" for stage in run.stages)),
        "parameters": f"{run.parameters / 1e6:.2f} million",
        **{name: f"{value:g}" for name, value in config.metrics.items()},
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    credit = f" It was made of {config.credit}." if config.credit else ""
    samples = "\n\n".join(f"Step {step:,}:\n\n![step {step}](grids/{step:06d}.png)" for step in run.grids)
    return f"""---
{header.to_yaml()}
---

# {repo.split("/")[1]}

Give a picture of a {config.word}, write `<{kind}>` in a prompt: this adapter for the base model `{called}` draws the same
one, by [nested attention](https://arxiv.org/abs/2501.01407).

```python
{FRAMED if face else ""}from nested_attention import NestedAttentionPipeline

pipe = NestedAttentionPipeline.from_pretrained("{called}", adapter="{repo}")
subject = pipe.encode("{kind}", {picture})
pipe("a drawing of <{kind}> on the beach", subjects=[subject]).images[0].save("drawn.png")
```

## Training

| | |
|---|---|
{rows}

## Samples

{samples or "None were drawn."}

## Licence

{config.licence}, for the adapter.{credit} The base model has a licence of its own: {base.licence}.
"""


@contextmanager
def spoken_upload(repo: str) -> Iterator[None]:
    """`spoken_errors`, and what only an upload raises, as one sentence with the next step."""
    with spoken_errors(repo):
        try:
            yield
        except (HfHubHTTPError, HFValidationError):
            raise
        except (HTTPError, OSError, RuntimeError, json.JSONDecodeError) as error:
            if isinstance(error.__cause__, HfHubHTTPError):  # raised by a thread that uploads, and wrapped
                raise error.__cause__ from None
            raise NestedAttentionError(
                f"the Hub cannot be reached, or the upload to {repo} broke off; run the same command again, it sends only what is missing."
            ) from error
        except ValueError as error:
            raise NestedAttentionError(
                f"the Hub does not accept the model card ({' '.join(str(error).split())}); correct licence and base in the adapter's {CONFIG}."
            ) from error


def upload(repo: str, folder: Path, files: list[str], public: bool) -> ModelInfo:
    """Uploads `files` of `folder` as one commit, and returns the repo at that commit.

    Raises:
        NestedAttentionError: no network, no permission, or the Hub does not take it.
    """
    api = HfApi()
    with spoken_upload(repo):
        api.create_repo(repo, private=True, exist_ok=True)
        commit = api.create_commit(
            repo, [CommitOperationAdd(name, folder / name) for name in files], commit_message="Adapter, model card and sample grids"
        )
        if public:  # only now, so that nobody sees half of it
            api.update_repo_settings(repo, private=False)
        return api.model_info(repo, revision=commit.oid)


def push(options: argparse.Namespace) -> None:
    """Does what the command's arguments say.

    Raises:
        NestedAttentionError: the run is not finished, its folder cannot be written, or the Hub does not take it.
    """
    if options.repo.count("/") != 1:
        raise NestedAttentionError(f"{options.repo!r} is not a repo id of the form user/name; check the spelling.")
    run = Run.read(options.run)
    out = options.out or options.run / "push"
    files = write_folder(run, options.repo, find_image_encoder(run, options.image_encoder), out)
    if options.dry_run:
        print(f"{len(files)} files are in {out}; nothing was uploaded.")
        return
    info = upload(options.repo, out, files, options.public)
    print(f"{HfApi().endpoint}/{info.id} ({'private' if info.private else 'public'}), revision to pin: {info.sha}")
    print(f'Load it: NestedAttentionPipeline.from_pretrained("{run.base.name}", adapter="{info.id}")')
    print(f"Where an earlier revision was loaded before, it stays until its line is removed from {record_file()}.")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.push", description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run, such as runs/adapter-cat")
    parser.add_argument("repo", help="where to: user/name")
    parser.add_argument("--public", action="store_true", help="let everyone see it; else a new repo is private")
    parser.add_argument("--image-encoder", type=Path, help="its folder, if it is not where the adapter's config says")
    parser.add_argument("--out", type=Path, help="folder to write, RUN/push if not given")
    parser.add_argument("--dry-run", action="store_true", help="write the folder and upload nothing")
    with spoken_at_exit():
        push(parser.parse_args())


if __name__ == "__main__":
    main()
