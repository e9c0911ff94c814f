"""Settings that every test needs before anything else is imported."""

import os
import pathlib
import sys

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# xdist's workers have a COLUMNS of 80; sentences would be wrapped there and not in one process.
os.environ.pop("COLUMNS", None)
# torch then counts GPUs without starting CUDA, which would not survive the forks of the tests.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch

# Triton decides at import whether it interprets or compiles: without a GPU (NVIDIA's or AMD's, as
# torch sees it) the kernels are interpreted, so this must stand before anything imports triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import settings

settings.register_profile("nanolm", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("nanolm")

ROOT = pathlib.Path(__file__).parent
sys.path.insert(0, str(ROOT))
