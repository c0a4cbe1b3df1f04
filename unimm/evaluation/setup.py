"""From what a user names, as on the command line, to a benchmark, a judge and a model."""

import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any

from unimm.checkpoint import hub
from unimm.checkpoint.json_files import read_json
from unimm.distributed.ranks import Ranks
from unimm.distributed.shared_model import shared_model
from unimm.evaluation.benchmarks.base import Benchmark
from unimm.evaluation.generating import BenchmarkModel, describe_weights
from unimm.evaluation.judges.base import ItemJudge
from unimm.evaluation.judges.readers import ModelReader, UnderstandingModel
from unimm.evaluation.registry import BENCHMARKS
from unimm.evaluation.run import ModelSource
from unimm.models.base import UnifiedModel
from unimm.models.load_options import LoadOptions
from unimm.models.registry import detect_family, family_class, releases

# vision-language models by their model_type: they read, and generate nothing
READERS = {
    "qwen2_5_vl": "unimm.vlms.qwen2_5_vl.model:QwenVL",
    "llava_onevision": "unimm.vlms.llava_onevision.model:LlavaOneVision",
}


def find_benchmark(name: str) -> type[Benchmark]:
    """The class of a benchmark. Raises ValueError for an unknown name, with the nearest."""
    if name not in BENCHMARKS:
        nearest = difflib.get_close_matches(name, BENCHMARKS, n=1) or list(BENCHMARKS)
        raise ValueError(f"unknown benchmark {name!r}: expected {', '.join(nearest)}")
    module, _, attribute = BENCHMARKS[name].partition(":")
    return getattr(import_module(module), attribute)


def find_family(name: str) -> type[UnifiedModel]:
    """The class of the model of that name, whose files are fetched where it lies on the hub."""
    return family_class(hub.resolve(name, known_names=tuple(row.name for row in releases())))


def model_source(
    name: str, benchmark: str, *, load: LoadOptions | None = None, options: Mapping[str, Any] | None = None
) -> ModelSource:
    """The model of that name, with the options that the benchmark's published scores were generated with, unless others
    are given.

    load: how it is loaded. options: of `generate`.
    """
    load = load or LoadOptions()

    def published(model: BenchmarkModel) -> Mapping[str, Any]:
        if not isinstance(model, UnifiedModel):
            return {}
        of_family = model.BENCHMARK_OPTIONS.get(benchmark)
        return of_family(getattr(model, "config")) if of_family else {}  # noqa: B009

    return ModelSource(
        name=name,
        load=lambda: load.load(name),
        dtype=load.dtype,
        quantize=load.quantize,
        options=options or {},
        options_for=published,
    )


@contextmanager
def shared_source(source: ModelSource, name: str, load: LoadOptions, ranks: Ranks) -> Iterator[ModelSource | None]:
    """The source with its model computed by all ranks together, for the first one, whose body does the work; None on the
    others, once it is done."""
    weights: dict[str, Any] = {}

    def load_whole() -> UnifiedModel:
        model = load.load(name)
        if ranks.is_first:  # before it is split
            weights.update(describe_weights(model))
        return model

    with shared_model(load_whole, ranks) as load_shared:
        options_for = source.options_for
        yield load_shared and replace(
            source,
            load=load_shared,
            options_for=options_for and (lambda shared: options_for(shared.model)),
            describe=lambda shared: weights,
        )


def prepare_judge(
    name: str | None,
    benchmark: Benchmark,
    *,
    device: str,
    dtype: str,
    judge_model: str | None = None,
    workers: int | None = None,
) -> Callable[[], ItemJudge]:
    """A function that makes a judge; what can be wrong of it is found now, before hours of generation.

    name: as `parse_judge` reads it, or None for the benchmark's own. judge_model, workers: of an endpoint. A reader in
    process is only loaded once it is needed, when the model that it judges is gone.
    """
    spec = benchmark.judge_spec(name)
    make = benchmark.judge_maker(spec, device=device)
    if spec.kind == "vlm":
        return lambda: make(load_reader(spec.where, device=device, dtype=dtype))
    if spec.kind != "openai":
        return lambda: make(None)
    from unimm.evaluation.judges.openai_endpoint import WORKERS, OpenAIReader

    extra = benchmark.endpoint_options
    reader = OpenAIReader(spec.where, model=judge_model, workers=workers or WORKERS, extra_body=extra)
    return lambda: make(reader)


def load_reader(name: str, *, device: str, dtype: str) -> ModelReader:
    """A model of this library to ask: a unified one, or a vision-language model."""
    model = load_understanding_model(name, device=device, dtype=dtype)
    return ModelReader(model, name, weights=describe_weights(model))


def load_understanding_model(name: str, *, device: str, dtype: str) -> UnderstandingModel:
    """A model that answers questions about images: a unified one, or a vision-language model."""
    folder = hub.resolve(name, known_names=tuple(row.name for row in releases()))
    if detect_family(folder) is None and (kind := read_json(folder / "config.json").get("model_type")) in READERS:
        module, _, attribute = READERS[kind].partition(":")
        return getattr(import_module(module), attribute).from_pretrained(name, device=device, dtype=dtype)
    return LoadOptions(device=device, dtype=dtype).load(name)
