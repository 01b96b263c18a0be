"""Shards at a URL: fetched in a bounded time, checked when they arrive, or refused in one line."""

from __future__ import annotations

import os
import urllib.parse
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any
from uuid import uuid4

import numpy as np
from boto3.session import Session
from botocore import exceptions as s3
from numpy.typing import NDArray
from streaming import Stream
from streaming.base.compression import decompress
from streaming.base.hashing import get_hash
from streaming.base.util import retry

from aemim_algorithm.data.bounded import within
from aemim_algorithm.data.failures import ShardError
from aemim_algorithm.data.index import hash_of, no_hash, read_index

__all__ = ["RETRIES", "TIMEOUT", "ShardStream", "explain", "fetch_index"]

_INDEX = "index.json"
RETRIES = 2
TIMEOUT = 60.0  # seconds


class ShardStream(Stream):
    """A folder of shards, local or at a URL; what is fetched arrives whole or not at all.

    Args:
        local: Folder of the shards; with `remote`, the folder to fetch them into.
        remote: Where to fetch them from; None: `local` has them all.
        retries: How often a failed download is repeated, after 1, 2, 4, ... seconds.
        timeout: Seconds that one download of one shard may take.
        verify: Whether to compare what is fetched with the index's hashes, not only its size; None: where it
            has them. True requires them.
    """

    def __init__(
        self,
        *,
        local: str | Path,
        remote: str | None = None,
        retries: int = RETRIES,
        timeout: float = TIMEOUT,
        verify: bool | None = None,
    ) -> None:
        attempts = 1 + retries
        try:
            super().__init__(
                local=str(local), remote=remote, download_retry=attempts, download_timeout=timeout
            )
        except (ValueError, ImportError) as error:  # an unknown scheme, or one whose library is missing
            raise ShardError(f"{remote}: {explain(error, str(remote))}") from error
        self._verify = verify
        self._files: dict[str, Any] = {}

    def get_shards(self, world: Any, allow_unsafe_types: bool) -> list[Any]:
        """Read the index, fetching it first if need be; see `Stream`."""
        if self.remote and world.is_local_leader and not Path(self.local, _INDEX).exists():
            self._download_file(_INDEX)
        shards = super().get_shards(world, allow_unsafe_types)
        parts = [part for shard in shards for pair in shard.file_pairs for part in pair if part]
        self._files = {part.basename: part for part in parts}
        if self._verify and (bare := [part.basename for part in parts if not hash_of(part.hashes)]):
            raise ShardError(no_hash(self.remote or self.local, bare[0]))
        return shards

    def set_up_local(self, shards: list[Any], cache_usage_per_shard: NDArray[np.int64]) -> None:
        """Look which shards are here, without those that are damaged: what arrives has its size."""
        if self.remote is not None:
            for path in Path(self.local).rglob("*"):
                part = self._files.get(str(path.relative_to(self.local)))
                with suppress(FileNotFoundError):  # another run shares the cache
                    if part is not None and path.stat().st_size != part.bytes:
                        path.unlink()
        super().set_up_local(shards, cache_usage_per_shard)

    def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
        target = Path(self.local, to_basename or from_basename)
        if self.remote is None:
            raise ShardError(f"{target} is missing since the run started: get it again, then continue")
        source = f"{self.remote.rstrip('/')}/{from_basename}"
        try:
            retry(clean_up_fn=self._downloader.clean_up, num_attempts=self.download_retry)(
                lambda: self._fetch(source, target, from_basename)
            )()
        except Exception as error:
            raise ShardError(f"{source}: {explain(error, source, self.download_timeout)}") from error
        return str(target)

    def _fetch(self, source: str, target: Path, name: str) -> None:
        """Once: the file appears under its own name when it is whole and has been checked."""
        partial, late = partial_of(target), Event()

        def fetch() -> None:
            self._downloader.download(source, str(partial), self.download_timeout)
            if late.is_set():
                partial.unlink(missing_ok=True)

        try:
            within(self.download_timeout, fetch)
            self._check(partial, name)
            partial.replace(target)
        finally:
            late.set()
            partial.unlink(missing_ok=True)

    def _decompress_shard_part(
        self, zip_info: Any, zip_filename: str, raw_filename: str, compression: str | None
    ) -> None:
        """As streaming does, with a name that no other run in this cache uses."""
        partial = partial_of(Path(raw_filename))
        try:
            partial.write_bytes(decompress(compression, Path(zip_filename).read_bytes()))
            partial.replace(raw_filename)
        finally:
            partial.unlink(missing_ok=True)
        if not self.safe_keep_zip:
            Path(zip_filename).unlink(missing_ok=True)

    def _check(self, path: Path, name: str) -> None:
        """Raise `ShardError` unless a file is what the index says."""
        part = self._files.get(name)
        if part is None:  # the index itself
            return
        size, known = path.stat().st_size, hash_of(part.hashes)
        fault = "" if size == part.bytes else f"{size:,} bytes arrived, expected {part.bytes:,}"
        if (
            not fault
            and known
            and self._verify is not False
            and get_hash(known[0], path.read_bytes()) != known[1]
        ):
            fault = f"its {known[0]} is not the one in the index"
        if fault:
            raise ShardError(f"{fault}: put the shard there again")


