"""BAGEL: Mixture-of-Transformers, generalized causal attention, rectified flow inside the language model.

Deng et al. 2025, arXiv 2505.14683. Released code: github.com/ByteDance-Seed/Bagel at 056b5fd, Apache-2.0.
Two experts share every attention: "und" owns text, ViT tokens and all markers, "gen" owns latent tokens.

Axes: N packed tokens, L latent tokens of a picture, D model, C features of a latent token, V vocabulary.
"""
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from unimm.checkpoint.load import Table, read_json, read_shapes, weight_files
from unimm.encoders.siglip_navit import NaViT, VisionConfig
from unimm.generation.flow import Guidance, TaylorSeer, add_noise, guide, knots, sample, share
from unimm.generation.kv_cache import TextSampling, TextStream
from unimm.kernels import attention, linear_cross_entropy
from unimm.models.bagel.cfg_contexts import Canvas, Defaults, Dialogue, Items, Markers, reason, say, show, write
from unimm.models.base import (
    Drawing,
    Generation,
    Picture,
    Release,
    TextTokenizer,
    UnifiedModel,
    asked,
    drawable,
    each,
    seeds,
)
from unimm.nn.decoder import Decoder, DecoderConfig, Parts, Route
from unimm.nn.layers import MLP, TimeEmbedding, sincos_2d
from unimm.processing.images.io import Resize, open_image, to_image, to_tensor, unpatchify
from unimm.sequence.segments import IGNORE, Item, Pack, Tokens
from unimm.tokenizers.kl import VAE, VAEConfig
from unimm.tokenizers.text import load_tokenizer

STREAMS = ("und", "gen")


@dataclass(frozen=True, kw_only=True)
class BagelConfig:
    decoder: DecoderConfig
    vision: VisionConfig | None  # None: a checkpoint trained to draw only
    draws: bool
    vae: VAEConfig
    connector_act: str
    latent_patch: int
    latent_side: int  # the table of latent positions is a grid of side * side
    look_side: int  # likewise the connector's
    interpolate_places: bool
    train_shift: float
    draw: Resize  # the rule for pictures that enter the VAE, and, before `look`, for all
    look: Resize  # the rule for pictures that enter the ViT
    markers: Markers | None  # None: looked up in the tokenizer
    defaults: Defaults

    @property
    def latent_dim(self) -> int:
        return self.latent_patch**2 * self.vae.latent_channels

    @property
    def stride(self) -> int:
        """Pixels a latent token."""
        return self.latent_patch * self.vae.stride

    @classmethod
    def from_folder(cls, folder: Path) -> "BagelConfig":
        """Read llm_config.json, vit_config.json and config.json; sizes of tables come from the weights, where there are any.

        config.json came later than the weights, may be missing, and says 32 where the latent table has side 64.
        """
        llm, vit, top = (read_json(folder / name) for name in ("llm_config.json", "vit_config.json", "config.json"))
        held = any((folder / name).exists() for name in WEIGHTS)
        shapes = read_shapes(weight_files(folder, WEIGHTS)) if held else {}
        tables = {key.removeprefix("bagel."): shape[0] for key, shape in shapes.items() if key.endswith("pos_embed")}
        sides = {key: round(rows**0.5) for key, rows in tables.items()}
        return cls.from_files(llm or top.get("llm_config", {}), vit or top.get("vit_config", {}), top, sides)

    @classmethod
    def from_files(cls, llm: Mapping, vit: Mapping, top: Mapping, sides: Mapping[str, int] | None = None) -> "BagelConfig":
        """From the released files' contents. Missing values are those that the released code writes into itself.

        sides: of the tables of positions, by their names in the weights, where these are known better.
        """
        sides, special = sides or {}, top.get("new_token_ids")
        patch, look_patch = top.get("latent_patch_size", 2), vit.get("patch_size", 14)
        vae = VAEConfig.from_files(top.get("vae_config", {}))
        vision = VisionConfig.from_files(vit, drop_last=True) if top.get("visual_und", True) else None
        return cls(
            decoder=DecoderConfig.from_files({"qk_norm": True, **llm}, qkv_bias=True, streams=STREAMS),
            vision=vision,
            draws=top.get("visual_gen", True),
            vae=vae,
            connector_act=top.get("connector_act", "gelu_pytorch_tanh"),
            latent_patch=patch,
            latent_side=sides.get("latent_pos_embed.pos_embed", top.get("max_latent_size", 64)),
            look_side=sides.get("vit_pos_embed.pos_embed", top.get("vit_max_num_patch_per_side", 70)),
            interpolate_places=top.get("interpolate_pos", False),
            train_shift=top.get("timestep_shift", 1.0),
            draw=Resize.from_files(top.get("vae_transform", {}), longest=1024, shortest=512, stride=patch * vae.stride),
            look=Resize.from_files(top.get("vit_transform", {}), longest=980, shortest=224, stride=look_patch),
            markers=Markers.from_files(special) if special else None,
            defaults=Defaults.from_files(top.get("generation", {})),
        )

    def to_files(self) -> dict[str, dict[str, Any]]:
        """The contents of llm_config.json, vit_config.json and config.json."""
        llm = self.decoder.to_files() | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
        vit = self.vision.to_files(drop_last=True) if self.vision else {}
        top: dict[str, Any] = {"architectures": ["BagelForConditionalGeneration"], "model_type": "bagel"}
        top |= {"llm_config": llm, "vit_config": vit, "vae_config": self.vae.to_files()}
        top |= {"visual_gen": self.draws, "visual_und": self.vision is not None}
        top |= {"latent_patch_size": self.latent_patch, "max_latent_size": self.latent_side}
        top |= {"vit_max_num_patch_per_side": self.look_side, "interpolate_pos": self.interpolate_places}
        top |= {"connector_act": self.connector_act, "timestep_shift": self.train_shift}
        top |= {"vae_transform": self.draw.to_files(), "vit_transform": self.look.to_files()}
        top |= {"generation": asdict(self.defaults)}
        if self.markers:
            top["new_token_ids"] = self.markers.to_files()
        return {"llm_config.json": llm, "vit_config.json": vit, "config.json": top}


