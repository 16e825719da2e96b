"""Servers of files for tests: HTTP with ranges, and as much of S3 as reading needs."""

from __future__ import annotations

import http.server
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


class Served:
    """A folder at `url`. `asked` has method and path of every request.

    status: answer every request by it, if not None. failing: so many of the next requests get a
    503. stalls: nothing is answered.
    """

    def __init__(self, folder: Path):
        self.folder, self.url = folder, ""
        self.asked: list[tuple[str, str]] = []
        self.status: int | None = None
        self.failing, self.stalls = 0, False

    def fetched(self, name: str) -> int:
        return sum(method == "GET" and path.endswith(name) for method, path in self.asked)


@contextmanager
def serve(folder: Path, *, s3: bool = False) -> Iterator[Served]:
    """Serve a folder; with `s3` its subfolders are buckets."""
    served = Served(folder)

    class Answer(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self._answer(with_body=False)

        def do_GET(self):
            self._answer(with_body=True)

        def _answer(self, *, with_body):
            place = urlsplit(self.path)
            served.asked.append((self.command, place.path))
            while served.stalls:
                time.sleep(0.05)
            if served.status or served.failing > 0:
                served.failing -= 1
                return self._send(served.status or 503, b"", {})
            file = folder / unquote(place.path).lstrip("/")
            query = parse_qs(place.query)
            if s3 and "list-type" in query:
                prefix = query.get("prefix", [""])[0]
                return self._send(200, _listing(file, prefix), {"Content-Type": "application/xml"})
            if not file.is_file():
                return self._send(404, b"", {})
            data, status, more = file.read_bytes(), 200, {"ETag": f'"{file.stat().st_mtime_ns}"'}
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if wanted:
                first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
                more["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
                data, status = data[first : last + 1], 206
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

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    served.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield served
    finally:
        served.stalls = False
        server.shutdown()
        server.server_close()


def _listing(bucket: Path, prefix: str) -> bytes:
    """S3's answer to ListObjectsV2."""
    found = sorted(p for p in bucket.rglob("*") if p.is_file())
    keys = [(p.relative_to(bucket).as_posix(), p.stat().st_size) for p in found]
    entries = "".join(
        f"<Contents><Key>{key}</Key><Size>{size}</Size><ETag>&quot;1&quot;</ETag>"
        "<LastModified>2026-01-05T10:00:00.000Z</LastModified></Contents>"
        for key, size in keys
        if key.startswith(prefix)
    )
    text = f"<Name>{bucket.name}</Name><Prefix>{prefix}</Prefix><IsTruncated>false</IsTruncated>"
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult'
        f' xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{text}{entries}</ListBucketResult>'
    ).encode()
