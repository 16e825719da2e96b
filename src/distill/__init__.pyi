"""The public names for editors and type checkers. `__init__.py` imports them at first use."""

from distill.api.parts import load_data, load_teacher, make_players, make_student, make_trainer
from distill.api.results import sample_images, save_student
from distill.api.settings import arguments, compose
from distill.core.score_distillation import ScoreDistillation
from distill.core.times import Discrete, LogitNormal
from distill.core.types import Batch, Cond, Logits, Losses, Players
from distill.discriminators.fake_score import Classifiers, FakeScore
from distill.discriminators.heads import AllHeads, ConvHeads
from distill.discriminators.images import ImageFeatures
from distill.discriminators.pool import Pool
from distill.discriminators.stylegan_t import StyleGANTHeads
from distill.discriminators.teacher_features import TeacherFeatures
from distill.methods.add import ADD
from distill.methods.base import Distillation
from distill.methods.consistency import ConsistencyDistillation
from distill.methods.dmd2 import DMD2
from distill.methods.dpo import DPO
from distill.methods.ladd import LADD
from distill.methods.nitrofusion import NitroFusion
from distill.methods.regression import Regression
from distill.sampling import Consistency as ConsistencySampler
from distill.sampling import Euler as EulerSampler
from distill.sampling import EulerAncestral as EulerAncestralSampler
from distill.training.data_module import DataModule
from distill.training.loop import TwoPlayerLoop
from distill.training.loop_settings import LoopSettings, Optimizers

PUBLIC: dict[str, str]
__all__ = [
    "compose",
    "arguments",
    "load_teacher",
    "load_data",
    "make_student",
    "make_players",
    "make_trainer",
    "sample_images",
    "save_student",
    "ADD",
    "LADD",
    "NitroFusion",
    "DMD2",
    "DPO",
    "ConsistencyDistillation",
    "Regression",
    "Distillation",
    "Players",
    "Batch",
    "Cond",
    "Logits",
    "Losses",
    "TeacherFeatures",
    "ImageFeatures",
    "FakeScore",
    "Classifiers",
    "AllHeads",
    "ConvHeads",
    "StyleGANTHeads",
    "Pool",
    "Discrete",
    "LogitNormal",
    "ScoreDistillation",
    "ConsistencySampler",
    "EulerSampler",
    "EulerAncestralSampler",
    "LoopSettings",
    "Optimizers",
    "TwoPlayerLoop",
    "DataModule",
]
