"""JanusFlow: what is released."""
from typing import Any

HUB = "deepseek-ai/JanusFlow-1.3B"
VERBS = ("generate", "understand", "chat")
RELEASES: dict[str, dict[str, Any]] = {
    "janusflow-nano": {
        "family": "JanusFlow",
        "hub": None,
        "licence": "Apache-2.0",
        "parameters": 6_147_955,
        "verbs": VERBS,
    },
    HUB: {
        "family": "JanusFlow",
        "hub": HUB,
        "licence": "DeepSeek Model License",
        "parameters": 2_046_367_504,
        "verbs": VERBS,
    },
}
