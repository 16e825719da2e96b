"""Processes that cost their work alone: each is a fork of one that has imported everything.

`python tests/forks.py` is that one. It reads tasks from stdin, one a line, and does each in a fork
with its own environment, folder and streams, which ends as any other process does. It has trained
and drawn nothing itself. To import torch, Lightning and diffusers takes longer than most tasks.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

LATER = (  # what is imported first while a task runs
    *("kills", "distributed_worker", "communication_worker", "matplotlib.pyplot"),
    *("torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.utils.data"),
    *("distill.training.rank_process", "distill.training.strategies", "distill.doctor"),
)


class Fork:
    """A process that was begun; as much of `subprocess.Popen` as the tests need."""

    def __init__(self, forks: Forks, pid: int, out: Path | None, err: Path | None) -> None:
        self.forks, self.pid, self.out, self.err = forks, pid, out, err

    def poll(self) -> int | None:
        self.forks.listen(0.0)
        return self.forks.codes.get(self.pid)

    def wait(self, timeout: float) -> int:
        until = time.monotonic() + timeout
        while (code := self.forks.codes.get(self.pid)) is None:
            if time.monotonic() > until:
                self.send_signal(signal.SIGKILL)
                raise subprocess.TimeoutExpired(f"fork {self.pid}", timeout)
            self.forks.listen(1.0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def said(self, stream: str = "err") -> str:
        file: Path = getattr(self, stream)
        return file.read_text(encoding="utf-8", errors="replace")


class Forks:
    """Begins tasks in forks of one process, which is started for the first of them."""

    def __init__(self) -> None:
        self.server: subprocess.Popen[str] | None = None
        self.codes: dict[int, int] = {}
        self.unread = b""

    def begin(
        self, call: str, *arguments: Any, environment: Mapping[str, str] | None = None,
        folder: Path | None = None, out: Path | None = None, err: Path | None = None,
    ) -> Fork:  # fmt: skip
        """Call "module:function" with arguments that JSON can say.

        The task has this process's environment, or the one that is given. What it prints goes into
        the files `out` and `err`.
        """
        task = {
            "call": call,
            "arguments": arguments,
            "environment": dict(os.environ if environment is None else environment),
            "folder": str(folder or Path.cwd()),
            "streams": [str(file or os.devnull) for file in (out, err)],
        }
        server = self._started()
        assert server.stdin is not None
        server.stdin.write(json.dumps(task) + "\n")
        server.stdin.flush()
        self.begun: int | None = None
        while self.begun is None:
            self.listen(60.0)
        return Fork(self, self.begun, out, err)

    def command(self, name: str, words: list[str], **how: Any) -> Fork:
        """Begin `python -m distill.<name> word ...`."""
        return self.begin("forks:command", name, words, **how)

    def script(self, code: str, *words: object, **how: Any) -> Fork:
        """Begin `python -c <code> word ...`."""
        return self.begin("forks:script", code, [str(word) for word in words], **how)

    def listen(self, seconds: float) -> None:
        """Take what the server says within so many seconds."""
        server = self._started()
        assert server.stdout is not None
        pipe = server.stdout.fileno()
        # Not by readline: it takes several lines at once from the pipe, and `select` would not tell
        # of those that it keeps.
        while select.select([pipe], [], [], seconds)[0]:
            found = os.read(pipe, 65536)
            assert found, f"the server of forks has ended with {server.wait()}"
            *lines, self.unread = (self.unread + found).split(b"\n")
            for kind, *numbers in (line.split() for line in lines):
                if kind == b"begun":
                    self.begun = int(numbers[0])
                else:
                    self.codes[int(numbers[0])] = int(numbers[1])
            seconds = 0.0

    def _started(self) -> subprocess.Popen[str]:
        if self.server is None:
            here = str(Path(__file__).parent)
            paths = [here, os.environ.get("PYTHONPATH", "")]
            known = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
            self.server = subprocess.Popen(
                [sys.executable, __file__],
                env={**os.environ, **known},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1,
                text=True, encoding="utf-8", start_new_session=True,
            )  # fmt: skip
        return self.server

    def end(self) -> None:
        if self.server is not None:
            assert self.server.stdin is not None
            self.server.stdin.close()
            self.server.wait(timeout=60)
            self.server = None


@functools.cache
def shared() -> Forks:
    """Those of this session."""
    made = Forks()
    atexit.register(made.end)
    return made


# -- in the server and its forks -------------------------------------------------------------------


def command(name: str, words: list[str]) -> None:
    sys.argv = [f"distill.{name}", *words]
    importlib.import_module(f"distill.{name}").main()


def script(code: str, words: list[str]) -> None:
    sys.argv = ["-c", *words]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def serve() -> dict[str, Any] | None:
    """Fork for each task of stdin: the task, in its fork; None in the server, when stdin ends."""
    running: set[int] = set()
    while True:
        if select.select([0], [], [], 0.005 if running else None)[0]:
            line = _line()
            if not line:
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
                return None
            child = os.fork()
            if not child:
                return dict(json.loads(line))
            running.add(child)
            _say(f"begun {child}")
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            running.discard(pid)
            _say(f"ended {pid} {os.waitstatus_to_exitcode(status)}")


def _line() -> bytes:
    found = b""
    while not found.endswith(b"\n"):
        part = os.read(0, 1 << 16)
        if not part:
            return b""
        found += part
    return found


def _say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def do(task: dict[str, Any]) -> None:
    """Do a task as if this process had been started for it."""
    os.environ.clear()
    os.environ.update(task["environment"])
    os.chdir(task["folder"])
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    files = [os.open(os.devnull, os.O_RDONLY), *(os.open(f, flags, 0o644) for f in task["streams"])]
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    module, _, name = task["call"].partition(":")
    from huggingface_hub import constants

    from kills import renew_threads

    faulthandler.enable()  # what was running when compiled code ends the process
    importlib.reload(constants)  # which has read the server's environment
    renew_threads()
    getattr(importlib.import_module(module), name)(*task["arguments"])


def main() -> None:
    from kills import prepare

    own = os.dup(1)  # what is printed while modules are imported is no answer
    os.dup2(2, 1)
    sys.modules["forks"] = sys.modules["__main__"]
    prepare()
    for module in LATER:
        importlib.import_module(module)
    os.dup2(own, 1)
    os.close(own)
    gc.collect()
    gc.freeze()  # forks share the memory that no collection touches
    task = serve()
    if task is not None:
        do(task)


if __name__ == "__main__":
    main()
