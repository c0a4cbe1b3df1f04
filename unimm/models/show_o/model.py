"""Show-o: text from left to right and masked image tokens in one transformer.

Xie et al. 2024, arXiv 2408.12528. Released code: github.com/showlab/Show-o at 45a5a2d. docs/originals/show_o.md.

Axes: P images, B branches (with guidance two for an image), n tokens of an image, V vocabulary of image tokens, h w a
grid of tokens.
"""

from collections.abc import Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unimm.checkpoint import hub
from unimm.checkpoint.json_files import write_json
from unimm.checkpoint.keymap import KeyMap
from unimm.checkpoint.valueless import needed_steps
from unimm.encoders import clip_vision
from unimm.generation.flow import parse_steps
from unimm.generation.kv_cache import check_fits
from unimm.generation.masked import (
    MaskedSampling,
    draw_masked_noise,
    masked_step,
    resolve_masked_sampling,
)
from unimm.generation.noise import seeded_generators
from unimm.generation.numbers import parse_flag
from unimm.generation.stepwise import ModelRequest, RequestRun
from unimm.models.base import ComponentModel, Generation, UnifiedModel
from unimm.models.common.cfg_branches import CFGBranches
from unimm.models.common.separate_outputs import separate_run
from unimm.models.release import Components
from unimm.models.show_o import CLIP_FOLDER, FILES, IMAGE_TOKENS, RELEASES, VQ_FOLDER
from unimm.models.show_o.components import find_component_folders
from unimm.models.show_o.config import WEIGHT_FILES, ShowOConfig
from unimm.models.show_o.extension import Extension, parse_directions
from unimm.models.show_o.masked_session import MaskedImageSession
from unimm.models.show_o.network import ShowONetwork
from unimm.models.show_o.parallel import LORA_TARGETS, PARALLEL_PLAN, TENSOR_PARALLEL_PLAN
from unimm.models.show_o.processor import ShowOProcessor
from unimm.models.show_o.stepwise import ShowOImageAnswer
from unimm.models.show_o.tokenizer import load_show_o_tokenizer
from unimm.models.show_o.weights import show_o_key_map
from unimm.processing.images.io import tensor_to_pil
from unimm.processing.requests import (
    ImageInput,
    check_size,
    expand_seeds,
    parse_n_images,
    parse_requests,
    parse_scales,
)
from unimm.sequence.parts import Part, text_part
from unimm.tokenizers import magvit_v2
from unimm.vlms.chat import MLLMChat

MAX_IMAGE_SIDE = 1024  # pixels a side of an image that is generated at once; the models were trained up to 512


