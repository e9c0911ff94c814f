"""The trace of a profiler as a file, to open in https://ui.perfetto.dev."""

from __future__ import annotations

import pathlib
import shutil
import tempfile

from torch.profiler import profile


def write_trace(profiler: profile, path: pathlib.Path) -> None:
    """Writes the Chrome trace of a profiler that has ended, under any name that a file can have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # PyTorch's writer takes text, and a name on Linux is bytes that need not be any.
    with tempfile.TemporaryDirectory() as scratch:
        written = pathlib.Path(scratch) / "trace.json"
        profiler.export_chrome_trace(str(written))
        shutil.move(written, path)
