"""A fuzzer in a process of its own: mutated inputs of one kind are accepted rightly or refused.

    python -m tests.fuzzing KIND FIRST COUNT FOLDER

KIND is one of KINDS or all; the seeds are [FIRST, FIRST + COUNT). Each input must be read to what
it says, or refused by a UserError of one sentence, within SECONDS and within MEMORY more bytes of
address space than the process had (RLIMIT_AS). Anything else ends the process with a traceback and
the seed. A crash of native code, or a hang that Python cannot end, is seen by the test that started
it.
"""

import collections
import contextlib
import json
import pathlib
import random
import resource
import shutil
import signal
import sys
import traceback

import numpy as np
import torch

from nanolm.checkpoint.checkpoints import Checkpoints, load_weights, locate, read_trainer
from nanolm.checkpoint.container import read_json, read_tensors, verify
from nanolm.checkpoint.named_tensors import learner_tensors
from nanolm.checkpoint.run_folder import cut_metrics
from nanolm.config import strict_yaml
from nanolm.config.load import dump, load_config
from nanolm.data.readers import file_pieces
from nanolm.data.shards.directory import Manifest, open_split
from nanolm.data.shards.shard_file import Shard, check_ids
from nanolm.data.tables.files import read_table
from nanolm.distributed.world import World
from nanolm.errors import UserError
from nanolm.training.guards.nonfinite import read_passed
from tests.tiny_run import build_learner
from tests.token_shards import random_documents, write_prepared

SECONDS = 20
MEMORY = 2 << 30

INSERTIONS = [
    *(b"{", b"[", b"}", b"null", b"-1e999", b"NaN", b"true", b"\x00", b"\n", b'"'),
    *(b"9" * 400, b"9" * 5000, b"-1", b"\xff\xfe", b"&a [*a]", b"<<: *a"),
    *(
        b"!!python/name:os.system",
        b"\\ud800",
        b"../" * 4,
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"\xff" * 8,
        b"\x7f\xff\xff\xff",
    ),
]

CONFIG = """
model: {d_model: 32, n_layers: 2, positions: {name: rotary}}
data: {path: x, row_length: 32, cache: {gigabytes: 1.0}}
objective: {name: mlm, mask_rate: 0.2}
optim: {name: adamw, lr: 0.001, betas: [0.9, 0.95]}
schedule: {name: cosine, warmup: 10}
train: {steps: 10, nonfinite: rewind, spike: 10.0, precision: bf16}
distributed: {strategy: fsdp, timeout: 60}
"""
METRICS = b'{"step": 1, "kind": "train", "loss": 2.0}\n{"step": 2, "kind": "val", "loss": 1.0}\n'
RECORDS = (
    b'{"text": "one two", "label": "a"}\n{"text": "three \\u00e9", "label": "b"}\n'
    b'{"text": "four", "label": 3, "more": [1, {"x": null}]}\n'
)


