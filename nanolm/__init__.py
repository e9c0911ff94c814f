"""nanolm: a from-scratch transformer pretraining framework, from raw text to a model in use."""

import importlib.machinery
import importlib.util
import pathlib
import sys

__version__ = "0.1.0"


def _adopt(name: str, folder: pathlib.Path) -> None:
    """Makes the folder the package `nanolm.NAME`, without making anything else importable."""
    spec = importlib.machinery.ModuleSpec(f"{__name__}.{name}", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    globals()[name] = module


# `kernels/` and `data/` stand at the top of the repository, where a reader finds them, but they are
# the packages `nanolm.kernels` and `nanolm.data`: as top-level names they would shadow the PyPI
# package `kernels`. A wheel carries them inside the package; a checkout finds them one level up.
for _name in ("kernels", "data"):
    if not (pathlib.Path(__file__).parent / _name).is_dir():
        _adopt(_name, pathlib.Path(__file__).parent.parent / _name)
