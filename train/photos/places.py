"""Where tar shards lie, on a disk or on a web server: both are read in parts, and have a place to note what is in them."""

import io
import time
from dataclasses import dataclass
from hashlib import sha256
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO, Protocol
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from huggingface_hub import constants

from nested_attention.errors import NestedAttentionError

BLOCK = 8 << 20  # bytes that are fetched at a time where a shard is read through
TRIES, TIMEOUT = 4, 30.0  # of one part; seconds
BEHIND_THE_END = 416
BUSY = 408, 429  # the server wants to be asked again later, as with every status from 500 on
LONGEST = 60.0  # seconds that are waited, even if a server wishes for more


class Place(Protocol):
    """One shard. `name`: how messages call it; `index`: the file that notes what lies where in it."""

    @property
    def name(self) -> str: ...

    @property
    def index(self) -> Path: ...

    def state(self) -> list[int | str]:
        """What changes when the shard does."""

    def read(self, start: int, length: int) -> bytes: ...

    def open(self) -> IO[bytes]:
        """The shard, to be read from its start to its end."""


@dataclass(frozen=True)
class OnDisk:
    """A file; its index lies beside it."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def index(self) -> Path:
        return self.path.with_name(self.name + ".index.json")

    def state(self) -> list[int | str]:
        stat = self.path.stat()
        return [stat.st_size, stat.st_mtime_ns]

    def read(self, start: int, length: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(length)

    def open(self) -> IO[bytes]:
        return self.path.open("rb")


@dataclass(frozen=True)
class OnWeb:
    """An address that answers requests for parts (HTTP "Range"); its index lies in the cache of Hugging Face."""

    url: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def index(self) -> Path:
        return Path(constants.HF_HOME) / "nested_attention/shards" / f"{sha256(self.url.encode()).hexdigest()[:32]}.json"

    def state(self) -> list[int | str]:
        headers = fetched(self.url, 0, 1)[1]
        return [int(headers["Content-Range"].rpartition("/")[2]), headers.get("ETag", "")]

    def read(self, start: int, length: int) -> bytes:
        return fetched(self.url, start, length)[0]

    def open(self) -> IO[bytes]:
        return io.BufferedReader(Parts(self.url), BLOCK)


class Parts(io.RawIOBase):
    """The file behind `url`; every read fetches the part that it asks for."""

    def __init__(self, url: str):
        self.url, self.position = url, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence != io.SEEK_END  # the size is not known
        self.position = offset + (self.position if whence == io.SEEK_CUR else 0)
        return self.position

    def readinto(self, buffer) -> int:
        part = fetched(self.url, self.position, len(buffer))[0]
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)


def fetched(url: str, start: int, length: int) -> tuple[bytes, HTTPMessage]:
    """Bytes `start` to `start + length` of what lies at `url`, fewer at its end, and the headers of the answer.

    A training of days asks millions of times, so what fails for the moment is asked for again, when the server wishes ("Retry-After").

    Raises:
        NestedAttentionError: it cannot be had, or only as a whole.
    """
    request = Request(url, headers={"Range": f"bytes={start}-{start + length - 1}"})
    for attempt in range(1, TRIES + 1):
        try:
            with urlopen(request, timeout=TIMEOUT) as answer:
                if answer.status != 206:
                    raise NestedAttentionError(f"the server gives {url} only as a whole; download it and name the file instead.")
                return answer.read(), answer.headers
        except (OSError, HTTPException) as error:
            status = error.code if isinstance(error, HTTPError) else None
            if status == BEHIND_THE_END:
                return b"", HTTPMessage()
            if attempt == TRIES or (status is not None and status < 500 and status not in BUSY):
                raise NestedAttentionError(f"{url} cannot be read ({error}); check the address and the connection.") from error
            wish = error.headers.get("Retry-After", "") if isinstance(error, HTTPError) else ""
        time.sleep(min(float(wish), LONGEST) if wish.isdecimal() else attempt)
    raise AssertionError
