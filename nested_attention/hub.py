"""The Hugging Face Hub: every repo at one fixed commit, and errors as sentences.

A repo whose commit is not given, or only by the name of a branch or tag, is resolved once; the commit is recorded in
`revisions.json` in the Hub cache and used from then on. Delete the entry to follow the repo again.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

from nested_attention.errors import NestedAttentionError
from nested_attention.files import is_there, replaced

COMMIT = re.compile(r"[0-9a-f]{40}")
NO_ROOM = ENOSPC, EDQUOT, EFBIG  # the disk is full, one's share of it is, the file system takes no file of this size
AFTER_REFUSAL = {
    401: "log in with `hf auth login`, or set HF_TOKEN to a token that is valid",
    403: "log in with `hf auth login` with a token that may do this (for a push: write there), from https://huggingface.co/settings/tokens",
}


def is_repo(name: str) -> bool:
    """True if `name` has the form user/name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def record_file() -> Path:
    """Where resolved commits are recorded."""
    return Path(constants.HF_HOME) / "nested_attention" / "revisions.json"


def recorded_commits() -> dict[str, str]:
    """Repo, or repo@branch -> commit, as recorded.

    Raises:
        NestedAttentionError: the file is damaged.
    """
    path = record_file()
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise NestedAttentionError(
            f"{path}, which only records the commits that repos were first fetched at, is damaged; delete it and start again."
        ) from error


def commit_of(repo: str, revision: str | None = None, local: bool = False) -> str:
    """`revision` if it is a commit; else the recorded commit of `repo`, or of its branch or tag `revision`.

    At the first time that is the newest one, which is then recorded; the newest in the Hub's cache, where the Hub cannot be
    reached. `local`: nobody is asked, and nothing recorded.

    Raises:
        NestedAttentionError: none is recorded, and neither the Hub nor its cache tells.
    """
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    name = repo if revision is None else f"{repo}@{revision}"
    recorded = recorded_commits()
    if name in recorded:
        return recorded[name]
    cached = cached_commit(repo, revision)
    if local:
        if cached is None:
            raise NestedAttentionError(f"{name} was never fetched to this machine; connect to the Hub to fetch it.")
        return cached
    try:
        with spoken_errors(repo, revision or ""):
            commit = str(HfApi().model_info(repo, revision=revision).sha)
    except NestedAttentionError as error:
        if cached is None or isinstance(error.__cause__, HfHubHTTPError):  # which is the Hub's own answer
            raise
        commit = cached
    with replaced(record_file()) as fresh:
        recorded = recorded_commits()  # again: another process may have recorded one while the Hub was asked
        fresh.write_text(json.dumps(recorded | {name: commit}, indent=1) + "\n")
    return commit


def cached_commit(repo: str, revision: str | None) -> str | None:
    """The commit of a branch or tag that any program last fetched into the Hub's cache; None if none did."""
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    ref = folder / "refs" / (revision or constants.DEFAULT_REVISION)
    return ref.read_text().strip() if is_there(ref) else None


def fetch(repo: str, revision: str | None, patterns: Sequence[str], but: Sequence[str] = (), local: bool = False) -> Path:
    """The files of `repo` that match `patterns` and none of `but`, at the commit that `commit_of` gives, as a local folder.

    What is in the cache is not fetched again; of an interrupted download the files that are whole are kept. In patterns
    `*` stands for slashes too. `local`: nothing is fetched, and nobody asked; of a cache that an older library filled nobody
    knows which files the repo has, so look whether those that are needed are there.

    Raises:
        NestedAttentionError: no such repo or revision, no access, no network, or no room on the disk; with `local`,
            a file is missing.
    """
    commit = commit_of(repo, revision, local)
    with spoken_errors(repo, commit):
        chosen = {"allow_patterns": list(patterns), "ignore_patterns": list(but)}
        return Path(snapshot_download(repo, revision=commit, local_files_only=local, **chosen))


@contextmanager
def spoken_errors(repo: str, revision: str = "") -> Iterator[None]:
    """Turns what the Hub library raises into one sentence with the next step."""
    try:
        yield
    except GatedRepoError as error:
        raise NestedAttentionError(
            f"{repo} asks for consent first; open its page on the Hub, accept, and log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise NestedAttentionError(
            f"there is no repo {repo} on the Hub, or it is private; check the name, or log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise NestedAttentionError(
            f"{repo} has no revision {revision} any more; name another one, or remove its line from {record_file()} to take the newest."
        ) from error
    except HFValidationError as error:
        raise NestedAttentionError(f"{repo!r} is neither a folder nor a repo id of the form user/name; check the spelling.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise NestedAttentionError(
            f"the Hub refused {repo} (status {status}); {AFTER_REFUSAL.get(status, 'try again later, or log in with `hf auth login`')}."
        ) from error
    except (LocalEntryNotFoundError, ConnectionError, HTTPError) as error:
        raise NestedAttentionError(
            f"{repo} is not in the cache and the Hub cannot be reached; connect once, or copy its folder here."
        ) from error
    except (OSError, RuntimeError) as error:  # Xet, which carries large files, raises plain ones of the latter
        if is_full(error):
            raise NestedAttentionError(
                f"there is no room: {repo} does not fit into {constants.HF_HOME}; free some, or set HF_HOME to another disk."
            ) from error
        raise NestedAttentionError(
            f"{repo} cannot be fetched ({error}); try again, which keeps the files that are whole, or copy its folder here."
        ) from error


def is_full(error: OSError | RuntimeError) -> bool:
    """True if the disk had no room. Xet only says it, in the words of the operating system."""
    return getattr(error, "errno", None) in NO_ROOM or any(os.strerror(number) in str(error) for number in NO_ROOM)
