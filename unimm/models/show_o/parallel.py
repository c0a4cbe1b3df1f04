"""Show-o on many devices: the modules that lie in shards of their own; and its linears that an adapter may have, by
groups."""

from unimm.adapters.config import LinearGroups
from unimm.models.parallel_plan import COLUMN, ROW, ParallelPlan

BLOCK = "decoder.blocks.{}."
# not the language head: of an image's rows only a part of its weight is read
LORA_TARGETS: LinearGroups = {
    "decoder.attention": tuple(BLOCK + name for name in ("q", "k", "v", "out_proj")),
    "decoder.mlp": (f"{BLOCK}mlp.fc1", f"{BLOCK}mlp.fc2"),
    "projector": ("projector.fc1", "projector.fc2"),
}

PARALLEL_PLAN = ParallelPlan(blocks=("decoder.blocks.{}",))

TENSOR_PARALLEL_PLAN = {
    **{BLOCK + name: COLUMN for name in ("q", "k", "v", "mlp.fc1")},
    **{BLOCK + name: ROW for name in ("out_proj", "mlp.fc2")},
}
