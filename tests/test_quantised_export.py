"""`export weights=int8`: quantised students in plain diffusers."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

import families
import tiny
from distill import students
from distill.sampling import Consistency


def test_wrong_settings_of_weights(command, tmp_path, monkeypatch):
    folder = tiny.write_pipeline("unet", tmp_path / "unet")
    before = sorted(tmp_path.rglob("*"))
    wrong = {
        ("to=diffusers", "weights=int9"): "weights=int9: must be int8 or fp8",
        ("to=web", "weights=int8"): "weights=int8: has no effect on to=web, only on to=diffusers",
        (
            "to=onnx",
            "weights=fp8",
            "run=shapes:student",
        ): "weights=fp8: to=onnx has no such weights; use weights=int8",
    }
    if importlib.util.find_spec("torchao") is not None:
        wrong[("to=diffusers", "weights=fp8", "dtype=float16")] = "dtype=float16: weights=fp8 comp"
    for given, expected in wrong.items():
        code, _, err = command("export", f"run={folder}", "out=new", *given)
        assert code == 1
        assert expected in err
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "torchao" else real(n, *a)
    )
    code, _, err = command("export", f"run={folder}", "to=diffusers", "weights=int8", "out=new")
    assert code == 1
    assert "needs torchao, not installed here; pip install 'distill[quantise]'" in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("more", ["weights=int8", "weights=fp8", "dtype=float16"])
def test_a_quantised_student_is_not_quantised_or_rounded_again(more, command, tmp_path):
    pytest.importorskip("torchao", reason="pip install -e '.[quantise]'")
    folder = tiny.write_pipeline("unet", tmp_path / "unet")
    settings = folder / "unet" / "config.json"
    said = json.loads(settings.read_text(encoding="utf-8"))
    said["quantization_config"] = {"quant_method": "torchao"}
    settings.write_text(json.dumps(said), encoding="utf-8")
    code, _, err = command("export", f"run={folder}", "to=diffusers", more, "out=new")
    assert code == 1
    assert err.startswith(f"distill: run={folder}: its unet/ is quantised by torchao")
    assert err.strip().count("\n") == 0
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd35", "sdxl"])
@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_a_quantised_student_in_plain_diffusers(family, weights, command, tmp_path):
    pytest.importorskip("torchao", reason="pip install -e '.[quantise]'")
    teacher = families.teacher_at(families.write(family, tmp_path / "teacher"))
    scheduler = Consistency().scheduler(teacher.network, teacher)
    students.save_pipeline(teacher.network, teacher, tmp_path / "student", scheduler, Consistency())
    words = [f"run={tmp_path / 'student'}", "to=diffusers", f"weights={weights}", "out=small"]
    code, _, err = command("export", *words)
    assert code == 0, err
    import diffusers

    few = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "np", **families.SMALL}
    found = {}
    for name in ("student", "small"):
        pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / name, dtype=torch.bfloat16)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        found[name] = pipe("a red star", generator=generator, **few).images
        part = getattr(pipe, teacher.part)
        kinds = {type(m.weight).__name__ for m in part.modules() if type(m) is torch.nn.Linear}
        expected = {"int8": "Int8Tensor", "fp8": "Float8Tensor"}[weights]
        assert kinds == ({"Parameter"} if name == "student" else {expected})
    difference = abs(found["small"] - found["student"])
    assert difference.max() > 0
    assert difference.mean() < 0.05
    config = (tmp_path / "small" / teacher.part / "config.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in config
    assert json.loads(config)["quantization_config"]["quant_method"] == "torchao"
    card = (tmp_path / "small" / "README.md").read_text(encoding="utf-8")
    assert "torchao" in card
    code, _, err = command("sample", "run=small", "prompt=a", "out=x")
    assert code == 1
    assert "is quantised by torchao" in err
