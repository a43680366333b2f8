"""Training: what is frozen stays frozen, a run that was stopped goes on exactly, files come back as they were saved."""

import json
import runpy
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import BitConfig, BitModel

from nested_attention import NestedAttentionError, SubjectCache
from nested_attention.adapters import CONFIG, WEIGHTS, Adapter, AdapterConfig, list_adapters
from nested_attention.encoder import QFormer, QFormerConfig, feature_dim, image_features
from nested_attention.encoding import encode_image, load_image_encoder
from tests import tiny
from tests.story_run import LOOP, task
from train.base import BaseTask, Routing, TextToImage, alignment_loss, build, routing_loss, save_forms
from train.export import export_base
from train.export import main as export
from train.judge import Judge, load_judge, save_judge
from train.keys import KeysLesson, KeysTask, tile_shares
from train.loop import fit
from train.objective import Diffusion, FlowObjective, flow_scheduler
from train.optim import BETAS, orthogonalized
from train.reader import MARGIN, TILE, ReaderLesson, ReaderTask, tiles
from train.state import Checkpoint, learning
from train.whitening import WhitenedAdamW, whitening


def test_only_the_adapter_learns(tmp_path: Path) -> None:
    made = task()
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    fit(made, LOOP, tmp_path, {})
    changed = {name for name, value in made.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("adapter.") for name in changed)
    assert {name.split(".")[1] for name in changed} == {"qformer", "layers"}
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


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
    tokens, reading = qformer.read(features)
    assert tokens.shape == (2, 5, 16) and torch.equal(tokens, qformer(features))
    assert reading.shape == (2, 5, 17)
    torch.testing.assert_close(reading.sum(-1), torch.ones(2, 5))


def convolutions(stride: int) -> BitModel:
    """The architecture of Storybook's image encoder."""
    torch.manual_seed(2)
    return BitModel(BitConfig(embedding_size=8, hidden_sizes=[16, 32, tiny.WIDTH], depths=[1, 1, 1], num_groups=4, output_stride=stride))


@pytest.mark.parametrize("convolutional", [False, True])
def test_any_image_model_gives_features_that_have_places(convolutional: bool, tmp_path: Path) -> None:
    (convolutions(8) if convolutional else tiny.vision()).save_pretrained(tmp_path)
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
    model = TextToImage(stock.unet, stock.text_encoder, convolutions(16))
    watched, seen, told = model(noisy, timesteps, ids)
    assert told.shape[:2] == (2, tiny.WIDTH)
    torch.testing.assert_close(plain, watched, atol=1e-4, rtol=1e-4)
    assert all(torch.allclose(shares.sum(-1), torch.ones(shares.shape[:-1])) for shares in seen)


@torch.no_grad()
def test_sample_grids_leave_nothing_behind_in_the_model() -> None:
    model = base_task().model
    noisy, timesteps, ids = torch.randn(1, 192, 16, 16), torch.tensor([100.0]), torch.zeros(1, 48, dtype=torch.long)
    told = model(noisy, timesteps, ids)[2]
    before = weakref.ref(model.middle)
    model.unet(noisy + 1, timesteps, model.text_encoder(ids).last_hidden_state)
    assert before() is None and torch.equal(model(noisy, timesteps, ids)[2], told)


def base_task() -> BaseTask:
    stock = tiny.storybook()
    model = TextToImage(stock.unet, stock.text_encoder, convolutions(16))
    return BaseTask(model, stock.tokenizer, 8, Diffusion(), Routing(), 0.5)


def test_all_that_a_base_computes_with_goes_where_the_model_goes() -> None:
    """On "meta", where there are shapes and no numbers, so that the first number is asked for when all is computed."""
    made = base_task()
    batch = {key: value[None].to("meta") for key, value in made.dataset(1)[0].items()}
    made.model.to("meta")
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta tensors"):
        made.loss(made.model, batch)


def test_white_coordinates_and_grids_are_made_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    made = task()
    made.model.to("meta")
    assert {value.device.type for value in made.white().values()} == {"meta"}
    lesson = ReaderTask(reader_lesson(), "person")
    lesson.model.to("meta")
    monkeypatch.setattr(lesson, "held_out", lambda: DataLoader(lesson.dataset(2), 2))
    with pytest.raises(NotImplementedError, match="out of meta tensor"):
        lesson.grid()


def test_the_middle_is_asked_for_what_the_image_encoder_sees() -> None:
    torch.manual_seed(0)
    features = torch.randn(4, 8, 2, 2) + 5
    own = features - features.mean((0, 2, 3), keepdim=True)
    assert alignment_loss(own, features) < 1e-6 < alignment_loss(own.roll(1, 0), features)


