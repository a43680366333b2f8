"""The Storybook base model from nothing: `python -m train.base --config train/configs/storybook.toml`.

The U-Net sees a picture mixed with noise, `x_s = (1 - s) x + s e`, predicts the clean picture `x`, and is judged by
the velocity: `|x' - x|^2 / s^2`. Small parts (eyes, mouths) weigh more than their area. A second term routes: where a
subject is visible, its noun should get a share of the cross-attention, elsewhere none. That teaches binding early and
makes the model's own attention a true map of who is where; without it little of a picture hangs on the noun's value,
which is all that a nested adapter may change later. A third term aligns: what the U-Net's middle holds of the noisy picture
should tell what the frozen image encoder sees in the clean one (REPA, arXiv 2410.06940). The pixels of a tail or a fur's
marking are few, and without being asked for them a small model draws the mean of all.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import BitModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from nested_attention.bases import ASSETS
from nested_attention.encoder import feature_dim
from nested_attention.errors import NestedAttentionError, get_back
from nested_attention.files import replaced
from train.grids import sample_grid
from train.loop import Batch, LoopConfig, Task, fit
from train.objective import Diffusion, FlowObjective, empty_where, flow_scheduler, weighted_mean
from train.processes import this_process, training_command
from train.settings import read_section
from train.start import check_start, noted
from train.storybook.dataset import Pictures

GRID_PROMPTS = (
    "a drawing of a person smiling, wearing a red hoodie, in the snow",
    "a man with glasses in a blue t-shirt on the beach",
    "a woman with heart eyes wearing a green sweater in the forest",
    "a cat wearing a red scarf in the city",
    "a grumpy cat with a black hat on a pink background",
    "a vehicle carrying a gift in the desert",
    "a bus at night",
    "a person and a cat on the beach",
    "a crying man in a yellow hoodie next to a cat with a blue bow in a meadow",
    "pixel art of a cat in space",
    "a pencil sketch of a man wearing sunglasses in the mountains",
    "a sepia photo of a woman and a vehicle under water",
)


@dataclass(frozen=True)
class Routing:
    """The noun's share of attention inside its subject should reach `floor`; `weight` of this term in the loss."""

    floor: float = 0.25
    weight: float = 0.2


class WatchedCrossAttention:
    """Plain cross-attention that leaves its probabilities, averaged over heads, in `self.seen (B, HW, L)`."""

    seen: Tensor

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))  # (B * heads, HW, d)
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        value = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        probabilities = torch.softmax((query @ key.mT).float() * attn.scale, -1)  # (B * heads, HW, L)
        self.seen = probabilities.unflatten(0, (-1, attn.heads)).mean(1)
        out = attn.batch_to_head_dim(probabilities.to(value.dtype) @ value)
        return attn.to_out[1](attn.to_out[0](out))


