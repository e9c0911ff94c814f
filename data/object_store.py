"""Objects in S3-compatible storage, read by ranges: `s3://bucket/prefix[?option=…]`.

A prepared directory may lie in a bucket: this is how its files are reached, by PyArrow's S3 client.
Credentials come from where AWS tools look for them (AWS_ACCESS_KEY_ID and its kin, ~/.aws, the
machine's role). The endpoint is the URL's `endpoint_override` (PyArrow's own name for it), else
AWS_ENDPOINT_URL_S3, else AWS_ENDPOINT_URL, else Amazon's. Answers with 5xx, time-outs and bodies
that end early are asked for again, with growing pauses, until `retry_seconds` have passed.
"""

from __future__ import annotations

import os
import random
import threading
import time
import urllib.parse
from collections.abc import Callable
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs

from nanolm.errors import UserError, require

SCHEME = "s3://"
OPTIONS = ("endpoint_override", "region", "scheme", "anonymous")
RETRY_SECONDS = 300.0
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
CONNECT_SECONDS, ANSWER_SECONDS = 5.0, 20.0
# What no retry mends, as the client's messages name it -> what to do about it.
FINAL = {
    "NO_SUCH_BUCKET": "there is no such bucket; check its name and the endpoint",
    "ACCESS_DENIED": "access is denied; check the credentials and the bucket's policy",
    "INVALID_ACCESS_KEY_ID": "the access key is unknown; check AWS_ACCESS_KEY_ID",
    "SIGNATURE_DOES_NOT_MATCH": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY",
    "EXPIRED_TOKEN": "the credentials have expired; renew AWS_SESSION_TOKEN",
    "INVALID_CLIENT_TOKEN_ID": "the credentials are refused; check AWS_SESSION_TOKEN",
    "HTTP status: 403": "access is denied; check the credentials and the bucket's policy",
    "HTTP response code 403": "access is denied; check the credentials and the bucket's policy",
}

Answer = TypeVar("Answer")


class MissingError(UserError):
    """There is no such object."""


def is_remote(where: object) -> bool:
    """Whether a data path names a bucket rather than a folder."""
    return str(where).startswith(SCHEME)


class ObjectStore:
    """One folder in a bucket. Threads may share it, processes make their own (it can be pickled).

    Raises UserError for a URL without a bucket or with an unknown option.
    """

    def __init__(self, url: str, retry_seconds: float = RETRY_SECONDS) -> None:
        self.url, self.retry_seconds = url, retry_seconds
        parts = urllib.parse.urlsplit(url)
        options = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
        unknown = sorted(set(options) - set(OPTIONS))
        require(not unknown, f"{url} has the option {unknown[:1]}; known are {', '.join(OPTIONS)}")
        require(bool(parts.netloc), f"{url} names no bucket; write s3://bucket/prefix")
        self.folder = f"{parts.netloc}/{parts.path.strip('/')}".rstrip("/")
        self._options = options
        self._lock = threading.Lock()
        self._client: fs.S3FileSystem | None = None
        self._files: dict[str, pa.NativeFile] = {}

    def __reduce__(self) -> tuple:
        return ObjectStore, (self.url, self.retry_seconds)

    def name(self, file: str) -> str:
        """How messages call one of its objects."""
        return f"{SCHEME}{self.folder}/{file}"

    def size(self, file: str) -> int:
        """Bytes of an object."""
        return self._retried(file, lambda: self._open(file).size())

    def read(self, file: str, begin: int, length: int) -> bytes:
        """Bytes [begin, begin + length) of an object, all of them."""

        def attempt() -> bytes:
            data = self._open(file).read_at(length, begin)
            if len(data) != length:
                raise OSError(f"{len(data)} bytes came instead of {length}")
            return data

        return self._retried(file, attempt)

    def read_all(self, file: str) -> bytes:
        """A small object, whole."""
        return self.read(file, 0, self.size(file))

    def _open(self, file: str) -> pa.NativeFile:
        with self._lock:
            if self._client is None:
                self._client = self._connect()
            client, opened = self._client, self._files.get(file)
        if opened is None:
            opened = client.open_input_file(f"{self.folder}/{file}")
            with self._lock:
                opened = self._files.setdefault(file, opened)
        return opened

    def _connect(self) -> fs.S3FileSystem:
        environment = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        endpoint = self._options.get("endpoint_override") or environment
        region = self._options.get("region")
        if (
            region is None
            and endpoint is None
            and not (os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"))
        ):
            region = fs.resolve_s3_region(self.folder.split("/")[0])
        return fs.S3FileSystem(
            anonymous=self._options.get("anonymous", "") in ("true", "1"),
            region=region,
            endpoint_override=endpoint,
            scheme=self._options.get("scheme"),
            connect_timeout=CONNECT_SECONDS,
            request_timeout=ANSWER_SECONDS,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=2),
        )

    def _retried(self, file: str, attempt: Callable[[], Answer]) -> Answer:
        """The attempt's answer; raises UserError at once for what no retry mends."""
        give_up = time.monotonic() + self.retry_seconds
        pause = FIRST_PAUSE
        while True:
            try:
                return attempt()
            except FileNotFoundError as error:
                raise MissingError(self._sentence(file, _missing(error))) from error
            except (OSError, pa.ArrowException) as error:
                final = [remedy for mark, remedy in FINAL.items() if mark in str(error)]
                if final:
                    raise UserError(self._sentence(file, final[0])) from error
                with self._lock:
                    self._files.pop(file, None)
                if time.monotonic() + pause > give_up:
                    reason = f"no whole answer in {self.retry_seconds:g} s, lastly: {error}"
                    raise UserError(self._sentence(file, " ".join(reason.split()))) from error
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _sentence(self, file: str, reason: str) -> str:
        return f"cannot read {self.name(file)}: {reason}"


def _missing(error: FileNotFoundError) -> str:
    bucket = "NO_SUCH_BUCKET" in str(error) or "bucket" in str(error).lower().split("key")[0]
    return FINAL["NO_SUCH_BUCKET"] if bucket else "there is no such object; check bucket and prefix"
