"""BAGEL's requests step by step: its contexts as prefills, texts as decode steps, images as denoising steps.

Axes: L latent tokens of an image, C channels of a latent token.
"""

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from unimm.generation.flow import flow_timesteps, parse_steps
from unimm.generation.guidance import Guidance, resolve_guidance
from unimm.generation.noise import seeded_generators
from unimm.generation.stepwise import (
    DecodeText,
    DenoisingBatch,
    DenoisingImage,
    ModelRequest,
    Prefill,
    RequestRun,
    WorkGenerator,
    forward_bytes,
)
from unimm.models.bagel.cfg_contexts import CFGContexts, ContextAppend
from unimm.models.bagel.latent_denoiser import LatentDenoiser
from unimm.processing.images.io import tensor_to_pil
from unimm.processing.requests import check_size
from unimm.sequence.parts import Part

if TYPE_CHECKING:
    from unimm.models.bagel.model import Bagel

Grown = Generator[Any, Any, CFGContexts]  # prefills, and the contexts that come of them


class BagelImage(DenoisingImage):
    """An image on its way: latent tokens x [L, C] after its contexts."""

    def __init__(
        self,
        model: "Bagel",
        contexts: CFGContexts,
        noise: Tensor,
        *,
        size: tuple[int, int],
        guidance: Guidance,
        schedule: Tensor,
    ):
        super().__init__(noise.to(model.device), schedule)
        self.model = model
        self.contexts = contexts
        self.size = size
        self.guidance = guidance

    @torch.inference_mode()
    def decode(self) -> Image.Image:
        """The image through the VAE."""
        return tensor_to_pil(self.model.decode_latents(self.shown, self.size))


class BagelImageBatch(DenoisingBatch):
    """Images of any sizes in one packed forward."""

    def __init__(self, model: "Bagel"):
        super().__init__()
        self.model = model

    def join(self, images: Sequence[BagelImage]) -> LatentDenoiser:
        """All branches of all images in one buffer."""
        return self.model.latent_denoiser(
            [one.contexts for one in images],
            [one.size for one in images],
            guidance=[one.guidance for one in images],
        )

    def denoise(
        self, denoiser: LatentDenoiser, images: Sequence[BagelImage], timesteps: Tensor, next_timesteps: Tensor
    ) -> list[Tensor]:
        """One packed step."""
        x = torch.cat([one.x for one in images])
        return list(self.model.denoise_step(denoiser, x, timesteps, next_timesteps).split(denoiser.n_tokens))


