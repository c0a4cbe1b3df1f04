"""A checkout of UniSandBox in small: files in its formats, with its odd keys, and judges' texts of ours in its places."""

import json
from pathlib import Path

TEXTS = {
    "eval_math.py": (
        'CAPTION_PROMPT = """Name and count."""\n\n'
        'EVALUATION_PROMPT_TEMPLATE = """{caption} for {expected_answer}?"""\n'
    ),
    "eval_mapping.py": (
        'IDENTIFICATION_PROMPT = "Name it."\nEVALUATION_PROMPT_TEMPLATE = "{identified_object} for {expected_answer}?"\n'
    ),
    "eval_knowledge.py": (
        'CAPTION_PROMPT = (\n"One line.\\n"\n"Strictly.\\n"\n)\nEVAL_PROMPT_TEMPLATE = ("{caption} for {gt}?")\n'
        'print("never run")\nraise SystemExit\n'
    ),
}
MATH = {
    1: [("1", "Show cups: 8 / 4.", "2 cups."), ("99", "Show belts: 11 / 4 equals then rounded down.", "2 belts.")],
    2: [("9", "Show pens: 10 % 3 + 1.", "4 pens"), ("3", "Show dogs: 10 / \u221a25.", "2 dog")],
    3: [
        ("1", "Show figs: 3 + 2 - \u221a25.", "1 fig"),
        ("76", "Show (7 % 5) * 1 + 3.", "5 toys"),
        ("6", "Show books: 2 + 2 * 1", "4 books"),
    ],
}


def mapping(name: str) -> list[dict]:
    rules = "Rule 1: 'A' means a cup. Rule 2: 'B' means a fork."
    return [
        {"ID": name, "Question_A": f"{rules} Draw 'A'.", "Answer": "cup"},
        {"ID": name, "Question_B": f"{rules} Draw 'B'.", "Answer": "fork"},
    ]


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def checkout(folder: Path) -> Path:
    """A small checkout below a folder."""
    reasoning, knowledge = folder / "benchmark" / "test_reasoning", folder / "benchmark" / "test_knowledge"
    for level, rows in MATH.items():
        made = [{"Question": question, "Answer": answer, "id": name} for name, question, answer in rows]
        write_lines(reasoning / f"math_{level}.jsonl", made)
        write_lines(reasoning / f"mapping{level}.jsonl", [*mapping("1"), *mapping("12")])
    portrait = {"ID": 5, "Question": "Draw Aurelius.", "Answer": "A young man."}
    write_lines(knowledge / "Aurelius.jsonl", [portrait, {"ID": 15, "Question": "Draw the fruit.", "Answer": "grapes"}])
    write_lines(knowledge / "Aurelius_Nyxella.jsonl", [{"ID": 39, "Question": "Who likes figs?", "Answer": "A woman."}])
    for name, text in TEXTS.items():
        (folder / "eval").mkdir(exist_ok=True)
        (folder / "eval" / name).write_text(text)
    return folder
