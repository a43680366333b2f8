"""Which photo is sample `n` of a run: every photo once an epoch, in an order that only the seed and the epoch decide."""

from functools import lru_cache

import numpy as np

from train.photos.sample import Source

MIXED = 8  # shards whose photos are shuffled together: so many files are read from at a time


@lru_cache(maxsize=4)
def permutation(shards: tuple[int, ...], seed: int, epoch: int) -> np.ndarray:
    """The photos of an epoch in order, `(sum(shards),)`; `shards` as in `Source`.

    The shards come in random order, and the photos of `MIXED` neighbours in it are shuffled together.
    """
    rng = np.random.default_rng([seed, epoch])
    ends = np.cumsum(shards)
    order = rng.permutation(len(shards))
    groups = [order[k : k + MIXED] for k in range(0, len(order), MIXED)]
    return np.concatenate([rng.permutation(np.concatenate([np.arange(ends[s] - shards[s], ends[s]) for s in group])) for group in groups])


class Shuffled:
    """The endless order of a source's photos."""

    def __init__(self, source: Source, seed: int):
        self.shards, self.seed = tuple(source.shards), seed
        self.length = len(source)

    def epoch(self, number: int) -> np.ndarray:
        """The photos that samples `number * length` and following are, `(length,)`."""
        return permutation(self.shards, self.seed, number)

    def __getitem__(self, sample: int) -> int:
        epoch, place = divmod(sample, self.length)
        return int(self.epoch(epoch)[place])
