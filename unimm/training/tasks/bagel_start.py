"""A BAGEL to begin pre-training from: a language model, a ViT and a VAE of other releases, and the rest new.

Both experts begin as the language model (`copy_init_moe` of the released code), the velocity at 0, and the norms of
queries and keys, which a language model does not have, at 1. docs/originals/bagel.md, "Packing and recipe".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unimm.checkpoint import hub
from unimm.checkpoint.json_files import read_json
from unimm.checkpoint.load import HUB_WEIGHT_FILES, WeightFile, file_path, keep_weights_open, open_weights, weight_files
from unimm.models.bagel.config import WEIGHT_FILES, BagelConfig
from unimm.models.bagel.model import Bagel
from unimm.models.bagel.weights import EXPERT_SUFFIXES
from unimm.nn.pos_embed import sincos_pos_embed_2d
from unimm.tokenizers.kl import AutoencoderKL
from unimm.tokenizers.text import load_tokenizer
from unimm.training.config import from_mapping
from unimm.training.fields import RecipeSection
from unimm.training.init import resolve_part

# what released names of the language model's and of the ViT's parameters begin with in BAGEL's file
LLM_PREFIX = "language_model."
VIT_PREFIX = "vit_model."
NEW_PARTS = ("connector", "time_embedder", "vae2llm", "llm2vae")


@dataclass(frozen=True, kw_only=True)
class BagelPartsConfig(RecipeSection):
    """A recipe's `model` that is put together of parts: folders or hub ids."""

    # a Qwen2, with its tokenizer
    llm: str
    # a SigLIP of images of one size or of any; its table of positions is resized
    vit: str
    # FLUX's, of diffusers or of Black Forest Labs
    vae: str
    # whether queries and keys are normed; a language model that stays frozen was trained without
    qk_norm: bool
    # a BAGEL whose connector it begins with; "" for a new one
    connector: str = ""
    # numbers of BAGEL's config.json: max_latent_size, vit_max_num_patch_per_side, latent_patch_size, ...
    config: Mapping[str, Any] = field(default_factory=dict)


@keep_weights_open()
def build_bagel(model: Mapping[str, Any], *, seed: int) -> Bagel:
    """The BAGEL that a recipe's `model` describes by its parts, in float32. seed: of what is new.

    Raises ValueError for parts that do not fit.
    """
    parts = from_mapping(BagelPartsConfig, model, where="model of the recipe")
    llm = hub.resolve(parts.llm)
    vit = hub.resolve(parts.vit)
    vae = AutoencoderKL.from_pretrained(resolve_part(parts.vae, "vae"))
    config = parts_config(llm, vit, vae, parts)
    with torch.device("meta"):
        bagel = Bagel(config)
    bagel.to_empty(device="cpu")
    bagel.vae = vae
    bagel.tokenizer = load_tokenizer(llm, vocab_size=config.decoder.vocab_size)
    torch.manual_seed(seed)
    init_new_parts(bagel)
    sources = source_names(bagel)
    found = {
        name for folder in (llm, vit) for name in copy_weights(bagel, weight_files(folder, HUB_WEIGHT_FILES), sources)
    }
    if parts.connector:
        names = {name: [name] for name, _ in bagel.named_parameters() if name.startswith("connector.")}
        copy_weights(bagel, weight_files(hub.resolve(parts.connector), WEIGHT_FILES), names)
    tied = "model.embed_tokens.weight"
    if "decoder.head.weight" not in found and tied in sources:
        bagel.decoder.head.weight.data.copy_(bagel.decoder.embed.weight)
        found.add("decoder.head.weight")
    if missing := sorted({name for names in sources.values() for name in names} - found):
        raise ValueError(
            f"{parts.llm} and {parts.vit} have no weights for {', '.join(missing[:5])}: expected Qwen2's, SigLIP's"
        )
    return bagel.eval()


