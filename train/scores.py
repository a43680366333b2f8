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
    """The scores of all parts of evaluations, and the waits in seconds; in a file if there is a `path`.

    A part is known by its name and by what it was made of: weights, prompts, settings. So a long evaluation can be gone on
    with, in two processes too, and one with other settings takes nothing away.

    Raises:
        NestedAttentionError: `path` holds something else.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.parts: list[dict[str, Any]] = []  # {"part": "cat, personalized", "made_of": ..., "scores": field -> Score}
        self.seconds: dict[str, float] = {}
        self._read()

    def find(self, part: str, made_of: dict[str, Any]) -> Scores | None:
        """The scores of a part that was made of just that; None if it has to be drawn."""
        return next((known["scores"] for known in self.parts if (known["part"], known["made_of"]) == (part, made_of)), None)

    def keep(self, part: str, made_of: dict[str, Any], scores: Scores) -> None:
        """Adds a part.

        Raises:
            NestedAttentionError: the file cannot be written.
        """
        self._read()  # another process may have added parts meanwhile
        self.parts = [known for known in self.parts if (known["part"], known["made_of"]) != (part, made_of)]
        self.parts.append({"part": part, "made_of": made_of, "scores": scores})
        self._write()

    def keep_seconds(self, seconds: dict[str, float]) -> None:
        """Takes the place of the waits that were there.

        Raises:
            NestedAttentionError: the file cannot be written.
        """
        self._read()
        self.seconds = seconds
        self._write()

    def _read(self) -> None:
        if self.path is None or not self.path.exists():
            return
        try:
            content = json.loads(self.path.read_text())
            self.seconds = content["seconds"]
            self.parts = [part | {"scores": {name: Score(**score) for name, score in part["scores"].items()}} for part in content["parts"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise NestedAttentionError(
                f"{self.path} holds no scores of this evaluation ({error!r}); name another file or delete it."
            ) from error

    def _write(self) -> None:
        if self.path is None:
            return
        parts = [part | {"scores": {name: asdict(score) for name, score in part["scores"].items()}} for part in self.parts]
        with replaced(self.path) as fresh:
            fresh.write_text(json.dumps({"seconds": self.seconds, "parts": parts}, indent=1) + "\n")


def fingerprint(folders: Iterable[Path]) -> str:
    """Sixteen hex digits that change with any file in the folders."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(file for file in folder.rglob("*") if file.is_file()):
            digest.update(f"{path.relative_to(folder)}".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
