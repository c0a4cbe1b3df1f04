"""MetaQuery on many devices: the modules that lie in shards of their own; and its linears that an adapter may have, by
groups."""

from unimm.adapters.config import LinearGroups, decoder_linears
from unimm.models.parallel_plan import COLUMN, ROW, LinearSplit, ParallelPlan, decoder_tensor_plan
from unimm.vlms.llama_layout import EXPERT

LORA_TARGETS: LinearGroups = {
    **decoder_linears("mllm", EXPERT, prefix="mllm."),
    # of Qwen2.5-VL's vision encoder and of LLaVA-OneVision's
    "mllm_vision.attention": tuple(f"mllm.vision.blocks.{{}}.{name}" for name in ("qkv", "q", "k", "v", "out_proj")),
    "mllm_vision.mlp": tuple(f"mllm.vision.blocks.{{}}.mlp.{name}" for name in ("gate", "up", "down", "fc1", "fc2")),
    "mllm_vision.out": tuple(
        f"mllm.{part}.{fc}" for part in ("vision.merger.mlp", "projector") for fc in ("fc1", "fc2")
    ),
    "connector.attention": ("connector.blocks.{}.attention.qkv", "connector.blocks.{}.attention.out_proj"),
    "connector.mlp": tuple(f"connector.blocks.{{}}.mlp.{name}" for name in ("gate", "up", "down")),
    "connector.out": ("connector.fc1", "connector.fc2"),
    # the feed-forward of Sana's blocks is of convolutions
    "denoiser.attention": ("denoiser.blocks.{}.attention.qkv", "denoiser.blocks.{}.attention.out_proj"),
    "denoiser.cross_attention": tuple(
        f"denoiser.blocks.{{}}.cross_attention.{name}" for name in ("q", "kv", "out_proj")
    ),
    "denoiser.caption": ("denoiser.caption_proj.fc1", "denoiser.caption_proj.fc2"),
}

PARALLEL_PLAN = ParallelPlan(
    blocks=("mllm.decoder.blocks.{}", "connector.blocks.{}", "denoiser.blocks.{}"),
    ahead_of_blocks=("denoiser.blocks.{}.cross_attention.kv",),
)

TENSOR_PARALLEL_PLAN = {
    **decoder_tensor_plan("mllm.decoder"),
    "denoiser.blocks.{}.attention.qkv": LinearSplit(kind="column", equal=3),
    "denoiser.blocks.{}.attention.out_proj": ROW,
    "denoiser.blocks.{}.cross_attention.q": COLUMN,
    "denoiser.blocks.{}.cross_attention.kv": LinearSplit(kind="column", equal=2),
    "denoiser.blocks.{}.cross_attention.out_proj": ROW,
}
