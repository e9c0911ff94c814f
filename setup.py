"""Packaging. `kernels/` and `data/` stand at the top of the repository but install as
`nanolm.kernels` and `nanolm.data`; the wheel holds nothing but `nanolm`."""

import pathlib

from setuptools import find_packages, setup

ONNX = ["onnx", "onnxruntime", "onnxscript"]
FINETUNE = ["rouge-score", "sacrebleu", "scikit-learn", "seqeval"]
DEV = [
    *FINETUNE,
    *ONNX,
    "datasets",
    "filelock",
    "flask",
    "flask-cors",
    "gguf",
    "hypothesis",
    "moto[s3]",
    "mypy",
    "peft",
    "pytest",
    "pytest-xdist",
    "regex",
    "ruff",
    "setuptools",
    "transformers",
    "wheel",
]

nanolm = find_packages(include=["nanolm", "nanolm.*"])
beside = [  # folders of Python files at the top of the repository, with their sub-folders
    f"nanolm.{path.as_posix().replace('/', '.')}"
    for top in ("data", "kernels")
    for path in sorted({file.parent for file in pathlib.Path(top).rglob("*.py")})
]

setup(
    name="nanolm",
    version="0.1.0",
    description="A from-scratch transformer pretraining framework, small enough to read",
    long_description=pathlib.Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*nanolm, *beside],
    package_dir={"nanolm.data": "data", "nanolm.kernels": "kernels"},
    package_data={"nanolm.kernels": ["*.json"]},
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
        "gguf": ["gguf", "tokenizers"],
        "hf": ["datasets", "transformers"],
        "onnx": ONNX,
        "plot": ["matplotlib"],
        "tensorboard": ["tensorboard"],
        "zstd": ["zstandard"],
    },
    entry_points={"console_scripts": ["nanolm = nanolm.cli:main"]},
)
