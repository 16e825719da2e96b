"""A program of its own: renders the chat template that it is given, within limits.

    python -I render_template.py < question.json > text.json

The question has `path` (of Python's modules), `template`, `conversation` and `variables`.

A template comes with a tokenizer. The sandbox of transformers keeps it from files and the network,
but not from looping without end or from filling the memory.
"""

import json
import sys
from contextlib import suppress

SECONDS = 2  # ours: of a processor, beside the imports; a usual template takes milliseconds
MEMORY = 2**29  # ours: bytes, beside those of the imports
MOST = 50_000  # ours: characters of the text; a caption has at most some thousands


def limit() -> None:
    """Limit what this process takes from here on. Windows has no such limits."""
    with suppress(ImportError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        resource.setrlimit(resource.RLIMIT_CPU, (int(used) + 1 + SECONDS, resource.RLIM_INFINITY))
        with open("/proc/self/statm", encoding="ascii") as file, suppress(OSError, ValueError):
            held = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, resource.RLIM_INFINITY))


def main() -> None:
    question = json.load(sys.stdin)
    sys.path[:] = question["path"]
    from transformers.utils.chat_template_utils import render_jinja_template

    limit()
    (text,), _ = render_jinja_template(
        conversations=[question["conversation"]],
        chat_template=question["template"],
        **question["variables"],
    )
    if len(text) > MOST:
        sys.exit(f"it gives {len(text):,} characters for a caption of one")
    json.dump(text, sys.stdout)


if __name__ == "__main__":
    main()
