from __future__ import annotations

from pathlib import Path

import pytest

from trainer.cli import main

CONFIG = """\
model: {kind: tiny}
data: {kind: shapes, image_size: 32, num_workers: 0, num_images: 16}
train: {seed: 7, max_steps: 4, global_batch_size: 2, log_every: 2, deterministic: true}
objective: {kind: epsilon}
lr: {kind: constant, peak: 1e-4, warmup_steps: 0}
"""


def trained(folder: Path, name: str, *overrides: str) -> str:
    (folder / "config.yaml").write_text(CONFIG)
    run = str(folder / name)
    more = ["--set", *overrides] if overrides else []
    assert main(["train", "--config", str(folder / "config.yaml"), *more, "--output-dir", run]) == 0
    return run


@pytest.fixture(scope="module")
def a(tmp_path_factory: pytest.TempPathFactory, cache_of_its_own: None) -> str:
    """The run that the others are compared with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")  # as for every test: `diff` would see it
        patch.setenv("TRANSFORMERS_OFFLINE", "1")
        return trained(tmp_path_factory.mktemp("a"), "a")


def test_two_runs_of_one_config_are_the_same(a: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    b = trained(tmp_path, "b")
    capsys.readouterr()
    assert main(["diff", a, b]) == 0, capsys.readouterr().out
    output = capsys.readouterr().out
    assert "config: the same" in output
    assert "metrics: the same for 4 steps" in output


def test_a_changed_rate_is_named_with_the_first_step_that_differs(a: str, tmp_path: Path, capsys):
    b = trained(tmp_path, "b", "lr.kind=linear", "lr.warmup_steps=1")
    capsys.readouterr()
    assert main(["diff", a, b]) == 1
    output = capsys.readouterr().out
    assert "  lr.kind: 'constant' -> 'linear'" in output
    assert "metrics: differ first at step 3\n" in output, "the first two steps of both have the peak rate"


def test_other_data_are_told_by_their_fingerprint(a: str, tmp_path: Path, capsys):
    b = trained(tmp_path, "b", "data.data_seed=5")
    capsys.readouterr()
    assert main(["diff", a, b]) == 1
    output = capsys.readouterr().out
    assert "  fingerprint: " in output
    assert "metrics: differ first at step 1\n  batch: " in output
    assert "records: 16 removed, 16 added\n  'shapes/0/0': removed\n" in output, "the seed is in their keys"


def test_the_records_that_differ_are_named(a: str, tmp_path: Path, capsys):
    b = trained(tmp_path, "b", "data.num_images=17")
    capsys.readouterr()
    assert main(["diff", a, b]) == 1
    assert "records: 1 added\n  'shapes/0/16': added\n" in capsys.readouterr().out
    (tmp_path / "b" / "records.jsonl").unlink()
    assert main(["diff", a, b]) == 1
    assert "records: not listed by both runs" in capsys.readouterr().out


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    assert main(["diff", str(tmp_path), str(tmp_path)]) == 2
