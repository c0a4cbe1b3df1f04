"""BAGEL: Mixture-of-Transformers, generalized causal attention, rectified flow inside the language model.

Deng et al. 2025, arXiv 2505.14683. Released code: github.com/ByteDance-Seed/Bagel at 056b5fd, Apache-2.0.
Two experts share every attention: "und" owns text, ViT tokens and all markers, "gen" owns latent tokens.

Axes: N packed tokens, L latent tokens of a picture, D model, C features of a latent token, V vocabulary.
"""
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from unimm.checkpoint import Table, read_shapes, weight_files
from unimm.flow import Branch, Guidance, TaylorSeer, add_noise, guide, knots, sample, share
from unimm.kernels import Mask, attention
from unimm.models.decoder import Decoder, DecoderConfig, Parts, Route
from unimm.models.layers import MLP, TimeEmbedding, sincos_2d
from unimm.models.vision import NaViT, VisionConfig
from unimm.sampling import Cache, Context, TextSampling, decode
from unimm.sequence import IGNORE, Item, Layout, Pack, Past, Segment, Tokens, image_item, lay_out, pack, text_item
from unimm.tokenizers.pixels import Resize, open_image, patchify, places, to_image, to_tensor, unpatchify
from unimm.tokenizers.text import load_tokenizer
from unimm.tokenizers.vae import VAE, VAEConfig
from unimm.unified import Generation, Picture, Release, UnifiedModel, each, seeds

STREAMS = ("und", "gen")
THINK = (
    "You should first think about the {0} process in the mind and then {1} \n"
    "The {0} process is enclosed within <think> </think> tags, i.e. <think> {0} process here </think> {2} here"
)


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What the verbs do unless told otherwise: the released app's numbers. A nano brings its own."""

    steps: int = 49  # the app's 50 "timesteps" are knots
    shift: float = 3.0
    draw: Guidance = Guidance()
    edit: Guidance = Guidance(image=2.0, interval=(0.0, 1.0), renorm="text_channel")
    size: tuple[int, int] = (1024, 1024)
    think_tokens: int = 1000
    think_draw: str = THINK.format("planning", "generate the image.", "image")
    think_answer: str = THINK.format("reasoning", "provide the user with the answer.", "answer")


