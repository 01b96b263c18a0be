"""Fixtures of the tests of remote data: a set of shards, and a bucket that holds it, behind a real S3 API."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import torch
from streaming import MDSWriter
from torchvision.io import encode_png

from aemim_algorithm.data.shards import COLUMNS, HASH

SAMPLES, PER_SHARD, SIDE, BATCH = 96, 8, 16, 8
SERVER = Path(__file__).with_name("s3_server.py")


def write_set(folder: Path, hashes: tuple[str, ...] = (HASH,)) -> Path:
    """96 images of noise in 14 shards of about the same size; a label is the sample's number."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (SAMPLES, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    files = [encode_png(image).numpy().tobytes() for image in images]
    limit = PER_SHARD * (max(map(len, files)) + 40)
    with MDSWriter(out=str(folder), columns=COLUMNS, size_limit=limit, hashes=list(hashes)) as writer:
        for label, file in enumerate(files):
            writer.write({"image": file, "label": label})
    return folder


class Bucket:
    """A bucket that holds the shards in `folder`, and a server that can be made to fail."""

    def __init__(self, folder: Path, fault_file: Path, address: str) -> None:
        self.fault_file, self.address = fault_file, address
        self.client = boto3.client("s3", endpoint_url=address)
        self.client.create_bucket(Bucket="bucket")
        for file in folder.iterdir():
            self.put(file.name, file.read_bytes())

    @property
    def url(self) -> str:
        return "s3://bucket/set"

    def put(self, name: str, data: bytes) -> None:
        self.client.put_object(Bucket="bucket", Key=f"set/{name}", Body=data)

    def fail(self, how: str) -> None:
        self.fault_file.write_text(how)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("shards") / "set")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("server")
    fault_file = folder / "fault"
    fault_file.touch()
    with (folder / "log").open("w") as log:
        command = [sys.executable, str(SERVER), str(fault_file)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert server.stdout is not None
        yield server.stdout.readline().strip(), fault_file
    finally:
        server.kill()
        server.communicate()


@pytest.fixture
def bucket(
    shards: Path, address: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Bucket]:
    for name, value in {
        "S3_ENDPOINT_URL": address[0],
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }.items():
        monkeypatch.setenv(name, value)
    address[1].write_text("")
    yield Bucket(shards, address[1], address[0])
    address[1].write_text("")
