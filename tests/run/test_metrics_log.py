"""metrics.jsonl has one line per step, whatever happens to the process or the disk."""

import contextlib
import json
import math
import os
import resource
import signal
import time

import pytest

from trainer.errors import StorageFailed, UserError
from trainer.run import metrics
from trainer.run.metrics import MetricsLog, read


def record(step, **more):
    return {"step": step, "loss": 1 / step, "timing": {"wait_seconds": 0.5}} | more


def new_log(path, last=0, **options):
    log = MetricsLog(path, sleep=lambda _: None, **options)
    log.rewind(0)
    log.append([record(step) for step in range(1, last + 1)])
    log.sync()
    return log


def steps(path):
    return [line["step"] for line in read(path)]


@contextlib.contextmanager
def files_limited_to(size_bytes):
    """A write past this size is cut short, and the next one is refused: what a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_line_n_is_step_n_as_it_was_given(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = new_log(path)
    log.append([record(1), record(2)])
    log.append([])
    log.append([record(3, note="ü")])
    assert read(path) == [record(1), record(2), record(3, note="ü")]
    assert path.read_bytes().count(b"\n") == 3


def test_values_that_are_not_finite_are_written_as_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = new_log(path)
    log.append([record(1, loss=math.nan, grad_norm=math.inf, bins=[-math.inf, 2.0], timing={"x": math.nan})])

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": None, "timing": {"x": None}, "grad_norm": None, "bins": [None, 2.0]}


def test_a_step_left_out_or_given_twice_is_our_own_bug(tmp_path):
    log = new_log(tmp_path / "metrics.jsonl", last=2)
    for bad in (2, 4):
        with pytest.raises(AssertionError, match=f"step {bad} after step 2"):
            log.append([record(bad)])
    with pytest.raises(AssertionError, match="rewind"):
        MetricsLog(tmp_path / "metrics.jsonl").append([record(3)])


def test_a_rewind_drops_all_later_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    new_log(path, last=5)
    with open(path, "ab") as file:
        file.write(b'{"step": 6, "lo')
    assert steps(path) == [1, 2, 3, 4, 5]  # a reader overlooks the torn line
    before = path.read_bytes().splitlines(keepends=True)
    log = MetricsLog(path)
    assert log.rewind(3) == 3
    assert path.read_bytes() == b"".join(before[:3])
    assert log.rewind(3) == 0
    log.append([record(4)])
    assert steps(path) == [1, 2, 3, 4]
    assert log.rewind(0) == 4
    assert path.read_bytes() == b""
    assert MetricsLog(tmp_path / "absent.jsonl").rewind(0) == 0
    assert not (tmp_path / "absent.jsonl").exists()


@pytest.mark.parametrize(
    "lines, step, first_missing",
    [
        ([1, 2, 4, 5], 4, 3),
        ([1, 2, 2, 3], 3, 3),
        ([2, 3], 2, 1),
        ([1, 2, 3], 5, 4),
        ([], 1, 1),
        ([1, 2, '{"step": 3, "loss"'], 3, 3),  # torn, and needed
        ([1, "garbage\n", 3], 3, 2),
        ([1, "[2]\n", 3], 3, 2),
        ([1, b"\xff\xfe\n", 3], 3, 2),
    ],
)
def test_a_gap_before_the_checkpoint_is_refused_by_its_first_line(tmp_path, lines, step, first_missing):
    path = tmp_path / "metrics.jsonl"
    parts = [line if isinstance(line, bytes | str) else json.dumps(record(line)) + "\n" for line in lines]
    path.write_bytes(b"".join(part if isinstance(part, bytes) else part.encode() for part in parts))
    before = path.read_bytes()
    with pytest.raises(UserError, match=rf"up to {step}: line {first_missing} should be step {first_missing}, but"):
        MetricsLog(path).rewind(step)
    assert path.read_bytes() == before


def test_damage_after_the_checkpoint_is_no_obstacle(tmp_path):
    path = tmp_path / "metrics.jsonl"
    new_log(path, last=2)
    with open(path, "ab") as file:
        file.write(b"garbage\n\xff\x00\x00\x00")
    with pytest.raises(UserError, match="line 3 is not a JSON object"):
        read(path)
    assert MetricsLog(path).rewind(2) == 2
    assert steps(path) == [1, 2]


@pytest.mark.parametrize("moment", ["before the cut", "after the cut"])
def test_a_kill_within_a_rewind_loses_no_line_up_to_the_checkpoint(tmp_path, monkeypatch, moment):
    path = tmp_path / "metrics.jsonl"
    new_log(path, last=50)
    real_ftruncate = os.ftruncate

    def dying_ftruncate(descriptor, size):
        if moment == "after the cut":
            real_ftruncate(descriptor, size)
        os.kill(os.getpid(), signal.SIGKILL)

    if (pid := os.fork()) == 0:
        monkeypatch.setattr(metrics.os, "ftruncate", dying_ftruncate)
        MetricsLog(path).rewind(30)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert steps(path)[:30] == list(range(1, 31))
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
    MetricsLog(path).rewind(30)
    assert steps(path) == list(range(1, 31))


def test_twenty_kills_and_resumes_leave_one_line_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    reached = 0  # steps, as of the newest checkpoint
    for trial in range(20):
        if (pid := os.fork()) == 0:
            log = MetricsLog(path)
            log.rewind(reached)
            for step in range(reached + 1, 10**6):
                log.append([record(step, pad="x" * (step % 97))])
                if step % 7 == 0:
                    log.sync()
            os._exit(0)
        before, deadline = len(steps(path)), time.monotonic() + 10
        while len(steps(path)) <= before + 20 and time.monotonic() < deadline:
            time.sleep(0.001 * (1 + trial % 5))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        there = steps(path)
        assert there == list(range(1, len(there) + 1))
        assert len(there) >= reached
        reached = len(there) * 9 // 10
    assert reached > 0
    MetricsLog(path).rewind(reached)
    assert steps(path) == list(range(1, reached + 1))


def test_a_full_disk_leaves_no_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = new_log(path, last=3)
    whole = path.read_bytes()
    with files_limited_to(len(whole) + 20):  # room for a part of a line
        with pytest.raises(StorageFailed, match=r"metrics.jsonl could not be written in 6 attempts: .*File too large"):
            log.append([record(4)])
        assert path.read_bytes() == whole
        with pytest.raises(StorageFailed):
            log.append([record(5)])
        with pytest.raises(StorageFailed):
            log.sync()
        assert path.read_bytes() == whole
    log.append([record(6)])
    assert steps(path) == [1, 2, 3, 4, 5, 6]


def test_a_passing_fault_is_not_noticed(tmp_path, monkeypatch):
    log = new_log(tmp_path / "metrics.jsonl", last=1)
    real_write, calls = os.write, []

    def flaky_write(descriptor, data):
        calls.append(len(data))
        if len(calls) == 1:
            return real_write(descriptor, data[:5])
        if len(calls) < 4:
            raise OSError(5, "Input/output error")
        return real_write(descriptor, data)

    monkeypatch.setattr(metrics.os, "write", flaky_write)
    log.append([record(2)])
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]


def test_a_failed_fsync_is_followed_by_a_new_write(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    log = new_log(path, last=2)
    log.append([record(3), record(4)])
    real_fsync, seen = os.fsync, []

    def forgetful_fsync(descriptor):
        seen.append(path.stat().st_size)
        if len(seen) == 1:  # what a kernel does with pages it could not write
            size = os.fstat(descriptor).st_size
            os.pwrite(os.open(path, os.O_WRONLY), b"\0" * 10, size - 10)
            raise OSError(5, "Input/output error")
        real_fsync(descriptor)

    monkeypatch.setattr(metrics.os, "fsync", forgetful_fsync)
    log.sync()
    assert len(seen) == 2
    assert read(path) == [record(step) for step in (1, 2, 3, 4)]


def test_a_log_that_somebody_removes_or_cuts_ends_the_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for spoil in (path.unlink, lambda: os.truncate(path, 10), lambda: path.rename(tmp_path / "elsewhere")):
        log = new_log(path, last=2)
        spoil()
        with pytest.raises(StorageFailed, match="was removed, replaced or cut"):
            log.append([record(3)])
        path.unlink(missing_ok=True)


def test_a_sync_reaches_the_disk(tmp_path, monkeypatch):
    log = new_log(tmp_path / "metrics.jsonl", last=1)
    synced = []
    monkeypatch.setattr(metrics.os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    log.append([record(2)])
    assert synced == []
    log.sync()
    assert synced == [(tmp_path / "metrics.jsonl").stat().st_size]


LONG = 20_000  # lines, over a megabyte: the first part of such a file is counted, not read


@pytest.fixture(scope="module")
def long_log(tmp_path_factory):
    """The lines of a log of that many steps."""
    path = tmp_path_factory.mktemp("long") / "metrics.jsonl"
    new_log(path, LONG).close()
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("kept", [0, 1, 9_999, LONG - 1, LONG])
def test_a_long_file_is_rewound_to_the_same_bytes_as_a_short_one(tmp_path, long_log, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(long_log) + b'{"step": ')  # torn
    assert MetricsLog(path).rewind(kept) == LONG - kept + 1
    assert path.read_bytes() == b"".join(long_log[:kept])


@pytest.mark.parametrize("harmed", [2, 10_000, LONG - 5])
def test_a_missing_or_repeated_line_is_named_wherever_it_stands(tmp_path, long_log, harmed):
    path = tmp_path / "metrics.jsonl"
    for lines, first_wrong in (
        ([*long_log[: harmed - 1], *long_log[harmed:]], harmed),
        ([*long_log[:harmed], long_log[harmed - 1], *long_log[harmed:]], harmed + 1),
    ):
        path.write_bytes(b"".join(lines))
        before = path.read_bytes()
        with pytest.raises(UserError, match=f"line {first_wrong} should be step {first_wrong}, but"):
            MetricsLog(path).rewind(LONG - 1)
        assert path.read_bytes() == before
