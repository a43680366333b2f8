"""Finding and loading base models: names, folders, other architectures, devices, the Hub out of reach."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from nested_attention import NestedAttentionError, NestedAttentionPipeline, patches
from nested_attention.adapters import AdapterConfig, list_adapters, read_config
from nested_attention.bases import BASES, FewSteps, find_base
from nested_attention.encoding import ImageEncoders
from nested_attention.hub import commit_of
from nested_attention.loading import best_dtype, load_adapters, load_base, make_quick, usable_device
from nested_attention.settings import Settings
from nested_attention.ui.examples import load_examples
from tests import tiny
from tests.hub_server import HubServer, visit

TOO_LONG = "x" * 5000  # for the name of a file


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_any_diffusers_folder_of_a_known_architecture_loads(architecture: str, tmp_path: Path) -> None:
    tiny.stock(architecture).save_pretrained(tmp_path / "mine")
    pipe = NestedAttentionPipeline.from_pretrained(str(tmp_path / "mine"), device="cpu")
    assert pipe.base.pipeline == ("StableDiffusionXLPipeline" if architecture == "sdxl" else "StableDiffusionPipeline")
    assert pipe.base.guidance_scale == BASES["sdxl" if architecture == "sdxl" else "sd15"].guidance_scale
    assert pipe.kinds == ()
    assert pipe.base.licence == "see its source"


def test_other_architectures_are_named(tmp_path: Path) -> None:
    for name in ("Flux", "StableDiffusion3"):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": f"{name}Pipeline"}))
        with pytest.raises(NestedAttentionError, match=f"is a {name} model"):
            load_base(str(tmp_path), torch.float32)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(NestedAttentionError, match="damaged"):
        load_base(str(tmp_path), torch.float32)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole base model."""
    folder = tmp_path_factory.mktemp("bases") / "stored"
    tiny.stock("sd").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize(
    "file",
    [
        "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors", "vae/config.json", "text_encoder/config.json",
        "text_encoder/model.safetensors", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json",
    ],
)  # fmt: skip
def test_the_file_that_a_base_lacks_or_that_is_cut_off_is_named(file: str, gone: bool, stored: Path, tmp_path: Path) -> None:
    shutil.copytree(stored, base := tmp_path / "base")
    if gone:
        (base / file).unlink()
    else:
        (base / file).write_bytes((base / file).read_bytes()[: (base / file).stat().st_size // 2])
    with pytest.raises(NestedAttentionError, match=r"cannot be loaded .*; put back a whole copy") as error:
        load_base(str(base), torch.float32)
    folder, _, name = file.partition("/")
    assert str(base / folder) in str(error.value) and name in str(error.value)


def test_a_tokenizer_that_is_none_is_said(stored: Path, tmp_path: Path) -> None:
    shutil.copytree(stored, base := tmp_path / "base")
    (base / "tokenizer/tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(NestedAttentionError, match=r"base cannot be loaded .*; put back a whole copy"):
        load_base(str(base), torch.float32)


def test_a_base_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BASES, "gone", replace(BASES["storybook"], name="gone", source=str(tmp_path / "gone")))
    with pytest.raises(NestedAttentionError, match=r"gone is not in .*; put back a whole copy"):
        load_base("gone", torch.float32)


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ("file", r"file/config\.json is missing, so .*file is not an adapter"),
        (TOO_LONG, r"config\.json is missing, so x+ is not an adapter"),
        (f"me/{TOO_LONG}", r"config\.json is missing, so me/x+ is not an adapter"),
        ("runs/adapter-persn", r"there is no folder runs/adapter-persn here, and as a repo: .* the Hub cannot be reached"),
    ],
)
def test_an_adapter_that_is_none_is_named(adapter: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with HubServer("token") as gone:
        visit(gone, monkeypatch, tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(NestedAttentionError, match=words):
        load_adapters(BASES["sd15"], tiny.stock("sd").unet, adapter, torch.device("cpu"))


def test_an_adapter_that_should_come_along_and_is_lost_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("nested_attention.errors.SHIPPED", tmp_path)
    folder, unet = tmp_path / "adapters", tiny.stock("sd").unet
    folder.mkdir()
    with pytest.raises(NestedAttentionError, match=r"adapters, of .* is missing or empty; get it back with `git checkout -- .*adapters`"):
        list_adapters(folder)
    for kind in ("cat", "person"):
        tiny.adapter(unet, kind).save(folder / kind)
    (folder / "cat.being-replaced").mkdir()
    assert list(list_adapters(folder)) == ["cat", "person"]
    (folder / "person/config.json").unlink()
    with pytest.raises(NestedAttentionError, match=r"person/config\.json, of .* get it back with `git checkout -- .*config\.json`"):
        list_adapters(folder)


def test_unknown_names_and_devices_are_named() -> None:
    with pytest.raises(NestedAttentionError, match="no base model called 'flux'"):
        find_base("flux")
    with pytest.raises(NestedAttentionError, match="no device called 'gpu'"):
        usable_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(NestedAttentionError, match=r"cuda was asked for.*device="):
            usable_device("cuda")
    assert best_dtype(torch.device("cuda")) == torch.float16


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert usable_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(NestedAttentionError, match=r"cuda:7 was asked for, but the last GPU of this machine is cuda:1; name one"):
        usable_device("cuda:7")


def test_a_folder_with_nothing_but_weights_in_16_bit_loads(tmp_path: Path) -> None:
    tiny.stock("sd").save_pretrained(tmp_path, variant="fp16")
    _, stock = load_base(str(tmp_path), torch.float32)
    assert torch.equal(stock.unet.conv_in.weight, tiny.stock("sd").unet.conv_in.weight)


def test_a_missing_or_damaged_image_encoder_is_named(tmp_path: Path) -> None:
    config = AdapterConfig("cat", "cat", "sd15", "../eyes")
    encoders = ImageEncoders({"cat": tmp_path / "adapter"}, torch.device("cpu"), torch.float32)

    def refusal() -> str:
        with pytest.raises(NestedAttentionError) as caught:
            encoders.get(config)
        return str(caught.value)

    folder = tmp_path / "eyes"
    assert refusal().startswith(f"the image encoder {folder} cannot be loaded (")
    tiny.vision().save_pretrained(folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (b"", whole[:4], whole[:1000], bytes(len(whole))):
        weights.write_bytes(damaged)
        assert refusal().startswith(f"the image encoder {weights} cannot be loaded (")
    weights.unlink()
    torch.save(tiny.vision().state_dict(), folder / "pytorch_model.bin")
    assert "model.safetensors" in refusal()  # a pickle is not read
    weights.write_bytes(whole)
    assert encoders.get(config).config.image_size == 32


def test_a_cpu_that_only_emulates_bfloat16_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_bf16": False})
    assert best_dtype(torch.device("cpu")) == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_bf16": True})
    assert best_dtype(torch.device("cpu")) == torch.bfloat16


def test_a_hub_out_of_reach_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NestedAttentionError, match="cannot be reached"):
        commit_of("somebody/something")
    with pytest.raises(NestedAttentionError, match="cannot be reached"):
        load_base("sdxl", torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_a_recorded_commit_is_used_from_then_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    (tmp_path / "nested_attention").mkdir()
    (tmp_path / "nested_attention/revisions.json").write_text('{"a/b": "123"}')
    assert commit_of("a/b") == "123"


def test_a_revision_may_stand_behind_a_repo() -> None:
    base = find_base("user/name@refs/pr/1")
    assert (base.source, base.revision) == ("user/name", "refs/pr/1")
    assert find_base("user/name").revision is None


def test_the_base_carries_a_true_copy_of_the_patch_autoencoder() -> None:
    """Diffusers alone loads the folder by its own file; `train.export` writes it from ours."""
    ours = Path(patches.__file__).read_text()
    assert (Path(BASES["storybook"].source) / "vae/patches.py").read_text() == ours


def test_few_step_weights_are_fused_and_bring_their_scheduler(tmp_path: Path) -> None:
    """A LoRA of rank 1 moves the U-Net's weights by just its product; the layers stay plain layers."""
    stock = tiny.stock("sdxl")
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    layer = stock.unet.get_submodule(name)
    before = layer.weight.clone()
    down, up = torch.randn(1, layer.in_features), torch.randn(layer.out_features, 1)
    save_file({f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}, tmp_path / "few.safetensors")
    make_quick(stock, FewSteps(str(tmp_path), None, "few.safetensors", 0.1, "LCMScheduler", {}))
    after = stock.unet.get_submodule(name)
    assert type(after) is torch.nn.Linear and type(stock.scheduler).__name__ == "LCMScheduler"
    torch.testing.assert_close(after.weight, before + up @ down)
    with pytest.raises(NestedAttentionError, match=r"few-step weights gone\.safetensors"):
        make_quick(tiny.stock("sd"), FewSteps(str(tmp_path), None, "gone.safetensors", 0.1, "LCMScheduler", {}))


def test_few_step_presets_are_their_base_with_fewer_steps() -> None:
    for base in BASES.values():
        if base.few_steps is not None:
            whole = BASES[base.name.split("-")[0]]
            assert base.source == whole.source and base.steps < whole.steps / 2 and base.guidance_scale <= 2
            assert hasattr(diffusers, base.few_steps.scheduler)


def test_no_more_steps_are_drawn_than_the_scheduler_takes(stored: Path, tmp_path: Path) -> None:
    assert load_base(str(stored), torch.float32)[0].most_steps == 150
    stock = tiny.stock("sd")
    stock.scheduler = diffusers.LCMScheduler()
    stock.save_pretrained(tmp_path / "lcm")
    base, _ = load_base(str(tmp_path / "lcm"), torch.float32)
    assert Settings.checked(base, "a cat", steps=50).steps == 50
    with pytest.raises(NestedAttentionError, match=r"steps is 51; .*lcm draws in at most 50 steps"):
        Settings.checked(base, "a cat", steps=51)


def test_a_base_that_was_trained_as_storybook_loads_wherever_it_lies(tmp_path: Path) -> None:
    shutil.copytree(BASES["storybook"].source, folder := tmp_path / "base")
    base, stock = load_base(str(folder), torch.float32)
    own = {"name": str(folder), "source": str(folder), "licence": "see its source", "adapters": None}
    assert base == replace(BASES["storybook"], **own)
    latents = torch.randn(1, 192, 16, 16)
    assert torch.equal(stock.vae.decode(latents).sample, patches.PatchAutoencoder().decode(latents).sample)


def test_code_that_a_base_brings_is_not_run(tmp_path: Path) -> None:
    shutil.copytree(BASES["storybook"].source, base := tmp_path / "base")
    with (base / "vae/patches.py").open("a") as code:
        code.write(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(NestedAttentionError, match=r"base brings code of its own, .*vae/patches\.py, which is not run; choose another"):
        load_base(str(base), torch.float32)
    assert not (tmp_path / "ran").exists()


def test_a_base_has_the_size_of_its_unet(stored: Path) -> None:
    base, _ = load_base(str(stored), torch.float32)
    assert (base.size, base.sizes) == (32, (16, 64, 8))


def test_adapters_of_different_kinds_and_places_are_loaded_together(tmp_path: Path) -> None:
    """Each with the image encoder of its own folder, though both call it the same."""
    stock = tiny.stock("sd")
    stock.save_pretrained(tmp_path / "base")
    for kind in ("person", "cat"):
        tiny.adapter(stock.unet, kind).save(tmp_path / kind)
        tiny.vision(32 if kind == "cat" else 64).save_pretrained(tmp_path / kind / "vision")
    folders = [tmp_path / "person", str(tmp_path / "cat")]
    pipe = NestedAttentionPipeline.from_pretrained(str(tmp_path / "base"), folders, "cpu", torch.float32)
    assert pipe.kinds == ("person", "cat")
    assert [pipe.image_encoders.get(one.config).config.image_size for one in pipe.adapters.values()] == [64, 32]
    shutil.copytree(tmp_path / "cat", tmp_path / "tom")
    with pytest.raises(NestedAttentionError, match=rf"{tmp_path}/cat and {tmp_path}/tom are both adapters for 'cat'; choose one"):
        load_adapters(BASES["sd15"], stock.unet, [tmp_path / "cat", tmp_path / "tom"], torch.device("cpu"))


@pytest.mark.parametrize("kind", ["cat", "dog"])
def test_an_adapter_of_a_training_finds_the_image_encoder_of_its_base(kind: str, tmp_path: Path) -> None:
    """Its config says where that is from the folder in which such an adapter comes along with the base, or would."""
    shipped = BASES["storybook"].adapters / "cat"  # type: ignore[operator]
    config = replace(read_config(shipped), kind=kind)
    found = ImageEncoders({kind: tmp_path / "adapter"}, torch.device("cpu"), torch.float32).get(config)
    own = ImageEncoders({"cat": shipped}, torch.device("cpu"), torch.float32).get(read_config(shipped))
    assert config.image_encoder == "../../image_encoder"
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in found.state_dict().items())


def test_an_adapter_of_a_training_encodes(tmp_path: Path) -> None:
    shutil.copytree(BASES["storybook"].adapters / "cat", tmp_path / "adapter")  # type: ignore[operator]
    pipe = NestedAttentionPipeline.from_pretrained("storybook", adapter=tmp_path / "adapter", device="cpu")
    assert pipe.kinds == ("cat",) and pipe.encode("cat", tiny.photo(1)).images[0].bytes > 0


def test_the_shipped_weights_draw_every_kind_of_subject() -> None:
    pipe = NestedAttentionPipeline.from_pretrained("storybook", device="cpu")
    files = {slot.kind: slot.files[0] for example in load_examples() for slot in example.slots}
    assert set(pipe.kinds) == set(files) == {"person", "cat", "vehicle"}
    for kind, file in files.items():
        image = pipe(f"<{kind}> on the beach", [pipe.encode(kind, file)], steps=2, seed=1).images[0]
        assert image.size == (128, 128) and np.asarray(image).std() > 20
