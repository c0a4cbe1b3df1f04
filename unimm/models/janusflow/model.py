"""JanusFlow: Janus's decoupled encoders, and rectified flow inside the language model in place of codes.

Ma et al. 2024, arXiv 2411.07975. Released code: github.com/deepseek-ai/Janus at 1daa72f, janus/janusflow.
A noised latent enters through a shallow U-ViT as one row for the time and a row for each token, is read causally behind
the prompt, and leaves through another as a velocity. The original's time runs from noise at 0 to data at 1, in
thousandths; it is turned round here, in `enter` and `leave`, and nowhere else.

Axes: N packed rows, B pictures, n tokens of a picture, D model, C channels, H W sides of a latent, h w of its grid.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from unimm.checkpoint import hub
from unimm.checkpoint.keymap import KeyMap
from unimm.generation.flow import euler, flow_timesteps
from unimm.generation.kv_cache import EMPTY_CACHE, KVCache, allocate_kv_buffer, check_max_positions
from unimm.models.base import ComponentModel, Components, Generation
from unimm.models.common.deepseek_chat import DeepseekChatModel
from unimm.models.common.deepseek_processor import SPECIAL_TOKENS
from unimm.models.janusflow import FILES, RELEASES
from unimm.models.janusflow.config import EXPERT, SDXL_VAE, WEIGHT_FILES, JanusFlowConfig
from unimm.models.janusflow.network import JanusFlowNetwork, bos_unconditional
from unimm.models.janusflow.weights import KEY_MAP, VAE_KEY_MAP
from unimm.processing.images.io import tensor_to_pil
from unimm.processing.requests import ImageInput, broadcast, expand_seeds, parse_requests, parse_size
from unimm.sequence.parts import Part
from unimm.sequence.segments import Segment, build_layout
from unimm.tokenizers.kl import AutoencoderKL
from unimm.tokenizers.text import load_tokenizer


class JanusFlow(JanusFlowNetwork, DeepseekChatModel, ComponentModel):
    """A decoder, a tower to look with, and a way in and a way out for latents; the autoencoder may lie elsewhere."""

    RELEASES = RELEASES
    FILES = FILES
    COMPONENTS = ("vae",)
    UNUSED_PARAMETERS = ("vision.trunk.attn_pool.{*}",)

    def __init__(self, config: JanusFlowConfig):
        super().__init__(config)
        self.tokenizer = None
        self.image_processor, self.chat_config = config.image_processor, config.chat
        self.vae_source: str | Path = SDXL_VAE
        # one from elsewhere, once it is loaded: no part of the model, whose parameters stay what they were
        self._external_vae: tuple[AutoencoderKL, ...] = ()

    @classmethod
    def _build(cls, folder: Path) -> "JanusFlow":
        """The model of a folder's config files, with its tokenizer, without weights."""
        model = cls(JanusFlowConfig.from_folder(folder))
        model.tokenizer = load_tokenizer(folder, special_tokens=SPECIAL_TOKENS)
        return model

    def load_components(
        self, components: Components, *, name: str | Path, folder: Path, dtype: torch.dtype, device: torch.device
    ) -> None:
        """components: "vae", the folder or hub id of the autoencoder, in either layout of `kl_layouts`; it stays in float32.

        Unless given: the folder's own ae.safetensors with vae_config.json, or else stabilityai/sdxl-vae, which is fetched
        when it is first needed.
        """
        if vae := components.get("vae"):
            self.config, self.vae, self.vae_source = replace(self.config, vae=None), None, vae

    def key_maps(self) -> dict[tuple[str, ...], KeyMap]:
        """The key table of each file of weights; an autoencoder from elsewhere is not written."""
        return {WEIGHT_FILES: KEY_MAP} | ({("ae.safetensors",): VAE_KEY_MAP} if self.config.vae else {})

    def save_config(self, folder: Path) -> None:
        """Write config.json, preprocessor_config.json and, with an autoencoder of its own, vae_config.json."""
        for name, contents in self.config.to_json().items():
            (folder / name).write_text(json.dumps(contents, indent=2) + "\n")

    @property
    def autoencoder(self) -> AutoencoderKL:
        """The autoencoder; one from elsewhere is loaded now. Raises ValueError where it cannot be had or does not fit."""
        if self.vae is not None:
            return self.vae
        if not self._external_vae:
            # whoever draws first may do so in inference mode, where tensors are made that nothing can change later
            with torch.inference_mode(False):
                vae = AutoencoderKL.from_pretrained(hub.resolve(self.vae_source), device=self.device).requires_grad_(
                    False
                )
            if vae.config.latent_channels != self.config.gen_encoder.in_channels:
                raise ValueError(
                    f"got an autoencoder of {vae.config.latent_channels} channels from {self.vae_source}: expected "
                    f"{self.config.gen_encoder.in_channels}, as the model draws; give from_pretrained another component 'vae'"
                )
            self._external_vae = (vae,)
        return self._external_vae[0].to(self.device)

    # ---- drawing

    @torch.inference_mode()
    def denoise(
        self,
        prompts: Sequence[Sequence[Part]],
        noise: Tensor,
        *,
        guidance: Sequence[float],
        steps: int,
        bf16_time: bool = False,
        progress: bool = False,
    ) -> Tensor:
        """From noise [B, C, H, W] to latents, a picture after each prompt; prompts that are one object are read once.

        Guidance w takes v = u + w (c - u), c the velocity after the prompt and u that after its first id alone; at 1
        there is no u. The prompts do not depend on the time, so their keys and values serve every step.
        bf16_time: round the time and the length of a step as the original does in bfloat16, where 30 steps of 0.0334 go
        a little beyond the end.
        """
        guided = [i for i, w in enumerate(guidance) if w != 1]
        contexts = self.prefill_unique([*prompts, *(bos_unconditional(prompts[i]) for i in guided)])
        at = torch.tensor([*range(len(prompts)), *guided], device=self.device)
        w = torch.tensor([guidance[i] for i in guided], dtype=torch.float32, device=self.device)[:, None, None, None]
        grid = [self.gen_encoder.config.grid_size(side) for side in noise.shape[2:]]
        room = 1 + grid[0] * grid[1]
        check_max_positions(self.config.decoder, max(c.next_position for c in contexts) + room)
        cache = allocate_kv_buffer(self.decoder, contexts, [room] * len(contexts))
        past = [cache.prefix(i) for i in range(len(contexts))]
        layout = build_layout(
            [[Segment(length=room, attention="causal", advance=0)]] * len(contexts), past, device=self.device
        )
        attend = cache.attend(past, layout.mask)
        pace = float(torch.tensor(1 / max(steps, 1)).bfloat16()) * steps if bf16_time else 1.0

        def velocity(x: Tensor, timesteps: Tensor) -> Tensor:
            entered = self.encode_latents(x, timesteps.to(x.device, torch.float32), bf16_time=bf16_time)[at]
            block = torch.cat((entered.time_embed[:, None], entered.token_embeds), 1)
            hidden = self._run_decoder(block.flatten(0, 1), layout.position_ids, attend)[EXPERT]
            v = self.decode_velocity(hidden.unflatten(0, block.shape[:2])[:, 1:], entered).float()
            v, free = v.split([len(prompts), len(guided)])
            return pace * (v.index_copy(0, at[len(prompts) :], free + w * (v[guided] - free)) if guided else v)

        return euler(velocity, noise.to(self.device), flow_timesteps(steps, 1.0), progress=progress)

    def prefill_unique(self, prompts: Sequence[Sequence[Part]]) -> list[KVCache]:
        """The context of each prompt; those that are one object are read once."""
        unique = {id(prompt): prompt for prompt in prompts}
        contexts = dict(zip(unique, self.prefill([EMPTY_CACHE] * len(unique), list(unique.values())), strict=True))
        return [contexts[id(prompt)] for prompt in prompts]

    @torch.inference_mode()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W] -> pixels [B, 3, height, width], about [-1, 1]."""
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
        progress: bool = False,
    ) -> Generation:
        """Draw `n` pictures for each prompt, in the order of the prompts; a prompt is read once.

        prompt: one text or a batch of them. images: pictures to draw from, as in `understand`; the release was not
        trained for that. size: (height, width), the trained one or None. seed: one, or one a prompt; from one number,
        that number and the ones after it, picture by picture. steps: of the sampler. guidance: 1 is none; one, or one a
        prompt. bf16_time: see `denoise`. A picture does not depend on what else is in the batch. Raises ValueError for
        bad input.
        """
        if size is not None and parse_size(size) != self.config.image_size:
            raise ValueError(
                f"cannot draw (height, width) {tuple(size)}: this model was trained for {self.config.image_size} alone"
            )
        prompts, pictures = parse_requests(prompt, images)
        scales = broadcast(self.config.guidance if guidance is None else guidance, len(prompts), "guidances")
        if n < 1 or not all(w >= 0 for w in scales):
            raise ValueError(f"got n {n}, guidance {guidance}: expected at least 1 picture, and scales of 0 or more")
        # the marker that the original appends is dropped by it again
        items = [self.processor.generation_parts(one, some) for one, some in zip(prompts, pictures, strict=True)]
        seeded = expand_seeds(seed, len(prompts), n_images=n)
        latents = self.denoise(
            [one for one in items for _ in range(n)],
            torch.stack([self.initial_noise(torch.Generator().manual_seed(s)) for s in seeded]),
            guidance=[float(w) for w in scales for _ in range(n)],
            steps=self.config.steps if steps is None else steps,
            bf16_time=bf16_time,
            progress=progress,
        )
        return Generation([tensor_to_pil(self.decode_latents(one[None])[0]) for one in latents])
