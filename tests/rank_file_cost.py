"""`python -m tests.rank_file_cost`: what it takes to read a rank file of a published one's size.

A file of 100,256 ranks, as `cl100k_base` has, is made up here (each piece is two earlier ones) and
read by a fresh process, which says its time and its peak memory.
"""

import base64
import pathlib
import random
import subprocess
import sys
import tempfile

RANKS = 100_256
MOST_BYTES = 24
READ = """
import resource, sys, time
from nanolm.data.tokenizer import Tokenizer
before = time.process_time()
tokenizer = Tokenizer.load(f"cl100k_base:{sys.argv[1]}")
seconds = time.process_time() - before
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(f"{tokenizer.vocab_size:,} pieces: {seconds:.1f} s of one core, {peak:.0f} MiB at most")
"""


def made_up(ranks: int) -> list[bytes]:
    """Pieces by their ranks: the single bytes, then pairs of earlier ones, the first more often."""
    rng = random.Random(1)
    found = dict.fromkeys(bytes([byte]) for byte in range(256))
    pool = [bytes([byte]) for byte in b"etaoinshrdlucmfwypvbgkjqxz "]
    while len(found) < ranks:
        pair = (int(rng.expovariate(6 / len(pool))) for _ in range(2))
        piece = b"".join(pool[min(place, len(pool) - 1)] for place in pair)
        if len(piece) <= MOST_BYTES and piece not in found:
            found[piece] = None
            pool.append(piece)
    return list(found)


def main() -> None:
    """Make the file, read it elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "own.tiktoken"
        lines = (
            f"{base64.b64encode(piece).decode()} {rank}\n"
            for rank, piece in enumerate(made_up(RANKS))
        )
        path.write_text("".join(lines))
        subprocess.run([sys.executable, "-c", READ, str(path)], check=True)


if __name__ == "__main__":
    main()
