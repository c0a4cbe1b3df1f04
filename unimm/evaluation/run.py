"""One run of a benchmark: items, generation, judge, scores; each stage goes on where it was stopped."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from unimm.distributed.shared_model import SharedModel
from unimm.evaluation.benchmarks.base import Benchmark
from unimm.evaluation.folder import RunFolder, file_hash
from unimm.evaluation.generating import BenchmarkModel, describe_weights, generate_outputs
from unimm.evaluation.items import EvalItem, check_items, hash_items, make_batches
from unimm.evaluation.judges.base import ItemJudge, JudgeTask, Verdict
from unimm.evaluation.results import build_result, result_markdown
from unimm.evaluation.sharding import RunShard, wait_for_all


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """The model of a run: its name, how to load it, which is done only where something is left to generate, and options
    of `generate`.

    options_for: those that are known when it is loaded, as a benchmark's published ones. describe: what the run's file
    says of the weights.
    """

    name: str
    load: Callable[[], BenchmarkModel | SharedModel]
    dtype: str = "float32"
    quantize: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    options_for: Callable[[Any], Mapping[str, Any]] | None = None
    describe: Callable[[Any], Mapping[str, Any]] = describe_weights


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What a process has to say when it is done: the result, or how many items other shards have still to do."""

    result: dict[str, Any] | None
    markdown: str = ""
    missing: int = 0


def run_benchmark(
    benchmark: Benchmark,
    model: ModelSource,
    make_judge: Callable[[], ItemJudge],
    out: Path,
    *,
    shard: RunShard | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> RunState:
    """Run a benchmark, or this process's shard of it, in the folder `out`, or go on with it.

    make_judge: called once all of the shard's outputs are there. The result
    is written by whoever finds the outputs and verdicts of all shards. Raises ValueError for bad input and for the
    folder of another run, JudgeUnavailableError for a judge that is down, OSError, with the file, for a full disk;
    what was kept before that is whole.
    """
    shard = shard or RunShard()
    items = benchmark.items()
    folder = RunFolder(out)
    plan = {
        "benchmark": benchmark.NAME,
        "seed": benchmark.options.seed,
        "items": benchmark.source,
        "options": benchmark.settings(),
    }
    size = benchmark.batch if batch_size is None else batch_size
    mine = generate_items(items, model, folder, plan, shard=shard, batch_size=size, progress=progress)
    judge = make_judge()
    judge_outputs(judge, mine, folder, shard, progress=progress)
    wait_for_all(shard)
    return finish(benchmark, items, judge, folder)


def generate_items(
    items: Sequence[EvalItem],
    model: ModelSource,
    folder: RunFolder,
    plan: Mapping[str, Any],
    *,
    shard: RunShard,
    batch_size: int,
    progress: bool = True,
) -> list[EvalItem]:
    """Generate what this shard still lacks of a run's outputs; returns the shard's items.

    plan: what run.json says beside the model and the hashes of the items. The model is loaded only where something is
    left to do, and let go of afterwards: a judge may need its memory.
    """
    if batch_size < 1:
        raise ValueError(f"got batch_size {batch_size}: expected at least 1")
    check_items(items, plan["benchmark"])
    run = folder.claim(
        {
            **plan,
            "model": model.name,
            "dtype": model.dtype,
            "quantize": model.quantize,
            **hash_items(items),
            "options": {**plan["options"], **_plain(model.options)},
            "batch_size": batch_size,
        }
    )
    if shard.count > 1 and run["batch_size"] != batch_size:
        # parts take whole batches, so that they would be of different runs
        raise ValueError(
            f"got --batch {batch_size} for a part of {folder.path}, whose other parts have {run['batch_size']}: take "
            "the same"
        )
    batches = make_batches(items, batch_size)
    done = folder.outputs(items)
    mine = [item for batch in shard.pick(batches) for item in batch]
    if any(item.id not in done for item in mine):
        loaded = model.load()
        published = model.options_for(loaded) if model.options_for else {}
        options = {**published, **model.options}
        folder.add_loaded({"weights": model.describe(loaded), "generate": _plain(options)})
        generate_outputs(loaded, batches, folder, shard, options=options, done=done, progress=progress)
    return mine


def judge_outputs(
    judge: ItemJudge, items: Sequence[EvalItem], folder: RunFolder, shard: RunShard, *, progress: bool = True
) -> None:
    """Judge the items that are not judged yet, whose judge failed, or whose image is another one than was judged."""
    rows = folder.outputs(items)
    judged = folder.verdicts(judge.key())
    tasks = []
    for item in items:
        task = _task(item, rows[item.id], folder)
        before = judged.get(item.id)
        if before is None or before["score"] is None or before["sha256"] != task.sha256:
            tasks.append(task)
    with (
        folder.verdicts_manifest(judge.key(), shard) as manifest,
        tqdm(
            total=len(items), initial=len(items) - len(tasks), unit="item", desc="judging", disable=not progress
        ) as bar,
    ):
        for task, verdict in judge.judge(tasks) if tasks else ():
            manifest.append([_verdict_row(task, verdict)])
            bar.update()


def finish(benchmark: Benchmark, items: Sequence[EvalItem], judge: ItemJudge, folder: RunFolder) -> RunState:
    """The result of a run whose shards have all been judged; else how many items are missing."""
    rows = folder.outputs(items)
    judged = folder.verdicts(judge.key())
    missing = [item for item in items if item.id not in rows or item.id not in judged]
    if missing:
        return RunState(result=None, missing=len(missing))
    values = {item.id: judged[item.id]["score"] for item in items}
    changed = [item for item in items if judged[item.id]["sha256"] != rows[item.id].get("sha256")]
    units = benchmark.unit_scores(items, values)
    result = build_result(
        benchmark, folder.read_run(), judge.identity(), units, n_items=len(items), n_changed=len(changed)
    )
    markdown = result_markdown(result, benchmark.published)
    folder.write_result(result, markdown)
    return RunState(result=result, markdown=markdown)


def _task(item: EvalItem, row: Mapping[str, Any], folder: RunFolder) -> JudgeTask:
    if row["image"] is None:
        return JudgeTask(item=item, text=row["text"])
    path = folder.image_path(item)
    return JudgeTask(item=item, text=row["text"], image_path=path, sha256=file_hash(path))


def _verdict_row(task: JudgeTask, verdict: Verdict) -> dict[str, Any]:
    details = {"details": verdict.details} if verdict.details else {}
    return {
        "id": task.item.id,
        "score": verdict.score,
        "reason": verdict.reason,
        "sha256": task.sha256,
        "replies": [asdict(reply) for reply in verdict.replies],
        **details,
    }


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON has them."""
    plain = (str, int, float, bool, type(None))
    return {name: value if isinstance(value, plain) else str(value) for name, value in options.items()}
