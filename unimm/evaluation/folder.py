"""The folder of a run: what the run is, the outputs and their manifests, the verdicts, the results.

    run.json                    what was asked of which model, and how
    images/ITEM.png             what it drew
    outputs.jsonl               a line an output: id, prompt, seed, text, image and its SHA-256
    verdicts/JUDGE.jsonl        a line a verdict: id, score, why, and every raw reply of the judge
    result.json, result.md      the scores
    manifest.jsonl              of a file of prompts in place of these: a line an image, in the file's order

Each shard of a run has manifests of its own, and all of them are read. Lines are only added.
"""

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import Image

from unimm.checkpoint.atomic import atomic_file
from unimm.checkpoint.json_files import json_lines, read_json, write_json
from unimm.evaluation.items import EvalItem
from unimm.evaluation.manifest import Manifest, read_manifest
from unimm.evaluation.sharding import RunShard

# what makes a run another one; what else run.json holds is for the reader
IDENTITY = ("benchmark", "model", "dtype", "quantize", "seed", "items", "prompts", "answers", "options")


class RunFolder:
    """The files of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    # ---- what the run is

    def claim(self, plan: Mapping[str, Any]) -> dict[str, Any]:
        """Make this folder the run's, or take it up again; returns run.json.

        Raises ValueError, with what differs, for the folder of another run, and for one that holds other files.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with self._lock():
            there = self.read_run()
            if there:
                if different := [name for name in IDENTITY if there.get(name) != plan.get(name)]:
                    details = "; ".join(
                        f"{name} {_short(there.get(name))} there, {_short(plan.get(name))} now" for name in different
                    )
                    raise ValueError(f"{self.path} holds another run: {details}; take another --out")
                return there
            if others := sorted(path.name for path in self.path.iterdir() if not path.name.startswith(".")):
                raise ValueError(
                    f"{self.path} holds {', '.join(others[:3])} and no run.json: expected an empty folder, or that of "
                    "this run; take another --out"
                )
            self._write("run.json", plan)
            return dict(plan)

    def read_run(self) -> dict[str, Any]:
        """run.json; empty before the run is begun."""
        return dict(read_json(self.path / "run.json"))

    def add_loaded(self, facts: Mapping[str, Any]) -> None:
        """Note what is known of a model once it is loaded. Raises ValueError where the run was begun with another."""
        with self._lock():
            run = self.read_run()
            for name, fact in facts.items():
                if name in run and run[name] != fact:
                    raise ValueError(
                        f"{self.path} was begun with other {name} of {run['model']}: {_short(run[name])} there, "
                        f"{_short(fact)} now; take another --out"
                    )
            self._write("run.json", {**run, **facts})

    # ---- outputs

    def image_path(self, item: EvalItem) -> Path:
        """Where an item's image lies."""
        return self.path / "images" / f"{item.id}.png"

    def outputs(self, items: Sequence[EvalItem]) -> dict[str, dict[str, Any]]:
        """The rows of the items whose outputs are there, by id: an image that was deleted is not."""
        known = {item.id: item for item in items}
        rows = self._rows("outputs")
        return {
            row["id"]: row
            for row in rows
            if row["id"] in known and (row.get("image") is None or self.image_path(known[row["id"]]).is_file())
        }

    def outputs_manifest(self, shard: RunShard) -> Manifest:
        """The manifest that a shard adds outputs to."""
        return Manifest(self.path / f"outputs{shard.suffix}.jsonl")

    def save_image(self, item: EvalItem, image: Image.Image) -> dict[str, str]:
        """Write an item's image; returns what its row says of it. An OSError names the file."""
        path = self.image_path(item)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            image.save(partial, format="PNG")
        return {"image": str(path.relative_to(self.path)), "sha256": file_hash(path)}

    # ---- verdicts

    def verdicts(self, judge: str) -> dict[str, dict[str, Any]]:
        """The last row of each item that this judge was asked about, by id."""
        return {row["id"]: row for row in self._rows(f"verdicts/{judge}")}

    def verdicts_manifest(self, judge: str, shard: RunShard) -> Manifest:
        """The manifest that a shard adds a judge's verdicts to."""
        path = self.path / "verdicts" / f"{judge}{shard.suffix}.jsonl"
        path.parent.mkdir(exist_ok=True)
        return Manifest(path)

    # ---- results

    def write_result(self, result: Mapping[str, Any], markdown: str) -> Path:
        """Write result.json and result.md; returns the former's path."""
        with self._lock():
            with atomic_file(self.path / "result.md") as partial:
                partial.write_text(markdown, encoding="utf-8")
            self._write("result.json", result)
        return self.path / "result.json"

    def write_image_manifest(self, rows: Sequence[Mapping[str, Any]]) -> Path:
        """Write manifest.jsonl, a line an image; returns its path."""
        path = self.path / "manifest.jsonl"
        with self._lock(), atomic_file(path) as partial:
            partial.write_text(json_lines(rows), encoding="utf-8")
        return path

    def _rows(self, name: str) -> list[dict[str, Any]]:
        paths = [self.path / f"{name}.jsonl", *sorted(self.path.glob(f"{name}-[0-9]*-of-[0-9]*.jsonl"))]
        return [row for path in paths for row in read_manifest(path)]

    def _write(self, name: str, contents: Mapping[str, Any]) -> None:
        with atomic_file(self.path / name) as partial:
            write_json(partial, contents)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Shards of one run write run.json and the results one after another."""
        with (self.path / ".lock").open("w") as handle:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def file_hash(path: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:12]}..."
