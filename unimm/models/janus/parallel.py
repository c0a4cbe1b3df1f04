"""Janus on many devices: the modules that lie in shards of their own; and its linears that an adapter may have, by
groups."""

from unimm.adapters.config import LinearGroups, decoder_linears
from unimm.models.parallel_plan import ParallelPlan, decoder_tensor_plan
from unimm.vlms.llama_layout import EXPERT

LORA_TARGETS: LinearGroups = {
    **decoder_linears("decoder", EXPERT),
    "aligner": ("aligner.layers.{}",),
    "gen_aligner": ("gen_aligner.layers.{}",),
    "gen_head": ("gen_head.fc1", "gen_head.fc2"),
    "vision.attention": ("vision.trunk.blocks.{}.attn.qkv", "vision.trunk.blocks.{}.attn.proj"),
    "vision.mlp": ("vision.trunk.blocks.{}.mlp.fc1", "vision.trunk.blocks.{}.mlp.fc2"),
}

PARALLEL_PLAN = ParallelPlan(blocks=("decoder.blocks.{}",))

TENSOR_PARALLEL_PLAN = decoder_tensor_plan("decoder")
