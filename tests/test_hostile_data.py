"""Shards and pictures that a stranger has made: bounded, named, and skipped or refused."""

from __future__ import annotations

import base64
import io
import json
import struct
import sys
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

import hostile
from distill.data import bad, decode, folder, named
from distill.data.bad import BadSample
from distill.data.datasets import ImageShards, LatentShards
from distill.data.lines import Lines
from distill.data.raw import caption, image_size
from distill.data.shards import Shards, index_tar
from distill.evaluation.features import open_rgb
from distill.storage import formats, headers
from hostile import END, EVIL, body, header, number, octal, pax, png
from tiny import write_shards

TXT = body(b"a red star", name="0.txt")
KILO = 2**10
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by RLIMIT_AS")


def sparse_headers() -> bytes:
    """An old GNU sparse file whose list of parts goes on past the end of the shard."""
    block = bytearray(header("s.png", octal(512), b"S", magic=b"ustar  \0"))
    block[386:482] = (octal(0) + octal(1)) * 4
    block[482] = 1  # more of them follow
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


# Name -> bytes of a shard, and what is said of it beside its path.
TARS = {
    "a member of 2^45 bytes": (header("0.png", number(2**45)) + END, "cut short or damaged"),
    "a member of 2^62 bytes": (header("0.png", number(2**62)) + END, "cut short or damaged"),
    "a member of 2^80 bytes": (header("0.png", number(2**80)) + END, "cut short or damaged"),
    "a negative member": (TXT + header("0.png", number(-512)) + END, "a member of -512 bytes"),
    "a member that leads back": (TXT + header("0.png", number(-2048)) + END, "of -2048 bytes"),
    "a PAX header of 2^45 bytes": (header("x", number(2**45), b"x") + TXT, "declares"),
    "a PAX header of 2^62 bytes": (header("x", number(2**62), b"x") + TXT, "declares"),
    "a global PAX header of 2^45 bytes": (header("x", number(2**45), b"g") + TXT, "declares"),
    "a long name of 2^45 bytes": (header("x", number(2**45), b"L") + TXT, "declares"),
    "a negative PAX header": (header("x", number(-600), b"x") + TXT + END, "declares"),
    "a PAX size of 10^30": (pax(size="1" + "0" * 30) + TXT + END, "cut short or damaged"),
    "a negative PAX size": (pax(size="-4096") + TXT + END, "a member of -4096 bytes"),
    "a thousand PAX headers": (pax(path="a") * 3000 + TXT + END, "cut short or damaged"),
    "many digits": (body(b"1" * 60_000, b"x") + TXT + END, "a number of 256 digits"),
    "an endless sparse list": (sparse_headers() + b"0" * 512, "cut short or damaged"),
    "a sparse list without numbers": (
        pax(**{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}) + body(b"x" * 600) + END,
        "cut short or damaged",
    ),
    "cut in a header": (TXT + header("1.txt")[:300], "cut short or damaged"),
    "cut in a member": (TXT + header("1.txt", octal(5000)) + b"x" * 100, "cut short or damaged"),
    "a gzip bomb": (zlib.compress(bytes(2**24), wbits=31), "is compressed by gzip"),
    "zeros of 2^20 bytes": (bytes(2**20), None),
}  # fmt: skip


@pytest.mark.parametrize("name", TARS)
def test_a_hostile_shard_is_refused_by_its_name(name, tmp_path):
    data, said = TARS[name]
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    if said is None:
        assert index_tar(str(path)) == {}
        return
    with pytest.raises(ValueError, match="^data.path: the shard ") as caught:
        index_tar(str(path))
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


@needs_proc
def test_hostile_shards_take_no_memory(tmp_path):
    for i, (data, _) in enumerate(TARS.values()):
        (tmp_path / f"{i}.tar").write_bytes(data)
    script = """
import sys, glob
from distill.data.shards import index_tar
limit()
for path in sorted(glob.glob(sys.argv[1] + '/*.tar')):
    try:
        index_tar(path)
    except ValueError as error:
        assert 'MemoryError' not in str(error), error
        print('refused')
"""
    said = hostile.small(script, tmp_path, mib=64)
    assert said.count("refused") == len(TARS) - 1


