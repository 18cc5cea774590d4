"""run_manifest.json keeps every start, lists the checkpoints there are, and says how the run ended."""

import hashlib
import json
import os

import pytest

from trainer import errors
from trainer.errors import StorageFailed, UserError
from trainer.run import manifest as manifest_module
from trainer.run.manifest import STATES, Manifest, changes, config_facts, read_manifest, run_facts, start_entry


def facts(world_size=1, **more):
    return run_facts(
        command=["difftrain", "train", "--config", "läuf e.yaml"],
        config=config_facts("läuf e.yaml", "seed: 7\n", b"seed: 7\nsteps: 3\n"),
        git={"commit": "c", "branch": "b", "dirty": False, "diff_sha256": None, "remote": None},
        seed=7,
        deterministic=True,
        model={"kind": "tiny", "source": "built in", "revision": None, "files": {"unet.safetensors": "ab"}},
        topology={"world_size": world_size, "micro_batch_size": 4, "accumulation": 1, "num_machines": 1},
        data={"records": 12, "fingerprint": "f", "held_out": 2} | more,
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run_manifest.json"


def begun(path, step=0, **options):
    manifest = Manifest(path, sleep=lambda _: None)
    manifest.begin(facts(**options), start_entry(facts(**options), step, time="2026-01-01T00:00:00+00:00"), {"seed": 7})
    return manifest


def test_a_manifest_holds_every_promised_fact(path):
    begun(path)
    written = json.loads(path.read_bytes())
    assert written["schema_version"] == 1
    assert written["command"] == ["difftrain", "train", "--config", "läuf e.yaml"]
    assert written["config"] == {
        "source": "läuf e.yaml",
        "source_sha256": hashlib.sha256(b"seed: 7\n").hexdigest(),
        "resolved_sha256": hashlib.sha256(b"seed: 7\nsteps: 3\n").hexdigest(),
    }
    assert written["git"]["commit"] == "c"
    assert (written["seed"], written["deterministic"]) == (7, True)
    assert written["model"]["files"] == {"unet.safetensors": "ab"}
    assert written["topology"] == {"world_size": 1, "micro_batch_size": 4, "accumulation": 1, "num_machines": 1}
    assert written["data"] == {"records": 12, "fingerprint": "f", "held_out": 2}
    assert written["checkpoints"] == []
    assert written["status"] == {"state": "running", "exit_code": None, "reason": ""}
    start = written["starts"][0]
    assert (start["time"], start["from_step"], start["pid"]) == ("2026-01-01T00:00:00+00:00", 0, os.getpid())
    assert start["hostname"]
    assert list(written)[-3:] == ["starts", "checkpoints", "status"]


def test_a_fact_left_out_is_our_own_bug():
    with pytest.raises(AssertionError, match="git lacks commit"):
        run_facts(
            command=[],
            config=config_facts("", "", ""),
            git={},
            seed=0,
            deterministic=False,
            model={},
            topology={},
            data={},
        )


def test_a_resume_keeps_the_history(path):
    first = begun(path)
    first.add_checkpoint(2, "checkpoint-2.pt", "aa", 10)
    first.end("stopped", 75, "a signal")
    begun(path, step=2, world_size=2)
    written = read_manifest(path)
    assert [start["from_step"] for start in written["starts"]] == [0, 2]
    assert [start["topology"]["world_size"] for start in written["starts"]] == [1, 2]
    assert written["topology"]["world_size"] == 2
    assert [known["step"] for known in written["checkpoints"]] == [2]
    assert written["status"]["state"] == "running"


def test_checkpoints_are_listed_by_step_without_pruned_ones(path):
    manifest = begun(path)
    for step, sha256 in ((2, "aa"), (10, "bb"), (10, "dd"), (9, "cc")):
        manifest.add_checkpoint(step, f"checkpoint-{step}.pt", sha256, 5)
    assert [(known["step"], known["sha256"]) for known in read_manifest(path)["checkpoints"]] == [
        (2, "aa"),
        (9, "cc"),
        (10, "dd"),
    ]
    manifest.keep_checkpoints([9, 10, 11])
    assert [known["step"] for known in read_manifest(path)["checkpoints"]] == [9, 10]


def test_every_end_of_a_run_has_a_state_that_the_manifest_knows(path):
    manifest = begun(path)
    for end in (errors.RunEnd, errors.UserError, errors.StorageFailed, errors.Stopped, errors.Diverged):
        assert end.state in STATES
        manifest.end(end.state, end.exit_code, "why")
        assert read_manifest(path)["status"] == {"state": end.state, "exit_code": end.exit_code, "reason": "why"}
    with pytest.raises(AssertionError, match="no such state"):
        manifest.end("finished", 0, "")


def test_validate_never_writes_over_the_manifest_of_a_run(path):
    Manifest(path).validated(facts())
    Manifest(path).validated(facts())
    assert read_manifest(path)["status"] == {"state": "validated", "exit_code": 0, "reason": "the config is valid"}
    assert read_manifest(path)["starts"] == []
    begun(path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="holds a run"):
        Manifest(path).validated(facts())
    assert path.read_bytes() == before


def test_a_damaged_newer_or_foreign_manifest_is_refused_unchanged(path):
    begun(path)
    whole = path.read_bytes()
    newer = json.dumps(json.loads(whole) | {"schema_version": 2}).encode()
    for content in (whole[: len(whole) // 2], b"", b"\xff", b"[]", b'{"schema_version": 1}', newer):
        path.write_bytes(content)
        with pytest.raises(UserError):
            begun(path, step=5)
        assert path.read_bytes() == content
    with pytest.raises(UserError, match="no run manifest"):
        read_manifest(path.with_name("absent"))


def test_the_old_manifest_stays_whole_while_a_failing_disk_is_retried(path, monkeypatch):
    manifest = begun(path)
    before = path.read_bytes()
    real, calls = manifest_module.write_json, []

    def failing(target, value):
        calls.append(1)
        if len(calls) <= 6 or len(calls) == 7:
            raise OSError(28, "No space left on device")
        real(target, value)

    monkeypatch.setattr(manifest_module, "write_json", failing)
    with pytest.raises(StorageFailed, match="No space left"):
        manifest.add_checkpoint(1, "checkpoint-1.pt", "aa", 1)
    assert len(calls) == 6
    assert path.read_bytes() == before
    manifest.end("done", 0, "")  # the 7th write fails, the 8th succeeds
    assert len(calls) == 8
    assert [known["step"] for known in read_manifest(path)["checkpoints"]] == [1]
    assert os.listdir(path.parent) == [path.name]


def test_an_unchanged_list_of_checkpoints_is_not_written_again(path):
    manifest = begun(path)
    manifest.add_checkpoint(1, "checkpoint-1.pt", "aa", 1)
    path.unlink()
    manifest.add_checkpoint(1, "checkpoint-1.pt", "aa", 1)
    manifest.keep_checkpoints([1])
    assert not path.exists()


def test_changes_name_what_differs_between_two_environments():
    before = {"time": "1", "packages": {"torch": "2.12", "peft": None, "old": "1"}, "gpus": [], "driver": "5"}
    after = {"time": "2", "packages": {"torch": "2.13", "peft": None}, "gpus": ["a"], "driver": "5"}
    assert changes(before, after) == {
        "gpus": {"was": [], "now": ["a"]},
        "packages.old": {"was": "1", "now": None},
        "packages.torch": {"was": "2.12", "now": "2.13"},
    }
    assert changes(before, before) == {}
