"""Janus and Janus-Pro: what is released."""
from typing import Any

VERBS = ("generate", "understand", "chat")
DEEPSEEK: dict[str, Any] = {"family": "Janus", "licence": "DeepSeek Model License", "verbs": VERBS}
RELEASES: dict[str, dict[str, Any]] = {
    "janus-nano": {"family": "Janus", "hub": None, "licence": "Apache-2.0", "parameters": 7_396_843, "verbs": VERBS},
    "deepseek-ai/Janus-1.3B": DEEPSEEK | {"hub": "deepseek-ai/Janus-1.3B", "parameters": 2_089_297_547},
    "deepseek-ai/Janus-Pro-1B": DEEPSEEK | {"hub": "deepseek-ai/Janus-Pro-1B", "parameters": 2_089_297_547},
    "deepseek-ai/Janus-Pro-7B": DEEPSEEK | {"hub": "deepseek-ai/Janus-Pro-7B", "parameters": 7_420_434_059},
}
