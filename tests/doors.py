"""The doors of a step: which files a reader opens who follows one `Trainer.step` of the demo.

    make doors

Prints each file of nanolm/, kernels/ and data/ in which a function is entered during the third step
of configs/pretrain/demo_clm.yaml on a CPU, with its lines and those functions. The micro-batches
lie ready: how the loader makes them is another walk.
"""

import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from nanolm import pretrain
from nanolm.build import build_tokenizer
from nanolm.config.load import load_config
from nanolm.distributed.world import World
from nanolm.run import rehearse

ROOT = pathlib.Path(__file__).parent.parent
ROOMS = tuple(f"{ROOT / room}/" for room in ("nanolm", "kernels", "data"))


def entered(work: Callable[[], Any]) -> dict[str, set[str]]:
    """{file: functions} of this repository that are entered while `work` runs in this thread."""
    found: dict[str, set[str]] = {}

    def note(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(ROOMS):
            path = str(pathlib.Path(code.co_filename).relative_to(ROOT))
            found.setdefault(path, set()).add(code.co_qualname)

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return found


def doors(corpus: pathlib.Path) -> dict[str, set[str]]:
    """Those of the third step of the demo on a prepared corpus; by then everything is built."""
    words = [f"--config={ROOT}/configs/pretrain/demo_clm.yaml", f"--data.path={corpus}"]
    config = load_config([*words, "--run.device=cpu"])
    plan = pretrain.plan(config, build_tokenizer(config))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = rehearse(plan, World(), pathlib.Path(scratch), lambda line: None)
        batches = iter(trainer.loader_factory(0))
        for _ in range(2):
            trainer.step(next(batches))
        third = next(batches)
        return entered(lambda: trainer.step(third))


def main() -> None:
    """Prints the table."""
    found, total = doors(pathlib.Path(sys.argv[1])), 0
    for path, functions in sorted(found.items()):
        lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        total += lines
        named = {name.partition(".<locals>")[0] for name in functions}
        print(f"{path:<40} {lines:>4} lines  {', '.join(sorted(named))}")
    print(f"{len(found)} files, {total:,} lines")


if __name__ == "__main__":
    main()
