"""Pictures as other tools lay them out, and what is said of those that are not read: see
troubleshooting_data.md.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.data import decode
from distill.data.bad import BadSample
from distill.data.datasets import ImageShards, LatentShards
from distill.data.named import expand
from distill.data.raw import caption, image_size
from distill.data.shards import Shards, check_pictures
from distill.data.source import Source
from distill.data.write import write_latents
from distill.evaluation.references import pictures_in
from distill.storage import formats
from distill.storage.pictures import to_rgb
from tiny import put_tar

DOC = Path(__file__).parents[1] / "docs" / "look_up" / "troubleshooting_data.md"


def picture(kind: str = "PNG", side: int = 8, colour=(200, 100, 50), mode: str = "RGB", **how):
    Image.new(mode, (side, side), colour).save(file := io.BytesIO(), kind, **how)
    return file.getvalue()


def lay(folder: Path, files: dict[str, str | bytes]) -> str:
    """Write files, with their folders."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def sample(key: str) -> dict[str, str | bytes]:
    return {f"{key}.png": picture(), f"{key}.txt": key}


def told(path: str, **options) -> dict[str, str]:
    """Key -> caption, as a run reads them."""
    data = ImageShards(path, size=8, max_bad_share=1.0, **options)
    return {data[i]["key"]: data[i]["caption"] for i in range(len(data))}


# -- captions of a folder --------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["", "train/"])
def test_hugging_face_s_imagefolder(where, tmp_path):
    records = [
        {"file_name": "a.png", "text": "a dog"},
        {"file_name": "sub/b.jpg", "text": "ein Bär"},
        {"file_name": "sub\\c.png", "text": "of Windows"},
    ]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n\n" for record in records)
    files = {"a.png": picture(), "sub/b.jpg": picture("JPEG"), "sub/c.png": picture()}
    files["metadata.jsonl"] = "\ufeff" + lines
    path = lay(tmp_path, {where + name: data for name, data in files.items()})
    assert told(path) == {
        f"{where}a.png": "a dog",
        f"{where}sub/b.jpg": "ein Bär",
        f"{where}sub/c.png": "of Windows",
    }


def test_metadata_csv_and_the_key_of_the_caption(tmp_path):
    rows = 'file_name,prompt,n\r\na.png,"a dog, ""Rex"",\nin two lines",1\r\nb.png,Bär,2\r\n'
    path = lay(tmp_path, {"a.png": picture(), "b.png": picture(), "metadata.csv": "\ufeff" + rows})
    assert told(path, caption_key="prompt") == {
        "a.png": 'a dog, "Rex",\nin two lines',
        "b.png": "Bär",
    }
    data = ImageShards(path, size=8, max_bad_share=1.0)
    reason = (
        "its .json has no text under 'caption' or 'text', only file_name, prompt, n: see"
        " data.caption_key"
    )
    with pytest.raises(BadSample, match=reason):
        caption(data.shards.read(0))


def test_each_record_is_a_sample_and_lost_ones_are_counted(tmp_path, caplog):
    (tmp_path / "secret.png").write_bytes(picture())
    lines = [{"file_name": "a.png", "text": f"caption {i}"} for i in range(2)]
    lines += [{"file_name": "../secret.png", "text": "no"}, {"file_name": "/b.png", "text": "no"}]
    path = lay(
        tmp_path / "d",
        {"a.png": picture(), "metadata.jsonl": "\n".join(map(json.dumps, lines))},
    )
    data = ImageShards(path, size=8)
    assert [(data[i]["key"], data[i]["caption"]) for i in range(len(data))] == [
        ("a.png", "caption 0"),
        ("a.png", "caption 1"),
    ]
    assert "2 records, ../secret.png for one, of a picture that is not there" in caplog.text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"metadata.jsonl": '{"file_name": "a.png"}\n{"x'}, r"its line 2 is no JSON object"),
        (
            {"metadata.jsonl": '{"image": "a.png", "text": "c"}'},
            "has no file_name, only image, text",
        ),
        ({"metadata.jsonl": "[" * 100_000}, "its line 1 is no JSON object"),
        ({"metadata.csv": "image,text\na.png,c\n"}, "a row has no file_name, only image, text"),
        ({"metadata.csv": "file_name,text\na.png,Bär".encode("latin-1")}, "as CSV in UTF-8"),
        ({"metadata.csv": "file_name\n", "metadata.jsonl": ""}, "in one folder; keep one"),
    ],
)
def test_records_that_cannot_be_read(files, message, tmp_path):
    path = lay(tmp_path, {"a.png": picture(), **files})
    with pytest.raises(ValueError, match=message):
        check_pictures(path)