def parts_config(llm: Path, vit: Path, vae: AutoencoderKL, parts: BagelPartsConfig) -> BagelConfig:
    """The config of a BAGEL of these parts."""
    decoder = dict(read_json(llm / "config.json", required=True))
    decoder |= {"tie_word_embeddings": False, "qk_norm": parts.qk_norm}
    file = read_json(vit / "config.json", required=True)
    vision = dict(file.get("vision_config") or file)
    numbers = dict(parts.config) | {"vae_config": vae.config.to_json()}
    config = BagelConfig.from_json(decoder, vision, numbers)
    # images of any size up to that of the connector's table
    image_size = config.vit_grid * config.vision.patch_size if config.vision else 0
    return BagelConfig.from_json(decoder, vision | {"image_size": image_size}, numbers)


def init_new_parts(bagel: Bagel) -> None:
    """Set the weights of what no part brings: torch's own, the velocity 0, and the fixed tables."""
    for name in NEW_PARTS:
        for module in bagel.get_submodule(name).modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    for table in (bagel.llm2vae.weight, bagel.llm2vae.bias):
        nn.init.zeros_(table)
    dim = bagel.config.decoder.dim
    bagel.vit_pos_embed.copy_(sincos_pos_embed_2d(bagel.config.vit_grid, dim))
    bagel.latent_pos_embed.copy_(sincos_pos_embed_2d(bagel.config.latent_grid, dim))
    for name, parameter in bagel.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            nn.init.ones_(parameter)


def source_names(bagel: Bagel) -> dict[str, list[str]]:
    """A tensor's name in the files of the parts -> the parameters that begin as it: of both experts, or of the ViT."""
    key_map = bagel.key_maps()[WEIGHT_FILES]
    sources: dict[str, list[str]] = {}
    for name, _ in bagel.named_parameters():
        if name.startswith((*NEW_PARTS, "vae.")) or name.endswith(("q_norm.weight", "k_norm.weight")):
            continue
        (released,) = key_map.released_tensors(name)
        source = released.removeprefix(VIT_PREFIX)
        if released.startswith(LLM_PREFIX):
            source = released.removeprefix(LLM_PREFIX).replace(EXPERT_SUFFIXES["gen"], "")
        sources.setdefault(source, []).append(name)
    return sources


@torch.no_grad()
def copy_weights(bagel: Bagel, files: Sequence[WeightFile], sources: Mapping[str, list[str]]) -> list[str]:
    """Copy what files hold; returns the names of the parameters. Raises ValueError for other shapes."""
    found = []
    for source in files:
        with open_weights(source) as file:
            for key in file.keys():
                for name in sources.get(key, ()):
                    target = bagel.get_parameter(name)
                    target.copy_(fitted(file.get_tensor(key).float(), target, f"{key} in {file_path(source)}"))
                    found.append(name)
    return found


def fitted(x: Tensor, target: Tensor, where: str) -> Tensor:
    """A tensor in the shape of a parameter: convolutions of patches as linears, tables of positions of another size by
    bicubic interpolation. Raises ValueError for any other difference."""
    if x.ndim == 4 and target.ndim == 2:
        x = rearrange(x, "D C p q -> D (p q C)")
    is_table = where.startswith("vision_model.embeddings.position_embedding")
    if is_table and x.shape[0] != target.shape[0] and x.shape[1:] == target.shape[1:]:
        x = resize_positions(x, round(len(target) ** 0.5))
    if x.shape != target.shape:
        raise ValueError(f"{where} is {list(x.shape)}, expected {list(target.shape)}: take parts of one size")
    return x


def resize_positions(table: Tensor, side: int) -> Tensor:
    """Position embeddings [n * n, D] of a square grid -> those of one of side * side."""
    grid = rearrange(table, "(h w) D -> 1 D h w", h=round(len(table) ** 0.5))
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return rearrange(grid, "1 D h w -> (h w) D")
