"""The run directory: its names, what counts as a run, and where one may not start."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.run.rundir import RunDir

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_files_have_their_public_names(tmp_path):
    run = RunDir(tmp_path / "r")
    paths = [run.resolved_config, run.environment, run.manifest, run.metrics, run.checkpoint(12), run.sidecar(12)]
    paths += [run.sample(7), run.records]
    assert [path.relative_to(run.path).as_posix() for path in paths] == [
        "config.resolved.yaml",
        "env.json",
        "run_manifest.json",
        "metrics.jsonl",
        "checkpoint-12.pt",
        "checkpoint-12.json",
        "samples/step-000007.png",
        "records.jsonl",
    ]
    assert not run.path.exists()


def test_checkpoints_are_counted_by_sidecar_in_the_order_of_their_numbers(tmp_path):
    run = RunDir(tmp_path)
    for age, step in enumerate((10, 9, 100, 2)):
        run.sidecar(step).write_text("{}")
        os.utime(run.sidecar(step), (10**9, 10**9 - 3600 * age))
    run.checkpoint(200).write_bytes(b"no sidecar: it does not exist")
    for name in ("checkpoint-007.json", "checkpoint-5.json.bak", "checkpoint--3.json", "checkpoint-x.json"):
        (tmp_path / name).write_text("{}")
    assert run.checkpoint_steps() == [2, 9, 10, 100]
    assert RunDir(tmp_path / "absent").checkpoint_steps() == []


def test_a_folder_holds_a_run_once_it_has_a_metrics_line_or_a_sidecar(tmp_path):
    run = RunDir(tmp_path)
    assert not RunDir(tmp_path / "absent").holds_run()
    for path in (run.resolved_config, run.environment, run.manifest, run.metrics, run.checkpoint(1)):
        path.write_text("")
    assert not run.holds_run()
    run.metrics.write_text('{"step": 1, "lo')  # torn before its first line ended
    assert not run.holds_run()
    run.metrics.write_text('{"step": 1}\n')
    assert run.holds_run()
    run.metrics.unlink()
    run.sidecar(1).write_text("{}")
    assert run.holds_run()


@pytest.mark.parametrize("path", ["a b/run (1)", "läufe/実験/🙂", "x" * 200, "deep/" * 20 + "er"])
def test_spaces_unicode_long_and_missing_parents_are_fine(tmp_path, path):
    run = RunDir(tmp_path / path)
    run.check_writable()
    assert os.listdir(tmp_path) == []  # the check made nothing
    run.create()
    run.create()
    run.check_writable()
    assert run.path.is_dir()
    assert os.listdir(run.path) == []


def test_a_path_that_cannot_become_a_folder_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dead").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = sorted(os.listdir(tmp_path))
    for path in ("file", "file/run", "file/a/b", "dead", "dead/run", "loop/run", "x" * 256, "a/" + "ü" * 128, "nul\0"):
        run = RunDir(tmp_path / path)
        for action in (run.check_writable, run.create):
            with pytest.raises(UserError) as caught:
                action()
            assert caught.value.exit_code == 2
            assert "\n" not in str(caught.value)
            assert repr(str(run.path))[1:-1] in repr(str(caught.value))
        assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "file").read_text() == "mine"


def test_the_message_names_the_file_that_stands_in_the_way(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"/file/a/b' cannot be written: '.*/file' is not a folder; choose another"):
        RunDir(tmp_path / "file/a/b").check_writable()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody without rights")
def test_a_folder_without_permission_is_refused():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        Path(folder, "closed").mkdir(mode=0o700)
        for path in (folder, f"{folder}/run", f"{folder}/closed/run", f"{folder}/closed/a/b"):
            if (pid := os.fork()) == 0:
                os.setuid(65534)
                try:
                    RunDir(path).check_writable()
                except UserError as error:
                    os._exit(2 if "Permission denied" in str(error) and "\n" not in str(error) else 3)
                finally:
                    os._exit(4)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2, path


def test_a_read_only_mount_is_refused(tmp_path):
    """Permission bits do not stop root, a read-only mount does."""
    code = "from trainer.run.rundir import RunDir; import sys; RunDir(sys.argv[1]).check_writable()"
    script = 'mount -t tmpfs -o ro none "$1" || exit 77; "$2" -c "$3" "$1/run"'
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    command = ["unshare", "--mount", "sh", "-c", script, "sh", str(tmp_path), sys.executable, code]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("needs the right to mount")
    assert "UserError: output folder" in done.stderr
    assert "Read-only file system" in done.stderr


def test_a_sweep_covers_the_samples_too(tmp_path):
    run = RunDir(tmp_path)
    run.samples.mkdir()
    strays = [tmp_path / ".env.json.difftrain-tmp-1", run.samples / ".step-000001.png.difftrain-tmp-1"]
    for stray in strays:
        stray.write_bytes(b"half")
    assert run.sweep() == [".env.json.difftrain-tmp-1", "samples/.step-000001.png.difftrain-tmp-1"]
    assert not any(stray.exists() for stray in strays)
