"""Where the time of subjects goes: cross-attention layers alone, many times, for which whole steps take too long.

A step differs from the next by more than a subject costs; a layer of each shape, times how often it occurs, does not.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from nested_attention.attention import LayerSubject, nested_values, split_heads
from nested_attention.bench.step import Bench
from nested_attention.bench.timing import median_seconds

SUBJECTS = (1, 256), (1, 1024), (4, 1024)  # how many, of how many tokens each
REPEATS = 15


@torch.no_grad()
def layer_table(bench: Bench, repeats: int = REPEATS) -> dict[str, dict[str, float]]:
    """Seconds that subjects add to all cross-attention layers of a step, over stock ones (`added`) and over ours without a subject
    (`subjects`), and how much of it is the nested attention itself, its two products and its softmax (`nested`)."""
    bench.install()
    lengths = query_lengths(bench.unet)
    alike: dict[tuple[int, int, int], list[str]] = {}  # layers of one shape
    for name, attention in bench.layers.items():
        alike.setdefault((lengths[name], attention.heads, attention.to_q.in_features), []).append(name)
    table: dict[str, dict[str, float]] = {}
    for count, tokens in SUBJECTS:
        condition, empty = bench.condition(count, tokens), bench.condition(0, 0)
        total = {"stock": 0.0, "none": 0.0, "ours": 0.0, "nested": 0.0}
        for (length, _, width), names in alike.items():
            attention, subjects = bench.layers[names[0]], condition.layers[names[0]]
            hidden = torch.randn(2, length, width, **bench.like)
            query = split_heads(attention.to_q(hidden[:1]), attention.heads)  # (1, heads, HW, d)
            works: dict[str, Callable[[], object]] = {
                "stock": partial(attention, hidden, bench.states),
                "none": partial(attention, hidden, bench.states, nested=empty),
                "ours": partial(attention, hidden, bench.states, nested=condition),
                "nested": partial(all_nested_values, query, subjects),
            }
            for name, seconds in median_seconds(works, repeats).items():
                total[name] += len(names) * seconds
        table[f"ours, {count} x {tokens}"] = {
            "added": total["ours"] - total["stock"],
            "subjects": total["ours"] - total["none"],
            "nested": total["nested"],
        }
    return table


def all_nested_values(query: Tensor, subjects: Sequence[LayerSubject]) -> None:
    for subject in subjects:
        nested_values(query, subject)


def query_lengths(unet: UNet2DConditionModel) -> dict[str, int]:
    """Layer -> how many queries it has at the U-Net's own size. Found on a twin without weights, which computes nothing."""
    lengths: dict[str, int] = {}

    def note(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        lengths[name] = args[0].shape[1]

    with torch.device("meta"):
        twin = Bench(UNet2DConditionModel.from_config(unet.config))
        for name, attention in twin.layers.items():
            attention.register_forward_pre_hook(partial(note, name))
        twin.step()
    return lengths
