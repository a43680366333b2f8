"""`python -m train.storybook --sheet out.png`: a contact sheet of pictures with captions, masks and references, and the world's speed."""

import argparse
import random
import textwrap
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from train.storybook.captions import caption
from train.storybook.picture import SLOT, render
from train.storybook.sampling import SPLITS, sample_picture, sample_reference
from train.storybook.scenes import CANVAS

COLOURS = np.random.default_rng(3).integers(60, 255, (2 * SLOT + 1, 3)).astype(np.uint8)


def sheet(split: str, start: int, rows: int, columns: int) -> Image.Image:
    """Each cell: picture, part map, a reference of its first subject; below them the caption."""
    cell_width, cell_height = 3 * CANVAS + 8, CANVAS + 34
    page = Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
    pen = ImageDraw.Draw(page)
    for cell in range(rows * columns):
        index = start + cell
        picture = sample_picture(split, index)
        drawn = render(picture)
        colours = np.where(drawn.parts[..., None] > 0, COLOURS[drawn.parts], np.uint8(235))
        reference = render(sample_reference(picture, 0, split, index)).image
        x, y = cell % columns * cell_width, cell // columns * cell_height
        for offset, image in enumerate((drawn.image, colours, reference)):
            page.paste(Image.fromarray(image), (x + offset * CANVAS, y))
        text = caption(picture, random.Random(index)).text
        pen.multiline_text((x + 2, y + CANVAS + 2), "\n".join(textwrap.wrap(text, 62)[:3]), fill="black", spacing=0)
    return page


def speed(split: str, count: int = 200) -> float:
    """Pictures that one core draws in a second, once their parts have been rasterized.

    Counted is the time that cores really worked, so that other programs beside this one change nothing.
    """
    pictures = [sample_picture(split, index) for index in range(count)]
    for picture in pictures:
        render(picture)
    before = time.process_time()
    for picture in pictures:
        render(picture)
    return count / (time.process_time() - before)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.storybook", description=__doc__)
    parser.add_argument("--sheet", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--start", type=int, default=0, help="index of the first picture")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--columns", type=int, default=4)
    options = parser.parse_args()
    sheet(options.split, options.start, options.rows, options.columns).save(options.sheet)
    print(f"wrote {options.sheet}; one core draws {speed(options.split):.0f} pictures a second")


if __name__ == "__main__":
    main()
