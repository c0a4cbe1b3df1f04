"""BAGEL's public class: the network with a tokenizer, denoising, and the verbs.

Axes: P images, N latent tokens of all images, L latent tokens of one, C channels of a latent token.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from typing_extensions import Self

from unimm.checkpoint.json_files import write_json
from unimm.checkpoint.keymap import KeyMap
from unimm.generation.decode import TextStream, decode_text
from unimm.generation.flow import euler_step, flow_timesteps, timestep_pairs
from unimm.generation.guidance import Guidance, resolve_guidance
from unimm.generation.kv_cache import KVCache, check_fits
from unimm.generation.noise import gaussian_noise, seeded_generators
from unimm.generation.numbers import parse_flag
from unimm.generation.step_cache import StepCacheOptions, parse_step_cache
from unimm.generation.stepwise import ModelRequest, RequestRun
from unimm.generation.text_sampling import TextSampling, resolve_sampling
from unimm.models.bagel import FILES, RELEASES
from unimm.models.bagel.benchmarks import BENCHMARK_OPTIONS
from unimm.models.bagel.cfg_contexts import CFGContexts, ImageParts
from unimm.models.bagel.config import WEIGHT_FILES, BagelConfig
from unimm.models.bagel.latent_denoiser import LatentDenoiser
from unimm.models.bagel.network import BagelNetwork
from unimm.models.bagel.parallel import LORA_TARGETS, PARALLEL_PLAN, TENSOR_PARALLEL_PLAN
from unimm.models.bagel.processor import BagelImageOptions, BagelProcessor, BagelSpecialTokens
from unimm.models.bagel.stepwise import bagel_run
from unimm.models.bagel.weights import DECODER_KEY_MAP, LATENT_KEY_MAP, QK_NORM_KEY_MAP, VAE_KEY_MAP, VIT_KEY_MAP
from unimm.models.base import Generation, UnifiedModel
from unimm.processing.images.io import load_image, pil_to_tensor, tensor_to_pil
from unimm.processing.requests import (
    ImageInput,
    broadcast,
    check_size,
    expand_seeds,
    parse_n_images,
    parse_requests,
)
from unimm.sequence.parts import Part, position_gap
from unimm.tokenizers.text import TextTokenizer, load_tokenizer


class Bagel(BagelNetwork, UnifiedModel):
    """BAGEL with its tokenizer and its verbs: generate, understand, interleave."""

    RELEASES = RELEASES
    LORA_TARGETS = LORA_TARGETS
    PARALLEL_PLAN = PARALLEL_PLAN
    TENSOR_PARALLEL_PLAN = TENSOR_PARALLEL_PLAN
    FILES = FILES
    KEY_PREFIX = "bagel."
    BENCHMARK_OPTIONS = BENCHMARK_OPTIONS
    supports_thinking = True

    def __init__(self, config: BagelConfig):
        super().__init__(config)
        self.tokenizer = None

    # ---- files

    @classmethod
    def _build(cls, folder: Path) -> Self:
        model = cls(BagelConfig.from_folder(folder))
        model.tokenizer = load_tokenizer(folder, vocab_size=model.config.decoder.vocab_size)
        return model

    def key_maps(self) -> dict[tuple[str, ...], KeyMap]:
        """The key map of each file of weights, by the names that it may have."""
        config = self.config
        main = DECODER_KEY_MAP
        main += QK_NORM_KEY_MAP if config.decoder.qk_norm else KeyMap()
        main += VIT_KEY_MAP if config.vision else KeyMap()
        main += LATENT_KEY_MAP if config.visual_gen else KeyMap()
        return {WEIGHT_FILES: main} | ({("ae.safetensors",): VAE_KEY_MAP} if config.visual_gen else {})

    def save_config(self, folder: Path) -> None:
        """Write llm_config.json, vit_config.json and config.json."""
        for name, contents in self.config.to_json().items():
            write_json(folder / name, contents)

    # ---- what texts and images are in a sequence

    @property
    def processor(self) -> BagelProcessor:
        """Makes the parts of this model's sequences; special tokens from the tokenizer, else from the config."""
        config = self.config
        special_tokens = config.special_tokens
        if self.tokenizer is not None:
            special_tokens = BagelSpecialTokens.from_tokenizer(self.tokenizer)
        if special_tokens is None:
            raise ValueError("this checkpoint has no tokenizer and its config no new_token_ids: add tokenizer.json")
        return BagelProcessor(
            special_tokens=special_tokens,
            vit_patch_size=config.vision.patch_size if config.vision else None,
            vit_grid=config.vit_grid,
            latent_patch_size=config.latent_patch_size if config.visual_gen else None,
            latent_grid=config.latent_grid,
            interpolate_pos_embed=config.interpolate_pos_embed,
        )

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """The tokenizer. Raises ValueError for a checkpoint without one."""
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer: add its tokenizer.json to the folder")
        return self.tokenizer

    def text_parts(self, texts: Sequence[str]) -> list[Part]:
        """Each text between its special tokens."""
        return [self.processor.text_part(self.text_tokenizer.encode(text)) for text in texts]

    @torch.inference_mode()
    def image_parts(self, image: Image.Image, *, noise: Tensor | None, latents: bool) -> ImageParts:
        """An image as latents (where wanted) and as ViT patches, and its size after the VAE's resize, which both take.

        noise [z, h, w] draws from the VAE's posterior, as the released code always does; None takes its mean.
        """
        image = self.config.vae_transform(image)
        size = image.height, image.width
        vit_part = self.processor.vit_part(pil_to_tensor(self.config.vit_transform(image)))
        if not latents:
            return [vit_part], size
        noise = None if noise is None else noise.to(self.device)
        latent = self.encode_latents(pil_to_tensor(image).to(self.device), noise)
        return [self.processor.latent_part(latent.cpu()), vit_part], size

    def _input_image_parts(self, image: Image.Image, generator: torch.Generator, *, latents: bool) -> ImageParts:
        """`image_parts` of an input image, its posterior drawn by the generator."""
        vae = self.config.vae
        width, height = self.config.vae_transform.output_size(image.width, image.height)
        shape = vae.latent_channels, height // vae.stride, width // vae.stride
        noise = gaussian_noise(shape, generator)
        return self.image_parts(image, noise=noise, latents=latents)

    # ---- contexts

    def start_contexts(self, n: int, system: str | None) -> list[CFGContexts]:
        """The contexts of n empty conversations, or of n that begin with a system prompt."""
        empty = [CFGContexts()] * n
        return self.append_text(empty, self.text_parts([system] * n), system=True) if system else empty

    def _append_input_images(
        self,
        contexts: Sequence[CFGContexts],
        images: Sequence[Sequence[Image.Image]],
        generators: Sequence[torch.Generator],
        *,
        latents: bool,
    ) -> list[CFGContexts]:
        """The contexts after each sample's images; its generator draws their latents."""
        parts = [
            [self._input_image_parts(image, generator, latents=latents) for image in some]
            for some, generator in zip(images, generators, strict=True)
        ]
        return self.append_images(contexts, parts)

    def _check_fits(self, texts: Sequence[Sequence[Part]], n_image_parts: Sequence[int], *, n_more: int = 0) -> None:
        """Raise ValueError, before anything is encoded, for conversations that are longer than the model's positions.

        An image takes one position for each of its parts, which are latents and the ViT's patches.
        """
        gaps = [[position_gap(n)] for n in n_image_parts]
        check_fits(self.config.decoder, [[*some, *gap] for some, gap in zip(texts, gaps, strict=True)], n_more=n_more)

    def _fitting_text_parts(
        self, texts: Sequence[str], n_image_parts: Sequence[int], *, system: str | None, n_more: int
    ) -> list[Part]:
        """`text_parts` of the last text of each conversation, behind a system prompt and images. See `_check_fits`."""
        parts = self.text_parts(texts)
        before = self.text_parts([system] if system else [])
        self._check_fits([[*before, part] for part in parts], n_image_parts, n_more=n_more)
        return parts

    # ---- text

    def decode_after(
        self, caches: Sequence[KVCache], sampling: TextSampling, seeds: Sequence[int]
    ) -> Iterator[list[int | None]]:
        """Text after each cache, from bos to eos: one id a cache at a time, None for those that have ended."""
        special = self.processor.special_tokens
        session = self.decode_session(caches, sampling.token_limit)
        return decode_text(session, [special.bos] * len(caches), end=special.eos, sampling=sampling, seeds=seeds)

    def _resolve_sampling(self, sampling: TextSampling | None) -> TextSampling:
        return resolve_sampling(sampling).with_default_max_tokens(self.config.defaults.max_think_tokens)

    def _text_stream(
        self, contexts: Sequence[CFGContexts], sampling: TextSampling | None, seeds: Sequence[int]
    ) -> TextStream:
        """The model's own text after each context."""
        sampling = self._resolve_sampling(sampling)
        steps = self.decode_after([one.full for one in contexts], sampling, seeds)
        return TextStream(steps, self.text_tokenizer.decode, len(contexts), sampling.stop)

    # ---- images

    def latent_denoiser(
        self,
        contexts: Sequence[CFGContexts],
        sizes: Sequence[tuple[int, int]],
        *,
        guidance: Sequence[Guidance],
        step_cache: StepCacheOptions | None = None,
    ) -> LatentDenoiser:
        """The state in which images of (height, width) pixels are denoised after the contexts."""
        stride = self.config.latent_downsample
        grids = [(height // stride, width // stride) for height, width in sizes]
        return LatentDenoiser(self.decoder, self.processor, contexts, grids, guidance=guidance, step_cache=step_cache)

    @torch.inference_mode()
    def denoise_step(self, denoiser: LatentDenoiser, x: Tensor, timesteps: Tensor, next_timesteps: Tensor) -> Tensor:
        """One step of all images: x [N, C] from their timesteps [P] to next_timesteps [P], float64 on the CPU; 0 is
        data.
        """
        velocity = self.guided_velocity(denoiser, x, timesteps)
        return euler_step(x, velocity, denoiser.token_values(timesteps), denoiser.token_values(next_timesteps))

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
        step_cache: StepCacheOptions | None = None,
        progress: bool = False,
    ) -> list[Tensor]:
        """From noise [L, C] to latent tokens [L, C], for images of (height, width) pixels, all in one batch."""
        denoiser = self.latent_denoiser(contexts, sizes, guidance=guidance, step_cache=step_cache)
        x = torch.cat(list(noises)).to(self.device)
        for t, next_t in timestep_pairs(flow_timesteps(steps, timestep_shift), len(sizes), progress=progress):
            x = self.denoise_step(denoiser, x, t, next_t)
        return list(x.split(denoiser.n_tokens))

    @property
    def max_image_side(self) -> int:
        """The longest side of a generated image, in pixels."""
        return self.config.latent_downsample * self.config.latent_grid

    def initial_noise(self, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """The noise [L, C] that an image of (height, width) begins from, float32 from the CPU."""
        stride = self.config.latent_downsample
        shape = (size[0] // stride) * (size[1] // stride), self.config.latent_dim
        return gaussian_noise(shape, generator)

    @torch.inference_mode()
    def _generate_images(
        self, contexts: Sequence[CFGContexts], generators: Sequence[torch.Generator], options: BagelImageOptions
    ) -> list[Image.Image]:
        """An image after each context: guided as an edit where images came before."""
        defaults = self.config.defaults
        stride = self.config.latent_downsample
        sizes = [options.size or one.image_size or defaults.size for one in contexts]
        sizes = [check_size(size, stride, self.max_image_side) for size in sizes]
        usual = [defaults.edit_guidance if one.image_size else defaults.generate_guidance for one in contexts]
        latents = self.denoise(
            contexts,
            [self.initial_noise(size, generator) for size, generator in zip(sizes, generators, strict=True)],
            sizes,
            guidance=[resolve_guidance(*pair) for pair in zip(options.guidance or usual, usual, strict=True)],
            steps=defaults.steps if options.steps is None else options.steps,
            timestep_shift=defaults.timestep_shift if options.timestep_shift is None else options.timestep_shift,
            step_cache=parse_step_cache(options.step_cache),
            progress=options.progress,
        )
        return [tensor_to_pil(self.decode_latents(x, size)) for x, size in zip(latents, sizes, strict=True)]

    def start_run(self, request: ModelRequest) -> RequestRun:
        """A request as work that a scheduler may batch with that of others: see `UnifiedModel.start_run`."""
        return bagel_run(self, request)

    # ---- verbs

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        images: ImageInput | Sequence | None = None,
        n: int = 1,
        size: tuple[int, int] | None = None,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance: Guidance | float | Sequence[Guidance | float] | None = None,
        timestep_shift: float | None = None,
        step_cache: StepCacheOptions | bool = False,
        think: bool = False,
        text_sampling: TextSampling | None = None,
        progress: bool = False,
    ) -> Generation:
        """Generate `n` images for each prompt, in the order of the prompts; with `images`, edit them.

        prompt: one text or a batch. images: for one prompt an image or several, for a batch one of these (or None)
        each. size: (height, width) in pixels, multiples of the stride; unless given, that of the last input image after
        its resize, or the default. seed: one, or one a prompt; from one number, that number and the ones after it,
        image by image. steps: of the sampler (the released code's num_timesteps - 1). guidance: one, or one a prompt; a
        number is the text_scale, the rest as by default. step_cache: spare forwards, by a TaylorSeer (True) or a TeaCache
        of `unimm.generation.step_cache`. think: write the reasoning first, as text_sampling says. But for rounding, an
        image does not depend on what else is in the batch. Raises ValueError for bad input.
        """
        self.processor.check_visual_gen()
        prompts, input_images = parse_requests(prompt, images)
        n = parse_n_images(n)
        think = parse_flag(think, "think")
        text_sampling = self._resolve_sampling(text_sampling)
        defaults = self.config.defaults
        scales = None if guidance is None else broadcast(guidance, len(prompts), "guidances")
        options = BagelImageOptions(
            size=size,
            guidance=None if scales is None else [scale for scale in scales for _ in range(n)],
            steps=steps,
            timestep_shift=timestep_shift,
            step_cache=step_cache,
            progress=progress,
        )
        if options.size is not None:
            check_size(options.size, self.config.latent_downsample, self.max_image_side)
        seeds = expand_seeds(seed, len(prompts), n_images=n)
        generators = seeded_generators(seeds)
        copies = [i for i in range(len(prompts)) for _ in range(n)]  # the prompt of each image
        system = defaults.think_generate_prompt if think else None
        n_parts = [2 * len(some) for some in input_images]
        n_more = text_sampling.token_limit if think else 0
        texts = self._fitting_text_parts(prompts, n_parts, system=system, n_more=n_more)

        contexts = self.start_contexts(len(prompts), system)
        contexts = [contexts[i] for i in copies]
        contexts = self._append_input_images(contexts, [input_images[i] for i in copies], generators, latents=True)
        contexts = self.append_text(contexts, [texts[i] for i in copies])
        reasoning: list[str] = []
        if think:
            reasoning = self._text_stream(contexts, text_sampling, seeds).texts()
            contexts = self.append_reasoning(contexts, self.text_parts(reasoning))
        return Generation(self._generate_images(contexts, generators, options), reasoning)

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
        """Answer a question about images: a str; for a batch of questions a list; with `stream`, pieces as they come.

        images: for one question an image, several, or None; for a batch one of these each. think: reason first, in the
        answer. Raises ValueError for bad input.
        """
        questions, input_images = parse_requests(question, images)
        think = parse_flag(think, "think")
        stream = parse_flag(stream, "stream")
        if stream and len(questions) > 1:
            raise ValueError(f"got {len(questions)} questions to stream: expected one")
        text_sampling = self._resolve_sampling(text_sampling)
        n = len(questions)
        seeds = expand_seeds(seed, n)
        system = self.config.defaults.think_understand_prompt if think else None
        n_parts = [len(some) for some in input_images]
        texts = self._fitting_text_parts(questions, n_parts, system=system, n_more=text_sampling.token_limit)
        contexts = self.start_contexts(n, system)
        contexts = self._append_input_images(contexts, input_images, [torch.Generator()] * n, latents=False)
        contexts = self.append_text(contexts, texts)
        answers = self._text_stream(contexts, text_sampling, seeds)
        if stream:
            return answers.pieces()
        return answers.texts()[0] if isinstance(question, str) else answers.texts()

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
        """Continue texts and images with texts and images, in the order of `outputs` ("text" or "image").

        Yields each piece as it is made; it enters the context (an image by its pixels, through VAE and ViT), so the
        next piece depends on it. A file is given as a Path; a str is always text. Output i has the seed seed + i.
        Raises ValueError for bad input, at once.
        """
        items = [inputs] if isinstance(inputs, str | Path | Image.Image) else inputs
        if not isinstance(items, Sequence | Iterator):
            raise ValueError(f"got inputs {inputs!r:.80}: expected a list of texts and images")
        kinds: Any = [outputs] if isinstance(outputs, str) else outputs
        known = isinstance(kinds, list | tuple) and all(isinstance(one, str) for one in kinds)
        wrong = [one for one in kinds if one not in ("text", "image")] if known else kinds
        if not known or wrong:
            raise ValueError(f"got outputs {wrong!r:.80}: expected a sequence of 'text' and 'image'")
        outputs = list(kinds)
        if "image" in outputs:
            self.processor.check_visual_gen()
        options = BagelImageOptions(
            size=size, guidance=None if guidance is None else [guidance], steps=steps, progress=progress
        )
        if options.size is not None:
            check_size(options.size, self.config.latent_downsample, self.max_image_side)
        loaded = [
            parse_requests(item, None)[0][0] if isinstance(item, str) else load_image(item, place=f"input {i + 1}")
            for i, item in enumerate(items)
        ]
        seeds = expand_seeds(seed, max(1, len(outputs)))
        text_sampling = self._resolve_sampling(text_sampling)
        texts = self.text_parts([one for one in loaded if isinstance(one, str)])
        n_image_parts = (1 + ("image" in outputs)) * (len(loaded) - len(texts))
        self._check_fits([texts], [n_image_parts], n_more=text_sampling.token_limit if "text" in outputs else 0)
        return self._interleave(loaded, outputs, seeds, options, text_sampling)

    def _interleave(
        self,
        inputs: Sequence[str | Image.Image],
        outputs: Sequence[str],
        seeds: Sequence[int],
        options: BagelImageOptions,
        sampling: TextSampling,
    ) -> Iterator[str | Image.Image]:
        generators = seeded_generators(seeds)
        latents = "image" in outputs
        contexts = self.start_contexts(1, None)
        for item in inputs:
            if isinstance(item, str):
                contexts = self.append_text(contexts, self.text_parts([item]))
            else:
                contexts = self._append_input_images(contexts, [[item]], generators[:1], latents=latents)
        for i, kind in enumerate(outputs):
            if kind == "text":
                text = self._text_stream(contexts, sampling, [seeds[i]]).texts()[0]
                contexts = self.append_text(contexts, self.text_parts([text]))
                yield text
                continue
            (image,) = self._generate_images(contexts, [generators[i]], options)
            yield image
            if i + 1 < len(outputs):
                contexts = self._append_input_images(contexts, [[image]], [generators[i]], latents=True)
