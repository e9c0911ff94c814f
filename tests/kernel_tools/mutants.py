"""Which mutants of the kernels the trials find.

    python -m tests.kernel_tools.mutants [--count 60] [--seed check] [--held-out] [--out FILE]

Mutants are drawn by a seed, each is put beside the real kernels in a process of its own, with a
limit of its own, and asked the questions that concern its file until one finds it. A run that is
broken off goes on where it was when the same command names the same --out. Prints a table and who
survived; exits with 1 when less than 95 % are found of those that are not argued away by name in
tests/kernel_tools/equivalent.py.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import multiprocessing
import os
import pathlib
import resource
import signal
import sys
import tempfile
import time
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch
import torch._dynamo  # an operator's first call imports it: once here, not in every process

import nanolm.kernels
from nanolm.files import Finished
from tests.kernel_tools.equivalent import EQUIVALENT
from tests.kernel_tools.examination import ALL, Question, questions_for
from tests.kernel_tools.mutation import FILES, Mutant, draw, held_out, mutants
from tests.kernel_tools.mutation_operators import OPERATORS

GOAL = 0.95
CPU_SECONDS = 240
"""What a mutant may compute before it counts as found by the time it takes."""
WALL_SECONDS = 1800


def become(mutant: Mutant, folder: str) -> None:
    """Lets this process import the mutant in place of the file that it changes."""
    path = pathlib.Path(folder) / mutant.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(mutant.source(), encoding="utf-8")
    nanolm.kernels.__path__.insert(0, folder)
    for module in map(module_of, FILES):
        importlib.import_module(module)


def module_of(file: str) -> str:
    """The module that a file of kernels/ is imported as."""
    return f"nanolm.kernels.{file.removesuffix('.py').replace('/', '.')}"


def require_not_imported() -> None:
    """Raises RuntimeError when a kernel is in this process already: its mutants would never be
    imported, and survive whatever is asked."""
    early = sorted(set(map(module_of, FILES)) & sys.modules.keys())
    if early:
        raise RuntimeError(f"imported before any mutant: {', '.join(early)}")


def ask(mutant: Mutant | str, folder: str) -> dict[str, Any]:
    """What the questions say of it: by what it was found, "" if by nothing, and by which. A word is
    a group of questions, which the kernels as they are have to answer."""
    if isinstance(mutant, str):
        return answers(list(ALL[mutant]()))
    try:
        become(mutant, folder)
    except Exception as error:  # noqa: BLE001  (it cannot even be imported)
        return {"found": "error", "question": f"import: {error}"}
    return answers(questions_for(mutant))


def answers(questions: list[Question]) -> dict[str, Any]:
    """The first question that finds something."""
    for question in questions:
        found = question.ask()
        if found is not None:
            return {"found": found, "question": question.name}
    return {"found": "", "question": ""}


def child(mutant: Mutant | str, folder: str, pipe: Any) -> None:
    """The process of one mutant."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 10))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    pipe.send(ask(mutant, folder))


def examine(mutant: Mutant | str) -> dict[str, Any]:
    """The verdict on one mutant; one that crashes or does not end is found by that."""
    require_not_imported()
    context = multiprocessing.get_context("fork")  # nothing here has threads or kernels yet
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(mutant, folder, send))
        process.start()
        send.close()
        verdict = None
        if receive.poll(WALL_SECONDS):
            with contextlib.suppress(EOFError):
                verdict = receive.recv()
        process.kill()
        process.join()
    if verdict is None:
        late = time.monotonic() - begin >= WALL_SECONDS or process.exitcode == -signal.SIGXCPU
        verdict = {"found": "time" if late else "crash", "question": ""}
    return verdict | {"seconds": round(time.monotonic() - begin, 1)}


def control() -> None:
    """Raises SystemExit when a question finds a fault of the kernels as they are: its finding of a
    mutant would say nothing."""
    for group in ALL:
        verdict = examine(group)
        if verdict["found"]:
            raise SystemExit(f"the real kernels fail: {group}, {verdict}")
        print(f"real kernels pass: {group} ({verdict['seconds']} s)", file=sys.stderr, flush=True)


