"""The settings of one generation, checked."""

import random
from dataclasses import asdict, dataclass
from typing import Any

from nested_attention.bases import Base
from nested_attention.errors import NestedAttentionError

MAX_PROMPT, MAX_SUBJECTS, MAX_PICTURES, MAX_SEED = 1000, 4, 8, 2**32 - 1
RANGES: dict[str, tuple[float, float]] = {"num_images": (1, 8), "steps": (1, 150), "guidance_scale": (0.0, 30.0), "seed": (0, MAX_SEED)}

LAST_SEED = MAX_SEED - int(RANGES["num_images"][1]) + 1  # the largest from which any number of pictures can be counted on


def random_seed() -> int:
    """A seed that any number of pictures may begin with."""
    return random.randint(0, LAST_SEED)


def check_pictures(subject: str, count: int) -> None:
    """Whether so many pictures of one subject can be used.

    Raises:
        NestedAttentionError: they are too many.
    """
    if count > MAX_PICTURES:
        raise NestedAttentionError(f"{count} pictures of {subject} were given; at most {MAX_PICTURES} are used, so keep the clearest ones.")


@dataclass(frozen=True)
class Settings:
    """Everything but the subjects that decides what a generation shows.

    Attributes:
        prompt: up to 1000 characters; placeholders such as `<person>` name the subjects.
        negative_prompt: what the picture should not show, in ordinary words: no subject stands behind a placeholder there.
        num_images: 1 to 8. Image k uses seed + k, whatever the number.
        steps: 1 to 150 denoising steps, or to as many as the base's scheduler knows.
        guidance_scale: how strongly the prompt is followed, 1 (not more than learned) to 30; below 1 counts as 1.
        seed: 0 to 2^32 - 1. The same settings and seed give the same picture on the same machine.
        height, width: in pixels.
    """

    prompt: str
    negative_prompt: str
    num_images: int
    steps: int
    guidance_scale: float
    seed: int
    height: int
    width: int

    @classmethod
    def checked(
        cls, base: Base, prompt: str, negative_prompt: str | None = None, num_images: int = 1, steps: int | None = None,
        guidance_scale: float | None = None, seed: int | None = None, height: int | None = None, width: int | None = None,
    ) -> "Settings":  # fmt: skip
        """Fills in the base's defaults and a random seed.

        Raises:
            NestedAttentionError: a value is out of its range; the message says which and what would do.
        """
        settings = cls(
            prompt=_text("prompt", prompt),
            negative_prompt=_text("negative prompt", base.negative_prompt if negative_prompt is None else negative_prompt),
            num_images=_whole("num_images", num_images),
            steps=_steps(base.steps if steps is None else steps, base),
            guidance_scale=_number("guidance_scale", base.guidance_scale if guidance_scale is None else guidance_scale),
            seed=random_seed() if seed is None else _whole("seed", seed),
            height=_side("height", base.size if height is None else height, base),
            width=_side("width", base.size if width is None else width, base),
        )
        if not settings.prompt.strip():
            raise NestedAttentionError('the prompt is empty; say what the picture should show, for instance "<person> on the beach".')
        if settings.seed + settings.num_images - 1 > MAX_SEED:
            raise NestedAttentionError(f"seed is {seed}, and each further picture takes the next one; choose one up to {LAST_SEED}.")
        return settings

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise NestedAttentionError(f"the {name} is {type(value).__name__}, not text; write what the picture should show.")
    if len(value) > MAX_PROMPT:
        raise NestedAttentionError(f"the {name} has {len(value)} characters; at most {MAX_PROMPT} are read. Shorten it.")
    return value


def _number(name: str, value: object) -> float:
    low, high = RANGES[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise NestedAttentionError(f"{name} is {value}; choose a number from {low:g} to {high:g}.")
    return float(value)


def _whole(name: str, value: object) -> int:
    number = _number(name, value)
    if number != int(number):
        raise NestedAttentionError(f"{name} is {value}; choose a whole number.")
    return int(number)


def _steps(value: object, base: Base) -> int:
    steps = _whole("steps", value)
    if steps > base.most_steps:
        raise NestedAttentionError(f"steps is {steps}; {base.name} draws in at most {base.most_steps} steps, and {base.steps} are enough.")
    return steps


def _side(name: str, value: object, base: Base) -> int:
    low, high, multiple = base.sizes
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high or value % multiple:
        allowed = f"{low}" if low == high else f"a multiple of {multiple} from {low} to {high}"
        raise NestedAttentionError(f"{name} is {value}; {base.name} draws pictures of {allowed} pixels a side.")
    return value
