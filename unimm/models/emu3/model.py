"""Emu3: images and text as tokens of one vocabulary, predicted from left to right.

Wang et al. 2024, arXiv 2409.18869. Released code: github.com/baaivision/Emu3 at f6ea9aa. docs/originals/emu3.md.

Axes: P images, B branches (with guidance two for an image), D model, C codes, h w the grid of an image.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from tqdm import tqdm

from unimm.checkpoint import hub
from unimm.checkpoint.json_files import read_json, read_preprocessor_json, write_json
from unimm.checkpoint.keymap import KeyMap
from unimm.checkpoint.load import HUB_WEIGHT_FILES, read_folder_shapes
from unimm.checkpoint.valueless import needed_steps
from unimm.generation.decode import DecodeSession
from unimm.generation.image_tokens import ImageTokenSampling, resolve_image_sampling, sample_image_tokens
from unimm.generation.kv_cache import check_fits
from unimm.generation.noise import seeded_generators
from unimm.generation.numbers import parse_flag
from unimm.generation.stepwise import ModelRequest, RequestRun
from unimm.models.base import ComponentModel, Generation, UnifiedModel
from unimm.models.common.cfg_branches import CFGBranches
from unimm.models.common.separate_outputs import separate_run
from unimm.models.emu3 import FILES, RELEASES, VISION_TOKENIZER_FOLDER, VISION_TOKENIZER_HUB
from unimm.models.emu3.config import Emu3Config
from unimm.models.emu3.image_processor import Emu3ImageProcessor
from unimm.models.emu3.network import Emu3Network
from unimm.models.emu3.parallel import LORA_TARGETS, PARALLEL_PLAN, TENSOR_PARALLEL_PLAN
from unimm.models.emu3.processor import Emu3Processor
from unimm.models.emu3.rows import ImageRows, parse_grids
from unimm.models.emu3.stepwise import Emu3ImageAnswer
from unimm.models.emu3.text_tokenizer import Emu3SpecialTokens, load_emu3_tokenizer
from unimm.models.emu3.transformers_layout import (
    CURRENT_NAMES,
    RELEASED_NAMES,
    CheckpointLayout,
    emu3_to_transformers,
    vocabulary_of_ids,
)
from unimm.models.emu3.weights import emu3_transformers_key_map, language_key_map, vision_tokenizer_key_map
from unimm.models.release import Components
from unimm.processing.images.io import tensor_to_pil
from unimm.processing.requests import (
    ImageInput,
    broadcast,
    expand_seeds,
    parse_n_images,
    parse_negative_prompts,
    parse_requests,
    parse_scales,
)
from unimm.sequence.parts import Part
from unimm.tokenizers.emu3_vq import Emu3VQModel
from unimm.tokenizers.text import JsonTokenizer
from unimm.vlms.chat import MLLMChat, split_last_ids

VQ_WEIGHT_FILES = tuple(f"{VISION_TOKENIZER_FOLDER}/{name}" for name in HUB_WEIGHT_FILES)


class Emu3(MLLMChat, Emu3Network, UnifiedModel, ComponentModel):
    """Emu3 with its tokenizers and its verbs: generate, understand, chat."""

    RELEASES = RELEASES
    LORA_TARGETS = LORA_TARGETS
    PARALLEL_PLAN = PARALLEL_PLAN
    TENSOR_PARALLEL_PLAN = TENSOR_PARALLEL_PLAN
    COMPILED = ("vq.decoder",)
    DECODES_IMAGES = "decode_image_tokens"
    FILES = FILES
    COMPONENTS = ("vision_tokenizer",)
    LAYOUTS = get_args(CheckpointLayout)
    KEEP_FLOAT32 = ("vq.",)
    UNPACKED = ("vq",)
    supports_steps = False
    supports_editing = False

    tokenizer: JsonTokenizer | None

    def __init__(self, config: Emu3Config):
        super().__init__(config)
        self.tokenizer = None
        self.chat_config = config.chat
        # of files in transformers' layout: two ages of it have other names
        self.transformers_names = RELEASED_NAMES

    # ---- files

    @classmethod
    def _build(cls, folder: Path) -> "Emu3":
        model = cls(Emu3Config.from_folder(folder))
        if "text_config" in read_json(folder / "config.json"):
            model.checkpoint_layout = "transformers"
            if any(key.startswith(CURRENT_NAMES[0]) for key in read_folder_shapes(folder, HUB_WEIGHT_FILES)):
                model.transformers_names = CURRENT_NAMES
        model.tokenizer = load_emu3_tokenizer(folder, vocab_size=model.config.decoder.vocab_size)
        if model.tokenizer is not None:
            check_special_ids(model.tokenizer, model.config.special_tokens, folder)
        return model

    def load_components(
        self, components: Components, *, name: str | Path, folder: Path, dtype: torch.dtype, device: torch.device
    ) -> None:
        """components: "vision_tokenizer", a folder or hub id in the layout of BAAI/Emu3-VisionTokenizer; None leaves it
        out of a model that is only to read text.

        Unless given, it lies in the checkpoint's file (transformers' layout) or below its folder as vision_tokenizer,
        or is BAAI/Emu3-VisionTokenizer for a hub id. A folder without it loads, and refuses images. It stays in
        float32, but for one in the same file as the language model.
        """
        given = components.get("vision_tokenizer")
        if "vision_tokenizer" in components and given is None:
            self.vq = None
            # what is saved of it then says nothing of one
            self.config = replace(self.config, vision_tokenizer=None)
            return
        if given is None and self.vq is None and not Path(name).expanduser().is_dir():
            given = VISION_TOKENIZER_HUB
        if given is not None:
            self.load_vision_tokenizer(hub.resolve(given), device=device)

    def load_vision_tokenizer(self, folder: Path, *, device: torch.device) -> None:
        """Take a vision tokenizer, and its image processor, from a folder of their own."""
        vq = Emu3VQModel.from_pretrained(folder, device=device)
        image_processor = Emu3ImageProcessor.from_json(read_preprocessor_json(folder))
        self.config = self.config.with_vision_tokenizer(vq.config, image_processor)
        self.vq = vq

    def key_maps(self) -> dict[tuple[str, ...], KeyMap]:
        """The key map of each file of weights, in `checkpoint_layout`."""
        if self.checkpoint_layout == "transformers":
            return {HUB_WEIGHT_FILES: emu3_transformers_key_map(self.vision_tokenizer.config, self.transformers_names)}
        key_maps: dict[tuple[str, ...], KeyMap] = {HUB_WEIGHT_FILES: language_key_map("model.", "lm_head")}
        if self.vq is not None:
            key_maps[VQ_WEIGHT_FILES] = vision_tokenizer_key_map()
        return key_maps

    def save_config(self, folder: Path) -> None:
        """Write the config files of `checkpoint_layout`; in transformers', a tokenizer.json too."""
        files = self.config.to_json()
        if self.checkpoint_layout == "transformers":
            special = self.config.special_tokens
            vocabulary = vocabulary_of_ids(special, self.config.n_codes)
            if self.tokenizer is not None:
                vocabulary = self.tokenizer.backend.get_vocab(with_added_tokens=True)
                self.tokenizer.backend.save(str(folder / "tokenizer.json"))
            files = emu3_to_transformers(files, vision_tokenizer=self.vision_tokenizer.config, vocabulary=vocabulary)
        for name, contents in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_json(folder / name, contents)

    # ---- prompts

    @property
    def processor(self) -> Emu3Processor:
        """Conversations to ids; images are encoded by the vision tokenizer."""
        return Emu3Processor(
            tokenizer=self.tokenizer,
            special_tokens=self.config.special_tokens,
            image_processor=self.config.image_processor,
            chat_config=self.chat_config,
            encode_image=self.encode_image,
        )

    @property
    def eos_ids(self) -> tuple[int]:
        """The id that ends an answer."""
        return (self.config.special_tokens.eos,)

    @property
    def max_answer_tokens(self) -> int:
        """The most new ids of an answer, where a call does not say."""
        return self.chat_config.max_tokens

    @torch.inference_mode()
    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Normalised values [3, H, W] -> codes [h, w], on the CPU."""
        vq = self.vision_tokenizer
        return vq.encode_ids(pixel_values[None].to(vq.quantize.embedding.weight))[0].cpu()

    # ---- generating images

    @torch.inference_mode()
    def decode_image_step(self, session: DecodeSession, ids: Tensor) -> Tensor:
        """Append one token to each sequence, ids [B] -> the logits of the next codes [B, C]."""
        return self.image_logits(session.append(self.decoder.embed(ids)))

    def start_run(self, request: ModelRequest) -> RequestRun:
        """A request as work that a scheduler may batch with that of others: see `UnifiedModel.start_run`."""
        return separate_run(self, self, request, partial(Emu3ImageAnswer, self, request))

    @torch.inference_mode()
    def generate_image_tokens(
        self,
        prompts: Sequence[Sequence[Part]],
        generators: Sequence[torch.Generator],
        *,
        guidance: Sequence[float],
        negative_prompts: Sequence[Sequence[Part]],
        grids: Sequence[tuple[int, int]],
        image_sampling: ImageTokenSampling,
        progress: bool = False,
    ) -> list[Tensor]:
        """The codes [h, w] of an image after each prompt, which ends with the id that begins the rows of its grid.

        guidance: l = u + w (c - u), c after the prompt, u after the negative prompt; at 1 there is no u, and the
        negative prompt is not read. Codes alone may follow, and an id behind each row that nothing has to predict; so
        the logits of all other ids are not computed. That they are not normalised first, as in the released code,
        shifts those of a step by a constant. Equal prompts are prefilled once.
        """
        rows = ImageRows(grids, self.config.special_tokens)
        branches = CFGBranches.plan(guidance, self.device)
        inputs = [*prompts, *(negative_prompts[i] for i in branches.guided)]
        check_fits(self.decoder.config, inputs, n_more=rows.n_steps - 1)
        before, first_ids = split_last_ids(inputs)
        keys = [tuple(one[0].ids.tolist()) for one in inputs]
        session = self.decode_session(self.prefill_unique(before, keys), rows.n_steps)
        ids = torch.tensor(first_ids, device=self.device)
        for _ in tqdm(range(needed_steps(rows.n_steps)), "generating", disable=not progress, leave=False):
            wanted = rows.wanted
            if wanted:
                logits = branches.combine(self.decode_image_step(session, ids).float())
                codes = sample_image_tokens(logits[wanted], image_sampling, [generators[i] for i in wanted])
            else:
                # an id that ends a row follows, whatever is predicted
                session.append(self.decoder.embed(ids))
                codes = ids.new_zeros(0)
            ids = rows.append(codes)[branches.images]
        return rows.codes()

    @torch.inference_mode()
    def decode_image_tokens(self, codes: Tensor) -> Tensor:
        """Codes [P, h, w] -> pixels [P, 3, height, width], about [-1, 1]."""
        return self.vision_tokenizer.decode(codes).float()

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        images: ImageInput | Sequence | None = None,
        n: int = 1,
        size: tuple[int, int] | Sequence[tuple[int, int] | None] | None = None,
        seed: int | Sequence[int] = 0,
        guidance: float | Sequence[float] | None = None,
        negative_prompt: str | Sequence[str | None] | None = None,
        image_sampling: ImageTokenSampling | None = None,
        progress: bool = False,
    ) -> Generation:
        """Generate `n` images for each prompt, in the order of the prompts; a prompt is prefilled once.

        prompt: one text or a batch of them, as it is: the released examples end theirs with PROMPT_SUFFIX of
        unimm.models.emu3.config. images: images to condition on, as in `understand`; no release was trained for that, so
        a released model follows them loosely at best. size: (height, width) in pixels, one or one a prompt; None for a
        square of the config's `image_area` (`config.size_of_ratio("16:9")` gives others of it). seed: one, or one a
        prompt; from one number, that number and the ones after it, image by image. guidance: 1 is none; one, or one a
        prompt. negative_prompt: what guidance leads away from, one or one a prompt; None for the released one. But for
        rounding, an image does not depend on what else is in the batch. Raises ValueError for bad input.
        """
        prompts, prompt_images = parse_requests(prompt, images)
        n = parse_n_images(n)
        progress = parse_flag(progress, "progress")
        stride = self.vision_tokenizer.config.stride
        defaults = self.config.image_generation
        grids = parse_grids(size, len(prompts), stride=stride, default=self.config.size_of_ratio("1:1"))
        scales = parse_scales(
            defaults.guidance if guidance is None else guidance, len(prompts), "guidances", n_images=n
        )
        given = [
            defaults.negative_prompt if one is None else one
            for one in broadcast(negative_prompt, len(prompts), "negative prompts")
        ]
        negatives = parse_negative_prompts(given, len(prompts))
        seeds = expand_seeds(seed, len(prompts), n_images=n)
        sampling = resolve_image_sampling(image_sampling, defaults.sampling)
        processor = self.processor
        requests = zip(prompts, grids, prompt_images, strict=True)
        parts = [processor.generation_parts(text, grid, some) for text, grid, some in requests]
        negative_parts = [processor.negative_parts(text, grid) for text, grid in zip(negatives, grids, strict=True)]
        codes = self.generate_image_tokens(
            [one for one in parts for _ in range(n)],
            seeded_generators(seeds),
            guidance=scales,
            negative_prompts=[one for one in negative_parts for _ in range(n)],
            grids=[grid for grid in grids for _ in range(n)],
            image_sampling=sampling,
            progress=progress,
        )
        # one by one: they may be of several sizes, and an image does not depend on the others
        return Generation([tensor_to_pil(self.decode_image_tokens(one[None])[0]) for one in codes])


def check_special_ids(tokenizer: JsonTokenizer, special: Emu3SpecialTokens, folder: Path) -> None:
    """Raise ValueError where a tokenizer gives a special token another id than the config, or lacks it."""
    names = {token: getattr(special, name) for name, token in Emu3SpecialTokens.TOKENS.items()}
    names |= {"<|visual token 000000|>": special.code0}
    if wrong := [token for token, at in names.items() if tokenizer.token_id(token) != at]:
        raise ValueError(
            f"the tokenizer in {folder} gives {wrong[0]!r} the id {tokenizer.token_id(wrong[0])}: expected "
            f"{names[wrong[0]]}, as config.json says; fetch the tokenizer that belongs to the weights"
        )