class ShowO(ShowONetwork, MLLMChat, UnifiedModel, ComponentModel):
    """Show-o with its tokenizers and its verbs: generate, with masks too, extend, understand, chat."""

    RELEASES = RELEASES
    LORA_TARGETS = LORA_TARGETS
    PARALLEL_PLAN = PARALLEL_PLAN
    TENSOR_PARALLEL_PLAN = TENSOR_PARALLEL_PLAN
    supports_editing = False
    COMPILED = ("vq.decoder",)
    DECODES_IMAGES = "decode_image_tokens"
    FILES = FILES
    COMPONENTS = ("vq", "clip", "tokenizer")
    KEEP_FLOAT32 = ("vq.",)  # signs are taken of its encoder's output: rounding would change tokens
    UNPACKED = ("vq", "clip")

    def __init__(self, config: ShowOConfig):
        super().__init__(config)
        self.tokenizer = None

    # ---- files

    @classmethod
    def _build(cls, folder: Path) -> "ShowO":
        model = cls(ShowOConfig.from_folder(folder))
        for place in (folder, folder / model.config.llm_path):
            model.tokenizer = model.tokenizer or load_show_o_tokenizer(place, model.config.n_text)
        return model

    def load_components(
        self, components: Components, *, name: str | Path, folder: Path, dtype: torch.dtype, device: torch.device
    ) -> None:
        """components: "vq", "clip" and "tokenizer", folders or hub ids of the image tokenizer, of CLIP (for a model that
        understands images by it) and of Phi's tokenizer; None leaves one out.

        Unless given, they lie below the checkpoint's folder, or are absent; those of a hub id come from the
        repositories that the original names.
        """
        if str(name) in IMAGE_TOKENS:
            self.config = self.config.for_image_tokens(IMAGE_TOKENS[str(name)])
        wanted = ("vq", *(("clip",) if self.config.with_clip else ()), *(() if self.tokenizer else ("tokenizer",)))
        is_hub_id = not Path(name).expanduser().is_dir() and str(name) not in hub.bundled_names()
        folders = find_component_folders(folder, components, wanted=wanted, is_hub_id=is_hub_id)
        if "vq" in folders:
            self.vq = magvit_v2.MagvitV2.from_pretrained(folders["vq"], device=device)
        if "clip" in folders:
            self.clip = clip_vision.CLIPVisionEncoder.from_pretrained(folders["clip"], dtype=dtype, device=device)
        if "tokenizer" in components and components["tokenizer"] is None:
            self.tokenizer = None
        if "tokenizer" in folders:
            self.tokenizer = load_show_o_tokenizer(folders["tokenizer"], self.config.n_text)
        self.check_components()

    def check_components(self) -> None:
        """Raise ValueError for an image tokenizer, or a CLIP, that is not the one that the model was trained with."""
        if self.vq is not None and self.vq.config.n_codes != self.config.n_codes:
            raise ValueError(
                f"got an image tokenizer of {self.vq.config.n_codes} codes: expected {self.config.n_codes}, as "
                "codebook_size in config.json says"
            )
        if self.clip is not None and self.clip.config.dim != self.config.clip_dim:
            raise ValueError(
                f"got a CLIP with features of {self.clip.config.dim}: expected {self.config.clip_dim}, the projector's"
            )

    def key_maps(self) -> dict[tuple[str, ...], KeyMap]:
        """The key map of each file of weights whose part the model has."""
        key_maps: dict[tuple[str, ...], KeyMap] = {WEIGHT_FILES: show_o_key_map(with_clip=self.config.with_clip)}
        if self.vq is not None:
            path = f"{VQ_FOLDER}/{magvit_v2.WEIGHT_FILES[0]}"
            key_maps[(path,)] = magvit_v2.KEY_MAP.prefixed(ours="vq.")
        if self.clip is not None:
            key_maps[(f"{CLIP_FOLDER}/model.safetensors",)] = clip_vision.KEY_MAP.prefixed(ours="clip.")
        return key_maps

    def save_config(self, folder: Path) -> None:
        """Write config.json, and into folders below it the configs of Phi, the image tokenizer and CLIP."""
        files = self.config.to_json()
        if self.vq is not None:
            files[f"{VQ_FOLDER}/config.json"] = self.vq.config.to_json()
        if self.clip is not None:
            files[f"{CLIP_FOLDER}/config.json"] = self.clip.config.to_json()
            files[f"{CLIP_FOLDER}/preprocessor_config.json"] = self.clip.image_processor.to_json()
        for name, contents in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_json(folder / name, contents)

    # ---- understanding

    @property
    def processor(self) -> ShowOProcessor:
        """Prompts, conversations and images to parts."""
        stride = self.vq.config.stride if self.vq else None
        return ShowOProcessor(
            tokenizer=self.tokenizer,
            special_tokens=self.config.special_tokens,
            max_prompt_ids=self.config.max_prompt_ids,
            with_clip=self.config.with_clip,
            clip_processor=self.clip.image_processor if self.clip else None,
            clip_patch_size=self.clip.config.patch_size if self.clip else 1,
            image_size=None if stride is None else self.config.token_grid[0] * stride,
            vq_stride=stride or 1,
        )

    @property
    def eos_ids(self) -> tuple[int]:
        """The id that ends an answer."""
        return (self.processor.end_of_text,)

    @property
    def max_answer_tokens(self) -> int:
        """The most new ids of an answer, where a call does not say."""
        return self.config.max_answer_tokens

    # ---- generating images

    def masked_session(
        self, prompts: Sequence[Sequence[Part]], branches: CFGBranches, n_tokens: int
    ) -> MaskedImageSession:
        """The state of decoding an image of `n_tokens` after each prompt, and after none where it is guided."""
        check_fits(self.decoder.config, prompts, n_more=n_tokens + 2)
        none = text_part(self.processor.prompt_ids(""))
        inputs = [*prompts, *([none] for _ in branches.guided)]
        caches = self.prefill_unique(inputs, [_key(prompt) for prompt in inputs])
        return MaskedImageSession(self.decoder, self.config, caches, n_tokens)

    @torch.inference_mode()
    def masked_logits(self, session: MaskedImageSession, branches: CFGBranches, tokens: Tensor) -> Tensor:
        """The guided logits of the places of images themselves, tokens [P, n] -> [P, n, V] float32."""
        logits = self.image_logits(session.hidden(tokens[branches.images]))
        # guided in float32: the scales are not rounded to the model's dtype
        return branches.combine(logits.float())

    @torch.inference_mode()
    def complete_image_tokens(
        self,
        prompts: Sequence[Sequence[Part]],
        tokens: Tensor,
        generators: Sequence[torch.Generator],
        *,
        guidance: Sequence[float],
        steps: int,
        masked_sampling: MaskedSampling,
        progress: bool = False,
    ) -> Tensor:
        """Image tokens [P, n] whose masked ones, `n_codes`, are decoded after each prompt in `steps` steps.

        guidance: l = u + w (c - u) of the logits, u after an empty prompt; at 1 there is no u.
        """
        n_codes = self.config.n_codes
        branches = CFGBranches.plan(guidance, self.device)
        session = self.masked_session(prompts, branches, tokens.shape[1])
        tokens = tokens.to(self.device)
        drawn = tokens
        for step in tqdm(range(needed_steps(steps)), "generating", disable=not progress, leave=False):
            noise = draw_masked_noise(generators, tokens.shape[1], n_codes, masked_sampling)
            tokens, drawn, _ = masked_step(
                self.masked_logits(session, branches, tokens),
                tokens,
                mask_token=n_codes,
                step=step,
                steps=steps,
                sampling=masked_sampling,
                noise=noise,
            )
        return drawn

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """The middle squares of images as tokens [P, n]."""
        vq = self.required_vq
        pixels = torch.stack([self.processor.image_pixels(image) for image in images])
        return vq.encode_ids(pixels.to(vq.encoder.conv_in.weight))

    @torch.inference_mode()
    def decode_image_tokens(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Image tokens [P, n] of the trained grid, or of `grid` -> pixels [P, 3, height, width], about [-1, 1]."""
        return self.required_vq.decode(tokens, grid=grid or self.config.token_grid).float()

    def start_run(self, request: ModelRequest) -> RequestRun:
        """A request as work that a scheduler may batch with that of others: see `UnifiedModel.start_run`."""
        return separate_run(self, self, request, partial(ShowOImageAnswer, self, request))

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
        mask: ImageInput | Sequence | None = None,
        masked_sampling: MaskedSampling | None = None,
        progress: bool = False,
    ) -> Generation:
        """Generate `n` images for each prompt, in the order of the prompts, or the masked places of given images.

        prompt: one text or a batch of them. images, with a mask: an image a prompt, of which the middle square is taken;
        what is white in the mask, an image of the same size, is generated anew. images without a mask: to condition on,
        as in `understand`; no release was trained for that, so a released model follows them loosely at best. size:
        (height, width), the trained one unless given. seed: one, or one a prompt; from one number, that number and the
        ones after it, image by image. guidance: 1 is none, the original's number plus 1; one, or one a prompt. But for
        rounding, an image does not depend on what else is in the batch. Raises ValueError for bad input.
        """
        prompts, prompt_images = parse_requests(prompt, images)
        masks = self.processor.parse_masks(mask, prompt, prompt_images)
        n = parse_n_images(n)
        progress = parse_flag(progress, "progress")
        steps = parse_steps(self.config.steps if steps is None else steps)
        scales = parse_scales(
            self.config.guidance if guidance is None else guidance, len(prompts), "guidances", n_images=n
        )
        seeds = expand_seeds(seed, len(prompts), n_images=n)
        sampling = resolve_masked_sampling(masked_sampling, self.config.masked_sampling)
        grid = self.parse_grid(size, with_masks=any(one is not None for one in masks))
        parts: list[list[Part]] = []
        for text, some, places in zip(prompts, prompt_images, masks, strict=True):
            parts.append(self.processor.generation_parts(text, some if places is None else ()))
        tokens = self._masked_tokens(grid, prompt_images, masks)
        rows = [i for i in range(len(prompts)) for _ in range(n)]
        drawn = self.complete_image_tokens(
            [parts[i] for i in rows],
            tokens[rows],
            seeded_generators(seeds),
            guidance=scales,
            steps=steps,
            masked_sampling=sampling,
            progress=progress,
        )
        # one by one, so that an image does not depend on the others
        return Generation([tensor_to_pil(self.decode_image_tokens(one[None], grid)[0]) for one in drawn])

    def parse_grid(self, size: tuple[int, int] | None, *, with_masks: bool) -> tuple[int, int]:
        """(rows, columns) of the images of a call. Raises ValueError for a size that cannot be."""
        stride = self.required_vq.config.stride
        if size is None:
            return self.config.token_grid
        height, width = check_size(size, stride, MAX_IMAGE_SIDE)
        grid = height // stride, width // stride
        if with_masks and grid != self.config.token_grid:
            raise ValueError(
                f"got size {(height, width)} and a mask: expected images with a mask in the trained size, "
                f"{tuple(side * stride for side in self.config.token_grid)}; leave size out"
            )
        return grid

    def _masked_tokens(
        self, grid: tuple[int, int], images: Sequence[Sequence[Image.Image]], masks: Sequence[Tensor | None]
    ) -> Tensor:
        """The tokens to begin from, one image a prompt [P, n]: masked, but for what a mask keeps of a given image."""
        tokens = torch.full((len(masks), grid[0] * grid[1]), self.config.n_codes, device=self.device)
        for i, places in enumerate(masks):
            if places is not None:
                known = self.encode_images(images[i])[0]
                tokens[i] = known.masked_fill(places.to(known.device), self.config.n_codes)
        return tokens

    def extend(
        self,
        prompt: str | Sequence[str],
        *,
        images: ImageInput | Sequence,
        directions: str | Sequence[str | tuple[str, str]],
        n: int = 1,
        offset: int = 0,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance: float | Sequence[float] | None = None,
        masked_sampling: MaskedSampling | None = None,
        progress: bool = False,
    ) -> Generation:
        """Extend an image a prompt beyond its sides, half of the trained size at a time: `n` images for each prompt.

        The middle square of each image is what is extended. directions: "left", "right", "up" and "down", in the order
        in which the image grows; a pair of one of them and a text has that in place of the prompt. offset: by so many
        tokens more the image grows at a time, and by so many fewer it is looked back on. The other options are
        `generate`'s. Raises ValueError for bad input.
        """
        prompts, prompt_images = parse_requests(prompt, images)
        if any(len(some) != 1 for some in prompt_images):
            raise ValueError(f"got {[len(some) for some in prompt_images]} images: expected one for each prompt")
        rounds = parse_directions(directions)
        side = self.config.token_grid[0]
        extension = Extension.plan(side, offset, rounds, stride=self.required_vq.config.stride)
        n = parse_n_images(n)
        progress = parse_flag(progress, "progress")
        steps = parse_steps(self.config.steps if steps is None else steps)
        scales = parse_scales(
            self.config.guidance if guidance is None else guidance, len(prompts), "guidances", n_images=n
        )
        generators = seeded_generators(expand_seeds(seed, len(prompts), n_images=n))
        sampling = resolve_masked_sampling(masked_sampling, self.config.masked_sampling)
        known = torch.cat([self.encode_images(some) for some in prompt_images])
        canvas = known.unflatten(1, (side, side)).repeat_interleave(n, 0)
        for direction, text in rounds:
            texts = [text or one for one in prompts for _ in range(n)]
            parts = [self.processor.generation_parts(one) for one in texts]
            canvas, windows = extension.grow(canvas, direction, self.config.n_codes)
            for rows, columns in windows:
                window = self.complete_image_tokens(
                    parts,
                    canvas[:, rows, columns].flatten(1),
                    generators,
                    guidance=scales,
                    steps=steps,
                    masked_sampling=sampling,
                    progress=progress,
                )
                canvas[:, rows, columns] = window.unflatten(1, (side, side))
        grid: Any = tuple(canvas.shape[1:])
        return Generation([tensor_to_pil(self.decode_image_tokens(one.flatten()[None], grid)[0]) for one in canvas])


def _key(prompt: Sequence[Part]) -> Hashable:
    """Equal for prompts that are equal texts, or one object."""
    return tuple(prompt[0].ids.tolist()) if len(prompt) == 1 else id(prompt)
