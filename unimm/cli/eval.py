"""The command `unimm eval`."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from unimm.cli.generate import parse_height_width
from unimm.cli.options import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    OffloadOption,
    QuantizeOption,
    SeedOption,
    chosen_shard,
    load_options,
    look_up_family,
)
from unimm.evaluation.registry import BENCHMARKS

if TYPE_CHECKING:
    from unimm.evaluation.benchmarks.base import Benchmark
    from unimm.evaluation.run import RunState
    from unimm.evaluation.sharding import RunShard
    from unimm.models.base import UnifiedModel


BenchmarkArgument = Annotated[str | None, typer.Argument(help=f"One of {', '.join(BENCHMARKS)}.")]
ItemsOption = Annotated[str | None, typer.Option(help="generated, or the path of the benchmark's files.")]
LabelsOption = Annotated[str | None, typer.Option(help="official, or corrected.")]
NumberOption = Annotated[int | None, typer.Option("--n", help="Items a task.")]
JudgeOption = Annotated[str | None, typer.Option(help="exact, vlm:MODEL, openai:URL, or detector.", metavar="JUDGE")]
ThinkOption = Annotated[bool, typer.Option("--think", help="Reason before each image.")]
OutOption = Annotated[
    Path | None, typer.Option(help="The run's folder, in which it goes on after a stop; kept nowhere unless given.")
]
ShardOption = Annotated[
    str | None, typer.Option(help="Part i of n of the run, as 1/4; torchrun's part unless given.", metavar="I/N")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
TasksOption = Annotated[str | None, typer.Option(help="Some of the tasks, with commas between; all unless given.")]
WorldOption = Annotated[str | None, typer.Option(help="Of generated items: shapes, or photos.")]
JudgePromptsOption = Annotated[
    Path | None, typer.Option(help="A checkout of the benchmark, whose judge's questions are read from it.")
]
JudgeModelOption = Annotated[str | None, typer.Option(help="The judge's name at its endpoint.")]
JudgeWorkersOption = Annotated[int | None, typer.Option(min=1, help="Calls to an endpoint at a time.")]
ImagesOption = Annotated[Path | None, typer.Option(help="The folder of the input images.")]
StepsOption = Annotated[int | None, typer.Option(help="Steps of the sampler.")]
GuidanceOption = Annotated[float | None, typer.Option(help="The guidance's scale.")]
SizeOption = Annotated[str | None, typer.Option(help="HEIGHTxWIDTH in pixels.", metavar="HxW")]
BatchOption = Annotated[int | None, typer.Option(help="Items at a time; scores do not depend on it.")]
CompareOption = Annotated[
    tuple[Path, Path] | None, typer.Option(help="Compare two results, unit by unit, and run nothing.")
]


def eval_command(
    benchmark: BenchmarkArgument = None,
    *,
    model: ModelOption = "bagel-nano",
    items: ItemsOption = None,
    labels: LabelsOption = None,
    n: NumberOption = None,
    seed: SeedOption = 1,
    judge: JudgeOption = None,
    think: ThinkOption = False,
    out: OutOption = None,
    shard: ShardOption = None,
    as_json: JsonOption = False,
    tasks: TasksOption = None,
    world: WorldOption = None,
    judge_prompts: JudgePromptsOption = None,
    judge_model: JudgeModelOption = None,
    judge_workers: JudgeWorkersOption = None,
    images: ImagesOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    size: SizeOption = None,
    batch: BatchOption = None,
    compare: CompareOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    quantize: QuantizeOption = None,
    offload: OffloadOption = None,
) -> None:
    """Score a model on a benchmark: means with 95 % intervals; or compare two results."""
    if compare is not None:
        print_comparison(compare, as_json=as_json)
        return
    from unimm.evaluation.benchmarks.base import BenchmarkOptions
    from unimm.evaluation.run import run_benchmark
    from unimm.evaluation.setup import model_source, prepare_judge

    kind = benchmark_class(benchmark)
    load = load_options(device, dtype, quantize=quantize, offload=offload)
    family = look_up_family(model)
    sampling = sampling_options(family, think=think, steps=steps, guidance=guidance, size=size)
    chosen = None if tasks is None else tuple(tasks.split(","))
    asked = BenchmarkOptions(items=items, labels=labels, n=n, seed=seed, think=think, tasks=chosen, world=world)
    thinks = family.supports_thinking
    made = kind(replace(asked, judge_prompts=judge_prompts, images=images, supports_thinking=thinks))
    make_judge = prepare_judge(judge, made, device=device, dtype=dtype, judge_model=judge_model, workers=judge_workers)
    with chosen_shard(shard) as (part, place), run_folder(out, part) as folder:
        source = model_source(model, made.NAME, load=replace(load, device=place(device)), options=sampling)
        state = run_benchmark(made, source, make_judge, folder, shard=part, batch_size=batch)
        if state.result is None:
            print_missing(state, part)
        elif shard is not None or part.index == 0:  # of torchrun's processes the first speaks
            print_result(made, state.result, out, as_json=as_json)


def benchmark_class(name: str | None) -> type["Benchmark"]:
    """The class of a benchmark."""
    if name is None:
        raise ValueError(f"got no benchmark: expected one of {', '.join(BENCHMARKS)}, or --compare with two results")
    from unimm.evaluation.setup import find_benchmark

    return find_benchmark(name)


def sampling_options(
    family: type["UnifiedModel"], *, think: bool, steps: int | None, guidance: float | None, size: str | None
) -> dict[str, Any]:
    """The options of `generate` that are given. Raises NotImplementedError for those that the family does not have."""
    family.supported_options(think=think)
    given = {"guidance": guidance, "size": parse_height_width(size) if size else None}
    return {name: value for name, value in given.items() if value is not None} | family.supported_options(steps=steps)


@contextmanager
def run_folder(out: Path | None, shard: "RunShard") -> Iterator[Path]:
    """The run's folder; unless one is given, a temporary one, which is kept where the run fails."""
    if out is None and shard.count > 1:
        raise ValueError(f"got shard {shard.name} and no --out: expected the folder that all shards write into")
    if out is not None:
        yield out
        return
    folder = Path(tempfile.mkdtemp(prefix="unimm-eval-"))
    try:
        yield folder
    except (ValueError, OSError, KeyboardInterrupt):
        if any(folder.rglob("outputs*.jsonl")):
            Console(stderr=True).print(Text(f"what was generated is kept: go on with --out {folder}"), soft_wrap=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def print_result(benchmark: "Benchmark", result: Mapping[str, Any], out: Path | None, *, as_json: bool) -> None:
    """Print the scores of a run that is done, and where the result is."""
    scores = result["scores"]
    if as_json:
        # of the little world the scores alone, as ever
        typer.echo(json.dumps(accuracies(scores) if benchmark.NAME == "shapes" else result))
    else:
        run = result["run"]
        title = f"{benchmark.NAME}, {run['model']}, seed {run['seed']}, judge {result['judge']['kind']}"
        table = Table("task", "score", "95 % interval", "n", "failed", title=title)
        for task, score in scores.items():
            values = (
                ("-", "-")
                if score["score"] is None
                else (
                    f"{score['score']:.3f}",
                    f"{score['low']:.3f} - {score['high']:.3f}",
                )
            )
            table.add_row(task, *values, str(score["n"]), str(score["failed"]) if score["failed"] else "")
        Console().print(table)
        if out is not None:
            Console().print(Text(f"saved {out / 'result.json'} and {out / 'result.md'}"), soft_wrap=True)
    if result["failed"]:
        what = f"the judge failed on {result['failed']} of {len(result['units'])}, which are in no score: run again"
        Console(stderr=True).print(Text(what, style="red"), soft_wrap=True)


def accuracies(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Scores of right and wrong under the names that `unimm eval shapes --json` prints."""
    return {
        task: {"accuracy": one["score"], "n": one["n"], "low": one["low"], "high": one["high"]}
        for task, one in scores.items()
    }


def print_missing(state: "RunState", shard: "RunShard") -> None:
    """Say that this shard is done, and that others are not."""
    what = (
        f"shard {shard.name} is done; {state.missing} items of other shards are missing, the result comes with the last"
    )
    Console(stderr=True).print(Text(what), soft_wrap=True)


def print_comparison(paths: tuple[Path, Path], *, as_json: bool) -> None:
    """Print the paired differences of two results, group by group."""
    from unimm.evaluation.results import compare_results, read_result

    a, b = (read_result(path) for path in paths)
    differences = compare_results(a, b)
    if as_json:
        typer.echo(json.dumps({group: asdict(one) for group, one in differences.items()}))
        return
    title = f"{a['benchmark']}: {a['run']['model']} (a) and {b['run']['model']} (b)"
    table = Table("task", "a", "b", "b - a", "95 % interval", "p", "n", title=title)
    for group, one in differences.items():
        interval = "-" if one.low is None else f"{one.low:+.3f} - {one.high:+.3f}"
        shown = (f"{one.a:.3f}", f"{one.b:.3f}", f"{one.difference:+.3f}", interval, f"{one.p:.3g}", str(one.n))
        table.add_row(group, *shown)
    Console().print(table)
    if a["judge"] != b["judge"]:
        Console(stderr=True).print(Text("the two were judged by different judges, or under different prompts"))
