"""Janus and Janus-Pro: decoupled encoders on one autoregressive transformer.

Wu et al. 2024, arXiv 2410.13848; Chen et al. 2025, arXiv 2501.17811. Released code: github.com/deepseek-ai/Janus at 1daa72f.
Pictures are understood through a SigLIP tower and an aligner; they are drawn as codes of a VQ tokenizer, next code by
next code, each fed back through an embedding and an aligner of its own. Everything is read causally.

Axes: N packed rows, P pictures to draw, n codes of a picture, D model, E features of a code, V ids or codes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from unimm.checkpoint.config_io import read_json
from unimm.checkpoint.keymap import Table
from unimm.generation.decode import Rows
from unimm.generation.image_tokens import CodeSampling, next_codes
from unimm.generation.kv_cache import Context
from unimm.models.base import Generation
from unimm.models.common.deepseek_chat import Conversing
from unimm.models.common.deepseek_processor import PLACEHOLDER, UNSPEAKABLE, unconditional
from unimm.models.janus import RELEASES
from unimm.models.janus.config import WEIGHTS, JanusConfig
from unimm.models.janus.network import JanusNetwork
from unimm.models.janus.transformers_layout import Layout, transformers_files, transformers_keys
from unimm.models.janus.weights import KEYS
from unimm.processing.images.io import to_image
from unimm.processing.requests import Picture, asked, each, seeds, sides
from unimm.sequence.parts import Item, text_item
from unimm.tokenizers.text import load_tokenizer


class Janus(JanusNetwork, Conversing):
    """A decoder, a tower to look with, a VQ tokenizer to draw with, and an aligner for each."""

    RELEASES = RELEASES
    SPARE = ("vision.trunk.attn_pool.{*}", "vq.quantize.codebook_used")

    def __init__(self, cfg: JanusConfig):
        super().__init__(cfg)
        self.tokenizer = None
        self.layout: Layout = "original"
        self.pixels, self.talk = cfg.pixels, cfg.talk

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
            raise NotImplementedError(
                "Janus draws a code a step, as many as the picture has: Bagel and JanusFlow have steps"
            )
        if size is not None and sides(size) != self.cfg.size:
            raise ValueError(
                f"cannot draw (height, width) {tuple(size)}: this model was trained for {self.cfg.size} alone; leave size out"
            )
