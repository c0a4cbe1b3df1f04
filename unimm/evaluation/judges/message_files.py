"""The questions of a judge, read from the script that a benchmark publishes, which is parsed and never run.

Of `return [{"role": "user", "content": [{"type": "text", "text": f"Rate: {item['Prompt']}"}, {"type": "image_url", ...}]}]`
in any function it takes the roles, the texts with the fields that they name, and the places of images.
"""

import ast
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

IMAGE = "<image>"


@dataclass(frozen=True, kw_only=True)
class Field:
    """A place in a text for a value."""

    name: str


Piece = str | Field  # IMAGE stands for an image


@dataclass(frozen=True, kw_only=True)
class MessageTemplate:
    """A system prompt, and the pieces of a user's message."""

    system: str
    user: tuple[Piece, ...]

    @property
    def fields(self) -> set[str]:
        """The names of its fields."""
        return {piece.name for piece in self.user if isinstance(piece, Field)}

    @property
    def sha256(self) -> str:
        """Of all its texts."""
        pieces = [piece if isinstance(piece, str) else {"field": piece.name} for piece in self.user]
        return hashlib.sha256(json.dumps([self.system, pieces]).encode()).hexdigest()

    def fill(self, values: Mapping[str, str], image: Image.Image) -> tuple[str | Image.Image, ...]:
        """The parts of a question: texts, and the image in its place."""
        parts: list[str | Image.Image] = []
        text = ""
        for piece in self.user:
            if piece == IMAGE:
                parts += [text, image] if text else [image]
                text = ""
            else:
                text += values[piece.name] if isinstance(piece, Field) else piece
        return (*parts, text) if text else tuple(parts)


def read_message_template(path: Path, fields: tuple[str, ...]) -> MessageTemplate:
    """The messages of a script, or of a JSON file {"system": ..., "user": "... {FIELD} ..."} whose image comes last.

    fields: those that it must name. Raises ValueError, with the file, where it has no such messages.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; expected the questions of a judge") from error
    template = _from_json(path, text, fields) if path.suffix == ".json" else _from_script(path, text)
    if missing := [name for name in fields if name not in template.fields]:
        raise ValueError(f"the questions in {path} do not name {missing[0]}: expected {', '.join(fields)}")
    return template


def _from_json(path: Path, text: str, fields: tuple[str, ...]) -> MessageTemplate:
    try:
        contents = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    user = contents.get("user") if isinstance(contents, dict) else None
    if not isinstance(user, str):
        raise ValueError(f'{path} has no "user": expected a text with {{{"}, {".join(fields)}}} in it')
    pieces: list[Piece] = [user]
    for name in fields:
        pieces = [part for piece in pieces for part in _split(piece, name)]
    return MessageTemplate(system=str(contents.get("system") or ""), user=(*pieces, IMAGE))


def _split(piece: Piece, name: str) -> Iterator[Piece]:
    if isinstance(piece, Field):
        yield piece
        return
    for i, part in enumerate(piece.split(f"{{{name}}}")):
        if i:
            yield Field(name=name)
        if part:
            yield part


def _from_script(path: Path, text: str) -> MessageTemplate:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}; fetch it again") from error
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        messages = _messages(node)
        if messages:
            return _template(path, messages, constants)
    raise ValueError(
        f'found no messages with a "role" in {path}: expected the script that asks the judge, or a JSON file of '
        '{"system": ..., "user": ...}'
    )


def _messages(node: ast.AST) -> list[dict[str, ast.expr]]:
    """The messages of a list of dicts that have a role each."""
    if not isinstance(node, ast.List) or not node.elts:
        return []
    found = [_items(one) for one in node.elts]
    return found if all("role" in one and "content" in one for one in found) else []


def _items(node: ast.expr) -> dict[str, ast.expr]:
    if not isinstance(node, ast.Dict):
        return {}
    pairs = zip(node.keys, node.values, strict=True)
    return {key.value: value for key, value in pairs if isinstance(key, ast.Constant) and isinstance(key.value, str)}


def _template(path: Path, messages: list[dict[str, ast.expr]], constants: Mapping[str, ast.expr]) -> MessageTemplate:
    system = ""
    user: list[Piece] = []
    for message in messages:
        role = message["role"].value if isinstance(message["role"], ast.Constant) else None
        content = message["content"]
        parts = content.elts if isinstance(content, ast.List) else [content]
        pieces = [piece for part in parts for piece in _part(path, part, constants)]
        if role == "system":
            system += "".join(piece for piece in pieces if isinstance(piece, str))
        elif role == "user":
            user += pieces
    return MessageTemplate(system=system, user=tuple(user))


def _part(path: Path, node: ast.expr, constants: Mapping[str, ast.expr]) -> list[Piece]:
    """A part of a message: {"type": "text", ...}, {"type": "image_url", ...}, or a text itself."""
    items = _items(node)
    if "image_url" in items:
        return [IMAGE]
    return _text(path, items.get("text", node), constants)


def _text(path: Path, node: ast.expr, constants: Mapping[str, ast.expr]) -> list[Piece]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return [piece for one in node.values for piece in _text(path, one, constants)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(path, node.left, constants) + _text(path, node.right, constants)
    if isinstance(node, ast.FormattedValue):
        return _text(path, node.value, constants)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return [Field(name=str(node.slice.value))]
    if isinstance(node, ast.Name):
        return _text(path, constants[node.id], constants) if node.id in constants else [Field(name=node.id)]
    raise ValueError(
        f"cannot read line {node.lineno} of {path}: expected a text, and fields such as {{item['Prompt']}}; write the "
        'questions into a JSON file of {"system": ..., "user": ...}'
    )
