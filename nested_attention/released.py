"""The authors' released weights in our adapter format: `python -m nested_attention import-released`.

The released file is one flat dict. Its exact names are not certain, so they are recognized by shape and order: the
resampler below `image_proj_model.` or `image_proj.`, then per cross-attention layer two 2-D weights below
`adapter_modules.<i>.` or `ip_adapter.<i>.`, where i is either the position among the U-Net's attention processors
(1, 3, 5, ...) or counts 0, 1, 2, ... Sizes are inferred; whatever is missing or left over is listed, all of it, by the
names that the file uses.
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from nested_attention.adapters import CONFIG, Adapter, AdapterConfig, cross_attention_layers, read_config, read_weights
from nested_attention.bases import unet_settings
from nested_attention.encoder import CLIP_VIT_H, QFormerConfig
from nested_attention.errors import NestedAttentionError
from nested_attention.hub import commit_of, fetch, record_file

REPO = "orpatashnik/NestedAttentionEncoder"
FILE = "personalization_encoder/model.safetensors"
LICENCE = "CC-BY-NC-SA-4.0"
CREDIT = (
    f"the weights https://huggingface.co/{REPO} of Or Patashnik, Rinon Gal, Daniil Ostashev, Sergey Tulyakov, Kfir Aberman and "
    "Daniel Cohen-Or, the authors of Nested Attention"
)
HEAD_DIM = 64
QFORMER_PREFIXES, LAYER_PREFIXES = ("image_proj_model.", "image_proj."), ("adapter_modules.", "ip_adapter.")
ORDERED = {("k", "v"), ("key", "value"), ("0", "1")}  # in what the names of a layer's two weights may differ: keys, values
RESAMPLER = (  # a name in the released file -> ours; {j} is the layer
    ("latents", "latents"),
    ("proj_in.weight", "proj_in.weight"),
    ("proj_in.bias", "proj_in.bias"),
    ("proj_out.weight", "proj_out.weight"),
    ("proj_out.bias", "proj_out.bias"),
    ("norm_out.weight", "norm_out.weight"),
    ("norm_out.bias", "norm_out.bias"),
    ("layers.{j}.0.norm1.weight", "attentions.{j}.norm_features.weight"),
    ("layers.{j}.0.norm1.bias", "attentions.{j}.norm_features.bias"),
    ("layers.{j}.0.norm2.weight", "attentions.{j}.norm_latents.weight"),
    ("layers.{j}.0.norm2.bias", "attentions.{j}.norm_latents.bias"),
    ("layers.{j}.0.to_q.weight", "attentions.{j}.to_q.weight"),
    ("layers.{j}.0.to_kv.weight", "attentions.{j}.to_kv.weight"),
    ("layers.{j}.0.to_out.weight", "attentions.{j}.to_out.weight"),
    ("layers.{j}.1.0.weight", "feed_forwards.{j}.0.weight"),
    ("layers.{j}.1.0.bias", "feed_forwards.{j}.0.bias"),
    ("layers.{j}.1.1.weight", "feed_forwards.{j}.1.weight"),
    ("layers.{j}.1.3.weight", "feed_forwards.{j}.3.weight"),
)


@dataclass(frozen=True)
class Released:
    """A released file sorted into its parts: the Q-Former by our names, and per layer (to_k, to_v)."""

    qformer: dict[str, Tensor]
    layers: list[tuple[Tensor, Tensor]]

    def sizes(self) -> QFormerConfig:
        inner, width = self.qformer["attentions.0.to_q.weight"].shape
        return QFormerConfig(
            num_tokens=self.qformer["latents"].shape[1],
            width=width,
            depth=sum(name.endswith("to_q.weight") for name in self.qformer),
            heads=inner // HEAD_DIM,
            head_dim=HEAD_DIM,
            feature_dim=self.qformer["proj_in.weight"].shape[1],
            output_dim=self.qformer["proj_out.weight"].shape[0],
            ff_mult=self.qformer["feed_forwards.0.1.weight"].shape[0] // width,
        )


def sort_released(tensors: dict[str, Tensor], layers: int) -> Released:
    """Recognizes every tensor of a released file made for a U-Net with `layers` cross-attention layers.

    Raises:
        NestedAttentionError: with the full list of names that are missing or left over.
    """
    of_qformer, of_layers = prefix(tensors, QFORMER_PREFIXES), prefix(tensors, LAYER_PREFIXES)
    depth = 1 + max((int(match[1]) for name in tensors if (match := re.match(rf"{re.escape(of_qformer)}layers\.(\d+)\.", name))), default=0)
    qformer = {
        f"{of_qformer}{theirs.format(j=j)}": ours.format(j=j)
        for theirs, ours in RESAMPLER for j in (range(depth) if "{j}" in theirs else (0,))
    }  # fmt: skip
    pairs: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if (match := re.match(rf"{re.escape(of_layers)}(\d+)\.", name)) and value.ndim == 2:
            pairs.setdefault(int(match[1]), {})[name] = value
    missing = [name for name in qformer if name not in tensors]
    used, found = set(qformer), []
    for number in expected_numbers(set(pairs), layers):
        pair = pairs.get(number, {})
        if (key_value := split_pair(pair)) is None:
            missing.append(f"{of_layers}{number}: one weight for keys and one for values")
        else:
            used |= set(pair)
            found.append(key_value)
    left = [name for name in tensors if name not in used]
    if missing or left:
        raise NestedAttentionError(
            f"the released weights are not what was expected. Missing ({len(missing)}): {', '.join(sorted(missing)) or 'nothing'}. "
            f"Left over ({len(left)}): {', '.join(sorted(left)) or 'nothing'}. Report these names, so that the importer can learn them."
        )
    return Released({ours: tensors[theirs] for theirs, ours in qformer.items()}, found)


def prefix(tensors: dict[str, Tensor], known: tuple[str, str]) -> str:
    """The one of two known prefixes that a file uses."""
    return known[1] if any(name.startswith(known[1]) for name in tensors) else known[0]


def expected_numbers(seen: set[int], layers: int) -> range:
    """0, 1, 2, ... or 1, 3, 5, ..., whichever was used."""
    odd = range(1, 2 * layers, 2)
    return odd if seen and max(seen) >= layers else range(layers)


def split_pair(pair: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """(to_k, to_v) from two named weights, or None if it is not clear which is which."""
    if len(pair) != 2:
        return None
    names = sorted(pair, key=str.lower)  # k before v, 0 before 1
    return (pair[names[0]], pair[names[1]]) if difference(*map(str.lower, names)) in ORDERED else None


def difference(first: str, second: str) -> tuple[str, str]:
    """In what two names differ: without what they begin and end with alike."""
    while first and second and first[0] == second[0]:
        first, second = first[1:], second[1:]
    while first and second and first[-1] == second[-1]:
        first, second = first[:-1], second[:-1]
    return first, second


def convert(tensors: dict[str, Tensor], unet: UNet2DConditionModel, revision: str | None) -> Adapter:
    """The released weights as an adapter for `unet`, values unchanged to the bit. `revision`: of their repo, if it is known.

    Raises:
        NestedAttentionError: names or sizes do not fit.
    """
    released = sort_released(tensors, len(cross_attention_layers(unet)))
    config = AdapterConfig(
        kind="person", word="person", base="sdxl", image_encoder=REPO, image_subfolder="image_encoder", image_revision=revision,
        value_norm="full", lam=2.0, framing="face", qformer=released.sizes(), image=CLIP_VIT_H, licence=LICENCE,
        credit=CREDIT,
    )  # fmt: skip
    adapter = Adapter(config, unet)
    state = {f"qformer.{name}": value for name, value in released.qformer.items()}
    for number, (key, value) in enumerate(released.layers):
        state |= {f"layers.{number}.to_k.weight": key, f"layers.{number}.to_v.weight": value}
    wrong = [
        f"{name}: needed {tuple(own.shape)}, found {tuple(state[name].shape)}"
        for name, own in adapter.state_dict().items() if own.shape != state[name].shape
    ]  # fmt: skip
    if wrong:
        raise NestedAttentionError(
            f"the released weights do not fit this U-Net; they were made for SDXL. Sizes differ: {'; '.join(wrong)}."
        )
    adapter.load_state_dict(state, assign=True)
    return adapter


def import_released(unet: UNet2DConditionModel, folder: Path, file: Path | None = None, revision: str | None = None) -> Path:
    """Converts the released file into `folder`, and returns it. Its licence is said every time.

    `file`: where it lies. If that is not given it is fetched, once, at `revision` or the recorded commit.

    Raises:
        NestedAttentionError: `folder` holds something else; the file cannot be had, or is not what was expected.
    """
    there = is_released(folder)
    if file or not there:
        revision = None if file else revision or commit_of(REPO)
        file = file or fetch(REPO, revision, [FILE]) / FILE
        tensors = read_weights(file)
        convert(tensors, unet, revision).save(folder, dtype=None)
    print(f"The released adapter is in {folder}. Its licence is {LICENCE}: non-commercial use, share alike, name the authors.")
    return folder


def converted(commit: str) -> Path:
    """Where the released adapter of a commit of `REPO` is kept once it was converted."""
    return record_file().parent / "released" / commit


def is_released(folder: Path) -> bool:
    """True if the released adapter is in `folder`, False if nothing is.

    Raises:
        NestedAttentionError: it holds something else, which would be lost.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / CONFIG).is_file():
        raise NestedAttentionError(f"{folder} is there and holds something else than an adapter; name a new folder.")
    config = read_config(folder)
    if (config.image_encoder, config.licence) != (REPO, LICENCE):
        raise NestedAttentionError(f"{folder} holds another adapter, for {config.kind!r}; name a new folder.")
    return True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/released"), help="folder for the converted adapter")
    parser.add_argument("--file", type=Path, help="a downloaded model.safetensors, instead of fetching it")


def run(options: argparse.Namespace) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_settings("sdxl"))
    import_released(unet, options.out, options.file)
