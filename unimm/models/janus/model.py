"""Janus and Janus-Pro: decoupled encoders on one autoregressive transformer.

Wu et al. 2024, arXiv 2410.13848; Chen et al. 2025, arXiv 2501.17811. Released code: github.com/deepseek-ai/Janus at 1daa72f.
Pictures are understood through a SigLIP tower and an aligner; they are drawn as codes of a VQ tokenizer, next code by
next code, each fed back through an embedding and an aligner of its own. Everything is read causally.

Axes: N packed rows, P pictures to draw, n codes of a picture, D model, E features of a code, V ids or codes.
"""
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from unimm.checkpoint.load import Table, read_json
from unimm.encoders.timm_vit import Tower, TowerConfig
from unimm.generation.decode import Rows
from unimm.generation.kv_cache import CodeSampling, Context, next_codes
from unimm.kernels import attention, linear_cross_entropy
from unimm.models.base import Generation, Picture, Release, asked, each, seeds, sides
from unimm.models.common.deepseek_chat import Conversing, llama_keys
from unimm.models.common.deepseek_processor import PLACEHOLDER, UNSPEAKABLE, Talk, unconditional
from unimm.models.janus.transformers_layout import Layout, original_config, transformers_files, transformers_keys
from unimm.nn.decoder import Decoder, DecoderConfig, Parts, Route
from unimm.nn.layers import MLP
from unimm.processing.images.io import PadSquare, to_image
from unimm.sequence.segments import IGNORE, Item, Pack, image_item, text_item
from unimm.tokenizers.text import load_tokenizer
from unimm.tokenizers.vq import VQ, VQConfig

STREAM = "all"


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """`depth` linears with erf GELU between them; 0: nothing at all."""

    depth: int
    dim_in: int
    dim_out: int

    DEPTHS: ClassVar = {"identity": 0, "linear": 1, "mlp_gelu": 2}

    @classmethod
    def from_files(cls, files: Mapping[str, Any]) -> "ProjectorConfig":
        """Read the params of a released aligner_config."""
        kind = files.get("projector_type", "mlp_gelu")
        if kind not in cls.DEPTHS:
            raise ValueError(f"got projector_type {kind!r} in the config: expected one of {', '.join(cls.DEPTHS)}")
        depth = files.get("depth", 2) if kind == "mlp_gelu" else cls.DEPTHS[kind]
        return cls(depth=depth, dim_in=files["input_dim"], dim_out=files["n_embed"])

    def to_files(self) -> dict[str, Any]:
        """The mapping that `from_files` reads."""
        kind = next((name for name, depth in self.DEPTHS.items() if depth == self.depth), "mlp_gelu")
        return {"projector_type": kind, "depth": self.depth or 1, "input_dim": self.dim_in, "n_embed": self.dim_out}


