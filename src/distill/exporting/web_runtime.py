"""The files of onnxruntime-web, the package of npm that runs a student in a browser."""

import gzip
import tarfile
from collections.abc import Callable
from pathlib import Path

RUNTIME = {  # file of onnxruntime-web -> its name here
    "ort.wasm.min.js": "runtime.js",
    "ort-wasm-simd-threaded.mjs": "runtime.mjs",
    "ort-wasm-simd-threaded.wasm": "runtime.wasm",
}
LARGEST = 64 * 2**20  # bytes, ours: of a file of the runtime; the largest has 14 MB
HOW = "get it by `npm pack onnxruntime-web`, and give runtime=<the .tgz that it writes>"


def read(path: str | None) -> dict[str, bytes]:
    """The files of onnxruntime-web, from a .tgz of npm or a folder.

    Raises ValueError or FileNotFoundError for anything else.
    """
    if path is None:
        raise ValueError(f"runtime=null: to=web puts onnxruntime-web beside the page; {HOW}")
    if not Path(path).exists():
        raise FileNotFoundError(f"runtime={path}: no such file or folder; {HOW}")
    try:
        if Path(path).is_dir():
            return _of(_in_folder(Path(path)), path)
        with tarfile.open(path) as archive:
            return _of(_in_archive(archive), path)
    except (tarfile.TarError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"runtime={path}: is no archive of npm ({error}); {HOW}") from None


def _of(content_of: Callable[[str], bytes | None], path: str) -> dict[str, bytes]:
    found = {}
    for name, ours in RUNTIME.items():
        content = content_of(name)
        if content is None:
            raise ValueError(f"runtime={path}: has no dist/{name} of at most 64 MB; {HOW}")
        found[ours] = content
    return found


def _in_folder(folder: Path) -> Callable[[str], bytes | None]:
    def content(name: str) -> bytes | None:
        places = [folder / name, folder / "dist" / name, folder / "package" / "dist" / name]
        places.append(folder / "node_modules" / "onnxruntime-web" / "dist" / name)
        file = next((place for place in places if place.is_file()), None)
        return file.read_bytes() if file and file.stat().st_size <= LARGEST else None

    return content


def _in_archive(archive: tarfile.TarFile) -> Callable[[str], bytes | None]:
    def content(name: str) -> bytes | None:
        try:
            member = archive.getmember(f"package/dist/{name}")
        except KeyError:
            return None
        file = archive.extractfile(member) if member.isfile() and member.size <= LARGEST else None
        return file.read() if file else None

    return content
