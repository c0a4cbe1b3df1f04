"""BAGEL on many devices: the modules that lie in shards of their own; and its linears that an adapter may have, by
groups."""

from unimm.adapters.config import LinearGroups, decoder_linears
from unimm.models.parallel_plan import ParallelPlan, decoder_tensor_plan

# "und" and "gen" are all linears of an expert
LORA_TARGETS: LinearGroups = {
    **decoder_linears("und", "und"),
    **decoder_linears("gen", "gen"),
    "latents": ("vae2llm", "llm2vae"),
    "connector": ("connector.fc1", "connector.fc2"),
    "vision.attention": tuple(f"vision.blocks.{{}}.{name}" for name in ("q", "k", "v", "out_proj")),
    "vision.mlp": ("vision.blocks.{}.mlp.fc1", "vision.blocks.{}.mlp.fc2"),
}

PARALLEL_PLAN = ParallelPlan(blocks=("decoder.blocks.{}",))

TENSOR_PARALLEL_PLAN = decoder_tensor_plan("decoder")
