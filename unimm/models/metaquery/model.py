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
from unimm.checkpoint.keymap import Table
from unimm.checkpoint.load import HUB_WEIGHTS, CheckpointError, load_into, read_shapes, weight_files
from unimm.denoisers.sana import Condition
from unimm.generation.causal_lm import check_position
from unimm.generation.flow import Velocity, in_whole_steps, sample_dpm, solver_knots
from unimm.generation.kv_cache import EMPTY, cache_of
from unimm.generation.prefill import extend
from unimm.models.base import Generation
from unimm.models.common.mllm_conditioned import AroundReader
from unimm.models.metaquery import RELEASES
from unimm.models.metaquery.config import MetaQueryConfig, home
from unimm.models.metaquery.network import LostHead, MetaQueryNetwork
from unimm.models.metaquery.processor import MARKERS, Asked, QueryPrompts, composer
from unimm.models.metaquery.weights import keys, shapes_in
from unimm.processing.images.io import open_image, to_image
from unimm.processing.requests import Picture, asked, drawable, each, seeds
from unimm.sequence.packing import pack
from unimm.sequence.parts import Item, text_item
from unimm.tokenizers.text import load_tokenizer
from unimm.vlms.base import Reader

LARGEST = 4096  # pixels a side of what is drawn


class MetaQuery(MetaQueryNetwork, AroundReader):
    """The network with its verbs."""

    RELEASES = RELEASES

    def __init__(self, cfg: MetaQueryConfig):
        super().__init__(cfg)
        self.tokenizer = None
        self.reader_source: str | Path = cfg.homes["mllm_id"]
        self._speaker: tuple[Reader, ...] = ()

    # ---- files

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """The model of a folder's config files, with its reader's tokenizer, without weights.

        Raises CheckpointError where the folder's weights are for another number of queries.
        """
        model = cls(MetaQueryConfig.from_folder(folder))
        name = model.cfg.homes["mllm_id"]
        model.reader.tokenizer = load_tokenizer(home(folder, name), special=model.reader.SPECIAL)
        below = home(folder, name)
        model.reader_source = below if any((below / one).exists() for one in HUB_WEIGHTS) else name
        model.fit(shapes_in(folder))
        return model

    def fit(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Leave out the language head where files of these shapes hold none. Raises CheckpointError for other queries."""
        table = self.kind.table(self.cfg.reader)
        rows = shapes.get(table, (self.cfg.n_rows,))[0]
        if rows != self.cfg.n_rows:
            vocab, n = self.cfg.reader.decoder.vocab, self.cfg.n_queries
            raise CheckpointError(
                f"{table} has {rows} rows, for {rows - vocab - MARKERS} queries behind {vocab} ids and {MARKERS} markers; "
                f"config.json says num_metaqueries {n}, {self.cfg.n_rows} rows: correct it, or fetch the files that go together"
            )
        head = self.kind.head(self.cfg.reader) + "weight"
        if shapes and head not in shapes and not self.cfg.reader.decoder.tied:
            self.reader.decoder.head = LostHead()  # type: ignore[assignment]

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: str | torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        reader: str | Path | None = None,
    ) -> Self:
        """As every family's; reader: the folder or hub id of the reader's own release, which then answers in `understand`.

        The original's training shrinks the old rows of the reader's table, which decay though they have no gradient, and
        its files hold no language head. Unless given, the reader's release is fetched when a lost head is needed.
        """
        model = super().from_pretrained(name, dtype=dtype, device=device, revision=revision)
        if reader is not None:
            model.reader_source = reader
            model._speaker = (model._own_reader(),)
        return model

    def weights(self) -> dict[tuple[str, ...], Table]:
        """The key table of the one file of weights."""
        held = not self.cfg.reader.decoder.tied and not isinstance(self.reader.decoder.head, LostHead)
        return {HUB_WEIGHTS: keys(self.cfg, self.kind, head=held)}

    def save_config(self, folder: Path) -> None:
        """Write config.json, and below the folder the configs of the parts, and the reader's tokenizer."""
        for name, contents in self.cfg.to_files().items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(contents, indent=2) + "\n")
        if self.reader.tokenizer is not None:
            self.reader.tokenizer.save(home(folder, self.cfg.homes["mllm_id"]))

    # ---- reading

    @property
    def prompts(self) -> QueryPrompts:
        """How this model's prompts are made."""
        cfg, reader = self.cfg, cast("Any", self.reader.prompts)
        if self.kind.pixels:
            pixels = replace(reader.pixels, min_pixels=cfg.min_pixels, max_pixels=cfg.max_pixels)
            reader = replace(reader, pixels=pixels)
        return QueryPrompts(
            composer(reader), self.kind.template, cfg.system, cfg.n_queries, cfg.reader.decoder.vocab,
            cfg.reader.markers.end, cfg.max_text,
        )  # fmt: skip

    @torch.inference_mode()
    def ask(self, samples: Sequence[Sequence[Item]]) -> Tensor:
        """The reader's answers [R, N, D] to samples that `prompts` made; what all begin with is read once."""
        prompts = self.prompts
        (begun,) = extend(self, [EMPTY], [[text_item(prompts.opening)]])
        rest = [prompts.rest(sample) for sample in samples]
        contexts = [begun.fork() for _ in rest]
        cache = cache_of(self, contexts, [sum(item.segment.length for item in items) for items in rest])
        past = [cache.past(i) for i in range(len(contexts))]
        batch = pack(rest, past, device=self.device)
        check_position(self, max(batch.layout.clocks))
        return self.answers(batch, cache.attend(past, batch.layout.mask))

    # ---- drawing

    def guided(self, condition: Condition, branches: Sequence[Sequence[tuple[int, float]]]) -> Velocity:
        """The velocity of latents [B, C, h, w] under each picture's rows of the condition, and their weights."""
        owners = torch.tensor([i for i, some in enumerate(branches) for _ in some], device=self.device)
        every = [w for some in branches for _, w in some]
        weights = torch.tensor(every, dtype=torch.float32, device=self.device)[:, None, None, None]
        seen = condition.rows(torch.tensor([row for some in branches for row, _ in some], device=self.device))

        def velocity(x: Tensor, time: float) -> Tensor:
            times = torch.full((len(owners),), time, dtype=torch.float32, device=x.device)
            v = self.painter(x[owners].to(self.dtype), times, seen)
            return torch.zeros_like(x).index_add(0, owners, weights * v.float())

        return velocity

    @torch.inference_mode()
    def denoise(self, velocity: Velocity, noises: Tensor, *, steps: int, progress: bool = False) -> Tensor:
        """From noise [B, C, h, w] to latents."""
        solver = self.cfg.solver
        times = solver_knots(steps, shift=solver.shift, trained=solver.trained)
        told = in_whole_steps(velocity, trained=solver.trained)
        return sample_dpm(told, noises.to(self.device), times, progress=progress)

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
        image_guidance: float | Sequence[float] | None = None,
        negative: str | Sequence[str] = "",
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
        prompts, pictures = asked(prompt, images)
        shown = [[open_image(picture) for picture in some] for some in pictures]
        cfg, many = self.cfg, len(prompts)
        scales = each(cfg.guidance if guidance is None else guidance, many, "guidances")
        image_scales = each(cfg.image_guidance if image_guidance is None else image_guidance, many, "image guidances")
        if n < 1 or not all(w >= 0 for w in (*scales, *image_scales)):
            raise ValueError(
                f"got n {n}, guidance {guidance}, {image_guidance}: expected a picture, and scales of 0 or more"
            )
        if any(not (words.strip() or some) for words, some in zip(prompts, shown, strict=True)):
            raise ValueError("got an empty prompt: expected at least a word, or a picture to draw from")
        height, width = drawable(cfg.size if size is None else size, cfg.vae.stride * cfg.painter.patch, LARGEST)
        seeded = seeds(seed, many, copies=n)
        reading = Asked(self.prompts)
        named = zip(prompts, shown, each(negative, many, "negative prompts"), scales, image_scales, strict=True)
        branches = [reading.branches(a, b, negative=c, text=float(d), image=float(e)) for a, b, c, d, e in named]
        shape = cfg.painter.in_channels, height // cfg.vae.stride, width // cfg.vae.stride
        with torch.inference_mode():
            condition = self.told(self.ask(reading.samples))
        latents = self.denoise(
            self.guided(condition, [some for some in branches for _ in range(n)]),
            torch.stack([_noise(shape, s) for s in seeded]),
            steps=cfg.steps if steps is None else steps,
            progress=progress,
        )
        return Generation([to_image(self.paint(one[None])[0]) for one in latents])

    # ---- speaking

    @property
    def speaker(self) -> Reader:
        """The frozen reader, as it was before it was asked to draw. Raises ValueError where a lost head cannot be had."""
        if not self._speaker and not isinstance(self.decoder.head, LostHead):
            return self.reader
        if not self._speaker:
            self._speaker = (self._own_reader(),)
        return self._speaker[0].to(self.device, self.dtype)

    def _own_reader(self) -> Reader:
        """This model's blocks and tower with the table and the head of the reader's own release."""
        try:
            paths = weight_files(hub.resolve(self.reader_source), HUB_WEIGHTS)
        except ValueError as error:
            raise ValueError(
                f"MetaQuery's files hold no language head, and {self.reader_source} has none to give ({error}): give "
                "from_pretrained the folder or hub id of the reader's own release, `reader`"
            ) from error
        with torch.device("meta"):
            model = self.kind.home(self.cfg.reader)
        for name, part in self.reader.named_children():
            if name != "decoder":
                setattr(model, name, part)
        for name, table in self.reader.named_parameters(recurse=False):
            setattr(model, name, table)
        model.tokenizer = self.reader.tokenizer
        model.decoder.blocks, model.decoder.norms = self.decoder.blocks, self.decoder.norms
        wanted = ("decoder.embed.", "decoder.head.")
        rows = {
            theirs: ours for theirs, ours in model.keys(read_shapes(paths)).items() if (ours or "").startswith(wanted)
        }
        load_into(model, paths, {**rows, "{*}": None}, dtype=self.dtype, device=self.device)
        return model.eval()


def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """What a picture begins from, drawn on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")
