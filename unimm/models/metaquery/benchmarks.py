"""The options that MetaQuery's published scores were generated with, where they are not the demo's, which are the
defaults."""

from collections.abc import Mapping
from typing import Any

from unimm.models.metaquery.config import MetaQueryConfig


def evaluation_options(config: MetaQueryConfig) -> Mapping[str, Any]:
    """The released evaluation's guidance; a model with a guidance of its own, as a nano, keeps it."""
    return {"guidance": 7.5} if config.guidance == MetaQueryConfig.guidance else {}


BENCHMARK_OPTIONS = {"geneval": evaluation_options, "wise": evaluation_options}
