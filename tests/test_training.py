"""Training: what is frozen stays frozen, a run that was stopped goes on exactly, files come back as they were saved."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import BitConfig, BitModel

from nested_attention import NestedAttentionError, NestedAttentionPipeline, SubjectCache
from nested_attention.adapters import CONFIG, WEIGHTS, Adapter, AdapterConfig, list_adapters
from nested_attention.bases import BASES
from nested_attention.encoder import ImageConfig, QFormer, QFormerConfig, feature_dim, image_features
from nested_attention.encoding import encode_image, load_image_encoder
from tests import tiny
from tests.room import no_file_beyond
from train.base import Routing, TextToImage, alignment_loss, routing_loss
from train.keys import KeysLesson, KeysTask, tile_shares
from train.loop import LoopConfig, Share, check, fit, iterate
from train.objective import Diffusion, FlowObjective, flow_scheduler
from train.optim import BETAS, orthogonalized
from train.personalizer import Personalizer, StorybookTask
from train.reader import MARGIN, TILE, ReaderLesson, ReaderTask, tiles
from train.state import Checkpoint, load_weights
from train.whitening import WhitenedAdamW, whitening

LOOP = LoopConfig(steps=4, batch_size=2, warmup=1, mixed_precision="no", workers=0, log_every=1, save_minutes=0.0, grid_every=1000)


class Stopped(Exception):
    pass


class SmallTask(StorybookTask):
    """Adapter training on tiny Storybook components; draws no grids and can be made to stop."""

    stop_after = 10**9

    def loss(self, model, batch):
        if self.stop_after == 0:
            raise Stopped
        self.stop_after -= 1
        return super().loss(model, batch)

    def grid(self) -> None:
        pass


def task() -> SmallTask:
    pipe = NestedAttentionPipeline(BASES["storybook"], tiny.storybook(), {}, {})
    torch.manual_seed(3)
    sizes = QFormerConfig(num_tokens=4, width=32, depth=1, heads=2, head_dim=16, feature_dim=tiny.WIDTH, output_dim=tiny.WIDTH)
    config = AdapterConfig("cat", "cat", "storybook", "vision", qformer=sizes, image=ImageConfig(128))
    return SmallTask(Personalizer(pipe.stock, Adapter(config, pipe.stock.unet), tiny.vision(128)), pipe, Diffusion())


def test_only_the_adapter_learns(tmp_path: Path) -> None:
    made = task()
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    fit(made, LOOP, tmp_path, {})
    changed = {name for name, value in made.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("adapter.") for name in changed)
    assert {name.split(".")[1] for name in changed} == {"qformer", "layers"}
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


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


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_the_first_line_after_a_resume_is_a_mean_of_the_steps_behind_it(tmp_path: Path) -> None:
    fit(task(), LOOP, tmp_path / "each", {})
    interrupted = task()
    interrupted.stop_after = 3
    with pytest.raises(Stopped):
        fit(interrupted, replace(LOOP, log_every=4), tmp_path / "parts", {})
    fit(task(), replace(LOOP, log_every=4), tmp_path / "parts", {})
    assert [(line["step"], line["loss"]) for line in log(tmp_path / "parts")] == [(4, log(tmp_path / "each")[3]["loss"])]


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


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(tmp_path: Path) -> None:
    made = task()
    made.model.adapter.qformer.latents.data.fill_(torch.nan)
    with pytest.raises(NestedAttentionError, match=r"the loss is nan at step 1; lower lr .*the same command, it goes on"):
        fit(made, LOOP, tmp_path, {})
    assert not (tmp_path / "state").exists()


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


def test_a_model_that_is_divided_is_not_for_muon() -> None:
    with pytest.raises(NestedAttentionError, match="Muon needs whole matrices"):
        check(replace(LOOP, muon_lr=1e-3), processes=2, sharded=True)


def test_a_run_behind_another_sees_what_comes_next() -> None:
    first = list(task().batches(LOOP, Share()))
    second = replace(LOOP, behind=LOOP.steps)
    assert list(task().batches(second, Share(step=second.behind))) == [[8, 9], [10, 11], [12, 13], [14, 15]]
    assert first == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert len(next(iter(iterate(task(), second, Share(step=7))))["level"]) == 2


def test_an_adapter_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    pipe = tiny.pipeline("sd")
    adapter = pipe.adapters["cat"]
    adapter.save(tmp_path / "cat", torch.float32)
    again = Adapter.load(tmp_path / "cat", pipe.stock.unet)
    assert again.config == adapter.config and len(again.revision) == 16
    assert all(torch.equal(a, b) for a, b in zip(adapter.state_dict().values(), again.state_dict().values(), strict=True))
    assert list_adapters(tmp_path) == {"cat": tmp_path / "cat"}


@pytest.mark.parametrize("damage", ["missing", "cut off", "other width", "no config", "config cut off"])
def test_damaged_adapters_are_named(tmp_path: Path, damage: str) -> None:
    pipe, folder = tiny.pipeline("sd"), tmp_path / "cat"
    pipe.adapters["cat"].save(folder)
    weights = folder / WEIGHTS
    unet = pipe.stock.unet
    if damage == "missing":
        weights.unlink()
    elif damage == "cut off":
        weights.write_bytes(weights.read_bytes()[:500])
    elif damage == "other width":
        unet = tiny.stock("sdxl").unet
    elif damage == "no config":
        (folder / CONFIG).unlink()
    else:
        (folder / CONFIG).write_text('{"kind": ')
    words = "made for the base" if damage == "other width" else str(folder / (CONFIG if "config" in damage else WEIGHTS))
    with pytest.raises(NestedAttentionError, match=words):
        Adapter.load(folder, unet)


def test_an_adapter_of_other_layers_is_refused(tmp_path: Path) -> None:
    pipe = tiny.pipeline("sd")
    pipe.adapters["cat"].save(tmp_path / "cat")
    with pytest.raises(NestedAttentionError, match=r"cat/adapter\.safetensors does not fit this base model: .*first layers\."):
        Adapter.load(tmp_path / "cat", tiny.storybook().unet)  # of the same width


def test_where_tokens_were_read_from_is_a_probability() -> None:
    torch.manual_seed(0)
    qformer = QFormer(QFormerConfig(num_tokens=5, width=32, depth=3, heads=2, head_dim=16, feature_dim=24, output_dim=16))
    features = torch.randn(2, 17, 24)
    assert qformer(features).shape == (2, 5, 16)
    reading = qformer.reading(features)
    assert reading.shape == (2, 5, 17)
    torch.testing.assert_close(reading.sum(-1), torch.ones(2, 5))


@pytest.mark.parametrize("convolutional", [False, True])
def test_any_image_model_gives_features_that_have_places(convolutional: bool, tmp_path: Path) -> None:
    sizes = BitConfig(embedding_size=8, hidden_sizes=[16, 32, tiny.WIDTH], depths=[1, 1, 1], num_groups=4, output_stride=8)
    (BitModel(sizes) if convolutional else tiny.vision()).save_pretrained(tmp_path)
    encoder = load_image_encoder(tmp_path).eval()
    features = image_features(encoder, torch.randn(1, 3, 32, 32), -1)
    assert features.shape == (1, 16 if convolutional else 17, feature_dim(encoder))
    adapter = tiny.adapter(tiny.stock("sd").unet, "cat")
    reading = encode_image(tiny.photo(0), adapter, encoder, SubjectCache()).reading
    assert reading.shape == (6, 16)
    torch.testing.assert_close(reading.sum(-1), torch.ones(6))


def test_nested_projections_start_from_the_layer() -> None:
    unet = tiny.stock("sd").unet
    sizes = QFormerConfig(output_dim=tiny.WIDTH)
    adapter = Adapter(AdapterConfig("cat", "cat", "tiny", "vision", qformer=sizes), unet)
    for name, layer in zip(adapter.names, adapter.layers, strict=True):
        own = unet.get_submodule(name.removesuffix(".processor"))
        assert torch.equal(layer.to_k.weight, own.to_k.weight) and torch.equal(layer.to_v.weight, own.to_v.weight)


def test_routing_rewards_attention_inside_the_subject() -> None:
    names = torch.zeros(1, 2, 6, dtype=torch.bool)
    names[0, 0, 3] = True
    masks = torch.zeros(1, 2, 8, 8)
    masks[0, 0, :, :4] = 1
    inside = masks[0, 0].reshape(-1)
    good, bad = torch.full((1, 64, 6), 0.05), torch.full((1, 64, 6), 0.05)
    good[0, :, 3], bad[0, :, 3] = 0.4 * inside, 0.4 * (1 - inside)
    floor = Routing().floor
    assert routing_loss([good], names, masks, floor)[0] == 0 < routing_loss([bad], names, masks, floor)[0]
    assert abs(float(routing_loss([good], names, masks, floor)[1]) - 0.4) < 1e-6


def test_watched_attention_is_stock_attention() -> None:
    stock = tiny.storybook()
    noisy, ids = torch.randn(2, 192, 16, 16), tiny.tokenizer()(["a cat", "a man"], padding="max_length", return_tensors="pt").input_ids
    timesteps = torch.tensor([100.0, 700.0])
    plain = stock.unet(noisy, timesteps, stock.text_encoder(ids).last_hidden_state).sample
    watched, seen, told = TextToImage(stock.unet, stock.text_encoder, 24)(noisy, timesteps, ids)
    assert told.shape[:2] == (2, 24)
    torch.testing.assert_close(plain, watched, atol=1e-4, rtol=1e-4)
    assert all(torch.allclose(shares.sum(-1), torch.ones(shares.shape[:-1])) for shares in seen)


def test_the_middle_is_asked_for_what_the_image_encoder_sees() -> None:
    torch.manual_seed(0)
    features = torch.randn(4, 8, 2, 2) + 5
    own = features - features.mean((0, 2, 3), keepdim=True)
    assert alignment_loss(own, features) < 1e-6 < alignment_loss(own.roll(1, 0), features)


def test_a_reader_learns_to_tell_of_portraits(tmp_path: Path) -> None:
    sizes = QFormerConfig(num_tokens=16, width=32, depth=1, heads=2, head_dim=16, feature_dim=tiny.WIDTH, output_dim=32)
    made = ReaderTask(ReaderLesson(tiny.vision(128), QFormer(sizes), "person"), "person")
    sample = made.dataset(1)[0]
    again = F.fold(tiles(sample["portrait"][None]).mT, made.side, TILE + 2 * MARGIN, padding=MARGIN, stride=TILE)
    assert again.shape == (1, 4, made.side, made.side) and sample["weights"].shape == (1, made.side, made.side)
    before = {name: value.clone() for name, value in made.model.encoder.state_dict().items()}
    fit(made, replace(LOOP, steps=30, log_every=10, lr=3e-3, muon_lr=0.0), tmp_path, {})
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in made.model.encoder.state_dict().items())


def test_every_cell_of_a_square_has_its_tiles() -> None:
    shares, inside = tile_shares(torch.tensor([[32, 64, 64], [0, 0, 128]]), 16, 8)
    assert torch.allclose(shares.sum(-1), torch.ones(2, 256))
    rows, columns = inside[0].view(16, 16).nonzero().T
    assert len(rows) == 64 and inside[1].all()
    assert (shares[0][inside[0]].argmax(-1) == (rows - 8) * 8 + columns - 4).all()  # a square of 8 x 8 cells: one tile each
    assert shares[1, 0, 0] == 1 and torch.allclose(shares[1, 17].topk(2).values, torch.tensor([0.5625, 0.1875]))


def test_the_keys_lesson_changes_keys_only(tmp_path: Path) -> None:
    made = task()
    before = {name: value.clone() for name, value in made.model.adapter.state_dict().items()}
    lesson = KeysTask(KeysLesson(made.model), "cat", Diffusion())
    fit(lesson, replace(LOOP, steps=12, lr=1e-2, muon_lr=0.0), tmp_path, {})
    after = made.model.adapter.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if name.endswith("to_k.weight")
    }
    logs = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert logs[-1]["loss"] < logs[0]["loss"]


def test_the_sampler_belongs_to_the_objective() -> None:
    """With a perfect model the scheduler's path leads to the clean picture, and its first noise level is pure noise."""
    torch.manual_seed(0)
    clean, noise = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    scheduler = flow_scheduler()
    scheduler.set_timesteps(8)
    x = noise
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        level = sigma[None].float()
        torch.testing.assert_close(x, FlowObjective().noisy(clean, noise, level), atol=5e-3, rtol=0)
        assert abs(float(t) - float(FlowObjective().timesteps(level)[0])) <= 1
        x = scheduler.step(clean, t, x).prev_sample
    torch.testing.assert_close(x, clean)


def test_muon_updates_are_orthogonal() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalized(torch.randn(3, 20, 50)).float())
    assert values.min() > 0.6 and values.max() < 1.3


def test_whitened_adamw_is_adamw_behind_white_inputs() -> None:
    """Weights `w` that learn in white coordinates are `u @ white`, where `u` learns from inputs made white by `white`."""
    torch.manual_seed(0)
    inputs = torch.randn(512, 6) @ torch.randn(6, 6)
    white = whitening(inputs)
    torch.testing.assert_close((inputs @ white).mT @ (inputs @ white) / 512, torch.eye(6), atol=0.2, rtol=0)
    u = torch.nn.Parameter(torch.randn(3, 6))
    w = torch.nn.Parameter(u.detach() @ white)
    stock = torch.optim.AdamW([u], lr=0.1, betas=BETAS, weight_decay=0.0)
    ours = WhitenedAdamW([{"params": [w], "white": white}], 0.1, BETAS)
    for _ in range(5):
        for optimizer, predict in ((stock, lambda x: x @ white @ u.mT), (ours, lambda x: x @ w.mT)):
            optimizer.zero_grad()
            (predict(inputs) - inputs[:, :3]).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(w, u @ white, atol=1e-5, rtol=1e-4)
