"""Configs: the schema of a run, and how files and a command line become one.

The names below are the face that plug-ins use; inside the project the modules are named.
"""

from nanolm.config.model import (
    ModelConfig,
)
from nanolm.config.schema import (
    CacheConfig,
    Config,
    CorpusConfig,
    DataConfig,
    DistributedConfig,
    EvalConfig,
    KernelsConfig,
    RunConfig,
    TrainConfig,
    TuneConfig,
    WandbConfig,
)

__all__ = [
    "CacheConfig",
    "Config",
    "CorpusConfig",
    "DataConfig",
    "DistributedConfig",
    "EvalConfig",
    "KernelsConfig",
    "ModelConfig",
    "RunConfig",
    "TrainConfig",
    "TuneConfig",
    "WandbConfig",
]
