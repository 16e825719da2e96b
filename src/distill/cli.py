"""`distill COMMAND ...` is `python -m distill.COMMAND ...`, and nothing else."""

import difflib
import runpy
import signal
import sys
from importlib.metadata import PackageNotFoundError, version

from distill.terminal.console import tolerate_closed_pipes

COMMANDS = {
    "run": "distil a teacher into a student",
    "sample": "generate pictures with a student or a teacher",
    "evaluate": "measure a run, a pipeline or a folder of pictures",
    "compare": "put runs side by side",
    "inspect": "show how well the heads of a run tell real from fake",
    "export": "write a student for diffusers, ComfyUI or the hub",
    "check": "say which samples of data would be dropped, and why",
    "cache": "encode pictures and captions once, for training without encoders",
    "synthesize": "generate samples of prompts with a teacher",
    "pretrain": "train a tiny teacher on your own data",
    "search": "search for good values of any keys",
    "demo": "open a page where pictures change as you type",
    "doctor": "check whether this machine can run a configuration",
    "recipes": "list the shipped experiments and recipes, or copy one to edit it",
    "completion": "complete commands, keys and values in your shell",
}
NO_CONFIG = ("recipes", "completion")  # commands without a Hydra configuration
USAGE = "usage: distill COMMAND [key=value ...]\n\n" + "\n".join(
    f"  {k:12}{what}" for k, what in COMMANDS.items()
)
MORE = """
distill COMMAND --help    shows every key of a command, with its default
distill --version         says which version this is"""


def config_of(command: str) -> str:
    """The name of a command's configuration: the same name, but `config` for `run` and `doctor`."""
    return "config" if command in ("run", "doctor") else command


def main() -> int:
    """Run the named command as `__main__`, so that processes it starts find the same module."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # End without a traceback until the command sets its own handlers.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with tolerate_closed_pipes():
        return _dispatch(sys.argv[1] if len(sys.argv) > 1 else "--help")


def _dispatch(command: str) -> int:
    if command in ("-h", "--help"):
        print(f"{USAGE}\n{MORE}")
        return 0
    if command in ("-V", "--version"):
        print(f"distill {_version()}")
        return 0
    if command in ("-sc", "--shell-completion"):  # the flags of Hydra's own applications
        from distill.completion import requested_shell

        sys.argv[1:] = ["completion", *filter(None, [requested_shell(sys.argv)])]
        command = "completion"
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"distill: no command {command!r}{hint}\n\n{USAGE}", file=sys.stderr)
        return 1
    del sys.argv[1]
    runpy.run_module(f"distill.{command}", run_name="__main__", alter_sys=True)
    return 0


def _version() -> str:
    try:
        return version("distill")
    except PackageNotFoundError:
        return "of a checkout that is not installed"
