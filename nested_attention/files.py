"""Files and folders that are replaced as a whole: a reader never meets half of one, and a full disk leaves the old one."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from nested_attention.errors import NestedAttentionError


def is_there(path: str | Path) -> bool:
    """Whether there is such a file or folder. What is too long to be a name is not, where `Path.exists` raises an error."""
    return os.path.exists(path)


def remove(path: Path) -> None:
    """Takes away a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def aside(folder: Path) -> Path:
    """Where a folder lies while another takes its place."""
    return folder.with_name(f"{folder.name}.being-replaced")


def put_back(folder: Path) -> None:
    """Undoes a replacement that was killed after the old folder was set aside and before the new one took its place."""
    if aside(folder).exists() and not folder.exists():
        with suppress(FileNotFoundError):  # another process was faster
            aside(folder).rename(folder)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """`with replaced(path) as fresh:` write `fresh`, a file or a folder; it then becomes `path`.

    A process that is killed meanwhile leaves the old or the new one, of a folder after `put_back`.

    Raises:
        NestedAttentionError: nothing can be written there, for instance because the disk is full. `path` is as before.
    """
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")  # two processes may write the same file
    put_back(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield fresh
        if path.is_dir():
            remove(aside(path))
            path.rename(aside(path))
        fresh.replace(path)
    except (OSError, SafetensorError) as error:
        raise NestedAttentionError(
            f"{path} cannot be written ({error}); make room on the disk or name another place. What was there before is unchanged."
        ) from error
    finally:
        put_back(path)
        remove(fresh)
    shutil.rmtree(aside(path), ignore_errors=True)  # what cannot be removed now is by the next replacement


def first_damaged(folder: Path) -> Path | None:
    """The first of the JSON and safetensors files below `folder` that is cut off or garbled; None if all have their form."""
    for path in sorted(folder.rglob("*")):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
        except (OSError, ValueError, SafetensorError):
            return path
    return None
