"""What an evaluation found: shares with their intervals, and the file that keeps them, so that a long one can be gone on with."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nested_attention.errors import NestedAttentionError
from nested_attention.files import replaced


@dataclass(frozen=True)
class Score:
    """A share of right answers with its 95 % Wilson interval; `renders` is the judge's share on real renders."""

    value: float
    low: float
    high: float
    count: int
    renders: float

    @classmethod
    def of(cls, right: list[bool], renders: list[bool]) -> "Score":
        n, p, z = max(1, len(right)), float(np.mean(right)) if right else 0.0, 1.96
        middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
        return cls(p, max(0.0, low), min(1.0, high), len(right), float(np.mean(renders)) if renders else 0.0)

    def __str__(self) -> str:
        of_renders = self.value / self.renders if self.renders else 0.0
        return (
            f"{self.value:6.1%}  [{self.low:.1%}, {self.high:.1%}]  n {self.count:4d}  renders {self.renders:6.1%}  ratio {of_renders:.3f}"
        )


Scores = dict[str, Score]


class ScoreFile:
    """The scores of every part of an evaluation, and the waits in seconds; written after every part if there is a `path`.

    A part counts as done if the file says that it was made of the same: weights, prompts, settings.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.parts: dict[str, dict[str, Any]] = {}  # "cat, personalized" -> {"made_of": ..., "scores": field -> Score}
        self.seconds: dict[str, float] = {}
        if path is None or not path.exists():
            return
        try:
            read = json.loads(path.read_text())
            self.seconds = read["seconds"]
            for name, part in read["parts"].items():
                self.parts[name] = {"made_of": part["made_of"], "scores": {field: Score(**x) for field, x in part["scores"].items()}}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise NestedAttentionError(f"{path} holds no scores of this evaluation ({error!r}); name another file or delete it.") from error

    def find(self, part: str, made_of: dict[str, Any]) -> Scores | None:
        """The scores of a part that was made of just that; None if it has to be drawn."""
        known = self.parts.get(part)
        return known["scores"] if known is not None and known["made_of"] == made_of else None

    def keep(self, part: str, made_of: dict[str, Any], scores: Scores) -> None:
        """Adds a part.

        Raises:
            NestedAttentionError: the file cannot be written.
        """
        self.parts[part] = {"made_of": made_of, "scores": scores}
        self.write()

    def write(self) -> None:
        """Writes the file.

        Raises:
            NestedAttentionError: it cannot be written.
        """
        if self.path is None:
            return
        parts = {
            name: {"made_of": part["made_of"], "scores": {field: asdict(score) for field, score in part["scores"].items()}}
            for name, part in self.parts.items()
        }
        with replaced(self.path) as fresh:
            fresh.write_text(json.dumps({"seconds": self.seconds, "parts": parts}, indent=1) + "\n")


def fingerprint(folders: Iterable[Path]) -> str:
    """Sixteen hex digits that change with any file in the folders."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(file for file in folder.rglob("*") if file.is_file()):
            digest.update(f"{path.relative_to(folder)}".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
