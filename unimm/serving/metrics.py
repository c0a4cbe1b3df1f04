"""An engine's numbers for Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from unimm.serving.engine import Engine

STAGE_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
ANSWER_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)


class EngineCollector(Collector):
    """What is read from the engine when it is asked for."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        """The gauges and totals."""
        engine = self.engine
        stats = engine.stats
        gauges = {
            "queue": ("Answers that wait.", len(engine.queue)),
            "running": ("Answers that are worked on.", engine.n_running),
            "memory_reserved_bytes": ("Caches and activations of running answers, estimated.", engine.reserved_bytes),
            "memory_budget_bytes": ("What these may take.", engine.memory_bytes),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"unimm_{name}", text, value=value)
        totals = {
            "requests": ("Requests taken.", stats.n_requests),
            "requests_refused": ("Requests refused because the queue was full.", stats.n_refused),
            "images": ("Images generated; rate() of it is images a second.", stats.n_images),
            "tokens": ("Tokens decoded; rate() of it is tokens a second.", stats.n_tokens),
            "prefix_tokens_reused": ("Tokens of prompts that were not prefilled again.", engine.n_reused_tokens),
            "engine_restarts": ("Times that the engine's work broke and began anew.", stats.n_restarts),
        }
        for name, (text, value) in totals.items():
            yield CounterMetricFamily(f"unimm_{name}", text, value=value)
        answers = CounterMetricFamily("unimm_answers", "Answers, by how they ended.", labels=["end"])
        for end, n in dict(stats.choices).items():
            answers.add_metric([end], n)
        yield answers


class ServerMetrics:
    """The metrics of one application, in a registry of its own."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine))
        stage = Histogram(
            "unimm_stage_seconds",
            "Seconds of one forward: prefill, decode_step, denoise_step, image_decode.",
            ["stage"],
            buckets=STAGE_SECONDS,
            registry=self.registry,
        )
        rows = Counter(
            "unimm_stage_rows", "Rows in these forwards: texts or images.", ["stage"], registry=self.registry
        )
        answer = Histogram(
            "unimm_answer_seconds",
            "Seconds from a request to the end of an answer.",
            buckets=ANSWER_SECONDS,
            registry=self.registry,
        )

        def add_stage(name: str, seconds: float, n: int) -> None:
            stage.labels(name).observe(seconds)
            rows.labels(name).inc(n)

        engine.stats.on_stage = add_stage
        engine.stats.on_choice = answer.observe

    def text(self) -> bytes:
        """All of them, in Prometheus's text format."""
        return generate_latest(self.registry)
