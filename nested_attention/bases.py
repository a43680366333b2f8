"""The base models that are known by name, and others of the same architectures. A preset is data; every base runs
through the same classes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nested_attention.errors import NestedAttentionError
from nested_attention.files import is_there
from nested_attention.hub import is_repo

ASSETS = Path(__file__).parent.parent / "assets"
INDEX = "model_index.json"  # names a base's architecture and its parts


@dataclass(frozen=True)
class FewSteps:
    """A LoRA that makes a base draw in few steps, and the scheduler it was distilled for.

    `file`, of `gigabytes`, of the Hub repo `repo` at `revision`; `scheduler`: a class of diffusers, with the settings `config`.
    """

    repo: str
    revision: str | None
    file: str
    gigabytes: float
    scheduler: str
    config: Mapping[str, str]


@dataclass(frozen=True)
class Base:
    """A text-to-image base model and the settings it likes.

    Attributes:
        name: how `from_pretrained` and adapters call it.
        pipeline: the diffusers pipeline class, as `model_index.json` names it.
        source: a diffusers folder, or a Hub repo id.
        revision: commit of the repo; None for a folder, or where the first download decides (see `hub`).
        variant: weight files to load, such as "fp16"; None for the plain ones.
        adapters: folder with adapters that come along, or None.
        steps, guidance_scale, negative_prompt: defaults of a generation.
        fast_steps: enough for a quick look.
        size: default side in pixels. `sizes`: smallest and largest side, and what both sides are multiples of.
        gigabytes: of weights in 16 bit, to be downloaded and to be held.
        adapter_gigabytes: of an adapter as large as the released one, in 16 bit; of those that come along.
        subject_gigabytes: of its image encoder, and of the keys and values of one picture.
        teraflops: of one step with guidance at the default size, multiplications and additions counted apart.
        licence: of the weights.
        few_steps: what lets this preset draw in few steps, or None.
        most_steps: that may be asked for; after loading not more than its scheduler takes.
    """

    name: str
    pipeline: str
    source: str
    revision: str | None
    variant: str | None
    adapters: Path | None
    steps: int
    fast_steps: int
    guidance_scale: float
    negative_prompt: str
    size: int
    sizes: tuple[int, int, int]
    gigabytes: float
    adapter_gigabytes: float
    subject_gigabytes: float
    teraflops: float
    licence: str
    few_steps: FewSteps | None = None
    most_steps: int = 150


BASES = {
    base.name: base
    for base in (
        Base(
            "storybook", "StableDiffusionPipeline", str(ASSETS / "storybook/base"), None, None, ASSETS / "storybook/adapters",
            steps=10, fast_steps=5, guidance_scale=2.5, negative_prompt="", size=128, sizes=(128, 128, 8), gigabytes=0.07,
            adapter_gigabytes=0.02, subject_gigabytes=0.01, teraflops=0.013, licence="MIT",
        ),
        Base(
            "sd15", "StableDiffusionPipeline", "stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
            "fp16", None, steps=30, fast_steps=12, guidance_scale=7.0, negative_prompt="", size=512, sizes=(256, 1024, 8),
            gigabytes=2.7, adapter_gigabytes=0.2, subject_gigabytes=1.3, teraflops=1.6, licence="CreativeML Open RAIL-M",
        ),
        Base(
            "sdxl", "StableDiffusionXLPipeline", "stabilityai/stable-diffusion-xl-base-1.0", "462165984030d82259a11f4367a4eed129e94a7b",
            "fp16", None, steps=30, fast_steps=12, guidance_scale=5.0,
            negative_prompt="bad anatomy, monochrome, lowres, worst quality, low quality", size=1024, sizes=(512, 2048, 8),
            gigabytes=6.9, adapter_gigabytes=0.9, subject_gigabytes=1.6, teraflops=13.5, licence="CreativeML Open RAIL++-M",
        ),
    )
}  # fmt: skip
LCM_FILE = "pytorch_lora_weights.safetensors"
BASES |= {  # the same bases in few steps
    preset.name: preset
    for preset in (
        replace(
            BASES["sdxl"], name="sdxl-lightning", teraflops=6.8, steps=4, fast_steps=4, guidance_scale=1.0,
            few_steps=FewSteps(
                "ByteDance/SDXL-Lightning", "c9a24f48e1c025556787b0c58dd67a091ece2e44", "sdxl_lightning_4step_lora.safetensors", 0.4,
                "EulerDiscreteScheduler", {"timestep_spacing": "trailing"},
            ),
        ),
        replace(
            BASES["sdxl"], name="sdxl-lcm", steps=6, fast_steps=4, guidance_scale=1.5,
            few_steps=FewSteps("latent-consistency/lcm-lora-sdxl", None, LCM_FILE, 0.4, "LCMScheduler", {}),
        ),
        replace(
            BASES["sd15"], name="sd15-lcm", steps=6, fast_steps=4, guidance_scale=1.5,
            few_steps=FewSteps("latent-consistency/lcm-lora-sdv1-5", None, LCM_FILE, 0.1, "LCMScheduler", {}),
        ),
    )
}  # fmt: skip
CROSS = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
UNETS: dict[str, dict] = {  # settings of the U-Nets whose weights may not be here
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
        "down_block_types": ("DownBlock2D", CROSS[0], CROSS[0]), "up_block_types": (CROSS[1], CROSS[1], "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
PATCHES = ["patches", "PatchAutoencoder"]  # the VAE of Storybook and of what is trained as it was, as `train.export` names it
ARCHITECTURES = {"StableDiffusionPipeline": BASES["sd15"], "StableDiffusionXLPipeline": BASES["sdxl"]}


def find_base(name: str) -> Base:
    """The preset called `name`, or one for a diffusers folder or Hub repo id `user/name[@revision]` of a known architecture.

    A repo's architecture is only known once it is fetched; until then it counts as SDXL.

    Raises:
        NestedAttentionError: there is none.
    """
    if name in BASES:
        return BASES[name]
    index = Path(name) / INDEX
    if is_there(index):
        folder = str(Path(name).resolve())
        return replace(of_architecture(name, index), name=name, source=folder, revision=None, variant=None, licence="see its source")
    repo, _, revision = name.partition("@")
    if is_repo(repo) and not is_there(name):
        return replace(BASES["sdxl"], name=name, source=repo, revision=revision or None, variant=None, licence="see its page on the Hub")
    raise NestedAttentionError(
        f"there is no base model called {name!r}; known are {', '.join(BASES)}, or give a diffusers folder or a Hub repo id."
    )


def of_architecture(name: str, index: Path) -> Base:
    """The preset with the architecture that `model_index.json` names.

    Raises:
        NestedAttentionError: the architecture is another one, such as FLUX or SD3, or the file is missing or damaged.
    """
    try:
        content = json.loads(index.read_text())
        found = content["_class_name"]
    except FileNotFoundError as error:
        raise NestedAttentionError(f"{name} has no {INDEX}, so it is no diffusers pipeline; choose one that is.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise NestedAttentionError(f"{index} is damaged; download {name} again.") from error
    if found not in ARCHITECTURES:
        raise NestedAttentionError(
            f"{name} is a {found.removesuffix('Pipeline')} model; adapters here are made for {' and '.join(c.removesuffix('Pipeline') for c in ARCHITECTURES)}. "
            "Choose a model of one of these."
        )
    if content.get("vae") == PATCHES:
        return replace(BASES["storybook"], adapters=None)
    return ARCHITECTURES[found]


def unet_settings(name: str) -> dict:
    """What diffusers builds the U-Net of `storybook`, `sd15` or `sdxl` from, without its weights."""
    return UNETS[name] if name in UNETS else json.loads((Path(BASES[name].source) / "unet/config.json").read_text())


def parts(index: Path) -> list[str]:
    """The folders of a base's parts, which `model_index.json` names with the library and class of each."""
    return list(makers(index))


def makers(index: Path) -> dict[str, str]:
    """Part -> the library, or the module of its own, that has its class."""
    return {name: made_by[0] for name, made_by in json.loads(index.read_text()).items() if isinstance(made_by, list) and made_by[0]}


def brought_code(folder: Path) -> list[Path]:
    """The files of code that parts of a base bring along, which diffusers runs if it may."""
    files = [folder / part / f"{module}.py" for part, module in makers(folder / INDEX).items()]
    return [file for file in files if file.is_file()]


def of_size(base: Base, side: int) -> Base:
    """`base` for pictures of `side` pixels, its smallest and largest in proportion."""
    low, high, multiple = base.sizes
    return replace(base, size=side, sizes=(low * side // base.size, high * side // base.size, multiple))