@dataclass(frozen=True, kw_only=True)
class Markers:
    """Ids around every text (bos, eos) and every image (boi, eoi)."""

    bos: int
    eos: int
    boi: int
    eoi: int

    STRINGS: ClassVar = {"bos": "<|im_start|>", "eos": "<|im_end|>", "boi": "<|vision_start|>", "eoi": "<|vision_end|>"}
    FILES: ClassVar = {"bos": "bos_token_id", "eos": "eos_token_id", "boi": "start_of_image", "eoi": "end_of_image"}


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
        top = _read(folder / "config.json")
        llm = _read(folder / "llm_config.json") or top.get("llm_config", {})
        vit = _read(folder / "vit_config.json") or top.get("vit_config", {})
        files = [name for name in WEIGHTS if (folder / name).exists()]
        shapes = read_shapes(weight_files(folder, WEIGHTS)) if files else {}
        return cls.from_files(llm, vit, top, {key.removeprefix("bagel."): shape for key, shape in shapes.items()})

    @classmethod
    def from_files(cls, llm: dict, vit: dict, top: dict, shapes: dict[str, tuple[int, ...]]) -> "BagelConfig":
        """From the released files' contents. Missing values are those that the released code writes into itself."""
        patch = top.get("latent_patch_size", 2)
        vae = VAEConfig.from_files(top.get("vae_config", {}))
        special = top.get("new_token_ids")
        vision = _vision_config(vit) if top.get("visual_und", True) else None
        return cls(
            decoder=_decoder_config(llm),
            vision=vision,
            draws=top.get("visual_gen", True),
            vae=vae,
            connector_act=top.get("connector_act", "gelu_pytorch_tanh"),
            latent_patch=patch,
            latent_side=_side(shapes, "latent_pos_embed.pos_embed") or top.get("max_latent_size", 64),
            look_side=_side(shapes, "vit_pos_embed.pos_embed") or top.get("vit_max_num_patch_per_side", 70),
            interpolate_places=top.get("interpolate_pos", False),
            train_shift=top.get("timestep_shift", 1.0),
            draw=_resize(top.get("vae_transform", {}), Resize(longest=1024, shortest=512, stride=patch * vae.stride)),
            look=_resize(top.get("vit_transform", {}), Resize(longest=980, shortest=224, stride=vit.get("patch_size", 14))),
            markers=Markers(**{ours: special[theirs] for ours, theirs in Markers.FILES.items()}) if special else None,
            defaults=_defaults(top.get("generation", {})),
        )

    def to_files(self) -> dict[str, dict[str, Any]]:
        """The contents of llm_config.json, vit_config.json and config.json."""
        d, v = self.decoder, self.vision
        llm = {theirs: getattr(d, ours) for ours, theirs in LLM_FIELDS.items()}
        llm |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": False}
        # the released config counts one layer more than the model keeps
        vit = {theirs: getattr(v, ours) for ours, theirs in VIT_FIELDS.items()} if v else {}
        vit |= {"num_hidden_layers": v.n_layers + 1, "image_size": v.side * v.patch, "model_type": "siglip_vision_model"} if v else {}
        top = {"architectures": ["BagelForConditionalGeneration"], "model_type": "bagel", "llm_config": llm, "vit_config": vit}
        top |= {"visual_gen": self.draws, "visual_und": v is not None, "vae_config": self.vae.to_files()}
        top |= {"latent_patch_size": self.latent_patch, "max_latent_size": self.latent_side, "timestep_shift": self.train_shift}
        top |= {"vit_max_num_patch_per_side": self.look_side, "connector_act": self.connector_act}
        top |= {"interpolate_pos": self.interpolate_places, "generation": asdict(self.defaults)}
        for name, rule in (("vae_transform", self.draw), ("vit_transform", self.look)):
            top[name] = {theirs: getattr(rule, ours) for ours, theirs in RESIZE_FIELDS.items()}
        if self.markers:
            top["new_token_ids"] = {theirs: getattr(self.markers, ours) for ours, theirs in Markers.FILES.items()}
        return {"llm_config.json": llm, "vit_config.json": vit, "config.json": top}


@dataclass(frozen=True)
class Losses:
    """Per token: cross entropy of every labelled row [n], squared error of every noised latent token [m, C]."""

    ce: Tensor
    mse: Tensor


@dataclass(frozen=True, eq=False)
class Dialogue:
    """What was said so far, thrice: all of it, without the last text, without the pictures. Equal ones are one object."""

    main: Context = Context()
    text: Context = Context()
    image: Context = Context()
    size: tuple[int, int] | None = None  # (height, width) of the last picture


