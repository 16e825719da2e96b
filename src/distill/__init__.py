"""Adversarial diffusion distillation. `python -m distill` lists the commands.

In Python, `import distill` offers the names of PUBLIC. Each is imported when it is first used.
`__init__.pyi` lists the same names for editors and type checkers.
"""

import importlib
import signal
import sys
from typing import Any

# While `python -m distill...` imports, Ctrl-C ends it without a traceback. Later
# `distill.machine.signals` sets the handlers. A program that imports the package keeps its own.
_started = sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] if "-m" in sys.orig_argv else []
if (
    _started
    and f"{_started[0]}.".startswith("distill.")
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# Public name -> its module below distill, and its name there. No top-level module may have one of
# these names: `distill.sample` is the module of a command.
PUBLIC = {
    "compose": "api.settings:compose",
    "arguments": "api.settings:arguments",
    "load_teacher": "api.parts:load_teacher",
    "load_data": "api.parts:load_data",
    "make_student": "api.parts:make_student",
    "make_players": "api.parts:make_players",
    "make_trainer": "api.parts:make_trainer",
    "sample_images": "api.results:sample_images",
    "save_student": "api.results:save_student",
    "ADD": "methods.add:ADD",
    "LADD": "methods.ladd:LADD",
    "NitroFusion": "methods.nitrofusion:NitroFusion",
    "DMD2": "methods.dmd2:DMD2",
    "DPO": "methods.dpo:DPO",
    "ConsistencyDistillation": "methods.consistency:ConsistencyDistillation",
    "Regression": "methods.regression:Regression",
    "Distillation": "methods.base:Distillation",
    "Players": "core.types:Players",
    "Batch": "core.types:Batch",
    "Cond": "core.types:Cond",
    "Logits": "core.types:Logits",
    "Losses": "core.types:Losses",
    "TeacherFeatures": "discriminators.teacher_features:TeacherFeatures",
    "ImageFeatures": "discriminators.images:ImageFeatures",
    "FakeScore": "discriminators.fake_score:FakeScore",
    "Classifiers": "discriminators.fake_score:Classifiers",
    "AllHeads": "discriminators.heads:AllHeads",
    "ConvHeads": "discriminators.heads:ConvHeads",
    "StyleGANTHeads": "discriminators.stylegan_t:StyleGANTHeads",
    "Pool": "discriminators.pool:Pool",
    "Discrete": "core.times:Discrete",
    "LogitNormal": "core.times:LogitNormal",
    "ScoreDistillation": "core.score_distillation:ScoreDistillation",
    "ConsistencySampler": "sampling:Consistency",
    "EulerSampler": "sampling:Euler",
    "EulerAncestralSampler": "sampling:EulerAncestral",
    "LoopSettings": "training.loop_settings:LoopSettings",
    "Optimizers": "training.loop_settings:Optimizers",
    "TwoPlayerLoop": "training.loop:TwoPlayerLoop",
    "DataModule": "training.data_module:DataModule",
}
__all__ = list(PUBLIC)


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = PUBLIC[name].partition(":")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
