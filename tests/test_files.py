"""What is written is replaced as a whole, also when the disk has no room."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nested_attention import NestedAttentionError
from nested_attention.files import first_damaged, replaced
from tests import tiny
from tests.room import no_file_beyond
from train.state import TENSORS, Checkpoint


def test_a_full_disk_leaves_the_old_adapter_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "old").write_text("whole")
    adapter = tiny.adapter(tiny.stock("sd").unet, "cat")
    with no_file_beyond(2000), pytest.raises(NestedAttentionError, match=f"{folder} cannot be written .*; make room"):
        adapter.save(folder)
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


@pytest.mark.parametrize("then", ["read", "written"])
def test_a_kill_between_the_renames_loses_nothing(then: str, tmp_path: Path) -> None:
    checkpoint, tensors = Checkpoint(tmp_path / "state"), {part: {"weight": torch.zeros(8)} for part in TENSORS}
    checkpoint.save(tensors, {"step": 3})
    if (child := os.fork()) == 0:
        try:
            Path.replace = lambda *_: os._exit(9)  # type: ignore[method-assign, assignment, misc]
            checkpoint.save(tensors, {"step": 4})
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9 and not checkpoint.folder.exists()
    if then == "written":
        checkpoint.save(tensors, {"step": 5})
    loaded = checkpoint.load()
    assert loaded is not None and loaded[1] == {"step": 3 if then == "read" else 5}
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".new"] == ["state"]


def test_a_folder_whose_new_one_cannot_take_its_place_is_put_back(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/old").touch()
    with pytest.raises(NestedAttentionError, match="What was there before is unchanged"), replaced(tmp_path / "folder"):
        pass  # nothing was written
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "old"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_the_damaged_file_of_a_folder_is_found(name: str, tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    save_file({"weight": torch.zeros(8)}, tmp_path / "part/model.safetensors")
    (tmp_path / "part/config.json").write_text('{"size": 8}')
    assert first_damaged(tmp_path) is None
    file = tmp_path / "part" / name
    for content in (file.read_bytes()[:9], b"", b"\xff" * 100):
        file.write_bytes(content)
        assert first_damaged(tmp_path) == file


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NestedAttentionError, match="below cannot be written"), replaced(tmp_path / "file/below"):
        pass
