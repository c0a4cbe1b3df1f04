"""The options that BAGEL's published scores were generated with, where they are not the app's, which are the defaults.

From the evaluation scripts of the releases of BAGEL and of UniSandBox. They are for models with the released defaults:
one that has its own, as a nano, keeps them.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from unimm.generation.text_sampling import TextSampling
from unimm.models.bagel.config import BagelConfig
from unimm.models.bagel.processor import BagelDefaults

Options = Mapping[str, Any]


def for_released_defaults(options: Callable[[BagelDefaults], Options]) -> Callable[[BagelConfig], Options]:
    """The same options of a config, but for none where it has defaults of its own."""
    return lambda config: options(config.defaults) if config.defaults == BagelDefaults() else {}


def unisandbox_options(defaults: BagelDefaults) -> Options:
    """cfg_img_scale 1 (t2i.py); all else, thinking too, as in the app."""
    return {"guidance": replace(defaults.generate_guidance, image_scale=1.0)}


def wise_options(defaults: BagelDefaults) -> Options:
    """Reasoning is sampled, and may be twice as long (gen_images_mp_wise.py)."""
    guidance = replace(defaults.generate_guidance, image_scale=1.0)
    return {"guidance": guidance, "text_sampling": TextSampling(temperature=0.3, max_tokens=2048)}


def geneval_options(defaults: BagelDefaults) -> Options:
    """Guided at every step (gen_images_mp.py)."""
    return {"guidance": replace(defaults.generate_guidance, image_scale=1.0, interval=(0.0, 1.0))}


def imgedit_options(defaults: BagelDefaults) -> Options:
    """The scale of the images is 1.5, not the app's 2."""
    return {"guidance": replace(defaults.edit_guidance, image_scale=1.5)}


BENCHMARK_OPTIONS = {
    "unisandbox": for_released_defaults(unisandbox_options),
    "wise": for_released_defaults(wise_options),
    "geneval": for_released_defaults(geneval_options),
    "imgedit": for_released_defaults(imgedit_options),
}
