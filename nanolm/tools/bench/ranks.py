"""Starts the ranks of one measurement of `nanolm bench scale` and prints what rank 0 found.

    python -m nanolm.tools.bench.ranks '{"settings": {"processes": 2, …}, …}'  ->  a line of JSON

Nothing heavy is imported here: the launcher runs beside what it measures.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile


def main() -> None:
    """A torchrun of as many processes as the job says; exits as it does when it fails."""
    job = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={job['settings']['processes']}"]
        command += ["-m", "nanolm.tools.bench.scale_step", json.dumps(job), str(out)]
        status = subprocess.run(command, check=False).returncode
        if status != 0 or not out.is_file():
            raise SystemExit(status or 1)
        print(out.read_text(encoding="utf-8").replace("\n", " "))


if __name__ == "__main__":
    main()
