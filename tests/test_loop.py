"""A run: it goes on exactly where it stopped, never keeps what is broken, and says in a sentence what went wrong."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nested_attention import NestedAttentionError
from tests import tiny
from tests.room import no_file_beyond
from tests.story_run import LOOP, SmallTask, Stopped, log, task
from train.loop import Share, check, fit, iterate
from train.push import Stage
from train.start import noted
from train.state import Checkpoint, load_weights


def test_a_stopped_run_goes_on_exactly(tmp_path: Path) -> None:
    whole = fit(task(), LOOP, tmp_path / "whole", {})
    interrupted = task()
    interrupted.stop_after = 2
    with pytest.raises(Stopped):
        fit(interrupted, LOOP, tmp_path / "parts", {})
    resumed = fit(task(), LOOP, tmp_path / "parts", {})
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_the_first_line_after_a_resume_is_a_mean_of_the_steps_behind_it(tmp_path: Path) -> None:
    fit(task(), LOOP, tmp_path / "each", {})
    interrupted = task()
    interrupted.stop_after = 3
    with pytest.raises(Stopped):
        fit(interrupted, replace(LOOP, log_every=4), tmp_path / "parts", {})
    fit(task(), replace(LOOP, log_every=4), tmp_path / "parts", {})
    assert [(line["step"], line["loss"]) for line in log(tmp_path / "parts")] == [(4, log(tmp_path / "each")[3]["loss"])]


def test_steps_that_are_done_again_are_in_the_log_once(tmp_path: Path) -> None:
    interrupted = task()
    interrupted.stop_after = 2
    with pytest.raises(Stopped):
        fit(interrupted, replace(LOOP, save_minutes=60.0), tmp_path, {})
    assert [line["step"] for line in log(tmp_path)] == [1, 2] and not (tmp_path / "state").exists()
    fit(task(), LOOP, tmp_path, {})
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 3, 4]


def test_a_run_keeps_the_start_that_it_began_with(tmp_path: Path) -> None:
    starts = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
        starts.append(noted(tmp_path / name))
    run, short = tmp_path / "run", replace(LOOP, steps=1)
    fit(task(), short, run, {"start": starts[0]})
    (tmp_path / "one").rename(tmp_path / "moved")
    fit(task(), replace(LOOP, steps=2), run, {"start": noted(tmp_path / "moved")})
    for start, words in ((starts[1], f"not from {tmp_path / 'other'} as it is now"), (None, "not from nothing")):
        with pytest.raises(NestedAttentionError, match=rf"{run} has begun from {tmp_path / 'moved'} and goes on .*{words}.*--out"):
            fit(task(), replace(LOOP, steps=3), run, {"start": start})
    assert [line["step"] for line in log(run)] == [1, 2]
    fit(task(), short, tmp_path / "older", {})
    (tmp_path / "older/config.json").write_text("{}")  # a run that noted nothing
    fit(task(), short, tmp_path / "older", {"start": starts[1]})


@pytest.mark.parametrize("file", ["progress.json", "average.safetensors", "optimizer.safetensors"])
def test_damaged_checkpoints_are_named(tmp_path: Path, file: str) -> None:
    checkpoint = Checkpoint(tmp_path / "state")
    assert checkpoint.load() is None
    checkpoint.save({part: {"weight": torch.zeros(8)} for part in ("model", "average", "optimizer")}, {"step": 3})
    path = tmp_path / "state" / file
    path.write_bytes(path.read_bytes()[:9])
    for _ in ("cut off", "gone"):
        with pytest.raises(NestedAttentionError, match=f"state/{file} is missing or damaged .*; put back a copy, or remove the folder"):
            checkpoint.load()
        path.unlink(missing_ok=True)


def test_a_checkpoint_of_another_model_is_refused() -> None:
    for saved in ({}, {"weight": torch.zeros(3)}):
        with pytest.raises(NestedAttentionError, match=r"that of another model: weight is not in it, or of another size.*--out"):
            load_weights({"weight": torch.zeros(2)}, saved)


class Broken(SmallTask):
    """From its third loss on, that is `spoiled`."""

    spoiled: Callable[[Tensor], Tensor]
    losses = 0

    def loss(self, model, batch):
        value, logs = super().loss(model, batch)
        self.losses += 1
        return (value if self.losses < 3 else self.spoiled(value)), logs


def broken(spoiled: Callable[[Tensor], Tensor]) -> Broken:
    sound = task()
    made = Broken(sound.model, sound.pipe, sound.diffusion)
    made.spoiled = spoiled
    return made


@pytest.mark.parametrize(
    ("spoiled", "words"),
    [
        (lambda loss: loss * torch.nan, "the loss nan or its gradient nan is not finite"),
        (lambda loss: loss + (loss - loss).sqrt(), r"the loss 0\.\d+ or its gradient nan is not finite"),
    ],
)
def test_what_is_no_number_ends_the_run_before_it_is_learned_or_saved(tmp_path: Path, spoiled: Callable, words: str) -> None:
    with pytest.raises(NestedAttentionError, match=rf"{words} at step 3; lower lr .*the same command, it goes on"):
        fit(broken(spoiled), replace(LOOP, log_every=100), tmp_path, {})
    loaded = Checkpoint(tmp_path / "state").load()
    assert loaded is not None and loaded[1]["step"] == 2
    assert all(value.isfinite().all() for content in loaded[0].values() for value in content.values())


def test_a_memory_that_is_too_small_is_said_and_the_checkpoint_stays(tmp_path: Path) -> None:
    said = r"too small for 2 of the 2 samples of batch_size at a time; raise accumulation, which is 1, or .* from the last checkpoint\."
    with pytest.raises(NestedAttentionError, match=said):
        fit(broken(lambda loss: loss + torch.empty(1 << 60).sum()), LOOP, tmp_path, {})
    loaded = Checkpoint(tmp_path / "state").load()
    assert loaded is not None and loaded[1]["step"] == 2


def test_the_last_step_is_in_the_log_of_the_shortest_run(tmp_path: Path) -> None:
    """`train.push` wants to know how long it took."""
    fit(task(), replace(LOOP, steps=3, log_every=2), tmp_path, {})
    assert [line["step"] for line in log(tmp_path)] == [2, 3] and log(tmp_path)[1]["hours"] >= 0
    fit(task(), replace(LOOP, steps=1, log_every=100), tmp_path / "short", {})
    assert Stage.read(tmp_path / "short").steps == 1


def test_without_tensorboard_a_run_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(task(), replace(LOOP, steps=1, tensorboard=True), tmp_path / "with", {})
    assert "TensorBoard" not in capsys.readouterr().out
    for name in ("tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)
    fit(task(), replace(LOOP, steps=1, tensorboard=True), tmp_path / "without", {})
    assert "TensorBoard is not installed, so that this run has only log.jsonl; `pip install tensorboard`" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["config.json", "log.jsonl", "grids/000004.png"])
def test_what_a_run_cannot_write_is_named(tmp_path: Path, file: str) -> None:
    """A file stands where a folder has to be, or a folder where the log has to be."""
    run = tmp_path / "run"
    if file == "log.jsonl":
        (run / file).mkdir(parents=True)
    else:
        (run / file).parent.parent.mkdir(exist_ok=True)
        (run / file).parent.touch()
    made = task()
    made.grid = lambda: tiny.photo(0)  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(NestedAttentionError, match=f"{run / file} cannot be written .*make room on the disk"):
        fit(made, LOOP, run, {})


def test_a_full_disk_leaves_no_half_line_in_the_log(tmp_path: Path) -> None:
    fit(task(), replace(LOOP, steps=1), tmp_path, {})
    log = tmp_path / "log.jsonl"
    log.write_text(before := 20 * log.read_text())
    with no_file_beyond(len(before) + 20), pytest.raises(NestedAttentionError, match=r"log\.jsonl cannot be written .*make room"):
        fit(task(), replace(LOOP, save_minutes=60.0), tmp_path, {})
    assert log.read_text() == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 3, "accumulation": 2}, "a batch of 3 cannot be divided into 2 equal parts"),
        ({"mixed_precision": "fp16"}, "mixed_precision 'fp16' needs gradients that are scaled.*; use 'bf16' or 'no'"),
    ],
)
def test_settings_that_cannot_be_are_said(tmp_path: Path, changes: dict, words: str) -> None:
    with pytest.raises(NestedAttentionError, match=words):
        fit(task(), replace(LOOP, **changes), tmp_path, {})


def first_gradient(accumulation: int, folder: Path) -> dict[str, Tensor]:
    """What is there when all parts of the first batch have been through, by parameter."""
    made, found = task(), {}
    for name, parameter in made.model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda learning, name=name: found.update({name: learning.grad.clone()}))
    fit(made, replace(LOOP, steps=1, batch_size=4, accumulation=accumulation), folder, {})
    return found


def test_a_batch_in_parts_has_the_gradient_of_the_whole(tmp_path: Path) -> None:
    whole, parts = (first_gradient(accumulation, tmp_path / str(accumulation)) for accumulation in (1, 2))
    assert len(whole) > 20 and whole.keys() == parts.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-6, rtol=1e-4, msg=name)
    logged = [[log(tmp_path / run)[0][key] for key in ("loss", "norm")] for run in ("1", "2")]
    assert logged[0] == pytest.approx(logged[1], rel=1e-3)


def test_a_model_that_is_divided_is_not_for_muon() -> None:
    with pytest.raises(NestedAttentionError, match="Muon needs whole matrices"):
        check(replace(LOOP, muon_lr=1e-3), processes=2, sharded=True)


def test_a_run_behind_another_sees_what_comes_next() -> None:
    first = list(task().batches(LOOP, Share()))
    second = replace(LOOP, behind=LOOP.steps)
    assert list(task().batches(second, Share(step=second.behind))) == [[8, 9], [10, 11], [12, 13], [14, 15]]
    assert first == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert len(next(iter(iterate(task(), second, Share(step=7))))["level"]) == 2