def test_captions_beside_pictures(tmp_path):
    files = {
        "a.png": picture(), "a.caption": "kohya's",
        "b.png": picture(), "b.png.txt": "with the whole name",
        "c.JPG": picture("JPEG"), "c.JPG.caption": "both",
        "d.png": picture(), "d.txt": "txt first", "d.caption": "later", "d.json": "{}",
        "e.png": picture(), "e.jpg": picture("JPEG"), "e.txt": "of all", "e.jpg.txt": "its own",
        "f.png": picture(), "f.png.json": '{"caption": "gallery"}',
    }  # fmt: skip
    expected = {
        "a.png": "kohya's", "b.png": "with the whole name", "c.JPG": "both", "d.png": "txt first",
        "e.jpg": "its own", "e.png": "of all", "f.png": "gallery",
    }  # fmt: skip
    assert told(lay(tmp_path, files)) == expected


def test_what_is_read_of_several_is_said(tmp_path, caplog):
    lay(tmp_path, {"a.png": picture(), "a.jpg": picture("JPEG"), "a.txt": "c", "a.caption": "d"})
    lay(tmp_path, {"a.TXT": "e", "metadata.jsonl": '{"file_name": "a.png", "text": "f"}'})
    assert told(str(tmp_path)) == {"a.jpg": "c", "a.png": "c"}
    for said in (
        "1 caption, a.TXT, of a name that differs in case alone: not read",
        "1 picture, a.png, with a record and a file beside it: the file is read",
        "1 name, a, of several pictures, which share the caption",
        "1 picture, a, with two captions: the .txt is read",
    ):
        assert f"{tmp_path}: {said}" in caplog.text


def test_kohya_s_folders(tmp_path, caplog):
    files = {
        "3_cat/a.png": picture(), "3_cat/a.caption": "a cat",
        "3_cat/b.png": picture(),
        "1_sks dog/c.png": picture(), "1_sks dog/c.txt": "a dog",
    }  # fmt: skip
    path = lay(tmp_path, files)
    data = ImageShards(path, size=8)
    once = ["1_sks dog/c.png", "3_cat/a.png", "3_cat/b.png"]
    assert [data[i]["key"] for i in range(len(data))] == once + once[1:] * 2
    assert [data[i]["caption"] for i in range(3)] == ["a dog", "a cat", "cat"]
    assert (
        "(1 in 1_sks dog, 2 in 3_cat); without a caption, 1 have their folder's words"
        in caplog.text
    )
    whole = [b["key"] for b in itertools.islice(Source(data, 7).loader(seed=0), 2)]
    assert [sorted(keys) for keys in whole] == [sorted(once + once[1:] * 2)] * 2
    plain = ImageShards(path, size=8, repeats=False)
    assert [plain[i]["key"] for i in range(len(plain))] == once
    assert plain[2]["caption"] == ""


@pytest.mark.parametrize("other", ["a.png", "photos/a.png", "01_photos/a.png", "2024_may/a.png"])
def test_numbers_of_other_folders_are_no_repeats(other, tmp_path, caplog):
    files = {name: picture() for name in (other, "10_cat/b.png")}
    path = lay(tmp_path, files | {f"{name}.txt": "c" for name in files})
    assert len(ImageShards(path, size=8)) == 2
    assert "10_cat is named as kohya's folders are, and others are not" in caplog.text


