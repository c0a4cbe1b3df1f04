"""Emu3 on many devices: the modules that lie in shards of their own; and its linears that an adapter may have, by
groups."""

from unimm.adapters.config import LinearGroups, decoder_linears
from unimm.models.parallel_plan import ParallelPlan, decoder_tensor_plan
from unimm.vlms.llama_layout import EXPERT

LORA_TARGETS: LinearGroups = decoder_linears("decoder", EXPERT)

PARALLEL_PLAN = ParallelPlan(blocks=("decoder.blocks.{}",))

TENSOR_PARALLEL_PLAN = decoder_tensor_plan("decoder")