class BagelRequest:
    """A request, read and checked: it answers and draws as `interleave`, and with `think` as `generate` and
    `understand` do."""

    def __init__(self, model: "Bagel", request: ModelRequest):
        self.model = model
        self.request = request
        config = model.config
        defaults = config.defaults
        self.latents = "image" in request.outputs
        if self.latents:
            model.processor.check_visual_gen()
        if request.negative_prompt:
            raise NotImplementedError("Bagel has no negative_prompt: leave it out, or take another family")
        if request.size is not None:
            check_size(request.size, config.latent_downsample, model.max_image_side)
        if request.guidance is not None:
            resolve_guidance(request.guidance, defaults.generate_guidance)
        self.steps = parse_steps(defaults.steps if request.steps is None else request.steps)
        self.sampling = request.text_sampling.with_default_max_tokens(defaults.max_think_tokens)
        think = defaults.think_generate_prompt if self.latents else defaults.think_understand_prompt
        systems = [one for one in (request.system, think if request.think else None) if one]
        self.system: Part | None = model.text_parts(["\n".join(systems)])[0] if systems else None
        self.items = [piece for message in request.messages for piece in message.content if piece != ""]
        if not any(isinstance(piece, str) and piece.strip() for piece in self.items):
            raise ValueError("got an empty prompt: expected at least a word")
        texts = iter(model.text_parts([piece for piece in self.items if isinstance(piece, str)]))
        self.inputs = [next(texts) if isinstance(piece, str) else piece for piece in self.items]
        parts = [self.system] if self.system else []
        parts += [piece for piece in self.inputs if not isinstance(piece, Image.Image)]
        self.n_images = len(self.inputs) - len(parts) + bool(self.system)
        n_texts = request.outputs.count("text") + (request.think and self.latents)
        n_more = n_texts * self.sampling.token_limit + 2 * request.outputs.count("image")
        model._check_fits([parts], [(1 + self.latents) * self.n_images], n_more=n_more)
        self.n_text_rows = sum(part.segment.length for part in parts)
        self.n_decoded_rows = n_texts * self.sampling.token_limit

    def run(self) -> RequestRun:
        """The request as work."""
        config = self.model.config
        stride = config.latent_downsample
        height, width = self.request.size or config.defaults.size
        n_tokens = (height // stride) * (width // stride)
        image_rows = n_tokens * (1 + self.latents) + 2
        images = self.n_images + self.request.outputs.count("image")
        rows = self.n_text_rows + self.n_decoded_rows + images * image_rows
        branches = 3 if self.latents else 1
        return RequestRun(
            work=self._work(),
            image_batch=lambda: BagelImageBatch(self.model),
            n_bytes=branches
            * forward_bytes(self.model.decoder, cached_rows=2 * rows, step_rows=max(image_rows, self.n_text_rows)),
            n_prompt_tokens=self.n_text_rows + self.n_images * image_rows,
        )

    # ---- the work

    def _work(self) -> WorkGenerator:
        request = self.request
        model = self.model
        seeds = [request.seed + i for i in range(max(1, len(request.outputs)))]
        generators = seeded_generators(seeds)
        contexts = CFGContexts()
        if self.system:
            contexts = yield from self._append_text(contexts, self.system, system=True)
        for item in self.inputs:
            if isinstance(item, Image.Image):
                contexts = yield from self._append_image(contexts, item, generators[0])
            else:
                contexts = yield from self._append_text(contexts, item)
        if request.think and self.latents:
            reasoning = yield self._text_after(contexts, seeds[0], channel="reasoning")
            (part,) = model.text_parts([reasoning.text])
            contexts = yield from self._append(contexts, [part], ("full",), CFGContexts.with_reasoning)
        for i, kind in enumerate(request.outputs):
            is_last = i + 1 == len(request.outputs)
            if kind == "text":
                text = yield self._text_after(contexts, seeds[i])
                if not is_last:
                    contexts = yield from self._append_text(contexts, model.text_parts([text.text])[0])
                continue
            image = yield self._image_after(contexts, generators[i])
            if not is_last:
                contexts = yield from self._append_image(contexts, image, generators[i])

    def _append(
        self,
        contexts: CFGContexts,
        parts: Sequence[Part],
        names: Sequence[str],
        grow: Callable[[CFGContexts, Any], CFGContexts],
    ) -> Grown:
        append = ContextAppend([contexts], [parts], names)
        caches = yield Prefill(self.model, append.caches, append.parts)
        return grow(contexts, append.by_name(caches)[0])

    def _append_text(self, contexts: CFGContexts, part: Part, *, system: bool = False) -> Grown:
        names = ("full", "no_image")
        return self._append(contexts, [part], names, lambda one, grown: one.with_text(grown, system=system))

    def _append_image(self, contexts: CFGContexts, image: Image.Image, generator: torch.Generator) -> Grown:
        parts, size = self.model._input_image_parts(image, generator, latents=self.latents)
        return self._append(contexts, parts, ("full",), lambda one, grown: one.with_image(grown, size))

    def _text_after(self, contexts: CFGContexts, seed: int, *, channel: Any = "text") -> DecodeText:
        special = self.model.processor.special_tokens
        return DecodeText(
            self.model,
            contexts.full,
            special.bos,
            (special.eos,),
            self.sampling,
            seed,
            self.model.text_tokenizer,
            channel,
        )

    def _image_after(self, contexts: CFGContexts, generator: torch.Generator) -> BagelImage:
        model = self.model
        defaults = model.config.defaults
        usual = defaults.edit_guidance if contexts.image_size else defaults.generate_guidance
        size = self.request.size or contexts.image_size or defaults.size
        size = check_size(size, model.config.latent_downsample, model.max_image_side)
        return BagelImage(
            model,
            contexts,
            model.initial_noise(size, generator),
            size=size,
            guidance=usual if self.request.guidance is None else resolve_guidance(self.request.guidance, usual),
            schedule=flow_timesteps(self.steps, defaults.timestep_shift),
        )


def bagel_run(model: "Bagel", request: ModelRequest) -> RequestRun:
    """A request as work. Raises ValueError for bad input, before anything is computed."""
    return BagelRequest(model, request).run()