def test_the_folder_above_kohya_s_is_said(tmp_path, caplog):
    """With the pictures of classes beside it, all would be read once and some without words."""
    files = {"img/10_sks dog/a.png": picture(), "reg/1_dog/b.png": picture()}
    path = lay(tmp_path, files | {"img/10_sks dog/a.txt": "a dog"})
    assert len(ImageShards(path, size=8)) == 2
    assert "img/10_sks dog is named as kohya's folders are, and lies deeper" in caplog.text
    assert f"give {tmp_path / 'img'} for its repeats and words" in caplog.text
    caplog.clear()
    assert len(ImageShards(path, size=8, repeats=False)) == 2
    assert "is named as kohya" not in caplog.text


def test_what_may_be_the_reason_of_a_refusal_is_said(tmp_path, caplog):
    files = {"10_cat/a.png": picture(), "preview.png": picture(), "metadata.parquet": "PAR1"}
    with pytest.raises(ValueError, match="2 of 2 pictures have no caption"):
        check_pictures(lay(tmp_path, files), max_empty_share=0.5)
    assert "10_cat is named as kohya's folders are, and others are not" in caplog.text
    assert "1 .parquet beside the pictures are not read" in caplog.text


# -- no captions -----------------------------------------------------------------------------------


def test_a_set_without_captions_is_refused(tmp_path, command):
    path = lay(tmp_path / "photos", {f"{i}.png": picture(side=64) for i in range(5)})
    (tmp_path / "photos" / "0.txt").write_text("alone", encoding="utf-8")
    said = f"data.path={path}: 4 of 5 pictures have no caption, 1.png for one; give each a .txt or"
    asked = [f"data.path={path}", "data.size=64", "data.num_workers=0"]
    for name, more in {"check": [], "cache": ["out=made"]}.items():
        code, _, err = command(name, *asked, *more)
        assert code == 1
        assert said in err
        assert "or take them so by data.max_empty_share=1" in err
    assert not (tmp_path / "made").exists()
    code, out, _ = command("check", *asked, "data.max_empty_share=1")
    assert code == 0
    assert "4 are empty" in out
    with pytest.raises(ValueError, match=r"data\.max_empty_share=2: must be a share"):
        ImageShards(path, size=8, max_empty_share=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_captions_that_say_nothing_are_refused(workers, tmp_path, command):
    """Files of blanks: known only when they are read. `check` counts them, a run stops."""
    files = {}
    for i in range(24):
        files |= {f"{i:02d}.png": picture(), f"{i:02d}.txt": " \n" if i % 8 else "a dog"}
    path = put_tar(tmp_path / "x.tar", files)
    data, said = ImageShards(path, size=8), ""
    try:
        list(itertools.islice(Source(data, 4, workers).loader(seed=0), 40))
    except ValueError as error:  # only text is kept: a traceback keeps workers alive
        said = str(error)
    assert re.fullmatch(
        r"data.path=.*x.tar: \d+ of \d+ captions are empty, more than data.max_empty_share=0.5; .*",
        said,
    )
    code, out, _ = command("check", f"data.path={path}", "data.size=8", "data.num_workers=0")
    assert code == 1
    assert "21 are empty" in out
    assert "more than data.max_empty_share=0.5 of them: write them, or raise the share" in out


def test_shards_without_captions(tmp_path, caplog):
    path = put_tar(tmp_path / "x.tar", {f"{i}.png": picture() for i in range(4)})
    with pytest.raises(ValueError, match=r"4 of 4 pictures have no caption, 0 for one"):
        ImageShards(path, size=8)
    assert set(told(path, max_empty_share=1).values()) == {""}
    assert "4 of 4 pictures" in caplog.text
    assert "and count as pictures of the empty one" in caplog.text
    caplog.clear()
    path = put_tar(tmp_path / "z.tar", {f"{i}.png": picture() for i in range(3)} | sample("a"))
    data = ImageShards(path, size=8, max_empty_share=0.9)
    assert data[0]["caption"] == "a"  # the others are bad samples
    assert "count as pictures of the empty one" not in caplog.text
    put_tar(tmp_path / "y.tar", {"0.png": picture(), "0.txt": ""})
    with pytest.raises(ValueError, match=r"1 of 1 pictures have no caption"):
        ImageShards(f"{tmp_path}/y.tar", size=8)


def test_an_empty_caption_in_json_is_an_empty_caption(tmp_path):
    raw = {"__key__": "0", "__url__": "a"}
    assert caption(raw | {"json": b'{"caption": ""}'}) == ""
    assert caption(raw | {"json": b'{"caption": "", "text": "t"}'}) == "t"


@pytest.mark.parametrize(
    ("record", "key", "said"),
    [
        (b'{"text": null}', "caption", ""),
        (b'{"caption": null}', "caption", ""),
        (b'{"caption": null, "text": "t"}', "caption", "t"),
        (b'{"caption": "", "text": null}', "caption", ""),
        (b'{"prompt": null}', "prompt", ""),
        (b'{"caption": 0}', "caption", None),
        (b'{"caption": []}', "caption", None),
        (b'{"other": null}', "caption", None),
    ],
)
def test_null_is_an_empty_caption(record, key, said):
    raw = {"__key__": "0", "__url__": "a", "json": record}
    if said is None:
        with pytest.raises(BadSample, match="has no text under"):
            caption(raw, key)
    else:
        assert caption(raw, key) == said


def test_pictures_of_null_captions_are_good_where_empty_ones_may_be(tmp_path, command):
    for i in range(3):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.json").write_text('{"text": null}', encoding="utf-8")
    asked = [f"data.path={tmp_path}", "data.size=64", "data.num_workers=0"]
    code, out, _ = command("check", *asked, "data.max_empty_share=1")
    assert (code, "3 of 3 samples are good" in out, "3 are empty" in out) == (0, True, True)
    assert command("check", *asked)[0] == 1


def test_a_picture_without_bytes_is_said_by_its_name(tmp_path, command):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "c.png").write_bytes(b"no picture")
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("a star", encoding="utf-8")
    code, out, _ = command("check", f"data.path={tmp_path}", "data.size=64", "data.num_workers=0")
    assert code == 1
    empty = r"its \.png does not decode \(it is empty, of 0 bytes\) \(as \S+:b\.png\)"
    assert re.search(empty, out)
    broken = r"its \.png does not decode \(cannot identify image file\) \(as \S+:c\.png\)"
    assert re.search(broken, out)
    assert "BytesIO" not in out


