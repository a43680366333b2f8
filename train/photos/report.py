"""What `train.prepare` used, what it left out and why, for a person (`report.md`) and for programs (`report.json`)."""

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from pathlib import Path

from nested_attention.faces import SAID
from train.photos.folder import PreparedPhoto

SIDES = (256, 512, 768, 1024)  # steps of the histogram, shorter side in pixels


class Reason(StrEnum):
    """Why a picture is left out."""

    UNREADABLE = "cannot be read"
    NO_CAPTION = "no caption"
    NO_WORD = "no word for the subject"
    OTHER_PLACEHOLDER = "another placeholder"
    NO_FACE = "no face found"
    SMALL_FACE = "face too small"
    SEVERAL_FACES = "several faces of similar size"
    BAD_BOX = "bad box"


NEXT = {
    Reason.UNREADABLE: "save it again as PNG or JPEG",
    Reason.NO_CAPTION: "write a sentence into NAME.txt beside the picture, or as text into metadata.jsonl",
    Reason.NO_WORD: "write <{kind}> into the caption where the subject is meant",
    Reason.OTHER_PLACEHOLDER: "keep only <{kind}> and use ordinary words for the others",
    Reason.NO_FACE: 'take a picture with the face towards the camera, or give its "box" in metadata.jsonl',
    Reason.SMALL_FACE: "take a larger copy of the picture, or crop it to the subject",
    Reason.SEVERAL_FACES: 'crop the picture to the subject, or give its "box" in metadata.jsonl',
    Reason.BAD_BOX: '"box" is [left, top, right, bottom] in fractions of width and height, from 0 to 1',
}


class LeftOutError(Exception):
    """A picture cannot be used for `reason`; `detail` says what was seen."""

    def __init__(self, reason: Reason, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass
class Report:
    """Of the pictures of one kind in `folder`. `left_out`: reason -> `(file, detail)`."""

    folder: Path
    kind: str
    used: list[PreparedPhoto] = field(default_factory=list)
    left_out: dict[Reason, list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))

    def leave_out(self, file: str, error: LeftOutError) -> None:
        file, detail = (text.encode(errors="replace").decode() for text in (file, error.detail))  # names on a disk may be no text
        self.left_out[error.reason].append((file, detail))

    def reasons(self) -> list[Reason]:
        """The most frequent one first."""
        return sorted(self.left_out, key=lambda reason: -len(self.left_out[reason]))

    def summary(self) -> str:
        total = sum(map(len, self.left_out.values()))
        why = ", ".join(
            f"{len(files)} {reason} ({files[0][0]}{', …' if len(files) > 1 else ''})"
            for reason, files in ((reason, self.left_out[reason]) for reason in self.reasons())
        )
        return f"{len(self.used)} used, {total} left out" + (f": {why}" if why else "")

    def next_step(self, reason: Reason) -> str:
        return NEXT[reason].format(kind=self.kind)

    def resolutions(self) -> dict[str, int]:
        """How many photos have a shorter side of so many pixels."""
        counts = Counter(sum(min(photo.width, photo.height) >= side for side in SIDES) for photo in self.used)
        names = [f"below {SIDES[0]}", *(f"{a} to {b - 1}" for a, b in pairwise(SIDES)), f"{SIDES[-1]} and more"]
        return {name: counts[step] for step, name in enumerate(names)}

    def methods(self) -> dict[str, int]:
        return dict(Counter(photo.method for photo in self.used).most_common())

    def write(self, folder: Path) -> None:
        """Writes `report.json` and `report.md`."""
        content = {
            "folder": str(self.folder), "kind": self.kind, "used": len(self.used), "methods": self.methods(),
            "resolutions": self.resolutions(),
            "left_out": {reason: [{"file": file, "detail": detail} for file, detail in self.left_out[reason]] for reason in self.reasons()},
        }  # fmt: skip
        (folder / "report.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / "report.md").write_text(self.markdown(), encoding="utf-8")

    def markdown(self) -> str:
        lines = [
            f"# Photos of kind {self.kind} from {self.folder}",
            "",
            f"{self.summary()}.",
            "",
            "| how the reference was made | photos |",
        ]
        lines += ["|---|---|", *(f"| {said} | {self.methods()[method]} |" for method, said in SAID.items() if method in self.methods())]
        lines += ["", "| shorter side in pixels | photos |", "|---|---|"]
        lines += [f"| {name} | {count} |" for name, count in self.resolutions().items()]
        for reason in self.reasons():
            lines += ["", f"## Left out: {reason}", "", f"What to do: {self.next_step(reason)}.", ""]
            lines += [f"- `{file}`: {detail}" for file, detail in self.left_out[reason]]
        return "\n".join(lines) + "\n"
