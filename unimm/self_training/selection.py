"""What a round trains on: the images that the verifier accepted, how many of them are right, and their dataset."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unimm.checkpoint.atomic import atomic_directory, atomic_file, copy_file
from unimm.checkpoint.json_files import json_lines, write_json
from unimm.evaluation.items import EvalItem
from unimm.evaluation.scores import wilson_interval

METADATA = "metadata.jsonl"
# an item's score by its id; None where its judge failed
Scores = Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A generated image: whether the verifier accepted it, and whether it is right; None for failed, and not known.

    used: it is trained on.
    """

    id: str
    prompt: str
    answer: str
    verified: bool | None
    right: bool | None
    used: bool


def choose_candidates(
    items: Sequence[EvalItem], *, verified: Scores, right: Scores | None, most: int | None
) -> list[Candidate]:
    """The candidates in order, of which the first `most` that are accepted are used.

    right: None where no judge can tell.
    """
    made: list[Candidate] = []
    n_used = 0
    for item in items:
        score = verified[item.id]
        accepted = None if score is None else score == 1
        exact = None if right is None else right[item.id]
        used = accepted is True and (most is None or n_used < most)
        n_used += used
        made.append(
            Candidate(
                id=item.id,
                prompt=item.prompt,
                answer=item.answer,
                verified=accepted,
                right=None if exact is None else exact == 1,
                used=used,
            )
        )
    return made


def summarize(candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Counts, and shares with 95 % intervals.

    acceptance_rate: accepted of those generated. accuracy: right of these. precision: right of those accepted.
    recall: accepted of those that are right. A share of nothing, and one that needs to know what is right where no
    judge can tell, is None. A candidate whose verifier failed counts as rejected.
    """
    accepted = [one for one in candidates if one.verified]
    right = [one for one in candidates if one.right]
    both = [one for one in accepted if one.right]
    known = all(one.right is not None for one in candidates)
    return {
        "generated": len(candidates),
        "accepted": len(accepted),
        "failed": sum(one.verified is None for one in candidates),
        "used": sum(one.used for one in candidates),
        "right": len(right) if known else None,
        "accepted_right": len(both) if known else None,
        "acceptance_rate": _share(len(accepted), len(candidates)),
        "accuracy": _share(len(right), len(candidates)) if known else None,
        "precision": _share(len(both), len(accepted)) if known else None,
        "recall": _share(len(both), len(right)) if known else None,
    }


def _share(part: int, whole: int) -> dict[str, float] | None:
    if whole == 0:
        return None
    low, high = wilson_interval(part / whole, whole)
    return {"value": part / whole, "low": low, "high": high}


def write_selection(folder: Path, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Write selection.jsonl, a line a candidate, and selection.json, the summary; returns the latter."""
    with atomic_file(folder / "selection.jsonl") as partial:
        partial.write_text(json_lines(vars(one) for one in candidates), encoding="utf-8")
    summary = summarize(candidates)
    with atomic_file(folder / "selection.json") as partial:
        write_json(partial, summary)
    return summary


def write_dataset(folder: Path, candidates: Sequence[Candidate], images: Path) -> None:
    """Make a dataset in the format imagefolder of the candidates that are used: the question and the image.

    images: the folder of ID.png. One that is there with the same rows is left as it is. Raises OSError, which names the
    file, for a full disk; what was half written is removed.
    """
    used = [one for one in candidates if one.used]
    rows = json_lines({"file_name": f"{one.id}.png", "text": one.prompt, "id": one.id} for one in used)
    there = folder / METADATA
    if (
        there.is_file()
        and there.read_text(encoding="utf-8") == rows
        and all((folder / f"{one.id}.png").is_file() for one in used)
    ):
        return
    with atomic_directory(folder, replace=True) as partial:
        for one in used:
            target = partial / f"{one.id}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(images / f"{one.id}.png", target)
        (partial / METADATA).write_text(rows, encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    """The same file under a second name, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        copy_file(source, target)
