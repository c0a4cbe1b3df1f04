"""JanusFlow: Janus's decoupled vision encoders, and rectified flow inside the language model in place of image tokens.

Ma et al. 2024, arXiv 2411.07975. Released code: github.com/deepseek-ai/Janus at 1daa72f, janus/janusflow.

Axes: P images, B branches (with guidance two for an image), C channels, H W sides of a latent.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from unimm.checkpoint import hub
from unimm.checkpoint.json_files import write_json
from unimm.checkpoint.keymap import KeyMap
from unimm.checkpoint.load import weight_files
from unimm.generation.flow import euler_step, flow_timesteps, parse_steps, timestep_pairs
from unimm.generation.kv_cache import check_fits
from unimm.generation.noise import seeded_generators
from unimm.generation.numbers import parse_flag
from unimm.generation.step_cache import StepCacheOptions, parse_step_cache
from unimm.generation.stepwise import ModelRequest, RequestRun
from unimm.models.base import ComponentModel, Generation
from unimm.models.common.cfg_branches import CFGBranches
from unimm.models.common.deepseek_chat import DeepseekChatModel
from unimm.models.common.deepseek_processor import SPECIAL_TOKENS
from unimm.models.common.separate_outputs import separate_run
from unimm.models.janusflow import FILES, RELEASES
from unimm.models.janusflow.config import SDXL_VAE, WEIGHT_FILES, JanusFlowConfig
from unimm.models.janusflow.latent_denoiser import JanusFlowLatentDenoiser, bf16_velocity_scale
from unimm.models.janusflow.network import JanusFlowNetwork
from unimm.models.janusflow.parallel import LORA_TARGETS, PARALLEL_PLAN, TENSOR_PARALLEL_PLAN
from unimm.models.janusflow.processor import bos_unconditional
from unimm.models.janusflow.stepwise import JanusFlowImageAnswer
from unimm.models.janusflow.weights import KEY_MAP, VAE_KEY_MAP
from unimm.models.release import Components
from unimm.processing.images.io import tensor_to_pil
from unimm.processing.requests import ImageInput, expand_seeds, parse_n_images, parse_requests, parse_scales
from unimm.sequence.parts import Part
from unimm.tokenizers.kl import AutoencoderKL
from unimm.tokenizers.text import load_tokenizer


class JanusFlow(JanusFlowNetwork, DeepseekChatModel, ComponentModel):
    """JanusFlow with its tokenizer, its autoencoder and its verbs: generate, understand, chat."""

    RELEASES = RELEASES
    LORA_TARGETS = LORA_TARGETS
    PARALLEL_PLAN = PARALLEL_PLAN
    TENSOR_PARALLEL_PLAN = TENSOR_PARALLEL_PLAN
    FILES = FILES
    COMPILED = ("gen_encoder", "gen_decoder", "vae.decoder")
    COMPONENTS = ("vae",)
    UNUSED_PARAMETERS = ("vision.trunk.attn_pool.{*}",)

    def __init__(self, config: JanusFlowConfig):
        super().__init__(config)
        self.tokenizer = None
        self.image_processor = config.image_processor
        self.chat_config = config.chat
        self.vae_source: str | Path = SDXL_VAE
        # one from elsewhere, once it is loaded; in a tuple, so that it is no module of this one
        self._external_vae: tuple[AutoencoderKL, ...] = ()

    # ---- files

    @classmethod
    def _build(cls, folder: Path) -> "JanusFlow":
        model = cls(JanusFlowConfig.from_folder(folder))
        model.tokenizer = load_tokenizer(
            folder, special_tokens=SPECIAL_TOKENS, vocab_size=model.config.decoder.vocab_size
        )
        return model

    def load_components(
        self, components: Components, *, name: str | Path, folder: Path, dtype: torch.dtype, device: torch.device
    ) -> None:
        """components: "vae", the folder or hub id of the autoencoder, in a layout of `kl_layouts`; it stays in float32.

        Unless given: the folder's own ae.safetensors with vae_config.json, or else stabilityai/sdxl-vae, which is
        fetched when it is first needed.
        """
        if vae := components.get("vae"):
            if isinstance(vae, Path) or Path(vae).expanduser().is_dir():
                weight_files(hub.resolve(vae), AutoencoderKL.WEIGHT_FILES)  # raises for a folder that holds none
            self.config = replace(self.config, vae=None)
            self.vae = None
            self.vae_source = vae

    def key_maps(self) -> dict[tuple[str, ...], KeyMap]:
        """The key map of each file of weights; an autoencoder from elsewhere is not written."""
        return {WEIGHT_FILES: KEY_MAP} | ({("ae.safetensors",): VAE_KEY_MAP} if self.config.vae else {})

    def save_config(self, folder: Path) -> None:
        """Write config.json, preprocessor_config.json and, with an autoencoder of its own, vae_config.json."""
        for name, contents in self.config.to_json().items():
            write_json(folder / name, contents)

    @property
    def autoencoder(self) -> AutoencoderKL:
        """The autoencoder; one from elsewhere is loaded now. Raises ValueError where that fails or it does not fit."""
        if self.vae is not None:
            return self.vae
        if not self._external_vae:
            # the first call may come from inference mode, whose tensors could not be moved or trained later
            with torch.inference_mode(False):
                vae = AutoencoderKL.from_pretrained(hub.resolve(self.vae_source), device=self.device).requires_grad_(
                    False
                )
            if vae.config.latent_channels != self.config.gen_encoder.in_channels:
                raise ValueError(
                    f"got an autoencoder of {vae.config.latent_channels} channels from {self.vae_source}: expected "
                    f"{self.config.gen_encoder.in_channels}, as the model generates; give from_pretrained another "
                    "component "
                    "'vae'"
                )
            self._external_vae = (vae,)
        return self._external_vae[0].to(self.device)

    def start_run(self, request: ModelRequest) -> RequestRun:
        """A request as work that a scheduler may batch with that of others: see `UnifiedModel.start_run`."""
        return separate_run(self, self, request, partial(JanusFlowImageAnswer, self, request))

    # ---- generating images

    def latent_denoiser(
        self,
        prompts: Sequence[Sequence[Part]],
        *,
        guidance: Sequence[float],
        latent_size: tuple[int, int] | None = None,
        velocity_scale: float = 1.0,
        bf16_time: bool = False,
        step_cache: StepCacheOptions | None = None,
    ) -> JanusFlowLatentDenoiser:
        """The state of denoising an image under each prompt; prompts that are one object are prefilled once.

        guidance: v = u + w (c - u), c the velocity after the prompt and u that after its first id alone; at 1 there is
        no u. latent_size: (H, W), the trained one unless given.
        """
        rows, columns = (self.config.gen_encoder.grid_size(side) for side in latent_size or self.config.latent_size)
        check_fits(self.decoder.config, prompts, n_more=1 + rows * columns)
        branches = CFGBranches.plan(guidance, self.device)
        inputs = [*prompts, *(bos_unconditional(prompts[i]) for i in branches.guided)]
        caches = self.prefill_unique(inputs, [id(prompt) for prompt in inputs])
        return JanusFlowLatentDenoiser(
            self.decoder,
            caches,
            branches,
            rows * columns,
            velocity_scale=velocity_scale,
            bf16_time=bf16_time,
            step_cache=step_cache,
        )

    @torch.inference_mode()
    def denoise_step(
        self, denoiser: JanusFlowLatentDenoiser, x: Tensor, timesteps: Tensor, next_timesteps: Tensor
    ) -> Tensor:
        """One Euler step of every image: x [P, C, H, W] float32 at timesteps [P] -> x at next_timesteps [P].

        1 is noise, 0 is data; the images may be at different timesteps.
        """

        def step(x: Tensor, times: Tensor) -> Tensor:
            features = self.encode_latents(x, times, bf16_time=denoiser.bf16_time)[denoiser.branches.images]
            rows = torch.cat((features.time_embed[:, None], features.token_embeds), 1)
            hidden = denoiser.hidden_states(rows, self.run_decoder)
            return denoiser.guided_velocity(self.decode_velocity(hidden[:, 1:], features).float())

        times = timesteps.to(x.device, torch.float32)
        velocity = denoiser.graphs.run("step", step, x, times)
        return euler_step(x, velocity, timesteps, next_timesteps)

    def denoise(
        self,
        prompts: Sequence[Sequence[Part]],
        noise: Tensor,
        *,
        guidance: Sequence[float],
        steps: int,
        bf16_time: bool = False,
        step_cache: StepCacheOptions | None = None,
        progress: bool = False,
    ) -> Tensor:
        """From noise [P, C, H, W] to latents, an image after each prompt. guidance: see `latent_denoiser`.

        bf16_time: round the time and the length of a step as the original does in bfloat16, where 30 steps of 0.0334 go
        a little beyond the end.
        """
        denoiser = self.latent_denoiser(
            prompts,
            guidance=guidance,
            latent_size=(noise.shape[2], noise.shape[3]),
            velocity_scale=bf16_velocity_scale(steps) if bf16_time else 1.0,
            bf16_time=bf16_time,
            step_cache=step_cache,
        )
        x = noise.to(self.device)
        for timesteps, next_timesteps in timestep_pairs(flow_timesteps(steps, 1.0), len(x), progress=progress):
            x = self.denoise_step(denoiser, x, timesteps, next_timesteps)
        return x

    @torch.inference_mode()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents [P, C, H, W] -> pixels [P, 3, height, width], about [-1, 1]."""
        return self.autoencoder.decode(latents.float())

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
        bf16_time: bool = False,
        step_cache: StepCacheOptions | bool = False,
        progress: bool = False,
    ) -> Generation:
        """Generate `n` images for each prompt, in the order of the prompts; a prompt is prefilled once.

        prompt: one text or a batch of them. images: images to condition on, as in `understand`; the release was not
        trained for that. size: (height, width), the trained one or None. seed: one, or one a prompt; from one number,
        that number and the ones after it, image by image. steps: of the sampler. guidance: 1 is none; one, or one a
        prompt. bf16_time: see `denoise`. step_cache: spare forwards of the language model, by a TaylorSeer (True) or a
        TeaCache of `unimm.generation.step_cache`. But for rounding, an image does not depend on what else is in the
        batch. Raises ValueError for bad input.
        """
        self.check_image_size(size, self.config.image_size)
        prompts, prompt_images = parse_requests(prompt, images)
        n = parse_n_images(n)
        progress = parse_flag(progress, "progress")
        bf16_time = parse_flag(bf16_time, "bf16_time")
        cache = parse_step_cache(step_cache)
        scales = parse_scales(
            self.config.guidance if guidance is None else guidance, len(prompts), "guidances", n_images=n
        )
        seeds = expand_seeds(seed, len(prompts), n_images=n)
        steps = parse_steps(self.config.steps if steps is None else steps)
        # up to the id that begins an image, which the original appends and drops again
        parts = [self.processor.generation_parts(text, some) for text, some in zip(prompts, prompt_images, strict=True)]
        latents = self.denoise(
            [one for one in parts for _ in range(n)],
            torch.stack([self.initial_noise(generator) for generator in seeded_generators(seeds)]),
            guidance=scales,
            steps=steps,
            bf16_time=bf16_time,
            step_cache=cache,
            progress=progress,
        )
        # one by one, so that an image does not depend on the others
        return Generation([tensor_to_pil(self.decode_latents(one[None])[0]) for one in latents])
