"""Packaging. `kernels/` and `data/` stand at the top of the repository but install as
`nanolm.kernels` and `nanolm.data`; the wheel holds nothing but `nanolm`."""

import pathlib

from setuptools import setup

FINETUNE = ["rouge-score", "sacrebleu", "scikit-learn", "seqeval"]
DEV = [
    *FINETUNE,
    "datasets",
    "flask",
    "flask-cors",
    "hypothesis",
    "moto[s3]",
    "peft",
    "pytest",
    "pytest-xdist",
    "ruff",
    "setuptools",
    "transformers",
    "wheel",
]

setup(
    name="nanolm",
    version="0.1.0",
    description="A from-scratch transformer pretraining framework, small enough to read",
    long_description=pathlib.Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        "nanolm",
        "nanolm.commands",
        "nanolm.data",
        "nanolm.first_contact",
        "nanolm.kernel_check",
        "nanolm.kernels",
        "nanolm.objectives",
        "nanolm.peft",
        "nanolm.rules",
    ],
    package_dir={"nanolm.data": "data", "nanolm.kernels": "kernels"},
    install_requires=[
        "jsonargparse[signatures]>=4.50",
        "numpy",
        "pyarrow",
        "PyYAML",
        "rich",
        "safetensors",
        "sentencepiece>=0.2.2",
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",
        "wandb",
    ],
    extras_require={
        "dev": DEV,
        "finetune": FINETUNE,
        "hf": ["datasets", "transformers"],
        "plot": ["matplotlib"],
        "tensorboard": ["tensorboard"],
        "zstd": ["zstandard"],
    },
    entry_points={"console_scripts": ["nanolm = nanolm.cli:main"]},
)
