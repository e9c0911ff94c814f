"""`nanolm finetune`: turn a checkpoint into a classifier, tagger, reader, ranker or writer.

The work is `nanolm/finetune/run.py`, which `torchrun -m nanolm.finetune` starts on many ranks.
"""

from __future__ import annotations

from nanolm.finetune.run import main

__all__ = ["main"]
