"""Both hubs and a raw file server on this machine, which can break off, spoil and refuse."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Site:
    """What is served, how badly, and what was asked for.

    Attributes:
        files: ``owner/name/path`` → content.
        break_after: Close the connection after this many bytes of a body; once per number.
        break_in: The one file that this happens to; empty for any.
        flip: Files of which one byte arrives changed.
        ignore_range: Always send whole files.
        requests: Path and ``Range`` of each request for a file.
    """

    files: Mapping[str, bytes]
    break_after: list[int] = field(default_factory=list)
    break_in: str = ""
    flip: set[str] = field(default_factory=set)
    ignore_range: bool = False
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    listings: int = 0
    url: str = ""

    def of(self, repository: str) -> dict[str, bytes]:
        """The files of a repository by their paths in it."""
        head = f"{repository}/"
        return {k[len(head) :]: v for k, v in self.files.items() if k.startswith(head)}


@contextmanager
def serving(site: Site) -> Iterator[Site]:
    """Run the server."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            url = urlsplit(self.path)
            parts = unquote(url.path).strip("/").split("/")
            query = parse_qs(url.query)
            if parts[:2] == ["api", "models"]:
                self.list_huggingface("/".join(parts[2:4]))
            elif parts[:3] == ["api", "v1", "models"] and parts[-1] == "files":
                self.list_modelscope("/".join(parts[3:5]))
            elif parts[:3] == ["api", "v1", "models"]:
                self.send("/".join(parts[3:5]) + "/" + query["FilePath"][0])
            elif parts[2:4] == ["resolve", COMMIT]:
                self.send("/".join(parts[:2] + parts[4:]))
            else:
                self.send("/".join(parts))

        def list_huggingface(self, repository):
            siblings = []
            for path, content in site.of(repository).items():
                blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                entry = {"rfilename": path, "size": len(content), "blobId": blob}
                if path.endswith(".safetensors"):
                    sha = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"sha256": sha, "size": len(content), "pointerSize": 134}
                siblings.append(entry)
            self.answer({"id": repository, "sha": COMMIT, "siblings": siblings}, bool(siblings))

        def list_modelscope(self, repository):
            files = [
                {"Path": path, "Type": "blob", "Size": len(content), "Revision": COMMIT,
                 "Sha256": hashlib.sha256(content).hexdigest()}
                for path, content in site.of(repository).items()
            ]  # fmt: skip
            files.append({"Path": "folder", "Type": "tree", "Size": 0, "Revision": COMMIT})
            self.answer({"Code": 200, "Data": {"Files": files}, "Success": True}, len(files) > 1)

        def answer(self, value, known):
            site.listings += 1
            body = json.dumps(value).encode()
            self.send_response(200 if known else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def send(self, name):
            asked = self.headers["Range"]
            site.requests.append((name, asked))
            content = site.files.get(name)
            if content is None:
                self.send_error(404)
                return
            if name in site.flip:
                middle = len(content) // 2
                content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            start = 0 if site.ignore_range or not asked else int(asked[6:].rstrip("-"))
            body = content[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            breaks = bool(site.break_after) and site.break_in in ("", name)
            if breaks and len(body) > site.break_after[0]:
                self.wfile.write(body[: site.break_after.pop(0)])
                self.close_connection = True
                return
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
