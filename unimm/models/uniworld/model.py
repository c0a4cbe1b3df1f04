"""UniWorld-V1: the network with its files and verbs.

Lin et al. 2025, arXiv 2506.03147. Released code and weights: github.com/PKU-YuanGroup/UniWorld-V1.
docs/originals/uniworld.md.

Axes: B samples, M tokens of a condition, D model (the MLLM's), P images, L tokens of an image, C channels, h w latent
grid, k reference images, S steps.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from typing_extensions import Self

from unimm.checkpoint import hub
from unimm.checkpoint.json_files import write_json
from unimm.checkpoint.keymap import KeyMap
from unimm.checkpoint.load import HUB_WEIGHT_FILES
from unimm.denoisers.mmdit import PATCH_SIZE, patchify_latents, unpatchify_latents
from unimm.generation.decode import TextStream, decode_text
from unimm.generation.flow import dynamic_shift, euler_step, flow_timesteps, timestep_pairs
from unimm.generation.noise import gaussian_noise, seeded_generators
from unimm.generation.numbers import parse_float
from unimm.generation.step_cache import StepCacheOptions, parse_step_cache
from unimm.generation.stepwise import ModelRequest, RequestRun
from unimm.generation.text_sampling import TextSampling, resolve_sampling
from unimm.models.base import ComponentModel, Generation
from unimm.models.common.mllm_conditioned import MLLMConditionedModel
from unimm.models.common.separate_outputs import separate_run
from unimm.models.release import Components
from unimm.models.uniworld import FILES, RELEASES
from unimm.models.uniworld.auxiliary_encoders import find_auxiliary_folders
from unimm.models.uniworld.config import TASK_HEAD_FILES, UniWorldConfig
from unimm.models.uniworld.latent_denoiser import UniWorldLatentDenoiser
from unimm.models.uniworld.network import MLLMOutput, UniWorldNetwork
from unimm.models.uniworld.parallel import LORA_TARGETS, PARALLEL_PLAN, TENSOR_PARALLEL_PLAN
from unimm.models.uniworld.processor import (
    MAX_IMAGE_SIDE,
    ReferenceLatents,
    UniWorldImageOptions,
    UniWorldProcessor,
    nearest_aspect_size,
)
from unimm.models.uniworld.stepwise import UniWorldImageAnswer, UniWorldImageInputs, routed_run
from unimm.models.uniworld.weights import TASK_HEAD_KEY_MAP, uniworld_key_map
from unimm.processing.images.io import tensor_to_pil
from unimm.processing.requests import (
    ImageInput,
    check_size,
    expand_seeds,
    parse_n_images,
    parse_requests,
    parse_scales,
)
from unimm.sequence.parts import Part
from unimm.tokenizers.text import load_tokenizer
from unimm.vlms.qwen2_5_vl.model import QwenVL
from unimm.vlms.qwen2_5_vl.processor import IMAGE_PAD


class UniWorld(UniWorldNetwork, MLLMConditionedModel, ComponentModel):
    """A frozen MLLM and SigLIP2 condition a FLUX: generates and edits images, and answers as the MLLM does."""

    RELEASES = RELEASES
    LORA_TARGETS = LORA_TARGETS
    QUANTIZED = ("mllm.decoder.blocks", "denoiser.mmdit.double_blocks", "denoiser.mmdit.single_blocks")
    COMPILED = (
        "denoiser.mmdit.double_blocks.{}",
        "denoiser.mmdit.single_blocks.{}",
        "auxiliary.vae.decoder",
    )
    UNPACKED = ("mllm.vision", "denoiser", "auxiliary")
    PARALLEL_PLAN = PARALLEL_PLAN
    TENSOR_PARALLEL_PLAN = TENSOR_PARALLEL_PLAN
    DECODES_IMAGES = "auxiliary.decode"
    FILES = FILES
    COMPONENTS = ("siglip", "flux", "t5")
    KEEP_FLOAT32 = ("auxiliary.vae.", "task_head.")

    def __init__(self, config: UniWorldConfig):
        super().__init__(config)
        self.tokenizer = None

    # ---- files

    @classmethod
    def _build(cls, folder: Path) -> Self:
        """The model of a folder's config files, with the MLLM's tokenizer, without weights and auxiliary encoders."""
        model = cls(UniWorldConfig.from_folder(folder))
        model.mllm.tokenizer = load_tokenizer(
            folder, special_tokens=model.mllm.SPECIAL_TOKENS, vocab_size=model.mllm.config.decoder.vocab_size
        )
        return model

    def load_components(
        self, components: Components, *, name: str | Path, folder: Path, dtype: torch.dtype, device: torch.device
    ) -> None:
        """components: "siglip" and "flux", folders or hub ids of SigLIP2, and of FLUX.1-dev for VAE, CLIP and T5; "t5":
        None leaves T5 out, which is more than half as large as the MLLM.

        Unless given, these parts lie below the checkpoint's folder, or are absent; those of a hub id come from the
        repositories that the original names (FLUX.1-dev's non-commercial licence has to be accepted first).
        """
        folders = find_auxiliary_folders(
            folder,
            components,
            is_hub_id=not Path(name).expanduser().is_dir() and str(name) not in hub.bundled_names(),
            part_sources=self.config.part_sources,
            non_commercial=self.FILES.non_commercial,
        )
        self.auxiliary.load(folders, dtype=dtype, device=device)
        self.auxiliary.check_widths(self.config)

    def key_maps(self) -> dict[tuple[str, ...], KeyMap]:
        """The key map of each file of weights whose part the model has."""
        key_maps: dict[tuple[str, ...], KeyMap] = {HUB_WEIGHT_FILES: uniworld_key_map(self.config)}
        if self.task_head is not None:
            key_maps[TASK_HEAD_FILES] = TASK_HEAD_KEY_MAP
        return key_maps | self.auxiliary.key_maps("auxiliary.")

    def save_config(self, folder: Path) -> None:
        """Write config.json and preprocessor_config.json, the auxiliary encoders' configs below, and all tokenizers."""
        for name, contents in (self.config.to_json() | self.auxiliary.to_json()).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_json(folder / name, contents)
        for name, tokenizer in ({".": self.mllm.tokenizer} | self.auxiliary.tokenizers()).items():
            if tokenizer is not None:
                (folder / name).mkdir(exist_ok=True)
                tokenizer.save(folder / name)

    # ---- routing

    @property
    def processor(self) -> UniWorldProcessor:
        """Prompts and images to parts."""
        return UniWorldProcessor(
            mllm_processor=self.mllm.processor,
            system_prompt=self.config.system_prompt,
            images_first=self.config.images_first,
        )

    def task_head_state(self, samples: Sequence[Sequence[Part]], hidden_states: Sequence[Tensor]) -> Tensor:
        """The hidden state at the last "assistant" token of each sample [B, D], by which the task head routes."""
        assistant_id = self.processor.assistant_id
        from_end = [parts[-1].ids.tolist()[::-1].index(assistant_id) + 1 for parts in samples]
        return torch.stack([states[-n] for states, n in zip(hidden_states, from_end, strict=True)])

    def route_logits(self, output: MLLMOutput) -> Tensor:
        """Logits [2] of answering a prompt in words and of generating an image; the larger one decides."""
        (state,) = self.task_head_state([output.parts], [output.hidden_states])
        return self.task_head_logits(state)

    def start_run(self, request: ModelRequest) -> RequestRun:
        """A request as work that a scheduler may batch with that of others: see `UnifiedModel.start_run`."""
        can_route = self.task_head is not None and self.auxiliary.vae is not None
        if request.routed and request.outputs == ("text",) and can_route:
            return routed_run(self, request)
        return separate_run(self, self.chat_mllm, request, partial(UniWorldImageAnswer, self, request))

    # ---- generation

    def latent_denoiser(
        self,
        conditions: Sequence[Tensor],
        latent_size: tuple[int, int],
        *,
        pooled: Tensor,
        guidance: float | Tensor,
        true_cfg_scale: Tensor | None = None,
        reference_latents: Tensor | None = None,
        schedule: Tensor | None = None,
        step_cache: StepCacheOptions | None = None,
    ) -> UniWorldLatentDenoiser:
        """The state of denoising P images of one size, in the model's dtype: see `UniWorldLatentDenoiser`."""
        return UniWorldLatentDenoiser(
            self.denoiser,
            [one.to(self.dtype) for one in conditions],
            latent_size,
            pooled=pooled,
            guidance=guidance,
            true_cfg_scale=true_cfg_scale,
            reference_latents=reference_latents,
            schedule=schedule,
            step_cache=step_cache,
        )

    @torch.inference_mode()
    def denoise_step(
        self, denoiser: UniWorldLatentDenoiser, x: Tensor, timesteps: Tensor, next_timesteps: Tensor
    ) -> Tensor:
        """One Euler step: patchified latents x [P, L, C] from timesteps to next_timesteps, [P], one an image -> x.

        Images of different progress share the forward.
        """
        return euler_step(x, denoiser.velocity(x, timesteps), timesteps, next_timesteps)

    def denoise(
        self, denoiser: UniWorldLatentDenoiser, noise: Tensor, timesteps: Tensor, *, progress: bool = False
    ) -> Tensor:
        """Noise [P, C, h, w] to latents, on one schedule, timesteps [S + 1]."""
        x = patchify_latents(noise.to(self.device))
        for t, next_t in timestep_pairs(timesteps, len(x), progress=progress):
            x = self.denoise_step(denoiser, x, t, next_t)
        return unpatchify_latents(x, height=noise.shape[2], width=noise.shape[3])

    def sampling_timesteps(self, size: tuple[int, int], steps: int, *, n_references: int = 0) -> Tensor:
        """FLUX's schedule [S + 1] for an image of (height, width) in pixels, with references of its size."""
        tokens = size[0] * size[1] // self.token_pixels**2
        return flow_timesteps(steps, dynamic_shift(tokens * (1 + n_references)))

    def initial_noise(self, size: tuple[int, int], seed: int) -> Tensor:
        """Noise of an image of (height, width) in pixels, on the CPU [C, h, w]."""
        height, width = (side * PATCH_SIZE // self.token_pixels for side in size)
        shape = self.config.latent_channels, height, width
        (generator,) = seeded_generators([seed])
        return gaussian_noise(shape, generator)

    @property
    def token_pixels(self) -> int:
        """Pixels a side of an image token."""
        return PATCH_SIZE * self.auxiliary.required_vae.config.stride

    def output_size(self, images: Sequence[Image.Image]) -> tuple[int, int]:
        """(height, width) of an image edited from others: in the aspect ratio nearest to their mean height and
        width."""
        height = sum(one.height for one in images)
        width = sum(one.width for one in images)
        return nearest_aspect_size(
            height or 1, width or 1, image_pixels=self.config.image_pixels, n_ratios=self.config.n_aspect_ratios
        )

    @torch.inference_mode()
    def generate_images(
        self,
        outputs: Sequence[MLLMOutput],
        prompts: Sequence[str],
        images: Sequence[Sequence[Image.Image]],
        options: UniWorldImageOptions,
    ) -> list[Image.Image]:
        """Images from the MLLM's output for each prompt and from its input images, as many a prompt as the options
        say."""
        inputs = self.image_inputs(outputs, prompts, images, options)
        n = len(options.sizes) // len(outputs)
        rows = [i for i in range(len(outputs)) for _ in range(n)]
        return self.denoise_batch(
            [inputs.conditions[i] for i in rows],
            inputs.pooled[rows],
            [inputs.sizes[i] for i in rows],
            {image: inputs.references[i] for image, i in enumerate(rows) if i in inputs.references},
            options,
        )

    @torch.inference_mode()
    def image_inputs(
        self,
        outputs: Sequence[MLLMOutput],
        prompts: Sequence[str],
        images: Sequence[Sequence[Image.Image]],
        options: UniWorldImageOptions,
    ) -> UniWorldImageInputs:
        """What the images of each prompt are denoised from."""
        with_t5 = self.auxiliary.t5 is not None if options.t5 is None else options.t5
        texts = [prompt.replace(IMAGE_PAD, "") for prompt in prompts]
        conditions = self._conditions(outputs, images, texts if with_t5 else None)
        # the original, too, gives CLIP an empty text where there is no T5
        pooled = self.clip_embedding(texts if with_t5 else [""] * len(texts), clip=options.clip)
        n = len(options.sizes) // len(outputs)
        sizes = [
            check_size(options.sizes[n * i] or self.output_size(some), self.token_pixels, MAX_IMAGE_SIDE)
            for i, some in enumerate(images)
        ]
        references: dict[int, Tensor] = {}
        for i, some in enumerate(images):
            if options.reference_latents and some:
                latents = self.auxiliary.encode_vae(some, sizes[i])
                if options.reference_latents == "tokens":
                    references[i] = rearrange(latents, "k c h w -> c (k h) w")
                else:
                    conditions[i] = torch.cat((conditions[i], self.reference_condition(latents)))
        return UniWorldImageInputs(conditions, pooled, sizes, references)

    def _conditions(
        self, outputs: Sequence[MLLMOutput], images: Sequence[Sequence[Image.Image]], texts: Sequence[str] | None
    ) -> list[Tensor]:
        """The condition of each prompt [M, C]: the MLLM's states with SigLIP2's features; then T5's of the texts, if
        given."""
        flat_images = [image for some in images for image in some]
        siglip_features = self.auxiliary.encode_siglip(flat_images) if flat_images else None
        conditions = self.condition(
            [one.parts for one in outputs], [one.hidden_states for one in outputs], siglip_features
        )
        if texts is None:
            return conditions
        t5_states = self.auxiliary.encode_t5(texts, self.config.t5_tokens)
        return [torch.cat(pair) for pair in zip(conditions, t5_states, strict=True)]

    def denoise_batch(
        self,
        conditions: Sequence[Tensor],
        pooled: Tensor,
        sizes: Sequence[tuple[int, int]],
        references: Mapping[int, Tensor],
        options: UniWorldImageOptions,
    ) -> list[Image.Image]:
        """Images from their conditions; those of one size and one number of references are denoised together.

        references: image -> latents that stand below it [C, k h, w].
        """
        groups: dict[tuple, list[int]] = {}
        for i, size in enumerate(sizes):
            groups.setdefault((size, references[i].shape[1] if i in references else 0), []).append(i)
        images: dict[int, Image.Image] = {}
        for (size, reference_rows), rows in groups.items():
            noise = torch.stack([self.initial_noise(size, options.seeds[i]) for i in rows])
            h, w = noise.shape[2:]
            timesteps = self.sampling_timesteps(size, options.steps, n_references=reference_rows // h)
            denoiser = self.latent_denoiser(
                [conditions[i] for i in rows],
                (h, w),
                pooled=pooled[rows],
                guidance=self._scales(options.guidance_scales, rows),
                true_cfg_scale=self._scales(options.true_cfg_scales, rows),
                reference_latents=torch.stack([references[i] for i in rows]) if reference_rows else None,
                schedule=timesteps[:-1],
                step_cache=parse_step_cache(options.step_cache),
            )
            latents = self.denoise(denoiser, noise, timesteps, progress=options.progress)
            for i, one in zip(rows, latents, strict=True):
                images[i] = tensor_to_pil(self.auxiliary.decode(one[None])[0])
        return [images[i] for i in range(len(sizes))]

    def _scales(self, scales: Sequence[float], rows: Sequence[int]) -> Tensor:
        return torch.tensor([scales[i] for i in rows], dtype=torch.float32, device=self.device)

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        images: ImageInput | Sequence | None = None,
        n: int = 1,
        size: tuple[int, int] | None = None,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance: float | Sequence[float] | None = None,
        true_cfg_scale: float | Sequence[float] | None = None,
        t5: bool | None = None,
        clip: bool | None = None,
        reference_latents: ReferenceLatents | None = None,
        image_embeds_shortcut: float = 0.0,
        step_cache: StepCacheOptions | bool = False,
        progress: bool = False,
    ) -> Generation:
        """Generate `n` images for each prompt, in the order of the prompts, or edit the input images given with it.

        prompt: one text or a batch. images: for one prompt an image or several, for a batch one of these each; they
        stand after the text, or where it has <|image_pad|>. size: (height, width) in pixels; unless given, in the
        aspect ratio nearest to the input images'. seed: one, or one a prompt; from one number, that number and the ones
        after it, image by image. guidance: the scale that FLUX embeds; true_cfg_scale: of classifier-free guidance
        against an empty condition, 1 is none; one, or one a prompt. t5, clip: whether these encode the prompt, too;
        unless given, where they are loaded. reference_latents: the input images' VAE latents as "tokens" beside the
        image's, or as part of the "condition". image_embeds_shortcut: weight in [0, 1] of the vision encoder's output,
        against the MLLM's states of the input images. step_cache: spare forwards of FLUX, by a TaylorSeer (True) or a
        TeaCache of `unimm.generation.step_cache`. But for rounding, an image does not depend on what else is in the
        batch. Raises ValueError for bad input.
        """
        prompts, input_images = parse_requests(prompt, images)
        image_embeds_shortcut = parse_float(image_embeds_shortcut, "image_embeds_shortcut", "0 to 1", low=0, high=1)
        options = self._image_options(
            len(prompts),
            n=n,
            size=size,
            seed=seed,
            steps=steps,
            guidance=guidance,
            true_cfg_scale=true_cfg_scale,
            t5=t5,
            clip=clip,
            reference_latents=reference_latents,
            step_cache=step_cache,
            progress=progress,
        )
        samples = [self.processor.prompt_parts(text, some) for text, some in zip(prompts, input_images, strict=True)]
        outputs = self.encode_prompts(samples, image_embeds_shortcut=image_embeds_shortcut)
        return Generation(self.generate_images(outputs, prompts, input_images, options))

    def _image_options(
        self,
        n_prompts: int,
        *,
        n: int = 1,
        size: tuple[int, int] | None,
        seed: int | Sequence[int],
        steps: int | None,
        guidance: float | Sequence[float] | None,
        true_cfg_scale: float | Sequence[float] | None = None,
        t5: bool | None = None,
        clip: bool | None = None,
        reference_latents: ReferenceLatents | None = None,
        step_cache: StepCacheOptions | bool = False,
        progress: bool,
    ) -> UniWorldImageOptions:
        """The options of `n` images of each prompt, with the config's defaults. Raises ValueError for bad ones."""
        config = self.config
        n = parse_n_images(n)
        guidance = config.guidance if guidance is None else guidance
        true_cfg_scale = config.true_cfg_scale if true_cfg_scale is None else true_cfg_scale
        stride = self.token_pixels  # raises for a checkpoint without a VAE, before anything is computed
        image_size = None if size is None else check_size(size, stride, MAX_IMAGE_SIDE)
        return UniWorldImageOptions(
            steps=config.steps if steps is None else steps,
            sizes=[image_size] * (n * n_prompts),
            seeds=expand_seeds(seed, n_prompts, n_images=n),
            guidance_scales=parse_scales(guidance, n_prompts, "guidances", n_images=n),
            true_cfg_scales=parse_scales(true_cfg_scale, n_prompts, "true CFG scales", n_images=n),
            t5=t5,
            clip=clip,
            reference_latents=config.reference_latents if reference_latents is None else reference_latents,
            step_cache=step_cache,
            progress=progress,
        )

    def respond(
        self,
        prompt: str,
        *,
        images: ImageInput | Sequence | None = None,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        text_sampling: TextSampling | None = None,
        progress: bool = False,
    ) -> str | Generation:
        """Answer a prompt in words, or generate an image for it, as the task head decides; the prompt is encoded once.

        Returns a str or a Generation. Raises ValueError for bad input, and for a checkpoint without the head.
        """
        if not isinstance(prompt, str):
            raise ValueError(f"got {prompt!r:.80} for a prompt: expected a text; respond takes one at a time")
        _, (input_images,) = parse_requests(prompt, images)
        options = self._image_options(1, size=size, seed=seed, steps=steps, guidance=guidance, progress=progress)
        text_sampling = resolve_sampling(text_sampling)
        (output,) = self.encode_prompts([self.processor.prompt_parts(prompt, input_images)])
        answer_logit, image_logit = self.route_logits(output).tolist()
        if answer_logit < image_logit:
            return Generation(self.generate_images([output], [prompt], [input_images], options))
        return self._answer(output, text_sampling, options.seeds)

    def _answer(self, output: MLLMOutput, text_sampling: TextSampling, seeds: Sequence[int]) -> str:
        """The MLLM's answer after a prompt that it has encoded."""
        sampling = text_sampling.with_default_max_tokens(self.config.max_answer_tokens)
        session = self.mllm.decode_session([output.cache], sampling.token_limit)
        end = self.mllm.config.special_tokens.eos_ids
        steps = decode_text(session, [output.last_id], end=end, sampling=sampling, seeds=seeds)
        return TextStream(steps, self.mllm.processor.text_tokenizer.decode, 1, sampling.stop).texts()[0]

    # ---- understanding

    @property
    def chat_mllm(self) -> QwenVL:
        """The MLLM."""
        return self.mllm
