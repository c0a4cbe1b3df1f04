"""BAGEL's public class: the network of network.py with a tokenizer, and the verbs.

Axes: L latent tokens of a picture, C features of a latent token.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unimm.checkpoint.keymap import Table
from unimm.generation.decode import TextStream
from unimm.generation.flow import knots, sample
from unimm.generation.guidance import Guidance, guide, share
from unimm.generation.step_cache import TaylorSeer
from unimm.generation.text_sampling import TextSampling
from unimm.models.bagel import RELEASES
from unimm.models.bagel.cfg_contexts import Canvas, Dialogue, reason, say, show, write
from unimm.models.bagel.config import WEIGHTS, BagelConfig
from unimm.models.bagel.network import BagelNetwork
from unimm.models.bagel.processor import Items, Markers
from unimm.models.bagel.weights import DECODER_KEYS, DRAW_KEYS, LOOK_KEYS, QK_NORM_KEYS, VAE_KEYS
from unimm.models.base import Drawing, Generation, UnifiedModel
from unimm.processing.images.io import open_image, to_image, to_tensor
from unimm.processing.requests import Picture, asked, drawable, each, seeds
from unimm.sequence.parts import Item
from unimm.tokenizers.text import TextTokenizer, load_tokenizer


class Bagel(BagelNetwork, UnifiedModel):
    """BAGEL with its tokenizer and its verbs: understand, generate, interleave."""

    RELEASES = RELEASES
    PREFIX, THINKS = "bagel.", True

    def __init__(self, cfg: BagelConfig):
        super().__init__(cfg)
        self.tokenizer = None

    @classmethod
    def from_folder(cls, folder: Path) -> "Bagel":
        """The model of a folder's config files, with its tokenizer, without weights."""
        model = cls(BagelConfig.from_folder(folder))
        model.tokenizer = load_tokenizer(folder)
        return model

    def weights(self) -> dict[tuple[str, ...], Table]:
        """The key table of each file of weights."""
        parts = ((self.cfg.decoder.qk_norm, QK_NORM_KEYS), (self.cfg.vision, LOOK_KEYS), (self.cfg.draws, DRAW_KEYS))
        main = dict(DECODER_KEYS)
        for has, table in parts:
            main |= table if has else {}
        return {WEIGHTS: main, ("ae.safetensors",): VAE_KEYS} if self.cfg.draws else {WEIGHTS: main}

    def save_config(self, folder: Path) -> None:
        """Write llm_config.json, vit_config.json and config.json."""
        for name, contents in self.cfg.to_files().items():
            (folder / name).write_text(json.dumps(contents, indent=2) + "\n")

    @property
    def items(self) -> Items:
        """What texts and pictures are in this model's sequences; marker ids from the tokenizer, else from the config."""
        cfg, markers = self.cfg, Markers.of(self.tokenizer) if self.tokenizer else self.cfg.markers
        if markers is None:
            raise ValueError(
                "this checkpoint has no tokenizer and its config names no new_token_ids: add tokenizer.json"
            )
        return Items(
            markers=markers,
            patch=cfg.vision.patch if cfg.vision else None,
            look_side=cfg.look_side,
            latent_patch=cfg.latent_patch if cfg.draws else None,
            latent_side=cfg.latent_side,
            interpolate=cfg.interpolate_places,
        )

    # ---- drawing

    @torch.inference_mode()
    def denoise(
        self,
        dialogues: Sequence[Dialogue],
        noises: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        *,
        guidance: Sequence[Guidance],
        steps: int,
        shift: float,
        taylor: bool = False,
        progress: bool = False,
    ) -> list[Tensor]:
        """From noise [L, C] to latent tokens [L, C], for pictures of (height, width) pixels, all in one batch."""
        grids = [(h // self.cfg.stride, w // self.cfg.stride) for h, w in sizes]
        canvas = Canvas(self, dialogues, grids)
        features = share(canvas.features, canvas.canonical)
        velocity = guide(TaylorSeer(features) if taylor else features, self.velocity, guidance)
        x = sample(velocity, torch.cat(list(noises)).to(self.device), knots(steps, shift), progress=progress)
        return list(x.split([len(noise) for noise in noises]))

    @torch.inference_mode()
    def picture_items(
        self, image: Image.Image, *, noise: Tensor | None, draw: bool
    ) -> tuple[list[Item], tuple[int, int]]:
        """A picture as latents (`draw`) and as patches, and its size (height, width) after the VAE's resize, which both use.

        noise [z, h, w] draws from the VAE's posterior, as the original always does; None takes its mean.
        """
        image = self.cfg.draw(image)
        look = self.items.looked_at(to_tensor(self.cfg.look(image)))
        if not draw:
            return [look], (image.height, image.width)
        pixels = to_tensor(image)[None].to(self.device)
        latent = self.vae.encode(pixels, noise=None if noise is None else noise[None].to(self.device))[0]
        return [self.items.drawn(latent.cpu()), look], (image.height, image.width)

    # ---- verbs

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        images: Picture | Sequence | None = None,
        think: bool = False,
        size: tuple[int, int] | None = None,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        shift: float | None = None,
        guidance: Guidance | float | Sequence[Guidance | float] | None = None,
        text: TextSampling | None = None,
        taylor: bool = False,
        progress: bool = False,
    ) -> Generation:
        """Draw a picture for each prompt; with `images`, edit them; with `think`, write the reasoning first.

        prompt: one text or a batch of them. images: for one prompt a picture or several, for a batch one of these (or
        None) each. size: (height, width) in pixels, multiples of the stride; unless given, that of the last input
        picture after its resize, or the default. seed: one, or one a prompt; from one number, that number and the
        ones after it. steps: forwards of the sampler (the original's num_timesteps - 1). guidance: one, or one a prompt; a
        number is the text's scale, the rest as by default. A picture does not depend on what else is in the batch. Raises
        ValueError for bad input, with what would be good.
        """
        self.items.check_draws()
        prompts, pictures = asked(prompt, images)
        n, d, seed = len(prompts), self.cfg.defaults, seeds(seed, len(prompts))
        generators = [torch.Generator().manual_seed(s) for s in seed]
        dialogues, texts = self._begin(n, d.think_draw if think else None), []
        dialogues = self._shown(dialogues, pictures, generators, draw=True)
        dialogues = say(self, dialogues, self._texts(prompts))
        if think:
            texts = self._written(dialogues, text, seed).texts()
            dialogues = reason(self, dialogues, self._texts(texts, empty=True))
        guided = None if guidance is None else each(guidance, n, "guidances")
        options = Drawing(size=size, guidance=guided, steps=steps, shift=shift, taylor=taylor, progress=progress)
        return Generation(self._draw(dialogues, generators, options), texts)

    def understand(
        self,
        images: Picture | Sequence | None,
        question: str | Sequence[str],
        *,
        think: bool = False,
        stream: bool = False,
        text: TextSampling | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Any:
        """Answer a question about pictures: a str; for a batch of questions a list; with `stream`, pieces as they come.

        images: for one question a picture, several, or None; for a batch one of these each. Raises ValueError for bad
        input.
        """
        questions, pictures = asked(question, images)
        if stream and len(questions) > 1:
            raise ValueError(f"got {len(questions)} questions to stream: expected one")
        n, d, seed = len(questions), self.cfg.defaults, seeds(seed, len(questions))
        dialogues = self._begin(n, d.think_answer if think else None)
        dialogues = self._shown(dialogues, pictures, [torch.Generator()] * n, draw=False)
        written = self._written(say(self, dialogues, self._texts(questions)), text, seed)
        if stream:
            return written.pieces()
        return written.texts()[0] if isinstance(question, str) else written.texts()

    def interleave(
        self,
        items: Sequence[str | Picture],
        *,
        outputs: Sequence[str] = ("image",),
        size: tuple[int, int] | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: Guidance | float | None = None,
        text: TextSampling | None = None,
        progress: bool = False,
    ) -> Iterator[str | Image.Image]:
        """Go on from texts and pictures with texts and pictures, in the order of `outputs` ("text" or "image").

        Yields each piece as it is made; it enters the context (a picture by its pixels, through VAE and ViT), so the
        next piece knows it. A file is given as a Path; a str is always text. Picture i is drawn from seed + i. Raises
        ValueError for bad input, at once.
        """
        items = [items] if isinstance(items, str | Path | Image.Image) else items
        outputs = [outputs] if isinstance(outputs, str) else outputs
        if wrong := [kind for kind in outputs if kind not in ("text", "image")]:
            raise ValueError(f"got outputs {wrong}: expected a sequence of 'text' and 'image'")
        if "image" in outputs:
            self.items.check_draws()
        options = Drawing(size=size, guidance=None if guidance is None else [guidance], steps=steps, progress=progress)
        return self._interleaved(items, outputs, seeds(seed, max(1, len(outputs))), options, text)

    def _interleaved(
        self, items: Sequence, outputs: Sequence[str], seed: Sequence[int], options: Drawing, text: TextSampling | None
    ) -> Iterator[str | Image.Image]:
        draw, generators = "image" in outputs, [torch.Generator().manual_seed(s) for s in seed]
        dialogue = self._begin(1, None)
        for item in items:
            if isinstance(item, str):
                dialogue = say(self, dialogue, self._texts([item]))
            else:
                dialogue = self._shown(dialogue, [[item]], generators[:1], draw=draw)
        for i, kind in enumerate(outputs):
            if kind == "text":
                piece = self._written(dialogue, text, [seed[i]]).texts()[0]
                dialogue = say(self, dialogue, self._texts([piece], empty=True))
                yield piece
                continue
            (picture,) = self._draw(dialogue, [generators[i]], options)
            yield picture
            if i + 1 < len(outputs):
                dialogue = self._shown(dialogue, [[picture]], [generators[i]], draw=True)

    # ---- what the verbs share

    def _begin(self, n: int, system: str | None) -> list[Dialogue]:
        """n empty dialogues, or n that begin with a system prompt."""
        empty = [Dialogue()] * n
        return say(self, empty, self._texts([system] * n), system=True) if system else empty

    def noise(self, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Where a picture of (height, width) begins, [L, C]: drawn on the CPU in float32."""
        tokens = (size[0] // self.cfg.stride) * (size[1] // self.cfg.stride)
        return torch.randn(tokens, self.cfg.latent_dim, generator=generator, dtype=torch.float32, device="cpu")

    def _draw(
        self, dialogues: list[Dialogue], generators: Sequence[torch.Generator], options: Drawing
    ) -> list[Image.Image]:
        """A picture after each dialogue: guided as an edit where pictures came before."""
        d = self.cfg.defaults
        most = self.cfg.stride * self.cfg.latent_side
        sizes = [drawable(options.size or x.size or d.size, self.cfg.stride, most) for x in dialogues]
        defaults = [d.edit if x.size else d.draw for x in dialogues]
        latents = self.denoise(
            dialogues,
            [self.noise(size, generator) for size, generator in zip(sizes, generators, strict=True)],
            sizes,
            guidance=[Guidance.of(one, its) for one, its in zip(options.guidance or defaults, defaults, strict=True)],
            steps=d.steps if options.steps is None else options.steps,
            shift=d.shift if options.shift is None else options.shift,
            taylor=options.taylor,
            progress=options.progress,
        )
        return [to_image(self.paint(x, size)) for x, size in zip(latents, sizes, strict=True)]

    def _texts(self, texts: Sequence[str], *, empty: bool = False) -> list[Item]:
        if not empty and any(not text.strip() for text in texts):
            raise ValueError("got an empty prompt: expected at least a word")
        return [self.items.text(self._words.encode(text)) for text in texts]

    @property
    def _words(self) -> TextTokenizer:
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer: add its tokenizer.json to the folder")
        return self.tokenizer

    def _written(self, dialogues: Sequence[Dialogue], sampling: TextSampling | None, seed: Sequence[int]) -> TextStream:
        """The model's own text after each dialogue."""
        sampling = (sampling or TextSampling()).within(self.cfg.defaults.think_tokens)
        steps = write(self, [d.main for d in dialogues], sampling, seed)
        return TextStream(steps, self._words.decode, len(dialogues), sampling.stop)

    def _shown(
        self, dialogues: Sequence[Dialogue], pictures: Sequence[Sequence], generators: Sequence, *, draw: bool
    ) -> list[Dialogue]:
        """Append each sample's pictures."""
        made = [
            [self._picture(one, g, draw=draw) for one in some] for some, g in zip(pictures, generators, strict=True)
        ]
        return show(self, dialogues, made)

    def _picture(
        self, picture: Picture, generator: torch.Generator, *, draw: bool
    ) -> tuple[list[Item], tuple[int, int]]:
        image, vae = open_image(picture), self.cfg.vae
        width, height = self.cfg.draw.size(image.width, image.height)
        grid = height // vae.stride, width // vae.stride
        noise = torch.randn(vae.latent_channels, *grid, generator=generator, dtype=torch.float32, device="cpu")
        return self.picture_items(image, noise=noise, draw=draw)
