"""What can be known without torch, Lightning and diffusers is said before they are imported: they
take seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from distill.data.write import EDIT_PAIRS
from tiny import put_tar

PAIRED = "method=dpo sampler=guided data=renders data.pairs=true"
BARE = "data=images data.path={here}/pictures data.size=64 data.max_empty_share=1"
PREFERRED = "experiment=dpo_lora_shapes data.path={here}/"
MASKED = "teacher=sd_inpaint data=renders data.masks="
MADE = (
    "data=prompts data.path={here}/prompts.txt "
    "+method.real._target_=distill.core.score_distillation.TeacherSamples +method.real.buckets="
)
EDITOR = "method=ladd teacher=instruct_pix2pix"
SIZED = "prompts={here}/prompts.txt out=o buckets="
# Command, arguments, and what its one sentence says. `{here}` is a folder with the files of
# `prepared`.
WRONG = [
    # numbers
    ("run", "trainer.max_steps=abc", "trainer.max_steps=abc: must be a whole number, 1 or more"),
    ("run", "trainer.max_steps=0", "trainer.max_steps=0: must be a whole number, 1 or more"),
    ("run", "trainer.devices=none", "trainer.devices=none: must be a number of devices"),
    ("run", "trainer.precision=16-mixed", "use auto, bf16-mixed or 32-true"),
    ("run", "trainer.precision=bf16-mixd", "(did you mean bf16-mixed?)"),
    ("run", "data.batch_size=many", "data.batch_size=many: must be a whole number"),
    ("run", "data.limit=0", "data.limit=0: must be at least 1"),
    ("run", "optimizer.student.lr=fast", "optimizer.student.lr=fast: must be a number"),
    ("run", "method.renoise.m=[1]", "method.renoise.m=[1]: must be a number"),
    ("run", "method.levels.odds=1", "method.levels.odds=1: must be a list"),
    (
        "check",
        "data.path={here} data.buckets=[64,64]",
        (
            "data.buckets=[64, 64]: must be a list of lists of whole numbers, as [[1, 2], [3, 4]]"
            " or null"
        ),
    ),
    (
        "check",
        "data.path={here} data.size=60 teacher=sd3",
        "data.size=60: must be a multiple of 16 for this teacher; use 48 or 64",
    ),
    ("run", "seed=x", "seed=x: must be a whole number, 0 or more"),
    ("run", "metrics.prompts=some", "metrics.prompts=some: must be a whole number"),
    ("run", "metrics.student_steps=[0]", "metrics.student_steps[0]=0: must be a whole number"),
    ("run", "callbacks.samples.every=0", "callbacks.samples.every=0: must be a whole number"),
    ("sample", "run={here} prompt=x steps=few", "steps=few: must be a whole number, 1 or more"),
    ("sample", "run={here} prompt=x guidance=x", "guidance=x: must be a number"),
    ("sample", "run={here} prompt=x guidance=nan", "guidance=nan: must be from 0 to 1000"),
    ("sample", "run={here} prompt=x guidance=-2", "guidance=-2: must be from 0 to 1000"),
    ("sample", "run={here}/unet prompt=x strength=0.5", "strength=0.5: has no effect without a st"),
    (
        "export",
        "run=shapes:student to=diffusers out=.",
        "out=.: is no name of a new file or folder",
    ),
    ("export", "run=shapes:student to=single_file out=/", "out=/: is no name of a new file or fol"),
    # what the files of a model say
    ("export", "run=shapes:student to=single_file out=st", "name it st.safetensors"),
    (
        "sample",
        "run=shapes:unet_inpaint prompt=x image={here}/picture.png mask=3",
        "mask=3: ",
    ),
    ("sample", "run=shapes:unet prompt=x", "run=shapes:unet: was not distilled to few steps; add"),
    ("sample", "run=shapes:student prompt=x guidance=4", "guidance=4: run=shapes:student was dis"),
    ("sample", "run=shapes:student prompt=x size=62", "size=62: must be a multiple of 8 for this"),
    (
        "evaluate",
        "run=shapes:unet_inpaint",
        "fills masked parts of pictures; use metrics=",
    ),
    (
        "evaluate",
        "run=shapes:unet_edit metrics=shapes_fill",
        "is no inpainting model; use metric",
    ),
    (
        "evaluate",
        "run=shapes:unet_inpaint metrics=shapes_fill metrics.blend=true",
        "metrics.blend=true: an ordinary model fills by blending",
    ),
    (
        "evaluate",
        "run=shapes:unet metrics=shapes_edit",
        "does not edit pictures; use metrics=",
    ),
    ("sample", "run={here} prompt=x guidance=1e40", "guidance=1e+40: must be from 0 to 1000"),
    (
        "sample",
        "run={here} prompt=x image_guidance=1e40",
        "image_guidance=1e+40: must be from 0 to",
    ),
    (
        "sample",
        "run={here} prompt=x lora=x lora_scale=1e39",
        "lora_scale=1e+39: must be a number fr",
    ),
    (
        "evaluate",
        "run={here}/unet lora=x lora_scale=1e39",
        "lora_scale=1e+39: must be a number from",
    ),
    (
        "run",
        "method.distill.guidance=[1,1e40]",
        "must be a number, or least and largest of a range, ",
    ),
    (
        "run",
        "experiment=dpo_lora_shapes data=renders data.pairs=true sampler.guidance=1e40",
        "sampler.guidance=1e+40: must be from 0 to 1000",
    ),
    (
        "sample",
        "run={here}/unet prompt=x lora=",
        "lora: is empty; give the file of a LoRA, or leave",
    ),
    (
        "evaluate",
        "run={here}/unet lora=",
        "lora: is empty; give the file of a LoRA, or leave lora= o",
    ),
    (
        "synthesize",
        "prompts={here}/prompts.txt out=o guidance=inf",
        "guidance=inf: must be from 0 to 1000",
    ),
    (
        "synthesize",
        "teacher=shapes_edit prompts={here}/prompts.txt out=o",
        "teacher: a StableDiffusionInstructPix2PixPipeline reads pictures beside the caption, and",
    ),
    (
        "evaluate",
        "run={here}/unet metrics.guidance=nan",
        "metrics.guidance=nan: must be from 0 to 1000",
    ),
    (
        "run",
        "experiment=inpaint_shapes data.masks=false",
        "these data have no masks; give data.masks=true",
    ),
    (
        "run",
        "teacher=shapes_inpaint",
        (
            "data: a StableDiffusionInpaintPipeline fills masked parts of pictures, and these data"
            " have no masks; use experiment=inpaint_shapes without data=, which has data of shapes,"
            " or use data=images data.masks=true data.path=<folder>"
        ),
    ),
    ("run", "data=renders data.masks=true", "data.masks=True: are for an inpainting model, and a "),
    ("run", "experiment=inpaint_shapes teacher=shapes", "false, or choose teacher=shapes_inpaint"),
    (
        "run",
        "experiment=edit_shapes teacher=shapes metrics=shapes",
        (
            "data.reader._target_=distill.worlds.shapes.scenes.Edits: edit pairs are for a model"
            " that edits, and a StableDiffusion3Pipeline is a text-to-image model; choose"
            " teacher=shapes_edit"
        ),
    ),
    (
        "run",
        "method.distill.image_guidance=1.5",
        (
            "method.distill.image_guidance=1.5: is for a teacher that edits, and a"
            " StableDiffusion3Pipeline does not; set it to 1, or choose teacher=shapes_edit"
        ),
    ),
    (
        "run",
        "experiment=inpaint_shapes method=nitrofusion method.pairs_weight=0.5",
        (
            "method.pairs_weight=0.5: a regression needs the noise that each sample was made from,"
            " and these data do not have it; use data=synthetic, or latents by their seeds with"
            " data.seeded=true, or make it 0"
        ),
    ),
    ("run", "method=dmd2 data=renders method.regression_weight=1", "regression_weight=1: a regr"),
    ("run", "student=lora student.targets=[]", "student.targets=[]: names no layer, so nothing"),
    ("run", "method=regression data=renders", "method: a regression needs the noise that each"),
    ("run", "method=nitrofusion teacher=shapes_unet data.seeded=false", "method.pairs_weight=1.0:"),
    (
        "run",
        "experiment=inpaint_shapes method.distill.image_guidance=2",
        "method.distill.image_guidance=2: is for a teacher that edits, and a StableDiffusionInp",
    ),
    (
        "run",
        "teacher=shapes_edit",
        (
            "data: a StableDiffusionInstructPix2PixPipeline edits pictures, and these data have no"
            " source pictures (they are shapes:latents); use experiment=edit_shapes without"
            " data=, which has data of shapes, or give edit pairs by data=pairs data.path=<shards>"
        ),
    ),
    (
        "run",
        "teacher=shapes_edit data=renders",
        (
            "data.reader._target_=distill.worlds.shapes.scenes.Scenes: a StableDiffusionInstructPix"
            "2PixPipeline edits pictures, and these data have no source pictures; make it"
            " distill.worlds.shapes.scenes.Edits, or give edit pairs by data=pairs data.path=<shar"
        ),
    ),
    (
        "run",
        "teacher=shapes_edit data=pairs data.path={here}/edits.tar data.size=64",
        "teacher edits pictures; use metrics=shapes_edit, or ~metrics to train without",
    ),
    (
        "run",
        "teacher=shapes_edit data=latents data.path={here}/cached.tar",
        "cached.tar: this teacher edits, and these latents have no source pictures; make them by d",
    ),
    ("run", "data=latents data.path={here}/of_edits", "this teacher does not edit; choose one tha"),
    (
        "run",
        "experiment=edit_shapes data=pairs data.path={here}/winners.tar",
        "winners.tar: none of its 1 samples has a source picture; an edit pair is <key>.source.png",
    ),
    (
        "run",
        "experiment=edit_shapes data=pairs data.path={here}/pictures",
        "pictures: none of its 1 samples has a source picture; an edit pair is <key>.source.png",
    ),
    ("run", "metrics=shapes_edit", "metrics=shapes_edit: this teacher does not edit pictures; use"),
    ("run", "metrics=shapes_fill", "this teacher is no inpainting model; metrics.blend=true fills"),
    (
        "run",
        "experiment=edit_shapes metrics=prompts metrics.path={here}/prompts.txt",
        "metrics: they make whole pictures from captions, and this teacher edits pictures; leave",
    ),
    # what a method, its data and its teacher can never be together
    (
        "run",
        "experiment=edit_shapes data=preference data.path={here}/winners.tar",
        "which this method does not read; give edit pairs by data=pairs data.path=<shards>",
    ),
    (
        "run",
        "experiment=inpaint_shapes data=preference data.path={here}/winners.tar",
        "which this method does not read; use data=images data.masks=true data.path=<folder>",
    ),
    (
        "run",
        "data=preference data.path={here}/winners.tar",
        "use method=dpo sampler=guided, or give pictures by data=images data.path=<folder>",
    ),
    (
        "run",
        "experiment=edit_shapes method=dpo",
        (
            "teacher: a StableDiffusionInstructPix2PixPipeline edits pictures, and pairs of a"
            " preference have no such picture; choose a text-to-image model, as in"
            " experiment=dpo_lora_shapes"
        ),
    ),
    (
        "run",
        "experiment=inpaint_shapes method=dpo",
        "no such picture; choose a text-to-image model, as in experiment=dpo_lora_shapes",
    ),
    (
        "run",
        "experiment=edit_shapes data=prompts data.path={here}/prompts.txt",
        "have no source pictures; give edit pairs by data=pairs data.path=<shards>",
    ),
    (
        "run",
        "experiment=inpaint_shapes data=prompts data.path={here}/prompts.txt",
        "these data have no masks; use data=images data.masks=true data.path=<folder>",
    ),
    ("run", "experiment=edit_shapes method=dmd2", "such key; leave it out by ~method.distill"),
    ("run", "experiment=dpo_lora_shapes student=full data.path=x", "leave it out by ~student.rank"),
    (
        "sample",
        "run={here}/editor prompt=x image={here}/picture.png image_guidance=1.5",
        "/editor was distilled to work without guidance; leave it out",
    ),
    ("sample", "run=shapes:student prompt=x negative=y", "to work without guidance; leave it out"),
    (
        "sample",
        "run=shapes:unet_edit prompt=x image={here}/picture.png image_guidance=1.5",
        "image_guidance=1.5: has no effect without guidance; add guidance=",
    ),
    ("export", "run=shapes:unet_edit to=web", "which also reads a picture, and only a caption is"),
    ("export", "run=shapes:unet to=web", "was not distilled to few steps, and has no sampler to"),
    ("demo", "run=shapes:unet_edit", "edits pictures, and the demonstration makes whole ones; use"),
    ("demo", "run=shapes:unet teacher=shapes:unet_inpaint", "teacher=shapes:unet_inpaint: fills"),
    ("demo", "run=shapes:unet guidance=nan", "guidance=nan: must be from 1 to 1000"),
    (
        "evaluate",
        "run=shapes:unet_edit metrics=prompts metrics.path={here}/prompts.txt",
        "edits pictures, and this evaluation makes whole ones; use the sample command with image=",
    ),
    (
        "sample",
        "run=shapes:unet_edit prompt=x image={here}/picture.png strength=0.5",
        "strength=0.5: a model that edits starts at pure noise beside its picture; leave it out",
    ),
    ("compare", "runs=x votes_steps=2", "votes_steps=2: has no effect without votes; add votes=t"),
    ("compare", "runs=x votes=true votes_steps=true", "votes_steps=True: must be a whole number"),
    ("compare", "runs=x votes=[]", "votes=[]: is no file; give true, a votes.json, or a list"),
    (
        "compare",
        "runs=x votes=[a.json,./a.json]",
        "votes=a.json: is given twice, also as a.json, and a file is the votes of one person; nam",
    ),
    ("sample", "run={here} prompt=x size=[64]", "size=[64]: must be pixels a side"),
    ("sample", "run={here} prompt=x dtype=f99", "dtype=f99: must be a dtype of torch"),
    ("sample", "run={here} prompt=x image={here}/picture.png strength=2", "strength=2: must be ab"),
    ("evaluate", "run={here} steps=many", "steps=many: must be numbers of steps"),
    ("evaluate", "run={here} steps=1,x", "steps=1,x: has a comma; write steps=[1,x] for a list"),
    ("evaluate", "run={here} devices=0", "devices=0: must be a whole number, 1 or more"),
    ("synthesize", "prompts={here}/prompts.txt out=o steps=0", "steps=0: must be a whole number"),
    ("inspect", "run={here}/made levels=[2]", "levels=[2]: must lie in (0, 1]"),
    ("pretrain", "clip.steps=x", "clip.steps=x: must be a whole number"),
    ("pretrain", "data.size=20", "data.size=20: pictures may have 32 to 128 pixels a side"),
    # a place that cannot be written
    ("sample", "run={here}/unet prompt=x out={here}/picture.png/x", "picture.png is no folder, so"),
    ("evaluate", "run={here}/unet out={here}/picture.png/x", "picture.png is no folder, so"),
    ("export", "run={here}/unet to=diffusers out={here}/picture.png/x", "picture.png is no folder"),
    ("run", "run_dir={here}/picture.png/x", "picture.png is no folder, so nothing can be written"),
    ("search", "space=[x]", "space: 'x' is not key=log(low,high)"),
    ("search", "space=[]", "space=[]: has no range to search; give a list of them"),
    ("search", "space=seed", "space=seed: has no range to search; give a list of"),
    ("run", "method=add data.batch_size=9", "data.batch_size=9: the heads' local batch norm needs"),
    (
        "run",
        "method=add data.batch_size=9",
        "a multiple of 2, for groups of at most 8; use 8 or 16",
    ),
    ("inspect", "run={here}/add samples=17", "samples=17: the heads' local batch norm needs a mul"),
    ("run", "method.misaligned=1 data.batch_size=1", "data.batch_size=1: method.misaligned=1 giv"),
    (
        "run",
        "experiment=nitrofusion_shift_shapes method.warm_start=0",
        "student.shift=250: the studen",
    ),
    (
        "run",
        (
            "teacher.path={here}/eps teacher.zero_terminal_snr=true teacher=sd15"
            " data.path={here}/x.tar"
        ),
        "predicts eps",
    ),
    ("run", "optimizer.student.lr=inf", "optimizer.student.lr=inf: must be a finite number"),
    ("run", "method.distill.guidance=nan", "method.distill.guidance=nan: must be from 0 to 1000"),
    ("run", "optimizer.student.betas=[0.0,inf]", "student.betas[1]=inf: must be a finite number"),
    ("run", "discriminator.heads.kernel=2", "discriminator.heads.kernel=2: must be odd; use 3"),
    ("run", "discriminator.heads.width=0", "discriminator.heads.width=0: must be 1 or more"),
    ("run", "+discriminator.heads.projection=0", "heads.projection=0: must be 1 or more"),
    ("run", "seed=100000000000000000000", "seed=100000000000000000000: must be a whole number"),
    ("run", "seed=4294967296", "seed=4294967296: must be a whole number, 0 to 4294967295"),
    (
        "sample",
        "run={here} prompt=x seed=9223372036854775808",
        "must be a whole number below 2**63",
    ),
    # lists
    ("run", "trainer.devices=[]", "trainer.devices=[]: must be a number of devices, a list of"),
    ("run", "trainer.devices=[-1]", "trainer.devices=[-1]: must be a number of devices, a list"),
    ("run", "sampler.levels=[]", "sampler.levels=[]: must be levels above 0 and at most 1, one or"),
    ("run", "sampler.levels=[0.5,1]", "sampler.levels=[0.5, 1]: must fall from at most 1"),
    ("run", "method.levels.levels=[]", "method.levels.levels=[]: must be levels above 0"),
    ("run", "method=nitrofusion method.levels=[]", "method.levels=[]: is empty; give at least one"),
    (
        "run",
        "method=nitrofusion method.levels=[[1.0],[1.0,2.0]]",
        "method.levels[1]=[1.0, 2.0]: must be levels above 0 and at most 1",
    ),
    ("run", "method=nitrofusion discriminator.heads.levels=[]", "heads.levels=[]: must be levels"),
    ("run", "discriminator.features.taps=[]", "features.taps=[]: is empty; give at least one"),
    ("run", "discriminator.features.tasks=[]", "features.tasks=[]: is empty; give at least one"),
    ("run", "method=add discriminator.features.taps=[0,0]", "taps=[0, 0]: has a duplicate"),
    (
        "run",
        "method=add discriminator.features.std=[1,1,0]",
        "features.std=[1, 1, 0]: must be three numbers, of red, green and blue, each above 0",
    ),
    ("run", "method=add discriminator.features.mean=[1]", "features.mean=[1]: must be three num"),
    (
        "run",
        "method.distill.guidance=[8,1]",
        "method.distill.guidance=[8, 1]: must be a number, or",
    ),
    ("run", "callbacks.samples.prompts=[]", "callbacks.samples.prompts=[]: is empty; give a"),
    # parts and names that a run has
    ("run", "discriminator.heads=null", "discriminator.heads=null: features need heads"),
    ("run", "~discriminator.heads", "discriminator.heads=null: features need heads"),
    (
        "run",
        "callbacks.checkpoint.best=nope",
        "best=nope: names of logged values start with g/ or d/",
    ),
    (
        "run",
        "method=regression callbacks.checkpoint.best=d/accuracy",
        "best=d/accuracy: names of logged values start with g/; metrics.csv of a run has all names",
    ),
    (
        "run",
        "+callbacks.e={{_target_:lightning.pytorch.callbacks.EarlyStopping,monitor:nope}}",
        "callbacks.e.monitor=nope: callbacks of Lightning do not see the values that a run logs",
    ),
    (
        "run",
        "optimizer.student.betas=[0.9,1.0]",
        "optimizer.student.betas=[0.9, 1.0]: must be numbers from 0 to below 1",
    ),
    # words and names of keys
    ("run", "loop.schedule=cosin", "loop.schedule=cosin: must be constant or cosine"),
    (
        "run",
        "method.loss=hing",
        "method.loss=hing: must be hinge or non_saturating or relativistic",
    ),
    ("run", "trainer.max_step=3", "trainer.max_step: no such key"),
    ("run", "+loop.shedule=cosine", "takes no such key (did you mean schedule?)"),
    ("run", "+method.distil_weight=2", "takes no such key (did you mean distill_weight?)"),
    ("run", "+trainer.strategy=fsdp", "use trainer=fsdp2"),
    (
        "run",
        "trainer=ddp trainer.strategy.reduce_dtype=float16",
        "trainer.strategy.reduce_dtype=float16: must be float32 or bfloat16",
    ),
    (
        "run",
        "trainer=ddp trainer.strategy.bucket_mib=0",
        "trainer.strategy.bucket_mib=0: must be above 0",
    ),
    (
        "run",
        "trainer=fsdp2 trainer.strategy.replicas=0",
        "trainer.strategy.replicas=0: must be a whole number of at least 1",
    ),
    (
        "run",
        "trainer=fsdp2 trainer.devices=4 trainer.strategy.replicas=3",
        "trainer.strategy.replicas=3: must divide the number of processes, which is 4",
    ),
    ("run", "optimizer.student._target_=os.system", "os.system is refused"),
    ("run", "method=ladd discriminator=dino", "choose another discriminator="),
    ("run", "method=regression loop.head_start=5", "there is no discriminator to train first"),
    (
        "run",
        "student.init=zero",
        "student.init=zero: must be teacher, random, or a run or pipeline",
    ),
    ("run", "teacher=shape", "teacher=shape: no such option (did you mean shapes?)"),
    (
        "run",
        "logger=1",
        "logger=1: logger takes the name of one option, there is csv, default",
    ),
    ("run", "~sampler", "sampler: a run needs it; choose one by sampler=..."),
    (
        "run",
        "data=null",
        "data=null: a run needs it; choose one by data=..., there is imag",
    ),
    ("run", "student=none", "student=none: a run needs it; choose one by student=..., th"),
    (
        "run",
        "discriminator=null",
        "needs a discriminator of latents, and this one works on",
    ),
    ("run", "--method=ladd", "--method=ladd: a key has no dashes; write method=ladd"),
    ("run", "--foo", "--foo: no such flag (did you mean --info?); --help lists the flags"),
    (
        "run",
        "--cfg foo",
        "argument --cfg/-c: invalid choice: 'foo' (choose from 'job', 'hydra', 'all'",
    ),
    (
        "run",
        "--config-dir nope",
        "nope: there is no such folder; give the one that has experiment/",
    ),
    ("run", "+seed=1", "+seed: there is such a key already; leave the + out"),
    ("run", "trainer.max_steps=1,000", "write trainer.max_steps=[1,000] for a list, or add -m"),
    ("run", "trainer.max_steps=${{x}}", "trainer.max_steps=${x}: there is no key x; write"),
    (
        "run",
        "trainer.max_steps=${{",
        "${ is read as a reference to another key, and is none; write",
    ),
    (
        "run",
        "trainer.max_steps=${{a:b}}",
        "${ is read as a reference to another key, and is none; w",
    ),
    ("run", "method ladd", "method: is no key=value; put quotes around a value with spaces"),
    (
        "evaluate",
        "run={here}/unet metrics=null",
        "metrics=null: evaluate needs it; choose",
    ),
    ("evaluate", "run={here}/unet ~metrics", "~metrics: evaluate needs it; choose one by"),
    ("cache", "data=null", "data=null: cache needs it; choose one by data=..."),
    ("sample", "teacher=sdxl", "teacher=sdxl: sample has no such key; --help lists all"),
    ("sample", "run={here}/unet prompts=[1984]", "cannot be read as a list of texts; write ["),
    ("sample", "run={here}/no[x]=${{y}},z prompt=x", "/no[x]=${y},z: neither a finished run"),
    (
        "demo",
        "teacher=./nope",
        "teacher=./nope: neither a finished run (with a student/) nor a diff",
    ),
    ("inspect", "run=null", "run: not given; add run=... to the command"),
    ("pretrain", "data=null", "data=null: has keys of its own; name one of them, as data.path=..."),
    ("run", "~data", "data: a run needs it; choose one by data=..."),
    (
        "run",
        "~teacher",
        "~teacher: a run needs it; choose one by teacher=..., there is chroma",
    ),
    ("run", "~callbacks debug=smoke", "callbacks.samples: has no _target_; give one, or leave it"),
    ("run", "++teacher.dtype=float99", "teacher.dtype=float99: must be a dtype of torch"),
    ("doctor", "trainer.max_steps=abc", "trainer.max_steps=abc: must be a whole number"),
    ("doctor", "~data", "data: a run needs it"),
    ("export", "run={here} to=lorra", "(did you mean lora?)"),
    ("export", "run={here}/unet to=lora rank=x", "rank=x: must be a whole number, 1 or more"),
    ("export", "run={here}/unet to=lora naming=khoya", "naming=khoya: must be diffusers or kohya"),
    ("export", "run={here}/unet", "to=None delta=None: give run=<folder> to=diffusers|lora|"),
    (
        "export",
        "run={here}/unet to=diffusers rank=4",
        "rank=4: has no effect on to=diffusers, only on",
    ),
    ("export", "run={here}/unet to=single_file naming=kohya", "naming=kohya: has no effect on to="),
    (
        "export",
        "run={here}/unet to=delta dtype=float16",
        "dtype=float16: has no effect on to=delta",
    ),
    ("export", "run={here}/unet to=diffusers base={here}/unet", "/unet: has no effect on to=diff"),
    (
        "export",
        "run={here}/unet to=single_file out={here}",
        "is a folder, and to=single_file writes",
    ),
    (
        "export",
        "run={here}/unet to=delta",
        "does not say what its student was made from; add base=",
    ),
    ("export", "run={here}/unet to=hub", "repo=None: only to=hub takes repo=<owner>/"),
    ("export", "run={here}/unet to=hub repo=mine", "repo=mine: only to=hub takes repo="),
    ("export", "run={here}/unet to=diffusers repo=me/it", "repo=me/it: only to=hub takes"),
    (
        "export",
        "run=owner/name to=diffusers",
        "run=owner/name: is on the hub, and to=diffusers reads",
    ),
    ("export", "run={here}/unet to=diffusers out={here}", "is there already; remove it or name"),
    ("pretrain", "stages=[clp]", "stages: no stage 'clp' (did you mean clip?)"),
    ("pretrain", "clip.step=3", "clip.step: no such key (did you mean clip.steps?)"),
    (
        "search",
        'space=["seed=int(0,9)"] direction=up',
        "direction=up: must be maximize or minimize",
    ),
    ("run", "callbacks.samples.count=0", "callbacks.samples.count=0: must be a whole number, 1"),
    # data that were not given
    ("run", "teacher=sd3", "data: none given that teacher=sd3 can read; give pictures by `data="),
    ("run", "teacher=sdxl data=shapes", "data: none given that teacher=sdxl can read"),
    ("run", "teacher=flux debug=smoke data=shapes", "data: none given that teacher=flux can read"),
    (
        "run",
        "teacher=sd15 teacher.path=x.safetensors",
        (
            "`python -m distill.cache teacher=sd15 teacher.path=x.safetensors data.path=<folder> "
            "out=cached` as `data=latents data.path=cached`"
        ),
    ),
    (
        "run",
        "experiment=sd3_turbo",
        (
            "`python -m distill.synthesize teacher=sd3 prompts=<file> out=synthetic` as "
            "`data=synthetic data.path=synthetic`"
        ),
    ),
    ("run", "teacher=sd3 data=latents", "data.path: not given; add data.path=... to the command"),
    ("run", "callbacks.samples.prompts=nope.txt", "samples.prompts=nope.txt: no such file; check"),
    ("run", "method.levels.odds=[1]", "odds=[1]: must be 4 numbers, one for each of the levels"),
    ("run", "method.levels.warmup_odds=[0,0,0,0]", "method.levels.warmup_odds=[0, 0, 0, 0]: must"),
    ("run", "method.renoise.s=0", "method.renoise.s=0: must be finite and above 0"),
    (
        "run",
        "method=add method.distill.low=0.9 method.distill.high=0.1",
        "method.distill.low=0.9: must be below method.distill.high=0.1, and both above 0 and below",
    ),
    ("run", "method=nitrofusion method.refine=[1]", "method.refine=[1]: must rise from 0, at most"),
    (
        "run",
        "method=dmd2 method.matching.low=0.5 method.matching.high=0.5",
        "method.matching.low=0.5: must be below method.matching.high=0.5",
    ),
    ("run", f"{PAIRED} method.beta=0", "method.beta=0: must be above 0"),
    (
        "run",
        f"{PAIRED} method.times.low=1",
        "method.times.low=1: must be below method.times.high=1",
    ),
    ("run", MASKED + "{{boxes:-1}}", "data.masks.boxes=-1: must be a number, 0 or more"),
    ("run", MASKED + "{{boxes:0}}", "data.masks: all odds are 0; give at least one kind"),
    ("run", MASKED + "{{oval:1}}", "data.masks.oval: there is no such kind; there are boxes, "),
    (
        "run",
        "data=images data.path=nope data.buckets=[[64,64],[64,64]]",
        "data.buckets=[[64, 64], [64, 64]]: has [64, 64] twice; name each size once",
    ),
    ("run", f"{MADE}[[64,64],[64,64]]", "method.real.buckets=[[64, 64], [64, 64]]: has [64, 64]"),
    ("run", f"{MADE}[[64,60]]", "method.real.buckets: [64, 60] must be multiples of 8 for this"),
    # models that read pictures beside the caption, and pairs
    ("run", EDITOR, "can read; give edit pairs by `data=pairs data.path=<shards>`; debug=smoke"),
    ("run", "method=ladd teacher=sd_inpaint", "by `data=images data.masks=true data.path=<folder>"),
    (
        "run",
        "method=dpo sampler=guided teacher=sd15",
        "give pairs of a winner and a loser by `data=preference data.path=<shards>`",
    ),
    ("run", f"{EDITOR} data=pairs data.path=no.tar", "data.path=no.tar: no such file or folder;"),
    ("check", "data=pairs data.path=no.tar", "data.path=no.tar: no such file or folder; check"),
    (
        "run",
        "method=dpo sampler=guided teacher=instruct_pix2pix data=preference data.path={here}/x.tar",
        "teacher: a StableDiffusionInstructPix2PixPipeline edits pictures, and pairs of a pref",
    ),
    (
        "run",
        "method=dpo sampler=guided teacher=instruct_pix2pix data=pairs data.path={here}/x.tar",
        "no such picture; choose a text-to-image model, as in experiment=dpo_sdxl",
    ),
    (
        "run",
        "method=dpo sampler=guided data=preference data.path={here}/small_pair.tar data.size=60",
        "data.size=60: must be a multiple of 8 for this teacher; use 56 or 64",
    ),
    ("cache", "teacher=sd_inpaint data.path={here} out=o", "reads masks, which are drawn on pictu"),
    ("sample", "run=shapes:mmdit prompt=x size=60", "size=60: must be a multiple of 8 for this"),
    (
        "sample",
        "run=shapes:mmdit prompt=x image={here}/x.tar",
        "x.tar: cannot be read as a picture (",
    ),
    # data of another kind, and first samples that are all bad
    (
        "run",
        f"{PREFERRED}edits.tar",
        "edits.tar: none of its 1 samples has a winner; a pair is <key>.winner.png, <key>.loser.pn",
    ),
    ("run", f"{PREFERRED}cached.tar", "cached.tar: none of its 1 samples has a winner; a pair is "),
    ("run", f"{PREFERRED}pictures", "is a folder of pictures, and pairs are read from shards; wri"),
    (
        "run",
        f"{PREFERRED}small_pair.tar",
        "data.size=null: data.path={here}/small_pair.tar holds pictures; give their side in pixels",
    ),
    (
        "run",
        f"{PREFERRED}small_pair.tar data.size=64",
        "small_pair.tar: none of its first 1 samples is usable, {here}/small_pair.tar:a: its image"
        " is 8 x 8, under half of data.size=64; remove it, or make that 16",
    ),
    (
        "run",
        "experiment=dpo_sdxl data.path={here}/small_pair.tar",
        "small_pair.tar:a: its image is 8 x 8, under half of data.size=1024; remove it, or make th",
    ),
    (
        "run",
        "experiment=edit_shapes data=pairs data.path={here}/small_edit.tar",
        "data.path={here}/small_edit.tar: none of its first 1 samples is usable, {here}/small_edit"
        ".tar:a: its image is 8 x 8, under half of data.size=64; remove it, or make that 16",
    ),
    (
        "run",
        "experiment=edit_shapes data=pairs data.path={here}/damaged_edit.tar",
        "damaged_edit.tar:a: its .source.png does not decode (it is empty, of 0 bytes)",
    ),
    (
        "run",
        "experiment=edit_shapes data=pairs data.path={here}/cached.tar",
        "has a source picture; read cached latents by data=latents",
    ),
    (
        "run",
        "experiment=edit_shapes data=pairs data.path={here}/uncaptioned_edit.tar",
        "1 of 1 pictures have no caption, a for one; give each a .txt or .caption or .json of its "
        "name, or take them so by data.max_empty_share=1",
    ),
    (
        "run",
        "experiment=edit_shapes data=synthetic data.path={here}/of_edits",
        "of_edits: holds pictures, of which no noise is known; use data=latents",
    ),
    ("run", "data=latents data.path={here}/edits.tar", "has latents; read these by data=pairs"),
    ("run", "data=latents data.path={here}/winners.tar", "latents; read these by data=preference"),
    (
        "run",
        "data=latents data.path={here}/cached.tar",
        "its .latent.npy does not decode (it is em",
    ),
    (
        "run",
        "data=images data.path={here}/edits.tar data.size=64",
        "; read edit pairs by data=pairs",
    ),
    (
        "run",
        BARE,
        "pictures:a.png: its image is 8 x 8, under half of data.size=64; remove it, or make that",
    ),
    (
        "run",
        f"{BARE} data.buckets=[[32,64],[64,32]]",
        "its image is 8 x 8, under half of 32 x 64, the nearest of data.buckets; remove it, or add",
    ),
    (
        "cache",
        "data.path={here}/pictures data.max_empty_share=1 data.size=64 out=o",
        "pictures:a.png: its image is 8 x 8, under half of data.size=64; remove it, or make that 1",
    ),
    (
        "cache",
        "teacher=sdxl data.path={here} data.size=65 out=o",
        "65: must be a multiple of 8 for",
    ),
    (
        "cache",
        "data.path={here}/pictures data.masks=true out=o",
        "data.masks=True: masks are drawn while a model trains, and cached latents have none; make"
        " it false, or train by data=images data.masks=true",
    ),
    (
        "run",
        "data=renders data.pairs=true",
        "data.pairs=True: adds losers, which this method does not read; make it false, or choose m"
        "ethod=dpo sampler=guided",
    ),
    ("run", "teacher=shapes_inpaint data=renders", "have no masks; give data.masks=true"),
    (
        "check",
        "data.path={here} data.size=null data.buckets=[[64,64]]",
        "data.size=null: must be pixels a side; leave it out, also with data.buckets, which replac",
    ),
    ("run", "data=images data.path={here} data.size=null", "data.size=null: must be pixels a side"),
    (
        "run",
        "data=renders data.size=100000 teacher=shapes_unet",
        "is 10000 million pixels, and at m",
    ),
    # what a model makes
    (
        "sample",
        "run=shapes:unet prompt=x guidance=2 size=100000",
        "size=100000: is 10000 million pixels, and at most 67 million are made; make it smaller",
    ),
    (
        "sample",
        "run=shapes:unet_inpaint prompt=x guidance=2 image={here}/wide.png mask={here}/left.png",
        "left.png: its white lies outside of the crop of the picture to 64x64; give size=[width,he",
    ),
    (
        "evaluate",
        "run=shapes:unet metrics=prompts metrics.path={here}/four.txt",
        "run=shapes:unet: was not distilled to few steps; add steps=28 or the like",
    ),
    (
        "sample",
        "run=shapes:student prompt=x lora={here}/full.safetensors",
        "full.safetensors: holds no LoRA, only ['foo.weight']; give a LoRA",
    ),
    (
        "evaluate",
        "run=shapes:student lora={here}/damaged.safetensors",
        "damaged.safetensors: cannot be read as weights (",
    ),
    (
        "sample",
        "run=shapes:student prompt=x lora={here}/picture.png",
        "picture.png: is no file of weights; give one, as .safetensors",
    ),
    # folders and files
    ("run", "resume=nothing", "resume=nothing: not a run folder (it has no config.yaml)"),
    ("run", "resume={here}/made", "/made: has no checkpoint to resume from"),
    ("run", "run_dir={here}/made", "/made holds a run already; choose another run_dir="),
    ("run", "teacher.path=./nope", "teacher.path=./nope: no such folder"),
    ("run", "teacher.path={here}", "not a diffusers pipeline folder (it has no model_index.json)"),
    ("run", "teacher.path={here}/unet", "holds a StableDiffusionPipeline, but this teacher reads"),
    ("run", "++teacher.weights=nope.safetensors", "teacher.weights=nope.safetensors: no such file"),
    ("run", "method=LADD", "method=LADD: no such option (did you mean ladd?)"),
    ("sample", "run=shapes:studen prompt=x", "run=shapes:studen: nothing of this name is shipped"),
    (
        "export",
        "base=shapes:nope delta=x out=o",
        "base=shapes:nope: nothing of this name is shipped",
    ),
    ("run", "metrics=prompts metrics.path=shapes:x", "metrics.path=shapes:x: nothing of this name"),
    ("run", "student.init=shapes:x", "student.init=shapes:x: nothing of this name is shipped"),
    ("run", "data.path=nope", "data.path=nope: no such file or folder; check the path"),
    ("run", "data=images data.path={here}/made", "has neither .tar shards nor images"),
    ("run", "data=prompts data.path=nope.txt", "data.path=nope.txt: no such file; check"),
    ("run", "metrics=coco5k metrics.path={here}", "cannot read annotations/captions_val2017.json"),
    ("run", "discriminator.features.path=./no method=add", "features.path=./no: no such folder"),
    ("sample", "run={here} prompt=???", "prompt=???: ??? stands for a missing value"),
    ("sample", "run={here} prompt='???'", "prompt='???': ??? stands for a missing"),
    (
        "sample",
        "run={here}/unet prompt=x out={here}/mine",
        "holds a grid.png that this command did not write",
    ),
    (
        "compare",
        "runs=nope out={here}/mine",
        "/mine: holds a compare.csv that this command did not write",
    ),
    (
        "evaluate",
        "run={here}/unet out={here}/mine",
        "holds a report.html that this command did not write",
    ),
    ("sample", "run=nope prompt=x", "run=nope: neither a finished run (with a student/) nor a"),
    ("sample", "run={here}/other prompt=x", "holds a WuerstchenPipeline; known are "),
    ("sample", "run={here}", "prompt: not given"),
    ("sample", "run={here} prompts=nope.txt", "prompts=nope.txt: no such file; check the path"),
    ("sample", "run={here} prompt=x image=nope.png", "image=nope.png: no such file"),
    ("evaluate", "run=nope", "run=nope: neither a finished run (with a student/) nor a diffusers"),
    ("evaluate", "run={here}/unet metrics=prompts metrics.path=nope", "metrics.path=nope: no"),
    ("compare", "runs=nope", "runs=nope: no runs"),
    ("inspect", "run=nope", "run=nope: not a run folder (it has no config.yaml)"),
    ("inspect", "run={here}/made", "was trained without a discriminator; name another run"),
    ("export", "run=nope", "run=nope: neither a finished run (with a student/) nor a diffusers"),
    ("export", "base=nope delta={here}/prompts.txt", "base=nope: neither a finished run"),
    ("export", "base={here}/unet delta=nope", "delta=nope: no such file"),
    ("export", "run={here}/unet to=lora", "has no adapters (student=lora)"),
    ("check", "data.path=nope", "data.path=nope: no such file or folder; check the path"),
    ("cache", "data.path=nope out=o", "data.path=nope: no such file or folder; check the path"),
    ("cache", "data=latents data.path=nope out=o", "only pictures can be encoded"),
    ("cache", "teacher.path=./nope data.path={here} out=o", "teacher.path=./nope: no such folder"),
    ("synthesize", f"{SIZED}[[64,64],[64,64]]", "buckets=[[64, 64], [64, 64]]: has [64, 64] twice"),
    (
        "synthesize",
        f"{SIZED}[[64,60]]",
        "buckets: [64, 60] must be multiples of 8 for this teacher",
    ),
    (
        "synthesize",
        "prompts={here}/prompts.txt out=o size=60",
        "size=60: must be a multiple of 8 for this teacher",
    ),
    # beyond the positions of SD3's kind
    ("run", f"{MADE}[[64,64],[96,64]]", "buckets: [96, 64] must be at most 64 for this teacher; "),
    (
        "check",
        "data=images data.path={here} data.size=128 teacher=shapes",
        "data.size=128: must be at most 64 for this teacher; use 64",
    ),
    (
        "synthesize",
        "prompts={here}/prompts.txt out=o size=[128,60]",
        "size=[128, 60]: must be multiples of 8 for this teacher; use [64, 56]",
    ),
    ("sample", "run=shapes:mmdit prompt=x size=[72,64]", "size=[72, 64]: must be at most 64 for "),
    ("run", "metrics.size=128", "metrics.size=128: must be at most 64 for this teacher; use 64"),
    ("run", "metrics.size=60", "metrics.size=60: must be a multiple of 8 for this teacher; use 56"),
    ("evaluate", "run=shapes:mmdit metrics.size=[96,64]", "metrics.size=[96, 64]: must be at most"),
    ("synthesize", "prompts=nope.tsv out=o", "prompts=nope.tsv: no such file; check the path"),
    ("synthesize", "prompts=nope out=o", "prompts=nope: no such file; check the path"),
    ("synthesize", "prompts={here}/prompts.txt out=o teacher.path=./no", "./no: no such folder"),
    ("synthesize", "prompts={here}/prompts.txt out={here}", "not made by this command"),
    ("pretrain", "data.path=nope", "data.path=nope: no such file or folder; check the path"),
    ("pretrain", "parts=./nope", "parts=./nope: no such folder"),
]
HEAVY = ("torch", "lightning", "diffusers", "transformers")

# Runs every command of stdin in one process, and prints [exit code, stderr, heavy libraries that
# are there] of each.
DRIVER = """
import contextlib, importlib, io, json, sys
heavy, found = json.loads(sys.argv[1]), []
for name, *arguments in json.load(sys.stdin):
    sys.argv, said, code = [f"distill.{name}", *arguments], io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            importlib.import_module(f"distill.{name}").main()
        except SystemExit as stop:
            code = stop.code
    found.append([code, said.getvalue(), [library for library in heavy if library in sys.modules]])