def digest(mutant: Mutant) -> str:
    """Of the file that it makes: a verdict holds for this text alone."""
    return hashlib.sha256(mutant.source().encode()).hexdigest()[:12]


def examined(drawn: list[Mutant], finished: Finished, *, again: bool) -> dict[str, dict[str, Any]]:
    """The verdicts by name, those that are known already read from the file; with `again` who
    survived is asked once more, and who is argued away too."""
    for number, mutant in enumerate(drawn):
        if mutant.name in EQUIVALENT and not again:
            continue
        known = finished.cells.get(mutant.name)
        valid = known is not None and known["digest"] == digest(mutant)
        if not valid or (again and not known["found"]):
            verdict = examine(mutant) | {"digest": digest(mutant)}
            finished.put(mutant.name, verdict)
            said = verdict["found"] or "SURVIVES"
            line = f"{number + 1}/{len(drawn)} {said} ({verdict['seconds']} s) {mutant.name}"
            print(line, file=sys.stderr, flush=True)
    return {m.name: finished.cells.get(m.name, {"found": ""}) for m in drawn}


def table(drawn: list[Mutant], verdicts: dict[str, dict[str, Any]]) -> str:
    """How many were found of each operator's, and by what."""
    ways = ("numbers", "sanitizer", "poison", "dtype", "random", "test", "error", "crash", "time")
    head = " ".join(f"{way:>9}" for way in ways)
    lines = [f"{'operator':<12} {'found':>9}  {head}  argued"]
    for operator in [*OPERATORS, "all"]:
        rows = [m for m in drawn if operator in ("all", m.operator)]
        argued = [m for m in rows if m.name in EQUIVALENT and not verdicts[m.name]["found"]]
        by = [verdicts[m.name]["found"] for m in rows]
        share = f"{sum(map(bool, by))}/{len(rows) - len(argued)}"
        cells = " ".join(f"{by.count(way) or '-':>9}" for way in ways)
        lines.append(f"{operator:<12} {share:>9}  {cells}  {len(argued) or '-':>6}")
    return "\n".join(lines)


def main() -> None:
    """Draw, examine, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=60, help="how many mutants")
    parser.add_argument("--seed", default="check", help="decides which ones")
    parser.add_argument("--held-out", action="store_true", help="of the quarter kept apart")
    parser.add_argument("--only", default="", help="only names that contain this")
    parser.add_argument("--out", default="runs/mutants.json", help="where verdicts are kept")
    parser.add_argument(
        "--again", action="store_true", help="ask survivors once more, argued ones too"
    )
    parser.add_argument("--control", action="store_true", help="put all to the real kernels first")
    parser.add_argument("--list", action="store_true", help="print their names alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    among = [m for m in mutants() if held_out(m) == arguments.held_out and arguments.only in m.name]
    drawn = draw(arguments.count, arguments.seed, among)
    if arguments.list:
        print("\n".join(mutant.name for mutant in drawn))
        return
    if arguments.control:
        control()
    finished = Finished(arguments.out, "tests.kernel_tools.mutants")
    verdicts = examined(drawn, finished, again=arguments.again)
    print(f"{len(drawn)} of {len(mutants())} mutants, seed {arguments.seed!r}")
    print(table(drawn, verdicts))
    survivors = [name for name, verdict in verdicts.items() if not verdict["found"]]
    real = [name for name in survivors if name not in EQUIVALENT]
    for name in survivors:
        print(f"  argued {name}: {EQUIVALENT[name]}" if name in EQUIVALENT else f"  MISSED {name}")
    asked = len(drawn) - (len(survivors) - len(real))
    share = 1 - len(real) / max(asked, 1)
    print(f"{share:.1%} found of {asked}, {GOAL:.0%} due")
    raise SystemExit(0 if share >= GOAL else 1)


if __name__ == "__main__":
    main()
