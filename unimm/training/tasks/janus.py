"""Training Janus on the little world: pictures as codes after their prompt, answers after pictures and questions.

Plain next-token cross entropy, on codes for drawings, on the assistant's words for the rest; samples packed, all kinds
in every batch (arXiv 2410.13848, sections 3.3 and 3.4; docs/originals/janus.md, "Training").
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from unimm.data.batching import gen_token_counts, kind_indices, label_counts, mean_by_kind, stack_images
from unimm.data.shapes import Example
from unimm.models.common.deepseek_processor import padded_unconditional
from unimm.models.janus.config import JanusConfig
from unimm.models.janus.model import Janus
from unimm.models.janus.network import Projector
from unimm.sequence.packing import PackedBatch
from unimm.sequence.parts import Part, image_part, text_part
from unimm.training.config import TrainConfig, strict
from unimm.training.freezing import freeze
from unimm.training.init import compile_experts, init_decoder, init_timm_vit, train_tokenizer, trained_file
from unimm.training.samples import sample_grid
from unimm.training.tasks.deepseek_chat import (
    DEEPSEEK_TOKENS,
    IMAGE_KINDS,
    TEXT_KINDS,
    DeepseekChatDataset,
    DeepseekChatTrainingConfig,
)


@dataclass(frozen=True, kw_only=True)
class JanusTrainingConfig(DeepseekChatTrainingConfig):
    """What the recipe's `options` may say."""

    # the folder of a trained VQ tokenizer
    vq: str


@dataclass(frozen=True, kw_only=True)
class JanusBatch:
    """A pack whose codes only name their picture and their place in it, until the VQ tokenizer has seen the pictures."""

    pack: PackedBatch
    images: Tensor  # [P, 3, h, w], what is drawn
    text_kinds: Tensor  # [labels with loss], index into TEXTS
    image_kinds: Tensor  # [codes], index into DRAWINGS


@dataclass(frozen=True, kw_only=True)
class JanusDataset(DeepseekChatDataset):
    """Batches by step, with codes to draw."""

    tokens_per_image: int  # of a picture

    def batch(self, examples: Sequence[Example], rng: random.Random) -> JanusBatch:
        """Examples as one pack; the dice drop conditions."""
        drawn: list[np.ndarray] = []
        samples = [self.sample(one, drawn, rng) for one in examples]
        return JanusBatch(
            pack=self.pack(samples),
            images=stack_images(drawn),
            text_kinds=kind_indices(TEXT_KINDS, examples, label_counts(samples)),
            image_kinds=kind_indices(IMAGE_KINDS, examples, gen_token_counts(samples)),
        )

    def sample(self, one: Example, drawn: list[np.ndarray], rng: random.Random) -> list[Part]:
        """A question with its labelled answer, or a prompt, with a picture where it edits one, and the picture to draw."""
        markers, prompt = self.prompts.special_tokens, self.prompt_parts(one)
        if one.target is None:
            return prompt
        if rng.random() < self.options.dropout:
            # all between the first id and the marker of the picture
            *_, last = prompt
            (pads,) = padded_unconditional([*prompt[:-1], text_part([*last.ids.tolist(), markers.boi])], markers.pad)
            prompt = [text_part(pads.ids[:-1].tolist())]
        names = torch.stack((torch.full((self.tokens_per_image,), len(drawn)), torch.arange(self.tokens_per_image)), -1)
        drawn.append(one.target)
        return [
            *prompt,
            image_part(
                "gen_image", names, torch.arange(self.tokens_per_image), boundary_ids=(markers.boi,), causal=True
            ),
        ]


