"""Sizes that photos of all shapes are brought to, and batches of one size each."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

from nested_attention.errors import NestedAttentionError
from train.photos.dataset import PhotoDataset


@dataclass(frozen=True)
class BucketBatches:
    """Batches of sample indices for a `DataLoader`'s `batch_sampler`, endless, all samples of a batch in one bucket.

    A batch is complete when enough samples of its bucket have come by in the dataset's order; what an epoch leaves over
    waits for the next one, so that every photo counts the same. All of it is a function of the dataset's seed alone.

    Attributes:
        batch_size: samples of a batch, over all processes.
        rank, processes: this process takes samples rank, rank + processes, ... of every batch.
        first: number of the batch to begin with, to resume a run.

    Raises:
        NestedAttentionError: the processes do not divide the batch.
    """

    dataset: PhotoDataset
    batch_size: int
    rank: int = 0
    processes: int = 1
    first: int = 0

    def __post_init__(self) -> None:
        if self.batch_size % self.processes:
            raise NestedAttentionError(
                f"a batch of {self.batch_size} cannot be divided among {self.processes} processes; choose a multiple of {self.processes}."
            )

    def __iter__(self) -> Iterator[list[int]]:
        for batch in islice(self.batches(), self.first, None):
            yield batch[self.rank :: self.processes]

    def batches(self) -> Iterator[list[int]]:
        """The batches of all processes together, from the start of the run."""
        waiting: dict[int, list[int]] = {}
        order, numbers = self.dataset.order, self.dataset.bucket_numbers
        for epoch in count():
            for sample, bucket in enumerate(numbers[order.epoch(epoch)].tolist(), epoch * order.length):
                batch = waiting.setdefault(bucket, [])
                batch.append(sample)
                if len(batch) == self.batch_size:
                    yield waiting.pop(bucket)
