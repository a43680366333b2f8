"""The importer of the released weights, on files of reduced width in every plausible naming, and its command."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save, save_file

from nested_attention import NestedAttentionError
from nested_attention.__main__ import main
from nested_attention.adapters import Adapter, cross_attention_layers, read_config, read_weights
from nested_attention.bases import UNETS
from nested_attention.loading import adapter_folder
from nested_attention.released import FILE, LICENCE, REPO, RESAMPLER, convert, is_released
from tests import tiny
from tests.hub_server import HubServer, visit

WIDTH, TOKENS, DEPTH, INNER, FEATURES = 24, 5, 2, 128, 40
NARROW = UNETS["sdxl"] | {  # SDXL with all its layers
    "block_out_channels": (16, 16, 32), "attention_head_dim": (2, 2, 4), "cross_attention_dim": 2 * tiny.WIDTH, "norm_num_groups": 8,
}  # fmt: skip


def resampler(output: int) -> dict[str, torch.Tensor]:
    """A resampler's tensors by their released names."""
    shapes = {
        "latents": (1, TOKENS, WIDTH), "proj_in.weight": (WIDTH, FEATURES), "proj_in.bias": (WIDTH,), "proj_out.weight": (output, WIDTH),
        "proj_out.bias": (output,), "norm_out.weight": (output,), "norm_out.bias": (output,), "layers.{j}.0.to_q.weight": (INNER, WIDTH),
        "layers.{j}.0.to_kv.weight": (2 * INNER, WIDTH), "layers.{j}.0.to_out.weight": (WIDTH, INNER),
        "layers.{j}.1.1.weight": (3 * WIDTH, WIDTH), "layers.{j}.1.3.weight": (WIDTH, 3 * WIDTH),
    }  # fmt: skip
    names = [name.format(j=j) for name, _ in RESAMPLER for j in (range(DEPTH) if "{j}" in name else (0,))]
    generic = {name.format(j=j): shape for name, shape in shapes.items() for j in range(DEPTH)}
    return {name: torch.randn(generic.get(name, (WIDTH,))) for name in names}


