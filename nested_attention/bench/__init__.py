"""How fast it is on this machine, and what the nested attention costs: `python -m nested_attention bench --scale sdxl`.

`--scale storybook` times what a visitor waits for, and one U-Net step; `sd15` and `sdxl` one step of the full-size
U-Net with random weights, stock and in every form, which take turns. Ratios to the stock step are what travels. Last come the
cross-attention layers alone: what subjects add to them, and where that goes.
"""

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch

from nested_attention import NestedAttentionPipeline
from nested_attention.bench.layers import layer_table
from nested_attention.bench.step import SCALES, VARIANTS, Bench, build_unet, step_table
from nested_attention.bench.visitor import visitor_table
from nested_attention.files import replaced
from nested_attention.loading import best_device, best_dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scale", choices=SCALES, default="storybook")
    parser.add_argument("--repeats", type=number_of("rounds"), default=5, help="rounds over all variants, after each ran once")
    only = "only these variants of the step (stock always runs)"
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="VARIANT", help=only)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")


def number_of(things: str) -> Callable[[str], int]:
    """What reads a number of `things` from the command line: a whole one from 1 on, as argparse's error says."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} is no number of {things}; name a whole number from 1 on")
        return int(text)

    return read


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"MPS on {platform.machine()}, macOS {platform.mac_ver()[0]}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {torch.get_num_threads()} threads"


def run(options: argparse.Namespace) -> None:
    device = best_device()
    dtype = str(best_dtype(device)).removeprefix("torch.")
    report: dict = {"scale": options.scale, "device": device_name(device), "dtype": dtype, "torch": torch.__version__}
    print(f"{options.scale} on {report['device']}, {dtype}, torch {torch.__version__}")
    if options.scale == "storybook":
        report["seconds"] = visitor_table(NestedAttentionPipeline.from_pretrained("storybook"))
        for name, value in report["seconds"].items():
            print(f"  {name:36s} {value:8.3f} s")
    bench = Bench(build_unet(options.scale))
    report["step"] = step_table(bench, options.repeats, options.only)
    print(
        f"  {'one U-Net step':36s} {'median':>9s} {'to stock':>9s} {'from':>7s} {'to':>7s} {'peak':>9s} {'over stock':>11s} {'K/V cache':>10s}"
    )
    for name, row in report["step"].items():
        megabytes = f"{row['peak_mb']:6.0f} MB {row['extra_mb']:8.0f} MB {row['cache_mb']:7.0f} MB"
        print(
            f"  {name:36s} {row['seconds']:7.3f} s {row['ratio'] - 1:+8.1%} {row['least'] - 1:+7.1%} {row['largest'] - 1:+7.1%} {megabytes}"
        )
    report["layers"] = layer_table(bench)
    stock = report["step"]["stock"]["seconds"]
    columns = "".join(f"{title:>22s}" for title in ("to stock", "to no subject", "nested attention"))
    print(f"  {'all cross-attention layers, alone':36s}{columns}")
    for name, row in report["layers"].items():
        print(f"  {name:36s}" + "".join(f"{row[part]:12.3f} s {row[part] / stock:+8.1%}" for part in ("added", "subjects", "nested")))
    if options.json:
        with replaced(options.json) as fresh:
            fresh.write_text(json.dumps(report, indent=1) + "\n")