def test_the_command_check_says_it_in_one_sentence(command, tmp_path):
    (tmp_path / "x.tar").write_bytes(TARS["a PAX header of 2^45 bytes"][0])
    code, _, err = command("check", f"data.path={tmp_path}")
    assert code == 1
    assert err.startswith("distill: data.path: the shard ")
    assert err.count("\n") == 1


def test_odd_members_and_names_are_passed_over_or_odd_keys(tmp_path):
    odd = b"".join(
        header(name, kind=kind)
        for name, kind in (("l.png", b"2"), ("d.png", b"5"), ("c.png", b"3"), ("p.png", b"6"))
    )
    names = ("../up.txt", "/absolute.txt", "new\nline.txt", "esc\x1b[2J.txt")
    (tmp_path / "x.tar").write_bytes(odd + b"".join(body(b"a", name=n) for n in names) + END)
    (tmp_path / "x.idx").write_text("0 99999999999 wrong\n", encoding="utf-8")  # nobody reads it
    shards = Shards(str(tmp_path))
    assert [key for key, _ in shards.index] == ["../up", "/absolute", "new\nline", "esc\x1b[2J"]
    assert shards.name(2).endswith(r"x.tar:new\nline")
    assert shards.name(3).endswith(r"x.tar:esc\x1b[2J")


def test_a_name_acts_neither_in_a_warning_nor_in_an_error(tmp_path, caplog):
    files = {f"{EVIL}{i}.png".replace("/", "").replace(".", "_", 1): b"x" for i in range(3)}
    files = {f"{i}\x1b[2J\nfake\u202e.png": b"no picture" for i in range(30)}
    files |= {f"{i}\x1b[2J\nfake\u202e.txt": EVIL.encode() for i in range(30)}
    hostile.tar(tmp_path / "x.tar", files)
    data = ImageShards(str(tmp_path), size=64)
    with pytest.raises(ValueError, match="samples tried are bad") as caught:
        data[0]
    shown = [str(caught.value), *(record.getMessage() for record in caplog.records)]
    assert len(shown) > 10
    for text in shown:
        assert not {"\x1b", "\n", "\u202e"} & set(text)
        assert r"\x1b[2J\nfake\u202e" in text


@pytest.mark.parametrize("files", [1200, 20_000])
def test_a_sample_of_thousands_of_files_is_a_bad_one(files, tmp_path):
    tar = {f"0.{i}": b"" for i in range(files)} | {"0.png": b"", "0.txt": b""}
    for i in range(1, 12):
        tar |= {f"{i}.png": png(64, 64), f"{i}.txt": b"a star"}
    hostile.tar(tmp_path / "x.tar", tar)
    data = ImageShards(str(tmp_path), size=64)
    item, [(name, reason)] = data.find(0)
    assert item["caption"] == "a star"
    assert name.endswith("x.tar:0")
    assert reason == f"it has {files + 2} files, more than 1000"


# -- pictures --------------------------------------------------------------------------------------


def raw(data: bytes, extension: str = "png") -> dict:
    return {extension: data, "txt": b"a star", "__key__": "7", "__url__": "a.tar"}


@needs_proc
def test_a_large_picture_in_a_small_file_is_bad_before_it_is_decoded(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png(13000, 13500))
    assert (tmp_path / "bomb.png").stat().st_size < 600 * KILO
    (tmp_path / "bomb.txt").write_text("a star", encoding="utf-8")
    for i in range(3):
        (tmp_path / f"good{i}.png").write_bytes(png(64, 64))
        (tmp_path / f"good{i}.txt").write_text("a star", encoding="utf-8")
    script = """
import struct
import sys
from distill.data.datasets import ImageShards
limit()
data = ImageShards(sys.argv[1], size=64, buckets=[[64, 64], [96, 64]])
item, skipped = data.find(0)
print(item['key'], skipped)
"""
    said = hostile.small(script, tmp_path, mib=128)
    assert "good" in said
    assert "it has 13000 x 13500 pixels, and at most 67 million are decoded" in said


