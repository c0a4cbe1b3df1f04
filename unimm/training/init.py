"""The start of a training: a tokenizer, files of earlier recipes, initial weights, compiled layers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from einops import rearrange
from torch import Tensor, nn

from unimm.checkpoint import hub
from unimm.checkpoint.load import check_not_interrupted
from unimm.data.shapes import tokenizer_corpus
from unimm.encoders.siglip import SiglipConfig, SiglipVisionEncoder
from unimm.encoders.timm_vit import TimmVisionEncoder
from unimm.nn.decoder import Decoder, ExpertWeights
from unimm.tokenizers.text import SentencePieceTokenizer
from unimm.training.checkpoints import read_tensors


def trained_file(folder: str | Path, name: str, recipe: str) -> Path:
    """A file that another recipe wrote. Raises ValueError, with the command that makes it, where it is not there, or
    where its folder holds the files of two models."""
    if not (Path(folder) / name).is_file():
        raise ValueError(f"no {name} in {folder}: run `unimm train {recipe} runs/{recipe}` first")
    check_not_interrupted(Path(folder))
    return Path(folder) / name


def load_trained(module: nn.Module, path: Path, *, prefix: str = "") -> None:
    """Load the weights in a file that another recipe wrote. Raises ValueError where they are of other numbers.

    prefix: of the names that they have in the module.
    """
    try:
        module.load_state_dict({f"{prefix}{name}": x.float() for name, x in read_tensors(path).items()})
    except RuntimeError as error:
        raise ValueError(f"{path} is of other numbers than the recipe's model: {error}") from error


def resolve_part(name: str, part: str) -> Path:
    """The folder of a part of a release: its subfolder of that name, or the whole where the part stands alone."""
    folder = hub.resolve(name, subfolders=(part,))
    return folder / part if (folder / part).is_dir() else hub.resolve(name)


def train_tokenizer(
    vocab_size: int,
    *,
    special_tokens: Sequence[str],
    extra: Sequence[str] = (),
    lines: int = 20_000,
    kind: str = "unigram",
) -> SentencePieceTokenizer:
    """A sentencepiece model of the shapes world's text, with bytes for what is not in it.

    extra: texts that are added to the corpus, often. kind: "bpe" fills the whole vocabulary; "unigram" stops at 437
    pieces, and a text is a third longer. Raises ValueError for a vocabulary that is too small.
    """
    model = io.BytesIO()
    try:
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
    except RuntimeError as error:
        raise ValueError(
            f"got vocab_size {vocab_size}, expected one that the texts' characters fit into: {error}"
        ) from error
    return SentencePieceTokenizer(model.getvalue())


def init_decoder(decoder: Decoder) -> None:
    """Set embeddings to half the size of the features beside them, and scale residual branches down with depth."""
    nn.init.normal_(decoder.embed.weight, std=0.5)
    scale = (2 * decoder.config.n_layers) ** -0.5
    for expert in _experts(decoder):
        for linear in (expert.out_proj, expert.mlp.down):
            nn.init.normal_(linear.weight, std=scale * linear.in_features**-0.5)


def _experts(decoder: nn.Module) -> list[ExpertWeights]:
    return [module for module in decoder.modules() if isinstance(module, ExpertWeights)]


def init_timm_vit(encoder: TimmVisionEncoder, weights: Mapping[str, Tensor]) -> None:
    """Load the weights of a SiglipNaViT (vision.safetensors of bagel-nano-vit) into timm's ViT of the same numbers.

    Raises ValueError where the numbers differ. The grid of position embeddings may be smaller: it takes the corner.
    """
    trunk = encoder.trunk
    renamed = {
        "attn.proj": "out_proj",
        "norm1": "attn_norm",
        "norm2": "mlp_norm",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    # the attention pool is not used, and keeps its weights
    state = {name: x for name, x in trunk.state_dict().items() if name.startswith("attn_pool.")}
    state["pos_embed"] = _corner(weights["pos_embed.weight"], encoder.grid_side)[None]
    state["patch_embed.proj.weight"] = _patch_kernel(weights["patch_embed.weight"], encoder.patch_size)
    state["patch_embed.proj.bias"] = weights["patch_embed.bias"]
    for name in ("weight", "bias"):
        state[f"norm.{name}"] = weights[f"norm.{name}"]
        for i in range(len(trunk.blocks)):
            block = f"blocks.{i}."
            state[f"{block}attn.qkv.{name}"] = torch.cat([weights[f"{block}{part}.{name}"] for part in "qkv"])
            state |= {f"{block}{theirs}.{name}": weights[f"{block}{ours}.{name}"] for theirs, ours in renamed.items()}
    _load_vit(trunk, {name: x.float() for name, x in state.items()})


def init_siglip(numbers: Mapping[str, Any], folder: str) -> SiglipVisionEncoder:
    """An encoder of the recipe's numbers that begins from the trained ViT in a folder; it may have fewer blocks.

    Raises ValueError where the numbers differ. The grid of position embeddings may be smaller: it takes the corner.
    """
    encoder = SiglipVisionEncoder(SiglipConfig.from_json(dict(numbers)))
    path = trained_file(hub.resolve(folder), "vision.safetensors", "bagel-nano-vit")
    weights = {name: x.float() for name, x in read_tensors(path).items()}
    weights["pos_embed"] = _corner(weights["pos_embed.weight"], encoder.config.grid_side)
    weights["patch_embed.weight"] = _patch_kernel(weights["patch_embed.weight"], encoder.config.patch_size)
    _load_vit(encoder, {name: weights[name] for name in encoder.state_dict() if name in weights})
    return encoder


def _corner(pos_embed: Tensor, side: int) -> Tensor:
    """Position embeddings [n, D] of a square grid -> those of its top left corner of side * side."""
    grid = rearrange(pos_embed, "(h w) D -> h w D", h=round(len(pos_embed) ** 0.5))
    return rearrange(grid[:side, :side], "h w D -> (h w) D")


def _patch_kernel(weight: Tensor, p: int) -> Tensor:
    """The weight of a linear on flat patches -> that of a convolution."""
    return rearrange(weight, "D (p q C) -> D C p q", p=p, q=p)


def _load_vit(encoder: nn.Module, state: Mapping[str, Tensor]) -> None:
    try:
        encoder.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the trained ViT has other numbers than the recipe's vision: {error}") from error
