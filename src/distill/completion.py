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

NONE_OF_OURS = 3  # the exit code by which a script lets the shell complete by itself


def main() -> int:
    """The command `distill completion`; returns the exit code."""
    open_standard_streams()
    words = sys.argv[1:]
    if not words or not {"-h", "--help"}.isdisjoint(words[:1]):
        print(__doc__.rstrip())
        return 0
    if words[0] == "--line":  # bash asks: a line up to the cursor, and what breaks words
        return answer(for_bash(words[1], words[2]))
    if words[0] == "--words":  # zsh and fish ask: the words up to the cursor
        return answer(completions(words[1:]))
    from distill.config.errors import print_mistakes

    with print_mistakes():
        print(script(words[0]), end="")
    return 0


def answer(found: list[str] | None) -> int:
    """Print each on a line."""
    print(*found or (), sep="\n", end="")
    return NONE_OF_OURS if found is None else 0


def script(shell: str) -> str:
    """What the shell reads. Raises ValueError for one that we do not know."""
    if shell not in SHELLS:
        raise ValueError(f"completion {shell}: use {', '.join(SHELLS)}")
    file = Path(__file__).parent / "commandline" / f"completion.{shell}"
    return file.read_text(encoding="utf-8")


def asked(words: list[str]) -> str | None:
    """The shell of Hydra's own way to ask, `-sc install=bash`; None if nobody asks."""
    for flag, value in zip(words, words[1:], strict=False):
        if flag in ("-sc", "--shell-completion") and value.startswith("install="):
            return value.removeprefix("install=")
    return None


if __name__ == "__main__":
    sys.exit(main())
