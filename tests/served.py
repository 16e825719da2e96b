"""Servers of files for tests: HTTP with ranges, and as much of stores as reading needs.

s3     S3: subfolders are buckets
gcs    Google's JSON API: subfolders are buckets
hub    the Hugging Face hub: <user>/<set> are data sets, of one revision
"""

from __future__ import annotations

import http.server
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

JSON = "application/json"
Sent = tuple[int, bytes, str]  # status, body and its type


class Served:
    """A folder at `url`. `asked` has method and path of every request.

    status: answer every request by it, if not None. failing: so many of the next requests get a
    503. stalls: nothing is answered. slow: seconds before the content of a file. says: name of a
    file -> the size that is said of it, where it is wrong.
    """

    def __init__(self, folder: Path):
        self.folder, self.url = folder, ""
        self.asked: list[tuple[str, str]] = []
        self.status: int | None = None
        self.failing, self.stalls, self.slow = 0, False, 0.0
        self.says: dict[str, int] = {}

    def fetched(self, name: str) -> int:
        """How often the content of this file was asked for."""
        about = "/storage/v1/b/"  # what Google's store says of a file
        return sum(
            method == "GET" and path.endswith(name) and not path.startswith(about)
            for method, path in self.asked
        )


@contextmanager
def serve(folder: Path, kind: str = "http") -> Iterator[Served]:
    """Serve a folder as one of the kinds above."""
    served = Served(folder)

    class Answer(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self._answer(with_body=False)

        def do_GET(self):
            self._answer(with_body=True)

        do_POST = do_GET

        def _answer(self, *, with_body):
            place = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            served.asked.append((self.command, place.path))
            while served.stalls:
                time.sleep(0.05)
            if served.status or served.failing > 0:
                served.failing -= 1
                return self._send(served.status or 503, b"", {})
            found = KINDS[kind](folder, unquote(place.path), parse_qs(place.query), body)
            if isinstance(found, tuple):
                status, data, what = found
                return self._send(status, data, {"Content-Type": what}, with_body=with_body)
            if not found.is_file():
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            data, status, more = found.read_bytes(), 200, {"ETag": f'"{found.stat().st_mtime_ns}"'}
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if wanted:
                first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
                more["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
                data, status = data[first : last + 1], 206
            time.sleep(served.slow)
            if not with_body and found.name in served.says:
                data = bytes(served.says[found.name])
            return self._send(status, data, more, with_body=with_body)

        def _send(self, status, data, more, *, with_body=True):
            self.send_response(status)
            for key, value in {"Accept-Ranges": "bytes", **more}.items():
                self.send_header(key, value)
            self.send_header("Last-Modified", "Mon, 05 Jan 2026 10:00:00 GMT")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if with_body:
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            """A client that has what it wants may close its connection: no traceback of ours."""

    server = Server(("127.0.0.1", 0), Answer)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    served.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield served
    finally:
        served.stalls = False
        server.shutdown()
        server.server_close()


def _sizes(folder: Path) -> dict[str, int]:
    """Every file below a folder by its name there, and its size."""
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in found}


def _http(folder: Path, path: str, query: dict, body: bytes) -> Path | Sent:
    return folder / path.lstrip("/")


def _s3(folder: Path, path: str, query: dict, body: bytes) -> Path | Sent:
    bucket = folder / path.lstrip("/")
    if "list-type" not in query:
        return bucket
    prefix = query.get("prefix", [""])[0]
    entries = "".join(
        f"<Contents><Key>{key}</Key><Size>{size}</Size><ETag>&quot;1&quot;</ETag>"
        "<LastModified>2026-01-05T10:00:00.000Z</LastModified></Contents>"
        for key, size in _sizes(bucket).items()
        if key.startswith(prefix)
    )
    text = f"<Name>{bucket.name}</Name><Prefix>{prefix}</Prefix><IsTruncated>false</IsTruncated>"
    listing = (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult'
        f' xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{text}{entries}</ListBucketResult>'
    )
    return 200, listing.encode(), "application/xml"


def _gcs(folder: Path, path: str, query: dict, body: bytes) -> Path | Sent:
    """Content at /download/storage/v1/b/<bucket>/o/<name>, and what is known of it without
    /download.
    """
    bucket, _, name = path.rpartition("/storage/v1/b/")[2].partition("/o")
    sizes, name = _sizes(folder / bucket), name.lstrip("/")
    if path.startswith("/download/"):
        return folder / bucket / name

    def about(name):
        of = folder / bucket / name
        known = {"kind": "storage#object", "name": name, "bucket": bucket}
        return known | {"size": str(sizes[name]), "md5Hash": str(of.stat().st_mtime_ns)}

    if name:
        known = name in sizes
        return 200 if known else 404, json.dumps(about(name) if known else {}).encode(), JSON
    prefix, delimiter = (query.get(key, [""])[0] for key in ("prefix", "delimiter"))
    items, folders = [], []
    for name in sizes:
        rest = name.removeprefix(prefix)
        if name.startswith(prefix) and delimiter and delimiter in rest:
            folders.append(prefix + rest.partition(delimiter)[0] + delimiter)
        elif name.startswith(prefix):
            items.append(about(name))
    listing = {"items": items, "prefixes": sorted(set(folders))}
    return 200, json.dumps(listing).encode(), JSON


def _hub(folder: Path, path: str, query: dict, body: bytes) -> Path | Sent:
    api, user, name, what, *rest = f"{path.removeprefix('/api')}////".lstrip("/").split("/")[:5]
    whole = folder / user / name
    inside = "/".join(path.removeprefix("/api").split("/")[6:])
    if what == "resolve":
        return whole / inside
    if not whole.is_dir() or api != "datasets":
        return 404, b"", JSON
    sizes = _sizes(whole)

    def about(name):
        oid = f"{(whole / name).stat().st_mtime_ns:040x}"
        return {"type": "file", "path": name, "size": sizes[name], "oid": oid}

    if what == "paths-info":
        asked = parse_qs(body.decode()).get("paths") or json.loads(body)["paths"]
        found = [about(n) for n in asked if n in sizes]
        found += [_folder(n) for n in asked if n and (whole / n).is_dir()]
        return 200, json.dumps(found).encode(), JSON
    if what == "tree":
        below = [n for n in sizes if not inside or n.startswith(f"{inside}/")]
        found = [about(n) for n in below]
        if query.get("recursive", [""])[0].lower() != "true":
            first = len(inside) + 1 if inside else 0
            folders = {n[: first + n[first:].index("/")] for n in below if "/" in n[first:]}
            found = [e for e in found if "/" not in e["path"][first:]] + [*map(_folder, folders)]
        return (200, json.dumps(found).encode(), JSON) if below else (404, b"", JSON)
    return 200, json.dumps({"id": f"{user}/{name}", "sha": "0" * 40}).encode(), JSON


def _folder(name: str) -> dict:
    return {"type": "directory", "path": name, "size": 0, "oid": "0" * 40}


KINDS = {"http": _http, "s3": _s3, "gcs": _gcs, "hub": _hub}
