"""What killed conversions left is removed; what one at work writes is not."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from aemim_algorithm.data.abandoned import held
from aemim_algorithm.data.shards import staged


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_conversion_removes_what_a_killed_one_left_and_not_what_another_is_writing(tmp_path: Path) -> None:
    out = tmp_path / "shards"
    child = os.fork()
    if child == 0:
        with staged(out) as stage:
            (stage / "shard.00000.mds").write_bytes(b"cut")
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (left,) = tmp_path.iterdir()
    other, living = tmp_path / ".other.1.partial", tmp_path / ".shards.0.partial"
    other.mkdir()
    living.mkdir()
    with held(living), staged(out) as stage:
        assert not left.exists() or left == stage
        assert living.exists()
        (stage / "index.json").write_text("{}")
    assert sorted(tmp_path.iterdir()) == [other, living, out]
    assert [path.name for path in out.iterdir()] == ["index.json"]