SIDE = 12000  # 144 million pixels: Pillow itself refuses 179 million


def enlarged(suffix: str) -> bytes:
    """A small picture, as Pillow writes it, whose header says that it is of SIDE x SIDE pixels."""
    Image.new("RGB", (40, 24), "red").save(file := io.BytesIO(), formats.FORMAT_OF[suffix])
    data, order = file.getvalue(), "<" if suffix in ("bmp", "gif", "tga") else ">"
    small, large = (struct.pack(f"{order}{c}{c}", 40, 24) for c in ("I", "H"))
    if suffix == "webp":  # a box of lossless or lossy data: another of the whole canvas, before it
        canvas = b"VP8X\n\0\0\0\0\0\0\0" + 2 * (SIDE - 1).to_bytes(3, "little")
        return b"RIFF" + struct.pack("<I", len(data) + 10) + b"WEBP" + canvas + data[12:]
    if suffix == "ppm":
        return data.replace(b"40 24", b"12000 12000")
    if suffix == "jp2":
        small = struct.pack(">II", 24, 40)
        data = data.replace(struct.pack(">II", 40, 24), struct.pack(">II", SIDE, SIDE))
    if small in data:
        return data.replace(small, struct.pack(f"{order}II", SIDE, SIDE))
    assert large in data
    return data.replace(large, struct.pack(f"{order}HH", SIDE, SIDE))


@needs_proc
def test_a_header_is_believed_before_anything_is_decoded(tmp_path):
    """Of every format: too many pixels are refused by name, and take no memory."""
    read_here = set(formats.suffixes()) & {"avif", "webp", "jp2", "bmp", "gif", "qoi", "ppm", "tga"}
    for suffix in read_here:
        (tmp_path / f"bomb.{suffix}").write_bytes(enlarged(suffix))
    script = """
import sys
from pathlib import Path
from distill.data import decode
from distill.data.bad import BadSample
from distill.data.raw import image_size
from distill.evaluation.features import open_rgb
limit()
for path in Path(sys.argv[1]).iterdir():
    sample = {path.suffix[1:]: path.read_bytes(), '__key__': '7', '__url__': 'a.tar'}
    for read in (image_size, lambda sample: decode.image(sample, 64)):
        try:
            print(path.suffix, read(sample))
        except BadSample as error:
            print(error)
    try:
        open_rgb(path)
    except ValueError as error:
        print(error)
"""
    lines = hostile.small(script, tmp_path, mib=128).splitlines()
    refused = "has 12000 x 12000 pixels, and at most 67 million are decoded"
    assert [line for line in lines if refused not in line] == []
    assert len(lines) == 3 * len(read_here) > 0


def jxl_header(*fields: tuple[int, int]) -> bytes:
    """A codestream that begins with these (value, number of bits)."""
    bits, at = 0, 0
    for value, count in fields:
        bits |= value << at
        at += count
    return b"\xff\x0a" + bits.to_bytes(10, "little")


def box(kind: bytes, data: bytes, *, wide: bool = False) -> bytes:
    length = len(data) + 8
    head = struct.pack(">I4sQ", 1, kind, length + 8) if wide else struct.pack(">I4s", length, kind)
    return head + data


