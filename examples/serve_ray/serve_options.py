"""The application of `unimm serve` under Ray Serve: several replicas, each an engine of its own. See README.md.

serve run serve_app:build replicas=2
"""

import os
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from unimm.models.load_options import LoadOptions
from unimm.serving.guard import AccessRules
from unimm.serving.limits import ServingLimits
from unimm.serving.server import ServerPlan, parse_access

API_KEYS = "UNIMM_API_KEYS"  # the environment variable that holds them, as for `unimm serve`


class Options(BaseModel):
    """What `serve run` takes as name=value, and serve.yaml as `args`."""

    model_config = ConfigDict(extra="forbid")

    # what a replica serves, separated by commas
    models: str = "bagel-nano"
    device: str = "cpu"
    dtype: str = "float32"
    quantize: str | None = None
    offload: str | None = None
    allow_remote_images: bool = False
    # who may ask: whoever has a key of UNIMM_API_KEYS, whoever names a loopback address, anyone
    access: Literal["keys", "loopback", "anyone"] = "keys"

    # `replicas` of them; or as many as the load asks for, up to `max_replicas`
    replicas: int = Field(1, ge=1)
    max_replicas: int | None = None
    # requests on their way for each replica, on average, that autoscaling aims at
    target_requests: float = Field(8, gt=0)
    # seconds that the load has to ask for more replicas, or fewer, before they change; Ray's own defaults
    upscale_delay: float = Field(30, ge=0)
    downscale_delay: float = Field(600, ge=0)
    cpus: float = Field(1, gt=0)
    gpus: float = Field(0, ge=0)

    # of a replica's engine
    max_running: int = Field(32, ge=1)
    memory_mb: int | None = Field(None, ge=1)
    timeout: float = Field(300, gt=0)
    drain: float = Field(60, gt=0)
    # requests that wait at a proxy for a replica with room; more are answered by 503
    max_waiting: int = Field(256, ge=1)

    @property
    def limits(self) -> ServingLimits:
        """A replica's."""
        memory = None if self.memory_mb is None else self.memory_mb * 2**20
        return ServingLimits(
            max_running=self.max_running, memory_bytes=memory, timeout_s=self.timeout, drain_s=self.drain
        )

    def n_replicas(self) -> dict[str, Any]:
        """How many replicas there are, as Ray Serve's options. Raises ValueError for fewer at most than at least."""
        if self.max_replicas is None:
            return {"num_replicas": self.replicas}
        if self.max_replicas < self.replicas:
            raise ValueError(
                f"got max_replicas {self.max_replicas}: expected at least replicas {self.replicas}; raise it, or leave "
                "it out for a fixed number"
            )
        autoscaling = {
            "min_replicas": self.replicas,
            "max_replicas": self.max_replicas,
            "target_ongoing_requests": self.target_requests,
            "upscale_delay_s": self.upscale_delay,
            "downscale_delay_s": self.downscale_delay,
        }
        return {"autoscaling_config": autoscaling}

    def rules(self) -> AccessRules:
        """Who may ask; called where the replica runs, whose environment has the keys. Raises ValueError for none."""
        if self.access != "keys":
            return AccessRules() if self.access == "loopback" else AccessRules(hosts=())
        keys = os.environ.get(API_KEYS)
        if not keys:
            raise ValueError(
                f"got no API keys: set {API_KEYS} before `ray start` on every node, or give access=loopback where the "
                "proxies listen at 127.0.0.1 alone, or access=anyone where that is meant"
            )
        return parse_access("0.0.0.0", api_keys=keys)

    def plan(self) -> ServerPlan:
        """What a replica makes its application of, as `unimm serve` does."""
        return ServerPlan(
            models=tuple(name.strip() for name in self.models.split(",")),
            load=LoadOptions(device=self.device, dtype=self.dtype, quantize=self.quantize, offload=self.offload),
            threads=max(1, int(self.cpus)),
            allow_remote_images=self.allow_remote_images,
            limits=self.limits,
            rules=self.rules(),
        )
