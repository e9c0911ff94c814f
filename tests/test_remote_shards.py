"""Corpora in S3-compatible storage: the same rows as from disk, whatever the server does."""

import json
import multiprocessing
import pathlib
import shutil
from multiprocessing import forkserver

import numpy as np
import pytest

from nanolm.cli import main
from nanolm.config.schema import CacheConfig
from nanolm.data import object_store
from nanolm.data.shards import block_cache, shard_file
from nanolm.data.shards.directory import open_split, verify
from nanolm.data.stream import RowStream
from nanolm.errors import UserError
from nanolm.training.loader import Loader
from tests.object_server import BUCKET, object_server, upload
from tests.token_shards import random_documents, sentences_of, write_prepared

SPAN = 65
LEAST = block_cache.LEAST_BLOCKS


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch, object_server() as proxy:
        for key, value in {
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL": proxy.url,
        }.items():
            patch.setenv(key, value)
        own = forkserver.ForkServer()  # the one that other tests began has another environment
        patch.setattr(forkserver, "_forkserver", own)
        for name in ("ensure_running", "connect_to_new_process", "set_forkserver_preload"):
            patch.setattr(forkserver, name, getattr(own, name))
        own.set_forkserver_preload(["nanolm.training.loader", "tests.test_remote_shards"])
        yield proxy
        own._stop()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """About 80 blocks of 4 KiB in three shards, more than the smallest cache holds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_file, "BLOCK_BYTES", 4096)
        rng = np.random.default_rng(0)
        sizes = (90_000, 30_000, 50_001)
        shards = [random_documents(rng, size, 300) for size in sizes]
        splits = {"train": shards, "val": [random_documents(rng, 3000, 50)]}
        return write_prepared(tmp_path_factory.mktemp("remote") / "data", splits)


@pytest.fixture(scope="module")
def url(server, prepared):
    return upload(server, prepared, "some/prefix")


@pytest.fixture(autouse=True)
def no_faults(request):
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").fault = lambda *_: None


def cache_of(folder, blocks=LEAST, **keys):
    return CacheConfig(dir=str(folder), gigabytes=blocks * 4096 / 1e9, **keys)


def stream_of(where, cache=None, split="train", **keys):
    return RowStream(
        [(str(where), 1)], split, stride=SPAN - 1, span=SPAN, seed=3, cache=cache, **keys
    )


def assert_same_rows(ours, theirs, start, stop):
    for a, b in zip(ours.rows(start, stop), theirs.rows(start, stop), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.starts, b.starts)
        assert (a.row_id, a.epoch) == (b.row_id, b.epoch)
    a, b = (stream.read_block(stream.places(start, stop)) for stream in (ours, theirs))
    np.testing.assert_array_equal(a.tokens, b.tokens)
    assert (a.start_rows, a.start_offsets) == (b.start_rows, b.start_offsets)


def held(folder):
    return sum(path.stat().st_size for path in pathlib.Path(folder).glob("*/0*"))


def test_rows_are_those_of_the_folder_in_a_bounded_cache(server, url, prepared, tmp_path):
    local = stream_of(prepared)
    config = cache_of(tmp_path / "cache")
    remote = stream_of(url, config)
    assert remote.manifests == local.manifests
    for start in range(0, 2 * len(local), 900):
        assert_same_rows(remote, local, start, start + 24)
        assert held(config.dir) <= LEAST * 4096
    again = stream_of(url, cache_of(tmp_path / "large", 1000))
    assert_same_rows(again, local, 0, 100)
    before = len(server.seen)
    assert_same_rows(again, local, 0, 100)
    assert len(server.seen) == before, "all was in the cache"
    local, remote = (stream_of(w, config, "val", partial=True) for w in (prepared, url))
    for a, b in zip(local.eval_rows(), remote.eval_rows(), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)


def test_rows_of_sentences_are_those_of_the_folder(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_file, "BLOCK_BYTES", 4096)
    rng = np.random.default_rng(1)
    shards = [random_documents(rng, size, 100) for size in (20_000, 9_000)]
    folder = write_prepared(tmp_path / "data", {"train": shards}, sentences=sentences_of)
    url = upload(server, folder, "sentences")
    local = stream_of(folder, cut="sentences")
    remote = stream_of(url, cache_of(tmp_path / "cache", 1000), cut="sentences")
    assert len(remote) == len(local)
    assert_same_rows(remote, local, 0, len(local))


@pytest.mark.parametrize("fault", [500, "slow", "truncated", "short", "flipped"])
def test_faults_of_the_server_change_nothing(server, url, prepared, tmp_path, fault, monkeypatch):
    """The client's own retries, which pause for seconds, are off: ours must mend everything."""
    monkeypatch.setattr(object_store, "FIRST_PAUSE", 0.01)
    strategy = object_store.fs.AwsStandardS3RetryStrategy
    monkeypatch.setattr(
        object_store.fs, "AwsStandardS3RetryStrategy", lambda max_attempts: strategy(1)
    )
    every = {500: 3, "slow": 10}.get(fault, 4)
    count = iter(range(10**9))
    hit = []

    def choose(method, path, number):
        if method == "GET" and path.endswith(".arrow") and next(count) % every == 0:
            hit.append(path)
            return fault
        return None

    server.fault = choose
    remote = stream_of(url, cache_of(tmp_path / "cache", 1000))
    assert_same_rows(remote, stream_of(prepared), 0, 40)
    assert len(hit) > 3