# A picture that browsers are asked whether they can show, of 2 x 2 pixels.
ASKED = base64.b64decode("/woIELASCAgQAFwASxLFgkWAHL0xqnCBCV0qDp901Te/5QM=")
BOMB = jxl_header((0, 1), (3, 2), (SIDE - 1, 30), (0, 3), (2, 2), (SIDE - 1, 18))
BOXES = box(b"JXL ", b"\r\n\x87\n") + box(b"ftyp", b"jxl \0\0\0\0jxl ")


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (ASKED, (2, 2)),
        (jxl_header((1, 1), (7, 5), (5, 3)), (113, 64)),  # 16 to 9
        (jxl_header((1, 1), (7, 5), (0, 3), (3, 5)), (32, 64)),
        (jxl_header((0, 1), (1, 2), (999, 13), (2, 3)), (1200, 1000)),
        (BOMB, (SIDE, SIDE)),
        (BOXES + box(b"jxlc", BOMB), (SIDE, SIDE)),
        (
            BOXES + box(b"Exif", b"x" * 70_000, wide=True) + box(b"jxlp", b"\0\0\0\0" + BOMB),
            (SIDE, SIDE),
        ),
        (png(16, 16), None),
        (b"", None),
    ],
)  # fmt: skip
def test_a_jpeg_xl_says_its_size(data, size):
    file = io.BytesIO(b"before" + data)
    file.seek(6)
    assert headers.size_of(file) == size
    assert file.tell() == 6


@pytest.mark.parametrize("how", [{"lossless": True}, {"lossless": False}, {"exif": b"Exif\0\0"}])
def test_a_webp_says_its_size(how):
    Image.new("RGB", (40, 24), "red").save(file := io.BytesIO(), "WEBP", **how)
    file.seek(0)
    assert headers.size_of(file) == (40, 24)


@pytest.mark.parametrize("data", [BOXES, BOXES + box(b"jxlc", b""), b"\xff\x0a", BOXES[:20]])
def test_a_jpeg_xl_that_does_not_say_it_is_refused(data):
    with pytest.raises(ValueError, match="its JPEG XL (has no picture|ends before)"):
        headers.size_of(io.BytesIO(data))


def test_a_large_jpeg_xl_is_refused_before_a_plugin_sees_it(tmp_path):
    """Which would decode it at once."""
    (tmp_path / "x.jxl").write_bytes(BOXES + box(b"jxlc", BOMB))
    for file in (tmp_path / "x.jxl", io.BytesIO(BOMB)):
        with pytest.raises(ValueError, match=r"it has 12000 x 12000 pixels, and at most 67 mill"):
            formats.open_picture(file, "png")


@needs_proc
def test_the_largest_picture_takes_less_than_a_gibibyte(tmp_path):
    (tmp_path / "large.png").write_bytes(png(8192, 8192))
    script = """
import struct
import sys
from pathlib import Path
from distill.data import decode
limit()
sample = {'png': Path(sys.argv[1]).read_bytes(), '__key__': '0', '__url__': 'x'}
print(tuple(decode.image(sample, 512).shape))
"""
    assert hostile.small(script, tmp_path / "large.png", mib=900).strip() == "(3, 512, 512)"


def test_a_large_jpeg_is_decoded_smaller_and_a_progressive_one_is_bad():
    grey = Image.linear_gradient("L").resize((9000, 9000))
    grey.save(plain := io.BytesIO(), "JPEG")
    grey.save(progressive := io.BytesIO(), "JPEG", progressive=True)
    x = decode.image(raw(plain.getvalue(), "jpg"), 64)
    small = decode.image(raw(_jpeg(grey.resize((4500, 4500))), "jpg"), 64)
    assert (x - small).abs().max() < 0.02
    assert image_size(raw(plain.getvalue(), "jpg")) == (9000, 9000)
    with pytest.raises(BadSample, match="it has 9000 x 9000 pixels"):
        decode.image(raw(progressive.getvalue(), "jpg"), 64)


def _jpeg(picture: Image.Image) -> bytes:
    picture.save(file := io.BytesIO(), "JPEG")
    return file.getvalue()