class TextToImage(nn.Module):
    """U-Net and text encoder as one trainable thing: noisy patches, timesteps and token ids in; clean patches out.

    `image_encoder`: frozen, whose features the middle should tell.
    """

    middle: Tensor  # what the U-Net's middle block made last

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, image_encoder: BitModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        self.image_encoder = image_encoder.eval().requires_grad_(False)
        middle, features = unet.config.block_out_channels[-1], feature_dim(image_encoder)
        self.align = nn.Sequential(nn.Conv2d(middle, features, 1), nn.SiLU(), nn.Conv2d(features, features, 1))
        unet.mid_block.register_forward_hook(self.keep_middle)
        self.watched = [WatchedCrossAttention() for name in unet.attn_processors if "attn2" in name]
        watched = iter(self.watched)
        unet.set_attn_processor({
            name: next(watched) if "attn2" in name else processor for name, processor in unet.attn_processors.items()
        })  # fmt: skip

    def keep_middle(self, block: nn.Module, inputs: tuple, out: Tensor) -> None:
        self.middle = out

    def forward(self, noisy: Tensor, timesteps: Tensor, input_ids: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """The clean picture, the attention of every layer, and what the middle tells of the image encoder's features `(B, F, h, w)`."""
        states = self.text_encoder(input_ids).last_hidden_state
        clean = self.unet(noisy, timesteps, states).sample
        return clean, [processor.seen for processor in self.watched], self.align(self.middle)


def routing_loss(seen: list[Tensor], names: Tensor, masks: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """How far the nouns' attention misses: `(loss, mean share inside the subjects)`.

    `seen`: per layer `(B, HW, L)`; `names (B, S, L)` bool; `masks (B, S, H, W)`: where each subject is visible.
    """
    terms, shares = [], []
    named = names.any(-1)  # (B, S): the caption names this subject
    for layer in seen:
        share = torch.einsum("bql,bsl->bsq", layer, names.to(layer.dtype))  # (B, S, HW)
        side = round(layer.shape[1] ** 0.5)
        inside = F.adaptive_avg_pool2d(masks, side).flatten(2) * named[..., None]
        outside = (1 - F.adaptive_avg_pool2d(masks, side).flatten(2)) * named[..., None]
        missing = (F.relu(floor - share) * inside).sum() / inside.sum().clamp(min=1)
        leaked = (share * outside).sum() / outside.sum().clamp(min=1)
        terms.append(missing + leaked)
        shares.append(((share * inside).sum() / inside.sum().clamp(min=1)).detach())
    return torch.stack(terms).mean(), torch.stack(shares).mean()


def alignment_loss(told: Tensor, features: Tensor) -> Tensor:
    """1 - cosine of what the middle tells and the features, both `(B, F, h, w)`, without what all features share."""
    return 1 - F.cosine_similarity(told.float(), features.float() - features.float().mean((0, 2, 3), keepdim=True)).mean()


@dataclass
class BaseTask(Task):
    model: TextToImage
    tokenizer: CLIPTokenizer
    patch: int
    diffusion: Diffusion
    routing: Routing
    alignment: float  # weight of this term in the loss

    def dataset(self, length: int) -> Dataset:
        return Pictures("train", self.tokenizer, length, self.diffusion)

    def loss(self, model: Callable[..., Any], batch: Batch) -> tuple[Tensor, dict[str, float]]:
        objective, level, pixels, noise = FlowObjective(), batch["level"], batch["pixels"], batch["noise"]
        ids = empty_where(batch["drop"], batch["input_ids"], self.empty)
        noisy = F.pixel_unshuffle(objective.noisy(pixels, noise, level), self.patch)
        predicted, seen, told = model(noisy, objective.timesteps(level), ids)
        error = objective.error(F.pixel_shuffle(predicted.float(), self.patch), pixels, noise, level)
        velocity = weighted_mean(error, batch["weights"])
        names = batch["names"] & ~batch["drop"][:, None, None]
        routed, share = routing_loss(seen, names, batch["masks"], self.routing.floor)
        strange = alignment_loss(told, self.model.image_encoder(pixels).last_hidden_state)
        logs = {"velocity": float(velocity.detach()), "routing": float(routed.detach()), "share": float(share)}
        logs["strange"] = float(strange.detach())
        return velocity + self.routing.weight * routed + self.alignment * strange, logs

    @cached_property
    def empty(self) -> Tensor:
        """The token ids of the empty caption, `(1, L)`."""
        return self.tokenizer("", padding="max_length", return_tensors="pt").input_ids.to(self.model.unet.device)

    def grid(self) -> Image.Image:
        return sample_grid(self.model.unet, self.model.text_encoder, self.tokenizer, flow_scheduler(), self.patch, GRID_PROMPTS)


def image_encoder() -> BitModel:
    """The shipped one: it is trained before the base."""
    return BitModel.from_pretrained(ASSETS / "storybook/image_encoder").float()


def build(config: dict, text_run: Path, init: Path | None = None) -> tuple[UNet2DConditionModel, CLIPTextModel, CLIPTokenizer]:
    """Text encoder and tokenizer as `train.text` left them with a new U-Net, or all as in the pipeline folder `init`.

    Raises:
        NestedAttentionError: they are missing or damaged.
    """
    source = init or text_run
    try:
        tokenizer = CLIPTokenizer.from_pretrained(source / "tokenizer")
        text_encoder = CLIPTextModel.from_pretrained(source / "text_encoder").float()
        if init:
            return UNet2DConditionModel.from_pretrained(init / "unet").float(), text_encoder, tokenizer
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise NestedAttentionError(
            f"{source} holds no tokenizer and text encoder{' and U-Net' if init else ''} to start from, or damaged ones ({error}); make them "
            "with `python -m train.text`, or name another folder with --text, or a base with --init, such as assets/storybook/base."
        ) from error
    channels = 3 * config["patch"] ** 2
    unet = UNet2DConditionModel(
        sample_size=config["resolution"] // config["patch"], in_channels=channels, out_channels=channels,
        cross_attention_dim=text_encoder.config.hidden_size, **config["unet"],
    )  # fmt: skip
    return unet, text_encoder, tokenizer


def save_forms(unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, run: Path) -> None:
    """Writes into the folder of a run what its checkpoint does not hold: the tokenizer and the sizes, which its start decided.

    Raises:
        NestedAttentionError: the disk is full.
    """
    with replaced(run / "unet") as fresh:
        unet.save_config(fresh)
    with replaced(run / "text_encoder") as fresh:
        text_encoder.config.save_pretrained(fresh)
    with replaced(run / "tokenizer") as fresh:
        tokenizer.save_pretrained(fresh)


def read_forms(run: Path) -> tuple[UNet2DConditionModel, CLIPTextModel, CLIPTokenizer]:
    """What `save_forms` wrote, with weights that are yet to be read from the checkpoint.

    Raises:
        NestedAttentionError: it is missing or damaged.
    """
    try:
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(run / "unet"))
        text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(run / "text_encoder"))
        return unet, text_encoder, CLIPTokenizer.from_pretrained(run / "tokenizer")
    except (OSError, ValueError) as error:
        raise NestedAttentionError(f"unet, text_encoder or tokenizer in {run} is missing or damaged ({error}); {get_back(run)}.") from error


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.base", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--text", type=Path, default=Path("runs/text"), help="folder of the finished train.text run")
    parser.add_argument("--init", type=Path, help="pipeline folder to go on from, such as assets/storybook/base")
    parser.add_argument("--out", type=Path, default=Path("runs/base"))
    options = parser.parse_args()
    config = read_section(options.config, "base")
    torch.manual_seed(0)
    encoder = image_encoder()
    unet, text_encoder, tokenizer = build(config, options.text, options.init)
    model = TextToImage(unet.to(memory_format=torch.channels_last), text_encoder, encoder)
    diffusion, routing = Diffusion(**config["diffusion"]), Routing(**config["routing"])
    task = BaseTask(model, tokenizer, config["patch"], diffusion, routing, config["alignment"])
    start = noted(options.init) if options.init else noted(options.text, "tokenizer", "text_encoder")
    check_start(options.out, start)  # `fit` does too, but what is saved here would by then have another tokenizer beside it
    if this_process().is_main_process:
        save_forms(unet, text_encoder, tokenizer, options.out)
    fit(task, LoopConfig.from_dict(config["loop"]), options.out, {**config, "routing": asdict(routing), "start": start})


if __name__ == "__main__":
    with training_command():
        main()
