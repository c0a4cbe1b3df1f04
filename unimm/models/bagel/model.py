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

from unimm.checkpoint.keymap import KeyMap
from unimm.generation.decode import TextStream
from unimm.generation.flow import euler, flow_timesteps
from unimm.generation.guidance import Guidance, cfg_velocity, deduplicate_branches
from unimm.generation.step_cache import TaylorSeer
from unimm.generation.text_sampling import TextSampling
from unimm.models.bagel import RELEASES
from unimm.models.bagel.cfg_contexts import (
    CFGContexts,
    LatentDenoiser,
    append_images,
    append_reasoning,
    append_text,
    decode_after,
)
from unimm.models.bagel.config import WEIGHT_FILES, BagelConfig
from unimm.models.bagel.network import BagelNetwork
from unimm.models.bagel.processor import BagelProcessor, BagelSpecialTokens
from unimm.models.bagel.weights import DECODER_KEYS, LATENT_KEYS, QK_NORM_KEYS, VAE_KEYS, VIT_KEYS
from unimm.models.base import Generation, ImageOptions, UnifiedModel
from unimm.processing.images.io import load_image, pil_to_tensor, tensor_to_pil
from unimm.processing.requests import ImageInput, broadcast, check_size, expand_seeds, parse_requests
from unimm.sequence.parts import Part
from unimm.tokenizers.text import TextTokenizer, load_tokenizer


