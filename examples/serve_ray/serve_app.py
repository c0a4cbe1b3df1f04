"""The application of `unimm serve` under Ray Serve: several replicas, each an engine of its own. See README.md.

serve run serve_app:build replicas=2
"""

from fastapi import FastAPI
from ray import serve
from serve_options import Options


class Replica:
    """What Ray asks of a replica beside its requests."""

    app: FastAPI  # set by Ray Serve

    def check_health(self) -> None:
        """Raise RuntimeError where the engine's thread is gone: Ray then ends this replica and begins another."""
        if not self.app.state.api.engine.is_alive:
            raise RuntimeError("the engine's thread has ended")


def build(options: Options) -> serve.Application:
    """The deployment that these options ask for."""

    def make_app() -> FastAPI:
        return options.plan()()

    deployment = serve.deployment(
        serve.ingress(make_app)(Replica),
        name="unimm",
        # as many as the engine works on at once; the others wait where a new replica can take them
        max_ongoing_requests=options.max_running,
        max_queued_requests=options.max_waiting,
        graceful_shutdown_timeout_s=options.drain,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        **options.n_replicas(),
    )
    return deployment.bind()
