"""The tests with other versions of Python and torch, and the table that docs/matrix.md shows.

    make matrix              all cells that have no result for the present sources
    python -m tests.matrix --only 3.12+2.11 --fresh

The first cell is `make check`, with the pins of constraints.txt. The others are virtual
environments under .matrix/ in which pip has chosen everything but Python and torch, as it does for
somebody who installs nanolm into what they have; they leave out the slow tests. A finished cell is
kept with its log and not run again until the sources change; a cell that was interrupted begins
again. The table is written after each cell.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / ".matrix"
TABLE = ROOT / "docs" / "matrix.md"
EXTRAS = ".[dev,plot,tensorboard,zstd]"
SHOWN = ("torch", "triton", "numpy", "transformers", "sentencepiece")
HEAD = """# Versions that the tests ran with

`make matrix` prints and writes this table. The first row is `make check`: the pins of
constraints.txt and all tests. In the others pip chose everything but Python and torch, and the slow
tests are left out. The last column is pytest's own closing line. `make matrix` runs a row again
when the sources have changed since its commit.

"""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One environment: its versions, and whether it is that of `make check`."""

    python: str
    torch: str
    checked: bool = False

    @property
    def name(self) -> str:
        """As --only names it: 3.12+2.11."""
        return f"{self.python}+{self.torch.rpartition('.')[0]}"

    @property
    def folder(self) -> pathlib.Path:
        """Its virtual environment."""
        if self.checked:
            return ROOT / ".venv"
        return FOLDER / f"py{self.python}-torch{self.torch.rpartition('.')[0]}"

    @property
    def binary(self) -> pathlib.Path:
        """The environment's Python."""
        return self.folder / "bin" / "python"

    def command(self, workers: int) -> list[str]:
        """What runs its tests."""
        if self.checked:
            return ["make", "check", f"PYTHON={find_python(self.python)}"]
        words = ["-m", "pytest", "-n", str(workers), "--dist", "worksteal", "-m", "not slow"]
        return [str(self.binary), *words]


CELLS = (
    Cell("3.11", "2.13.0", checked=True),
    Cell("3.12", "2.11.0"),
    Cell("3.13", "2.11.0"),
    Cell("3.11", "2.14.1"),
)


def find_python(version: str) -> str | None:
    """A Python of this version that really starts (pyenv leaves commands that do not), or None."""
    kept = sorted(pathlib.Path.home().glob(f".pyenv/versions/{version}.*/bin/python3"))
    for candidate in (shutil.which(f"python{version}"), *map(str, kept)):
        if candidate and subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return candidate
    return None


def install(cell: Cell, python: str) -> None:
    """The cell's environment; a marker at the end tells a whole one from an interrupted one."""
    ready = cell.folder / "ready"
    if cell.checked or ready.exists():  # make installs its own
        return
    print(f"{cell.name}: installing into {cell.folder.relative_to(ROOT)}", flush=True)
    subprocess.run([python, "-m", "venv", "--clear", str(cell.folder)], check=True)
    pip = [str(cell.binary), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, f"torch=={cell.torch}"], cwd=ROOT, check=True)
    subprocess.run([*pip, "-e", EXTRAS], cwd=ROOT, check=True)
    ready.touch()


def sources() -> str:
    """A hash of every file that git tracks or would, so that a result belongs to what it ran."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    digest = hashlib.sha256()
    for name in sorted(filter(None, names)):
        path = ROOT / os.fsdecode(name)
        if path.is_file() and path.suffix != ".md":
            digest.update(name + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def commit() -> str:
    """The commit that is checked out, with a + where files differ from it."""
    words = ["git", "describe", "--always", "--abbrev=7", "--exclude=*", "--dirty=+"]
    return subprocess.check_output(words, cwd=ROOT, text=True).strip()


def versions(cell: Cell) -> dict[str, str]:
    """What pip chose, of the packages that matter most; and the whole of Python's version."""
    code = (
        "import importlib.metadata as m, json, platform; "
        f"print(json.dumps({{n: m.version(n).split('+')[0] for n in {SHOWN}}}"
        " | {'python': platform.python_version()}))"
    )
    return json.loads(subprocess.check_output([str(cell.binary), "-c", code]))


def run(cell: Cell, tree: dict[str, str], workers: int) -> dict[str, object]:
    """Runs the cell's tests; its versions, pytest's closing line and what failed."""
    log = FOLDER / f"{cell.name}.log"
    print(f"{cell.name}: running, see {log.relative_to(ROOT)}", flush=True)
    with log.open("w", encoding="utf-8") as file:
        subprocess.run(cell.command(workers), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    lines = log.read_text(encoding="utf-8").splitlines()
    closing = [line for line in lines if re.search(r"\d+ (passed|failed).* in [\d.]+s", line)]
    return tree | {
        "versions": versions(cell),
        "tests": "all" if cell.checked else "not slow",
        "closing": closing[-1].strip("= ") if closing else "pytest did not finish",
        "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
    }


def table(results: dict[str, dict]) -> str:
    """The rows of docs/matrix.md."""
    columns = ["Python", *SHOWN, "commit", "tests", "pytest's closing line"]
    rows = [columns, ["---"] * len(columns)]
    for cell in CELLS:
        result = results.get(cell.name)
        if result is None:
            rows.append([cell.python, cell.torch, *["–"] * (len(SHOWN) + 1), "not run yet"])
            continue
        found = result["versions"]
        shown = [found["python"], *(found[name] for name in SHOWN)]
        rows.append([*shown, result["commit"], result["tests"], result["closing"]])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def main() -> None:
    """Installs and runs what has no result yet; exits with 1 when a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[cell.name for cell in CELLS])
    parser.add_argument("--fresh", action="store_true", help="run cells that have a result too")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    # Both before the first cell, after which the table in docs differs from what is checked out.
    kept, tree = FOLDER / "results.json", {"sources": sources(), "commit": commit()}
    results = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    for cell in CELLS:
        if arguments.only and cell.name not in arguments.only:
            continue
        finished = results.get(cell.name, {}).get("sources") == tree["sources"]
        if finished and not arguments.fresh:
            continue
        python = find_python(cell.python)
        if python is None:
            print(f"{cell.name}: left out, there is no Python {cell.python} here", flush=True)
            continue
        install(cell, python)
        results[cell.name] = run(cell, tree, arguments.workers)
        kept.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        TABLE.write_text(HEAD + table(results), encoding="utf-8")
    print(table(results))
    failed = [f"{name}: {line}" for name, r in results.items() for line in r["failed"]]
    print("\n".join(failed), file=sys.stderr)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
