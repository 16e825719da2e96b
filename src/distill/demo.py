"""Open a page where pictures change as you type: the student's beside the teacher's.

    python -m distill.demo
    python -m distill.demo run=runs/... teacher_steps=50
    python -m distill.demo run=stabilityai/sdxl-turbo dtype=bfloat16

It needs gradio, which `make demo` installs.
"""

from __future__ import annotations

import importlib.util
import socket
import threading
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from distill.config import picture_keys, validate
from distill.config.compose import check_counts, config_of
from distill.config.errors import command
from distill.config.videos import refuse_videos
from distill.core.limits import check_guidance_scale
from distill.machine import signals

HOST = "127.0.0.1"  # not the network: every visitor of the page uses this machine's models
COUNTS = {"seed": 0, "count": 1, "teacher_steps": 1, "port": 0}


def serve(cfg: DictConfig) -> None:
    """Load the models, open the page, and wait for Ctrl-C."""
    _check(cfg)
    port = _port(cfg.port)
    address = f"http://{HOST}:{port}"
    print(f"loading {cfg.run}; the page will be at {address}", flush=True)
    from distill.demonstration.generation import Models

    models = Models.load(cfg.run, cfg.teacher, size=cfg.size, dtype=cfg.dtype)
    models.warm_up()
    from distill.demonstration.page import Page
    from distill.demonstration.worker import Worker

    worker = Worker()
    page = Page(models, worker, cfg)
    page.launch(HOST, port, open_browser=cfg.open)
    ended = _end_event()
    print(f"the page is at {address}; Ctrl-C ends it", flush=True)
    while not ended.wait(1):  # short waits: Windows handles Ctrl-C only between them
        pass
    page.close()
    worker.close()
    print(f"\n{worker.requests} requests, {worker.dropped} of them dropped for newer ones")


def _end_event() -> threading.Event:
    """An event that a signal sets from now on, to close the page."""
    ended = threading.Event()

    def on_signal(number: int, _frame: Any) -> None:
        signals.mark_handled(number)  # a second Ctrl-C does not wait for the current picture
        ended.set()

    signals.set_handlers(on_signal)
    return ended


def _check(cfg: DictConfig) -> None:
    """Raise ValueError or OSError for wrong settings, before anything slow is imported."""
    if importlib.util.find_spec("gradio") is None:
        what = "the page needs gradio, which is not installed"
        raise ValueError(f"{what}; use `make demo`, or pip install gradio")
    check_counts(cfg, COUNTS)
    validate.check_model(cfg.run)
    picture_keys.refuse_readers(cfg.run, "the demonstration")
    refuse_videos(cfg.run, "the demonstration")
    if cfg.teacher is not None:
        validate.check_model(cfg.teacher, "teacher")
        picture_keys.refuse_readers(cfg.teacher, "the demonstration", "teacher")
    else:
        config_of(cfg.run, "teacher")
    steps = cfg.steps if isinstance(cfg.steps, ListConfig) else [cfg.steps]
    if not steps or any(type(n) is not int or n < 1 for n in steps):
        raise ValueError(f"steps={cfg.steps}: must be numbers of steps, [1,2,4] or the like")
    if not isinstance(cfg.strength, (int, float)) or not 0 < cfg.strength <= 1:
        raise ValueError(f"strength={cfg.strength}: must be above 0 and at most 1")
    check_guidance_scale(cfg.guidance, "guidance", least=1)
    if not isinstance(cfg.open, bool):
        raise ValueError(f"open={cfg.open}: must be true or false")


def _port(wanted: int) -> int:
    """This port, or a free one for 0. Raises ValueError if it cannot be used."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, wanted))
        except (OSError, OverflowError):
            raise ValueError(
                f"port={wanted}: is in use or not allowed; choose another, or port=0 for any"
            ) from None
        return probe.getsockname()[1]


def _as_path(cfg: DictConfig) -> DictConfig:
    """Turn the teacher, which the command line gives as a node, into a path: see
    commandline/quoting.py.
    """
    if isinstance(cfg.teacher, DictConfig):
        plain: Any = OmegaConf.to_container(cfg)  # keeps escaped text as it is
        cfg.teacher = plain["teacher"]["path"]
    return cfg


@command("demo", prepare=_as_path)
def main(cfg: DictConfig) -> None:
    serve(cfg)


if __name__ == "__main__":
    main()
