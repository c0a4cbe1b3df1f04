"""Muon and AdamW for the parameters of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from unimm.training.config import TrainConfig
from unimm.training.freezing import check_prefixes, has_prefix


def build_optimizers(model: nn.Module, recipe: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices that the recipe names, AdamW for the rest; one alone where the other has nothing.

    Muon is that of Jordan et al. 2024, scaled as in arXiv 2502.16982, section 2.2, so that AdamW's learning rate fits.
    Matrices are decayed, but for those that the recipe excepts; vectors are not.
    """
    check_prefixes(model, recipe.muon, where="muon")
    check_prefixes(model, recipe.no_weight_decay, where="no_weight_decay")
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    is_muon = {name: p.ndim == 2 and has_prefix(name, recipe.muon) for name, p in trained}

    def groups(*, muon: bool) -> list[dict[str, Any]]:
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, p in trained:
            if is_muon[name] == muon:
                (others if p.ndim < 2 or has_prefix(name, recipe.no_weight_decay) else decayed).append(p)
        parts = ((decayed, recipe.weight_decay), (others, 0.0))
        return [{"params": params, "weight_decay": decay} for params, decay in parts if params]

    found: list[torch.optim.Optimizer] = []
    if any(is_muon.values()):
        found.append(torch.optim.Muon(groups(muon=True), lr=recipe.lr, adjust_lr_fn="match_rms_adamw"))
    if not all(is_muon.values()):
        found.append(
            torch.optim.AdamW(groups(muon=False), lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)
        )
    return found
