"""Previews: latents get their colours without the VAE, Storybook's patches are pixels already."""

import numpy as np
import pytest
import torch

from nested_attention.preview import SD15_COLOURS, SDXL_COLOURS, preview
from tests import tiny


@pytest.mark.parametrize(("architecture", "matrix"), [("sd", SD15_COLOURS), ("sdxl", SDXL_COLOURS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_four_channels_get_their_colours_without_the_vae(architecture: str, matrix, dtype: torch.dtype, monkeypatch) -> None:
    stock = tiny.stock(architecture)
    monkeypatch.setattr(stock.vae, "decode", None)
    latents = torch.randn(2, 4, 6, 10, dtype=dtype)
    latents[1] = torch.tensor([1.0, 0.5, -0.5, 0.25], dtype=dtype)[:, None, None]
    pictures = preview(stock, latents)
    assert [picture.size for picture in pictures] == [(20, 12)] * 2
    expected = (torch.tensor([1.0, 0.5, -0.5, 0.25]) @ torch.tensor(matrix) + 1) * 127.5
    assert np.abs(np.asarray(pictures[1], float) - expected.numpy()).max() <= 1
    assert np.asarray(pictures[0]).std() > 20


def test_patches_are_decoded() -> None:
    stock = tiny.storybook()
    (picture,) = preview(stock, torch.zeros(1, 192, 16, 16))
    assert picture.size == (128, 128) and len(set(picture.getdata())) == 1