@dataclass(frozen=True)
class Losses:
    """Per token: cross entropy of every labelled row [n], squared error of every noised latent token [m, C]."""

    ce: Tensor
    mse: Tensor


class Bagel(UnifiedModel):
    """A decoder of two experts, a ViT to look with, a VAE to draw with."""

    PREFIX, THINKS = "bagel.", True
    look_places: Tensor  # [look_side^2, D], the connector's
    latent_places: Tensor  # [latent_side^2, D]

    def __init__(self, cfg: BagelConfig):
        super().__init__()
        self.cfg, self.tokenizer = cfg, None
        dim = cfg.decoder.dim
        self.decoder = Decoder(cfg.decoder)
        if cfg.vision:
            self.vision = NaViT(cfg.vision)
            self.connector = MLP(cfg.vision.dim, dim, dim, cfg.connector_act)
            self.register_buffer("look_places", sincos_2d(cfg.look_side, dim))
        if cfg.draws:
            self.time = TimeEmbedding(dim)
            self.from_latent, self.to_velocity = nn.Linear(cfg.latent_dim, dim), nn.Linear(dim, cfg.latent_dim)
            self.register_buffer("latent_places", sincos_2d(cfg.latent_side, dim))
            self.vae = VAE(cfg.vae)

    @classmethod
    def from_folder(cls, folder: Path) -> "Bagel":
        """The model of a folder's config files, with its tokenizer, without weights."""
        model = cls(BagelConfig.from_folder(folder))
        model.tokenizer = load_tokenizer(folder)
        return model

    def weights(self) -> dict[tuple[str, ...], Table]:
        """The key table of each file of weights."""
        parts = ((self.cfg.decoder.qk_norm, QK_NORM_KEYS), (self.cfg.vision, LOOK_KEYS), (self.cfg.draws, DRAW_KEYS))
        main = dict(DECODER_KEYS)
        for has, table in parts:
            main |= table if has else {}
        return {WEIGHTS: main, ("ae.safetensors",): VAE_KEYS} if self.cfg.draws else {WEIGHTS: main}

    def save_config(self, folder: Path) -> None:
        """Write llm_config.json, vit_config.json and config.json."""
        for name, contents in self.cfg.to_files().items():
            (folder / name).write_text(json.dumps(contents, indent=2) + "\n")

    # ---- the model

    def look(self, tokens: Tokens) -> Tensor:
        """Patches of packed images -> [n, D]: ViT, connector, place."""
        seen = self.vision(tokens.content.to(self.dtype), tokens.places, tokens.lengths)
        return self.connector(seen) + self.look_places[tokens.places]

    def latent_tokens(self, x: Tensor, times: Tensor, where: Tensor) -> Tensor:
        """Latent tokens x [n, C] at times [n] (or [1], one for all) and places [n] -> [n, D]."""
        return self.from_latent(x.to(self.dtype)) + self.time(times) + self.latent_places[where]

    def embed(self, batch: Pack, noise: Tensor | None = None) -> Tensor:
        """Every row of a pack, in its order [N, D]; latent tokens are mixed with `noise` [n, C] by their times."""
        parts, rows = {"text": self.decoder.embed(batch.ids)}, {"text": batch.id_rows}
        if batch.look:
            parts["look"], rows["look"] = self.look(batch.look), batch.look.rows
        if batch.draw:
            x = batch.draw.content if noise is None else add_noise(batch.draw.content, noise, batch.times)
            parts["draw"], rows["draw"] = self.latent_tokens(x, batch.times, batch.draw.places), batch.draw.rows
        return Route(rows).join(parts)

    def velocity(self, hidden: Tensor) -> Tensor:
        """The generation expert's last hidden states [n, D] -> velocity [n, C], noise - data."""
        return self.to_velocity(self.decoder.norms["gen"](hidden))

    def forward(self, batch: Pack, noise: Tensor) -> Losses:
        """Training: next-id loss at the labelled rows, flow loss at the noised tokens; noise [n draw tokens, C]."""
        hidden = self.hidden(batch, lambda layer, q, k, v: attention(q, k, v, batch.layout.mask), noise)
        at = (batch.labels != IGNORE).nonzero().squeeze(1)
        rows = torch.searchsorted(batch.streams["und"], batch.id_rows[at])
        said = self.decoder.norms["und"](hidden["und"][rows])
        ce = linear_cross_entropy(said, self.decoder.head.weight, batch.labels[at])
        if batch.draw is None:
            return Losses(ce, noise.new_zeros(0, self.cfg.latent_dim))
        target = noise - batch.draw.content
        v = self.velocity(hidden["gen"][batch.noised])
        return Losses(ce, (v.float() - target[batch.noised]).square())

    def hidden(self, batch: Pack, attend: Any, noise: Tensor | None = None) -> Parts:
        """Last hidden states of a pack's rows by expert, before the final norms; `attend` as in the decoder."""
        return self.decoder(self.embed(batch, noise), batch.layout.positions, batch.streams, attend)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the decoder; the VAE keeps float32."""
        return self.decoder.embed.weight.dtype

    @property
    def items(self) -> Items:
        """What texts and pictures are in this model's sequences; marker ids from the tokenizer, else from the config."""
        cfg, markers = self.cfg, Markers.of(self.tokenizer) if self.tokenizer else self.cfg.markers
        if markers is None:
            raise ValueError("this checkpoint has no tokenizer and its config names no new_token_ids: add tokenizer.json")
        return Items(
            markers=markers,
            patch=cfg.vision.patch if cfg.vision else None,
            look_side=cfg.look_side,
            latent_patch=cfg.latent_patch if cfg.draws else None,
            latent_side=cfg.latent_side,
            interpolate=cfg.interpolate_places,
        )

    # ---- drawing

    @torch.inference_mode()
    def denoise(
        self,
        dialogues: Sequence[Dialogue],
        noises: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        *,
        guidance: Sequence[Guidance],
        steps: int,
        shift: float,
        taylor: bool = False,
        progress: bool = False,
    ) -> list[Tensor]:
        """From noise [L, C] to latent tokens [L, C], for pictures of (height, width) pixels, all in one batch."""
        grids = [(h // self.cfg.stride, w // self.cfg.stride) for h, w in sizes]
        canvas = Canvas(self, dialogues, grids)
        features = share(canvas.features, canvas.canonical)
        velocity = guide(TaylorSeer(features) if taylor else features, self.velocity, guidance)
        x = sample(velocity, torch.cat(list(noises)).to(self.device), knots(steps, shift), progress=progress)
        return list(x.split([len(noise) for noise in noises]))

    @torch.inference_mode()
    def paint(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Latent tokens [L, C] -> pixels [3, height, width] in [-1, 1]."""
        return self.vae.decode(unpatchify(tokens.float(), self.cfg.latent_patch, size[0] // self.cfg.stride)[None])[0]

    @torch.inference_mode()
    def picture_items(self, image: Image.Image, *, noise: Tensor | None, draw: bool) -> tuple[list[Item], tuple[int, int]]:
        """A picture as latents (`draw`) and as patches, and its size (height, width) after the VAE's resize, which both use.

        noise [z, h, w] draws from the VAE's posterior, as the original always does; None takes its mean.
        """
        image = self.cfg.draw(image)
        look = self.items.looked_at(to_tensor(self.cfg.look(image)))
        if not draw:
            return [look], (image.height, image.width)
        pixels = to_tensor(image)[None].to(self.device)
        latent = self.vae.encode(pixels, noise=None if noise is None else noise[None].to(self.device))[0]
        return [self.items.drawn(latent.cpu()), look], (image.height, image.width)

    # ---- verbs

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        images: Picture | Sequence | None = None,
        think: bool = False,
        size: tuple[int, int] | None = None,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        shift: float | None = None,
        guidance: Guidance | float | Sequence[Guidance | float] | None = None,
        text: TextSampling | None = None,
        taylor: bool = False,
        progress: bool = False,
    ) -> Generation:
        """Draw a picture for each prompt; with `images`, edit them; with `think`, write the reasoning first.

        prompt: one text or a batch of them. images: for one prompt a picture or several, for a batch one of these (or
        None) each. size: (height, width) in pixels, multiples of the stride; unless given, that of the last input
        picture after its resize, or the default. seed: one, or one a prompt; from one number, that number and the
        ones after it. steps: forwards of the sampler (the original's num_timesteps - 1). guidance: one, or one a prompt; a
        number is the text's scale, the rest as by default. A picture does not depend on what else is in the batch. Raises
        ValueError for bad input, with what would be good.
        """
        self.items.check_draws()
        prompts, pictures = asked(prompt, images)
        n, d, seed = len(prompts), self.cfg.defaults, seeds(seed, len(prompts))
        generators = [torch.Generator().manual_seed(s) for s in seed]
        dialogues, texts = self._begin(n, d.think_draw if think else None), []
        dialogues = self._shown(dialogues, pictures, generators, draw=True)
        dialogues = say(self, dialogues, self._texts(prompts))
        if think:
            texts = self._written(dialogues, text, seed).texts()
            dialogues = reason(self, dialogues, self._texts(texts, empty=True))
        guided = None if guidance is None else each(guidance, n, "guidances")
        options = Drawing(size=size, guidance=guided, steps=steps, shift=shift, taylor=taylor, progress=progress)
        return Generation(self._draw(dialogues, generators, options), texts)

    def understand(
        self,
        images: Picture | Sequence | None,
        question: str | Sequence[str],
        *,
        think: bool = False,
        stream: bool = False,
        text: TextSampling | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Any:
        """Answer a question about pictures: a str; for a batch of questions a list; with `stream`, pieces as they come.

        images: for one question a picture, several, or None; for a batch one of these each. Raises ValueError for bad
        input.
        """
        questions, pictures = asked(question, images)
        if stream and len(questions) > 1:
            raise ValueError(f"got {len(questions)} questions to stream: expected one")
        n, d, seed = len(questions), self.cfg.defaults, seeds(seed, len(questions))
        dialogues = self._begin(n, d.think_answer if think else None)
        dialogues = self._shown(dialogues, pictures, [torch.Generator()] * n, draw=False)
        written = self._written(say(self, dialogues, self._texts(questions)), text, seed)
        if stream:
            return written.pieces()
        return written.texts()[0] if isinstance(question, str) else written.texts()

    def interleave(
        self,
        items: Sequence[str | Picture],
        *,
        outputs: Sequence[str] = ("image",),
        size: tuple[int, int] | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: Guidance | float | None = None,
        text: TextSampling | None = None,
        progress: bool = False,
    ) -> Iterator[str | Image.Image]:
        """Go on from texts and pictures with texts and pictures, in the order of `outputs` ("text" or "image").

        Yields each piece as it is made; it enters the context (a picture by its pixels, through VAE and ViT), so the
        next piece knows it. A file is given as a Path; a str is always text. Picture i is drawn from seed + i. Raises
        ValueError for bad input, at once.
        """
        items = [items] if isinstance(items, str | Path | Image.Image) else items
        outputs = [outputs] if isinstance(outputs, str) else outputs
        if wrong := [kind for kind in outputs if kind not in ("text", "image")]:
            raise ValueError(f"got outputs {wrong}: expected a sequence of 'text' and 'image'")
        if "image" in outputs:
            self.items.check_draws()
        options = Drawing(size=size, guidance=None if guidance is None else [guidance], steps=steps, progress=progress)
        return self._interleaved(items, outputs, seeds(seed, max(1, len(outputs))), options, text)

    def _interleaved(
        self, items: Sequence, outputs: Sequence[str], seed: Sequence[int], options: Drawing, text: TextSampling | None
    ) -> Iterator[str | Image.Image]:
        draw, generators = "image" in outputs, [torch.Generator().manual_seed(s) for s in seed]
        dialogue = self._begin(1, None)
        for item in items:
            if isinstance(item, str):
                dialogue = say(self, dialogue, self._texts([item]))
            else:
                dialogue = self._shown(dialogue, [[item]], generators[:1], draw=draw)
        for i, kind in enumerate(outputs):
            if kind == "text":
                piece = self._written(dialogue, text, [seed[i]]).texts()[0]
                dialogue = say(self, dialogue, self._texts([piece], empty=True))
                yield piece
                continue
            (picture,) = self._draw(dialogue, [generators[i]], options)
            yield picture
            if i + 1 < len(outputs):
                dialogue = self._shown(dialogue, [[picture]], [generators[i]], draw=True)

    # ---- what the verbs share

    def _begin(self, n: int, system: str | None) -> list[Dialogue]:
        """n empty dialogues, or n that begin with a system prompt."""
        empty = [Dialogue()] * n
        return say(self, empty, self._texts([system] * n), system=True) if system else empty

    def noise(self, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Where a picture of (height, width) begins, [L, C]: drawn on the CPU in float32."""
        tokens = (size[0] // self.cfg.stride) * (size[1] // self.cfg.stride)
        return torch.randn(tokens, self.cfg.latent_dim, generator=generator, dtype=torch.float32, device="cpu")

    def _draw(self, dialogues: list[Dialogue], generators: Sequence[torch.Generator], options: Drawing) -> list[Image.Image]:
        """A picture after each dialogue: guided as an edit where pictures came before."""
        d = self.cfg.defaults
        most = self.cfg.stride * self.cfg.latent_side
        sizes = [drawable(options.size or x.size or d.size, self.cfg.stride, most) for x in dialogues]
        defaults = [d.edit if x.size else d.draw for x in dialogues]
        latents = self.denoise(
            dialogues,
            [self.noise(size, generator) for size, generator in zip(sizes, generators, strict=True)],
            sizes,
            guidance=[Guidance.of(one, its) for one, its in zip(options.guidance or defaults, defaults, strict=True)],
            steps=d.steps if options.steps is None else options.steps,
            shift=d.shift if options.shift is None else options.shift,
            taylor=options.taylor,
            progress=options.progress,
        )
        return [to_image(self.paint(x, size)) for x, size in zip(latents, sizes, strict=True)]

    def _texts(self, texts: Sequence[str], *, empty: bool = False) -> list[Item]:
        if not empty and any(not text.strip() for text in texts):
            raise ValueError("got an empty prompt: expected at least a word")
        return [self.items.text(self._words.encode(text)) for text in texts]

    @property
    def _words(self) -> TextTokenizer:
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer: add its tokenizer.json to the folder")
        return self.tokenizer

    def _written(self, dialogues: Sequence[Dialogue], sampling: TextSampling | None, seed: Sequence[int]) -> TextStream:
        """The model's own text after each dialogue."""
        sampling = (sampling or TextSampling()).within(self.cfg.defaults.think_tokens)
        steps = write(self, [d.main for d in dialogues], sampling, seed)
        return TextStream(steps, self._words.decode, len(dialogues), sampling.stop)

    def _shown(
        self, dialogues: Sequence[Dialogue], pictures: Sequence[Sequence], generators: Sequence, *, draw: bool
    ) -> list[Dialogue]:
        """Append each sample's pictures."""
        made = [[self._picture(one, g, draw=draw) for one in some] for some, g in zip(pictures, generators, strict=True)]
        return show(self, dialogues, made)

    def _picture(self, picture: Picture, generator: torch.Generator, *, draw: bool) -> tuple[list[Item], tuple[int, int]]:
        image, vae = open_image(picture), self.cfg.vae
        width, height = self.cfg.draw.size(image.width, image.height)
        grid = height // vae.stride, width // vae.stride
        noise = torch.randn(vae.latent_channels, *grid, generator=generator, dtype=torch.float32, device="cpu")
        return self.picture_items(image, noise=noise, draw=draw)


# ---- released files

WEIGHTS = ("ema.safetensors", "model.safetensors", "model.safetensors.index.json")
# released names on the left, ours on the right
EXPERTS = {"und": "", "gen": "_moe_gen"}


def _layer_keys(names: Mapping[str, str]) -> dict[str, str]:
    """A row for each expert: the generation expert's names end in _moe_gen."""
    theirs, ours = "language_model.model.layers.{{}}.{}.{{}}", "decoder.blocks.{{}}.streams.{}.{}.{{}}"
    rows = [(name.replace("*", suffix), stream, part) for stream, suffix in EXPERTS.items() for name, part in names.items()]
    return {theirs.format(name): ours.format(stream, part) for name, stream, part in rows}


DECODER_KEYS: Table = {
    "language_model.model.embed_tokens.{}": "decoder.embed.{}",
    "language_model.lm_head.{}": "decoder.head.{}",
    "language_model.model.norm.{}": "decoder.norms.und.{}",
    "language_model.model.norm_moe_gen.{}": "decoder.norms.gen.{}",
    **_layer_keys({"input_layernorm*": "attn_norm", "post_attention_layernorm*": "mlp_norm"}),
    **_layer_keys({f"self_attn.{p}_proj*": p for p in "qkvo"}),
    **_layer_keys({f"mlp*.{p}_proj": f"mlp.{p}" for p in ("gate", "up", "down")}),
}
QK_NORM_KEYS: Table = _layer_keys({f"self_attn.{p}_norm*": f"{p}_norm" for p in "qk"})
LOOK_KEYS: Table = {
    "vit_model.vision_model.embeddings.patch_embedding.{}": "vision.patch.{}",
    "vit_model.vision_model.embeddings.position_embedding.{}": "vision.positions.{}",
    "vit_model.vision_model.encoder.layers.{}.layer_norm1.{}": "vision.blocks.{}.attn_norm.{}",
    "vit_model.vision_model.encoder.layers.{}.layer_norm2.{}": "vision.blocks.{}.mlp_norm.{}",
    "vit_model.vision_model.encoder.layers.{}.self_attn.q_proj.{}": "vision.blocks.{}.q.{}",
    "vit_model.vision_model.encoder.layers.{}.self_attn.k_proj.{}": "vision.blocks.{}.k.{}",
    "vit_model.vision_model.encoder.layers.{}.self_attn.v_proj.{}": "vision.blocks.{}.v.{}",
    "vit_model.vision_model.encoder.layers.{}.self_attn.out_proj.{}": "vision.blocks.{}.o.{}",
    "vit_model.vision_model.encoder.layers.{}.mlp.{}.{}": "vision.blocks.{}.mlp.{}.{}",
    "vit_model.vision_model.post_layernorm.{}": "vision.norm.{}",
    "connector.{}.{}": "connector.{}.{}",
    "vit_pos_embed.pos_embed": "look_places",
}
DRAW_KEYS: Table = {
    "time_embedder.{*}": "time.{*}",
    "vae2llm.{}": "from_latent.{}",
    "llm2vae.{}": "to_velocity.{}",
    "latent_pos_embed.pos_embed": "latent_places",
}
VAE_KEYS: Table = {"{*}": "vae.{*}"}
KEYS: Table = {**DECODER_KEYS, **QK_NORM_KEYS, **LOOK_KEYS, **DRAW_KEYS}

VERBS = ("generate", "understand", "interleave")
HUB = "ByteDance-Seed/BAGEL-7B-MoT"
Bagel.RELEASES = {
    "bagel-nano": Release(family="Bagel", hub=None, licence="Apache-2.0", parameters=9_548_147, verbs=VERBS),
    HUB: Release(family="Bagel", hub=HUB, licence="Apache-2.0", parameters=14_691_079_811, verbs=VERBS),
}
