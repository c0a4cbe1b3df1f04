"""What a case of the KL autoencoder stores, in FLUX's layout or in diffusers': latents and pixels."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from parity.case import Case
from unimm.tokenizers.kl import AutoencoderKL

EXPECTS = 'config.json with _class_name "AutoencoderKL", or with ch_mult'


def recognise(folder: Path) -> bool:
    """Whether a case's files are an autoencoder's."""
    config = folder / "config.json"
    files = json.loads(config.read_text()) if config.exists() else {}
    return "model_type" not in files and (files.get("_class_name") == "AutoencoderKL" or "ch_mult" in files)


@torch.inference_mode()
def check(case: Case) -> None:
    """Compare both ways."""
    vae, image = AutoencoderKL.from_pretrained(case.folder), case.input("image")
    mean, logvar = vae.moments(image)
    case.compare("moments", torch.cat((mean, logvar), 1))
    case.compare("mean", mean)
    case.compare("latent", vae.encode(image))
    if "posterior_noise" in case:
        case.compare("latent_sampled", vae.encode(image, noise=case.input("posterior_noise")))
    case.compare("decoded", vae.decode(case.input("z")))