def test_utf_16_is_no_caption(tmp_path):
    raw = {"__key__": "0", "__url__": "a"}
    for text in ("a dog".encode("utf-16"), "a dog".encode("utf-16-le")):
        with pytest.raises(BadSample, match=r"its \.txt is not UTF-8"):
            caption(raw | {"txt": text})


def test_pretraining_needs_captions_only_where_it_reads_them(tmp_path):
    from distill.worlds.shapes.pretraining.asked import max_empty_share

    assert max_empty_share(["data", "vae"]) == 1.0
    assert max_empty_share(None) == max_empty_share(["clip"]) == 0.5


# -- formats of pictures ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("avif", "AVIF"), ("bmp", "BMP"), ("tif", "TIFF"), ("tiff", "TIFF"), ("gif", "GIF"),
        ("jfif", "JPEG"), ("jp2", "JPEG2000"), ("ppm", "PPM"), ("qoi", "QOI"), ("tga", "TGA"),
        ("TIF", "TIFF"), ("png", "AVIF"),
    ],
)  # fmt: skip
def test_formats_that_pillow_reads(name, kind, tmp_path):
    files = {f"a.{name}": picture(kind, 16), "a.txt": "c"}
    expected = torch.tensor([200.0, 100.0, 50.0]) / 127.5 - 1
    for path in (lay(tmp_path / "d", files), put_tar(tmp_path / "x.tar", files)):
        data = ImageShards(path, size=8)
        assert data.measure(0) == (16, 16)
        assert torch.allclose(data[0]["pixels"].mean((1, 2)), expected, atol=0.05)


