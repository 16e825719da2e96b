"""ONNX files as OpenVINO's, and these in its runtime on the CPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from distill.machine.faults import first_line

PRECISE = {"INFERENCE_PRECISION_HINT": "f32"}  # else it computes in bfloat16 where a CPU can


def openvino() -> Any:
    """The library without its telemetry, which would send as soon as it is imported, without being
    asked, from a fork of this process.

    It also imports absl.logging where that is installed, only to take off a handler that absl made
    just then. The handler keeps the stderr of that moment, and closes it when a later command sets
    up its logs. TensorBoard imports absl without its logging, so absl itself may be there.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # "not installed"
    if "absl.logging" in sys.modules:
        return importlib.import_module("openvino")
    before = {"absl": sys.modules["absl"]} if "absl" in sys.modules else {}
    sys.modules["absl"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("openvino")
    finally:
        del sys.modules["absl"]
        sys.modules.update(before)


def convert(file: Path) -> Path:
    """Replace an .onnx file by an .xml file with the network and a .bin file with its weights.

    Raises ValueError where OpenVINO cannot read it.
    """
    library = openvino()
    try:
        model = library.convert_model(file)
        library.save_model(model, file.with_suffix(".xml"), compress_to_fp16=False)
    except Exception as error:  # its own classes
        what = f"OpenVINO cannot read the {file.stem} ({first_line(error, 120)})"
        raise ValueError(f"to=openvino: {what}; use to=onnx") from error
    for path in (file, file.with_name(f"{file.name}.data")):
        path.unlink(missing_ok=True)
    return file.with_suffix(".xml")


def run(file: Path, inputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Outputs by name of a network."""
    compiled = openvino().Core().compile_model(file, "CPU", PRECISE)
    found = compiled({name: x.numpy() for name, x in inputs.items()})
    return {output.get_any_name(): np.asarray(values) for output, values in found.items()}
