"""Pictures that come with the test packages, what a prepared folder lists, and a server of shards."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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


class PartsHandler(BaseHTTPRequestHandler):
    """Serves the files of `folder`, in parts unless `whole` is set. `asked`: path and "Range" of every request, in order."""

    folder: Path
    asked: list[tuple[str, str]]
    whole = False
    failures = 0
    served = 0

    def do_GET(self) -> None:
        kind = type(self)
        kind.asked.append((self.path, self.headers["Range"]))
        if kind.failures:
            kind.failures -= 1
            return self.send_error(503)
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
