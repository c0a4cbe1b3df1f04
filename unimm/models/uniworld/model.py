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
from unimm.checkpoint.keymap import Table
from unimm.checkpoint.load import HUB_WEIGHTS, parse_dtype
from unimm.denoisers.flux import grid
from unimm.denoisers.mmdit import SIDE, by_step, pack, unpack
from unimm.generation.causal_lm import check_position
from unimm.generation.decode import TextStream, speak
from unimm.generation.flow import dynamic_shift, knots, sample
from unimm.generation.kv_cache import EMPTY, Context, cache_of
from unimm.generation.text_sampling import TextSampling
from unimm.models.base import Generation
from unimm.models.common.mllm_conditioned import AroundReader
from unimm.models.uniworld import RELEASES
from unimm.models.uniworld.auxiliary_encoders import FLUX, SIGLIP, needed
from unimm.models.uniworld.config import DECIDER, FLUX_FOLDERS, SIGLIP_FOLDER, UniWorldConfig
from unimm.models.uniworld.network import UniWorldNetwork, padded
from unimm.models.uniworld.processor import LARGEST, Painting, References, UniWorldPrompts, any_ratio
from unimm.models.uniworld.weights import keys
from unimm.processing.images.io import open_image, to_image
from unimm.processing.requests import Picture, asked, drawable, pictures_of
from unimm.sequence.packing import pack as packed
from unimm.sequence.parts import Item
from unimm.tokenizers.text import load_tokenizer
from unimm.vlms.base import STREAM
from unimm.vlms.qwen2_5_vl.model import QwenVL
from unimm.vlms.qwen2_5_vl.processor import PLACEHOLDER

ANSWERER = "assistant"  # the head that decides looks at the last token that says so


@dataclass(frozen=True)
class Reading:
    """What the reader made of a sample: states after its final norm [n, D], and how to go on behind it."""

    items: Sequence[Item]
    states: Tensor
    context: Context  # of all rows but the last
    last: int  # the last row's id


