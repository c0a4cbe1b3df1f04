"""Packaging: the one place for metadata and dependencies. Tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "unimm" / "__init__.py").read_text(), re.MULTILINE).group(1)

# formats of datasets: parquet, Hugging Face's, frames of videos
DATA = ["pyarrow", "datasets", "av"]

# where training is seen
LOGGERS = {"tensorboard": ["tensorboard"], "wandb": ["wandb"]}

# adapters
LORA = ["peft>=0.18"]

# judges behind an endpoint, and detectors
EVAL = ["openai", "transformers"]

# the harness of others' benchmarks, which pins versions of its own, so that it is in no other extra; it imports a module
# that filelock 4 no longer has
LMMS_EVAL = ["lmms-eval>=0.7.3", "filelock<4"]

# the HTTP server
SERVE = ["fastapi", "uvicorn>=0.54", "python-multipart", "prometheus-client"]

# the page, a client of the server's engine. Not among the tests' packages: it allows Pillow before 13 alone, and the tests
# run with the newest. What models see of an image is the same with either (unimm.processing.images.io.resize)
APP = ["gradio>=6", *SERVE]

# replicas of the server and offline batches on a cluster; their tests are nightly, so that it is not among the tests' packages
RAY = ["ray[serve,data]>=2.60", *SERVE]

# Adam in 8 bits
TORCHAO = ["torchao"]

TEST = [
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "ruff",
    "mypy",
    "types-PyYAML",
    "nbclient",
    "nbformat",
    "ipykernel",
    "matplotlib",
    "diffusers",
    "webdataset",
    *LOGGERS["tensorboard"],
    *DATA,
    *LORA,
    *EVAL,
    *TORCHAO,
    *SERVE,
    "httpx",
]

DOCS = ["mkdocs-material", "mkdocstrings[python]"]

setup(
    name="unimm",
    version=VERSION,
    description="Unified multimodal models that understand and draw: one library, one environment, one API",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["unimm", "unimm.*"]),
    package_data={"unimm": ["py.typed", "pretrained/**", "training/recipes/*.yaml", "self_training/recipes/*.yaml"]},
    install_requires=[
        "torch>=2.9",
        "einops",
        "huggingface_hub",
        "numpy",
        "pillow>=10.1",
        "pydantic>=2",
        "pyyaml",
        "rich",
        "safetensors",
        "scipy",
        "sentencepiece",
        "timm>=1.0",
        "tokenizers",
        "torchvision",
        "tqdm",
        # as torch itself names it; without, every op still runs
        'triton; platform_system == "Linux"',
        "typer",
        "typing_extensions",
    ],
    extras_require={
        "app": APP,
        "data": DATA,
        "eval": EVAL,
        "lmms-eval": LMMS_EVAL,
        "lora": LORA,
        "ray": RAY,
        "serve": SERVE,
        "torchao": TORCHAO,
        **LOGGERS,
        "test": TEST,
        "docs": DOCS,
        "all": [*TEST, *DOCS],
    },
    entry_points={
        "console_scripts": ["unimm = unimm.cli.main:main"],
        # lmms-eval finds the models by this
        "lmms_eval.models": ["unimm = unimm.evaluation.adapters.lmms_eval_model:MANIFEST"],
    },
)
