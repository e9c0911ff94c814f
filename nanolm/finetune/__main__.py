"""`torchrun -m nanolm.finetune --config …`: the fine-tune entry point, as `nanolm finetune`."""

import sys

from nanolm.cli import main

if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
