"""What a stranger may send, made byte by byte: tars, pictures, YAML; and a child process of little
memory.
"""

from __future__ import annotations

import io
import struct
import tarfile
import tempfile
import zlib
from pathlib import Path

import forks

ROOT = Path(__file__).parents[1]
EVIL = "a\x1b[2J\x1b]0;owned\x07\u202egnp.\n|`<script>alert(1)</script>\"'&"  # as a name or caption


def header(name: str, size: bytes = b"", kind: bytes = b"0", **fields: bytes) -> bytes:
    """512 bytes of a ustar header; `size` is its field as it stands, 12 bytes."""
    block = bytearray(512)
    places = {"mode": (100, b"0000644\0"), "uid": (108, b"0000000\0"), "gid": (116, b"0000000\0")}
    places |= {"mtime": (136, b"00000000000\0"), "magic": (257, b"ustar\x0000")}
    places |= {
        "name": (0, name.encode()),
        "size": (124, size or b"00000000000\0"),
        "kind": (156, kind),
    }
    for key, (start, value) in places.items():
        value = fields.get(key, value)
        block[start : start + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def number(value: int) -> bytes:
    """A size in GNU's form of 12 bytes: any number, negative ones too."""
    first = b"\xff" if value < 0 else b"\x80"
    return first + (value % 2**88).to_bytes(11, "big")


def octal(value: int) -> bytes:
    return b"%011o\0" % value


def pax(**words: str) -> bytes:
    """A PAX header with these words, to stand before a member's own."""
    return body(b"".join(record(key, value) for key, value in words.items()), b"x")


def record(key: str, value: str) -> bytes:
    rest = f" {key}={value}\n".encode()
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length += 1
    return str(length).encode() + rest


def body(data: bytes, kind: bytes = b"0", name: str = "x") -> bytes:
    """A header of a member and its data, in whole blocks."""
    return header(name, octal(len(data)), kind) + data + bytes(-len(data) % 512)


END = bytes(1024)


def tar(path: Path, files: dict[str, bytes]) -> Path:
    """An ordinary shard."""
    with tarfile.open(path, "w") as out:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def png(width: int, height: int, *before: bytes) -> bytes:
    """A black picture of any size, a thousandth of what it takes decoded; `before` are chunks."""
    squeezer = zlib.compressobj(9)
    row = bytes(1 + 3 * width)
    data = b"".join(squeezer.compress(row) for _ in range(height)) + squeezer.flush()
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [chunk(b"IHDR", size), *before, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def laughs(levels: int = 9) -> str:
    """YAML of a few lines that is of 9 ** `levels` values once its aliases are followed."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for i in range(1, levels):
        lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]")
    return "\n".join(lines) + "\n"


def small(script: str, *words: object, mib: int = 512, seconds: int = 120) -> str:
    """What a script prints that may take `mib` MiB of memory beside what torch and Python take; its
    end must be good.

    The limit is set by `limit()`, which the script calls once its imports are done.
    """
    with_limit = f"import resource\ndef limit():\n{LIMIT.format(mib=mib)}\n{script}"
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        done = forks.shared().script(with_limit, *words, out=out, err=err)
        assert done.wait(timeout=seconds) == 0, done.said("err")[-3000:]
        return done.said("out")


LIMIT = """
    pages = int(open('/proc/self/statm').read().split()[0])
    most = pages * resource.getpagesize() + {mib} * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
"""
