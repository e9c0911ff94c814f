"""`nanolm train`: pretrain a model. `torchrun train.py` is the same on many ranks."""

from __future__ import annotations

from nanolm.config.load import load_config
from nanolm.pretrain import run_train


def main(argv: list[str]) -> None:
    """Reads the command line and trains."""
    run_train(load_config(argv, prog="nanolm train"))
