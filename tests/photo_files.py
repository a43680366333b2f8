"""Pictures that come with the test packages, and what a prepared folder lists."""

import json
from importlib.resources import files
from pathlib import Path


def photo(package: str, name: str) -> Path:
    return Path(str(files(package).joinpath(name)))


ASTRONAUT, CHELSEA, ROCKET = (
    photo("skimage", "data/astronaut.png"),
    photo("skimage", "data/chelsea.png"),
    photo("skimage", "data/rocket.jpg"),
)
GROUP, PORTRAIT = photo("insightface", "data/images/t1.jpg"), photo("insightface", "data/images/Tom_Hanks_54745.png")


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
