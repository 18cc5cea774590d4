"""What the tests of builds compare with."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from builds import COUNT, SHARD, Encoder, build_alone, entries, files, make_store, shards


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    """The files of a build in one go on one rank."""
    store = make_store(tmp_path / "whole")
    assert build_alone(store, entries(COUNT), Encoder(tmp_path / "whole.log"))[0] == COUNT
    assert len(shards(store)) == math.ceil(167 / SHARD) + math.ceil(333 / SHARD)
    return files(store)
