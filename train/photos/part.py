"""Some of a source's photos, as a source."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from train.photos.sample import PhotoSample, Source


@dataclass(frozen=True)
class Part:
    """The photos `numbers` of `source`, in that order, which is ascending."""

    source: Source
    numbers: list[int]

    @property
    def shards(self) -> Sequence[int]:
        ends = np.cumsum(self.source.shards)
        counts = Counter(np.searchsorted(ends, self.numbers, side="right").tolist())
        return [counts[shard] for shard in range(len(ends)) if counts[shard]]

    def __len__(self) -> int:
        return len(self.numbers)

    def size(self, index: int) -> tuple[int, int]:
        return self.source.size(self.numbers[index])

    def caption(self, index: int) -> str:
        return self.source.caption(self.numbers[index])

    def mark(self, index: int) -> str:
        return self.source.mark(self.numbers[index])

    def __getitem__(self, index: int) -> PhotoSample:
        return self.source[self.numbers[index]]
