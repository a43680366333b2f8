"""Files and folders that are replaced as a whole: a reader never meets half of one, and a full disk leaves the old one."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from nested_attention.errors import NestedAttentionError


def remove(path: Path) -> None:
    """Takes away a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """`with replaced(path) as fresh:` write `fresh`, a file or a folder; it then becomes `path`.

    Raises:
        NestedAttentionError: nothing can be written there, for instance because the disk is full. `path` is as before.
    """
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")  # two processes may write the same file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield fresh
        if path.is_dir():
            shutil.rmtree(path)
        fresh.replace(path)
    except (OSError, SafetensorError) as error:
        raise NestedAttentionError(
            f"{path} cannot be written ({error}); make room on the disk or name another place. What was there before is unchanged."
        ) from error
    finally:
        remove(fresh)