def test_a_format_of_another_package(tmp_path, monkeypatch):
    """A package of the plugin's name on the path, whose files are PNG behind a mark of its own."""
    path = lay(
        tmp_path, {"a.jxl": b"JXL!" + picture(), "a.txt": "c", "b.png": picture(), "b.txt": "c"}
    )
    data = ImageShards(path, size=8)
    assert [data[i]["key"] for i in range(len(data))] == ["b.png"]
    code = """
        import io
        from PIL import Image, PngImagePlugin
        def opened(file, name):
            return PngImagePlugin.PngImageFile(io.BytesIO(file.read()[4:]))
        Image.register_open("JXL", opened, lambda start: start.startswith(b"JXL!"))
    """
    lay(tmp_path / "plugins", {"pillow_jxl.py": "\n".join(x[8:] for x in code.split("\n"))})
    monkeypatch.syspath_prepend(tmp_path / "plugins")
    try:
        formats.readable_formats.cache_clear()
        formats.suffixes.cache_clear()
        data = ImageShards(path, size=8)
        assert [data[i]["key"] for i in range(len(data))] == ["a.jxl", "b.png"]
    finally:
        Image.OPEN.pop("JXL")
        Image.ID.remove("JXL")
        formats.readable_formats.cache_clear()
        formats.suffixes.cache_clear()


def test_pictures_that_are_not_read_are_counted_and_named(tmp_path, caplog):
    other = {"b.heic": b"x", "c.HEIC": b"x", "d.psd": b"x", "e.mp4": b"x", "notes.md": b"x"}
    path = lay(tmp_path, {"a.png": picture(), "a.txt": "c"} | other)
    ImageShards(path, size=8)
    assert (
        "2 .heic, 1 .mp4, 1 .psd are not read, b.heic for one: `pip install pillow-heif`"
        in caplog.text
    )
    for name in ("a.png", "a.txt"):
        (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"but 2 \.heic.*pip install pillow-heif"):
        check_pictures(path)
    raw = {"__key__": "0", "__url__": "a", "heic": b"x"}
    with pytest.raises(BadSample, match=r"only heic; `pip install pillow-heif`"):
        decode.image(raw, 8)


def test_eps_is_never_opened(tmp_path):
    raw = {"__key__": "0", "__url__": "a", "png": picture("EPS")}
    with pytest.raises(BadSample, match="does not decode"):
        decode.image(raw, 8)


def test_what_has_no_white_is_refused():
    floats = Image.fromarray(np.full((4, 4), 0.5, np.float32))
    deep = Image.fromarray(np.full((4, 4), 2**30, np.int32))
    for image, why in ((floats, "its pixels are floats"), (deep, "more than 16 bits")):
        image.save(file := io.BytesIO(), "TIFF")
        with pytest.raises(BadSample, match=why):
            decode.image({"__key__": "0", "__url__": "a", "tif": file.getvalue()}, 4)
    grey = Image.fromarray(np.full((4, 4), 32768, np.uint16))
    grey.save(file := io.BytesIO(), "TIFF")
    assert to_rgb(Image.open(file)).getpixel((0, 0)) == (128, 128, 128)
    red = picture("JPEG", colour=(0, 255, 255, 0), mode="CMYK")
    found = decode.image({"__key__": "0", "__url__": "a", "jpg": red}, 8)[:, 0, 0]
    assert torch.allclose(found, torch.tensor([1.0, -1.0, -1.0]), atol=0.05)


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "WEBP", "AVIF", "JPEG"])
def test_the_size_of_a_turned_picture_is_that_of_its_pixels(kind):
    image = Image.new("RGB", (50, 30))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(file := io.BytesIO(), kind, exif=exif)
    raw = {
        "__key__": "0",
        "__url__": "a",
        {"JPEG": "jpg"}.get(kind, kind.lower()): file.getvalue(),
    }
    assert image_size(raw) == (30, 50)
    assert decode.image(raw, 30, 50).shape == (3, 50, 30)


# -- where files lie -------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="links need a right there, and pipes have no names")
def test_links_are_followed_and_loops_end(tmp_path, caplog):
    lay(tmp_path / "other", {"sub/b.png": picture(), "sub/b.txt": "b"})
    path = lay(tmp_path / "d", {"own/a.png": picture(), "own/a.txt": "a"})
    for link, target in {
        "loop": tmp_path / "d",
        "own/up": tmp_path / "d" / "own",
        "linked": tmp_path / "other",
        "second": tmp_path / "other",
        "gone.png": tmp_path / "nothing.png",
        "self.png": tmp_path / "d" / "self.png",
    }.items():
        os.symlink(target, tmp_path / "d" / link)
    os.symlink(tmp_path / "d", tmp_path / "other" / "back")
    os.mkfifo(tmp_path / "d" / "fifo.png")
    os.symlink(tmp_path / "other" / "sub" / "b.png", tmp_path / "d" / "z.png")
    lay(tmp_path / "d", {"z.txt": "a linked file"})
    assert told(path) == {
        "linked/sub/b.png": "b",
        "own/a.png": "a",
        "z.png": "a linked file",
    }
    assert "2 links, gone.png for one, to nothing: not read" in caplog.text
    assert "4 linked folders, linked/back for one, of pictures that are read anyway" in caplog.text


