"""How fast it is on this machine: `python -m nested_attention bench --scale storybook [--json FILE]`."""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from nested_attention import NestedAttentionPipeline, SubjectCache, trace

REPEATS = 5
LOAD = "import time; t = time.perf_counter(); from nested_attention import NestedAttentionPipeline as P; P.from_pretrained(); print(time.perf_counter() - t)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scale", choices=("storybook",), default="storybook")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")


def seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """The median duration of `work` after one warm-up."""
    work()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def storybook() -> dict[str, float]:
    """Seconds for what a visitor waits for."""
    out = {
        "import and load": float(
            subprocess.run([sys.executable, "-W", "ignore", "-c", LOAD], capture_output=True, text=True, check=True).stdout
        )
    }
    pipe = NestedAttentionPipeline.from_pretrained("storybook")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8))
    kind = pipe.kinds[0]
    out["encode one picture"] = seconds(lambda: pipe.encode(kind, picture, cache=SubjectCache()))
    out["encode it again"] = seconds(lambda: pipe.encode(kind, picture))
    subject, prompt = pipe.encode(kind, picture), f"a drawing of <{kind}> in the snow"

    def traced() -> None:
        with trace(pipe):
            pipe(prompt, [subject])

    fast = pipe.base.fast_steps
    out[f"one picture, default ({pipe.base.steps} steps)"] = seconds(lambda: pipe(prompt, [subject]))
    out[f"one picture, fast ({fast} steps)"] = seconds(lambda: pipe(prompt, [subject], steps=fast))
    out["one picture without a subject"] = seconds(lambda: pipe(f"a drawing of a {kind} in the snow"))
    out["one picture, traced"] = seconds(traced)
    out["four pictures"] = seconds(lambda: pipe(prompt, [subject], num_images=4), 2)
    return out


def run(options: argparse.Namespace) -> None:
    numbers = storybook()
    device = f"{platform.machine()}, {torch.get_num_threads()} threads" if not torch.cuda.is_available() else torch.cuda.get_device_name()
    print(f"{options.scale} on {device}, torch {torch.__version__}")
    for name, value in numbers.items():
        print(f"  {name:36s} {value:8.3f} s")
    if options.json:
        options.json.write_text(json.dumps({"scale": options.scale, "device": device, "seconds": numbers}, indent=1) + "\n")
