"""Processes that run the same nanolm as the one that starts them."""

import os
import pathlib


def python_path() -> str:
    """PYTHONPATH with this nanolm first, before what the environment has: a checkout that was never
    installed, and the one of several that is meant."""
    here = str(pathlib.Path(__file__).resolve().parents[1])
    return os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
