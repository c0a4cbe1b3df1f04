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

from unimm.data.batching import by_group, drawn_tokens, groups, labels, to_images
from unimm.data.shapes import Example
from unimm.models.common.deepseek_processor import unconditional
from unimm.models.janus.config import JanusConfig
from unimm.models.janus.model import Janus
from unimm.models.janus.network import Projector
from unimm.sequence.packing import Pack
from unimm.sequence.parts import Item, image_item, text_item
from unimm.training.config import Recipe, strict
from unimm.training.freezing import freeze
from unimm.training.init import compile_streams, init_decoder, load_tower, text_model, trained
from unimm.training.samples import sheet
from unimm.training.tasks.deepseek_chat import DRAWINGS, SYMBOLS, TEXTS, Common, Conversations


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """What the recipe's `options` may say."""

    # the folder of a trained VQ tokenizer
    vq: str


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A pack whose codes only name their picture and their place in it, until the VQ tokenizer has seen the pictures."""

    pack: Pack
    images: Tensor  # [P, 3, h, w], what is drawn
    text_groups: Tensor  # [labels with loss], index into TEXTS
    draw_groups: Tensor  # [codes], index into DRAWINGS


@dataclass(frozen=True, kw_only=True)
class Worlds(Conversations):
    """Batches by step, with codes to draw."""

    n_codes: int  # of a picture

    def batch(self, examples: Sequence[Example], dice: random.Random) -> Batch:
        """Examples as one pack; the dice drop conditions."""
        drawn: list[np.ndarray] = []
        samples = [self.sample(one, drawn, dice) for one in examples]
        return Batch(
            pack=self.packed(samples),
            images=to_images(drawn),
            text_groups=groups(TEXTS, examples, labels(samples)),
            draw_groups=groups(DRAWINGS, examples, drawn_tokens(samples)),
        )

    def sample(self, one: Example, drawn: list[np.ndarray], dice: random.Random) -> list[Item]:
        """A question with its labelled answer, or a prompt, with a picture where it edits one, and the picture to draw."""
        markers, prompt = self.prompts.markers, self.asked(one)
        if one.target is None:
            return prompt
        if dice.random() < self.options.dropout:
            # all between the first id and the marker of the picture
            *_, last = prompt
            (pads,) = unconditional([*prompt[:-1], text_item([*last.ids.tolist(), markers.boi])], markers.pad)
            prompt = [text_item(pads.ids[:-1].tolist())]
        names = torch.stack((torch.full((self.n_codes,), len(drawn)), torch.arange(self.n_codes)), -1)
        drawn.append(one.target)
        return [*prompt, image_item("draw", names, torch.arange(self.n_codes), markers=(markers.boi,), causal=True)]


class JanusObjective:
    """Janus on the little world."""

    name = "janus-nano"
    loss_names = DRAWINGS + TEXTS

    def __init__(self, model: Janus, batch: Worlds):
        self.model, self.batch = model, batch

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> JanusObjective:
        """A fresh model of the recipe's numbers around a trained VQ tokenizer and a trained ViT."""
        options = strict(Options, recipe.options, where="options")
        return cls.of(fresh(recipe, options), recipe, options)

    @classmethod
    def of(cls, model: Janus, recipe: Recipe, options: Options) -> JanusObjective:
        """For a model that is to be trained."""
        if options.compiled:
            compile_streams(model.decoder)
        freeze(model, options.frozen, always=("vq.", "vision.trunk.attn_pool."))
        height, width = model.cfg.grid
        worlds = Worlds(
            options=options, prompts=model.prompts, n_codes=height * width, size=recipe.batch, seed=recipe.seed
        )
        return cls(model, worlds)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Mean cross entropy of every kind of sample in the batch."""
        losses = self.model(self.encoded(batch).to(self.model.device))
        drawn = by_group(DRAWINGS, batch.draw_groups, losses.codes)
        return drawn | by_group(TEXTS, batch.text_groups, losses.text)

    @torch.no_grad()
    def encoded(self, batch: Batch) -> Pack:
        """The pack with real codes; every picture meets the VQ tokenizer once."""
        if batch.pack.draw is None:
            return batch.pack
        codes = self.model.vq.ids(batch.images.to(self.model.device)).cpu()
        picture, place = batch.pack.draw.content.unbind(-1)
        return replace(batch.pack, draw=replace(batch.pack.draw, content=codes[picture, place]))

    def picture(self) -> Image.Image:
        """A sheet of test prompts drawn."""
        return sheet(self.model)

    def save(self, folder: Path) -> None:
        """The released layout, in bfloat16."""
        self.model.save_pretrained(folder, dtype="bfloat16")


def fresh(recipe: Recipe, options: Options) -> Janus:
    """An untrained model of the recipe's numbers, around a trained VQ tokenizer and a trained ViT."""
    vq = trained(options.vq, "vq.safetensors", "janus-nano-vq")
    tokenizer = text_model(options.vocabulary, markers=SYMBOLS)
    files = config_files(
        recipe.model, json.loads((vq.parent / "vq_config.json").read_text()), tokenizer.inner.vocab_size()
    )
    torch.manual_seed(recipe.seed)
    model = Janus(JanusConfig.from_files(files, {}))
    init_decoder(model.decoder)
    init_ends(model)
    model.vq.load_state_dict({name: x.float() for name, x in load_file(vq).items()})
    load_tower(model.vision, load_file(trained(options.vit, "vision.safetensors", "bagel-nano-vit")))
    # codes begin as what the VQ tokenizer takes them for
    model.code_embed.weight.data.copy_(F.normalize(model.vq.quantize.embedding.weight, dim=-1))
    model.tokenizer = tokenizer
    return model


def config_files(model: Mapping, vq: Mapping, vocabulary: int) -> dict:
    """The contents of a config.json from the recipe's numbers: language, vision, code_head, generation."""
    d = model["language"]["hidden_size"]
    dims = {"aligner_config": model["vision"]["width"], "gen_aligner_config": vq["params"]["n_embed"]}
    head = {"image_token_embed": model["code_head"], "image_token_size": vq["params"]["image_token_size"], "n_embed": d}
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


def init_ends(model: Janus) -> None:
    """What enters beside words begins about as large as they are; the head of codes begins undecided."""
    for aligner in (model.aligner, model.code_aligner):
        init_aligner(aligner)
    nn.init.normal_(model.code_head.fc2.weight, std=0.02)
    nn.init.zeros_(model.code_head.fc2.bias)


def init_aligner(aligner: Projector) -> None:
    """Its output begins about as large as its hidden rows."""
    last = aligner.layers[-1]
    assert isinstance(last, nn.Linear), "aligners end with a linear"
    nn.init.normal_(last.weight, std=last.in_features**-0.5)
