"""The state of denoising a batch of MetaQuery images."""

from dataclasses import dataclass

from unimm.generation.flow import DPMSolverPP
from unimm.generation.step_cache import RowStepCache
from unimm.generation.step_graphs import StepGraphs
from unimm.models.metaquery.network import GuidanceBranches


@dataclass(frozen=True)
class MetaQueryLatentDenoiser:
    """The state of denoising P images: their conditions under guidance, and the solver's and the step cache's memory of
    earlier steps."""

    branches: GuidanceBranches
    solver: DPMSolverPP
    graphs: StepGraphs
    step_cache: RowStepCache | None = None
