"""The settings of a run, and what is said where they cannot be."""

import tomllib
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nested_attention.errors import NestedAttentionError
from nested_attention.memory import spoken_shortage


@dataclass(frozen=True)
class LoopConfig:
    """Settings of a run.

    `batch_size` is what one update sees, over all processes and over `accumulation` passes, both of which divide it.
    Rates rise linearly over `warmup` steps, stay, and fall linearly to zero over the last `cooldown` of all steps.
    `muon_lr` 0 leaves everything to AdamW; `white_lr` is AdamW's rate where a task gives white coordinates. `behind`: steps
    of earlier runs that this one goes on from with `--init`; its samples begin behind theirs. `mixed_precision`
    is "bf16" or "no"; without it bfloat16 is used where the device computes in it.
    """

    steps: int
    batch_size: int
    behind: int = 0
    lr: float = 6e-4
    muon_lr: float = 2e-3
    white_lr: float = 2e-3
    warmup: int = 50
    cooldown: float = 0.2
    ema: float = 0.998
    clip: float = 1.0
    accumulation: int = 1
    mixed_precision: str | None = None
    compile: bool = False
    workers: int = 1
    log_every: int = 10
    save_minutes: float = 6.0
    grid_every: int = 200
    held_out_every: int = 0
    tensorboard: bool = False
    not_muon: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "LoopConfig":
        """As a config holds it.

        Raises:
            NestedAttentionError: a setting is missing, or there is none of that name.
        """
        try:
            return cls(**content)
        except TypeError as error:
            names = ", ".join(field.name for field in fields(cls))
            raise NestedAttentionError(
                f"a section [loop] of the config cannot be used ({error}); correct it, its settings are {names}."
            ) from error

    def rate(self, step: int) -> float:
        """Factor of the learning rates at `step`."""
        rest = (self.steps - step) / max(1, round(self.steps * self.cooldown))
        return min(1.0, (step + 1) / max(1, self.warmup), rest)


def read_section(path: Path, name: str) -> dict[str, Any]:
    """The section `[name]` of a config.

    Raises:
        NestedAttentionError: it cannot be read.
    """
    try:
        return tomllib.loads(path.read_text())[name]
    except (OSError, ValueError, KeyError) as error:
        raise NestedAttentionError(f"{path} is no config with a section [{name}] ({error}); check the path and the file.") from error


def check(config: LoopConfig, processes: int, sharded: bool) -> None:
    """Whether a run with these settings can be.

    Raises:
        NestedAttentionError: it cannot.
    """
    parts = processes * config.accumulation
    if config.batch_size % parts:
        raise NestedAttentionError(
            f"a batch of {config.batch_size} cannot be divided into {parts} equal parts; change batch_size or accumulation."
        )
    if sharded and config.muon_lr:
        raise NestedAttentionError("Muon needs whole matrices, which no process has in a sharded run; set muon_lr to 0.")
    if config.mixed_precision not in (None, "no", "bf16"):
        raise NestedAttentionError(
            f"mixed_precision {config.mixed_precision!r} needs gradients that are scaled, which this loop does not do; use 'bf16' or 'no'."
        )


def spoken_memory(config: LoopConfig, processes: int) -> AbstractContextManager:
    """What does not fit into the memory, as one sentence with the next step."""
    together = config.batch_size // (processes * config.accumulation)
    return spoken_shortage(
        f"the memory is too small for {together} of the {config.batch_size} samples of batch_size at a time; raise accumulation, which is "
        f"{config.accumulation}, or lower batch_size or the resolution, and give the same command: it goes on from the last checkpoint."
    )
