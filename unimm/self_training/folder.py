"""The folder of a run of STARS: what was asked, the rounds, the results.

stars.json                      the recipe, as it was read
before/normal, before/think     the first model on the evaluation's questions: folders of `unimm eval`
round1-math1/
    generated/                  questions and images, verdicts of the verifier and the exact judge: of `unimm eval`
    selection.jsonl, .json      a line a candidate: what the verifier and the exact judge say; counts and rates
    accepted/                   the dataset, of the format imagefolder: questions and accepted images
    training/                   the run of `unimm train`; release/ is the round's model
    trained.json                that the training came to its end
    normal/, think/             the round's model on the evaluation's questions
result.json, result.md          all scores and rates
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unimm.checkpoint.atomic import atomic_file
from unimm.checkpoint.json_files import read_json, write_json
from unimm.self_training.config import StarsConfig

RUN_FILE = "stars.json"
TRAINED_FILE = "trained.json"


class StarsFolder:
    """The files of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def claim(self, config: StarsConfig) -> None:
        """Make this folder the run's, or take it up again.

        Raises ValueError, with what differs, for the folder of another run, and for one that holds other files.
        """
        plan = json.loads(json.dumps(asdict(config)))
        self.path.mkdir(parents=True, exist_ok=True)
        there = self.read(RUN_FILE)
        if not there:
            if others := sorted(path.name for path in self.path.iterdir() if not path.name.startswith(".")):
                raise ValueError(
                    f"{self.path} holds {', '.join(others[:3])} and no {RUN_FILE}: expected an empty folder, or that of "
                    "this run; take another one"
                )
            self.write(RUN_FILE, plan)
            return
        if different := [name for name in plan if there.get(name) != plan[name]]:
            raise ValueError(
                f"{self.path} holds another run, whose recipe differs in {', '.join(different)}: take another folder, or "
                f"the recipe that {self.path / RUN_FILE} holds"
            )

    def round(self, number: int, level: str) -> Path:
        """The folder of a round, counted from 1."""
        return self.path / f"round{number}-{level}"

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file; empty where there is none yet."""
        return dict(read_json(self.path / name))

    def write(self, name: str, contents: Mapping[str, Any]) -> None:
        """Write a JSON file."""
        with atomic_file(self.path / name) as partial:
            write_json(partial, contents)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file."""
        with atomic_file(self.path / name) as partial:
            partial.write_text(text, encoding="utf-8")
