"""What a visitor of Storybook waits for, in seconds."""

import subprocess
import sys
from collections.abc import Callable

import numpy as np
from PIL import Image

from nested_attention import NestedAttentionPipeline, SubjectCache, trace
from nested_attention.bench.timing import median_seconds

REPEATS = 5
LOAD = "import time; t = time.perf_counter(); from nested_attention import NestedAttentionPipeline as P; P.from_pretrained(); print(time.perf_counter() - t)"


def load_seconds() -> float:
    """From nothing imported to a loaded Storybook, in a process of its own."""
    return float(subprocess.run([sys.executable, "-W", "ignore", "-c", LOAD], capture_output=True, text=True, check=True).stdout)


def visitor_table(pipe: NestedAttentionPipeline, repeats: int = REPEATS) -> dict[str, float]:
    """Medians in seconds with a loaded `pipe`, by what is waited for; and once, what loading Storybook takes."""
    out = {"import and load": load_seconds()}

    def seconds(work: Callable[[], object]) -> float:
        return median_seconds({"": work}, repeats)[""]

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
    out["four pictures"] = seconds(lambda: pipe(prompt, [subject], num_images=4))
    return out
