"""Batches by index from a dataset, made ready by worker processes."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from nested_attention.errors import NestedAttentionError


class Told(Dataset):
    """`samples`, with errors that have a sentence for people as items of their own.

    What a worker process raises would come out of the `DataLoader` with its traceback for a message.
    """

    def __init__(self, samples: Dataset):
        self.samples = samples

    def __getitem__(self, index: int) -> Any:
        try:
            return self.samples[index]
        except NestedAttentionError as error:
            return error


def together(items: list[Any]) -> Any:
    """A batch of `items`, or the first error among them."""
    return next((item for item in items if isinstance(item, NestedAttentionError)), None) or default_collate(items)


def spoken(batch: Any) -> dict[str, Tensor]:
    """The batch.

    Raises:
        NestedAttentionError: it is an error.
    """
    if isinstance(batch, NestedAttentionError):
        raise batch
    return batch


def feed(samples: Dataset, batches: Iterable[list[int]], workers: int) -> Iterator[dict[str, Tensor]]:
    """The samples that `batches` numbers, batch by batch, of `workers` processes, or of this one for 0.

    Raises:
        NestedAttentionError: with the batch of a sample that raises it.
    """
    loader: DataLoader = DataLoader(
        Told(samples), batch_sampler=batches, collate_fn=together, num_workers=workers,
        persistent_workers=workers > 0, prefetch_factor=4 if workers else None,
    )  # fmt: skip
    return map(spoken, loader)
