"""Shards and manifests: zero-copy reading, and a clear sentence for everything that is damaged."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from nanolm.data.prepare.pipeline import PrepareConfig, prepare
from nanolm.data.prepare.progress import Silent
from nanolm.data.shards.directory import (
    Manifest,
    Shard,
    ShardWriter,
    open_split,
    unigram_counts,
    verify,
)
from nanolm.errors import UserError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    lines = [f"line {n}: the number {n} times {n} is {n * n}" for n in range(400)]
    (folder / "text.txt").write_text("\n".join(lines))
    config = PrepareConfig(
        out=str(folder / "data"),
        sources=[str(folder / "text.txt")],
        txt_documents="line",
        vocab_size=330,
        val_fraction=0.2,
        shard_tokens=3000,
        workers=1,
    )
    prepare(config, Silent())
    return folder / "data"


@pytest.fixture
def data(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "data")


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_a_shard_is_read_without_a_copy(tmp_path, vocab_size, dtype):
    path = tmp_path / "one.arrow"
    with ShardWriter(
        path, tokens=6, vocab_size=vocab_size, tokenizer_hash="h", source="s"
    ) as writer:
        writer.write(np.array([5, 6, 3], dtype), np.array([3]), 10)
        writer.write(np.array([3, 65535, 3], dtype), np.array([1, 2]), 4)
    shard = Shard(path)
    assert shard.tokens.dtype == dtype
    assert shard.tokens.tolist() == [5, 6, 3, 3, 65535, 3]
    assert shard.offsets.tolist() == [0, 3, 4, 6]
    assert shard.document(2).tolist() == [65535, 3]
    assert not shard.tokens.flags.owndata and not shard.tokens.flags.writeable
    before = pa.total_allocated_bytes()
    again = Shard(path)
    assert pa.total_allocated_bytes() - before < 4096
    assert len(again) == 3
    assert shard.metadata["bytes"] == 14 and shard.metadata["source"] == "s"
    assert writer.info["tokens"] == 6 and writer.info["size"] == path.stat().st_size


ONE_SHARD = r"""
import re, sys
import numpy as np
from nanolm.data.shards.directory import ShardWriter

def peak():  # not ru_maxrss, which knows of the process that started this one
    return int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1]) * 1024

before = peak()
with ShardWriter(sys.argv[1], tokens=32 << 20, vocab_size=9, tokenizer_hash="h") as writer:
    for _ in range(32):
        writer.write(np.ones(1 << 20, np.uint16), np.array([1 << 20]), 1)
print(peak() - before)
"""


def test_a_writer_takes_two_shards_of_memory(tmp_path):
    """The array that is filled, and the bytes that Arrow hands to the file."""
    command = [sys.executable, "-c", ONE_SHARD, str(tmp_path / "one.arrow")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    shard = 32 << 21
    assert shard < grown < 2.1 * shard


def test_writers_refuse_impossible_documents_and_leave_nothing_behind(tmp_path):
    for tokens, lengths in (
        ([1, 9], [2]),
        ([1, 2], [1]),
        ([1, 2], [2, 0]),
        ([1], [1]),
        ([1] * 3, [3]),
    ):
        with (
            pytest.raises(ValueError),
            ShardWriter(tmp_path / "x.arrow", tokens=2, vocab_size=9, tokenizer_hash="h") as writer,
        ):
            writer.write(np.array(tokens, np.uint16), np.array(lengths), 1)
    assert list(tmp_path.iterdir()) == []


def test_a_prepared_directory_verifies_and_its_tables_agree(data):
    manifest = verify(data)
    _, shards = open_split(data, "train", tokenizer_hash=manifest.tokenizer_hash)
    assert len(shards) > 1 and all(len(shard.tokens) <= 3000 for shard in shards)
    flat = np.concatenate([shard.tokens for shard in shards])
    np.testing.assert_array_equal(
        unigram_counts(data, manifest), np.bincount(flat, minlength=manifest.vocab_size)
    )
    assert len(flat) == manifest.totals["train"]["tokens"]


def refused(data, sentence, check=lambda data: open_split(data, "train")):
    with pytest.raises(UserError, match=sentence):
        check(data)


def test_missing_and_wrong_things_are_refused_at_opening(data, tmp_path):
    refused(tmp_path, "is not a prepared directory")
    refused(data, "has no test split", lambda d: open_split(d, "test"))
    refused(
        data, "written with tokenizer", lambda d: open_split(d, "train", tokenizer_hash="0" * 64)
    )
    (data / "train-00001.arrow").rename(tmp_path / "gone")
    refused(data, r"train-00001\.arrow is missing")


@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_truncated_shards_are_refused_at_opening(data, keep):
    path = data / "train-00000.arrow"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    refused(data, "is damaged")


def rewrite(data, shard, **changes):
    """Replace a shard by one that differs in metadata or tokens, its size made to agree."""
    manifest = json.loads((data / "manifest.json").read_text())
    entry = next(e for e in manifest["splits"]["train"] if e["file"] == shard)
    old = Shard(data / shard)
    tokens = changes.pop("tokens", old.tokens)
    lengths = np.diff(old.offsets)
    options = {key: old.metadata[key] for key in ("vocab_size", "tokenizer_hash", "source")}
    with ShardWriter(data / shard, tokens=len(tokens), **{**options, **changes}) as writer:
        writer.write(tokens, lengths, entry["bytes"])
    entry["size"] = writer.info["size"]
    (data / "manifest.json").write_text(json.dumps(manifest))


def test_foreign_shards_are_refused_at_opening(data):
    rewrite(data, "train-00000.arrow", tokenizer_hash="another")
    refused(data, "written with another tokenizer")
    rewrite(data, "train-00000.arrow", vocab_size=400)
    refused(data, "another tokenizer|vocabulary size")


def test_verify_finds_a_flipped_bit_and_a_foreign_tokenizer(data):
    path = data / "train-00000.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refused(data, "checksum|damaged", verify)
    path.write_bytes(b"")
    refused(data, "is damaged", verify)
    (data / "tokenizer.model").write_bytes(b"nothing")
    refused(data, "no SentencePiece model", verify)


def test_verify_reads_every_id(data):
    manifest = json.loads((data / "manifest.json").read_text())
    shard = Shard(data / "train-00000.arrow")
    at = (data / shard.path.name).read_bytes().index(shard.tokens[:50].tobytes())
    content = bytearray(shard.path.read_bytes())
    content[at : at + 2] = (60000).to_bytes(2, "little")
    shard.path.write_bytes(content)
    from nanolm.files import file_sha256

    manifest["splits"]["train"][0]["sha256"] = file_sha256(shard.path)
    (data / "manifest.json").write_text(json.dumps(manifest))
    refused(data, "token id 60000 with a vocabulary of 330", verify)


def test_damaged_manifests_are_refused(data):
    content = json.loads((data / "manifest.json").read_text())
    for change, sentence in (
        ({"format_version": 99}, "has format 99"),
        ({"surprise": 1}, "is damaged"),
    ):
        (data / "manifest.json").write_text(json.dumps({**content, **change}))
        refused(data, sentence)
    (data / "manifest.json").write_text("{")
    refused(data, "is damaged")
    assert Manifest(**content).vocab_size == 330
