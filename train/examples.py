"""The examples of the app's start page: `python -m train.examples`, once the shipped weights are there.

Reference pictures show identities that no training has seen; the results are what the shipped pipeline makes of them.
"""

import json
import random
from dataclasses import dataclass

from PIL import Image

from nested_attention import NestedAttentionPipeline
from nested_attention.errors import spoken_at_exit
from nested_attention.files import replaced
from nested_attention.prompts import slot_names
from nested_attention.ui.examples import FOLDER
from nested_attention.ui.studio import provenances
from train.storybook.picture import render
from train.storybook.sampling import Character, Picture, Placed, sample_attributes, sample_identity

SIDE = 256  # reference pictures are shipped at this size


@dataclass(frozen=True)
class Plan:
    """An example to make: `cast` is (kind, name) of its subjects; the name fixes the identity."""

    title: str
    prompt: str
    cast: tuple[tuple[str, str], ...]
    seed: int


PLANS = (
    Plan("Ada in the snow", "a drawing of <person> smiling, wearing a red hoodie, in the snow", (("person", "ada"),), 16),
    Plan("Ada and Tom on the beach", "<person> and <cat> on the beach", (("person", "ada"), ("cat", "tom")), 12),
    Plan("Max sketched", "a pencil sketch of <person> with glasses in the mountains", (("person", "max"),), 5),
    Plan("Tom in space", "pixel art of <cat> wearing a red scarf in space", (("cat", "tom"),), 2),
    Plan("A delivery at night", "<vehicle> carrying a gift at night", (("vehicle", "rosa"),), 4),
    Plan("Mia under water", "<cat> grinning under the sea", (("cat", "mia"),), 8),
)


def reference(kind: str, name: str) -> Image.Image:
    """The picture of a character: unseen in training, on a plain ground."""
    rng = random.Random(f"example/{kind}/{name}")
    character = Character(kind, sample_identity(kind, "test", rng), sample_attributes(kind, "test", rng))
    picture = Picture(rng.choice(("plain white", "plain blue", "plain yellow")), 0, "plain", (Placed(character, 0.5, 0.88),))
    return Image.fromarray(render(picture).image).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def main() -> None:
    pipe = NestedAttentionPipeline.from_pretrained("storybook")
    entries = []
    for number, plan in enumerate(PLANS):
        subjects, slots = [], []
        for (kind, name), placeholder in zip(plan.cast, slot_names([kind for kind, _ in plan.cast]), strict=True):
            file = f"{name}.png"
            with replaced(FOLDER / file) as fresh:
                reference(kind, name).save(fresh, "png")
            subjects.append(pipe.encode(kind, FOLDER / file, placeholder))
            slots.append({"kind": kind, "files": [file]})
        generation = pipe(plan.prompt, subjects, num_images=4, seed=plan.seed)
        results = [f"example-{number}-{k}.png" for k in range(len(generation.images))]
        for image, file, made in zip(generation.images, results, provenances(pipe, generation, subjects, {}), strict=True):
            made.save(image, FOLDER / file)
        entries.append({"title": plan.title, "prompt": plan.prompt, "seed": plan.seed, "slots": slots, "results": results})
        print(f"{plan.title}: {plan.prompt}", flush=True)
    with replaced(FOLDER / "examples.json") as fresh:
        fresh.write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    with spoken_at_exit():
        main()
