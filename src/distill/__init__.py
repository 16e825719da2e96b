"""Adversarial diffusion distillation: `python -m distill` says what one can type."""

import signal
import sys

# While `python -m distill...` imports, Ctrl-C ends it without a traceback. Its own handlers come
# with `distill.machine.signals`. A program that imports the package keeps its handlers.
_started = sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] if "-m" in sys.orig_argv else []
if (
    _started
    and f"{_started[0]}.".startswith("distill.")
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
