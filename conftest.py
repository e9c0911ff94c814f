"""Settings that every test needs before anything else is imported."""

import os
import shutil
import sys

# Triton decides at import whether it interprets or compiles: without a GPU the kernels are
# interpreted, so this must stand before anything imports triton.
if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pathlib

from hypothesis import settings

settings.register_profile("nanolm", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("nanolm")

ROOT = pathlib.Path(__file__).parent
sys.path.insert(0, str(ROOT))
