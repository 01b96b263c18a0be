"""A script: moto's S3 API on loopback, which fails as a file says. Prints its address when it is up.

`python s3_server.py FAULT_FILE`, where the file holds nothing or one of

    500      every answer about a shard is an internal error
    cut      the connection closes after half of a shard
    stall    a shard's bytes never come
    refused  the credentials have no right to read
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>as the test says</Message></Error>"


def main(fault_file: Path) -> None:
    backend = DomainDispatcherApplication(create_backend_app)

    def application(environment: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        about_data = environment["PATH_INFO"].endswith((".mds", ".json"))
        reading = environment["REQUEST_METHOD"] in ("GET", "HEAD")
        fault = fault_file.read_text() if about_data and reading else ""
        if fault in ("500", "refused"):
            status = {"500": "500 Internal Server Error", "refused": "403 Forbidden"}[fault]
            start_response(status, [("Content-Type", "application/xml")])
            return [ERROR.format({"500": "InternalError", "refused": "AccessDenied"}[fault]).encode()]
        answer = b"".join(backend(environment, start_response))
        if environment["REQUEST_METHOD"] == "GET" and fault == "stall":
            return stalled()
        return [answer[: len(answer) // 2]] if fault == "cut" and answer else [answer]

    server = make_server("127.0.0.1", 0, application, threaded=True)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


def stalled() -> Iterator[bytes]:
    time.sleep(60)
    yield b""


if __name__ == "__main__":
    main(Path(sys.argv[1]))
