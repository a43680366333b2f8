"""What a run starts from: noted in its config, and the same for as long as it goes on."""

import json
from pathlib import Path

from nested_attention.errors import NestedAttentionError
from train.scores import fingerprint

Noted = dict[str, str]


def noted(folder: Path, *parts: str) -> Noted:
    """How a config notes what its run starts from: the folder as it was named, and what its files, or those of its `parts`, are."""
    return {"folder": str(folder), "files": fingerprint(folder / part for part in parts or ("",))}


def check_start(run: Path, start: Noted | None) -> None:
    """Whether a run that goes on from its checkpoint began with `start`; older ones do not say.

    Raises:
        NestedAttentionError: it began with something else, of which the checkpoint would keep nothing.
    """
    config = run / "config.json"
    if not (run / "state").exists() or not config.exists():
        return
    before = json.loads(config.read_text()).get("start", start)
    if (before or {}).get("files") != (start or {}).get("files"):
        was, would = (f"from {where['folder']}" if where else "from nothing" for where in (before, start))
        raise NestedAttentionError(
            f"the run in {run} has begun {was} and goes on from its checkpoint, not {would} as it is now; name another folder with --out, or "
            "start as before."
        )