def test_what_no_retry_mends_is_one_sentence(server, url, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(object_store, "FIRST_PAUSE", 0.01)
    cache = cache_of(tmp_path / "cache", retry_seconds=0.3)
    for where, sentence in (
        ("s3://no-such-bucket/x", "no-such-bucket/x/manifest.json.*no such bucket|no such object"),
        (f"s3://{BUCKET}/elsewhere", "manifest.json: there is no such object.*copy all of its"),
        (f"{url}?colour=red", "has the option .*colour"),
        ("s3:///x", "names no bucket"),
    ):
        with pytest.raises(UserError, match=sentence):
            open_split(where, "train", cache=cache)
    server.fault = lambda method, path, number: 403
    with pytest.raises(UserError, match="access is denied; check the credentials"):
        open_split(url, "train", cache=cache)
    server.fault = lambda method, path, number: 500 if path.endswith("arrow") else None
    with pytest.raises(UserError, match=r"train-00000\.arrow: no whole answer in 0.3 s, lastly"):
        open_split(url, "train", cache=cache)
    server.fault = lambda method, path, number: "flipped" if path.endswith("arrow") else None
    with pytest.raises(UserError, match=r"train-00000\.arrow is damaged \(the checksum of block"):
        open_split(url, "train", cache=cache)
    server.fault = lambda *_: None
    with pytest.raises(UserError, match=r"data\.cache\.gigabytes=1e-07 must be at least"):
        open_split(url, "train", cache=CacheConfig(dir=str(tmp_path), gigabytes=1e-7))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache\.dir .* cannot be written"):
        open_split(url, "train", cache=cache_of(tmp_path / "file" / "x"))
    old = shutil.copytree(prepared, tmp_path / "old")
    manifest = json.loads((old / "manifest.json").read_text())
    for entry in manifest["splits"]["train"]:
        del entry["blocks"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="no checksums of blocks"):
        open_split(upload(server, old, "old"), "train", cache=cache)


def test_a_damaged_block_on_disk_is_fetched_again(server, url, prepared, tmp_path):
    config = cache_of(tmp_path / "cache", 1000)
    local, first = stream_of(prepared), stream_of(url, config)
    assert_same_rows(first, local, 0, 40)
    blocks = sorted(pathlib.Path(config.dir).glob("*/0*"))
    blocks[3].write_bytes(blocks[3].read_bytes()[:-1] + b"?")
    blocks[5].write_bytes(b"")
    blocks[7].unlink()
    block_cache._cache_of_process.cache_clear()  # as a process that starts now
    assert_same_rows(stream_of(url, config), local, 0, 40)


def read_in_process(url, config, start, queue):
    stream = stream_of(url, config)
    queue.put([int(row.tokens.astype(np.int64).sum()) for row in stream.rows(start, start + 150)])


@pytest.mark.slow
def test_processes_of_a_node_share_one_cache(server, url, prepared, tmp_path):
    config = cache_of(tmp_path / "cache", 40)
    context = multiprocessing.get_context("forkserver")
    queue = context.SimpleQueue()
    processes = [
        context.Process(target=read_in_process, args=(url, config, 50, queue)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    expected = [int(row.tokens.astype(np.int64).sum()) for row in stream_of(prepared).rows(50, 200)]
    for _ in processes:
        assert queue.get() == expected
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert held(config.dir) <= 40 * 4096
    assert not list(pathlib.Path(config.dir).glob("*/.tmp-*"))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_reads_ahead_the_same_batches(server, url, prepared, tmp_path, workers):
    batches = []
    for where in (prepared, url):
        stream = stream_of(where, cache_of(tmp_path / "cache", 1000, read_ahead=3))
        keys = {"global_batch": 6, "micro_batch": 2, "workers": workers, "start_step": 5}
        loader = Loader(stream, PlainRows(), **keys)
        batches.append([next(steps) for steps in [iter(loader)] for _ in range(4)])
        loader.close()
    for ours, theirs in zip(*batches, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a.tensors["tokens"] == b.tensors["tokens"]).all()
            assert a.row_ids.tolist() == b.row_ids.tolist()


class PlainRows:
    """The least objective: rows as they are."""

    def batch(self, block):
        return {"tokens": block.tokens.astype(np.int64)}

    def counts(self, batch):
        return {"token": batch["tokens"].size}


def test_commands_read_a_bucket(server, corpus, tmp_path, capsys, monkeypatch):
    """The corpus of the other tests: verify, inspect, and a run that equals the local one."""
    url = upload(server, corpus, "corpus")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert verify(url) == verify(corpus)
    main(["data", "inspect", url])
    losses = []
    for where, name in ((str(corpus), "a"), (url, "b")):
        words = [f"--data.path={where}", f"--run.dir={tmp_path / name}", "--run.device=cpu"]
        words += ["--model.d_model=32", "--model.n_layers=1", "--data.row_length=32"]
        words += ["--train.steps=3", "--train.global_batch=4", "--eval.batches=2"]
        words += ["--run.threads=1", "--run.wandb.mode=disabled", "--run.log_every=1"]
        main(["train", *words, "--model.n_heads=2"])
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == losses[1]
    assert (tmp_path / ".cache" / "nanolm" / "blocks").is_dir()