print(json.dumps(found))
"""


def prepared(here: Path) -> Path:
    """Prompts, a picture, a shard, pipeline folders that hold nothing, and a run without
    checkpoints.
    """
    (here / "prompts.txt").write_text("a red star\n", encoding="utf-8")
    Image.new("L", (8, 8)).save(here / "picture.png")
    (here / "x.tar").write_bytes(b"")
    for name, kind in {"unet": "StableDiffusionPipeline", "other": "WuerstchenPipeline"}.items():
        (here / name).mkdir()
        (here / name / "model_index.json").write_text(
            json.dumps({"_class_name": kind}), encoding="utf-8"
        )
    (here / "editor" / "scheduler").mkdir(parents=True)  # a student
    (here / "editor" / "scheduler" / "scheduler_config.json").write_text("{}", encoding="utf-8")
    editor = {"_class_name": "StableDiffusionInstructPix2PixPipeline"}
    (here / "editor" / "model_index.json").write_text(
        json.dumps({**editor, "_distill": {"sampler": {"name": "Consistency"}}}), encoding="utf-8"
    )
    put_tar(here / "edits.tar", dict.fromkeys(("a.source.png", "a.target.png", "a.txt"), b""))
    put_tar(here / "winners.tar", dict.fromkeys(("a.winner.png", "a.loser.png"), b""))
    put_tar(here / "cached.tar", {"a.latent.npy": b"", "a.txt": b"x"})
    picture = (here / "picture.png").read_bytes()  # 8 x 8
    for name, sides in {"edit": ("source", "target"), "pair": ("winner", "loser")}.items():
        files = {f"a.{side}.png": picture for side in sides}
        put_tar(here / f"small_{name}.tar", {**files, "a.txt": b"x"})
        put_tar(here / f"uncaptioned_{name}.tar", files)
        put_tar(here / f"damaged_{name}.tar", {**dict.fromkeys(files, b""), "a.txt": b"x"})
    (here / "four.txt").write_text("a red star\n" * 4, encoding="utf-8")
    wide = Image.new("L", (96, 64))
    wide.save(here / "wide.png")
    wide.paste(255, (0, 0, 8, 64))
    wide.save(here / "left.png")
    save_file({"foo.weight": np.zeros(2, np.float32)}, here / "full.safetensors")
    (here / "damaged.safetensors").write_bytes(b"not weights")
    put_tar(here / "of_edits" / "x.tar", {"a.latent.npy": b""})
    (here / "of_edits" / "manifest.json").write_text(
        json.dumps({"what": EDIT_PAIRS}), encoding="utf-8"
    )
    (here / "pictures").mkdir()
    Image.new("L", (8, 8)).save(here / "pictures" / "a.png")
    (here / "eps" / "scheduler").mkdir(parents=True)
    (here / "eps" / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline"}), encoding="utf-8"
    )
    (here / "eps" / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"prediction_type": "epsilon"}), encoding="utf-8"
    )
    (here / "mine").mkdir()
    for name in ("grid.png", "compare.csv", "report.html"):
        (here / "mine" / name).write_text("of the user's own", encoding="utf-8")
    (here / "add").mkdir()
    target = "distill.discriminators.stylegan_t.StyleGANTHeads"
    (here / "add" / "config.yaml").write_text(
        f"discriminator: {{features: {{}}, heads: {{_target_: {target}}}}}\n", encoding="utf-8"
    )
    (here / "made").mkdir()
    (here / "made" / "config.yaml").write_text(
        "discriminator: {features: null}\n", encoding="utf-8"
    )
    return here


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> tuple[str, list]:
    """A folder, and what was answered to each of WRONG, by one process, in a folder of its own;
    that nothing was made there.
    """
    here, elsewhere = (tmp_path_factory.mktemp(name) for name in ("here", "elsewhere"))
    prepared(here)
    commands = [[name, *words.format(here=here).split()] for name, words, _ in WRONG]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(HEAVY)],
        input=json.dumps(commands),
        cwd=elsewhere,
        env={**os.environ, "HYDRA_FULL_ERROR": "0"},
        capture_output=True,
        text=True,
        timeout=600,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert not list(elsewhere.iterdir())
    return str(here), json.loads(done.stdout)


@pytest.mark.parametrize("i", range(len(WRONG)), ids=[f"{n} {words}" for n, words, _ in WRONG])
def test_a_mistake_is_named_and_nothing_heavy_is_imported(i, answers):
    here, (code, err, heavy) = answers[0], answers[1][i]
    assert code == 1, err
    assert err.startswith("distill: "), err
    assert err.count("\n") == 1, err
    assert WRONG[i][2].replace("{here}", here) in err
    assert not heavy


def test_the_words_of_a_signature_are_those_that_the_class_knows():
    """Literals that the check reads stand beside tables that the code reads: they must say the
    same.
    """
    from distill.config import signatures
    from distill.core import losses
    from distill.core import score_distillation as distillation
    from distill.students import lora
    from distill.worlds.shapes.pretraining.asked import ORDER
    from distill.worlds.shapes.pretraining.stages import STAGES

    def words(target: str, key: str) -> list[str]:
        return signatures.options(signatures.signature(target), key)

    kinds = words("distill.core.score_distillation.ScoreDistillation", "kind")
    assert tuple(kinds) == distillation.KINDS
    for method in ("ladd.LADD", "add.ADD", "nitrofusion.NitroFusion"):
        assert words(f"distill.methods.{method}", "loss") == [loss.name for loss in losses.LOSSES]
        assert words(f"distill.methods.{method}", "over_heads") == ["mean", "sum"]
    assert words("distill.students.lora.lora", "init") == list(lora.INITS)
    assert list(STAGES) == list(ORDER)
