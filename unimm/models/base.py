"""The base of every family: loading, saving, the two verbs that all have, and what these return.

What is written here is final: a family says what it is by class attributes and by the methods that are abstract here.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from PIL import Image
from typing_extensions import Self

from unimm.checkpoint import hub
from unimm.checkpoint.atomic import atomic_directory
from unimm.checkpoint.building import building
from unimm.checkpoint.devices import parse_device
from unimm.checkpoint.filling import LoadQuantization, weights_stay_in_files
from unimm.checkpoint.fitting import check_weights_fit
from unimm.checkpoint.keymap import KeyMap
from unimm.checkpoint.load import (
    check_weights,
    keep_weights_open,
    load_weights,
    materialize,
    parse_dtype,
    weight_files,
)
from unimm.checkpoint.save import MAX_SHARD_SIZE, check_all_saved, parse_bytes, released_tensors, save_weights
from unimm.generation.step_graphs import use_step_graphs
from unimm.generation.stepwise import ModelRequest, RequestRun
from unimm.generation.text_sampling import TextSampling
from unimm.kernels.weight_formats import WEIGHT_FORMATS
from unimm.models.adapted import AdaptedModel
from unimm.models.load_options import check_offload, check_quantize
from unimm.models.parallel_plan import ParallelPlan, TensorParallelPlan, find_modules
from unimm.models.registry import detect_family, optional_files
from unimm.models.release import Components, FamilyFiles, Release
from unimm.nn.block_stream import BlockStream
from unimm.nn.compiled import compile_blocks, compile_experts
from unimm.nn.packed_linear import optimize_for_cpu
from unimm.nn.quantized_linear import QuantizedLinear
from unimm.processing.requests import ImageInput
from unimm.tokenizers.text import TextTokenizer


@dataclass(frozen=True)
class Generation:
    """The result of `generate`: the images, in the order of the prompts, and with `think` the reasoning that led to
    each."""

    images: list[Image.Image]
    texts: list[str] = field(default_factory=list)

    @property
    def image(self) -> Image.Image:
        """The first image."""
        return self.images[0]

    @property
    def text(self) -> str:
        """The first reasoning text; empty without `think`."""
        return self.texts[0] if self.texts else ""


class UnifiedModel(AdaptedModel):
    """One model that both understands and generates images."""

    # ---- what a family is

    RELEASES: ClassVar[Mapping[str, Release]]
    FILES: ClassVar[FamilyFiles] = FamilyFiles()
    supports_thinking: ClassVar[bool] = False  # whether `generate` and `understand` take `think`
    supports_steps: ClassVar[bool] = True  # whether `generate` takes `steps`
    supports_editing: ClassVar[bool] = True  # whether releases were trained to edit the images given to `generate`
    # parts that `from_pretrained` takes from elsewhere; such a family is a ComponentModel
    COMPONENTS: ClassVar[tuple[str, ...]] = ()
    # layouts that `save_pretrained` can write; the model's own is its `checkpoint_layout`
    LAYOUTS: ClassVar[tuple[str, ...]] = ("original",)
    # a prefix that every key of some released files has
    KEY_PREFIX: ClassVar[str] = ""
    # patterns of parameters that nothing reads: zeros where a file lacks them
    UNUSED_PARAMETERS: ClassVar[tuple[str, ...]] = ()
    # prefixes of the parameters that stay in float32, as released, whatever dtype is asked for
    KEEP_FLOAT32: ClassVar[tuple[str, ...]] = ("vae.",)
    # the modules whose linears are quantized: the blocks, which are nearly all of the weights. Embeddings and heads stay,
    # since rounding them moves every token; norms and vectors have no matrix; encoders, projectors and the embedding of
    # the time are small and feed all blocks; an autoencoder's error is seen in every pixel
    QUANTIZED: ClassVar[tuple[str, ...]] = ("decoder.blocks",)
    # the modules whose linears `optimize_for_cpu` leaves as they are: those of encoders meet many rows at once
    UNPACKED: ClassVar[tuple[str, ...]] = ("vision", "vae")
    # beside the decoders' layers, the modules whose forward pass `compile` compiles, with `{}` for a number
    COMPILED: ClassVar[tuple[str, ...]] = ("vae.decoder",)
    # the method, of the model or of a part, that makes pixels of what was generated
    DECODES_IMAGES: ClassVar[str] = "decode_latents"
    # a benchmark's name -> from the config, the options of `generate` that its published scores were generated with,
    # where they are not the defaults
    BENCHMARK_OPTIONS: ClassVar[Mapping[str, Callable[[Any], Mapping[str, Any]]]] = {}

    # what lies in shards where the model is trained on many devices
    PARALLEL_PLAN: ClassVar[ParallelPlan]
    # how linears are shared where several devices generate together
    TENSOR_PARALLEL_PLAN: ClassVar[TensorParallelPlan]

    tokenizer: TextTokenizer | None
    checkpoint_layout: str = "original"
    # what brings the blocks to the device, with offload="cpu"
    block_stream: BlockStream | None = None

    @classmethod
    @abstractmethod
    def _build(cls, folder: Path) -> Self:
        """The model of a folder's config files, with its tokenizer, on the current default device, without weights."""

    @abstractmethod
    def key_maps(self) -> dict[tuple[str, ...], KeyMap]:
        """The key map of each file of weights, in `checkpoint_layout`; of a file's possible names the first is
        written."""

    @abstractmethod
    def save_config(self, folder: Path) -> None:
        """Write the released config files, in `checkpoint_layout`."""

    # ---- loading and saving

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """The model of a folder's config files, without weights.

        For the folder of another family the error names that family.
        """
        try:
            with building(folder):
                return cls._build(folder)
        except ValueError as error:
            if (family := detect_family(folder)) not in (None, cls.__name__):
                message = f"{folder} holds a {family}: load it with unimm.{family}, or with unimm.load"
                raise ValueError(message) from error
            raise

    @classmethod
    @keep_weights_open()
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: str | torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        components: Components | None = None,
        offload: str | None = None,
        quantize: str | None = None,
    ) -> Self:
        """Load a bundled name, a folder or a hub id, strictly, in evaluation mode.

        dtype: "float32" or "bfloat16"; a KL autoencoder stays in float32, as released. components: folders or hub ids
        of parts to take from elsewhere, by name; None leaves an optional part out; the family says which it has.
        offload: "disk" leaves the weights in their files, from which the CPU reads them as it needs them, so that they
        may be larger than the memory; `dtype` has to be the files'. "cpu" leaves the blocks of `QUANTIZED` in the CPU's
        memory, from which a GPU gets them one after the other as it needs them. quantize: "int8", "int4", "fp8" or
        "nf4" rounds the linears of `QUANTIZED` as they are read; such a model does not train. Raises ValueError for an
        unknown name, CheckpointError (a ValueError) for weights that do not fit, MemoryError where they cannot.
        """
        hub.parse_name(name, "a model")
        components = cls._parse_components(components)
        dtype = parse_dtype(dtype)
        device = parse_device(device)
        check_offload(offload, device)
        check_quantize(quantize, device, offload)
        stays_in_files = offload == "disk"
        streams_to = device if offload == "cpu" else None
        device = torch.device("cpu") if offload == "cpu" else device
        quantization = LoadQuantization(WEIGHT_FORMATS[quantize], cls.QUANTIZED, QuantizedLinear) if quantize else None
        folder = hub.resolve(
            name,
            revision=revision,
            known_names=tuple(cls.RELEASES),
            more_files=cls.FILES.downloads,
            non_commercial=cls.FILES.non_commercial,
        )
        with torch.device("meta"):
            model = cls.from_folder(folder)
        with weights_stay_in_files(stays_in_files):
            if not (stays_in_files or quantize):
                check_weights_fit(model, folder, keep_float32=cls.KEEP_FLOAT32, dtype=dtype, device=device)
            model._load_files(folder, dtype, device, quantization)
            materialize(model, cls.UNUSED_PARAMETERS, dtype=dtype, device=device)
            if cls.COMPONENTS:
                loader = cast("ComponentModel", model)
                loader.load_components(components, name=name, folder=folder, dtype=dtype, device=device)
        model.loaded_from = str(name)
        if streams_to is not None:
            model.block_stream = BlockStream(model, cls.QUANTIZED, streams_to)
        return model.eval()

    def _load_files(
        self, folder: Path, dtype: torch.dtype, device: torch.device, quantization: LoadQuantization | None
    ) -> None:
        """Load the model's own files of weights."""
        for names, key_map in self.key_maps().items():
            load_weights(
                self,
                weight_files(folder, names),
                key_map,
                prefix=self.KEY_PREFIX,
                dtype=torch.float32 if _all_targets_below(key_map, self.KEEP_FLOAT32) else dtype,
                device=device,
                quantization=quantization,
            )

    def optimize_for_cpu(self, *, int8: bool = False) -> Self:
        """This model made faster on a CPU: a copy over the same weights, of which the large ones are packed a second
        time for products of few rows, such as those of decoding. Results are the same to within rounding.

        int8: the linears of `QUANTIZED` are kept in int8 alone, each product about 1 % off; `from_pretrained(quantize=
        "int8")` makes the same without the weights as they were. Raises ValueError for int8 where PyTorch has no such
        products.
        """
        return optimize_for_cpu(self, skip=self.UNPACKED, int8=self.QUANTIZED if int8 else ())

    def compile(self, *, backend: str | Callable = "inductor", cuda_graphs: bool = True) -> None:
        """Compile the parts that repeat, in place: the layers of decoders around attention, and the modules of
        `COMPILED`. Results are the same to within rounding; prompts of other lengths and batches of other sizes need no
        new compilation.

        backend: of torch.compile. cuda_graphs: on a GPU each run records the step of denoising, and of decoding, as a
        CUDA graph, unless a step cache decides anew at every step. Raises ValueError for a model whose blocks are streamed
        to its device.
        """
        if self.block_stream is not None:
            raise ValueError('got a model with offload="cpu" to compile: expected one whose weights are on its device')
        compile_experts(self, backend=backend)
        compile_blocks(find_modules(self, self.COMPILED).values(), backend=backend)
        if cuda_graphs and self.device.type == "cuda":
            use_step_graphs(self)

    @classmethod
    def _parse_components(cls, components: Any) -> Components:
        """The parts to take from elsewhere. Raises ValueError for others than the family has, and for what is no
        place."""
        known = ", ".join(cls.COMPONENTS) or "none"
        if components is not None and not isinstance(components, Mapping):
            raise ValueError(
                f"got components {components!r:.80}: expected a mapping of names to folders or hub ids; a "
                f"{cls.__name__} has {known}"
            )
        given = dict(components or {})
        if unknown := sorted(str(name) for name in given if name not in cls.COMPONENTS):
            raise ValueError(f"got components {', '.join(unknown)} for a {cls.__name__}: expected {known}")
        if empty := [name for name, place in given.items() if isinstance(place, str) and not place]:
            raise ValueError(f"got an empty text for the component {empty[0]}: expected a folder or a hub id, or None")
        return {
            name: None if place is None else hub.parse_name(place, f"the component {name}")
            for name, place in given.items()
        }

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        layout: str | None = None,
        max_shard_size: int | str | None = MAX_SHARD_SIZE,
    ) -> None:
        """Write a released layout: config, weights, tokenizer; all are written before the first replaces an older one.

        dtype: what the weights are cast to, but for those that stay in float32; unless given, they are written as they
        are. layout: one of `LAYOUTS`; unless given, the one that the model came in. max_shard_size: weights of more bytes
        than this (or a text such as "5GB") are split into shards with an index; None for one file. Raises ValueError, and
        replaces nothing, for parameters that the layout has no place for (adapters, parametrized or quantized parts)
        and for files that would not load; compiled parts are saved as if they were not.
        """
        if layout is not None and layout not in self.LAYOUTS:
            raise ValueError(f"got layout {layout!r}: expected one of {', '.join(self.LAYOUTS)}")
        files, folders = optional_files()
        # the same parameters in a layout of their own: another thread may save this model, too
        written = copy.copy(self)
        written.checkpoint_layout = layout or self.checkpoint_layout
        parse_bytes(max_shard_size)
        key_maps = written.key_maps()
        with atomic_directory(
            hub.parse_folder(folder), optional_files=files, optional_folders=folders, weight_names=key_maps
        ) as partial:
            written.save_config(partial)
            check_all_saved(self, key_maps.values(), unused=self.UNUSED_PARAMETERS)
            for names, key_map in key_maps.items():
                is_cast = dtype is not None and not _all_targets_below(key_map, self.KEEP_FLOAT32)
                state = released_tensors(self, key_map, dtype=parse_dtype(dtype) if dtype and is_cast else None)
                save_weights(state, partial, names, max_shard_size=max_shard_size)
            if self.tokenizer is not None:
                self.tokenizer.save(partial)
            self._check_loads(partial)

    @classmethod
    @keep_weights_open()
    def _check_loads(cls, folder: Path) -> None:
        """Raise CheckpointError where a folder that was written would not load: parts were removed, or changed size."""
        with torch.device("meta"):
            model = cls.from_folder(folder)
        for names, key_map in model.key_maps().items():
            check_weights(model, weight_files(folder, names), key_map)

    def original_key_maps(self) -> list[KeyMap]:
        """The key maps of the original layout, whatever layout the model came in."""
        original = copy.copy(self)
        original.checkpoint_layout = "original"
        return list(original.key_maps().values())

    # ---- verbs

    @abstractmethod
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        images: ImageInput | Sequence | None = None,
        n: int = 1,
        size: tuple[int, int] | None = None,
        seed: int | Sequence[int] = 0,
        guidance: Any = None,
        progress: bool = False,
    ) -> Generation:
        """Generate `n` images for each prompt, or edit the images given with it.

        All families have these parameters in this order; `steps` (after `seed`), `think` (before `progress`) and
        options of its own (after `guidance`) where a family has them.
        """

    @abstractmethod
    def understand(
        self,
        images: ImageInput | Sequence | None,
        question: str | Sequence[str],
        *,
        stream: bool = False,
        text_sampling: TextSampling | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Any:
        """Answer a question about images: a str, a list of them for a batch, or (`stream`) an iterator of pieces."""

    def start_run(self, request: ModelRequest) -> RequestRun:
        """A request as work, pieces of which a scheduler may put into one forward with those of other requests.

        Its texts and images are those of the verbs for the same seed, to rounding. It reads and checks the request and
        computes nothing; the work has to run in inference mode. Raises ValueError for bad input, NotImplementedError
        for what the family lacks.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be served yet: call its verbs, or take another family")

    @classmethod
    def supported_options(cls, *, think: bool = False, steps: int | None = None) -> dict[str, Any]:
        """These options as keyword arguments of `generate`, for callers that do not know the family: those that are
        set.

        Raises NotImplementedError for one that is set and that this family does not have.
        """
        options: dict[str, Any] = {}
        if think:
            options["think"] = True
        if steps is not None:
            options["steps"] = steps
        supported = {"think": cls.supports_thinking, "steps": cls.supports_steps}
        if missing := [name for name in options if not supported[name]]:
            raise NotImplementedError(
                f"{cls.__name__} has no {' and no '.join(missing)}: leave it out, or take another family"
            )
        return options

    @property
    def device(self) -> torch.device:
        """The device of the weights, or that to which they are streamed."""
        return next(self.parameters()).device if self.block_stream is None else self.block_stream.device


class ComponentModel(ABC):
    """A model some of whose parts may lie in another folder or repository: `from_pretrained(..., components={name:
    where})`.
    """

    @abstractmethod
    def load_components(
        self, components: Components, *, name: str | Path, folder: Path, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Load the parts that are not among the model's own weights, or take them from elsewhere, after these are
        loaded.

        name: what the model was loaded by. folder: where it lies.
        """


def _all_targets_below(key_map: KeyMap, prefixes: tuple[str, ...]) -> bool:
    return all(name.startswith(prefixes) for name in key_map.our_names)
