"""The authors' released weights in our adapter format: `python -m nested_attention import-released`.

The released file is one flat dict. Its exact names are not certain, so they are recognized by shape and order: the
resampler below `image_proj_model.` or `image_proj.`, then per cross-attention layer two 2-D weights below
`adapter_modules.<i>.` or `ip_adapter.<i>.`, where i is either the position among the U-Net's attention processors
(1, 3, 5, ...) or counts 0, 1, 2, ... Sizes are inferred; whatever is missing or left over is listed, all of it.
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from nested_attention.adapters import Adapter, AdapterConfig, cross_attention_layers, read_weights
from nested_attention.encoder import CLIP_VIT_H, QFormerConfig
from nested_attention.errors import NestedAttentionError
from nested_attention.hub import commit_of, fetch

REPO = "orpatashnik/NestedAttentionEncoder"
LICENCE = "CC-BY-NC-SA-4.0"
HEAD_DIM = 64
QFORMER_NAMES = re.compile(r"^(?:image_proj_model|image_proj)\.(.+)$")
LAYER_NAMES = re.compile(r"^(?:adapter_modules|ip_adapter)\.(\d+)\.(.+)$")
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
    resampler = {match[1]: value for name, value in tensors.items() if (match := QFORMER_NAMES.match(name))}
    depth = 1 + max((int(match[1]) for name in resampler if (match := re.match(r"layers\.(\d+)\.", name))), default=0)
    wanted = {theirs.format(j=j): ours.format(j=j) for theirs, ours in RESAMPLER for j in (range(depth) if "{j}" in theirs else (0,))}
    pairs: dict[int, dict[str, Tensor]] = {}
    left = [name for name in tensors if not QFORMER_NAMES.match(name) and not LAYER_NAMES.match(name)]
    for name, value in tensors.items():
        if match := LAYER_NAMES.match(name):
            if value.ndim == 2:
                pairs.setdefault(int(match[1]), {})[match[2]] = value
            else:
                left.append(name)
    missing = [f"image_proj_model.{name}" for name in wanted if name not in resampler]
    left += [f"image_proj_model.{name}" for name in resampler if name not in wanted]
    found = []
    for number in expected_numbers(set(pairs), layers):
        key_value = split_pair(pairs.pop(number, {}))
        if key_value is None:
            missing.append(f"adapter_modules.{number}: one weight for keys and one for values")
        else:
            found.append(key_value)
    left += [f"adapter_modules.{number}.{name}" for number, pair in pairs.items() for name in pair]
    if missing or left:
        raise NestedAttentionError(
            f"the released weights are not what was expected. Missing ({len(missing)}): {', '.join(sorted(missing)) or 'nothing'}. "
            f"Left over ({len(left)}): {', '.join(sorted(left)) or 'nothing'}. Report these names, so that the importer can learn them."
        )
    return Released({wanted[name]: value for name, value in resampler.items()}, found)


def expected_numbers(seen: set[int], layers: int) -> range:
    """0, 1, 2, ... or 1, 3, 5, ..., whichever was used."""
    odd = range(1, 2 * layers, 2)
    return odd if seen and max(seen) >= layers else range(layers)


def split_pair(pair: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """(to_k, to_v) from two named weights, or None if it is not clear which is which."""
    by_letter = {
        letter: [value for name, value in pair.items() if re.search(rf"(^|[._]){letter}([._]|ey|alue|$)", name)] for letter in "kv"
    }
    if len(pair) == 2 and len(by_letter["k"]) == len(by_letter["v"]) == 1:
        return by_letter["k"][0], by_letter["v"][0]
    return None


def convert(tensors: dict[str, Tensor], unet: UNet2DConditionModel, revision: str) -> Adapter:
    """The released weights as an adapter for `unet`, values unchanged to the bit.

    Raises:
        NestedAttentionError: names or sizes do not fit.
    """
    released = sort_released(tensors, len(cross_attention_layers(unet)))
    config = AdapterConfig(
        kind="person", word="person", base="sdxl", image_encoder=REPO, image_subfolder="image_encoder", image_revision=revision,
        value_norm="full", lam=2.0, framing="face", qformer=released.sizes(), image=CLIP_VIT_H, licence=LICENCE,
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


def import_released(unet: UNet2DConditionModel, folder: Path) -> Path:
    """Fetches the released file, converts it into `folder`, and returns it; done once. Its licence is said every time."""
    if not (folder / "config.json").exists():
        revision = commit_of(REPO)
        source = fetch(REPO, revision, ["personalization_encoder/*.safetensors"])
        tensors = read_weights(source / "personalization_encoder/model.safetensors")
        convert(tensors, unet, revision).save(folder, next(iter(tensors.values())).dtype)
    print(f"The released adapter is in {folder}. Its licence is {LICENCE}: non-commercial use, share alike, name the authors.")
    return folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/released"), help="folder for the converted adapter")
    parser.add_argument("--file", type=Path, help="a downloaded model.safetensors, instead of fetching it")


def run(options: argparse.Namespace) -> None:
    config = UNet2DConditionModel.load_config(str(fetch("stabilityai/stable-diffusion-xl-base-1.0", None, ["unet/config.json"]) / "unet"))
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    if options.file:
        tensors = read_weights(options.file)
        convert(tensors, unet, "main").save(options.out, next(iter(tensors.values())).dtype)
    import_released(unet, options.out)
