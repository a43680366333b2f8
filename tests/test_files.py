"""What is written is replaced as a whole, also when the disk has no room."""

import subprocess
import sys
from pathlib import Path

import pytest

from nested_attention import NestedAttentionError
from nested_attention.files import replaced

SAVE_WITHOUT_ROOM = """
import resource, signal, sys
from pathlib import Path
from nested_attention import NestedAttentionError
from tests import tiny

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # no file may grow beyond: writing fails as on a full disk
try:
    tiny.adapter(tiny.stock("sd").unet, "cat").save(Path(sys.argv[1]))
except NestedAttentionError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_old_adapter_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "old").write_text("whole")
    said = subprocess.run([sys.executable, "-c", SAVE_WITHOUT_ROOM, str(folder)], capture_output=True, text=True, check=True).stdout
    assert str(folder) in said and "make room" in said
    assert [path.name for path in tmp_path.rglob("*")] == ["adapter", "old"]


@pytest.mark.parametrize("name", ["file", "folder"])
def test_a_reader_meets_the_old_or_the_new(name: str, tmp_path: Path) -> None:
    path = tmp_path / name

    def write(where: Path, text: str) -> None:
        if name == "folder":
            where.mkdir()
        (where / "content" if name == "folder" else where).write_text(text)

    def stop_half_way() -> None:
        with replaced(path) as fresh:
            write(fresh, "half")
            raise RuntimeError

    write(path, "old")
    with pytest.raises(RuntimeError):
        stop_half_way()
    read = path / "content" if name == "folder" else path
    assert read.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with replaced(path) as fresh:
        write(fresh, "new")
        assert read.read_text() == "old"
    assert read.read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NestedAttentionError, match="below cannot be written"), replaced(tmp_path / "file/below"):
        pass
