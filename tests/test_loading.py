"""Finding and loading base models: names, folders, other architectures, devices, the Hub out of reach."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from nested_attention import NestedAttentionError, NestedAttentionPipeline, patches
from nested_attention.bases import BASES, find_base
from nested_attention.hub import commit_of
from nested_attention.loading import best_dtype, load_base, usable_device
from tests import tiny


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_any_diffusers_folder_of_a_known_architecture_loads(architecture: str, tmp_path: Path) -> None:
    tiny.stock(architecture).save_pretrained(tmp_path / "mine")
    pipe = NestedAttentionPipeline.from_pretrained(str(tmp_path / "mine"), device="cpu")
    assert pipe.base.pipeline == ("StableDiffusionXLPipeline" if architecture == "sdxl" else "StableDiffusionPipeline")
    assert pipe.base.guidance_scale == BASES["sdxl" if architecture == "sdxl" else "sd15"].guidance_scale
    assert pipe.kinds == ()


def test_other_architectures_are_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(NestedAttentionError, match="Flux model"):
        load_base(str(tmp_path), torch.float32)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(NestedAttentionError, match="damaged"):
        load_base(str(tmp_path), torch.float32)


def test_a_damaged_base_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.stock("sd").save_pretrained(tmp_path)
    weights = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    monkeypatch.setitem(BASES, "broken", replace(BASES["storybook"], name="broken", source=str(tmp_path)))
    with pytest.raises(NestedAttentionError, match=r"broken.*git checkout"):
        load_base("broken", torch.float32)
    monkeypatch.setitem(BASES, "gone", replace(BASES["storybook"], name="gone", source=str(tmp_path / "gone")))
    with pytest.raises(NestedAttentionError, match=r"gone is not in .*git checkout"):
        load_base("gone", torch.float32)


def test_unknown_names_and_devices_are_named() -> None:
    with pytest.raises(NestedAttentionError, match="no base model called 'flux'"):
        find_base("flux")
    with pytest.raises(NestedAttentionError, match="no device called 'gpu'"):
        usable_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(NestedAttentionError, match=r"cuda was asked for.*device="):
            usable_device("cuda")
    assert best_dtype(torch.device("cuda")) == torch.float16


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


def test_the_base_carries_a_true_copy_of_the_patch_autoencoder() -> None:
    """Diffusers alone loads the folder by its own file; `train.export` writes it from ours."""
    ours = Path(patches.__file__).read_text()
    assert (Path(BASES["storybook"].source) / "vae/patches.py").read_text() == ours
