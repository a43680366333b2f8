"""Pictures that come with the test packages, prepared folders, and a server of shards."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import ClassVar

from tests import tiny
from train.photos.folder import PreparedPhoto
from train.photos.shards import write_shards


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


class PartsHandler(BaseHTTPRequestHandler):
    """Serves the files of `folder`, in parts unless `whole` is set. `asked`: path and "Range" of every request, in order.

    The first `failures` requests are answered with the status `failure` and the headers `excuse`.
    """

    folder: Path
    asked: list[tuple[str, str]]
    whole = False
    failures = 0
    failure = 503
    excuse: ClassVar[dict[str, str]] = {}
    served = 0

    def do_GET(self) -> None:
        kind = type(self)
        kind.asked.append((self.path, self.headers["Range"]))
        if kind.failures:
            kind.failures -= 1
            self.send_response(self.failure)
            for name, value in self.excuse.items():
                self.send_header(name, value)
            return self.end_headers()
        if not (self.folder / self.path[1:]).is_file():
            return self.send_error(404)
        content = (self.folder / self.path[1:]).read_bytes()
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        part = content if self.whole else content[first : last + 1]
        if not part:
            return self.send_error(416)
        kind.served += len(part)
        self.send_response(200 if self.whole else 206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, type[PartsHandler]]]:
    """The address of a server of `folder`, and its handler."""
    handler = type("Handler", (PartsHandler,), {"folder": folder, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
        server.shutdown()


PLACES = ("on the beach", "in the snow", "at night")


def prepared(folder: Path, captions: list[str]) -> str:
    """A prepared folder of small photos of noise, of three shapes, and all of them in one shard in `shards`."""
    (folder / "images").mkdir(parents=True)
    (folder / "references").mkdir()
    lines = []
    for number, caption in enumerate(captions):
        size = ((80, 80), (64, 96), (96, 64))[number % 3]
        tiny.photo(number, size).save(folder / f"images/{number}.png")
        tiny.photo(100 + number, (40, 40)).save(folder / f"references/{number}.png")
        line = {"file_name": f"images/{number}.png", "reference": f"references/{number}.png", "text": caption}
        lines.append(json.dumps(line | {"height": size[0], "width": size[1], "method": "whole"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    write_shards(folder, [PreparedPhoto(**json.loads(line)) for line in lines], folder / "shards", len(lines))
    return str(folder)
