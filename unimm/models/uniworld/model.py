"""UniWorld-V1: what a frozen reader makes of a prompt, and what SigLIP2 sees in its pictures, told to FLUX.

Lin et al. 2025, arXiv 2506.03147. Released code and weights: github.com/PKU-YuanGroup/UniWorld-V1. The reader's last
hidden states of all of a prompt's tokens are projected to the painter's width; each picture's features stand between
its cells and the marker behind it. docs/originals/uniworld.md. Time 0 is data, 1 is noise.

Axes: B samples, n rows of a sample, m tokens of what the painter is told, D the reader's width, C channels, h w latents.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from typing_extensions import Self

from unimm.checkpoint import hub
from unimm.checkpoint.keymap import KeyMap
from unimm.checkpoint.load import HUB_WEIGHT_FILES, parse_dtype
from unimm.denoisers.flux import flux_position_ids
from unimm.denoisers.mmdit import PATCH_SIZE, modulation_per_step, patchify_latents, unpatchify_latents
from unimm.generation.decode import TextStream, decode_text
from unimm.generation.flow import dynamic_shift, euler, flow_timesteps
from unimm.generation.kv_cache import EMPTY_CACHE, KVCache
from unimm.generation.prefill import plan_prefill
from unimm.generation.text_sampling import TextSampling
from unimm.models.base import Generation
from unimm.models.common.mllm_conditioned import MLLMConditionedModel
from unimm.models.uniworld import RELEASES
from unimm.models.uniworld.auxiliary_encoders import FLUX_HUB_ID, SIGLIP_HUB_ID, require_part
from unimm.models.uniworld.config import FLUX_FOLDERS, SIGLIP_FOLDER, TASK_HEAD_FILES, UniWorldConfig
from unimm.models.uniworld.network import UniWorldNetwork, pad_conditions
from unimm.models.uniworld.processor import (
    MAX_IMAGE_SIDE,
    ReferenceLatents,
    UniWorldImageOptions,
    UniWorldProcessor,
    nearest_aspect_size,
)
from unimm.models.uniworld.weights import uniworld_key_map
from unimm.processing.images.io import load_image, tensor_to_pil
from unimm.processing.requests import ImageInput, check_size, parse_images, parse_requests
from unimm.sequence.parts import Part
from unimm.tokenizers.text import load_tokenizer
from unimm.vlms.base import EXPERT
from unimm.vlms.qwen2_5_vl.model import QwenVL
from unimm.vlms.qwen2_5_vl.processor import IMAGE_PAD

ASSISTANT = "assistant"  # the head that decides looks at the last token that says so


@dataclass(frozen=True)
class MLLMOutput:
    """What the reader made of a sample: states after its final norm [n, D], and how to go on behind it."""

    parts: Sequence[Part]
    hidden_states: Tensor
    cache: KVCache  # of all rows but the last
    last_id: int  # the last row's id


class UniWorld(UniWorldNetwork, MLLMConditionedModel):
    """The network with its verbs."""

    RELEASES = RELEASES
    KEEP_FLOAT32 = ("auxiliary.vae.", "task_head.")

    def __init__(self, config: UniWorldConfig):
        super().__init__(config)
        self.tokenizer = None

    # ---- files

    @classmethod
    def _build(cls, folder: Path) -> Self:
        """The model of a folder's config files, with its reader's tokenizer, without weights and without parts."""
        model = cls(UniWorldConfig.from_folder(folder))
        model.mllm.tokenizer = load_tokenizer(folder)
        return model

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: str | torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        siglip: str | Path | None = None,
        flux: str | Path | None = None,
        t5: bool = True,
    ) -> Self:
        """As every family's; siglip, flux: folders or hub ids of SigLIP2, and of FLUX.1-dev for VAE, CLIP and T5.

        Unless given, these parts lie below the checkpoint's folder, or are absent; those of a hub id come from the
        repositories that the original names (FLUX.1-dev's non-commercial licence has to be accepted first). t5: whether
        T5, more than half as large as the reader, is loaded where it is.
        """
        model = super().from_pretrained(name, dtype=dtype, device=device, revision=revision)
        folder = hub.resolve(name, revision=revision)
        if not Path(name).expanduser().is_dir() and str(name) not in hub.bundled_names():  # a hub id
            siglip, flux = siglip or SIGLIP_HUB_ID, flux or FLUX_HUB_ID
        wanted = tuple(part for part in FLUX_FOLDERS if t5 or not part.endswith("_2"))
        around = folder if flux is None else hub.resolve(flux, subfolders=wanted)
        homes = {part: around / part for part in wanted}
        homes[SIGLIP_FOLDER] = folder / SIGLIP_FOLDER if siglip is None else hub.resolve(siglip)
        homes |= {
            part: hub.resolve(at)
            for part, at in model.config.part_sources.items()
            if part in homes and not homes[part].is_dir()
        }
        homes = {part: at for part, at in homes.items() if at.is_dir()}
        model.auxiliary.load(homes, dtype=parse_dtype(dtype), device=device)
        model.auxiliary.check_widths(model.config)
        return model.eval()

    def key_maps(self) -> dict[tuple[str, ...], KeyMap]:
        """The key table of each file of weights that there is a part for."""
        tables: dict[tuple[str, ...], KeyMap] = {HUB_WEIGHT_FILES: uniworld_key_map(self.config)}
        if self.task_head is not None:
            tables[TASK_HEAD_FILES] = {"0.{}": "task_head.fc1.{}", "3.{}": "task_head.fc2.{}"}
        return tables | self.auxiliary.key_maps("auxiliary.")

    def save_config(self, folder: Path) -> None:
        """Write config.json and preprocessor_config.json, those of the parts below, and all tokenizers."""
        for name, contents in (self.config.to_json() | self.auxiliary.to_json()).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(contents, indent=2) + "\n")
        for name, tokenizer in ({".": self.mllm.tokenizer} | self.auxiliary.tokenizers()).items():
            if tokenizer is not None:
                (folder / name).mkdir(exist_ok=True)
                tokenizer.save(folder / name)

    # ---- reading

    @property
    def processor(self) -> UniWorldProcessor:
        """How this model's prompts are made."""
        return UniWorldProcessor(
            mllm_processor=self.mllm.processor,
            system_prompt=self.config.system_prompt,
            images_first=self.config.images_first,
        )

    @torch.no_grad()
    def encode_prompts(
        self, samples: Sequence[Sequence[Part]], *, image_embeds_shortcut: float = 0.0
    ) -> list[MLLMOutput]:
        """The reader's one pass over samples that `prompts` made, all in one pack.

        residual: how much of a picture's cells is what the tower gave for them, in place of the reader's state.
        """
        mllm, lengths = self.mllm, [sum(item.segment.length for item in items) for items in samples]
        plan = plan_prefill(mllm.decoder, [EMPTY_CACHE] * len(samples), samples)
        batch, buffer = plan.batch, plan.buffer
        x, rows = mllm.embed(batch), torch.arange(sum(lengths), device=self.device)
        hidden = mllm.decoder(x, mllm.position_ids(batch), {EXPERT: rows}, plan.attend)[EXPERT]
        states = mllm.decoder.norms[EXPERT](hidden)
        if image_embeds_shortcut and batch.und_images:
            image_rows = batch.und_images.rows
            states = states.index_copy(
                0, image_rows, torch.lerp(states[image_rows], x[image_rows], image_embeds_shortcut)
            )
        return [
            MLLMOutput(
                items,
                some,
                EMPTY_CACHE.appended(buffer.copy_new_rows(i, n - 1), batch.layout.next_positions[i] - 1),
                int(items[-1].ids[-1]),
            )
            for i, (items, some, n) in enumerate(zip(samples, states.split(lengths), lengths, strict=True))
        ]

    def route_logits(self, output: MLLMOutput) -> Tensor:
        """The logits [2] of answering and of drawing; it draws where the second is larger. Raises ValueError without a head."""
        head = require_part(self.task_head, "head that decides", "a folder with task_head_final.pt or .safetensors")
        return head(self.task_head_state([output.parts], [output.hidden_states])[0].to(next(head.parameters()).dtype))

    def task_head_state(self, samples: Sequence[Sequence[Part]], hidden_states: Sequence[Tensor]) -> Tensor:
        """The state of the last word that says whose turn it is, of each sample [B, D]: what the head decides by."""
        ids = self.mllm.processor.text_tokenizer.encode(ASSISTANT)
        if len(ids) != 1:
            raise ValueError(f"the tokenizer makes {len(ids)} ids of {ASSISTANT!r}: expected one, where the head looks")
        from_end = [items[-1].ids.tolist()[::-1].index(ids[0]) + 1 for items in samples]
        return torch.stack([some[-n] for some, n in zip(hidden_states, from_end, strict=True)])

    # ---- drawing

    @torch.inference_mode()
    def denoise(
        self,
        conditions: Sequence[Tensor],
        noises: Tensor,
        *,
        pooled: Tensor,
        guidance: float | Tensor,
        timesteps: Tensor,
        true_cfg_scale: Tensor | None = None,
        reference_latents: Tensor | None = None,
        progress: bool = False,
    ) -> Tensor:
        """From noise [B, C, h, w] to latents, at times [steps + 1]. references [B, C, r h, w]: pictures below the one drawn.

        text_guidance [B]: how far away from a picture of which nothing is told; 1, or None, is no such guidance. What
        depends on the time alone is computed for all steps before the first.
        """
        guided = true_cfg_scale is not None and bool((true_cfg_scale != 1).any())
        if guided:
            empty = [conditions[0][:0]] * len(conditions)
            conditions, pooled = [*conditions, *empty], torch.cat((pooled, pooled))
            guidance = guidance.repeat(2) if isinstance(guidance, Tensor) and guidance.ndim else guidance
        h, w = noises.shape[2:]
        text, seen = pad_conditions([one.to(self.dtype) for one in conditions])
        reference_tokens = (
            None if reference_latents is None else patchify_latents(reference_latents.to(self.device, self.dtype))
        )
        rows = h // PATCH_SIZE * (1 if reference_latents is None else 1 + reference_latents.shape[2] // h)
        condition = self.denoiser.condition(
            text, flux_position_ids(rows, w // PATCH_SIZE).to(self.device), key_padding_mask=seen
        )
        scale = guidance if self.config.denoiser.guidance_embeds else None
        steps = self.denoiser.modulations(timesteps[:-1].to(self.device), pooled.to(self.dtype), guidance=scale)
        inner, n = modulation_per_step(self.denoiser, condition, steps), h * w // PATCH_SIZE**2

        def velocity(x: Tensor, timesteps: Tensor) -> Tensor:
            # a reference is the same at every step, and nothing asks how it would move
            tokens = (
                x.to(self.dtype) if reference_tokens is None else torch.cat((x.to(self.dtype), reference_tokens), 1)
            )
            if true_cfg_scale is None or not guided:
                return inner(tokens, timesteps)[:, :n].float()
            v, plain = inner(torch.cat((tokens, tokens)), timesteps)[:, :n].float().chunk(2)
            return torch.lerp(plain, v, true_cfg_scale[:, None, None])

        return unpatchify_latents(
            euler(velocity, patchify_latents(noises.to(self.device)), timesteps, progress=progress), height=h, width=w
        )

    def sampling_timesteps(self, size: tuple[int, int], steps: int, *, n_references: int = 0) -> Tensor:
        """FLUX's times for a picture of (height, width), and references of its size."""
        tokens = size[0] * size[1] // self.token_pixels**2
        return flow_timesteps(steps, dynamic_shift(tokens * (1 + n_references)))

    def initial_noise(self, size: tuple[int, int], seed: int) -> Tensor:
        """What a picture of (height, width) begins from [C, h, w]."""
        height, width = (side * PATCH_SIZE // self.token_pixels for side in size)
        shape = self.config.latent_channels, height, width
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")

    @property
    def token_pixels(self) -> int:
        """Pixels of a token, a side."""
        return PATCH_SIZE * self.auxiliary.required_vae.config.stride

    def output_size(self, images: Sequence[Image.Image]) -> tuple[int, int]:
        """(height, width) of what is drawn from pictures: the ratio nearest to that of their mean height and width."""
        height, width = sum(one.height for one in images), sum(one.width for one in images)
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
        """Pictures for each reading, told with its pictures and captioned with its prompt; as many a reading as `how` says."""
        flat_images = [picture for some in images for picture in some]
        siglip_features = self.auxiliary.encode_siglip(flat_images) if flat_images else None
        conditions = self.condition(
            [one.parts for one in outputs], [one.hidden_states for one in outputs], siglip_features
        )
        texts = [prompt.replace(IMAGE_PAD, "") for prompt in prompts]
        with_t5 = self.auxiliary.t5 is not None if options.t5 is None else options.t5
        if with_t5:
            captions = self.auxiliary.encode_t5(texts, self.config.t5_tokens)
            conditions = [torch.cat((one, caption)) for one, caption in zip(conditions, captions, strict=True)]
        # the original, too, gives CLIP no text where T5 has none
        pooled = self.clip_embedding(texts if with_t5 else [""] * len(texts), clip=options.clip)
        n = len(options.sizes) // len(outputs)
        references: dict[int, Tensor] = {}
        sizes = [
            check_size(options.sizes[n * i] or self.output_size(some), self.token_pixels, MAX_IMAGE_SIDE)
            for i, some in enumerate(images)
        ]
        for i, some in enumerate(images):
            if options.reference_latents and some:
                latents = self.auxiliary.encode_vae(some, sizes[i])
                if options.reference_latents == "tokens":
                    references |= {n * i + copy: rearrange(latents, "k c h w -> c (k h) w") for copy in range(n)}
                else:
                    conditions[i] = torch.cat((conditions[i], self.reference_condition(latents)))
        rows = [i for i in range(len(conditions)) for _ in range(n)]
        return self.denoise_batch(
            [conditions[i] for i in rows], pooled[rows], [sizes[i] for i in rows], references, options
        )

    def denoise_batch(
        self,
        conditions: Sequence[Tensor],
        pooled: Tensor,
        sizes: Sequence[tuple[int, int]],
        references: Mapping[int, Tensor],
        options: UniWorldImageOptions,
    ) -> list[Image.Image]:
        """Pictures of one size, and of as many references, are painted as one batch; below [C, k h, w]: references."""
        groups: dict[tuple, list[int]] = {}
        for i, size in enumerate(sizes):
            groups.setdefault((size, references[i].shape[1] if i in references else 0), []).append(i)
        images: dict[int, Image.Image] = {}

        def scales(of: Sequence[float], rows: Sequence[int]) -> Tensor:
            return torch.tensor([of[i] for i in rows], dtype=torch.float32, device=self.device)

        for (size, reference_rows), rows in groups.items():
            noises = torch.stack([self.initial_noise(size, options.seeds[i]) for i in rows])
            latents = self.denoise(
                [conditions[i] for i in rows],
                noises,
                pooled=pooled[rows],
                guidance=scales(options.guidance_scales, rows),
                true_cfg_scale=scales(options.true_cfg_scales, rows),
                timesteps=self.sampling_timesteps(size, options.steps, n_references=reference_rows // noises.shape[2]),
                reference_latents=torch.stack([references[i] for i in rows]) if reference_rows else None,
                progress=options.progress,
            )
            images |= {
                i: tensor_to_pil(self.auxiliary.decode(one[None])[0]) for i, one in zip(rows, latents, strict=True)
            }
        return [images[i] for i in range(len(sizes))]

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        images: ImageInput | Sequence | None = None,
        think: bool = False,
        size: tuple[int, int] | None = None,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        n: int = 1,
        guidance: float | Sequence[float] | None = None,
        true_cfg_scale: float | Sequence[float] | None = None,
        t5: bool | None = None,
        clip: bool | None = None,
        reference_latents: ReferenceLatents | None = None,
        image_embeds_shortcut: float = 0.0,
        progress: bool = False,
    ) -> Generation:
        """Draw `n` pictures for each prompt, in the order of the prompts, or edit the images given with it.

        prompt: one text or a batch. images: for one prompt a picture or several, for a batch one of these each; they are
        read behind the text, or where it says <|image_pad|>. size: (height, width), unless given the nearest ratio to the
        images'. seed: one, or one a prompt; from one number, that number and the ones after it, picture by picture.
        guidance: what FLUX embeds; text_guidance: classifier-free, away from nothing told, 1 is none; one, or one a prompt.
        t5, clip: whether they are told the prompt, too; unless given,
        where they are. references: whether the painter sees the images' latents, too: as "tokens" beside the picture, or
        among what it is told, the "condition". residual: how much of what is read of the images is what the reader's tower
        gave. A picture does not depend on what else is in the batch. Raises ValueError for bad input, NotImplementedError
        for `think`.
        """
        if think:
            raise NotImplementedError("UniWorld does not think before it draws: Bagel does")
        prompts, given_images = parse_requests(prompt, images)
        input_images = [[load_image(picture) for picture in some] for some in given_images]
        if not 0 <= image_embeds_shortcut <= 1:
            raise ValueError(f"got residual {image_embeds_shortcut}: expected 0 to 1")
        config, n_prompts = self.config, len(prompts)
        number, reference_latents = (
            config.steps if steps is None else steps,
            reference_latents or config.reference_latents,
        )
        given = UniWorldImageOptions(
            steps=number, t5=t5, clip=clip, reference_latents=reference_latents, progress=progress
        )
        scales = (
            config.guidance if guidance is None else guidance,
            config.true_cfg_scale if true_cfg_scale is None else true_cfg_scale,
        )
        options = given.for_prompts(
            n_prompts, n, stride=self.token_pixels, size=size, seed=seed, guidance=scales[0], true_cfg_scale=scales[1]
        )
        samples = [self.processor.prompt_parts(words, some) for words, some in zip(prompts, input_images, strict=True)]
        outputs = self.encode_prompts(samples, image_embeds_shortcut=image_embeds_shortcut)
        return Generation(self.generate_images(outputs, prompts, input_images, options))

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
        """Answer a prompt, or draw it, as the head decides that read it: a str or a Generation. The prompt is read once.

        Raises ValueError for bad input, and for a checkpoint without the head.
        """
        (some,) = parse_images(images, prompt)
        input_images = [load_image(picture) for picture in some]
        config = self.config
        given = UniWorldImageOptions(
            steps=config.steps if steps is None else steps,
            reference_latents=config.reference_latents,
            progress=progress,
        )
        scales = {
            "guidance": config.guidance if guidance is None else guidance,
            "true_cfg_scale": config.true_cfg_scale,
        }
        options = given.for_prompts(1, 1, stride=self.token_pixels, size=size, seed=seed, **scales)
        (output,) = self.encode_prompts([self.processor.prompt_parts(prompt, input_images)])
        answer_logit, draw_logit = self.route_logits(output).tolist()
        if answer_logit < draw_logit:
            return Generation(self.generate_images([output], [prompt], [input_images], options))
        sampling = (text_sampling or TextSampling()).with_default_max_tokens(self.config.max_answer_tokens)
        end, words = self.mllm.config.markers.eos_ids, self.mllm.processor.text_tokenizer
        session = self.mllm.decode_session([output.cache], sampling.token_limit)
        steps_of = decode_text(session, [output.last_id], end=end, sampling=sampling, seeds=options.seeds)
        return TextStream(steps_of, words.decode, 1, sampling.stop).texts()[0]

    # ---- speaking

    @property
    def chat_mllm(self) -> QwenVL:
        """The reader."""
        return self.mllm
