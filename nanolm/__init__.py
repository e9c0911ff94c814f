"""nanolm: a from-scratch transformer pretraining framework, from raw text to a model in use."""

import pathlib

__version__ = "0.1.0"

# `kernels/` and `data/` stand at the top of the repository, where a reader finds them, but they are
# the packages `nanolm.kernels` and `nanolm.data`: as top-level names they would shadow the PyPI
# package `kernels`. A wheel carries them inside the package; a checkout finds them one level up.
if not (pathlib.Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(pathlib.Path(__file__).parent.parent))
