"""`evaluation.json`: what one model is worth, by one protocol or by several, none of which replaces
another.

    {protocol, rows, picture}            a run's own verdict; of what is no run the newest one
    beside: [{protocol, rows, picture}]  those by other protocols
    model, own, newest                   what was judged; by its own run or not; the last key

`picture` is the file in samples/ that has a strip for every row. Nothing here imports torch.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from distill.storage.bounded import mapping_of

FILE, PICTURE = "evaluation.json", "comparison.png"
NAME = re.compile(r"comparison(_[0-9a-f]{8})?\.png")
ROW_PREFIXES = ("teacher", "student")  # how keys of a protocol begin that it has with rows of these
Result = dict[str, Any]


def read_evaluation(folder: Path) -> dict[str, Any]:
    """What lies in the folder; nothing where there is no such file, or one that was torn."""
    with suppress(OSError, ValueError):
        return mapping_of(folder / FILE)
    return {}


def results_in(evaluation: Mapping[str, Any]) -> list[Result]:
    """Each {protocol, rows, picture} of a file, the main one first."""
    beside = evaluation.get("beside")
    found = [evaluation, *(beside if isinstance(beside, list) else [])]
    return [
        _result(verdict) for verdict in found if isinstance(verdict, Mapping) and "rows" in verdict
    ]


def _result(verdict: Mapping[str, Any]) -> Result:
    name = str(verdict.get("picture", PICTURE))
    # Of a stranger's file: a path would show any picture of this machine.
    picture = name if NAME.fullmatch(name) else PICTURE
    return {"protocol": verdict.get("protocol", {}), "rows": verdict["rows"], "picture": picture}


def comparable(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether scores by two protocols can stand in one table: neither says otherwise what both say.

    One may lack measures, or what it would say of a teacher or student that it did not judge.
    """
    both = one.keys() & other.keys()
    return bool(both or not one or not other) and all(one[key] == other[key] for key in both)


def protocol_hash(protocol: Mapping[str, Any]) -> str:
    """Eight hex digits of what pictures and references were, whoever was judged."""
    kept = {k: v for k, v in protocol.items() if not k.startswith(ROW_PREFIXES)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]


def add_result(
    before: Mapping[str, Any], new: Result, model: str | None
) -> tuple[dict[str, Any], Result]:
    """The file with a new verdict {protocol, rows} in it, and that verdict as it stands there, with
    its picture.

    Verdicts on another model go. One by the same protocol takes the new rows. Of another it stands
    beside a run's own, and before those that nobody called so.
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
    """The rows of both in the order of the old ones, a new one for an old one of the same sampler
    and steps.
    """
    rows = {(row["who"], row["steps"]): row for row in old["rows"]}
    for row in new["rows"]:
        name = (row["who"], row["steps"])
        rows[name] = {**rows.get(name, {}), **row}
    ordered = sorted(rows.values(), key=lambda row: row["who"] == "student")
    protocol = {**old["protocol"], **new["protocol"]}
    return {"protocol": protocol, "rows": ordered, "picture": old["picture"]}


def promote_newest(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The file with the newest verdict for the run's own: it comes first, and stays there."""
    found, newest = results_in(evaluation), evaluation.get("newest", 0)
    found.insert(0, found.pop(newest if newest in range(len(found)) else 0))
    return _content(found, evaluation.get("model"), own=True, newest=0)


def _content(found: Sequence[Result], model: str | None, own: bool, newest: int) -> dict[str, Any]:
    main, *beside = found
    return {**main, "model": model, "own": own, "newest": newest, "beside": list(beside)}