class Projector(nn.Module):
    """Features of an encoder to rows of the language model."""

    def __init__(self, cfg: ProjectorConfig):
        super().__init__()
        dims = [cfg.dim_in] + [cfg.dim_out] * cfg.depth
        linears = [nn.Linear(a, b) for a, b in pairwise(dims)]
        self.layers = nn.Sequential(*[part for linear in linears for part in (linear, nn.GELU())][:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@dataclass(frozen=True, kw_only=True)
class JanusConfig:
    decoder: DecoderConfig
    tower: TowerConfig
    aligner: ProjectorConfig
    code_aligner: ProjectorConfig
    code_head: int  # width inside the head that predicts codes
    vq: VQConfig
    pixels: PadSquare  # the rule for pictures that are looked at
    size: tuple[int, int]  # (height, width) of what is drawn: the one that the model was trained for
    guidance: float
    sampling: CodeSampling
    talk: Talk

    def __post_init__(self) -> None:
        stride, d = self.vq.stride, self.decoder.dim
        if len(self.size) != 2 or min(self.size) < 1 or any(side % stride for side in self.size):
            raise ValueError(f"got the size {self.size} to draw: expected (height, width) in multiples of {stride}")
        if self.pixels.size != self.tower.size:
            raise ValueError(
                f"got pictures of {self.pixels.size} pixels a side for a tower of {self.tower.size}: expected the same; "
                "correct image_size in preprocessor_config.json or in the vision_config"
            )
        for name, got, expected in (
            ("aligner", self.aligner.dim_out, d),
            ("gen_aligner", self.code_aligner.dim_out, d),
            ("gen_aligner's input", self.code_aligner.dim_in, self.vq.code_dim),
        ):
            if got != expected:
                raise ValueError(f"got a width of {got} in the config of the {name}: expected {expected}, as what it meets has")

    @property
    def grid(self) -> tuple[int, int]:
        """Codes of a picture, (rows, columns)."""
        return self.size[0] // self.vq.stride, self.size[1] // self.vq.stride

    @classmethod
    def from_folder(cls, folder: Path) -> "JanusConfig":
        """Read config.json, of either layout, and preprocessor_config.json, if it is there."""
        files, look = (read_json(folder / name) for name in ("config.json", "preprocessor_config.json"))
        if "vision_config" not in files:
            raise ValueError(f"{folder}/config.json describes no Janus: expected a vision_config; found {', '.join(files)}")
        files = original_config(files) if "text_config" in files else files
        if lost := [part for part in PARTS if part not in files]:
            raise ValueError(f"{folder}/config.json lacks {', '.join(lost)}: fetch it again")
        return cls.from_files(files, look)

    @classmethod
    def from_files(cls, files: Mapping[str, Any], look: Mapping[str, Any]) -> "JanusConfig":
        """From the contents of the original layout's files."""
        vision, vq = files["vision_config"]["params"], files["gen_vision_config"]
        size = vision["image_size"]
        head, more = files["gen_head_config"]["params"], files.get("generation", {})
        return cls(
            decoder=DecoderConfig.from_llama(files["language_config"], stream=STREAM),
            tower=TowerConfig.from_files(vision),
            aligner=ProjectorConfig.from_files(files["aligner_config"]["params"]),
            code_aligner=ProjectorConfig.from_files(files["gen_aligner_config"]["params"]),
            code_head=head["image_token_embed"],
            vq=VQConfig.from_files(vq["params"], vq["cls"]),
            pixels=PadSquare.from_files(look, size=size),
            size=tuple(more.get("size", (size, size))),
            guidance=more.get("guidance", 5.0),
            sampling=CodeSampling(**more.get("sampling", {})),
            talk=Talk(**more.get("talk", {})),
        )

    def to_files(self) -> dict[str, dict[str, Any]]:
        """The contents of the original layout's config.json and preprocessor_config.json."""
        d, vq = self.decoder.dim, self.vq.to_files()
        head = {"image_token_embed": self.code_head, "image_token_size": self.vq.n_codes, "n_embed": d}
        top = {
            "architectures": ["MultiModalityCausalLM"],
            "model_type": "multi_modality",
            "vision_config": {"cls": "CLIPVisionTower", "model_type": "vision", "params": self.tower.to_files()},
            "aligner_config": {"cls": "MlpProjector", "model_type": "aligner", "params": self.aligner.to_files()},
            "gen_vision_config": {"cls": "VQ-16", "model_type": "gen_vision", "params": vq},
            "gen_aligner_config": {"cls": "MlpProjector", "model_type": "gen_aligner", "params": self.code_aligner.to_files()},
            "gen_head_config": {"cls": "vision_head", "model_type": "gen_head", "params": head},
            "language_config": self.decoder.to_files() | {"model_type": "llama"},
            "generation": {"size": list(self.size), "guidance": self.guidance}
            | {"sampling": asdict(self.sampling), "talk": asdict(self.talk)},
        }
        return {"config.json": top, "preprocessor_config.json": self.pixels.to_files()}


@dataclass(frozen=True)
class Losses:
    """Cross entropy of every labelled row [n], and of every code that is drawn [m]."""

    text: Tensor
    codes: Tensor


class Janus(Conversing):
    """A decoder, a tower to look with, a VQ tokenizer to draw with, and an aligner for each."""

    SPARE = ("vision.trunk.attn_pool.{*}", "vq.quantize.codebook_used")

    def __init__(self, cfg: JanusConfig):
        super().__init__()
        self.cfg, self.tokenizer = cfg, None
        self.layout: Layout = "original"
        self.pixels, self.talk = cfg.pixels, cfg.talk
        d, codes = cfg.decoder.dim, cfg.vq.n_codes
        self.decoder = Decoder(cfg.decoder)
        self.vision, self.aligner = Tower(cfg.tower), Projector(cfg.aligner)
        if (width := self.vision.trunk.num_features) != cfg.aligner.dim_in:
            raise ValueError(
                f"got an aligner_config with input_dim {cfg.aligner.dim_in} for {cfg.tower.name}: expected {width}, its width"
            )
        self.vq = VQ(cfg.vq)
        self.code_embed, self.code_aligner = nn.Embedding(codes, cfg.vq.code_dim), Projector(cfg.code_aligner)
        self.code_head = MLP(d, cfg.code_head, codes, "gelu")

    @classmethod
    def from_folder(cls, folder: Path) -> "Janus":
        """The model of a folder's config files, with its tokenizer, without weights."""
        model = cls(JanusConfig.from_folder(folder))
        model.tokenizer = load_tokenizer(folder, special=UNSPEAKABLE)
        model.layout = "transformers" if "text_config" in read_json(folder / "config.json") else "original"
        return model

    def weights(self) -> dict[tuple[str, ...], Table]:
        """The key table of the layout that this model came in, or is saved in."""
        depths = self.cfg.aligner.depth, self.cfg.code_aligner.depth
        if self.layout == "transformers":
            return {WEIGHTS: transformers_keys(*depths)}
        without = tuple(name for name, depth in zip(("aligner.", "gen_aligner."), depths, strict=True) if not depth)
        return {WEIGHTS: {row: ours for row, ours in KEYS.items() if not row.startswith(without)}}

    def save_config(self, folder: Path) -> None:
        """Write config.json and preprocessor_config.json."""
        files = self.cfg.to_files()
        if self.layout == "transformers":
            known = self.markers if self.tokenizer or self.special else None
            image = self.tokenizer.id(PLACEHOLDER) if self.tokenizer else None
            files = transformers_files(files, markers=known, image=image)
        for name, contents in files.items():
            (folder / name).write_text(json.dumps(contents, indent=2) + "\n")

    def save_pretrained(
        self, folder: str | Path, *, dtype: str | torch.dtype | None = None, layout: Layout | None = None
    ) -> None:
        """Write config, weights and tokenizer in the "original" layout or in "transformers"'; unless given, as it came.

        dtype: what the weights are cast to; unless given, they are written as they are.
        """
        if layout not in (None, *get_args(Layout)):
            raise ValueError(f"got layout {layout!r}: expected one of {', '.join(get_args(Layout))}")
        before, self.layout = self.layout, layout or self.layout
        try:
            super().save_pretrained(folder, dtype=dtype)
        finally:
            self.layout = before

    # ---- the model

    def embed(self, batch: Pack) -> Tensor:
        """Every row of a pack, in its order [N, D]: texts and markers, pictures seen, codes drawn."""
        parts, rows = {"text": self.decoder.embed(batch.ids)}, {"text": batch.id_rows}
        if batch.look:
            parts["look"], rows["look"] = self.aligner(self.seen(batch.look)), batch.look.rows
        if batch.draw:
            parts["draw"], rows["draw"] = self.code_rows(batch.draw.content), batch.draw.rows
        return Route(rows).join(parts)

    def code_rows(self, codes: Tensor) -> Tensor:
        """Codes [n] as rows of the language model [n, D]."""
        return self.code_aligner(self.code_embed(codes))

    def hidden(self, batch: Pack, attend: Any) -> Parts:
        """Last hidden states of a pack's rows, before the final norm."""
        positions = batch.layout.positions
        return self.decoder(self.embed(batch), positions, {STREAM: torch.arange(len(positions))}, attend)

    def code_logits(self, hidden: Tensor) -> Tensor:
        """Last hidden states [n, D] -> the next code [n, V]."""
        return self.code_head(self.decoder.norms[STREAM](hidden))

    def forward(self, batch: Pack) -> Losses:
        """Training: next-id loss at the labelled rows; each code of a drawn picture is predicted by the row before it."""
        hidden = self.hidden(batch, lambda layer, q, k, v: attention(q, k, v, batch.layout.mask))[STREAM]
        at = (batch.labels != IGNORE).nonzero().squeeze(1)
        said = self.decoder.norms[STREAM](hidden[batch.id_rows[at]])
        text = linear_cross_entropy(said, self.decoder.head.weight, batch.labels[at])
        if batch.draw is None:
            return Losses(text, text.new_zeros(0))
        logits = self.code_logits(hidden[batch.draw.rows - 1])
        return Losses(text, F.cross_entropy(logits.float(), batch.draw.content, reduction="none"))

    def drawn(self, codes: Tensor, boi: int) -> Item:
        """A picture to draw, codes [n], behind its marker."""
        return image_item("draw", codes, torch.arange(len(codes)), markers=(boi,), causal=True)

    # ---- drawing

    @torch.inference_mode()
    def codes(
        self,
        prompts: Sequence[Sequence[Item]],
        generators: Sequence[torch.Generator],
        *,
        guidance: Sequence[float],
        sampling: CodeSampling,
        grid: tuple[int, int] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Codes [P, n] of a picture after each prompt, which ends with the marker before it; of the trained grid, or `grid`.

        Guidance w takes l = u + w (c - u), c the logits after the prompt and u those after a prompt of pads between its
        first and last id; at 1 there is no u. Equal prompts are read once, whatever follows them.
        """
        guided = [i for i, w in enumerate(guidance) if w != 1]
        pad = self.markers.pad if guided else 0
        every = [*prompts, *(unconditional(prompts[i], pad) for i in guided)]
        height, width = grid or self.cfg.grid
        rows = Rows(self, self._read_once(every), height * width)
        first = torch.stack([prompt[-1].ids[-1] for prompt in every]).to(self.device)
        w = torch.tensor([guidance[i] for i in guided], dtype=torch.float32, device=self.device)[:, None]
        at, x, drawn = torch.tensor(guided, device=self.device, dtype=torch.long), self.decoder.embed(first), []
        for n in tqdm(range(rows.room), "drawing", disable=not progress, leave=False):
            # scales are not rounded to the model's dtype
            logits, free = self.code_logits(rows(x, n)).float().split([len(prompts), len(guided)])
            if guided:
                logits = logits.index_copy(0, at, free + w * (logits[at] - free))
            drawn.append(next_codes(logits, sampling, generators))
            fed = self.code_rows(drawn[-1])
            x = torch.cat((fed, fed[at]))
        return torch.stack(drawn, 1)

    def _read_once(self, prompts: Sequence[Sequence[Item]]) -> list[Context]:
        """The context of all but the last id of each prompt; prompts that are one object, or equal texts, once."""

        def key(prompt: Sequence[Item]) -> Any:
            return tuple(prompt[0].ids.tolist()) if len(prompt) == 1 else id(prompt)

        unique = {key(prompt): prompt for prompt in prompts}
        contexts = dict(zip(unique, self.prefilled([list(prompt) for prompt in unique.values()])[0], strict=True))
        return [contexts[key(prompt)] for prompt in prompts]

    @torch.inference_mode()
    def paint(self, codes: Tensor, *, grid: tuple[int, int] | None = None) -> Tensor:
        """Codes [P, n] of the trained grid, or of `grid` -> pixels [P, 3, height, width], about [-1, 1]."""
        return self.vq.decode(codes, grid=grid or self.cfg.grid).float()

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        images: Picture | Sequence | None = None,
        think: bool = False,
        size: tuple[int, int] | None = None,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        n: int = 1,
        guidance: float | Sequence[float] | None = None,
        sampling: CodeSampling | None = None,
        progress: bool = False,
    ) -> Generation:
        """Draw `n` pictures for each prompt, in the order of the prompts; a prompt is read once.

        prompt: one text or a batch of them. images: pictures to draw from, as in `understand`; no release was trained
        for that, so a released model follows them loosely at best. size: (height, width), the trained one or None.
        seed: one, or one a prompt; from one number, that number and the ones after it, picture by picture. guidance:
        1 is none; one, or one a prompt. A picture does not depend on what else is in the batch. Raises ValueError for
        bad input, NotImplementedError for `think` and `steps`, which other families have.
        """
        self._check_options(think=think, steps=steps, size=size)
        prompts, pictures = asked(prompt, images)
        scales = each(self.cfg.guidance if guidance is None else guidance, len(prompts), "guidances")
        if n < 1 or not all(w >= 0 for w in scales):
            raise ValueError(f"got n {n}, guidance {guidance}: expected at least 1 picture, and scales of 0 or more")
        told = [self.prompts.drawing(one, some) for one, some in zip(prompts, pictures, strict=True)]
        items = [[*before, text_item([*last.ids.tolist(), self.markers.boi])] for *before, last in told]
        seeded = seeds(seed, len(prompts), copies=n)
        codes = self.codes(
            [one for one in items for _ in range(n)],
            [torch.Generator().manual_seed(s) for s in seeded],
            guidance=[float(w) for w in scales for _ in range(n)],
            sampling=sampling or self.cfg.sampling,
            progress=progress,
        )
        return Generation([to_image(self.paint(one[None])[0]) for one in codes])

    def _check_options(self, *, think: bool, steps: int | None, size: tuple[int, int] | None) -> None:
        if think:
            raise NotImplementedError("Janus does not think before it draws: Bagel does")
        if steps is not None:
            raise NotImplementedError("Janus draws a code a step, as many as the picture has: Bagel and JanusFlow have steps")
        if size is not None and sides(size) != self.cfg.size:
            raise ValueError(
                f"cannot draw (height, width) {tuple(size)}: this model was trained for {self.cfg.size} alone; leave size out"
            )


# ---- released files


PARTS = ("aligner_config", "gen_vision_config", "gen_aligner_config", "gen_head_config", "language_config")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# released names on the left, ours on the right
KEYS: Table = {
    "vision_model.vision_tower.{*}": "vision.trunk.{*}",
    "aligner.layers.{}.{}": "aligner.layers.{}.{}",
    "gen_vision_model.{*}": "vq.{*}",
    "gen_aligner.layers.{}.{}": "code_aligner.layers.{}.{}",
    "gen_embed.{}": "code_embed.{}",
    "gen_head.output_mlp_projector.{}": "code_head.fc1.{}",
    "gen_head.vision_head.{}": "code_head.fc2.{}",
    **llama_keys("language_model.model.", "language_model.lm_head", STREAM),
}

VERBS = ("generate", "understand", "chat")
MODEL_LICENCE = "DeepSeek Model License"


def _release(hub: str, parameters: int) -> Release:
    return Release(family="Janus", hub=hub, licence=MODEL_LICENCE, parameters=parameters, verbs=VERBS)


Janus.RELEASES = {
    "janus-nano": Release(family="Janus", hub=None, licence="Apache-2.0", parameters=7_396_843, verbs=VERBS),
    "deepseek-ai/Janus-1.3B": _release("deepseek-ai/Janus-1.3B", 2_089_297_547),
    "deepseek-ai/Janus-Pro-1B": _release("deepseek-ai/Janus-Pro-1B", 2_089_297_547),
    "deepseek-ai/Janus-Pro-7B": _release("deepseek-ai/Janus-Pro-7B", 7_420_434_059),
}
