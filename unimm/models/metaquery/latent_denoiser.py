"""The state of denoising a batch of MetaQuery images."""

from dataclasses import dataclass

from unimm.generation.flow import DPMSolverPP
from unimm.models.metaquery.network import GuidanceBranches


@dataclass(frozen=True)
class MetaQueryLatentDenoiser:
    """The state of denoising P images: their conditions under guidance, and the solver's memory of their last steps."""

    branches: GuidanceBranches
    solver: DPMSolverPP
