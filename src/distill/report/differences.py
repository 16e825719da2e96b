"""Differences between groups of runs: which of them stand, in numbers and in words."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from distill.evaluation.results import comparable
from distill.evaluation.statistics import Interval, difference_interval, paired_interval
from distill.evaluation.tables import (
    MEASURES,
    Measure,
    as_markdown,
    markdown_table,
    steps_text,
)
from distill.report import by_category
from distill.report.evaluation import MAIN
from distill.report.runs import Line, text_table
from distill.terminal.shown import in_markdown

SEEDS = 3  # ours: fewer seeds say nothing of a setting
NONE_SHOWN = "no difference shown"
HEADS = ("steps", "measure", "groups", "difference", "95 % interval", "over", "")
NOTE = (
    "In brackets: 95 % intervals over other seeds and prompts. The group with the best mean is"
    " compared with each other one. The intervals are not corrected for the number of comparisons."
)


@dataclass(frozen=True)
class Difference:
    """a - times * b in one measure, each at a number of steps."""

    key: str
    a: Line
    b: Line
    times: float = 1.0

    @property
    def measure(self) -> Measure:
        return MEASURES[self.key]

    @cached_property
    def interval(self) -> Interval:
        a, b = self.a.samples[self.key], self.b.samples[self.key]
        if not comparable(self.a.protocol, self.b.protocol):
            # other prompts or another judge: the numbers have no common scale
            value = difference_interval(a, b, self.times).value
            return Interval(value, None, None, ())
        if (self.a.group, self.a.who) == (self.b.group, self.b.who):
            return paired_interval(a, b, self.times)
        return difference_interval(a, b, self.times)

    @property
    def seeds(self) -> list[int]:
        """The number of seeds of each side; a teacher has none."""
        samples = (line.samples[self.key] for line in (self.a, self.b))
        return [len(sample.scores) for sample in samples if not sample.fixed]

    @property
    def prompts(self) -> int:
        outcomes = self.a.samples[self.key].outcomes
        return 0 if outcomes is None or "prompts" not in self.interval.over else outcomes.shape[1]

    @property
    def has_seeds(self) -> bool:
        """Whether every side has enough seeds for a verdict."""
        return min(self.seeds, default=SEEDS) >= SEEDS

    @property
    def stands(self) -> bool:
        return self.has_seeds and self.interval.excludes_zero

    @property
    def over(self) -> str:
        """What was resampled: `3 and 3 seeds, 400 prompts`."""
        parts = []
        if "seeds" in self.interval.over:
            parts.append(f"{' and '.join(map(str, self.seeds))} seeds")
        if self.prompts:
            parts.append(f"{self.prompts:,} prompts")
        return ", ".join(parts) or "nothing"

    @property
    def reason(self) -> str:
        """Why there is no interval."""
        if not comparable(self.a.protocol, self.b.protocol):
            return "no interval: evaluated by different protocols"
        return "no interval: single seeds, and no outcomes of single prompts; evaluate anew"

    @property
    def words(self) -> str:
        """What is shown."""
        if self.interval.low is None:
            return self.reason
        if not self.interval.excludes_zero:
            return NONE_SHOWN
        if not self.has_seeds:
            return f"shown for these runs, not for their settings: fewer than {SEEDS} seeds"
        better = (self.interval.value > 0) == (self.measure.better != "lower")
        return f"{(self.a if better else self.b).group} is better"

    def number(self, value: float) -> str:
        return self.measure.form.format(value)

    @property
    def ends(self) -> str:
        low, high = self.interval.low, self.interval.high
        return "–" if low is None or high is None else f"[{self.number(low)}, {self.number(high)}]"

    @property
    def cells(self) -> list[str]:
        """The texts of a row below HEADS."""
        groups = f"{self.a.group} minus {self.b.group}"
        value = self.number(self.interval.value)
        name = self.measure.name
        return [str(self.a.steps), name, groups, value, self.ends, self.over, self.words]


def differences(lines: Sequence[Line]) -> list[Difference]:
    """The group with the best mean against each other one, by main measure and number of steps."""
    found = []
    for key in MAIN:
        students = [line for line in lines if line.who == "student" and key in line.samples]
        for steps in sorted({line.steps for line in students}):
            leader, *others = ranked([line for line in students if line.steps == steps], key)
            found += [Difference(key, leader, other) for other in others]
    return found


def as_text(lines: Sequence[Line]) -> str:
    """compare.md: the table of means, the headline, what is missing, the table of differences."""
    found = [difference.cells for difference in differences(lines)]
    sentences = map(in_markdown, (headline(lines)[1], *notes(lines)))  # they hold groups' names
    parts = [as_markdown(text_table(lines)), *sentences]
    if found:
        parts += [markdown_table(HEADS, found), NOTE]
    parts += filter(None, [by_category.as_text(lines).strip("\n")])
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def ranked(lines: Sequence[Line], key: str) -> list[Line]:
    """The lines by their mean, the best first."""
    return sorted(lines, key=lambda line: line.mean(key), reverse=MEASURES[key].better != "lower")


def headline(lines: Sequence[Line]) -> tuple[tuple[str, str, str], str]:
    """The best group at the fewest steps, as a tile and as a sentence.

    It is called the best only if its difference to each other group stands.
    """
    for key in MAIN:
        found = [line for line in lines if line.who == "student" and key in line.values]
        if found:
            few = min(line.steps for line in found)
            return _headline(key, ranked([line for line in found if line.steps == few], key))
    return ("Best", "–", "–"), "No student among them was evaluated by one of the main measures."


def _headline(key: str, lines: Sequence[Line]) -> tuple[tuple[str, str, str], str]:
    leader, *others = lines
    few, measure = f"with {steps_text(leader.steps)}", MEASURES[key]
    value, what = leader.formatted(key, measure.form), measure.name.lower()
    if not others:
        return (few.capitalize(), value, leader.group), f"{leader.group} {few}: {what} {value}."
    found = [Difference(key, leader, other) for other in others]
    if all(difference.stands for difference in found):
        tile = (f"Best {few}", value, leader.group)
        return tile, f"{leader.group} is best {few}: {what} {value}."
    tile = (f"Best mean {few}", value, f"{leader.group}; not shown to be better")
    return tile, f"No group is shown to be best {few}. {_why(found, what, value)}"


def _why(found: Sequence[Difference], what: str, value: str) -> str:
    """Why the leader is not the best: the rivals that it is not shown to differ from."""
    leader = found[0].a.group
    open_ones = [d for d in found if not d.stands]
    equal = [d for d in open_ones if d.words == NONE_SHOWN]
    if equal:
        names = " and ".join(d.b.group for d in equal[:3])
        more = f" and {len(equal) - 3} more" if equal[3:] else ""
        return f"In {what} no difference is shown between {leader} ({value}) and {names}{more}."
    first = open_ones[0]
    return f"{leader} has the best mean, {what} {value}; to {first.b.group}: {first.words}."


def notes(lines: Sequence[Line]) -> Iterator[str]:
    """Sentences on intervals that are missing, or that cover less than seeds and prompts."""
    students = [line for line in lines if line.who == "student"]
    yield from _without_scores(students)
    if unknown := dict.fromkeys(line.group for line in students if not line.protocol):
        what = "Their evaluations do not say on what prompts, and are taken as comparable"
        yield f"{what}: {', '.join(unknown)}."
    for words, over in (
        ("No interval, for one seed and no outcomes of single prompts (evaluate anew)", ()),
        ("Interval over prompts alone, for one seed", ("prompts",)),
        ("Interval over seeds alone, for want of outcomes of single prompts", ("seeds",)),
    ):
        for key in MAIN:
            intervals = [(line, line.interval(key)) for line in students]
            found = [line for line, interval in intervals if interval and interval.over == over]
            if found:
                groups = ", ".join(dict.fromkeys(line.group for line in found))
                yield f"{words}: {MEASURES[key].name.lower()} of {groups}."


def _without_scores(students: Sequence[Line]) -> Iterator[str]:
    """Sentences on main measures that some runs of a line lack: those of a run that has diverged
    are not finite, and the mean is over the others.
    """
    for key in MAIN:
        known = {line.steps for line in students if key in line.values}
        for line in (line for line in students if line.steps in known):
            count = len(line.values.get(key, ()))
            runs = max(map(len, line.values.values()), default=0)
            if count < max(runs, 1):
                have = f"{count} of {runs} runs have" if runs else "no run has"
                what = f"{MEASURES[key].name} of {line.group}, {steps_text(line.steps)}"
                yield f"{what}: {have} a finite one, and the mean is over such runs."
