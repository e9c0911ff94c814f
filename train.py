"""Pretrain: `torchrun --nproc_per_node=2 train.py --config configs/pretrain/demo_clm.yaml`.

The same as `nanolm train`, in a file that torchrun can start. What happens, in order, is
`run_train` in nanolm/pretrain.py:

    launch            ranks                                   nanolm/distributed/world.py
    tokenizer, rows   prepared data, order by arithmetic      data/tokenizer.py, data/stream.py
    claim             whose run folder, resume from where     nanolm/checkpoint/run_folder.py
    learner           trunk + heads + objective               nanolm/build.py, learner.py
    Trainer.fit       step, log, checkpoint, evaluate         nanolm/training/trainer.py
    summary.json      the run in a dozen figures
"""

import sys

from nanolm.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