class Bagel(UnifiedModel):
    """A decoder of two experts, a ViT to look with, a VAE to draw with."""

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
        look, draw = (LOOK_KEYS if self.cfg.vision else {}), (DRAW_KEYS if self.cfg.draws else {})
        qk = {} if self.cfg.decoder.qk_norm else {k for k in DECODER_KEYS if k.split(".")[-2][2:6] == "norm" and "self_attn" in k}
        main = {k: v for k, v in {**DECODER_KEYS, **look, **draw}.items() if k not in qk}
        return {WEIGHTS: main} | ({("ae.safetensors",): VAE_KEYS} if self.cfg.draws else {})

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
        hidden = self._run(batch, lambda layer, q, k, v: attention(q, k, v, batch.layout.mask), noise)
        at = (batch.labels != IGNORE).nonzero().squeeze(1)
        rows = torch.searchsorted(batch.streams["und"], batch.id_rows[at])
        logits = self.decoder.logits(hidden["und"][rows])
        ce = nn.functional.cross_entropy(logits.float(), batch.labels[at], reduction="none")
        if batch.draw is None:
            return Losses(ce, noise.new_zeros(0, self.cfg.latent_dim))
        target = noise - batch.draw.content
        v = self.velocity(hidden["gen"][batch.noised])
        return Losses(ce, (v.float() - target[batch.noised]).square())

    def _run(self, batch: Pack, attend: Any, noise: Tensor | None = None) -> Parts:
        return self.decoder(self.embed(batch, noise), batch.layout.positions, batch.streams, attend)

    # ---- items: what a text or a picture is in the sequence

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the decoder; the VAE keeps float32."""
        return self.decoder.embed.weight.dtype

    @property
    def markers(self) -> Markers:
        """Marker ids, from the tokenizer by string, or as a config gives them."""
        if self.tokenizer is None:
            if self.cfg.markers is None:
                raise ValueError("this checkpoint has no tokenizer and its config names no new_token_ids: add tokenizer.json")
            return self.cfg.markers
        ids = {name: self.tokenizer.id(token) for name, token in Markers.STRINGS.items()}
        if lost := [Markers.STRINGS[name] for name, found in ids.items() if found is None]:
            raise ValueError(f"the tokenizer lacks {', '.join(lost)}: expected the Qwen2.5 special tokens")
        return Markers(**ids)  # type: ignore[arg-type]

    def text(self, ids: Sequence[int]) -> Item:
        """[bos] ids [eos], without loss."""
        return text_item([self.markers.bos, *ids, self.markers.eos])

    def answer(self, ids: Sequence[int]) -> Item:
        """[bos] ids [eos], with the loss of the next id at all but the last."""
        m = self.markers
        return text_item([m.bos, *ids, m.eos], labels=[*ids, m.eos, IGNORE])

    def looked_at(self, pixels: Tensor) -> Item:
        """An image [3, h, w] in [-1, 1] as the ViT's patches."""
        if self.cfg.vision is None:
            raise NotImplementedError("this checkpoint was trained without its ViT (visual_und false) and cannot look at pictures")
        p = self.cfg.vision.patch
        where = places(pixels.shape[1] // p, pixels.shape[2] // p, self.cfg.look_side, interpolate=self.cfg.interpolate_places)
        return image_item("look", patchify(pixels, p), where, markers=(self.markers.boi, self.markers.eoi))

    def drawn(self, latent: Tensor, *, time: float = 0.0, noised: bool = False) -> Item:
        """A latent [z, h, w]: a clean picture of the past, or a noised target."""
        if not self.cfg.draws:
            raise NotImplementedError("this checkpoint was trained without its generation expert (visual_gen false) and cannot draw")
        p = self.cfg.latent_patch
        where = places(latent.shape[1] // p, latent.shape[2] // p, self.cfg.latent_side)
        markers = (self.markers.boi, self.markers.eoi)
        return image_item("draw", patchify(latent, p), where, markers=markers, time=time, noised=noised)

    # ---- contexts

    @torch.inference_mode()
    def extend(self, contexts: Sequence[Context], items: Sequence[Sequence[Item]]) -> list[Context]:
        """Append items to each context, all in one packed forward; the contexts given stay as they are.

        Raises ValueError where a context would outgrow the positions that the model knows.
        """
        lengths = [sum(item.segment.length for item in more) for more in items]
        cache = Cache(contexts, lengths, empty=self._empty())
        past = [cache.past(i) for i in range(len(contexts))]
        batch = pack(items, past, device=self.device)
        self._check_length(max(batch.layout.clocks))
        self._run(batch, cache.attend(past, batch.layout.mask))
        return [c.extended(cache.chunk(i, lengths[i]), batch.layout.clocks[i]) for i, c in enumerate(contexts)]

    def _empty(self) -> Tensor:
        d = self.cfg.decoder
        return torch.empty(d.n_layers, 2, 0, d.n_kv_heads, d.head_dim, dtype=self.dtype, device=self.device)

    def _check_length(self, clock: int) -> None:
        if clock > self.cfg.decoder.max_positions:
            raise ValueError(
                f"the dialogue would reach position {clock}, the model knows {self.cfg.decoder.max_positions}: shorten the prompt"
            )

    def _append(self, dialogues: Sequence[Dialogue], items: Sequence[Sequence[Item]], names: Sequence[str]) -> list[dict[str, Context]]:
        """Extend the named contexts of each dialogue by its items, equal ones once."""
        jobs = {(id(getattr(d, name)), i): getattr(d, name) for i, d in enumerate(dialogues) for name in names}
        done = dict(zip(jobs, self.extend(list(jobs.values()), [items[i] for _, i in jobs]), strict=True))
        return [{name: done[id(getattr(d, name)), i] for name in names} for i, d in enumerate(dialogues)]

    def say(self, dialogues: Sequence[Dialogue], texts: Sequence[Sequence[int]]) -> list[Dialogue]:
        """Append a text to each dialogue; its guidance context without the last text is the one before this one."""
        grown = self._append(dialogues, [[self.text(ids)] for ids in texts], ("main", "image"))
        return [replace(d, text=d.main, **more) for d, more in zip(dialogues, grown, strict=True)]

    def show(self, dialogues: Sequence[Dialogue], images: Sequence[Sequence[Item]], sizes: Sequence[tuple[int, int]]) -> list[Dialogue]:
        """Append a picture's items to each dialogue; the contexts without it are left out."""
        grown = self._append(dialogues, images, ("main",))
        return [
            replace(d, main=more["main"], text=more["main"], size=size)
            for d, more, size in zip(dialogues, grown, sizes, strict=True)
        ]

    @torch.inference_mode()
    def picture_items(self, image: Image.Image, *, noise: Tensor | None, draw: bool) -> tuple[list[Item], tuple[int, int]]:
        """A picture as items (`draw`: as latents, then) as patches, and its size (height, width) after the VAE's resize.

        noise [z, h, w] draws from the VAE's posterior, as the original always does; None takes its mean.
        """
        image = self.cfg.draw(image)
        look = self.looked_at(to_tensor(self.cfg.look(image)))
        if not draw:
            return [look], (image.height, image.width)
        pixels = to_tensor(image)[None].to(self.device)
        latent = self.vae.encode(pixels, noise=None if noise is None else noise[None].to(self.device))[0]
        return [self.drawn(latent.cpu()), look], (image.height, image.width)

    # ---- drawing and writing

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
        noise = torch.cat(list(noises)).to(self.device)
        x = sample(velocity, noise, knots(steps, shift), progress=progress)
        return list(x.split([len(one) for one in noises]))

    @torch.inference_mode()
    def paint(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Latent tokens [L, C] -> pixels [3, height, width] in [-1, 1]."""
        return self.vae.decode(unpatchify(tokens, self.cfg.latent_patch, size[0] // self.cfg.stride)[None])[0]

    def write(self, contexts: Sequence[Context], sampling: TextSampling, seed: Sequence[int]) -> Iterator[list[int | None]]:
        """Text after each context: one id a context at a time, None for those that have ended."""
        n = len(contexts)
        self._check_length(max(c.clock for c in contexts) + sampling.max_tokens)
        cache = Cache(contexts, [sampling.max_tokens] * n, empty=self._empty())
        one = [[Segment(length=1, attend="causal", advance=1)]] * n
        rows = {"und": torch.arange(n, device=self.device)}

        @torch.inference_mode()
        def step(ids: list[int], behind: int) -> Tensor:
            past = [cache.past(i, behind=behind) for i in range(n)]
            layout = lay_out(one, past, device=self.device)
            x = self.decoder.embed(torch.tensor(ids, device=self.device))
            return self.decoder.logits(self.decoder(x, layout.positions, rows, cache.attend(past, layout.mask))["und"])

        return decode(step, [self.markers.bos] * n, end=self.markers.eos, sampling=sampling, seeds=seed)

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
        guidance: Guidance | Sequence[Guidance] | None = None,
        text: TextSampling | None = None,
        taylor: bool = False,
        progress: bool = False,
    ) -> Generation:
        """Draw a picture for each prompt; with `images`, edit them; with `think`, write the reasoning first.

        prompt: one text or a batch of them. images: for one prompt a picture or several, for a batch one of these (or
        None) each. size: (height, width) in pixels, multiples of the stride; unless given, that of the last input
        picture after its resize, or the default. seed: one, or one a prompt; from one number, that number and the
        ones after it. steps: forwards of the sampler (the original's num_timesteps - 1). A picture does not depend on
        what else is in the batch. Raises ValueError for bad input, with what would be good.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        n, d = len(prompts), self.cfg.defaults
        pictures = _pictures(images, prompt)
        generators = [torch.Generator().manual_seed(s) for s in seeds(seed, n)]
        dialogues = self._tell([Dialogue()] * n, [d.think_draw] * n, to_text=False) if think else [Dialogue()] * n
        dialogues = self._show_all(dialogues, pictures, generators, draw=True)
        dialogues = self._tell(dialogues, prompts)
        texts: list[str] = []
        if think:
            texts = self._texts([x.main for x in dialogues], text or TextSampling(max_tokens=d.think_tokens), seeds(seed, n))
            dialogues = self._tell(dialogues, texts, only_main=True)
        sizes = [self._checked_size(size or x.size or d.size) for x in dialogues]
        default = [d.edit if given else d.draw for given in pictures]
        latents = self.denoise(
            dialogues,
            [self.noise(hw, g) for hw, g in zip(sizes, generators, strict=True)],
            sizes,
            guidance=default if guidance is None else each(guidance, n, "guidances"),
            steps=d.steps if steps is None else steps,
            shift=d.shift if shift is None else shift,
            taylor=taylor,
            progress=progress,
        )
        return Generation([to_image(self.paint(x, hw)) for x, hw in zip(latents, sizes, strict=True)], texts)

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
        questions = [question] if isinstance(question, str) else list(question)
        if stream and len(questions) > 1:
            raise ValueError(f"got {len(questions)} questions to stream: expected one")
        n, d = len(questions), self.cfg.defaults
        dialogues = self._tell([Dialogue()] * n, [d.think_answer] * n, to_text=False) if think else [Dialogue()] * n
        dialogues = self._show_all(dialogues, _pictures(images, question), [None] * n, draw=False)
        contexts = [x.main for x in self._tell(dialogues, questions)]
        sampling = text or TextSampling(max_tokens=d.think_tokens)
        if stream:
            return self._pieces(contexts[0], sampling, seeds(seed, 1))
        answers = self._texts(contexts, sampling, seeds(seed, n))
        return answers[0] if isinstance(question, str) else answers

    def interleave(
        self,
        items: Sequence[str | Picture],
        *,
        outputs: Sequence[str] = ("image",),
        size: tuple[int, int] | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: Guidance | None = None,
        text: TextSampling | None = None,
        progress: bool = False,
    ) -> Iterator[str | Image.Image]:
        """Go on from texts and pictures with texts and pictures, in the order of `outputs` ("text" or "image").

        Yields each piece as it is made; it enters the context (a picture by its pixels, through VAE and ViT), so the
        next piece knows it. A file is given as a Path; a str is always text. Picture i is drawn from seed + i.
        """
        if wrong := [kind for kind in outputs if kind not in ("text", "image")]:
            raise ValueError(f"got outputs {wrong}: expected a sequence of 'text' and 'image'")
        draw = "image" in outputs
        d, dialogue = self.cfg.defaults, [Dialogue()]
        generator = torch.Generator().manual_seed(seeds(seed, 1)[0])
        for item in items:
            seen = isinstance(item, str)
            dialogue = self._tell(dialogue, [item]) if seen else self._show_all(dialogue, [[item]], [generator], draw=draw)
        for i, kind in enumerate(outputs):
            if kind == "text":
                piece = self._texts([dialogue[0].main], text or TextSampling(max_tokens=d.think_tokens), [seed + i])[0]
                dialogue = self._tell(dialogue, [piece]) if piece else dialogue
                yield piece
                continue
            hw = self._checked_size(size or dialogue[0].size or d.size)
            generator = torch.Generator().manual_seed(seed + i)
            chosen = guidance or (d.edit if dialogue[0].size else d.draw)
            x = self.denoise(
                dialogue,
                [self.noise(hw, generator)],
                [hw],
                guidance=[chosen],
                steps=d.steps if steps is None else steps,
                shift=d.shift,
                progress=progress,
            )
            picture = to_image(self.paint(x[0], hw))
            yield picture
            if i + 1 < len(outputs):
                dialogue = self._show_all(dialogue, [[picture]], [generator], draw=True)

    # ---- what the verbs share

    def noise(self, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Where a picture of (height, width) begins, [L, C]: drawn on the CPU in float32."""
        tokens = (size[0] // self.cfg.stride) * (size[1] // self.cfg.stride)
        return torch.randn(tokens, self.cfg.latent_dim, generator=generator)

    def _checked_size(self, size: tuple[int, int]) -> tuple[int, int]:
        stride, most = self.cfg.stride, self.cfg.stride * self.cfg.latent_side
        near = tuple(min(most, max(stride, round(side / stride) * stride)) for side in size)
        if near != tuple(size):
            raise ValueError(
                f"cannot draw (height, width) {tuple(size)}: expected multiples of {stride} up to {most}; the nearest is {near}"
            )
        return near

    def _ids(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer: add its tokenizer.json to the folder")
        if not text.strip():
            raise ValueError("got an empty prompt: expected at least a word")
        return self.tokenizer.encode(text)

    def _tell(
        self, dialogues: Sequence[Dialogue], texts: Sequence[str], *, to_text: bool = True, only_main: bool = False
    ) -> list[Dialogue]:
        """Append texts. A system prompt leaves the text context behind (the next text moves it); reasoning moves main only."""
        ids = [self._ids(text) for text in texts]
        if only_main:
            grown = self._append(dialogues, [[self.text(one)] for one in ids], ("main",))
            return [replace(d, **more) for d, more in zip(dialogues, grown, strict=True)]
        said = self.say(dialogues, ids)
        return said if to_text else [replace(new, text=old.text) for new, old in zip(said, dialogues, strict=True)]

    def _show_all(
        self, dialogues: Sequence[Dialogue], pictures: Sequence[Sequence], generators: Sequence, *, draw: bool
    ) -> list[Dialogue]:
        """Append each sample's pictures, the first ones of all samples in one forward, then the second ones, ..."""
        out = list(dialogues)
        for turn in range(max(map(len, pictures))):
            at = [i for i, some in enumerate(pictures) if len(some) > turn]
            made = [self._picture(pictures[i][turn], generators[i], draw=draw) for i in at]
            shown = self.show([out[i] for i in at], [items for items, _ in made], [size for _, size in made])
            for i, dialogue in zip(at, shown, strict=True):
                out[i] = dialogue
        return out

    def _picture(self, picture: Picture, generator: torch.Generator | None, *, draw: bool) -> tuple[list[Item], tuple[int, int]]:
        image = open_image(picture)
        width, height = self.cfg.draw.size(image.width, image.height)
        shape = (self.cfg.vae.latent_channels, height // self.cfg.vae.stride, width // self.cfg.vae.stride)
        noise = torch.randn(shape, generator=generator) if draw else None
        return self.picture_items(image, noise=noise, draw=draw)

    def _texts(self, contexts: Sequence[Context], sampling: TextSampling, seed: Sequence[int]) -> list[str]:
        ids: list[list[int]] = [[] for _ in contexts]
        texts = [""] * len(contexts)
        for step in self.write(contexts, sampling, seed):
            for i, one in enumerate(step):
                ids[i] += [one] if one is not None and not _stopped(texts[i], sampling.stop) else []
            if sampling.stop:
                texts = [self.tokenizer.decode(one) for one in ids]
                if all(_stopped(text, sampling.stop) for text in texts):
                    break
        return [_cut(self.tokenizer.decode(one), sampling.stop) for one in ids]

    def _pieces(self, context: Context, sampling: TextSampling, seed: Sequence[int]) -> Iterator[str]:
        """The text piece by piece; what may still change (half a character, half a stop string) is held back."""
        ids: list[int] = []
        given, text = "", ""
        for (one,) in self.write([context], sampling, seed):
            ids.append(one)
            text = self.tokenizer.decode(ids)
            if _stopped(text, sampling.stop):
                break
            safe = text[: len(text) - max((len(s) for s in sampling.stop), default=0)]
            if len(safe) > len(given) and not safe.endswith("\ufffd") and safe.startswith(given):
                yield safe[len(given) :]
                given = safe
        yield _cut(text, sampling.stop)[len(given) :]


class Canvas:
    """The block [boi] noised latents [eoi] of every branch of guidance, packed over [context; itself] in one buffer."""

    def __init__(self, model: Bagel, dialogues: Sequence[Dialogue], grids: Sequence[tuple[int, int]]):
        self.model = model
        self.lengths = [h * w for h, w in grids]
        self.where = torch.cat([places(h, w, model.cfg.latent_side) for h, w in grids]).to(model.device)
        contexts: dict[int, Context] = {}
        self.slots: dict[Branch, int] = {}  # a branch -> its context in the cache; equal contexts share one
        rooms: list[int] = []
        seen: dict[tuple[int, int], int] = {}
        for i, dialogue in enumerate(dialogues):
            for name in ("main", "text", "image"):
                context = getattr(dialogue, name)
                slot = seen.setdefault((i, id(context)), len(rooms))
                if slot == len(rooms):
                    contexts[slot] = context
                    rooms.append(self.lengths[i] + 2)
                self.slots[i, name] = slot
        self.cache = Cache(list(contexts.values()), rooms, empty=model._empty())
        self.plans: dict[tuple[Branch, ...], tuple] = {}

    def canonical(self, branch: Branch) -> Branch:
        """The first branch that has the same context."""
        return next(other for other, slot in self.slots.items() if slot == self.slots[branch])

    def plan(self, branches: Sequence[Branch]) -> tuple:
        """Where the branches' rows come from and go to: the same at every step that asks for the same branches."""
        key = tuple(branches)
        if key not in self.plans:
            device, total = self.model.device, sum(self.lengths)
            ends = torch.tensor(self.lengths).cumsum(0).tolist()
            past = [self.cache.past(self.slots[branch]) for branch in branches]
            segments = [[Segment(length=self.lengths[i] + 2, attend="full", visible=False, advance=0)] for i, _ in branches]
            layout = lay_out(segments, past, device=device)
            # rows of the source [all latents; boi; eoi] in pack order, the same latents for every branch of a sample
            spans = [torch.arange(ends[i] - self.lengths[i], ends[i]) for i, _ in branches]
            source = torch.cat([torch.cat((torch.tensor([total]), span, torch.tensor([total + 1]))) for span in spans])
            latent = source < total
            rows = {"und": (~latent).nonzero().squeeze(1).to(device), "gen": latent.nonzero().squeeze(1).to(device)}
            self.plans[key] = (layout, source.to(device), rows, self.cache.attend(past, layout.mask))
        return self.plans[key]

    def features(self, x: Tensor, time: float, branches: Sequence[Branch]) -> list[Tensor]:
        """x [N, C] of all pictures -> for each branch the last hidden states [L, D] of its picture's latent tokens."""
        model, (layout, source, rows, attend) = self.model, self.plan(branches)
        tokens = model.latent_tokens(x, torch.tensor([time], device=x.device), self.where)
        markers = model.decoder.embed(torch.tensor([model.markers.boi, model.markers.eoi], device=x.device))
        block = torch.cat((tokens, markers)).index_select(0, source)
        hidden = model.decoder(block, layout.positions, rows, attend)["gen"]
        return list(hidden.split([self.lengths[i] for i, _ in branches]))


def _pictures(images: Any, prompt: str | Sequence[str]) -> list[list]:
    """Input pictures as a list for each prompt."""
    if isinstance(prompt, str):
        return [_listed(images)]
    if not prompt:
        raise ValueError("got no prompts: expected at least one")
    if images is not None and (not isinstance(images, list | tuple) or len(images) != len(prompt)):
        raise ValueError(f"got images for {len(prompt)} prompts: expected a list of {len(prompt)}, each a picture, a list or None")
    return [[] for _ in prompt] if images is None else [_listed(one) for one in images]


def _listed(images: Any) -> list:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def _stopped(text: str, stop: tuple[str, ...]) -> bool:
    return any(s in text for s in stop)


def _cut(text: str, stop: tuple[str, ...]) -> str:
    return text[: min((text.index(s) for s in stop if s in text), default=len(text))]


# ---- released files

WEIGHTS = ("ema.safetensors", "model.safetensors", "model.safetensors.index.json")

LLM_FIELDS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "mlp_dim": "intermediate_size",
    "vocab": "vocab_size",
    "max_positions": "max_position_embeddings",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "act": "hidden_act",
    "qk_norm": "qk_norm",
}
VIT_FIELDS = {
    "dim": "hidden_size",
    "n_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "patch": "patch_size",
    "channels": "num_channels",
    "norm_eps": "layer_norm_eps",
    "act": "hidden_act",
}
VIT_DEFAULTS = {"num_channels": 3, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}
RESIZE_FIELDS = {"longest": "max_image_size", "shortest": "min_image_size", "stride": "image_stride", "max_pixels": "max_pixels"}


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def _side(shapes: dict[str, tuple[int, ...]], table: str) -> int | None:
    return round(shapes[table][0] ** 0.5) if table in shapes else None


def _decoder_config(llm: dict) -> DecoderConfig:
    llm = {"qk_norm": True, **llm}
    fields: dict[str, Any] = {ours: llm[theirs] for ours, theirs in LLM_FIELDS.items()}
    return DecoderConfig(**fields, qkv_bias=True, streams=STREAMS)


def _vision_config(vit: dict) -> VisionConfig:
    if vit.get("rope"):
        raise ValueError("vit_config.json asks for rope: true; the released BAGEL has a table of positions, and this is it")
    vit = VIT_DEFAULTS | vit
    fields: dict[str, Any] = {ours: vit[theirs] for ours, theirs in VIT_FIELDS.items()}
    return VisionConfig(**fields, n_layers=vit["num_hidden_layers"] - 1, side=vit["image_size"] // vit["patch_size"])


def _resize(files: dict, default: Resize) -> Resize:
    return replace(default, **{ours: files[theirs] for ours, theirs in RESIZE_FIELDS.items() if theirs in files})


def _defaults(files: dict) -> Defaults:
    guidance = {k: Guidance(**{**files[k], "interval": tuple(files[k]["interval"])}) for k in ("draw", "edit") if k in files}
    sizes = {"size": tuple(files["size"])} if "size" in files else {}
    return Defaults(**{**files, **guidance, **sizes})


# released names on the left, ours on the right
DECODER_KEYS: Table = {
    "language_model.model.embed_tokens.{}": "decoder.embed.{}",
    "language_model.lm_head.{}": "decoder.head.{}",
    "language_model.model.norm.{}": "decoder.norms.und.{}",
    "language_model.model.norm_moe_gen.{}": "decoder.norms.gen.{}",
    **{
        f"language_model.model.layers.{{}}.{theirs.format(suffix)}.{{}}": f"decoder.blocks.{{}}.streams.{stream}.{ours}.{{}}"
        for stream, suffix in (("und", ""), ("gen", "_moe_gen"))
        for theirs, ours in {
            "input_layernorm{}": "attn_norm",
            "post_attention_layernorm{}": "mlp_norm",
            **{f"self_attn.{p}_proj{{}}": p for p in "qkvo"},
            **{f"self_attn.{p}_norm{{}}": f"{p}_norm" for p in "qk"},
            **{f"mlp{{}}.{p}_proj": f"mlp.{p}" for p in ("gate", "up", "down")},
        }.items()
    },
}
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
KEYS: Table = {**DECODER_KEYS, **LOOK_KEYS, **DRAW_KEYS}

RELEASES = {
    "ByteDance-Seed/BAGEL-7B-MoT": Release(
        family="Bagel",
        hub="ByteDance-Seed/BAGEL-7B-MoT",
        licence="Apache-2.0",
        parameters=14_691_079_811,
        verbs=("generate", "understand", "interleave"),
    ),
}
Bagel.RELEASES = RELEASES
