"""Reasoning inside an answer: what stands between <think> and </think>, told apart while it is streamed."""

BEGIN = "<think>"
END = "</think>"


class ThinkSplitter:
    """Pieces of a text as (channel, text), "reasoning" between the tags and "text" outside; half a tag is held back."""

    def __init__(self, *, enabled: bool):
        self.enabled = enabled
        self._pending = ""
        self._is_reasoning = False

    def push(self, piece: str) -> list[tuple[str, str]]:
        """What is certain with one more piece."""
        if not self.enabled:
            return [("text", piece)]
        self._pending += piece
        found = []
        while (at := self._pending.find(self._tag)) >= 0:
            found.append(self._as_piece(self._pending[:at]))
            self._pending = self._pending[at + len(self._tag) :]
            self._is_reasoning = not self._is_reasoning
        held = next((n for n in range(len(self._tag) - 1, 0, -1) if self._pending.endswith(self._tag[:n])), 0)
        end = len(self._pending) - held
        found.append(self._as_piece(self._pending[:end]))
        self._pending = self._pending[end:]
        return [one for one in found if one[1]]

    def rest(self) -> list[tuple[str, str]]:
        """What was held back, once the text has ended; the next text begins outside of the tags."""
        piece = self._as_piece(self._pending)
        self._pending = ""
        self._is_reasoning = False
        return [piece] if piece[1] else []

    @property
    def _tag(self) -> str:
        return END if self._is_reasoning else BEGIN

    def _as_piece(self, text: str) -> tuple[str, str]:
        return "reasoning" if self._is_reasoning else "text", text
