"""What is computed of every photo once: its text states and image features, a file each, in a folder that says of what."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nested_attention.errors import NestedAttentionError
from nested_attention.files import replaced

MADE_OF = "made-of.json"


@dataclass(frozen=True)
class FeatureCache:
    """The folder; its photos are known by number, which means nothing without what is in `MADE_OF`."""

    folder: Path

    def file(self, number: int) -> Path:
        return self.folder / f"{number}.safetensors"

    def claim(self, made_of: Mapping[str, str]) -> None:
        """Has to be called before features are saved or loaded.

        Raises:
            NestedAttentionError: the folder's features were made of something else.
        """
        filled = any(self.folder.glob("*.safetensors"))  # looked at first: another process claims the folder before it saves
        note = self.folder / MADE_OF
        known = json.loads(note.read_text()) if note.is_file() else {}
        if not known and not filled:
            with replaced(note) as fresh:
                fresh.write_text(json.dumps(dict(made_of), indent=2) + "\n")
        elif changed := [name for name in made_of if known.get(name) != made_of[name]]:
            raise NestedAttentionError(
                f"the features in {self.folder} were made of another {' and another '.join(changed)}; name a new folder with --cache, "
                "or remove this one."
            )

    def save(self, number: int, features: Mapping[str, Tensor]) -> None:
        """Writes the features of a photo, in 16 bit.

        Raises:
            NestedAttentionError: the disk is full.
        """
        with replaced(self.file(number)) as fresh:
            save_file({name: value.half().cpu().contiguous() for name, value in features.items()}, fresh)

    def load(self, number: int) -> dict[str, Tensor]:
        """The features of a photo.

        Raises:
            NestedAttentionError: they are not there, or damaged.
        """
        try:
            return load_file(self.file(number))
        except (OSError, SafetensorError) as error:
            raise NestedAttentionError(
                f"the features in {self.file(number)} cannot be read ({error}); remove that file and give the same command, it writes it again."
            ) from error
