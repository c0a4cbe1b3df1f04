"""The three contexts of BAGEL's classifier-free guidance: a conversation as three KV caches, and how it grows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from unimm.generation.kv_cache import EMPTY_CACHE, KVCache
from unimm.sequence.parts import Part

CONTEXT_NAMES = ("full", "no_text", "no_image")
ImageParts = tuple[list[Part], tuple[int, int]]  # the parts of an image, and its (height, width) in pixels


@dataclass(frozen=True, eq=False)
class CFGContexts:
    """A conversation so far, as three KV caches; equal ones are one object.

    full: all of it. no_text: without the last text. no_image: without the images.
    """

    full: KVCache = EMPTY_CACHE
    no_text: KVCache = EMPTY_CACHE
    no_image: KVCache = EMPTY_CACHE
    image_size: tuple[int, int] | None = None  # (height, width) in pixels of the last image

    def with_text(self, grown: Mapping[str, KVCache], *, system: bool = False) -> "CFGContexts":
        """After a text: `grown` holds the caches with it; the context without the last text is then the one before it.

        A system prompt stays out of that context until the next text moves it past the prompt.
        """
        no_text = self.no_text if system else self.full
        return replace(self, full=grown["full"], no_image=grown["no_image"], no_text=no_text)

    def with_image(self, grown: Mapping[str, KVCache], size: tuple[int, int]) -> "CFGContexts":
        """After an image of (height, width): the context without images does not see it."""
        return replace(self, full=grown["full"], no_text=grown["full"], image_size=size)

    def with_reasoning(self, grown: Mapping[str, KVCache]) -> "CFGContexts":
        """After the model's own reasoning, which the released code keeps from both contexts of guidance."""
        return replace(self, full=grown["full"])


class ContextAppend:
    """Parts to append to the named contexts of each sample: which caches to prefill with which parts, each pair once.

    A cache that serves several contexts is prefilled once, and so is one that several samples share with the same
    parts.
    """

    def __init__(self, contexts: Sequence[CFGContexts], parts: Sequence[Sequence[Part]], names: Sequence[str]):
        jobs: dict[tuple[int, ...], tuple[KVCache, Sequence[Part]]] = {}
        self._keys: list[dict[str, tuple[int, ...]]] = []
        for sample, more in zip(contexts, parts, strict=True):
            keys = {name: (id(getattr(sample, name)), *map(id, more)) for name in names}
            jobs |= {key: (getattr(sample, name), more) for name, key in keys.items()}
            self._keys.append(keys)
        self._order = list(jobs)
        self.caches = [cache for cache, _ in jobs.values()]
        self.parts = [more for _, more in jobs.values()]

    def by_name(self, grown: Sequence[KVCache]) -> list[dict[str, KVCache]]:
        """The caches that came of `caches` and `parts`, in their order -> {context: its new cache} of each sample."""
        found = dict(zip(self._order, grown, strict=True))
        return [{name: found[key] for name, key in keys.items()} for keys in self._keys]
