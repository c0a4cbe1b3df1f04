"""What training begins with: a text model, files of earlier recipes, initial weights, compiled parts."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from unimm.checkpoint import hub
from unimm.data.shapes import tokenizer_corpus
from unimm.encoders.siglip import SiglipConfig, SiglipVisionEncoder
from unimm.encoders.timm_vit import TimmVisionEncoder
from unimm.nn.decoder import Decoder, ExpertWeights
from unimm.tokenizers.text import SentencePieceTokenizer


def trained_file(folder: str, name: str, recipe: str) -> Path:
    """A file that another recipe wrote. Raises ValueError, with the command that makes it, where it is not there."""
    if not (Path(folder) / name).exists():
        raise ValueError(f"no {name} in {folder}: run `unimm train {recipe} runs/{recipe}` first")
    return Path(folder) / name


def train_tokenizer(
    vocab_size: int,
    *,
    extra: Sequence[str] = (),
    lines: int = 20_000,
    special_tokens: Sequence[str],
    kind: str = "unigram",
) -> SentencePieceTokenizer:
    """A sentencepiece model (bytes for what it has not met) of the world's text, with a family's markers.

    kind: "bpe" fills all of its pieces with words; "unigram" stops at 437, and a text is a third longer.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*tokenizer_corpus(lines), *(list(extra) * 100)]),
        model_writer=model,
        vocab_size=vocab_size,
        model_type=kind,
        byte_fallback=True,
        split_digits=True,
        hard_vocab_limit=False,
        control_symbols=list(special_tokens),
        user_defined_symbols=["<think>", "</think>"],
        bos_id=-1,
        eos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return SentencePieceTokenizer(model.getvalue())


def init_decoder(decoder: Decoder) -> None:
    """Embeddings of half the size of what enters beside them, residual branches scaled down with depth."""
    depth = (2 * decoder.config.n_layers) ** -0.5
    nn.init.normal_(decoder.embed.weight, std=0.5)
    for stream in (module for module in decoder.modules() if isinstance(module, ExpertWeights)):
        for linear in (stream.out_proj, stream.mlp.down):
            nn.init.normal_(linear.weight, std=depth * linear.in_features**-0.5)


def compile_experts(decoder: Decoder) -> None:
    """Fuse the row-wise parts of every block; the number of rows stays free."""
    for stream in (module for module in decoder.modules() if isinstance(module, ExpertWeights)):
        for name in ("project_qkv", "output_and_mlp"):
            setattr(stream, name, torch.compile(getattr(stream, name), dynamic=True))


def init_timm_vit(tower: TimmVisionEncoder, weights: Mapping[str, Tensor]) -> None:
    """The weights of a NaViT (unimm.encoders.siglip) in a tower of the same numbers: one image size, one grid.

    The ViT's table of places may be larger than the tower's grid, which then is its corner. Raises ValueError where the
    numbers differ.
    """
    side, p = round(len(weights["pos_embed.weight"]) ** 0.5), tower.patch_size
    state = {name: x for name, x in tower.trunk.state_dict().items() if name.startswith("attn_pool.")}
    places = rearrange(weights["pos_embed.weight"], "(h w) d -> h w d", h=side)[: tower.grid_side, : tower.grid_side]
    state["pos_embed"] = rearrange(places, "h w d -> 1 (h w) d")
    state["patch_embed.proj.weight"] = rearrange(weights["patch_embed.weight"], "d (p q c) -> d c p q", p=p, q=p)
    state["patch_embed.proj.bias"] = weights["patch_embed.bias"]
    for name in ("weight", "bias"):
        state[f"norm.{name}"] = weights[f"norm.{name}"]
        for i in range(len(tower.trunk.blocks)):
            block = f"blocks.{i}."
            state[f"{block}attn.qkv.{name}"] = torch.cat([weights[f"{block}{part}.{name}"] for part in "qkv"])
            renamed = {
                "attn.proj": "out_proj",
                "norm1": "attn_norm",
                "norm2": "mlp_norm",
                "mlp.fc1": "mlp.fc1",
                "mlp.fc2": "mlp.fc2",
            }
            state |= {f"{block}{theirs}.{name}": weights[f"{block}{mine}.{name}"] for theirs, mine in renamed.items()}
    try:
        tower.trunk.load_state_dict({name: x.float() for name, x in state.items()})
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"the trained ViT has other numbers than the recipe's vision: {error}") from error


def init_siglip(numbers: Mapping[str, Any], vit: str) -> SiglipVisionEncoder:
    """A tower of the recipe's numbers that begins from a trained NaViT, of which it may have fewer blocks."""
    tower = SiglipVisionEncoder(SiglipConfig.from_json(dict(numbers)))
    path = hub.resolve(vit) / "vision.safetensors"
    if not path.exists():
        raise ValueError(f"no {path}: run `unimm train bagel-nano-vit runs/bagel-nano-vit` first")
    held = {name: x.float() for name, x in load_file(path).items()}
    side, p = round(len(held["pos_embed.weight"]) ** 0.5), tower.config.patch_size
    places = rearrange(held.pop("pos_embed.weight"), "(h w) d -> h w d", h=side)[
        : tower.config.grid_side, : tower.config.grid_side
    ]
    held["pos_embed"] = rearrange(places, "h w d -> (h w) d")
    held["patch_embed.weight"] = rearrange(held["patch_embed.weight"], "d (p q c) -> d c p q", p=p, q=p)
    wanted = tower.state_dict()
    try:
        tower.load_state_dict({name: held[name] for name in wanted})
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"the trained ViT has other numbers than the recipe's vision: {error}") from error
    return tower
