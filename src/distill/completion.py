"""Print what has a shell complete commands, groups, keys, values and run folders with the tab key:
for `distill run` and for `python -m distill.run` alike.

    eval "$(distill completion bash)"              # in ~/.bashrc
    eval "$(distill completion zsh)"               # in ~/.zshrc, after compinit
    distill completion fish | source               # in ~/.config/fish/config.fish
    python -m distill.completion bash              # where `distill` is not on the path
"""

import sys
from pathlib import Path

from distill.commandline.completions import SHELLS, completions, for_bash
from distill.terminal.console import open_standard_streams

NOT_OURS = 3  # the exit code after which the shell completes by itself


def main() -> int:
    """The command `distill completion`; returns the exit code."""
    open_standard_streams()
    arguments = sys.argv[1:]
    if not arguments or not {"-h", "--help"}.isdisjoint(arguments[:1]):
        print(__doc__.rstrip())
        return 0
    if arguments[0] == "--line":  # from bash: the line up to the cursor, and COMP_WORDBREAKS
        return answer(for_bash(arguments[1], arguments[2]))
    if arguments[0] == "--words":  # from zsh and fish: the words up to the cursor
        return answer(completions(arguments[1:]))
    from distill.config.errors import print_mistakes

    with print_mistakes():
        print(script(arguments[0]), end="")
    return 0


def answer(found: list[str] | None) -> int:
    """Print one completion a line; returns the exit code."""
    print(*found or (), sep="\n", end="")
    return NOT_OURS if found is None else 0


def script(shell: str) -> str:
    """The completion script of a shell. Raises ValueError for an unknown shell."""
    if shell not in SHELLS:
        raise ValueError(f"completion {shell}: use {', '.join(SHELLS)}")
    file = Path(__file__).parent / "commandline" / f"completion.{shell}"
    return file.read_text(encoding="utf-8")


def requested_shell(arguments: list[str]) -> str | None:
    """The shell in Hydra's own flags, `-sc install=bash`; None without them."""
    for flag, value in zip(arguments, arguments[1:], strict=False):
        if flag in ("-sc", "--shell-completion") and value.startswith("install="):
            return value.removeprefix("install=")
    return None


if __name__ == "__main__":
    sys.exit(main())
