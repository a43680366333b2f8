"""Which source a name means: `python -m train.adapter --data NAME`."""

from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from nested_attention.errors import NestedAttentionError
from train.photos.folder import FolderSource
from train.photos.hub import HubSource, is_dataset
from train.photos.sample import Source
from train.photos.shards import ShardSource

FORMS = """give one of
- a folder that `python -m train.prepare FOLDER --kind person` has written,
- a data set with the columns image, reference and text: user/name on the Hub, or its folder,
- shards: data-{000000..000012}.tar or "data-*.tar"."""


def open_source(data: str) -> Source:
    """The photos that `data` names: a prepared folder, a data set of `datasets`, or tar shards.

    Raises:
        NestedAttentionError: it is none of these, or cannot be used.
    """
    folder = Path(data)
    if data.endswith(".tar"):
        return ShardSource(data)
    if folder.is_dir():
        return HubSource(data) if is_dataset(folder) else FolderSource(folder)
    if is_repo(data):
        return HubSource(data)
    raise NestedAttentionError(f"there is nothing to train on called {data!r}; {FORMS}")


def is_repo(name: str) -> bool:
    """True if `name` has the form user/name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1
