"""Which source a name means: `python -m train.adapter --data NAME`."""

from pathlib import Path

from nested_attention.errors import NestedAttentionError
from nested_attention.hub import is_repo
from train.photos.folder import FolderSource
from train.photos.hub import HubSource, is_dataset
from train.photos.sample import Source
from train.photos.shards import ShardSource
from train.processes import this_process

FORMS = """give one of
- a folder that `python -m train.prepare FOLDER --kind person` has written,
- a data set with the columns image, reference and text: user/name or user/name@revision on the Hub, or its folder,
- shards: data-{000000..000012}.tar, "data-*.tar", or https://server/data-{000000..000012}.tar."""


def open_source(data: str, kind: str) -> Source:
    """The photos that `data` names: a prepared folder, a data set of `datasets`, or tar shards; `<kind>` is in every caption.

    Of a run's processes one of each machine comes first and notes what lies where, so that the others need not look.

    Raises:
        NestedAttentionError: it is none of these, or cannot be used.
    """
    with this_process().local_main_process_first():
        return opened(data, kind)


def opened(data: str, kind: str) -> Source:
    """`open_source`, for one process."""
    folder = Path(data)
    if data.endswith(".tar"):
        return ShardSource(data, kind)
    if folder.is_dir():
        return HubSource(data, kind) if is_dataset(folder) else FolderSource(folder, kind)
    if is_repo(data.partition("@")[0]):
        return HubSource(data, kind)
    raise NestedAttentionError(f"there is nothing to train on called {data!r}; {FORMS}")
