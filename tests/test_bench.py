"""What `python -m nested_attention bench` measures and prints."""

import json
import sys
from pathlib import Path

import pytest
import torch

from nested_attention.__main__ import main
from nested_attention.attention import LayerSubject, split_heads
from nested_attention.bases import UNETS
from nested_attention.bench.layers import layer_table, query_lengths
from nested_attention.bench.step import COLUMNS, LENGTH, Bench, step_table
from nested_attention.bench.visitor import visitor_table
from nested_attention.bench.yardsticks import DirectProcessor
from nested_attention.condition import NestedCondition
from nested_attention.loading import best_device, best_dtype
from tests import tiny


def test_every_wait_of_a_visitor_is_timed() -> None:
    waits = visitor_table(tiny.pipeline("sd"), repeats=1)
    assert {"import and load", "encode one picture", "four pictures"} <= waits.keys() and all(value > 0 for value in waits.values())


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_form_is_timed_and_leaves_no_trace(architecture: str) -> None:
    bench = Bench(tiny.pipeline(architecture).stock.unet)
    table = step_table(bench, 1, None)
    sizes = [f"ours, {count} x {tokens}" for count in (1, 2, 4) for tokens in (16, 256, 1024)]
    assert list(table) == [
        "stock",
        "ours, no subject",
        *sizes,
        "ours, 1 x 1024, traced",
        "direct form, 1 x 1024",
        "decoupled cross-attention, 16",
    ]
    assert table["stock"]["ratio"] == 1 and table["stock"]["cache_mb"] == 0
    assert 0 < table["ours, 4 x 16"]["cache_mb"] == pytest.approx(4 * table["ours, 1 x 16"]["cache_mb"])
    assert step_table(bench, 1, ["ours, 1 x 16"]).keys() == {"stock", "ours, 1 x 16"}
    assert bench.unet.attn_processors == bench.ours


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_what_subjects_add_to_the_layers_is_timed(architecture: str) -> None:
    bench = Bench(tiny.pipeline(architecture).stock.unet)
    seen: dict[str, int] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].shape[1]}))
        for name, layer in bench.layers.items()
    ]
    bench.step()
    for hook in hooks:
        hook.remove()
    assert query_lengths(bench.unet) == seen
    table = layer_table(bench, 1)
    assert list(table) == ["ours, 1 x 256", "ours, 1 x 1024", "ours, 4 x 1024"] and all(row["nested"] > 0 for row in table.values())
    assert bench.unet.attn_processors == bench.ours


@torch.no_grad()
def test_the_direct_form_is_the_equation() -> None:
    """Else it would be no yardstick. It has the subject in both halves of guidance and leaves lengths as they are."""
    bench = Bench(tiny.pipeline("sd").stock.unet)
    column = COLUMNS[0]
    bench.install(bench.processors(lambda attention: DirectProcessor(attention, bench.tokens(7), column)))
    seen: list[torch.Tensor] = []
    hook = bench.unet.conv_out.register_forward_hook(lambda _, inputs, out: seen.append(out))
    bench.step()
    one, columns = torch.ones(()), torch.zeros(1, LENGTH)
    columns[0, column] = 1
    layers = {}
    for name, attention in bench.layers.items():
        of_layer = bench.unet.attn_processors[name].layer
        key, value = (split_heads(to(of_layer.tokens), attention.heads) for to in (of_layer.to_k, of_layer.to_v))
        layers[name] = [LayerSubject(columns, key, value, one, one, one)]
    bench.install()
    with tiny.plain_form():
        bench.step(NestedCondition(2, layers))
    hook.remove()
    torch.testing.assert_close(*seen, atol=1e-5, rtol=1e-5)


def test_the_command_prints_and_writes_what_it_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    settings = dict(tiny.stock("sd").unet.config)
    monkeypatch.setitem(UNETS, "sd15", settings)
    monkeypatch.setattr(sys, "argv", f"nested_attention bench --scale sd15 --repeats 1 --json {tmp_path / 'sd15.json'}".split())
    main()
    said, written = capsys.readouterr().out, json.loads((tmp_path / "sd15.json").read_text())
    assert "direct form, 1 x 1024" in said and f"sd15 on {written['device']}, {written['dtype']}, torch" in said
    assert written["dtype"] == str(best_dtype(best_device())).removeprefix("torch.")
    assert "all cross-attention layers, alone" in said and written["layers"]["ours, 1 x 256"].keys() == {"added", "subjects", "nested"}
    row = written["step"]["stock"]
    assert written["scale"] == "sd15" and row.keys() == {"seconds", "ratio", "least", "largest", "peak_mb", "extra_mb", "cache_mb"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--repeats", "0"], "argument --repeats: 0 is no number of rounds; name a whole number from 1 on"),
        (["--only", "stock", "typo"], "argument --only: invalid choice: 'typo' (choose from "),
    ],
)
def test_options_that_time_nothing_are_refused(options: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["nested_attention", "bench", *options])
    with pytest.raises(SystemExit):
        main()
    assert words in capsys.readouterr().err


def test_a_place_that_takes_nothing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setitem(UNETS, "sd15", dict(tiny.stock("sd").unet.config))
    options = f"bench --scale sd15 --repeats 1 --only stock --json {tmp_path / 'file' / 'sd15.json'}"
    monkeypatch.setattr(sys, "argv", ["nested_attention", *options.split()])
    with pytest.raises(SystemExit, match=r"sd15.json cannot be written"):
        main()
