"""What "Look inside" shows of maps, on maps that are known."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nested_attention.pipeline import Generation
from nested_attention.settings import Settings
from nested_attention.subjects import EncodedImage, Subject
from nested_attention.tracing import Mean, Trace
from nested_attention.ui.explain import SHOWN, reference_heat, regions, value_picture
from nested_attention.ui.session import Result

GRID, WORDS, TOKENS = (2, 2), 3, 3
BLACK = Image.new("RGB", (32, 32))
HALF = SHOWN // 2


def traced() -> tuple[Result, Trace]:
    """A subject of two black pictures of 2 x 2 patches, its word the second of three, and nothing recorded yet."""
    images = tuple(EncodedImage(BLACK, torch.full((TOKENS, 4), 0.25), {}) for _ in range(2))
    subject, maps = Subject("<ada>", "person", "person", images), Trace()
    maps.begin(GRID, 1, [subject], [(1,)])
    generation, model = Generation([BLACK], Settings("<ada>", "", 1, 1, 1.0, 0, 32, 32)), None  # explaining asks no model
    return Result(model, generation, (subject,), maps, ()), maps  # type: ignore[arg-type]


def mean(value: Tensor) -> Mean:
    (made := Mean()).add(value)
    return made


def test_the_heat_lies_on_the_patches_of_the_right_picture() -> None:
    patches = torch.zeros(8)
    patches[4 + 1] = 1.0  # of the second picture the upper right one
    first, second = (np.asarray(image, int).sum(-1) for image in reference_heat(traced()[0], "<ada>", patches))
    assert first.min() == first.max() == second.min()
    assert second[:HALF, HALF:].mean() > 3 * second[:HALF, :HALF].mean() and second.max() == second[:HALF, HALF:].max()


def test_regions_show_the_strongest_token_inside_the_subject() -> None:
    _, maps = traced()
    assert maps.recorder is not None
    outer = torch.zeros(1, 4, WORDS)
    outer[0, :, 1] = torch.tensor([0.6, 0.6, 0.6, 0.1])  # the lower right quarter is not the subject's
    nested = torch.tensor([[[0.1, 0.0, 0.9], [0.8, 0.1, 0.1], [0.1, 0.0, 0.9], [0.0, 1.0, 0.0]]])
    maps.recorder.outer[GRID, 0], maps.recorder.nested[(GRID, 0), 0] = mean(outer), mean(nested)
    picture, masks = regions(BLACK, maps.subject("<ada>"), 0, GRID, None)
    assert [label for _, label in masks] == ["token 2: 60%", "token 0: 32%", "token 1: 8%"]
    left, right, none = (mask.astype(bool) for mask, _ in masks)
    assert left.shape == picture.size[::-1] and left[:, :HALF].all() and not left[:, HALF:].any()
    assert right[:HALF, HALF:].all() and right.sum() == HALF * HALF and not none.any()


def test_equal_values_are_one_colour_and_different_ones_are_not() -> None:
    _, maps = traced()
    assert maps.recorder is not None
    word = torch.tensor([1.0, 2.0, 3.0, 4.0])
    maps.recorder.values[(GRID, 0), 0] = mean(word.expand(1, 4, 4)), mean(word.expand(1, WORDS, 4))
    picture, plain = (np.asarray(image) for image in value_picture(maps.subject("<ada>"), 0, GRID, None))
    assert (picture == picture[0, 0]).all() and np.array_equal(picture, plain)
    other = torch.stack([word, -word, word, -word])[None]
    maps.recorder.values[(GRID, 0), 0] = mean(other), mean(word.expand(1, WORDS, 4))
    picture, plain = (np.asarray(image) for image in value_picture(maps.subject("<ada>"), 0, GRID, None))
    assert (plain == plain[0, 0]).all() and (picture[:, :HALF] == plain[0, 0]).all()
    assert (picture[:, HALF:] == picture[0, -1]).all() and (picture[0, 0] != picture[0, -1]).any()
