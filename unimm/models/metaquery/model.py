"""MetaQuery: learned queries ask a frozen reader what to draw; a connector hands its answer to a diffusion transformer.

Pan et al. 2025, arXiv 2504.06256. Released code: github.com/facebookresearch/metaquery; no weights were released. The
queries are further rows of the reader's table of embeddings, read causally behind the prompt; the reader's last hidden
states at their places become the caption of a Sana. docs/originals/metaquery.md. Time 0 is data.

Axes: R rows of a batch to be read, N queries, D the reader's width, B pictures, C channels, h w grid of latents.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import Self

from unimm.checkpoint import hub
from unimm.checkpoint.keymap import KeyMap
from unimm.checkpoint.load import HUB_WEIGHT_FILES, CheckpointError, load_weights, read_shapes, weight_files
from unimm.denoisers.sana import SanaCondition
from unimm.generation.flow import Velocity, dpm_solver_pp, dpm_timesteps, with_integer_timesteps
from unimm.generation.kv_cache import EMPTY_CACHE
from unimm.generation.prefill import plan_prefill
from unimm.models.base import Generation
from unimm.models.common.mllm_conditioned import MLLMConditionedModel
from unimm.models.metaquery import RELEASES
from unimm.models.metaquery.config import MetaQueryConfig, part_folder
from unimm.models.metaquery.network import MetaQueryNetwork, NoLanguageHead
from unimm.models.metaquery.processor import N_BOUNDARY_TOKENS, ConditionBatch, MetaQueryProcessor, prompt_composer
from unimm.models.metaquery.weights import metaquery_key_map, read_folder_shapes
from unimm.processing.images.io import load_image, tensor_to_pil
from unimm.processing.requests import ImageInput, broadcast, check_size, expand_seeds, parse_requests
from unimm.sequence.parts import Part, text_part
from unimm.tokenizers.text import load_tokenizer
from unimm.vlms.base import VisionLanguageModel

MAX_IMAGE_SIDE = 4096  # pixels a side of what is drawn


class MetaQuery(MetaQueryNetwork, MLLMConditionedModel):
    """The network with its verbs."""

    RELEASES = RELEASES

    def __init__(self, config: MetaQueryConfig):
        super().__init__(config)
        self.tokenizer = None
        self.mllm_source: str | Path = config.part_ids["mllm_id"]
        self._chat_mllm: tuple[VisionLanguageModel, ...] = ()

    # ---- files

    @classmethod
    def _build(cls, folder: Path) -> Self:
        """The model of a folder's config files, with its reader's tokenizer, without weights.

        Raises CheckpointError where the folder's weights are for another number of queries.
        """
        model = cls(MetaQueryConfig.from_folder(folder))
        name = model.config.part_ids["mllm_id"]
        model.mllm.tokenizer = load_tokenizer(part_folder(folder, name), special_tokens=model.mllm.SPECIAL_TOKENS)
        mllm_folder = part_folder(folder, name)
        model.mllm_source = mllm_folder if any((mllm_folder / one).exists() for one in HUB_WEIGHT_FILES) else name
        model.match_checkpoint(read_folder_shapes(folder))
        return model

    def match_checkpoint(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Leave out the language head where files of these shapes hold none. Raises CheckpointError for other queries."""
        embedding_key = self.mllm_spec.embedding_key(self.config.mllm)
        rows = shapes.get(embedding_key, (self.config.embedding_rows,))[0]
        if rows != self.config.embedding_rows:
            vocab, n = self.config.mllm.decoder.vocab_size, self.config.n_queries
            raise CheckpointError(
                f"{embedding_key} has {rows} rows, for {rows - vocab - N_BOUNDARY_TOKENS} queries behind {vocab} ids and {N_BOUNDARY_TOKENS} markers; "
                f"config.json says num_metaqueries {n}, {self.config.embedding_rows} rows: correct it, or fetch the files that go together"
            )
        head_key = self.mllm_spec.head_prefix(self.config.mllm) + "weight"
        if shapes and head_key not in shapes and not self.config.mllm.decoder.tie_word_embeddings:
            self.mllm.decoder.head = NoLanguageHead()  # type: ignore[assignment]

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: str | torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        mllm: str | Path | None = None,
    ) -> Self:
        """As every family's; reader: the folder or hub id of the reader's own release, which then answers in `understand`.

        The original's training shrinks the old rows of the reader's table, which decay though they have no gradient, and
        its files hold no language head. Unless given, the reader's release is fetched when a lost head is needed.
        """
        model = super().from_pretrained(name, dtype=dtype, device=device, revision=revision)
        if mllm is not None:
            model.mllm_source = mllm
            model._chat_mllm = (model._load_chat_mllm(),)
        return model

    def key_maps(self) -> dict[tuple[str, ...], KeyMap]:
        """The key table of the one file of weights."""
        with_head = not self.config.mllm.decoder.tie_word_embeddings and not isinstance(
            self.mllm.decoder.head, NoLanguageHead
        )
        return {HUB_WEIGHT_FILES: metaquery_key_map(self.config, self.mllm_spec, with_head=with_head)}

    def save_config(self, folder: Path) -> None:
        """Write config.json, and below the folder the configs of the parts, and the reader's tokenizer."""
        for name, contents in self.config.to_json().items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(contents, indent=2) + "\n")
        if self.mllm.tokenizer is not None:
            self.mllm.tokenizer.save(part_folder(folder, self.config.part_ids["mllm_id"]))

    # ---- reading

    @property
    def processor(self) -> MetaQueryProcessor:
        """How this model's prompts are made."""
        config, reader = self.config, cast("Any", self.mllm.processor)
        if self.mllm_spec.limits_pixels:
            pixels = replace(reader.pixels, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
            reader = replace(reader, pixels=pixels)
        return MetaQueryProcessor(
            prompt_composer(reader), self.mllm_spec.chat_format, config.system_prompt, config.n_queries, config.mllm.decoder.vocab_size,
            config.mllm.special_tokens.im_end, config.max_text_tokens,
        )  # fmt: skip

    @torch.inference_mode()
    def query_states(self, samples: Sequence[Sequence[Part]]) -> Tensor:
        """The reader's answers [R, N, D] to samples that `prompts` made; what all begin with is read once."""
        processor = self.processor
        (system_cache,) = self.mllm.prefill([EMPTY_CACHE], [[text_part(processor.system_ids)]])
        rest = [processor.without_system(sample) for sample in samples]
        plan = plan_prefill(self.decoder, [system_cache] * len(rest), rest)
        return self.query_hidden_states(plan.batch, plan.attend)

    # ---- drawing

    def guided_velocity(self, condition: SanaCondition, branches: Sequence[Sequence[tuple[int, float]]]) -> Velocity:
        """The velocity of latents [B, C, h, w] under each picture's rows of the condition, and their weights."""
        owners = torch.tensor([i for i, some in enumerate(branches) for _ in some], device=self.device)
        flat_weights = [w for some in branches for _, w in some]
        weights = torch.tensor(flat_weights, dtype=torch.float32, device=self.device)[:, None, None, None]
        branch_condition = condition.select_rows(
            torch.tensor([row for some in branches for row, _ in some], device=self.device)
        )

        def velocity(x: Tensor, timesteps: Tensor) -> Tensor:
            times = timesteps.to(x.device, torch.float32)[owners]
            v = self.denoiser(x[owners].to(self.dtype), times, branch_condition)
            return torch.zeros_like(x).index_add(0, owners, weights * v.float())

        return velocity

    @torch.inference_mode()
    def denoise(self, velocity: Velocity, noises: Tensor, *, steps: int, progress: bool = False) -> Tensor:
        """From noise [B, C, h, w] to latents."""
        scheduler = self.config.scheduler
        timesteps = dpm_timesteps(steps, shift=scheduler.timestep_shift, train_steps=scheduler.n_train_timesteps)
        quantized = with_integer_timesteps(velocity, train_steps=scheduler.n_train_timesteps)
        return dpm_solver_pp(quantized, noises.to(self.device), timesteps, progress=progress)

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
        image_guidance: float | Sequence[float] | None = None,
        negative_prompt: str | Sequence[str] = "",
        progress: bool = False,
    ) -> Generation:
        """Draw `n` pictures for each prompt, in the order of the prompts, or from the images given with it.

        prompt: one text or a batch; with images it may be empty, which asks for the picture again. images: for one
        prompt a picture or several, for a batch one of these each. size: (height, width) of what is drawn. seed: one, or
        one a prompt; from one number, that number and the ones after it, picture by picture. steps: of the sampler.
        guidance, image_guidance: 1 is none; one, or one a prompt. negative: what guidance leads away from. A picture does
        not depend on what else is in the batch. Raises ValueError for bad input, NotImplementedError for `think`.
        """
        if think:
            raise NotImplementedError("MetaQuery does not think before it draws: Bagel does")
        prompts, given_images = parse_requests(prompt, images)
        input_images = [[load_image(picture) for picture in some] for some in given_images]
        config, n_prompts = self.config, len(prompts)
        scales = broadcast(config.guidance if guidance is None else guidance, n_prompts, "guidances")
        image_scales = broadcast(
            config.image_guidance if image_guidance is None else image_guidance, n_prompts, "image guidances"
        )
        if n < 1 or not all(w >= 0 for w in (*scales, *image_scales)):
            raise ValueError(
                f"got n {n}, guidance {guidance}, {image_guidance}: expected a picture, and scales of 0 or more"
            )
        if any(not (words.strip() or some) for words, some in zip(prompts, input_images, strict=True)):
            raise ValueError("got an empty prompt: expected at least a word, or a picture to draw from")
        height, width = check_size(
            config.image_size if size is None else size, config.vae.stride * config.denoiser.patch_size, MAX_IMAGE_SIDE
        )
        image_seeds = expand_seeds(seed, n_prompts, n_images=n)
        batch = ConditionBatch(self.processor)
        rows = zip(
            prompts,
            input_images,
            broadcast(negative_prompt, n_prompts, "negative prompts"),
            scales,
            image_scales,
            strict=True,
        )
        branches = [
            batch.guidance_branches(a, b, negative_prompt=c, guidance=float(d), image_guidance=float(e))
            for a, b, c, d, e in rows
        ]
        shape = config.denoiser.in_channels, height // config.vae.stride, width // config.vae.stride
        with torch.inference_mode():
            condition = self.condition(self.query_states(batch.samples))
        latents = self.denoise(
            self.guided_velocity(condition, [some for some in branches for _ in range(n)]),
            torch.stack([initial_noise(shape, s) for s in image_seeds]),
            steps=config.steps if steps is None else steps,
            progress=progress,
        )
        return Generation([tensor_to_pil(self.decode_latents(one[None])[0]) for one in latents])

    # ---- speaking

    @property
    def chat_mllm(self) -> VisionLanguageModel:
        """The frozen reader, as it was before it was asked to draw. Raises ValueError where a lost head cannot be had."""
        if not self._chat_mllm and not isinstance(self.decoder.head, NoLanguageHead):
            return self.mllm
        if not self._chat_mllm:
            self._chat_mllm = (self._load_chat_mllm(),)
        return self._chat_mllm[0].to(self.device, self.dtype)

    def _load_chat_mllm(self) -> VisionLanguageModel:
        """This model's blocks and tower with the table and the head of the reader's own release."""
        try:
            paths = weight_files(hub.resolve(self.mllm_source), HUB_WEIGHT_FILES)
        except ValueError as error:
            raise ValueError(
                f"MetaQuery's files hold no language head, and {self.mllm_source} has none to give ({error}): give "
                "from_pretrained the folder or hub id of the reader's own release, `reader`"
            ) from error
        with torch.device("meta"):
            model = self.mllm_spec.model_class(self.config.mllm)
        for name, part in self.mllm.named_children():
            if name != "decoder":
                setattr(model, name, part)
        for name, parameter in self.mllm.named_parameters(recurse=False):
            setattr(model, name, parameter)
        model.tokenizer = self.mllm.tokenizer
        model.decoder.blocks, model.decoder.norms = self.decoder.blocks, self.decoder.norms
        own_parameters = ("decoder.embed.", "decoder.head.")
        key_map = {
            theirs: ours
            for theirs, ours in model.key_map(read_shapes(paths)).items()
            if (ours or "").startswith(own_parameters)
        }
        load_weights(model, paths, {**key_map, "{*}": None}, dtype=self.dtype, device=self.device)
        return model.eval()


def initial_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """What a picture begins from, drawn on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")