def test_ordinary_pictures_stay_bit_for_bit():
    random = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP"):
        picture = Image.fromarray(random.integers(0, 256, (80, 96, 3), np.uint8))
        picture.save(file := io.BytesIO(), kind)
        whole = Image.open(io.BytesIO(file.getvalue())).convert("RGB")
        wanted = whole.resize((64, 64), Image.Resampling.BICUBIC, box=(8, 0, 88, 80))
        found = decode.image(raw(file.getvalue(), kind.lower()), 64)
        assert np.array_equal(
            ((found + 1) * 127.5).round().byte().numpy().transpose(1, 2, 0), wanted
        )


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_a_thousand_frames_one_is_decoded(kind):
    frames = [Image.new("RGB", (8, 8), (i % 256, i // 256, 0)) for i in range(1000)]
    first = Image.new("RGB", (64, 64), "red")
    options = {"lossless": True} if kind == "WEBP" else {}
    frames = [frame.resize((64, 64)) for frame in frames[:100]] if kind == "WEBP" else frames
    first.save(file := io.BytesIO(), kind, save_all=True, append_images=frames, **options)
    x = decode.image(raw(file.getvalue(), kind.lower()), 64)
    assert x[0].mean() > 0.99
    assert x[1:].max() < -0.99


HUGE = zlib.compress(bytes(2**26), 9)  # 64 MiB of zeros in 64 KiB


HEADS = {
    "iCCP": b"x\0\0", "zTXt": b"x\0\0", "iTXt": b"x\0\1\0\0\0", "tEXt": b"x\0", "eXIf": b"MM",
}  # fmt: skip


@needs_proc
def test_chunks_of_a_png_take_no_memory(tmp_path):
    for name, head in HEADS.items():
        data = head + (HUGE if name in ("iCCP", "zTXt", "iTXt") else b"\xff" * 2**20)
        chunks = [hostile.chunk(name.encode(), data)] * 40
        (tmp_path / f"{name}.png").write_bytes(png(64, 64, *chunks))
    script = """
import struct
import sys
from pathlib import Path
from distill.data import decode
from distill.data.bad import BadSample
from distill.data.raw import image_size
decode.formats.readable_formats()
limit()
for path in sorted(Path(sys.argv[1]).glob('*.png')):
    sample = {'png': path.read_bytes(), '__key__': path.stem, '__url__': 'x'}
    for read in (image_size, lambda sample: tuple(decode.image(sample, 64).shape)):
        try:
            print('read', read(sample))
        except BadSample as error:
            print('bad', error)
"""
    said = hostile.small(script, tmp_path, mib=200)
    assert "MemoryError" not in said
    assert len(said.strip().splitlines()) == 2 * len(HEADS)


def test_a_picture_to_begin_from_or_to_judge_has_the_same_bound(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png(9000, 9000))
    with pytest.raises(
        ValueError, match=r"^image=.*bomb\.png: cannot be read as a picture \(it has"
    ):
        open_rgb(tmp_path / "bomb.png", "image=")


@pytest.mark.parametrize(
    "data",
    [
        b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(%pipe%id) (r) file\n",
        b"\xff\xd8\xff\xe1\xff\xffExif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 70_000,
        b"P6\n99999999999 99999999999\n255\n",
        b"P6\n-5 7\n255\n",
        b"qoif\xff\xff\xff\xff\xff\xff\xff\xff\3\0",
        b"BM" + b"\xff" * 60,
        b"RIFF\xff\xff\xff\xffWEBPVP8X\n\0\0\0\x10\0\0\0\xff\xff\xff\xff\xff\xff",
    ],
)  # fmt: skip
def test_what_is_no_picture_is_a_bad_sample(data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for read in (image_size, lambda sample: decode.image(sample, 64)):
            with pytest.raises(BadSample, match=r"^a\.tar:7: its \.png does not decode"):
                read(raw(data))


# -- captions, records, latents --------------------------------------------------------------------


def sparse_file(path, size: int, start: bytes = b""):
    """A file of so many bytes that takes no room on a disk."""
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)
    return path


@needs_proc
def test_files_of_gibibytes_are_named_and_not_read(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(64, 64))
        (tmp_path / f"{i}.txt").write_text("a star", encoding="utf-8")
    sparse_file(tmp_path / "0.txt", 2**31, b"a star")
    sparse_file(tmp_path / "1.png", 2**40, png(64, 64))
    (tmp_path / "2.txt").unlink()
    sparse_file(tmp_path / "2.json", 2**31, b'{"caption": "')
    script = """
import struct
import sys
from distill.data.datasets import ImageShards
limit()
data = ImageShards(sys.argv[1], size=64, max_bad_share=1)
print([(item and item['key'], bad) for item, bad in (data.find(i, most=1) for i in range(4))])
"""
    said = hostile.small(script, tmp_path, mib=200)
    assert "its .txt has 2 GiB, more than the 4 MiB that are read" in said
    assert "its .png has 1024 GiB, more than the 512 MiB that are read" in said
    assert "its .json has 2 GiB, more than the 4 MiB that are read" in said
    assert said.count("None") == 3
    assert "('3.png', [])" in said


def test_the_bounds_count_the_whole_sample(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.data.shards.MOST_TOGETHER", 1000)
    hostile.tar(tmp_path / "x.tar", {"0.a": b"x" * 600, "0.b": b"x" * 600, "0.c": b"x" * 300})
    found = Shards(str(tmp_path)).read(0)
    assert [isinstance(found[end], bad.Unread) for end in "abc"] == [False, True, False]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"[" * 200_000, "does not decode"),
        (b'{"caption": ' + b"[" * 100_000, "does not decode"),
        (b'{"caption": NaN}', "has no text under"),
        (b'{"caption": ' + b"9" * 5000 + b"}", "does not decode"),
        (b'{"caption": 1e999}', "has no text under"),
        (b'["a star"]', "has no text under"),
    ],
)
def test_captions_of_hostile_json_are_bad(data, reason):
    with pytest.raises(BadSample, match=rf"^a\.tar:7: its \.json {reason}"):
        caption({"json": data, "__key__": "7", "__url__": "a.tar"})


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_record_without_end_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "MOST_CAPTION", 10_000)
    (tmp_path / "a.png").write_bytes(png(64, 64))
    start = b'{"file_name": "' if name.endswith("jsonl") else b'file_name,text\na.png,"'
    (tmp_path / name).write_bytes(start + b"x" * 20_000)
    with pytest.raises(ValueError, match=f"{name}: has a line of more than"):
        ImageShards(str(tmp_path), size=64)


