"""MetaQuery: the network with its files and verbs.

Pan et al. 2025, arXiv 2504.06256. Released code: github.com/facebookresearch/metaquery; no weights were released.
docs/originals/metaquery.md.

Axes: R prompts, N queries, D model (the MLLM's), P images, C latent channels, h w latent grid.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import Self

from unimm.checkpoint import hub
from unimm.checkpoint.json_files import write_json
from unimm.checkpoint.keymap import Ignore, KeyMap, Rename
from unimm.checkpoint.load import (
    HUB_WEIGHT_FILES,
    CheckpointError,
    keep_weights_open,
    load_weights,
    read_folder_shapes,
    read_shapes,
    weight_files,
)
from unimm.denoisers.sana import SanaCondition
from unimm.generation.flow import DPMSolverPP, dpm_timesteps, floor_timesteps, parse_steps, timestep_pairs
from unimm.generation.kv_cache import EMPTY_CACHE
from unimm.generation.noise import gaussian_noise, seeded_generators
from unimm.generation.numbers import parse_flag
from unimm.generation.prefill import plan_prefill
from unimm.generation.step_cache import StepCacheOptions, parse_step_cache, row_step_cache
from unimm.generation.step_graphs import StepGraphs
from unimm.generation.stepwise import ModelRequest, RequestRun
from unimm.models.base import ComponentModel, Generation
from unimm.models.common.mllm_conditioned import MLLMConditionedModel
from unimm.models.common.separate_outputs import separate_run
from unimm.models.metaquery import FILES, RELEASES
from unimm.models.metaquery.benchmarks import BENCHMARK_OPTIONS
from unimm.models.metaquery.config import MetaQueryConfig, part_folder
from unimm.models.metaquery.latent_denoiser import MetaQueryLatentDenoiser
from unimm.models.metaquery.network import GuidanceBranches, MetaQueryNetwork, NoLanguageHead
from unimm.models.metaquery.parallel import LORA_TARGETS, PARALLEL_PLAN, TENSOR_PARALLEL_PLAN
from unimm.models.metaquery.processor import N_BOUNDARY_TOKENS, ConditionBatch, MetaQueryProcessor, prompt_composer
from unimm.models.metaquery.stepwise import MetaQueryImageAnswer
from unimm.models.metaquery.weights import metaquery_key_map
from unimm.models.release import Components
from unimm.processing.images.io import tensor_to_pil
from unimm.processing.requests import (
    ImageInput,
    check_size,
    expand_seeds,
    parse_n_images,
    parse_negative_prompts,
    parse_requests,
    parse_scales,
)
from unimm.sequence.parts import Part, text_part
from unimm.tokenizers.text import load_tokenizer
from unimm.vlms.base import VisionLanguageModel

MAX_IMAGE_SIDE = 4096  # pixels a side of a generated image


class MetaQuery(MetaQueryNetwork, MLLMConditionedModel, ComponentModel):
    """Learned queries of a frozen MLLM condition a Sana: generates images, and answers as the MLLM does."""

    RELEASES = RELEASES
    LORA_TARGETS = LORA_TARGETS
    QUANTIZED = ("mllm.decoder.blocks", "denoiser.blocks")
    COMPILED = ("denoiser.blocks.{}", "connector.blocks.{}", "vae.decoder")
    UNPACKED = ("mllm.vision", "connector", "denoiser", "vae")
    PARALLEL_PLAN = PARALLEL_PLAN
    TENSOR_PARALLEL_PLAN = TENSOR_PARALLEL_PLAN
    FILES = FILES
    COMPONENTS = ("mllm",)
    BENCHMARK_OPTIONS = BENCHMARK_OPTIONS

    def __init__(self, config: MetaQueryConfig):
        super().__init__(config)
        self.tokenizer = None
        self.mllm_source: str | Path = config.part_ids["mllm_id"]
        self._chat_mllm: tuple[VisionLanguageModel, ...] = ()

    # ---- files

    @classmethod
    def _build(cls, folder: Path) -> Self:
        """The model of a folder's config files, with the MLLM's tokenizer, without weights.

        Raises CheckpointError where the folder's weights are for another number of queries.
        """
        model = cls(MetaQueryConfig.from_folder(folder))
        mllm_id = model.config.part_ids["mllm_id"]
        mllm_folder = part_folder(folder, mllm_id)
        model.mllm.tokenizer = load_tokenizer(
            mllm_folder,
            special_tokens=model.mllm.SPECIAL_TOKENS,
            # the rows behind these are the boundary tokens' and the queries'
            vocab_size=model.config.mllm.decoder.vocab_size,
        )
        if any((mllm_folder / name).exists() for name in HUB_WEIGHT_FILES):
            model.mllm_source = mllm_folder
        model.match_checkpoint(read_folder_shapes(folder, HUB_WEIGHT_FILES))
        return model

    def match_checkpoint(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Leave out the language head if files of these shapes hold none. Raises CheckpointError for other queries."""
        embedding_key = self.mllm_spec.embedding_key(self.config.mllm)
        expected = (self.config.embedding_rows, self.config.mllm.decoder.dim)
        shape = shapes.get(embedding_key, expected)
        if len(shape) != 2:
            raise CheckpointError(f"{embedding_key} has shape {list(shape)}: expected {list(expected)}; fetch it again")
        rows = shape[0]
        if rows != self.config.embedding_rows:
            vocab = self.config.mllm.decoder.vocab_size
            n = self.config.n_queries
            raise CheckpointError(
                f"{embedding_key} has {rows} rows, for {rows - vocab - N_BOUNDARY_TOKENS} queries behind {vocab} ids "
                f"and {N_BOUNDARY_TOKENS} boundary tokens; config.json says num_metaqueries {n}, "
                f"{self.config.embedding_rows} rows: correct it, or fetch the files that go together"
            )
        head_key = self.mllm_spec.head_prefix(self.config.mllm) + "weight"
        if shapes and head_key not in shapes and not self.config.mllm.decoder.tie_word_embeddings:
            self.mllm.decoder.head = NoLanguageHead()  # type: ignore[assignment]

    def load_components(
        self, components: Components, *, name: str | Path, folder: Path, dtype: torch.dtype, device: torch.device
    ) -> None:
        """components: "mllm", the folder or hub id of the MLLM's own release, which then answers in `understand`.

        The released training shrinks the old rows of the MLLM's table, which decay though they have no gradient, and
        its files hold no language head. Unless given, the MLLM's release is fetched when a missing head is needed.
        """
        if mllm := components.get("mllm"):
            self.mllm_source = mllm
            self._chat_mllm = (self._load_chat_mllm(),)

    def key_maps(self) -> dict[tuple[str, ...], KeyMap]:
        """The key map of the one file of weights."""
        with_head = not self.config.mllm.decoder.tie_word_embeddings and not isinstance(
            self.mllm.decoder.head, NoLanguageHead
        )
        return {HUB_WEIGHT_FILES: metaquery_key_map(self.config, self.mllm_spec, with_head=with_head)}

    def save_config(self, folder: Path) -> None:
        """Write config.json, and into folders below it the parts' configs and the MLLM's tokenizer."""
        for name, contents in self.config.to_json().items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_json(folder / name, contents)
        if self.mllm.tokenizer is not None:
            self.mllm.tokenizer.save(part_folder(folder, self.config.part_ids["mllm_id"]))

    # ---- conditions

    @property
    def processor(self) -> MetaQueryProcessor:
        """Prompts and images to parts that end with the queries."""
        config = self.config
        composer = cast("Any", self.mllm.processor)
        if self.mllm_spec.limits_pixels:
            limits = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
            composer = replace(composer, image_processor=replace(composer.image_processor, **limits))
        return MetaQueryProcessor(
            composer=prompt_composer(composer),
            chat_format=self.mllm_spec.chat_format,
            system_prompt=config.system_prompt,
            n_queries=config.n_queries,
            begin_image_id=config.mllm.decoder.vocab_size,
            end_of_turn_id=config.mllm.special_tokens.im_end,
            max_text_tokens=config.max_text_tokens,
        )

    @torch.inference_mode()
    def query_states(self, samples: Sequence[Sequence[Part]]) -> Tensor:
        """Hidden states at the queries [R, N, D] of samples of `processor`. The system prompt, which all share, runs
        once."""
        processor = self.processor
        (system_cache,) = self.mllm.prefill([EMPTY_CACHE], [[text_part(processor.system_ids)]])
        prompts = [processor.without_system(sample) for sample in samples]
        plan = plan_prefill(self.decoder, [system_cache] * len(prompts), prompts)
        return self.query_hidden_states(plan.batch, plan.attend)

    @torch.inference_mode()
    def query_logits(self, samples: Sequence[Sequence[Part]]) -> Tensor:
        """What the MLLM's language head gives at the queries of samples of `processor` [R, N, V], float32."""
        return self.chat_mllm.decoder.head(self.query_states(samples)).float()

    @torch.inference_mode()
    def encode_conditions(self, samples: Sequence[Sequence[Part]]) -> list[SanaCondition]:
        """The denoiser's condition, of one row, for each of some samples of `processor`."""
        condition = self.condition(self.query_states(samples))
        return [condition.select_rows(torch.tensor([i], device=self.device)) for i in range(len(samples))]

    def start_run(self, request: ModelRequest) -> RequestRun:
        """A request as work that a scheduler may batch with that of others: see `UnifiedModel.start_run`."""
        chat_mllm = self.chat_mllm if "text" in request.outputs else None
        return separate_run(self, chat_mllm, request, partial(MetaQueryImageAnswer, self, request))

    # ---- generation

    def latent_denoiser(
        self,
        condition: SanaCondition,
        branches: Sequence[Sequence[tuple[int, float]]],
        *,
        step_cache: StepCacheOptions | None = None,
    ) -> MetaQueryLatentDenoiser:
        """The state of denoising P images. branches: for each image, rows of the condition with their weights."""
        flat = [(image, row, weight) for image, some in enumerate(branches) for row, weight in some]
        owners, rows, weights = (torch.tensor(column, device=self.device) for column in zip(*flat, strict=True))
        return MetaQueryLatentDenoiser(
            branches=GuidanceBranches(condition.select_rows(rows), owners, weights.float()[:, None, None, None]),
            solver=DPMSolverPP(),
            graphs=StepGraphs(self.denoiser, unless=step_cache is not None),
            step_cache=row_step_cache(step_cache, [(image, str(row)) for image, row, _ in flat]),
        )

    @torch.inference_mode()
    def denoise_step(
        self, denoiser: MetaQueryLatentDenoiser, x: Tensor, timesteps: Tensor, next_timesteps: Tensor
    ) -> Tensor:
        """One step of DPM-Solver++: latents x [P, C, h, w] from timesteps to next_timesteps, [P] float64, one an image
        -> x.

        Images of different progress share the forward; the denoiser's solver remembers the last step of each.
        """
        # the original's scheduler gives the network integer timesteps
        integer = floor_timesteps(timesteps, train_steps=self.config.scheduler.n_train_timesteps)
        times = integer.float().to(x.device)

        def step(x: Tensor, times: Tensor) -> Tensor:
            return self.guided_velocity(x, times, denoiser.branches, step_cache=denoiser.step_cache)

        velocity = denoiser.graphs.run("step", step, x, times)
        return denoiser.solver.step(x, velocity, timesteps, next_timesteps)

    def denoise(
        self, denoiser: MetaQueryLatentDenoiser, noise: Tensor, *, steps: int, progress: bool = False
    ) -> Tensor:
        """Noise [P, C, h, w] to latents in `steps` steps of one schedule."""
        scheduler = self.config.scheduler
        timesteps = dpm_timesteps(steps, shift=scheduler.timestep_shift, train_steps=scheduler.n_train_timesteps)
        x = noise.to(self.device)
        for t, next_t in timestep_pairs(timesteps, len(x), progress=progress):
            x = self.denoise_step(denoiser, x, t, next_t)
        return x

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
        image_guidance: float | Sequence[float] | None = None,
        negative_prompt: str | Sequence[str | None] | None = "",
        step_cache: StepCacheOptions | bool = False,
        progress: bool = False,
    ) -> Generation:
        """Generate `n` images for each prompt, in the order of the prompts, or from the input images given with it.

        prompt: one text or a batch; with images it may be empty, which reproduces the image. images: for one prompt an
        image or several, for a batch one of these each. size: (height, width) in pixels. seed: one, or one a prompt;
        from one number, that number and the ones after it, image by image. steps: of the solver. guidance,
        image_guidance: 1 is none; one, or one a prompt. negative_prompt: what guidance leads away from, "" or None for
        none. step_cache: spare forwards of Sana, by a TaylorSeer (True) or a TeaCache of `unimm.generation.step_cache`.
        But for rounding, an image does not depend on what else is in the batch. Raises ValueError for bad input.
        """
        config = self.config
        prompts, input_images = parse_requests(prompt, images, allow_empty=True)
        if any(not (text.strip() or some) for text, some in zip(prompts, input_images, strict=True)):
            raise ValueError("got an empty prompt: expected at least a word, or an image to generate from")
        n_prompts = len(prompts)
        n = parse_n_images(n)
        progress = parse_flag(progress, "progress")
        cache = parse_step_cache(step_cache)
        steps = parse_steps(config.steps if steps is None else steps)
        scales = parse_scales(config.guidance if guidance is None else guidance, n_prompts, "guidances")
        image_scales = parse_scales(
            config.image_guidance if image_guidance is None else image_guidance, n_prompts, "image guidances"
        )
        negative_prompts = parse_negative_prompts(negative_prompt, n_prompts)
        noise = self._initial_noise(size, expand_seeds(seed, n_prompts, n_images=n))
        batch = ConditionBatch(self.processor)
        branches = [
            batch.guidance_branches(text, some, negative_prompt=negative, guidance=scale, image_guidance=image_scale)
            for text, some, negative, scale, image_scale in zip(
                prompts, input_images, negative_prompts, scales, image_scales, strict=True
            )
        ]
        with torch.inference_mode():
            condition = self.condition(self.query_states(batch.samples))
        denoiser = self.latent_denoiser(condition, [some for some in branches for _ in range(n)], step_cache=cache)
        latents = self.denoise(denoiser, noise, steps=steps, progress=progress)
        return Generation([tensor_to_pil(self.decode_latents(one[None])[0]) for one in latents])

    def _initial_noise(self, size: tuple[int, int] | None, seeds: Sequence[int]) -> Tensor:
        """Noise of each seed, for images of (height, width) in pixels, on the CPU [P, C, h, w]."""
        stride = self.config.vae.stride
        height, width = check_size(
            self.config.image_size if size is None else size, stride * self.config.denoiser.patch_size, MAX_IMAGE_SIDE
        )
        shape = self.config.denoiser.in_channels, height // stride, width // stride
        return torch.stack([gaussian_noise(shape, generator) for generator in seeded_generators(seeds)])

    # ---- understanding

    @property
    def chat_mllm(self) -> VisionLanguageModel:
        """The MLLM with its own embedding table and language head. Raises ValueError where a missing head cannot be
        loaded."""
        if not self._chat_mllm and not isinstance(self.decoder.head, NoLanguageHead):
            return self.mllm
        if not self._chat_mllm:
            self._chat_mllm = (self._load_chat_mllm(),)
        return self._chat_mllm[0].to(self.device, self.dtype)

    @keep_weights_open()
    def _load_chat_mllm(self) -> VisionLanguageModel:
        """This model's blocks and vision encoder with the embedding table and the head of the MLLM's own release."""
        try:
            paths = weight_files(
                hub.resolve(self.mllm_source, non_commercial=self.FILES.non_commercial), HUB_WEIGHT_FILES
            )
        except ValueError as error:
            raise ValueError(
                f"MetaQuery's files hold no language head, and {self.mllm_source} has none to give ({error}): give "
                "from_pretrained the folder or hub id of the MLLM's own release, components={'mllm': ...}"
            ) from error
        with torch.device("meta"):
            model = self.mllm_spec.model_class(self.config.mllm)
        for name, part in self.mllm.named_children():
            if name != "decoder":
                setattr(model, name, part)
        for name, parameter in self.mllm.named_parameters(recurse=False):
            setattr(model, name, parameter)
        model.tokenizer = self.mllm.tokenizer
        model.decoder.blocks = self.decoder.blocks
        model.decoder.norms = self.decoder.norms
        own_parameters = ("decoder.embed.", "decoder.head.")
        key_map = model.key_map(read_shapes(paths)).filtered(
            lambda entry: isinstance(entry, Rename) and entry.ours.startswith(own_parameters)
        )
        key_map += KeyMap(Ignore("{*}", because="the blocks and the vision encoder are this model's own"))
        load_weights(model, paths, key_map, dtype=self.dtype, device=self.device)
        return model.eval()
