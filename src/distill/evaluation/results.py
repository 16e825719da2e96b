"""`evaluation.json`: the results of one model, one for each protocol.

    {protocol, rows, picture}            the main result: from the run itself, else the newest
    beside: [{protocol, rows, picture}]  results by other protocols
    model    fingerprint of the evaluated model
    own      whether the main result is from the run itself
    newest   index of the newest result

`picture` is a file in samples/ with a strip of pictures for every row. A row may hold `outcomes`:
for measures that are means over prompts the number of every prompt, as a text of numbers. Nothing
here imports torch.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import Any

from distill.storage.bounded import mapping_of

FILE, PICTURE = "evaluation.json", "comparison.png"
CAPTIONS = "captions.json"  # beside the pictures of a row: a list, the caption of each number
SCORES = "scores.csv"  # of the student along the run
PADDING = 2  # pixels between the pictures of a strip, as in torchvision's grids
NAME = re.compile(r"comparison(_[0-9a-f]{8})?\.png")
OUTCOMES = "outcomes"  # key of a row
MOST_PROMPTS = 10**6  # ours: limit of the outcomes of a row
Result = dict[str, Any]


def read_evaluation(folder: Path) -> dict[str, Any]:
    """The content of the folder's evaluation.json; {} if it is missing or damaged."""
    with suppress(OSError, ValueError):
        return mapping_of(folder / FILE)
    return {}


def results_in(evaluation: Mapping[str, Any]) -> list[Result]:
    """Each result {protocol, rows, picture} of a file, the main one first."""
    beside = evaluation.get("beside")
    found = [evaluation, *(beside if isinstance(beside, list) else [])]
    return [_result(entry) for entry in found if isinstance(entry, Mapping) and "rows" in entry]


def _result(entry: Mapping[str, Any]) -> Result:
    name = str(entry.get("picture", PICTURE))
    # The file may be untrusted: a path in it could show any picture of this machine.
    picture = name if NAME.fullmatch(name) else PICTURE
    return {"protocol": entry.get("protocol", {}), "rows": entry["rows"], "picture": picture}


def packed(outcomes: Mapping[str, Iterable[float]]) -> dict[str, str]:
    """The number of every prompt by measure, as texts: `1 0 1`, with six digits."""
    return {key: " ".join(f"{float(x):.6g}" for x in found) for key, found in outcomes.items()}


def outcomes_of(row: Mapping[str, Any]) -> dict[str, list[float]]:
    """The number of every prompt by measure; {} for a row of an older version.

    Raises ValueError for texts that are no finite numbers.
    """
    texts = row.get(OUTCOMES, {})
    if not isinstance(texts, Mapping) or not all(isinstance(t, str) for t in texts.values()):
        raise ValueError("outcomes must be texts of numbers; evaluate anew")
    return {str(key): _numbers(text) for key, text in texts.items()}


def _numbers(text: str) -> list[float]:
    try:
        found = [float(word) for word in text.split(maxsplit=MOST_PROMPTS)]
    except ValueError:
        raise ValueError("outcomes hold a text that is no number; evaluate anew") from None
    if not all(map(isfinite, found)):
        raise ValueError("outcomes hold a number that is not finite; evaluate anew")
    return found


def captions_digest(captions: Iterable[str]) -> str:
    """What the protocol of an evaluation on prompts says of them: `sha256 4e07408562be`."""
    text = "\n".join(captions).encode("utf-8", "surrogatepass")
    return f"sha256 {hashlib.sha256(text).hexdigest()[:12]}"


def comparable(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether scores by two protocols are comparable: they agree in every key that both have.

    One may lack measures, or the keys of a teacher or student that it did not evaluate.
    """
    both = one.keys() & other.keys()
    return bool(both or not one or not other) and all(one[key] == other[key] for key in both)


def protocol_hash(protocol: Mapping[str, Any]) -> str:
    """Eight hex digits of the protocol."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:8]


def add_result(
    before: Mapping[str, Any], new: Result, model: str | None
) -> tuple[dict[str, Any], Result]:
    """Add a new result {protocol, rows}; returns the content of the file, and the stored result.

    Results of another model are removed. Rows are merged into a result of the same protocol.
    Otherwise the new result comes last if the main result is from the run itself, else first.
    """
    known = before.get("model")
    stale = known is not None and model is not None and known != model
    found = [] if stale else results_in(before)
    own = bool(before.get("own")) and not stale
    place = next(
        (i for i, v in enumerate(found) if comparable(v["protocol"], new["protocol"])), None
    )
    if place is not None:
        entry = _merged(found.pop(place), new)
        found.insert(place if own else 0, entry)
    else:
        key = protocol_hash(new["protocol"])
        entry = {**new, "picture": PICTURE if not found else f"comparison_{key}.png"}
        found.insert(len(found) if own else 0, entry)
    return _content(found, model, own, newest=found.index(entry)), entry


def _merged(old: Result, new: Result) -> Result:
    """The rows of both results, the teacher's first, then by steps; a new row replaces an old one
    of the same sampler and steps.
    """
    rows = {(row["who"], row["steps"]): row for row in old["rows"]}
    for row in new["rows"]:
        name = (row["who"], row["steps"])
        before = rows.get(name, {})
        rows[name] = {**before, **row}
        if outcomes := {**before.get(OUTCOMES, {}), **row.get(OUTCOMES, {})}:
            rows[name][OUTCOMES] = outcomes
    ordered = sorted(rows.values(), key=lambda row: (row["who"] == "student", row["steps"]))
    protocol = {**old["protocol"], **new["protocol"]}
    return {"protocol": protocol, "rows": ordered, "picture": old["picture"]}


def promote_newest(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Make the newest result the main one, as the result of the run itself; it stays first."""
    found, newest = results_in(evaluation), evaluation.get("newest", 0)
    found.insert(0, found.pop(newest if newest in range(len(found)) else 0))
    return _content(found, evaluation.get("model"), own=True, newest=0)


def _content(found: Sequence[Result], model: str | None, own: bool, newest: int) -> dict[str, Any]:
    main, *beside = found
    return {**main, "model": model, "own": own, "newest": newest, "beside": list(beside)}