def test_what_systems_leave_is_no_data(tmp_path):
    junk = {
        "._a.png": b"x", ".cache/b.png": picture(), "@eaDir/a.png/THUMB.jpg": picture("JPEG"),
        "__MACOSX/a.png": b"x", "Thumbs.db": b"x", ".ipynb_checkpoints/a-checkpoint.png": picture(),
    }  # fmt: skip
    good = {"a.png": picture(), "a.txt": "c"}
    assert told(lay(tmp_path / "d", good | junk)) == {"a.png": "c"}
    path = put_tar(tmp_path / "x.tar", {f"./{name}": data for name, data in (good | junk).items()})
    shards = Shards(path)
    keys = [key for key, _ in shards.index]
    assert keys == ["./a", "./Thumbs"]
    assert pictures_in(tmp_path / "d") == [tmp_path / "d" / "a.png"]


def test_shards_of_other_names_and_places(tmp_path, caplog):
    put_tar(tmp_path / "a" / "A.TAR", sample("a"))
    put_tar(tmp_path / "b" / "x" / "0.tar", sample("b"))
    put_tar(tmp_path / "b" / "y" / "1.TAR", sample("c"))
    assert told(str(tmp_path / "a")) == {"a": "a"}
    assert told(str(tmp_path / "b")) == {"b": "b", "c": "c"}
    assert not caplog.records
    assert expand(f"{tmp_path}/b") == [f"{tmp_path}/b/x/0.tar", f"{tmp_path}/b/y/1.TAR"]
    put_tar(tmp_path / "b" / "top.tar", sample("d"))
    lay(tmp_path / "b", {"loose.png": picture()})
    put_tar(tmp_path / "b" / "z.tar.gz", sample("e"), "w:gz")
    assert told(str(tmp_path / "b")) == {"d": "d"}
    for said in (
        "pictures beside the shards are not read (1, loose.png for one): give them a folder",
        "compressed shards are not read (1, z.tar.gz for one): gunzip",
        "shards in subfolders are not read (2, x/0.tar for one): give them as a pattern",
    ):
        assert said in caplog.text
    assert told(f"{tmp_path}/b/**/*.*[rR]") == {"b": "b", "c": "c", "d": "d"}


def test_a_shard_among_pictures_is_named(tmp_path, caplog):
    lay(tmp_path, {"a.png": picture(), "a.txt": "c"})
    put_tar(tmp_path / "old" / "x.tar", sample("b"))
    assert told(str(tmp_path)) == {"a.png": "c"}
    assert "1 .tar beside the pictures are not read, old/x.tar for one" in caplog.text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"x.tar.gz": b"x", "y.tgz": b"x"},
            r"1 \.tar\.gz, 1 \.tgz; archives are .* unpack x\.tar\.gz",
        ),
        ({"data.arrow": b"x"}, "tables are not read"),
        ({"a.psd": b"x"}, r"1 \.psd; these are not read here; convert them"),
        ({"a.foo": b"x"}, r"but 1 \.foo; check the path$"),
        ({}, "check the path$"),
    ],
)  # fmt: skip
def test_a_folder_of_nothing_that_is_read(files, message, tmp_path):
    path = lay(tmp_path, files)
    with pytest.raises(FileNotFoundError, match=message):
        check_pictures(path)


