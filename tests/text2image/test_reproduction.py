"""Recorded steps computed again: `difftrain reproduce` and `difftrain replay`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from forked import ROOT
from runs import command, metrics

from trainer.cli import main
from trainer.data.dummy import write_dummy_imagefolder

CONFIG = """\
model: {kind: tiny}
data: {kind: imagefolder, data_root: pictures, image_size: 32, num_workers: 0, random_flip: true, caption_dropout: 0.2}
train: {seed: 7, max_steps: 6, global_batch_size: 4, micro_batch_size: 2, log_every: 2}
objective: {kind: epsilon}
lr: {kind: constant, peak: 1e-3, warmup_steps: 1}
ema: {decay: 0.9}
checkpoint: {every_steps: 2}
hooks: [{kind: weight_digest, every_steps: 2}]
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ten pictures and a run of six steps on them, stopped once and resumed."""
    folder = tmp_path_factory.mktemp("recorded")
    write_dummy_imagefolder(folder / "pictures", 10, 40)
    (folder / "config.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")  # as for every test: `diff` would see it
        patch.setenv("TRANSFORMERS_OFFLINE", "1")
        for last in (3, 6):
            arguments = ["train", "--config", "config.yaml", "--output-dir", "run", "--resume", "auto"]
            assert main([*arguments, "--set", f"train.max_steps={last}"]) == 0
    return folder


@pytest.fixture
def run(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That run, to be harmed; its pictures lie beside it and are found from the working directory."""
    shutil.copytree(recorded, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy" / "run"


def everything(run: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def test_the_same_steps_come_out_equal_to_the_bit(run: Path, capsys):
    before = everything(run)
    assert "weights_sha256" in metrics(run)[1]
    capsys.readouterr()
    assert main(["reproduce", str(run), "--steps", "5"]) == 0, capsys.readouterr().out
    output = capsys.readouterr().out
    assert "data: as recorded" in output
    assert "steps 1 to 5: equal to the bit" in output
    assert everything(run) == before


def test_what_was_computed_again_is_kept_if_asked(run: Path, capsys):
    again = run.parent / "again"
    assert main(["reproduce", str(run), "--steps", "4", "--output-dir", str(again)]) == 0
    assert len(metrics(again)) == 4
    capsys.readouterr()
    assert main(["diff", str(run), str(again)]) == 0, capsys.readouterr().out
    assert "metrics: the same for 4 steps" in capsys.readouterr().out
    assert main(["reproduce", str(run), "--output-dir", str(again)]) == 2, "that folder holds a run now"


def test_an_edited_caption_is_named_by_its_record(run: Path, capsys):
    metadata = run.parent / "pictures" / "metadata.jsonl"
    records = [json.loads(line) for line in metadata.read_text().splitlines()]
    records[3]["text"] = "something else"
    metadata.write_text("".join(json.dumps(record) + "\n" for record in records))
    capsys.readouterr()
    assert main(["reproduce", str(run), "--steps", "2"]) == 1
    output = capsys.readouterr().out
    assert f"records: 1 captions changed\n  {records[3]['file_name']}: captions changed\n" in output


def test_a_recorded_number_that_was_changed_is_found_at_its_step(run: Path, capsys):
    changed = metrics(run)
    changed[1]["loss"] *= 1 + 1e-6
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    capsys.readouterr()
    assert main(["reproduce", str(run)]) == 1
    assert "step 2 is the first that differs: loss\n" in capsys.readouterr().out


def test_a_replayed_step_has_the_recorded_loss_and_names_each_sample(run: Path, capsys):
    for step in (1, 4, 5):  # before the first checkpoint, between two, and after one
        capsys.readouterr()
        assert main(["replay", str(run), "--step", str(step)]) == 0
        output = capsys.readouterr().out
        table = output[output.index("record") :].splitlines()[1:-1]
        losses = [float(row.split()[0]) for row in table]
        assert losses == sorted(losses, reverse=True)
        recorded = metrics(run)[step - 1]["loss"]
        assert sum(losses) / 4 == pytest.approx(recorded, rel=1e-4), "the table shows five digits"
        assert f"step {step}: mean {recorded:.6g}" in output.replace(f"{recorded:.7g}", f"{recorded:.6g}")
        assert sorted(int(row.split()[2]) for row in table) == list(range(4 * step - 4, 4 * step))


def test_a_step_that_is_not_on_record_is_refused(run: Path, capsys):
    for step in ("0", "7"):
        assert main(["replay", str(run), "--step", step]) == 2
    assert "it has steps 1 to 6" in capsys.readouterr().err


def resume(*options: str) -> int:
    """Go on with the run in the working directory."""
    return main(["train", "--config", "config.yaml", "--output-dir", "run", "--resume", "auto", *options])


def test_steps_after_an_allowed_change_are_replayed_as_they_were(run: Path, capsys):
    metadata = run.parent / "pictures" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("circle", "disc").replace("square", "block"))
    allow = ["--allow-change", "data", "weighting.kind", "weighting.gamma", "lr.peak", "--set", "train.max_steps=9"]
    capsys.readouterr()
    assert resume(*allow, "weighting={kind: min_snr}", "lr.peak=1e-4", "train.micro_batch_size=4") == 0
    said = capsys.readouterr().out
    assert "changed since the checkpoint: data_fingerprint was " in said
    assert "captions changed" in said

    assert main(["reproduce", str(run)]) == 1, "the pictures are not those of the first steps"
    output = capsys.readouterr().out
    assert "note   the run went on from step 6 with another config or other data" in output
    assert "data: 1 differ" in output
    assert main(["replay", str(run), "--step", "8"]) == 0
    loss = metrics(run)[7]["loss"]
    assert f"step 8: mean {loss:.6g}"[:-1] in capsys.readouterr().out


def test_another_micro_batch_in_the_middle_is_reproduced_up_to_rounding(run: Path, capsys):
    assert resume("--set", "train.max_steps=8", "train.micro_batch_size=4") == 0
    capsys.readouterr()
    assert main(["reproduce", str(run)]) == 0, capsys.readouterr().out
    assert "steps 1 to 8: equal to 0.0001 of their size" in capsys.readouterr().out


def test_a_start_whose_steps_were_all_done_again_does_not_count(run: Path, capsys):
    manifest = json.loads((run / "run_manifest.json").read_text())
    first = manifest["starts"][0]
    dead = {**first, "topology": {**first["topology"], "world_size": 7}, "torch_threads": 99}
    (run / "run_manifest.json").write_text(json.dumps({**manifest, "starts": [dead, *manifest["starts"]]}))
    assert main(["reproduce", str(run), "--steps", "2"]) == 0
    assert "steps 1 to 2: equal to the bit" in capsys.readouterr().out


def test_a_branch_is_told_to_reproduce_the_run_that_it_came_from(run: Path, capsys):
    branch = ["--output-dir", "branch", "--resume", "run/checkpoint-4.pt"]
    assert main(["train", "--config", "config.yaml", *branch]) == 0
    assert main(["reproduce", "branch"]) == 2
    assert "branched off another one at step 4" in capsys.readouterr().err


def test_a_config_edited_after_the_run_is_not_what_is_computed_again(run: Path):
    resolved = run / "config.resolved.yaml"
    resolved.write_text(resolved.read_text().replace("peak: 0.001", "peak: 0.5"))
    assert "peak: 0.5" in resolved.read_text()
    assert main(["reproduce", str(run), "--steps", "2"]) == 0


@pytest.mark.usefixtures("plugins")
def test_a_step_whose_loss_was_not_a_number_is_replayed(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = CONFIG.replace("imagefolder, data_root: pictures", "shapes, num_images: 8")
    (tmp_path / "config.yaml").write_text(f"plugins: [failing]\n{config}")
    broken = ["objective.kind=half_broken", "train.max_bad_steps=3", "train.log_every=1"]
    assert main(["train", "--config", "config.yaml", "--output-dir", "run", "--set", *broken]) == 76
    capsys.readouterr()
    assert main(["reproduce", "run"]) == 0, capsys.readouterr().out
    assert "steps 1 to 3: equal to the bit" in capsys.readouterr().out
    assert main(["replay", "run", "--step", "3"]) == 0
    output = capsys.readouterr().out
    rows = output[output.index("record") :].splitlines()[1:-1]
    assert [row.split()[0] == "nan" for row in rows] == [True, True, False, False], "one of each micro batch of two"
    assert "recorded loss not finite, gradient norm not finite" in output


@pytest.mark.slow
def test_an_edited_line_of_the_objective_is_seen_in_the_first_loss(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = ["data.num_images=64", "train.max_steps=4", "validation=null", "hooks=[]", "lr.warmup_steps=1"]
    demo = ["--config", str(ROOT / "configs" / "demo.yaml"), "--output-dir", "run"]
    assert main(["train", *demo, "--set", *short]) == 0
    assert main(["reproduce", "run"]) == 0
    assert "steps 1 to 4: equal to the bit" in capsys.readouterr().out

    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "trainer", checkout / "trainer", ignore=shutil.ignore_patterns("__pycache__"))
    objective = checkout / "trainer" / "objectives" / "flow.py"
    text = objective.read_text()
    assert "return eps - x0" in text
    objective.write_text(text.replace("return eps - x0", "return eps - 0.99 * x0"))
    with command("python", "-m", "trainer", "reproduce", "run", cwd=tmp_path, PYTHONPATH=str(checkout)) as process:
        said, _ = process.communicate(timeout=240)
    assert process.returncode == 1, said
    assert "step 1 is the first that differs: loss" in said