def npy(shape: str, data: bytes = b"", descr: str = "'<f2'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


@needs_proc
def test_latents_that_declare_what_they_have_not_are_bad(tmp_path):
    arrays = {
        "huge": npy("(4, 1073741824, 1073741824)"),
        "large": npy("(4, 32768, 32768)", bytes(512)),
        "endless": npy(f"({'9' * 400}, 1, 1)"),
        "negative": npy("(-1, 16, 16)", bytes(512)),
        "object": npy("(4, 16, 16)", b"\x80\x04." * 800, "'|O'"),
        "wide": npy("(1, 1, 1)", bytes(64), "'<V2147483000'"),
        "code": npy("__import__('os').abort()"),
        "deep": npy("(" * 9000 + ")" * 9000)[:9999],
    }
    files = {f"{name}.latent.npy": data for name, data in arrays.items()}
    files |= {f"{name}.txt": b"a star" for name in arrays}
    good = io.BytesIO()
    np.save(good, np.ones((4, 16, 16), np.float16))
    files |= {"zz.latent.npy": good.getvalue(), "zz.txt": b"a star"}
    hostile.tar(tmp_path / "x.tar", files)
    script = """
import struct
import sys
from distill.data.datasets import LatentShards
limit()
data = LatentShards(sys.argv[1], buckets=[[16, 16], [32, 16]])
found = [data.find(i, most=1) for i in range(len(data))]
print(*(item['key'] for item, _ in found if item), sum(len(skipped) for _, skipped in found))
"""
    assert hostile.small(script, tmp_path, mib=128).split() == ["zz", str(len(arrays))]


def archive(path, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as out:
        for name, data in files.items():
            out.writestr(name, data)


def saved(array) -> bytes:
    np.save(file := io.BytesIO(), array, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    ("files", "compression", "said"),
    [
        ({"tokens.npy": bytes(2**24)}, zipfile.ZIP_DEFLATED, "holds compressed parts"),
        ({"tokens.npy": npy("(4, 1073741824, 1073741824)")}, 0, "is no embedded caption"),
        ({"tokens.npy": saved(np.array([{}], object))}, 0, "is no embedded caption"),
        ({"tokens.npy": saved(np.ones(3))}, 0, "not of finite numbers in half"),
        ({"tokens.npy": saved(np.full(3, np.nan, np.float16))}, 0, "not of finite numbers in half"),
        ({"pooled.npy": saved(np.ones(3, np.float16))}, 0, "it holds pooled"),
        ({"__class__.npy": saved(np.ones(3, np.float16))}, 0, "it holds __class__"),
        ({}, 0, "it holds nothing"),
    ],
)
def test_a_hostile_null_caption_is_refused(files, compression, said, tmp_path):
    shards = write_shards(tmp_path)
    archive(shards / "null.npz", files, compression)
    with pytest.raises(ValueError, match=r"^data\.path=.*: its null\.npz is no embedded") as caught:
        LatentShards(str(shards))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "said", ["[" * 100_000, "3", '{"without": "x"}', '{"buckets": [3]}', '{"teacher": ["x"]}', "{"]
)
def test_a_hostile_manifest_is_refused(said, tmp_path):
    shards = write_shards(tmp_path)
    (shards / "manifest.json").write_text(said, encoding="utf-8")
    with pytest.raises(ValueError, match=r"manifest\.json"):
        LatentShards(str(shards))


@pytest.mark.parametrize("bucket", [[0, 16], ["a", 16], [16], [1e9, 16], [2**40, 16], [True, 16]])
def test_hostile_buckets_of_a_manifest_are_refused(bucket, tmp_path):
    shards = write_shards(tmp_path)
    (shards / "manifest.json").write_text(json.dumps({"buckets": [bucket]}), encoding="utf-8")
    with pytest.raises(ValueError, match="buckets"):
        LatentShards(str(shards))


def test_a_list_of_prompts_without_end_is_refused(tmp_path):
    sparse_file(tmp_path / "prompts.txt", 2**33, b"a star\n")
    with pytest.raises(ValueError, match=r"^data\.path=.*: cannot be read as lines .*8 GiB"):
        Lines(str(tmp_path / "prompts.txt"))
    with pytest.raises(ValueError, match="is no regular file"):
        Lines("/dev/zero")


@pytest.mark.parametrize(
    "pattern", ["x-{0..99999999}.tar", "{a,b}" * 40, "{0..9}" * 9, f"{{0..{'9' * 5000}}}"]
)
def test_braces_that_stand_for_too_many_names_are_refused_at_once(pattern):
    with pytest.raises(FileNotFoundError, match="braces stand for more than 1,048,576 shards; wri"):
        named.expand(pattern)


def test_braces_in_each_other_are_counted_and_too_many_refused(tmp_path):
    for name in ("a1", "a2", "b"):
        (tmp_path / f"{name}.tar").write_bytes(b"")
    assert len(named.expand(f"{tmp_path}/{{a{{1..2}},b}}.tar")) == 3
    with pytest.raises(ValueError, match="its braces do not pair"):
        named.expand("{" * 3000 + "a,b" + "}" * 3000)