def reader_lesson() -> ReaderLesson:
    sizes = QFormerConfig(num_tokens=16, width=32, depth=1, heads=2, head_dim=16, feature_dim=tiny.WIDTH, output_dim=32)
    return ReaderLesson(tiny.vision(128), QFormer(sizes), "person")


def test_a_reader_learns_to_tell_of_portraits(tmp_path: Path) -> None:
    made = ReaderTask(reader_lesson(), "person")
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


def test_only_storybooks_adapters_are_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    made = tiny.adapter(tiny.stock("sd").unet, "cat")
    for run, base in (("adapter-cat-2", "storybook"), ("adapter-person", "sdxl")):
        made.config = replace(made.config, base=base)
        made.save(tmp_path / "runs" / run / "adapter")
    config = "train/configs/storybook.toml"
    monkeypatch.setattr(sys, "argv", ["train.export", "--config", config, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    export()
    assert [path.name for path in (tmp_path / "out/adapters").iterdir()] == ["cat"]
    assert "runs/adapter-person/adapter is left out, since its base is sdxl; `python -m train.push" in capsys.readouterr().out
    made.config = replace(made.config, base="storybook")
    made.save(tmp_path / "runs/adapter-cat/adapter")
    with pytest.raises(NestedAttentionError, match=r"adapter-cat/adapter and .*adapter-cat-2/adapter are both for cat; move the one"):
        export()


def checkpoint(model: torch.nn.Module, run: Path) -> dict[str, torch.Tensor]:
    """A run's, with an average that is not what the model has; returns that."""
    average = {name: value.detach() + 0.5 for name, value in learning(model).items()}
    Checkpoint(run / "state").save(dict.fromkeys(("model", "average", "optimizer"), average), {"step": 7, "seconds": 60})
    return average


def test_the_average_of_a_base_is_exported_with_the_tokenizer_that_it_learned_with(tmp_path: Path) -> None:
    made, run = base_task(), tmp_path / "base"
    with pytest.raises(NestedAttentionError, match=r"unet, text_encoder or tokenizer in .*base is missing or damaged"):
        export_base({"patch": 8}, run, tmp_path / "out")
    average = checkpoint(made.model, run)
    save_forms(made.model.unet, made.model.text_encoder, made.tokenizer, run)
    export_base({"patch": 8}, run, tmp_path / "out")
    (tmp_path / "out/vae/patches.py").write_text("")  # only from `assets` is it run
    unet, text_encoder, tokenizer = build({}, Path(), tmp_path / "out")
    assert tokenizer.get_vocab() == made.tokenizer.get_vocab()
    for name, part in {"unet": unet, "text_encoder": text_encoder}.items():
        assert all(torch.equal(value, average[f"{name}.{key}"].half().float()) for key, value in part.named_parameters())


def test_the_average_of_a_judge_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    average = checkpoint(Judge(), tmp_path / "runs/judge")
    arguments = [
        "train.export",
        "--config",
        "train/configs/storybook.toml",
        "--runs",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    export()
    assert all(torch.equal(value, average[name].half().float()) for name, value in load_judge(tmp_path / "out/judge").named_parameters())


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("name", ["base", "encoder", "export", "judge", "keys", "reader", "text"])
def test_every_command_says_in_a_sentence_what_it_lacks(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = ["--kind", "cat"] if name in ("keys", "reader") else []
    monkeypatch.setattr(sys, "argv", [name, "--config", str(tmp_path / "none.toml"), *kind])
    with pytest.raises(SystemExit, match=r"none\.toml is no config with a section \["):
        runpy.run_module(f"train.{name}", run_name="__main__")


def test_a_base_needs_something_to_start_from(tmp_path: Path) -> None:
    with pytest.raises(NestedAttentionError, match=r"text holds no tokenizer and text encoder to start from, .*make them with `python -m"):
        build({}, tmp_path / "text")


def test_a_damaged_judge_is_named(tmp_path: Path) -> None:
    made = Judge((8, 16), 4)
    save_judge(made, tmp_path / "judge")
    again = load_judge(tmp_path / "judge")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.judge.questions", lambda: {"kind": ("cat", "dog", "person", "vehicle")})
        with pytest.raises(NestedAttentionError, match=r"judge answers other questions than this world has, .*python -m train\.judge"):
            load_judge(tmp_path / "judge")
    assert all(torch.equal(value, made.state_dict()[name].half()) for name, value in again.half().state_dict().items())
    config = tmp_path / "judge/config.json"
    for damage in (lambda: config.write_text('{"widths": [8'), lambda: config.write_text("{}"), config.unlink):
        damage()
        with pytest.raises(NestedAttentionError, match=r"judge/config\.json is missing or damaged .*; put back a whole copy"):
            load_judge(tmp_path / "judge")
