"""Run a study, or go on with it, and write its numbers into its page.

    python experiments/run.py <study> [workers=2] [minutes=60] [only=job,job] [out=folder]
    python experiments/run.py <study> page=only        # the page anew from the CSV files beside it
    python experiments/run.py <study> page=partial     # also tables of which jobs are missing
    python experiments/run.py <study> list=true        # the commands, without running them

`experiments/<study>/study.yaml` states the study; `experiments/README.md` explains its keys. Give a
command again after it was cut off: finished runs stay, started ones are resumed. Each run is a
process with one thread, `workers` at a time.
"""

import os
import sys
from pathlib import Path

from runner.jobs import STOPPED, Queue
from runner.results import write_results
from runner.study import FILE, Study, StudyError, read_study

from distill.config.compose import nearest

HERE = Path(__file__).parent
HELP = ("-h", "--help", "help")
DEFAULTS = {
    "workers": "", "minutes": "", "only": "", "out": "", "page": "complete", "list": "false",
}  # fmt: skip
CHOICES = {"page": ("complete", "partial", "only"), "list": ("true", "false")}


def usage() -> str:
    """What the command does, with the names of the studies."""
    return f"{str(__doc__).strip()}\n\nStudies: {', '.join(names())}"


def names() -> list[str]:
    return sorted(file.parent.name for file in HERE.glob(f"*/{FILE}"))


def arguments(words: list[str]) -> tuple[Path, dict[str, str]]:
    """The folder of the study, and the options. Raises StudyError for wrong ones."""
    if not words:
        raise StudyError(f"give a study: {', '.join(names())}; -h explains the options")
    study, *given = words
    options = dict(DEFAULTS)
    for word in given:
        key, equals, value = word.partition("=")
        if not equals or key not in DEFAULTS:
            near = nearest(key, DEFAULTS)
            raise StudyError(f"{word}: no such option{near}; there are {', '.join(DEFAULTS)}")
        options[key] = value
    for key in ("workers", "minutes"):
        if options[key] and not (options[key].isdecimal() and int(options[key])):
            raise StudyError(f"{key}={options[key]}: must be a whole number above 0")
    for key, known in CHOICES.items():
        if options[key] not in known:
            raise StudyError(f"{key}={options[key]}: must be one of {', '.join(known)}")
    if os.sep in study:
        return Path(study), options
    if study not in names():
        near = nearest(study, names())
        raise StudyError(f"{study}: there is no such study{near}; there are {', '.join(names())}")
    return HERE / study, options


def main(words: list[str]) -> int:
    """Run the study; returns the exit code."""
    if words and words[0] in HELP:
        print(usage())
        return 0
    folder, options = arguments(words)
    study = read_study(folder)
    out = Path(options["out"] or Path("runs") / "studies" / folder.name)
    if options["page"] == "only":
        write_results(study, None, HERE / "README.md")
        return 0
    queue = Queue(study, out, only=options["only"], workers=workers(study, options["workers"]))
    if options["list"] == "true":
        print("\n".join(queue.commands()))
        return 0
    code = queue.run(minutes(study, options["minutes"]))
    write_results(study, out, HERE / "README.md", partial=options["page"] == "partial")
    queue.raise_failed()  # the others' numbers are in the page
    return code


def workers(study: Study, given: str) -> int:
    """Processes at a time: as given, or one for each core that this process may use."""
    if given:
        return int(given)
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def minutes(study: Study, given: str) -> float | None:
    return float(given) if given else study.minutes


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except StudyError as error:
        sys.exit(f"run.py: {error}")
    except KeyboardInterrupt:
        sys.exit(STOPPED)
