"""The importer of the released weights, on files of reduced width in every plausible naming."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nested_attention import NestedAttentionError
from nested_attention.adapters import Adapter, cross_attention_layers, read_weights
from nested_attention.released import LICENCE, RESAMPLER, convert
from tests import tiny

WIDTH, TOKENS, DEPTH, INNER, FEATURES = 24, 5, 2, 128, 40


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


def released(prefixes: tuple[str, str], leaves: tuple[str, str], odd: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    layers = cross_attention_layers(tiny.stock("sdxl").unet).values()
    tensors = {f"{prefixes[0]}.{name}": value for name, value in resampler(2 * tiny.WIDTH).items()}
    for k, attention in enumerate(layers):
        for leaf in leaves:
            tensors[f"{prefixes[1]}.{2 * k + 1 if odd else k}.{leaf}"] = torch.randn(attention.to_k.weight.shape)
    return {name: value.to(dtype) for name, value in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("odd", [True, False])
@pytest.mark.parametrize("leaves", [("to_k_nest.weight", "to_v_nest.weight"), ("to_k_ip.weight", "to_v_ip.weight"), ("key", "value")])
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
    tensors |= {"ema.decay": torch.zeros(1), "ip_adapter.99.to_k_ip.weight": torch.zeros(4, 4)}
    with pytest.raises(NestedAttentionError) as caught:
        convert(tensors, tiny.stock("sdxl").unet, "abc")
    for name in ("adapter_modules.3", "image_proj_model.latents", "ema.decay", "adapter_modules.99.to_k_ip.weight"):
        assert name in str(caught.value)


def test_weights_of_another_width_are_refused() -> None:
    tensors = released(("image_proj", "ip_adapter"), ("to_k_ip.weight", "to_v_ip.weight"), True, torch.float32)
    tensors["ip_adapter.1.to_k_ip.weight"] = torch.randn(7, 9)
    with pytest.raises(NestedAttentionError, match=r"layers.0.to_k.weight: needed .* found \(7, 9\)"):
        convert(tensors, tiny.stock("sdxl").unet, "abc")