def partial_of(target: Path) -> Path:
    """A name for a file that is still arriving, which no other process, thread or machine uses."""
    return target.with_name(f"{target.name}.{uuid4().hex}.partial")


def fetch_index(
    remote: str, cache: Path, *, retries: int = RETRIES, timeout: float = TIMEOUT, keep: bool = True
) -> list[dict[str, Any]]:
    """Fetch the index of remote shards, one small file: it is there, and this machine may read it.

    Args:
        remote: Address of the shards' folder.
        cache: The folder that the shards are downloaded into.
        retries: As for `ShardStream`.
        timeout: As for `ShardStream`, in seconds.
        keep: Whether to leave the index in the cache.

    Returns:
        The shards as the index describes them.

    Raises:
        ValueError: It cannot be fetched, is no index, or is not that of the shards in the cache.
    """
    with TemporaryDirectory() as scratch:
        stream = ShardStream(local=scratch, remote=remote, retries=retries, timeout=timeout)
        index = Path(stream._download_file(_INDEX))
        shards, data = read_index(index.parent, name=remote), index.read_bytes()
    cached = cache / _INDEX
    if cached.is_file() and cached.read_bytes() != data:
        raise ShardError(
            f"{cache} holds shards that {remote} had earlier: remove it, unless a run needs them to continue"
        )
    if keep and not cached.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        partial = partial_of(cached)
        partial.write_bytes(data)
        partial.replace(cached)
    return shards


def explain(error: BaseException, source: str, timeout: float = TIMEOUT) -> str:
    """What went wrong with a download from `source`, and what to do, in one line without the address.

    Args:
        error: What the download raised.
        source: The address.
        timeout: Seconds for a question to the server, where the error leaves one open.

    Returns:
        The line.
    """
    if (cause := getattr(error, "last_exception", None)) is not None:  # boto3's: "Max Retries Exceeded"
        error = cause
    if isinstance(error, s3.NoCredentialsError | s3.PartialCredentialsError):
        return "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(error, s3.ClientError):
        return _explain_answer(error, source, timeout)
    if isinstance(error, s3.HTTPClientError | s3.ConnectionError | s3.IncompleteReadError):
        return f"no connection: check the network and S3_ENDPOINT_URL ({_line(error)})"
    if isinstance(error, ValueError) and "Invalid endpoint" in str(error):
        endpoint = os.environ.get("S3_ENDPOINT_URL")
        return f"S3_ENDPOINT_URL={endpoint}: expected an address such as https://storage.example"
    if isinstance(error, TimeoutError):
        return f"{_line(error)}: check the network, or raise data.download_timeout"
    return _line(error)


def _explain_answer(error: s3.ClientError, source: str, timeout: float) -> str:
    code = str(error.response["Error"]["Code"])
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    bucket = urllib.parse.urlparse(source).netloc
    if status == 404 and _has_bucket(bucket, timeout):
        return f"no such object in the bucket {bucket}: check the folder"
    if status == 404:
        return f"no such bucket as {bucket}: check its name and S3_ENDPOINT_URL"
    if status in (401, 403):
        return f"access refused ({code}): check the credentials and the rights of their owner"
    return f"the server answered {status} ({code}): try again later"


def _has_bucket(name: str, timeout: float) -> bool:
    """Whether a bucket is there; streaming asks for the object alone, and S3 answers 404 to both."""

    def ask() -> None:
        Session().client("s3", endpoint_url=os.environ.get("S3_ENDPOINT_URL")).head_bucket(Bucket=name)

    try:
        within(timeout, ask)
    except s3.ClientError as error:
        return str(error.response["Error"]["Code"]) not in ("404", "NoSuchBucket")
    except (s3.BotoCoreError, TimeoutError):
        pass  # it cannot be known; the object is missing in any case
    return True


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
