"""Encoding one picture: square, features, tokens, and the nested keys and values of every layer, once."""

from collections.abc import Mapping
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from nested_attention.adapters import Adapter, AdapterConfig
from nested_attention.encoder import ImageConfig, image_features
from nested_attention.errors import NestedAttentionError, get_back
from nested_attention.hub import fetch
from nested_attention.images import padded_square
from nested_attention.subjects import EncodedImage, SubjectCache


def image_pixels(picture: Image.Image, config: ImageConfig) -> Tensor:
    """A square RGB picture as the image encoder's input, `(1, 3, size, size)`, normalized."""
    values = torch.from_numpy(np.asarray(picture, np.float32) / 255)
    normal = (values - torch.tensor(config.mean)) / torch.tensor(config.std)
    return normal.permute(2, 0, 1)[None].contiguous()


class ImageEncoders:
    """The frozen image encoders of the adapters, each loaded once, when first asked for."""

    def __init__(self, folders: Mapping[str, Path], device: torch.device, dtype: torch.dtype):
        self._folders, self._device, self._dtype = folders, device, dtype
        self._loaded: dict[str, CLIPVisionModelWithProjection] = {}
        self._lock = Lock()

    def get(self, config: AdapterConfig) -> CLIPVisionModelWithProjection:
        source = config.image_encoder
        with self._lock:
            if source not in self._loaded:
                path = (self._folders[config.kind] / source).resolve()
                if not path.is_dir() and not source.startswith("."):  # a repo on the Hub
                    path = fetch(source, config.image_revision, [f"{config.image_subfolder}/*"])
                try:
                    encoder = CLIPVisionModelWithProjection.from_pretrained(path / config.image_subfolder)
                except (OSError, ValueError, RuntimeError) as error:
                    raise NestedAttentionError(f"the image encoder {path} cannot be loaded ({error}); {get_back(path)}.") from error
                self._loaded[source] = encoder.to(self._device, self._dtype).eval().requires_grad_(False)
            return self._loaded[source]


@torch.no_grad()
def encode_image(picture: Image.Image, adapter: Adapter, encoder: CLIPVisionModelWithProjection, cache: SubjectCache) -> EncodedImage:
    """What the U-Net's layers need to know of `picture`; from the cache if the same pixels were encoded before."""
    image = adapter.config.image
    square = padded_square(picture, image.size)
    key = cache.key(square, adapter.revision)
    if (known := cache.get(key)) is not None:
        return known
    pixels = image_pixels(square, image).to(encoder.device, encoder.dtype)
    features = image_features(encoder, pixels, image.layer)
    tokens = adapter.qformer(features)
    reading = adapter.qformer.reading(features)[0, :, 1:]  # without the class token, which is no place
    encoded = EncodedImage(square, reading / reading.sum(-1, keepdim=True), adapter.project(tokens))
    cache.put(key, encoded)
    return encoded
