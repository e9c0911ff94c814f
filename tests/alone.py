"""Test files by themselves: each in a process of its own, in random order.

    python -m tests.alone [--sample N] [--seed WORD]

A file that passes only after another one has imported or set something fails here. `.ci/run` takes
a sample whose seed is the commit, so that every file has its turn as the project goes on; without
--sample all of them run. Exits with 1 when a file fails.
"""

import argparse
import os
import pathlib
import random
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent


def commit() -> str:
    """The commit that is checked out, or an empty word outside a repository."""
    asked = ["git", "rev-parse", "HEAD"]
    return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def chosen(seed: str, sample: int | None) -> list[pathlib.Path]:
    """The test files in an order that the seed decides, so many of them."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    random.Random(seed).shuffle(files)
    return files[:sample]


def passes(path: pathlib.Path) -> bool:
    """Whether the file's tests pass when no other file is there; prints what failed."""
    begin = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-m", "not slow", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    good = done.returncode in (0, 5)  # 5: all of its tests are slow
    seconds = time.monotonic() - begin
    print(f"{'ok  ' if good else 'FAIL'} {path.relative_to(ROOT)} ({seconds:.0f} s)", flush=True)
    if not good:
        print(done.stdout + done.stderr, flush=True)
    return good


def main() -> None:
    """Runs the files one after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, help="how many files; all when left out")
    parser.add_argument("--seed", default=None, help="decides which and in what order")
    arguments = parser.parse_args()
    seed = arguments.seed or commit()
    files = chosen(seed, arguments.sample)
    print(f"{len(files)} test files by themselves (seed {seed or 'empty'})", flush=True)
    results = [passes(path) for path in files]
    raise SystemExit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
