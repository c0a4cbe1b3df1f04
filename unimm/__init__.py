"""Unified multimodal models: each both understands and generates images, behind the same verbs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unimm.adapters.config import AdapterConfig
    from unimm.generation.guidance import Guidance
    from unimm.generation.image_tokens import ImageTokenSampling
    from unimm.generation.masked import MaskedSampling
    from unimm.generation.text_sampling import TextSampling
    from unimm.models.bagel.config import BagelConfig
    from unimm.models.bagel.model import Bagel
    from unimm.models.base import Generation, UnifiedModel
    from unimm.models.emu3.config import Emu3Config
    from unimm.models.emu3.model import Emu3
    from unimm.models.janus.config import JanusConfig
    from unimm.models.janus.model import Janus
    from unimm.models.janusflow.config import JanusFlowConfig
    from unimm.models.janusflow.model import JanusFlow
    from unimm.models.metaquery.config import MetaQueryConfig
    from unimm.models.metaquery.model import MetaQuery
    from unimm.models.registry import load, releases
    from unimm.models.show_o.config import ShowOConfig
    from unimm.models.show_o.model import ShowO
    from unimm.models.uniworld.config import UniWorldConfig
    from unimm.models.uniworld.model import UniWorld

__version__ = "0.1.0"
__all__ = [
    "AdapterConfig",
    "Bagel",
    "BagelConfig",
    "Emu3",
    "Emu3Config",
    "Generation",
    "Guidance",
    "ImageTokenSampling",
    "Janus",
    "JanusConfig",
    "JanusFlow",
    "JanusFlowConfig",
    "MaskedSampling",
    "MetaQuery",
    "MetaQueryConfig",
    "ShowO",
    "ShowOConfig",
    "TextSampling",
    "UniWorld",
    "UniWorldConfig",
    "UnifiedModel",
    "__version__",
    "load",
    "releases",
]

# imported at first use: `import unimm` costs next to nothing
_MODULES = {
    "AdapterConfig": "unimm.adapters.config",
    "Bagel": "unimm.models.bagel.model",
    "BagelConfig": "unimm.models.bagel.config",
    "Emu3": "unimm.models.emu3.model",
    "Emu3Config": "unimm.models.emu3.config",
    "ImageTokenSampling": "unimm.generation.image_tokens",
    "Generation": "unimm.models.base",
    "Guidance": "unimm.generation.guidance",
    "Janus": "unimm.models.janus.model",
    "JanusConfig": "unimm.models.janus.config",
    "JanusFlow": "unimm.models.janusflow.model",
    "JanusFlowConfig": "unimm.models.janusflow.config",
    "MaskedSampling": "unimm.generation.masked",
    "MetaQuery": "unimm.models.metaquery.model",
    "MetaQueryConfig": "unimm.models.metaquery.config",
    "ShowO": "unimm.models.show_o.model",
    "ShowOConfig": "unimm.models.show_o.config",
    "TextSampling": "unimm.generation.text_sampling",
    "UniWorld": "unimm.models.uniworld.model",
    "UniWorldConfig": "unimm.models.uniworld.config",
    "UnifiedModel": "unimm.models.base",
    "load": "unimm.models.registry",
    "releases": "unimm.models.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'unimm' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