def mutated(data, rng):
    """The bytes with one to four random flips, cuts, repeats, swaps or insertions."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at]
        elif kind == 2:
            data = data[:at] + data[max(at - 20, 0) :]
        elif kind == 3:
            data = data[:at] + rng.choice(INSERTIONS) + data[at:]
        elif kind == 4:
            data = data[:at] + rng.randbytes(4) + data[at + 4 :]
        else:
            data = data[:at] + data[at + rng.randrange(1, 9) :]
    return data


def refused(read):
    """What `read()` gives, or None when it refused in one sentence."""
    try:
        return read()
    except UserError as error:
        sentence = str(error)
        assert sentence.strip() and "Traceback" not in sentence, sentence
        assert sentence.count("\n") == 0 and len(sentence) < 20_000, sentence[:3000]
        return None


def fuzz_config(folder, rng):
    path = folder / "fuzz.yaml"
    path.write_bytes(mutated(CONFIG.encode(), rng))
    config = refused(lambda: load_config([f"--config={path}"]))
    if config is not None:
        assert config == load_config([], base=strict_yaml.read_mapping(path))
        path.write_text(dump(config))
        assert load_config([f"--config={path}"]) == config


def prepared(folder):
    """Two shards, written once a process."""
    where = folder / "prepared"
    if not where.exists():
        rng = np.random.default_rng(0)
        shards = [random_documents(rng, tokens, 20) for tokens in (300, 200)]
        write_prepared(where, {"train": shards, "val": [], "test": []})
        shutil.copytree(where, folder / "good")
    return where


def fuzz_manifest(folder, rng):
    """Accepted means: the same tokens as the manifest that was not mutated."""
    where = prepared(folder)
    good = (folder / "good" / "manifest.json").read_bytes()
    after = mutated(good, rng)
    if rng.random() < 0.5:  # a well-formed one with a value of another kind somewhere
        after = json.dumps(another_value(json.loads(good), rng)).encode()
    (where / "manifest.json").write_bytes(after)
    manifest = refused(lambda: Manifest.load(where))
    opened = refused(lambda: open_split(where, "train"))
    if opened is not None:
        assert manifest is not None
        for shard, entry in zip(opened[1], opened[0].splits["train"], strict=True):
            assert len(shard.tokens) == entry["tokens"]
            assert shard.path.parent == where


def another_value(value, rng):
    """The same structure with one leaf or branch replaced."""
    odd = [None, -1, 2**70, 1.5, "", "../x", [], {}, True, [[]], {"file": 1}]
    if rng.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return rng.choice(odd)
    if isinstance(value, dict):
        key = rng.choice(list(value))
        return {**value, key: another_value(value[key], rng)}
    at = rng.randrange(len(value))
    return [*value[:at], another_value(value[at], rng), *value[at + 1 :]]


def fuzz_shard(folder, rng):
    """A stranger's shard: whatever it claims, reading all that it gives neither crashes nor reads
    beyond the file. With a manifest beside it, only the bytes that were written are accepted."""
    where = prepared(folder)
    path = where / "train-00000.arrow"
    good = (folder / "good" / path.name).read_bytes()
    after = mutated(good, rng)
    path.write_bytes(after)
    shutil.copy(folder / "good" / "manifest.json", where)
    shard = refused(lambda: Shard(path))
    if shard is not None and refused(lambda: check_ids(shard, shard.tokens) or True):
        lengths = [len(shard.document(index)) for index in range(len(shard))]
        assert sum(lengths) == len(shard.tokens) and int(shard.tokens.sum()) >= 0
    opened = refused(lambda: open_split(where, "train"))
    if opened is not None:
        entry = opened[0].splits["train"][0]
        same = opened[1][0].sha256_and_tokens()[0] == entry["sha256"]
        assert same == (after == good)
    path.write_bytes(good)


def checkpoint(folder):
    """One checkpoint, written once a process."""
    checkpoints = Checkpoints(folder, World())
    if not checkpoints.steps():
        trainer = {"step": 3, "skips": 0, "losses": [], "best": 1.0, "seconds": 1.0}
        trainer |= {"scaler": {}, "environment": {}, "facts": {}}
        checkpoints.save(3, {"model": learner_tensors(build_learner())}, trainer, {})
    return checkpoints


def fuzz_checkpoint(folder, rng):
    """With checksums a mutation is found; without them it is still read rightly or refused."""
    checkpoints = checkpoint(folder)
    path = checkpoints.path(3) / rng.choice(["index.json", "trainer.json", "model.safetensors"])
    before = path.read_bytes()
    after = mutated(before, rng)
    path.write_bytes(after)
    try:
        if path.name != "index.json" and after != before:
            assert refused(lambda: verify(path.parent) or True) is None
        refused(lambda: locate(checkpoints.run))
        refused(lambda: read_trainer(path.parent))
        tensors = refused(lambda: read_tensors(path.parent, "model"))
        if tensors is not None:
            assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
        refused(lambda: load_weights(path.parent, build_learner()))
    finally:
        path.write_bytes(before)


def fuzz_jsonl(folder, rng):
    """Corpus records, labelled records, and the lines that a run writes about itself."""
    path = folder / "records.jsonl"
    path.write_bytes(mutated(RECORDS, rng))
    counts = collections.Counter()
    texts = refused(
        lambda: [
            text
            for piece in file_pieces(str(path), text_field="text", txt_documents="auto")
            for text in piece.documents(counts)
        ]
    )
    assert texts is None or all(isinstance(text, str) for text in texts)
    table = refused(lambda: read_table(str(path)))
    assert table is None or all(isinstance(record, dict) for record in table.records)
    if table is not None:
        table.digest()
    (folder / "metrics.jsonl").write_bytes(mutated(METRICS, rng))
    (folder / "nonfinite.jsonl").write_bytes(mutated(b'{"step": 9, "passed": [8, 9]}\n', rng))
    refused(lambda: cut_metrics(folder / "metrics.jsonl", 2))
    refused(lambda: read_passed(folder))
    refused(lambda: read_json(folder, "nonfinite.jsonl"))


KINDS = {
    "config": fuzz_config,
    "manifest": fuzz_manifest,
    "shard": fuzz_shard,
    "checkpoint": fuzz_checkpoint,
    "jsonl": fuzz_jsonl,
}


def too_slow(*_):
    raise TimeoutError(f"an input took more than {SECONDS} s")


def address_space():
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmSize:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmSize")


def main():
    kind, first, count, folder = sys.argv[1:]
    folder = pathlib.Path(folder)
    limit = address_space() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGALRM, too_slow)
    kinds = KINDS if kind == "all" else [kind]
    for seed in range(int(first), int(first) + int(count)):
        for name in kinds:
            signal.alarm(SECONDS)
            try:
                KINDS[name](folder, random.Random(f"{name} {seed}"))
            except BaseException:  # noqa: BLE001
                traceback.print_exc()
                print(f"{name}, seed {seed}", file=sys.stderr)
                return 1
    signal.alarm(0)
    print(json.dumps({"kind": kind, "examples": int(count) * len(kinds)}))
    return 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        raise SystemExit(main())
