"""Read the size of JPEG XL and WebP pictures from their headers, before Pillow opens them.

Pillow's plugin decodes a JPEG XL when it is opened, and for WebP Pillow allocates two full
canvases. So their size must be checked before. By ISO/IEC 18181-1 (SizeHeader) and -2 (boxes), and
RFC 9649.
"""

from typing import IO

BARE, BOXED = b"\xff\x0a", b"JXL"  # the start of a bare codestream; the type of the first box
LENGTHS = (9, 13, 18, 30)  # bits of a side, chosen by two bits
# Width by height, chosen by three bits that are not zero.
RATIOS = (None, (1, 1), (6, 5), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
HEADER = 12  # bytes that hold the signature and a SizeHeader of at most 77 bits
BOXES = 1000  # ours: limit of boxes that are searched


def size_of(file: IO[bytes]) -> tuple[int, int] | None:
    """Width and height in pixels; None for other formats than JPEG XL and WebP.

    The position in the file is restored. Raises ValueError for a file without a size.
    """
    place = file.tell()
    try:
        start = file.read(30)
        file.seek(place)
        if start[:4] + start[8:12] == b"RIFFWEBP":
            return _of_webp(start)
        if start.startswith(BARE):
            return _sides(file.read(HEADER))
        return _sides(_codestream(file)) if start[4:7] == BOXED else None
    finally:
        file.seek(place)


def _of_webp(start: bytes) -> tuple[int, int] | None:
    """The size in the first chunk (extended, lossless, or lossy); None for others, which Pillow
    refuses.
    """
    kind, data = start[12:16], start[20:]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[4:7], "little"), 1 + int.from_bytes(data[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        sides = (int.from_bytes(data[i : i + 2], "little") & 0x3FFF for i in (6, 8))
        return next(sides), next(sides)
    return None


def _codestream(file: IO[bytes]) -> bytes:
    """The first bytes of the picture's box."""
    for _ in range(BOXES):
        start, head = file.tell(), file.read(8)
        if len(head) < 8:
            break
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if length == 1:
            length = int.from_bytes(file.read(8), "big")
        if kind in (b"jxlc", b"jxlp"):
            if kind == b"jxlp":
                file.seek(4, 1)  # the number of the part
            return file.read(HEADER)
        if not 8 <= length < 2**62:  # 0 marks the last box
            break
        file.seek(start + length)
    raise ValueError("its JPEG XL has no picture in its boxes; save it anew")


def _sides(codestream: bytes) -> tuple[int, int]:
    if not codestream.startswith(BARE) or len(codestream) < 4:
        raise ValueError("its JPEG XL ends before it says its size; save it anew")
    bits = int.from_bytes(codestream[len(BARE) :], "little")

    def take(count: int) -> int:
        nonlocal bits
        value = bits & ((1 << count) - 1)
        bits >>= count
        return value

    def side() -> int:
        return 8 * (take(5) + 1) if small else take(LENGTHS[take(2)]) + 1

    small = take(1)
    height = side()
    ratio = RATIOS[take(3)]
    return (height * ratio[0] // ratio[1] if ratio else side()), height