def test_pictures_where_latents_are_wanted(tmp_path):
    path = lay(tmp_path, {"a.png": picture(), "a.txt": "c"})
    with pytest.raises(FileNotFoundError, match="with pictures; read those by data=images"):
        LatentShards(path)
    for first, said in {
        "source": "edit pairs by data=pairs",
        "winner": "by data=preference",
    }.items():
        pair = put_tar(tmp_path / f"{first}.tar", {f"a.{first}.png": picture(), "a.txt": "c"})
        with pytest.raises(ValueError, match=f"has an image, only .*; read .*{said}$"):
            ImageShards(pair, size=8)
    write_latents(f"{tmp_path}/l/x-%d.tar", [("a", np.zeros((1, 2, 2)), "c")], 1)
    with pytest.raises(
        ValueError, match="has an image, only .*read cached latents by data=latents"
    ):
        ImageShards(f"{tmp_path}/l", size=8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"x" * 2000, mtime=0), "is compressed by gzip, .*; gunzip it first"),
        (b"BZh91" + bytes(2000), "bunzip2 it first"),
        (b"\xfd7zXZ\0" + bytes(2000), "unxz it first"),
        (b"\x28\xb5\x2f\xfd" + bytes(2000), "unzstd it first"),
        (b"PK\x03\x04" + bytes(2000), "is a zip archive; unpack it"),
        (b"PAR1" + bytes(2000), "is a Parquet table; name it .parquet"),
        (b"ARROW1\0\0" + bytes(2000), "is an Arrow table; .*troubleshooting_data.md"),
        (picture(), "is a picture; give the folder"),
    ],
)
def test_a_file_that_is_no_shard(content, message, tmp_path):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Shards(f"{tmp_path}/x.tar")


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "a.txt", "a.json"])
def test_a_file_of_captions_is_no_shard(name, tmp_path):
    path = lay(tmp_path, {name: '{"file_name": "a.png", "text": "c"}\n'})
    with pytest.raises(ValueError, match="pictures; give the folder that they are in"):
        Shards(f"{path}/{name}")


def test_a_first_member_whose_name_is_an_archive_s_mark(tmp_path):
    path = put_tar(tmp_path / "x.tar", {"BZhang.png": picture(), "BZhang.txt": "c"})
    assert told(path) == {"BZhang": "c"}


def test_dots_in_keys_are_said(tmp_path, caplog):
    dotted = {"a.v1.png": picture(), "a.v1.txt": "c", "a.v2.png": picture(), "a.v2.txt": "d"}
    path = put_tar(tmp_path / "x.tar", dotted)
    with pytest.raises(ValueError, match="a key ends at the first dot of a file's name"):
        ImageShards(path, size=8)
    path = put_tar(tmp_path / "y.tar", sample("b") | dotted)
    data = ImageShards(path, size=8, max_bad_share=1.0)
    assert "pictures as a.v1.png are not read (2); a key ends at the first dot" in caplog.text
    with pytest.raises(BadSample, match="a key ends at the first dot of a file's name"):
        decode.image(data.shards.read(1), 8)


def test_several_pictures_of_one_key_are_said(tmp_path, caplog):
    both = sample("a") | {"a.jpg": picture("JPEG"), "a.jpg.txt": "the jpg's"}
    assert told(put_tar(tmp_path / "x.tar", both)) == {"a": "the jpg's"}
    assert (
        "samples with several pictures (1, a for one: png, jpg) one is read, there the .jpg"
        in caplog.text
    )


def test_caches_of_two_teachers_are_not_mixed(tmp_path):
    for name, teacher in {"a": "x", "b": "y"}.items():
        write_latents(f"{tmp_path}/{name}/x-%d.tar", [(name, np.zeros((1, 2, 2)), "c")], 1)
        (tmp_path / name / "manifest.json").write_text(
            json.dumps({"teacher": teacher}), encoding="utf-8"
        )
    with pytest.raises(
        ValueError, match=f"{tmp_path}/a and {tmp_path}/b were made with another teacher"
    ):
        LatentShards(str(tmp_path))
    (tmp_path / "b" / "manifest.json").write_text('{"teacher": "x"}', encoding="utf-8")
    assert len(LatentShards(str(tmp_path))) == 2


# -- the page --------------------------------------------------------------------------------------


def test_the_page_names_every_suffix_and_key():
    text = DOC.read_text(encoding="utf-8")
    for word in (*formats.FORMAT_OF, "max_empty_share", "repeats", "caption_key", "metadata.jsonl"):
        assert word in text, word
