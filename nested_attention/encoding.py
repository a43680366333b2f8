"""Encoding one picture: square, features, tokens, and the nested keys and values of every layer, once."""

from collections.abc import Mapping, Sequence
from math import isqrt
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModel, CLIPVisionModelWithProjection, PreTrainedModel

from nested_attention.adapters import Adapter, AdapterConfig
from nested_attention.bases import BASES
from nested_attention.encoder import ImageConfig, image_features
from nested_attention.errors import NestedAttentionError, get_back
from nested_attention.files import first_damaged
from nested_attention.hub import fetch, is_repo
from nested_attention.images import padded_square
from nested_attention.subjects import EncodedImage, Subject, SubjectCache


def image_pixels(picture: Image.Image, config: ImageConfig) -> Tensor:
    """A square RGB picture as the image encoder's input, `(1, 3, size, size)`, normalized."""
    values = torch.from_numpy(np.asarray(picture, np.float32) / 255)
    normal = (values - torch.tensor(config.mean)) / torch.tensor(config.std)
    return normal.permute(2, 0, 1)[None].contiguous()


class ImageEncoders:
    """The frozen image encoders of the adapters, each loaded once, when first asked for.

    An adapter names a folder, see `image_encoder_folders`, or a repo `user/name` on the Hub.
    """

    def __init__(self, folders: Mapping[str, Path], device: torch.device, dtype: torch.dtype):
        self._folders, self._device, self._dtype = folders, device, dtype
        self._loaded: dict[tuple[str, str, str | None], PreTrainedModel] = {}
        self._lock = Lock()

    def get(self, config: AdapterConfig) -> PreTrainedModel:
        """The image encoder that `config` names.

        Raises:
            NestedAttentionError: it is missing or damaged, or cannot be fetched.
        """
        repo, below, revision = source = self._source(config)
        with self._lock:
            if source not in self._loaded:
                path = Path(repo) if Path(repo).is_absolute() else fetch(repo, revision, encoder_files(below)) / below
                try:
                    encoder = load_image_encoder(path)
                except (OSError, ValueError, RuntimeError, SafetensorError) as error:
                    broken = first_damaged(path) or path
                    raise NestedAttentionError(f"the image encoder {broken} cannot be loaded ({error}); {get_back(broken)}.") from error
                self._loaded[source] = encoder.to(self._device, self._dtype).eval().requires_grad_(False)
            return self._loaded[source]

    def _source(self, config: AdapterConfig) -> tuple[str, str, str | None]:
        """Repo, folder below it and commit; of a folder on this machine its whole path, since two adapters may call theirs the same."""
        adapter = self._folders[config.kind]
        if on_hub(adapter, config.image_encoder):
            return config.image_encoder, config.image_subfolder, config.image_revision
        folders = image_encoder_folders(adapter, config)
        return str(next((folder for folder in folders if (folder / "config.json").is_file()), folders[0])), "", None


def image_encoder_folders(adapter: Path, config: AdapterConfig) -> list[Path]:
    """Where the image encoder may be that the config of an `adapter`'s folder names, if it is no repo: relative to that folder,
    or, as a training finds it, to the folder of such an adapter that comes along with the base."""
    preset = BASES.get(config.base)
    places = [adapter] if preset is None or preset.adapters is None else [adapter, preset.adapters / config.kind]
    return [(place / config.image_encoder / config.image_subfolder).resolve() for place in places]


def on_hub(adapter: Path, image_encoder: str) -> bool:
    """True if the `image_encoder` that an adapter's config names is a repo, and no folder relative to that of the `adapter`."""
    return not (adapter / image_encoder).is_dir() and is_repo(image_encoder)


def encoder_files(folder: str) -> list[str]:
    """The files of an image encoder that are loaded, below `folder` of a repo; "" for the repo itself."""
    names = "config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors"
    return [f"{folder}/{name}" if folder else name for name in names]


def load_image_encoder(folder: Path) -> PreTrainedModel:
    """Any image model of transformers that gives hidden states; of a CLIP that reads text too, the half that sees."""
    if AutoConfig.from_pretrained(folder).model_type.startswith("clip"):
        return CLIPVisionModelWithProjection.from_pretrained(folder, use_safetensors=True)
    return AutoModel.from_pretrained(folder, use_safetensors=True)


@torch.no_grad()
def encode_image(picture: Image.Image, adapter: Adapter, encoder: PreTrainedModel, cache: SubjectCache) -> EncodedImage:
    """What the U-Net's layers need to know of `picture`; from the cache if the same pixels were encoded before."""
    image = adapter.config.image
    square = padded_square(picture, image.size)
    key = cache.key(square, adapter.revision)
    if (known := cache.get(key)) is not None:
        return known
    pixels = image_pixels(square, image).to(encoder.device, encoder.dtype)
    features = image_features(encoder, pixels, image.layer)
    tokens, reading = adapter.qformer.read(features)
    places = isqrt(features.shape[1]) ** 2
    reading = reading[0, :, -places:]  # without a class token, which is no place
    encoded = EncodedImage(square, reading / reading.sum(-1, keepdim=True), adapter.project(tokens))
    cache.put(key, encoded)
    return encoded


def encode_subject(
    placeholder: str, pictures: Sequence[Image.Image], adapter: Adapter, encoder: PreTrainedModel, cache: SubjectCache,
    strength: float = 1.0, lam: float | None = None, token_weight: float = 1.0,
) -> Subject:  # fmt: skip
    """Pictures of one subject -> what stands for `placeholder`; the knobs are those of `Subject`."""
    config = adapter.config
    encoded = tuple(encode_image(picture, adapter, encoder, cache) for picture in pictures)
    lam = config.lam if lam is None else lam
    return Subject(placeholder, config.kind, config.word, encoded, strength, lam, token_weight, config.value_norm)
