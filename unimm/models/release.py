"""Released checkpoints as data; imports nothing heavy."""

from dataclasses import dataclass

from unimm.checkpoint import hub


@dataclass(frozen=True, kw_only=True)
class Release:
    """A released checkpoint: where it lies, under which licence, how large it is, what it can do."""

    family: str
    hub: str | None  # None: bundled with the package
    licence: str
    parameters: int
    verbs: tuple[str, ...]

    @property
    def commercial(self) -> bool:
        """Whether the licence allows commercial use, in some form: it may name conditions."""
        return self.hub not in hub.NON_COMMERCIAL
