"""A student as a web page that needs no server: it runs in the browser, by onnxruntime-web.

The page reads scripts that lie beside it, and nothing else. They hold the networks, the tokenizers
and the runtime, compressed and in base64, because a page that is opened from a disk may read
scripts, and no other files.
"""

from __future__ import annotations

import base64
import gzip
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.exporting.onnx_files import MANIFEST, save_onnx
from distill.sampling import FewSteps
from distill.storage.atomic import atomic_folder
from distill.teachers.pipeline import PipelineTeacher

PAGE = Path(__file__).parent / "page"
WORDS = "<\\|startoftext\\|>|<\\|endoftext\\|>|'s|'t|'re|'ve|'m|'ll|'d|"  # of CLIP's expression
MOST = 256 * 2**20  # bytes, ours: of the networks; a browser holds no longer text


def save_page(
    student: PipelineTeacher,
    sampler: FewSteps,
    source: Path,
    out: Path,
    runtime: dict[str, bytes],
) -> Path:
    """Write the folder `out`: open its index.html.

    `runtime` is what `web_runtime.read` gives; Raises ValueError as `save_onnx` does,
    and for captions that the page cannot read, or networks too large for a browser.
    """
    tokenizers = tokenizers_of(student)
    with atomic_folder(out) as partial:
        networks = save_onnx(student, sampler, source, partial / "networks", form="web")
        files = sorted(networks.glob("*.onnx"))
        size = sum(file.stat().st_size for file in files)
        if size > MOST or list(networks.glob("*.data")):
            what = f"its networks have {size / 1e6:.0f} MB, and a page holds {MOST / 1e6:.0f}"
            raise ValueError(f"to=web: {what}; use to=onnx")
        about = json.loads((networks / MANIFEST).read_text(encoding="utf-8"))
        read = about["networks"]["text_encoder"]["inputs"]
        used = {name: each for name, each in tokenizers.items() if name in read}
        packed = {file.name: file.read_bytes() for file in (*files, networks / MANIFEST)}
        packed |= {name: runtime[name] for name in ("runtime.mjs", "runtime.wasm")}
        packed["tokenizers.json"] = json.dumps(used, ensure_ascii=False).encode()
        (partial / "files.js").write_text(script(packed), encoding="utf-8")
        (partial / "runtime.js").write_bytes(runtime["runtime.js"])
        for file in sorted(PAGE.iterdir()):
            shutil.copyfile(file, partial / file.name)
        shutil.rmtree(networks)
    return out


def script(files: dict[str, bytes]) -> str:
    """A script that holds these files: the same bytes for the same files."""
    packed = {
        name: base64.b64encode(gzip.compress(content, mtime=0)).decode()
        for name, content in files.items()
    }
    return f"window.FILES = {json.dumps(packed, indent=0)};\n"


def tokenizers_of(student: PipelineTeacher) -> dict[str, dict[str, Any]]:
    """What tokenizer.js needs to know of each loaded tokenizer.

    Raises ValueError for one that does not work as CLIP's.
    """
    found = {}
    for name, part in student.pipeline.components.items():
        suffix = name.removeprefix("tokenizer")
        encoder = getattr(student.pipeline, f"text_encoder{suffix}", None)
        if name.startswith("tokenizer") and part is not None and encoder is not None:
            found[name] = _described(part, name)
    return found


def _described(tokenizer: Any, name: str) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    about = json.loads(backend.to_str()) if backend is not None else {}
    if not _as_clip(about):
        what = f"its {name} is a {type(tokenizer).__name__}, and the page reads as CLIP's does"
        raise ValueError(f"to=web: {what}; use to=onnx")
    model = about["model"]
    return {
        "vocab": model["vocab"],
        "merges": [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]],
        "suffix": model.get("end_of_word_suffix") or "",
        "special": {t["content"]: t["id"] for t in about["added_tokens"] if t["special"]},
        "begin": tokenizer.bos_token_id,
        "end": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
        "unknown": tokenizer.unk_token_id,
        "length": tokenizer.model_max_length,
    }


def _as_clip(about: dict[str, Any]) -> bool:
    """Whether a tokenizer works as tokenizer.js does, by its tokenizer.json."""
    steps = (about.get("normalizer") or {}).get("normalizers", [])
    words = (about.get("pre_tokenizer") or {}).get("pretokenizers", [{}])[0].get("pattern", {})
    model = about.get("model", {})
    return (
        model.get("type") == "BPE"
        and not model.get("continuing_subword_prefix")
        and [step["type"] for step in steps] == ["NFC", "Replace", "Lowercase"]
        and str(words.get("Regex")).startswith(WORDS)
    )


def page_noise(seed: int, shape: Sequence[int], step: int = 0) -> np.ndarray:
    """The unit noise, float32 of this shape, that the page draws for a seed and a step (from 0).

    Box and Muller's method on a hash of 32 bits, in double precision: see page/sampling.js.
    """
    count = int(np.prod(shape))
    pairs = -(-count // 2)
    key = _mixed(np.array([seed % 2**32], np.uint32))
    i = np.arange(2 * pairs * step, 2 * pairs * (step + 1)).astype(np.uint32)
    uniform = (_mixed(key + i).astype(np.float64) + 0.5) / 2**32
    radius, angle = np.sqrt(-2 * np.log(uniform[::2])), 2 * np.pi * uniform[1::2]
    found = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return found.astype(np.float32).flatten()[:count].reshape(shape)


def _mixed(x: np.ndarray) -> np.ndarray:
    """A hash of 32 bits; products wrap around."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))
