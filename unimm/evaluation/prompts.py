"""A file of prompts, drawn by one process or by several: every image has a seed of its own, and is drawn once.

A .txt file holds a prompt a line; a .jsonl file an object a line: `prompt`, and what else the line asks for of `id`,
`seed`, `n`, `images`, `size` and `think`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unimm.evaluation.folder import RunFolder
from unimm.evaluation.items import EvalItem, check_items
from unimm.evaluation.run import ModelSource, generate_items
from unimm.evaluation.sharding import RunShard, wait_for_all
from unimm.generation.numbers import parse_flag
from unimm.processing.requests import expand_seeds, parse_n_images, parse_prompts, parse_size

KEYS = ("prompt", "id", "seed", "n", "images", "size", "think")
BATCH = 4
# bad lines that an error shows
MOST_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class PromptRunState:
    """What a process has to say when it is done: the manifest, or how many images other processes have still to do."""

    manifest: Path | None
    n_images: int
    missing: int = 0


def read_prompt_requests(path: Path, *, seed: int = 0, n: int = 1, think: bool = False) -> list[EvalItem]:
    """The images that a file of prompts asks for, in its order. Raises ValueError, with all bad lines, for such.

    seed: of the first image; every further one has the next, as `generate` numbers them, and a line with a `seed` of
    its own that one and the ones after it. n, think: of lines that do not say. Images of a line are paths, from the
    file's folder. An id is the image's name in the output; unless given it is the number of the line.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"got prompts {path}: expected a .txt file, a prompt a line, or a .jsonl file")
    if not path.is_file():
        raise ValueError(f"no file {path}: expected prompts")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {path}: {error}; save it in UTF-8") from error
    items: list[EvalItem] = []
    bad = []
    n_before = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            asked = {"prompt": line.strip()} if path.suffix == ".txt" else _parse_line(line)
            images = _parse_request({"n": n, "think": think, "seed": seed + n_before, **asked}, number, path.parent)
        except ValueError as error:
            bad.append(f"line {number}: {error}")
            continue
        n_before += len(images)
        items += images
    if bad:
        more = f"; and {len(bad) - MOST_SHOWN} more" if len(bad) > MOST_SHOWN else ""
        raise ValueError(f"{path} has {len(bad)} bad lines: {'; '.join(bad[:MOST_SHOWN])}{more}")
    check_items(items, str(path))
    return items


def _parse_line(line: str) -> dict[str, Any]:
    try:
        asked = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from error
    if not isinstance(asked, dict) or "prompt" not in asked:
        raise ValueError(f"got {line.strip()!r:.80}: expected an object with a prompt")
    if unknown := [key for key in asked if key not in KEYS]:
        raise ValueError(f"got the key {unknown[0]!r:.80}: expected some of {', '.join(KEYS)}")
    return asked


def _parse_request(asked: Mapping[str, Any], number: int, folder: Path) -> list[EvalItem]:
    """The images of a line, with the defaults of lines that do not say. folder: where its paths begin."""
    if not isinstance(asked["prompt"], str):
        raise ValueError(f"got the prompt {asked['prompt']!r:.80}: expected a text")
    (prompt,) = parse_prompts(asked["prompt"])
    n = parse_n_images(asked["n"])
    if isinstance(asked["seed"], list):
        raise ValueError(f"got seed {asked['seed']!r:.80}: expected one number, of the first image")
    name = asked.get("id", f"{number:05}")
    if not isinstance(name, str):
        raise ValueError(f"got the id {name!r:.80}: expected a text")
    images = _parse_paths(asked.get("images"), folder)
    if not (prompt.strip() or images):
        raise ValueError("got an empty prompt: expected at least a word")
    size = asked.get("size")
    return [
        EvalItem(
            id=name if n == 1 else f"{name}-{i + 1}",
            group="prompts",
            prompt=prompt,
            seed=one,
            images=images,
            size=None if size is None else parse_size(size),
            think=parse_flag(asked["think"], "think"),
            payload=number,
        )
        for i, one in enumerate(expand_seeds(asked["seed"], 1, n_images=n))
    ]


def _parse_paths(images: Any, folder: Path) -> tuple[Path, ...]:
    """The paths of a line's input images."""
    given = [] if images is None else images if isinstance(images, list) else [images]
    if not all(isinstance(one, str) and one for one in given):
        raise ValueError(f"got images {images!r:.80}: expected a path, or a list of them")
    paths = tuple(folder / one for one in given)
    if missing := [path for path in paths if not path.is_file()]:
        raise ValueError(f"no image at {missing[0]}")
    return paths


def run_prompts(
    items: Sequence[EvalItem],
    model: ModelSource,
    out: Path,
    *,
    shard: RunShard | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> PromptRunState:
    """Draw the images of a file of prompts, or this process's part of them, into the folder `out`, or go on with it.

    An image depends on its line and its seed; on how many processes there are it does not depend, since batches are
    cut from the file alone, nor, but for rounding, on their size. The manifest is written by whoever finds all images.
    Raises ValueError for what the model refuses and for the folder of other prompts, OSError for a full disk; what was
    kept before that is whole.
    """
    shard = shard or RunShard()
    folder = RunFolder(out)
    # images of one kind are drawn together, wherever they stand in the file
    by_kind = sorted(items, key=lambda one: (one.size or (0, 0), one.think, bool(one.images)))
    plan: dict[str, Any] = {"benchmark": "prompts", "seed": None, "items": "prompts", "options": {}}
    size = BATCH if batch_size is None else batch_size
    generate_items(by_kind, model, folder, plan, shard=shard, batch_size=size, progress=progress)
    wait_for_all(shard)
    rows = folder.outputs(items)
    missing = [item for item in items if item.id not in rows]
    if missing:
        return PromptRunState(manifest=None, n_images=len(items), missing=len(missing))
    made = [_manifest_row(item, rows[item.id]) for item in items]
    return PromptRunState(manifest=folder.write_image_manifest(made), n_images=len(items))


def _manifest_row(item: EvalItem, row: Mapping[str, Any]) -> dict[str, Any]:
    text = {"text": row["text"]} if row["text"] else {}
    return {
        "id": item.id,
        "line": item.payload,
        "prompt": item.prompt,
        "seed": item.seed,
        **text,
        "image": row["image"],
        "sha256": row["sha256"],
    }
