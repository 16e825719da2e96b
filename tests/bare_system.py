"""`python bare_system.py run key=value ...`: a command without what Windows, macOS or some file
systems lack.

An imitation: the names are taken away and the system stays Linux. Libraries are imported before,
since on such a system they have code of their own for it.
"""

import importlib
import multiprocessing
import os
import pkgutil
import shutil
import signal
import sys
from pathlib import Path

LIBRARIES = (
    "torch",
    "torchvision",
    "lightning.pytorch",
    "diffusers",
    "transformers",
    "peft",
    "open_clip",
    "torchmetrics",
    "webdataset",
    "matplotlib.pyplot",
    "tensorboard",
    "torch.utils.tensorboard",
    "rich",
    "psutil",
    "hydra",
    "multiprocessing.popen_spawn_posix",
)
SIGNALS = ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGPIPE")
NAMES = (
    "O_DIRECTORY",
    "fork",
    "getpgid",
    "getuid",
    "killpg",
    "link",
    "nice",
    "sched_getaffinity",
    "sched_setaffinity",
    "setsid",
    "sysconf",
)
MODULES = ("fcntl", "grp", "pwd", "resource", "termios")


def take_away() -> None:
    """Remove the names, and refuse to open a folder or to rename onto a file, as Windows does."""
    from lightning.pytorch.trainer.connectors import signal_connector

    for name in SIGNALS:
        delattr(signal, name)
    known = {signal.SIGINT, signal.SIGTERM, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}
    signal.valid_signals = lambda: known
    for name in NAMES:
        delattr(os, name)
    for name in MODULES:
        sys.modules[name] = None
    opened, renamed = os.open, os.rename

    def open_no_folder(path, *more, **options):
        if not isinstance(path, int) and os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *more, **options)

    def rename_to_nothing(source, target, **options):
        if os.path.exists(target):
            raise FileExistsError(17, "File exists", str(target))
        renamed(source, target, **options)

    os.open, os.rename = open_no_folder, rename_to_nothing
    shutil._use_fd_functions = False  # as where a folder cannot be opened
    signal_connector._IS_WINDOWS = True  # what Lightning itself asks before it looks for SIGUSR1
    multiprocessing.set_start_method("spawn")  # the only one of Windows, and the usual one of macOS


def every_module() -> None:
    """Import all of the package; what starts a process of its own is not run by that."""
    import distill

    package = Path(distill.__file__).parent
    names = [found.name for found in pkgutil.walk_packages([str(package)], "distill.")]
    assert {
        "distill.training.checkpoints",
        "distill.teachers.sd3",
        "distill.training.launch",
    } <= set(names)
    for name in names:
        importlib.import_module(name)


if __name__ == "__main__":
    for library in LIBRARIES:
        importlib.import_module(library)
    take_away()
    every_module()
    command = sys.argv.pop(1)
    importlib.import_module(f"distill.{command}").main()