class JanusTask:
    """Janus on the little world."""

    name = "janus-nano"
    loss_names = IMAGE_KINDS + TEXT_KINDS

    def __init__(self, model: Janus, batch: JanusDataset):
        self.model, self.batch = model, batch

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> JanusTask:
        """A fresh model of the recipe's numbers around a trained VQ tokenizer and a trained ViT."""
        options = strict(JanusTrainingConfig, recipe.options, where="options")
        return cls.from_model(init_janus(recipe, options), recipe, options)

    @classmethod
    def from_model(cls, model: Janus, recipe: TrainConfig, options: JanusTrainingConfig) -> JanusTask:
        """For a model that is to be trained."""
        if options.compile:
            compile_experts(model.decoder)
        freeze(model, options.frozen, always=("vq.", "vision.trunk.attn_pool."))
        height, width = model.config.token_grid
        worlds = JanusDataset(
            options=options,
            prompts=model.processor,
            tokens_per_image=height * width,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
        )
        return cls(model, worlds)

    def losses(self, batch: JanusBatch) -> dict[str, Tensor]:
        """Mean cross entropy of every kind of sample in the batch."""
        losses = self.model(self.encode_image_tokens(batch).to(self.model.device))
        drawn = mean_by_kind(IMAGE_KINDS, batch.image_kinds, losses.image)
        return drawn | mean_by_kind(TEXT_KINDS, batch.text_kinds, losses.text)

    @torch.no_grad()
    def encode_image_tokens(self, batch: JanusBatch) -> PackedBatch:
        """The pack with real codes; every picture meets the VQ tokenizer once."""
        if batch.pack.gen_images is None:
            return batch.pack
        codes = self.model.vq.encode_ids(batch.images.to(self.model.device)).cpu()
        picture, place = batch.pack.gen_images.content.unbind(-1)
        return replace(batch.pack, gen_images=replace(batch.pack.gen_images, content=codes[picture, place]))

    def sample_image(self) -> Image.Image:
        """A sheet of test prompts drawn."""
        return sample_grid(self.model)

    def save(self, folder: Path) -> None:
        """The released layout, in bfloat16."""
        self.model.save_pretrained(folder, dtype="bfloat16")


def init_janus(recipe: TrainConfig, options: JanusTrainingConfig) -> Janus:
    """An untrained model of the recipe's numbers, around a trained VQ tokenizer and a trained ViT."""
    vq = trained_file(options.vq, "vq.safetensors", "janus-nano-vq")
    tokenizer = train_tokenizer(options.vocab_size, special_tokens=DEEPSEEK_TOKENS)
    files = janus_config_json(
        recipe.model, json.loads((vq.parent / "vq_config.json").read_text()), tokenizer.backend.vocab_size()
    )
    torch.manual_seed(recipe.seed)
    model = Janus(JanusConfig.from_json(files, {}))
    init_decoder(model.decoder)
    init_projectors(model)
    model.vq.load_state_dict({name: x.float() for name, x in load_file(vq).items()})
    init_timm_vit(model.vision, load_file(trained_file(options.vit, "vision.safetensors", "bagel-nano-vit")))
    # codes begin as what the VQ tokenizer takes them for
    model.gen_embed.weight.data.copy_(F.normalize(model.vq.quantize.embedding.weight, dim=-1))
    model.tokenizer = tokenizer
    return model


def janus_config_json(model: Mapping, vq: Mapping, vocabulary: int) -> dict:
    """The contents of a config.json from the recipe's numbers: language, vision, code_head, generation."""
    d = model["language"]["hidden_size"]
    dims = {"aligner_config": model["vision"]["width"], "gen_aligner_config": vq["params"]["n_embed"]}
    head = {
        "image_token_embed": model["gen_head_dim"],
        "image_token_size": vq["params"]["image_token_size"],
        "n_embed": d,
    }
    return {
        "vision_config": {"params": dict(model["vision"])},
        "gen_vision_config": dict(vq),
        "gen_head_config": {"params": head},
        "language_config": {**model["language"], "vocab_size": vocabulary},
        "generation": dict(model["generation"]),
        **{
            name: {"params": {"projector_type": "mlp_gelu", "depth": 2, "input_dim": dim, "n_embed": d}}
            for name, dim in dims.items()
        },
    }


def init_projectors(model: Janus) -> None:
    """What enters beside words begins about as large as they are; the head of codes begins undecided."""
    for aligner in (model.aligner, model.gen_aligner):
        init_projector(aligner)
    nn.init.normal_(model.gen_head.fc2.weight, std=0.02)
    nn.init.zeros_(model.gen_head.fc2.bias)


def init_projector(aligner: Projector) -> None:
    """Its output begins about as large as its hidden rows."""
    last = aligner.layers[-1]
    assert isinstance(last, nn.Linear), "aligners end with a linear"
    nn.init.normal_(last.weight, std=last.in_features**-0.5)