class Bagel(BagelNetwork, UnifiedModel):
    """BAGEL with its tokenizer and its verbs: understand, generate, interleave."""

    RELEASES = RELEASES
    KEY_PREFIX, supports_thinking = "bagel.", True

    def __init__(self, config: BagelConfig):
        super().__init__(config)
        self.tokenizer = None

    @classmethod
    def _build(cls, folder: Path) -> "Bagel":
        """The model of a folder's config files, with its tokenizer, without weights."""
        model = cls(BagelConfig.from_folder(folder))
        model.tokenizer = load_tokenizer(folder)
        return model

    def key_maps(self) -> dict[tuple[str, ...], KeyMap]:
        """The key table of each file of weights."""
        parts = (
            (self.config.decoder.qk_norm, QK_NORM_KEYS),
            (self.config.vision, VIT_KEYS),
            (self.config.visual_gen, LATENT_KEYS),
        )
        main = dict(DECODER_KEYS)
        for has, table in parts:
            main |= table if has else {}
        return {WEIGHT_FILES: main, ("ae.safetensors",): VAE_KEYS} if self.config.visual_gen else {WEIGHT_FILES: main}

    def save_config(self, folder: Path) -> None:
        """Write llm_config.json, vit_config.json and config.json."""
        for name, contents in self.config.to_json().items():
            (folder / name).write_text(json.dumps(contents, indent=2) + "\n")

    @property
    def processor(self) -> BagelProcessor:
        """What texts and pictures are in this model's sequences; marker ids from the tokenizer, else from the config."""
        cfg, markers = (
            self.config,
            BagelSpecialTokens.from_tokenizer(self.tokenizer) if self.tokenizer else self.config.special_tokens,
        )
        if markers is None:
            raise ValueError(
                "this checkpoint has no tokenizer and its config names no new_token_ids: add tokenizer.json"
            )
        return BagelProcessor(
            special_tokens=markers,
            vit_patch_size=cfg.vision.patch_size if cfg.vision else None,
            vit_grid=cfg.vit_grid,
            latent_patch_size=cfg.latent_patch_size if cfg.visual_gen else None,
            latent_grid=cfg.latent_grid,
            interpolate_pos_embed=cfg.interpolate_pos_embed,
        )

    # ---- drawing

    @torch.inference_mode()
    def denoise(
        self,
        contexts: Sequence[CFGContexts],
        noises: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        *,
        guidance: Sequence[Guidance],
        steps: int,
        timestep_shift: float,
        step_cache: bool = False,
        progress: bool = False,
    ) -> list[Tensor]:
        """From noise [L, C] to latent tokens [L, C], for pictures of (height, width) pixels, all in one batch."""
        grids = [(h // self.config.latent_downsample, w // self.config.latent_downsample) for h, w in sizes]
        canvas = LatentDenoiser(self, contexts, grids)
        features = deduplicate_branches(canvas.features, canvas.canonical)
        velocity = cfg_velocity(TaylorSeer(features) if step_cache else features, self.llm_to_velocity, guidance)
        x = euler(
            velocity, torch.cat(list(noises)).to(self.device), flow_timesteps(steps, timestep_shift), progress=progress
        )
        return list(x.split([len(noise) for noise in noises]))

    @torch.inference_mode()
    def image_parts(
        self, image: Image.Image, *, noise: Tensor | None, latents: bool
    ) -> tuple[list[Part], tuple[int, int]]:
        """A picture as latents (`draw`) and as patches, and its size (height, width) after the VAE's resize, which both use.

        noise [z, h, w] draws from the VAE's posterior, as the original always does; None takes its mean.
        """
        image = self.config.vae_transform(image)
        look = self.processor.vit_part(pil_to_tensor(self.config.vit_transform(image)))
        if not latents:
            return [look], (image.height, image.width)
        pixels = pil_to_tensor(image)[None].to(self.device)
        latent = self.vae.encode(pixels, noise=None if noise is None else noise[None].to(self.device))[0]
        return [self.processor.latent_part(latent.cpu()), look], (image.height, image.width)

    # ---- verbs

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        images: ImageInput | Sequence | None = None,
        think: bool = False,
        size: tuple[int, int] | None = None,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        timestep_shift: float | None = None,
        guidance: Guidance | float | Sequence[Guidance | float] | None = None,
        text_sampling: TextSampling | None = None,
        step_cache: bool = False,
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
        self.processor.check_visual_gen()
        prompts, pictures = parse_requests(prompt, images)
        n, d, seed = len(prompts), self.config.defaults, expand_seeds(seed, len(prompts))
        generators = [torch.Generator().manual_seed(s) for s in seed]
        dialogues, texts = self._start(n, d.think_generate_prompt if think else None), []
        dialogues = self._append_images(dialogues, pictures, generators, draw=True)
        dialogues = append_text(self, dialogues, self._text_parts(prompts))
        if think:
            texts = self._decode_text(dialogues, text_sampling, seed).texts()
            dialogues = append_reasoning(self, dialogues, self._text_parts(texts, empty=True))
        guided = None if guidance is None else broadcast(guidance, n, "guidances")
        options = ImageOptions(
            size=size,
            guidance=guided,
            steps=steps,
            timestep_shift=timestep_shift,
            step_cache=step_cache,
            progress=progress,
        )
        return Generation(self._generate_images(dialogues, generators, options), texts)

    def understand(
        self,
        images: ImageInput | Sequence | None,
        question: str | Sequence[str],
        *,
        think: bool = False,
        stream: bool = False,
        text_sampling: TextSampling | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Any:
        """Answer a question about pictures: a str; for a batch of questions a list; with `stream`, pieces as they come.

        images: for one question a picture, several, or None; for a batch one of these each. Raises ValueError for bad
        input.
        """
        questions, pictures = parse_requests(question, images)
        if stream and len(questions) > 1:
            raise ValueError(f"got {len(questions)} questions to stream: expected one")
        n, d, seed = len(questions), self.config.defaults, expand_seeds(seed, len(questions))
        dialogues = self._start(n, d.think_understand_prompt if think else None)
        dialogues = self._append_images(dialogues, pictures, [torch.Generator()] * n, draw=False)
        written = self._decode_text(append_text(self, dialogues, self._text_parts(questions)), text_sampling, seed)
        if stream:
            return written.pieces()
        return written.texts()[0] if isinstance(question, str) else written.texts()

    def interleave(
        self,
        inputs: Sequence[str | ImageInput],
        *,
        outputs: Sequence[str] = ("image",),
        size: tuple[int, int] | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: Guidance | float | None = None,
        text_sampling: TextSampling | None = None,
        progress: bool = False,
    ) -> Iterator[str | Image.Image]:
        """Go on from texts and pictures with texts and pictures, in the order of `outputs` ("text" or "image").

        Yields each piece as it is made; it enters the context (a picture by its pixels, through VAE and ViT), so the
        next piece knows it. A file is given as a Path; a str is always text. Picture i is drawn from seed + i. Raises
        ValueError for bad input, at once.
        """
        inputs = [inputs] if isinstance(inputs, str | Path | Image.Image) else inputs
        outputs = [outputs] if isinstance(outputs, str) else outputs
        if wrong := [kind for kind in outputs if kind not in ("text", "image")]:
            raise ValueError(f"got outputs {wrong}: expected a sequence of 'text' and 'image'")
        if "image" in outputs:
            self.processor.check_visual_gen()
        options = ImageOptions(
            size=size, guidance=None if guidance is None else [guidance], steps=steps, progress=progress
        )
        return self._interleaved(inputs, outputs, expand_seeds(seed, max(1, len(outputs))), options, text_sampling)

    def _interleaved(
        self,
        items: Sequence,
        outputs: Sequence[str],
        seed: Sequence[int],
        options: ImageOptions,
        text: TextSampling | None,
    ) -> Iterator[str | Image.Image]:
        draw, generators = "image" in outputs, [torch.Generator().manual_seed(s) for s in seed]
        dialogue = self._start(1, None)
        for item in items:
            if isinstance(item, str):
                dialogue = append_text(self, dialogue, self._text_parts([item]))
            else:
                dialogue = self._append_images(dialogue, [[item]], generators[:1], draw=draw)
        for i, kind in enumerate(outputs):
            if kind == "text":
                piece = self._decode_text(dialogue, text, [seed[i]]).texts()[0]
                dialogue = append_text(self, dialogue, self._text_parts([piece], empty=True))
                yield piece
                continue
            (picture,) = self._generate_images(dialogue, [generators[i]], options)
            yield picture
            if i + 1 < len(outputs):
                dialogue = self._append_images(dialogue, [[picture]], [generators[i]], draw=True)

    # ---- what the verbs share

    def _start(self, n: int, system: str | None) -> list[CFGContexts]:
        """n empty dialogues, or n that begin with a system prompt."""
        empty = [CFGContexts()] * n
        return append_text(self, empty, self._text_parts([system] * n), system=True) if system else empty

    def initial_noise(self, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Where a picture of (height, width) begins, [L, C]: drawn on the CPU in float32."""
        tokens = (size[0] // self.config.latent_downsample) * (size[1] // self.config.latent_downsample)
        return torch.randn(tokens, self.config.latent_dim, generator=generator, dtype=torch.float32, device="cpu")

    def _generate_images(
        self, dialogues: list[CFGContexts], generators: Sequence[torch.Generator], options: ImageOptions
    ) -> list[Image.Image]:
        """A picture after each dialogue: guided as an edit where pictures came before."""
        d = self.config.defaults
        most = self.config.latent_downsample * self.config.latent_grid
        sizes = [
            check_size(options.size or x.image_size or d.size, self.config.latent_downsample, most) for x in dialogues
        ]
        defaults = [d.edit_guidance if x.image_size else d.generate_guidance for x in dialogues]
        latents = self.denoise(
            dialogues,
            [self.initial_noise(size, generator) for size, generator in zip(sizes, generators, strict=True)],
            sizes,
            guidance=[
                Guidance.resolve(one, its) for one, its in zip(options.guidance or defaults, defaults, strict=True)
            ],
            steps=d.steps if options.steps is None else options.steps,
            timestep_shift=d.timestep_shift if options.timestep_shift is None else options.timestep_shift,
            step_cache=options.step_cache,
            progress=options.progress,
        )
        return [tensor_to_pil(self.decode_latents(x, size)) for x, size in zip(latents, sizes, strict=True)]

    def _text_parts(self, texts: Sequence[str], *, empty: bool = False) -> list[Part]:
        if not empty and any(not text.strip() for text in texts):
            raise ValueError("got an empty prompt: expected at least a word")
        return [self.processor.text_part(self._text_tokenizer.encode(text)) for text in texts]

    @property
    def _text_tokenizer(self) -> TextTokenizer:
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer: add its tokenizer.json to the folder")
        return self.tokenizer

    def _decode_text(
        self, dialogues: Sequence[CFGContexts], sampling: TextSampling | None, seed: Sequence[int]
    ) -> TextStream:
        """The model's own text after each dialogue."""
        sampling = (sampling or TextSampling()).with_default_max_tokens(self.config.defaults.max_think_tokens)
        steps = decode_after(self, [d.full for d in dialogues], sampling, seed)
        return TextStream(steps, self._text_tokenizer.decode, len(dialogues), sampling.stop)

    def _append_images(
        self, dialogues: Sequence[CFGContexts], pictures: Sequence[Sequence], generators: Sequence, *, draw: bool
    ) -> list[CFGContexts]:
        """Append each sample's pictures."""
        made = [
            [self._image_parts(one, g, draw=draw) for one in some] for some, g in zip(pictures, generators, strict=True)
        ]
        return append_images(self, dialogues, made)

    def _image_parts(
        self, picture: ImageInput, generator: torch.Generator, *, draw: bool
    ) -> tuple[list[Part], tuple[int, int]]:
        image, vae = load_image(picture), self.config.vae
        width, height = self.config.vae_transform.output_size(image.width, image.height)
        grid = height // vae.stride, width // vae.stride
        noise = torch.randn(vae.latent_channels, *grid, generator=generator, dtype=torch.float32, device="cpu")
        return self.image_parts(image, noise=noise, latents=draw)