class UniWorld(UniWorldNetwork, AroundReader):
    """The network with its verbs."""

    RELEASES = RELEASES
    FLOAT32 = ("parts.vae.", "decide.")

    def __init__(self, cfg: UniWorldConfig):
        super().__init__(cfg)
        self.tokenizer = None

    # ---- files

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """The model of a folder's config files, with its reader's tokenizer, without weights and without parts."""
        model = cls(UniWorldConfig.from_folder(folder))
        model.reader.tokenizer = load_tokenizer(folder)
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
        if not Path(name).expanduser().is_dir() and str(name) not in hub.bundled():  # a hub id
            siglip, flux = siglip or SIGLIP, flux or FLUX
        wanted = tuple(part for part in FLUX_FOLDERS if t5 or not part.endswith("_2"))
        around = folder if flux is None else hub.resolve(flux, parts=wanted)
        homes = {part: around / part for part in wanted}
        homes[SIGLIP_FOLDER] = folder / SIGLIP_FOLDER if siglip is None else hub.resolve(siglip)
        homes |= {
            part: hub.resolve(at) for part, at in model.cfg.parts.items() if part in homes and not homes[part].is_dir()
        }
        homes = {part: at for part, at in homes.items() if at.is_dir()}
        model.parts.take(homes, dtype=parse_dtype(dtype), device=device)
        model.parts.check(model.cfg)
        return model.eval()

    def weights(self) -> dict[tuple[str, ...], Table]:
        """The key table of each file of weights that there is a part for."""
        tables: dict[tuple[str, ...], Table] = {HUB_WEIGHTS: keys(self.cfg)}
        if self.decide is not None:
            tables[DECIDER] = {"0.{}": "decide.fc1.{}", "3.{}": "decide.fc2.{}"}
        return tables | self.parts.weights("parts.")

    def save_config(self, folder: Path) -> None:
        """Write config.json and preprocessor_config.json, those of the parts below, and all tokenizers."""
        for name, contents in (self.cfg.to_files() | self.parts.to_files()).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(contents, indent=2) + "\n")
        for name, tokenizer in ({".": self.reader.tokenizer} | self.parts.tokenizers()).items():
            if tokenizer is not None:
                (folder / name).mkdir(exist_ok=True)
                tokenizer.save(folder / name)

    # ---- reading

    @property
    def prompts(self) -> UniWorldPrompts:
        """How this model's prompts are made."""
        return UniWorldPrompts(reader=self.reader.prompts, system=self.cfg.system, in_front=self.cfg.in_front)

    @torch.no_grad()
    def read(self, samples: Sequence[Sequence[Item]], *, residual: float = 0.0) -> list[Reading]:
        """The reader's one pass over samples that `prompts` made, all in one pack.

        residual: how much of a picture's cells is what the tower gave for them, in place of the reader's state.
        """
        reader, lengths = self.reader, [sum(item.segment.length for item in items) for items in samples]
        cache = cache_of(reader, [EMPTY] * len(samples), lengths)
        past = [cache.past(i) for i in range(len(samples))]
        batch = packed(samples, past, device=self.device)
        check_position(reader, max(batch.layout.clocks))
        x, rows = reader.embed(batch), torch.arange(sum(lengths), device=self.device)
        attend = cache.attend(past, batch.layout.mask)
        hidden = reader.decoder(x, reader.positions(batch), {STREAM: rows}, attend)[STREAM]
        states = reader.decoder.norms[STREAM](hidden)
        if residual and batch.look:
            at = batch.look.rows
            states = states.index_copy(0, at, torch.lerp(states[at], x[at], residual))
        return [
            Reading(
                items, some, EMPTY.extended(cache.chunk(i, n - 1), batch.layout.clocks[i] - 1), int(items[-1].ids[-1])
            )
            for i, (items, some, n) in enumerate(zip(samples, states.split(lengths), lengths, strict=True))
        ]

    def decision(self, reading: Reading) -> Tensor:
        """The logits [2] of answering and of drawing; it draws where the second is larger. Raises ValueError without a head."""
        head = needed(self.decide, "head that decides", "a folder with task_head_final.pt or .safetensors")
        return head(self.asker([reading.items], [reading.states])[0].to(next(head.parameters()).dtype))

    def asker(self, samples: Sequence[Sequence[Item]], states: Sequence[Tensor]) -> Tensor:
        """The state of the last word that says whose turn it is, of each sample [B, D]: what the head decides by."""
        ids = self.reader.prompts.words.encode(ANSWERER)
        if len(ids) != 1:
            raise ValueError(f"the tokenizer makes {len(ids)} ids of {ANSWERER!r}: expected one, where the head looks")
        behind = [items[-1].ids.tolist()[::-1].index(ids[0]) + 1 for items in samples]
        return torch.stack([some[-n] for some, n in zip(states, behind, strict=True)])

    # ---- drawing

    @torch.inference_mode()
    def denoise(
        self,
        told: Sequence[Tensor],
        noises: Tensor,
        *,
        pooled: Tensor,
        guidance: float | Tensor,
        times: Tensor,
        text_guidance: Tensor | None = None,
        references: Tensor | None = None,
        progress: bool = False,
    ) -> Tensor:
        """From noise [B, C, h, w] to latents, at times [steps + 1]. references [B, C, r h, w]: pictures below the one drawn.

        text_guidance [B]: how far away from a picture of which nothing is told; 1, or None, is no such guidance. What
        depends on the time alone is computed for all steps before the first.
        """
        guided = text_guidance is not None and bool((text_guidance != 1).any())
        if guided:
            nothing = [told[0][:0]] * len(told)
            told, pooled = [*told, *nothing], torch.cat((pooled, pooled))
            guidance = guidance.repeat(2) if isinstance(guidance, Tensor) and guidance.ndim else guidance
        h, w = noises.shape[2:]
        text, seen = padded([one.to(self.dtype) for one in told])
        below = None if references is None else pack(references.to(self.device, self.dtype))
        rows = h // SIDE * (1 if references is None else 1 + references.shape[2] // h)
        condition = self.painter.condition(text, grid(rows, w // SIDE).to(self.device), seen=seen)
        scale = guidance if self.cfg.painter.guided else None
        steps = self.painter.modulations(times[:-1].to(self.device), pooled.to(self.dtype), guidance=scale)
        inner, n = by_step(self.painter, condition, steps), h * w // SIDE**2

        def velocity(x: Tensor, time: float) -> Tensor:
            # a reference is the same at every step, and nothing asks how it would move
            tokens = x.to(self.dtype) if below is None else torch.cat((x.to(self.dtype), below), 1)
            if text_guidance is None or not guided:
                return inner(tokens, time)[:, :n].float()
            v, plain = inner(torch.cat((tokens, tokens)), time)[:, :n].float().chunk(2)
            return torch.lerp(plain, v, text_guidance[:, None, None])

        return unpack(sample(velocity, pack(noises.to(self.device)), times, progress=progress), height=h, width=w)

    def times(self, size: tuple[int, int], steps: int, *, references: int = 0) -> Tensor:
        """FLUX's times for a picture of (height, width), and references of its size."""
        tokens = size[0] * size[1] // self.stride**2
        return knots(steps, dynamic_shift(tokens * (1 + references)))

    def noise(self, size: tuple[int, int], seed: int) -> Tensor:
        """What a picture of (height, width) begins from [C, h, w]."""
        height, width = (side * SIDE // self.stride for side in size)
        shape = self.cfg.latent_channels, height, width
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")

    @property
    def stride(self) -> int:
        """Pixels of a token, a side."""
        return SIDE * self.parts.autoencoder.config.stride

    def size_of(self, pictures: Sequence[Image.Image]) -> tuple[int, int]:
        """(height, width) of what is drawn from pictures: the ratio nearest to that of their mean height and width."""
        height, width = sum(one.height for one in pictures), sum(one.width for one in pictures)
        return any_ratio(height or 1, width or 1, pixels=self.cfg.pixels, ratios=self.cfg.ratios)

    @torch.inference_mode()
    def painted(
        self, readings: Sequence[Reading], prompts: Sequence[str], shown: Sequence[Sequence[Image.Image]], how: Painting
    ) -> list[Image.Image]:
        """Pictures for each reading, told with its pictures and captioned with its prompt; as many a reading as `how` says."""
        pictures = [picture for some in shown for picture in some]
        looks = self.parts.look(pictures) if pictures else None
        told = self.told([one.items for one in readings], [one.states for one in readings], looks)
        texts = [prompt.replace(PLACEHOLDER, "") for prompt in prompts]
        joined = self.parts.t5 is not None if how.t5 is None else how.t5
        if joined:
            captions = self.parts.captions(texts, self.cfg.t5_length)
            told = [torch.cat((one, caption)) for one, caption in zip(told, captions, strict=True)]
        # the original, too, gives CLIP no text where T5 has none
        pooled = self.pooled(texts if joined else [""] * len(texts), clip=how.clip)
        n = len(how.sizes) // len(readings)
        below: dict[int, Tensor] = {}
        sizes = [drawable(how.sizes[n * i] or self.size_of(some), self.stride, LARGEST) for i, some in enumerate(shown)]
        for i, some in enumerate(shown):
            if how.references and some:
                latents = self.parts.latents(some, sizes[i])
                if how.references == "tokens":
                    below |= {n * i + copy: rearrange(latents, "k c h w -> c (k h) w") for copy in range(n)}
                else:
                    told[i] = torch.cat((told[i], self.beside(latents)))
        rows = [i for i in range(len(told)) for _ in range(n)]
        return self.together([told[i] for i in rows], pooled[rows], [sizes[i] for i in rows], below, how)

    def together(
        self,
        told: Sequence[Tensor],
        pooled: Tensor,
        sizes: Sequence[tuple[int, int]],
        below: Mapping[int, Tensor],
        how: Painting,
    ) -> list[Image.Image]:
        """Pictures of one size, and of as many references, are painted as one batch; below [C, k h, w]: references."""
        alike: dict[tuple, list[int]] = {}
        for i, size in enumerate(sizes):
            alike.setdefault((size, below[i].shape[1] if i in below else 0), []).append(i)
        found: dict[int, Image.Image] = {}

        def scales(of: Sequence[float], rows: Sequence[int]) -> Tensor:
            return torch.tensor([of[i] for i in rows], dtype=torch.float32, device=self.device)

        for (size, rows_below), rows in alike.items():
            noises = torch.stack([self.noise(size, how.seeds[i]) for i in rows])
            latents = self.denoise(
                [told[i] for i in rows],
                noises,
                pooled=pooled[rows],
                guidance=scales(how.guidances, rows),
                text_guidance=scales(how.text_guidances, rows),
                times=self.times(size, how.steps, references=rows_below // noises.shape[2]),
                references=torch.stack([below[i] for i in rows]) if rows_below else None,
                progress=how.progress,
            )
            found |= {i: to_image(self.parts.paint(one[None])[0]) for i, one in zip(rows, latents, strict=True)}
        return [found[i] for i in range(len(sizes))]

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        images: Picture | Sequence | None = None,
        think: bool = False,
        size: tuple[int, int] | None = None,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        n: int = 1,
        guidance: float | Sequence[float] | None = None,
        text_guidance: float | Sequence[float] | None = None,
        t5: bool | None = None,
        clip: bool | None = None,
        references: References | None = None,
        residual: float = 0.0,
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
        prompts, pictures = asked(prompt, images)
        shown = [[open_image(picture) for picture in some] for some in pictures]
        if not 0 <= residual <= 1:
            raise ValueError(f"got residual {residual}: expected 0 to 1")
        cfg, many = self.cfg, len(prompts)
        number, references = cfg.steps if steps is None else steps, references or cfg.references
        given = Painting(steps=number, t5=t5, clip=clip, references=references, progress=progress)
        scales = (
            cfg.guidance if guidance is None else guidance,
            cfg.text_guidance if text_guidance is None else text_guidance,
        )
        how = given.of(many, n, stride=self.stride, size=size, seed=seed, guidance=scales[0], text_guidance=scales[1])
        samples = [self.prompts.drawing(words, some) for words, some in zip(prompts, shown, strict=True)]
        readings = self.read(samples, residual=residual)
        return Generation(self.painted(readings, prompts, shown, how))

    def respond(
        self,
        prompt: str,
        *,
        images: Picture | Sequence | None = None,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        text: TextSampling | None = None,
        progress: bool = False,
    ) -> str | Generation:
        """Answer a prompt, or draw it, as the head decides that read it: a str or a Generation. The prompt is read once.

        Raises ValueError for bad input, and for a checkpoint without the head.
        """
        (some,) = pictures_of(images, prompt)
        shown = [open_image(picture) for picture in some]
        cfg = self.cfg
        given = Painting(steps=cfg.steps if steps is None else steps, references=cfg.references, progress=progress)
        scales = {"guidance": cfg.guidance if guidance is None else guidance, "text_guidance": cfg.text_guidance}
        how = given.of(1, 1, stride=self.stride, size=size, seed=seed, **scales)
        (reading,) = self.read([self.prompts.drawing(prompt, shown)])
        answers, draws = self.decision(reading).tolist()
        if answers < draws:
            return Generation(self.painted([reading], [prompt], [shown], how))
        sampling = (text or TextSampling()).within(self.cfg.max_tokens)
        end, words = self.reader.cfg.markers.ends, self.reader.prompts.words
        steps_of = speak(self.reader, [reading.context], [reading.last], end=end, sampling=sampling, seeds=how.seeds)
        return TextStream(steps_of, words.decode, 1, sampling.stop).texts()[0]

    # ---- speaking

    @property
    def speaker(self) -> QwenVL:
        """The reader."""
        return self.reader