def released(
    prefixes: tuple[str, str], leaves: tuple[str, str], odd: bool, dtype: torch.dtype, unet: UNet2DConditionModel | None = None
) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    layers = cross_attention_layers(unet or tiny.stock("sdxl").unet).values()
    tensors = {f"{prefixes[0]}.{name}": value for name, value in resampler(2 * tiny.WIDTH).items()}
    for k, attention in enumerate(layers):
        for leaf in leaves:
            tensors[f"{prefixes[1]}.{2 * k + 1 if odd else k}.{leaf}"] = torch.randn(attention.to_k.weight.shape)
    return {name: value.to(dtype) for name, value in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("odd", [True, False])
@pytest.mark.parametrize(
    "leaves",
    [
        ("to_k_nest.weight", "to_v_nest.weight"),
        ("to_k_ip.weight", "to_v_ip.weight"),
        ("key", "value"),
        ("W_K.weight", "W_V.weight"),
        ("wk", "wv"),
        ("kproj.weight", "vproj.weight"),
        ("nested_keys", "nested_values"),
        ("0.weight", "1.weight"),
    ],
)
@pytest.mark.parametrize("prefixes", [("image_proj_model", "adapter_modules"), ("image_proj", "ip_adapter")])
def test_every_naming_comes_out_bit_equal(prefixes, leaves, odd: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    unet = tiny.stock("sdxl").unet
    tensors = released(prefixes, leaves, odd, dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    convert(read_weights(tmp_path / "model.safetensors"), unet, "abc").save(tmp_path / "adapter", dtype)
    adapter = Adapter.load(tmp_path / "adapter", unet)
    sizes = adapter.config.qformer
    assert (sizes.num_tokens, sizes.width, sizes.depth, sizes.heads, sizes.feature_dim, sizes.ff_mult) == (
        TOKENS,
        WIDTH,
        DEPTH,
        2,
        FEATURES,
        3,
    )
    assert adapter.config.licence == LICENCE
    state = {name: value.to(dtype) for name, value in adapter.state_dict().items()}
    for theirs, ours in RESAMPLER:
        for j in range(DEPTH):
            assert torch.equal(tensors[f"{prefixes[0]}.{theirs.format(j=j)}"], state[f"qformer.{ours.format(j=j)}"])
    for k in range(len(adapter.layers)):
        number = 2 * k + 1 if odd else k
        assert torch.equal(tensors[f"{prefixes[1]}.{number}.{leaves[0]}"], state[f"layers.{k}.to_k.weight"])
        assert torch.equal(tensors[f"{prefixes[1]}.{number}.{leaves[1]}"], state[f"layers.{k}.to_v.weight"])


def test_what_is_missing_or_left_over_is_listed_in_full() -> None:
    tensors = released(("image_proj", "ip_adapter"), ("to_k_ip.weight", "to_v_ip.weight"), True, torch.float32)
    del tensors["ip_adapter.3.to_v_ip.weight"], tensors["image_proj.latents"]
    tensors["ip_adapter.1.lora.weight"] = torch.zeros(4, 4)  # three weights where two are expected
    tensors |= {"ema.decay": torch.zeros(1), "ip_adapter.99.to_k_ip.weight": torch.zeros(4, 4), "ip_adapter.1.scale": torch.zeros(1)}
    with pytest.raises(NestedAttentionError) as caught:
        convert(tensors, tiny.stock("sdxl").unet, "abc")
    clear = "one weight for keys and one for values"
    assert f"Missing (3): image_proj.latents, ip_adapter.1: {clear}, ip_adapter.3: {clear}. Left over (7): " in str(caught.value)
    left = {"ema.decay", "ip_adapter.99.to_k_ip.weight", "ip_adapter.1.scale", "ip_adapter.3.to_k_ip.weight"}
    left |= {f"ip_adapter.1.{leaf}.weight" for leaf in ("lora", "to_k_ip", "to_v_ip")}
    for name in left:
        assert name in str(caught.value)


def test_weights_of_another_width_are_refused() -> None:
    tensors = released(("image_proj", "ip_adapter"), ("to_k_ip.weight", "to_v_ip.weight"), True, torch.float32)
    tensors["ip_adapter.1.to_k_ip.weight"] = torch.randn(7, 9)
    with pytest.raises(NestedAttentionError, match=r"layers.0.to_k.weight: needed .* found \(7, 9\)"):
        convert(tensors, tiny.stock("sdxl").unet, "abc")


@pytest.mark.parametrize("odd", [True, False])
def test_all_seventy_layers_of_sdxl_are_numbered_either_way(odd: bool) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**NARROW)
    tensors = released(("image_proj", "ip_adapter"), ("to_k_ip.weight", "to_v_ip.weight"), odd, torch.float32, unet)
    numbers = {int(name.split(".")[1]) for name in tensors if name.startswith("ip_adapter")}
    assert numbers == set(range(1, 140, 2) if odd else range(70))
    adapter = convert(tensors, unet, None)
    assert len(adapter.layers) == 70
    for k in (0, 1, 35, 69):
        assert torch.equal(adapter.layers[k].to_v.weight, tensors[f"ip_adapter.{2 * k + 1 if odd else k}.to_v_ip.weight"])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub with the released weights, for an SDXL of reduced width."""
    monkeypatch.setitem(UNETS, "sdxl", NARROW)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**NARROW)
    tensors = released(("image_proj_model", "adapter_modules"), ("to_k.weight", "to_v.weight"), True, torch.float16, unet)
    with HubServer("token") as server:
        visit(server, monkeypatch, tmp_path / "home")
        server.publish(REPO, {FILE: save(tensors), "image_encoder/model.safetensors": b"large"})
        yield server


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """Calls `import-released`. Returns the message that it ends with, or nothing."""
    monkeypatch.setattr(sys, "argv", ["nested_attention", "import-released", *map(str, arguments)])
    try:
        main()
    except SystemExit as stopped:
        return str(stopped.code)
    return ""


def test_the_command_fetches_once_and_says_the_licence(hub: HubServer, monkeypatch, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    said = f"The released adapter is in {out}. Its licence is CC-BY-NC-SA-4.0: non-commercial use, share alike, name the authors.\n"
    assert command(monkeypatch, "--out", out) == ""
    assert capsys.readouterr().out == said
    assert [request.rpartition("/")[2] for request in hub.requests if "/resolve/" in request and "GET" in request] == ["model.safetensors"]
    config = read_config(out)
    assert (config.image_revision, config.licence, config.base) == (hub.repos[REPO].head, LICENCE, "sdxl")
    hub.requests.clear()
    assert command(monkeypatch, "--out", out) == ""
    assert capsys.readouterr().out == said and hub.requests == []


def test_a_downloaded_file_needs_no_network(hub: HubServer, monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(hub.repos[REPO].files[FILE].content)
    for _ in range(2):  # the second time it takes the place of the first
        assert command(monkeypatch, "--file", tmp_path / "model.safetensors", "--out", tmp_path / "out") == ""
    assert read_config(tmp_path / "out").image_revision is None and is_released(tmp_path / "out")
    assert hub.requests == []


def test_no_folder_is_lost(hub: HubServer, monkeypatch, tmp_path: Path, capsys) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    (tmp_path / "model.safetensors").write_bytes(hub.repos[REPO].files[FILE].content)
    for arguments in ((), ("--file", tmp_path / "model.safetensors")):
        assert (
            command(monkeypatch, *arguments, "--out", mine)
            == f"{mine} is there and holds something else than an adapter; name a new folder."
        )
    assert (mine / "thesis.txt").read_text() == "years of work"
    other = tiny.adapter(tiny.stock("sdxl").unet, "cat")
    other.config = replace(other.config, image_encoder=REPO)
    other.save(tmp_path / "cat")
    assert command(monkeypatch, "--out", tmp_path / "cat") == f"{tmp_path / 'cat'} holds another adapter, for 'cat'; name a new folder."
    assert read_config(tmp_path / "cat").kind == "cat" and "released" not in capsys.readouterr().out
    assert hub.requests == []


def test_the_repos_name_is_enough(hub: HubServer, tmp_path: Path, capsys) -> None:
    """As `from_pretrained(adapter=REPO)` does: converted once for every commit, and of the wanted one."""
    unet = UNet2DConditionModel.from_config(NARROW)
    first = hub.repos[REPO].head
    folder = adapter_folder(REPO, unet)
    assert read_config(folder).image_revision == first and Adapter.load(folder, unet).config.kind == "person"
    assert f"Its licence is {LICENCE}" in capsys.readouterr().out
    hub.publish(REPO, {FILE: hub.repos[REPO].files[FILE].content, "README.md": b"changed"})
    assert adapter_folder(REPO, unet) == folder
    second = adapter_folder(f"{REPO}@{hub.repos[REPO].head}", unet)
    assert second != folder and read_config(second).image_revision == hub.repos[REPO].head != first


def test_another_base_is_refused_before_anything_is_fetched(hub: HubServer) -> None:
    with pytest.raises(NestedAttentionError, match="was made for SDXL, and this base model is another one; choose the base sdxl"):
        adapter_folder(REPO, tiny.stock("sd").unet)
    assert hub.requests == []
