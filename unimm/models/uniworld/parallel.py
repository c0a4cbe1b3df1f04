"""UniWorld on many devices: the modules that lie in shards of their own; and its linears that an adapter may have, by
groups."""

from unimm.adapters.config import LinearGroups, decoder_linears
from unimm.models.parallel_plan import COLUMN, ROW, LinearSplit, ParallelPlan, decoder_tensor_plan
from unimm.vlms.llama_layout import EXPERT

_STREAMS = tuple(f"denoiser.mmdit.double_blocks.{{}}.{stream}." for stream in ("image", "text"))

LORA_TARGETS: LinearGroups = {
    **decoder_linears("mllm", EXPERT, prefix="mllm."),
    "mllm_vision.attention": ("mllm.vision.blocks.{}.qkv", "mllm.vision.blocks.{}.out_proj"),
    "mllm_vision.mlp": tuple(f"mllm.vision.blocks.{{}}.mlp.{name}" for name in ("gate", "up", "down")),
    "mllm_vision.out": ("mllm.vision.merger.mlp.fc1", "mllm.vision.merger.mlp.fc2"),
    "projectors": tuple(f"{part}_projector.{fc}" for part in ("mllm", "siglip", "vae") for fc in ("fc1", "fc2")),
    "denoiser.double.attention": tuple(stream + name for stream in _STREAMS for name in ("qkv", "out_proj")),
    "denoiser.double.mlp": tuple(stream + name for stream in _STREAMS for name in ("mlp.fc1", "mlp.fc2")),
    # attention and feed-forward stand between one linear in and one out
    "denoiser.single": ("denoiser.mmdit.single_blocks.{}.qkv_mlp", "denoiser.mmdit.single_blocks.{}.out_proj"),
}

PARALLEL_PLAN = ParallelPlan(
    blocks=("mllm.decoder.blocks.{}", "denoiser.mmdit.double_blocks.{}", "denoiser.mmdit.single_blocks.{}"),
    ahead_of_blocks=(
        "denoiser.mmdit.double_blocks.{}.image.modulation",
        "denoiser.mmdit.double_blocks.{}.text.modulation",
        "denoiser.mmdit.single_blocks.{}.modulation",
    ),
)

TENSOR_PARALLEL_PLAN = {
    **decoder_tensor_plan("mllm.decoder"),
    **{stream + "qkv": LinearSplit(kind="column", equal=3) for stream in _STREAMS},
    **{stream + "mlp.fc1": COLUMN for stream in _STREAMS},
    **{stream + name: ROW for stream in _STREAMS for name in ("out_proj", "mlp.fc2")},
    # queries, keys and values beside the feed-forward's hidden units
    "denoiser.mmdit.single_blocks.{}.qkv_mlp": LinearSplit(kind="column", wide=3),
    "denoiser.mmdit.single_blocks.{}.out_proj": LinearSplit(kind="row", wide=1),
}
