"""What can go wrong for a user: every message names the thing, what was wrong with it, and what to do next."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants

SHIPPED = Path(__file__).parent.parent / "assets"


class NestedAttentionError(ValueError):
    """A request or a file that cannot be used. Its text is fit to be shown to a person."""


def get_back(path: object) -> str:
    """How to get a lost or damaged file or folder back: from the Hub again, shipped ones from git, others from where they came."""
    here = Path(str(path))
    ours = Path(constants.HF_HOME) / "nested_attention"  # what was made of a download
    for folder in (here, *here.parents):
        if folder.name.startswith("models--") or folder.parent == ours:  # so the Hub's cache calls a repo's folder
            return f"delete {folder} and start again, so that it is downloaded anew"
    if SHIPPED.resolve() in here.resolve().parents:
        return f"get it back with `git checkout -- {path}`"
    return "put back a whole copy, or download or make it again"


class Cancelled(Exception):
    """The person asked to stop; nothing was wrong."""


def quiet_libraries() -> None:
    """For commands: no warnings about what is as it should be, such as an image processor without torchvision."""
    import diffusers  # here, because everything imports this file for its errors, also what needs neither
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()


@contextmanager
def spoken_at_exit() -> Iterator[None]:
    """For commands: what cannot be used ends them with its sentence on the terminal, without a traceback."""
    quiet_libraries()
    try:
        yield
    except NestedAttentionError as error:
        raise SystemExit(str(error)) from None
