"""One writer for a run's folder: a second start in it, while the first one trains, is refused.

The lock is POSIX's (`fcntl.lockf`): the kernel frees it with the process, however that ends, it
holds on network file systems, between nodes too, and a forked child never has it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import pathlib
import socket
from types import TracebackType

from nanolm.errors import UserError

LOCK = ".lock"
"""Beside config.yaml. It stays when the run ends: another start could hold it already."""
TAKEN = (errno.EACCES, errno.EAGAIN)
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What a file system answers that knows no locks."""


class RunLock:
    """The lock of one folder; frees it at the end of a `with`.

    `missing` says why there is none. Raises UserError when another process has it.
    """

    def __init__(self, run: pathlib.Path) -> None:
        self.missing: str | None = None
        self._file = open(run / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 (kept for the run)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in TAKEN + NO_LOCKS:
                raise
            self._file.seek(0)
            owner = self._file.read().strip()
            self._file.close()
            if error.errno in TAKEN:
                raise UserError(
                    f"run.dir {run} is being written by {owner or 'another process'}; wait until "
                    f"it has ended, or choose another run.dir"
                ) from error
            self.missing = (
                f"{run} is on a file system without locks ({error.strerror}): nothing refuses a "
                f"second start in it while this one trains"
            )
            return
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def require_free(run: pathlib.Path) -> None:
    """Raises UserError when another process trains in the folder; makes nothing in it."""
    if (run / LOCK).is_file():
        with RunLock(run):
            pass
