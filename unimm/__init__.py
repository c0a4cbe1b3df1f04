"""Unified multimodal models: each both understands pictures and draws them, behind the same verbs."""
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unimm.flow import Guidance
    from unimm.models.bagel import Bagel, BagelConfig
    from unimm.models.janus import Janus, JanusConfig
    from unimm.models.janusflow import JanusFlow, JanusFlowConfig
    from unimm.models.metaquery import MetaQuery
    from unimm.models.metaquery_config import MetaQueryConfig
    from unimm.models.uniworld import UniWorld
    from unimm.models.uniworld_config import UniWorldConfig
    from unimm.registry import load, releases
    from unimm.sampling import CodeSampling, TextSampling
    from unimm.unified import Generation, UnifiedModel

__version__ = "0.1.0"
__all__ = [
    "Bagel",
    "BagelConfig",
    "CodeSampling",
    "Generation",
    "Guidance",
    "Janus",
    "JanusConfig",
    "JanusFlow",
    "JanusFlowConfig",
    "MetaQuery",
    "MetaQueryConfig",
    "TextSampling",
    "UniWorld",
    "UniWorldConfig",
    "UnifiedModel",
    "__version__",
    "load",
    "releases",
]

# imported when first asked for: `import unimm` costs next to nothing
_HOMES = {
    "Bagel": "unimm.models.bagel",
    "BagelConfig": "unimm.models.bagel",
    "CodeSampling": "unimm.sampling",
    "Generation": "unimm.unified",
    "Guidance": "unimm.flow",
    "Janus": "unimm.models.janus",
    "JanusConfig": "unimm.models.janus",
    "JanusFlow": "unimm.models.janusflow",
    "JanusFlowConfig": "unimm.models.janusflow",
    "MetaQuery": "unimm.models.metaquery",
    "MetaQueryConfig": "unimm.models.metaquery_config",
    "TextSampling": "unimm.sampling",
    "UniWorld": "unimm.models.uniworld",
    "UniWorldConfig": "unimm.models.uniworld_config",
    "UnifiedModel": "unimm.unified",
    "load": "unimm.registry",
    "releases": "unimm.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'unimm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
