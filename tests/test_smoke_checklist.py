from __future__ import annotations

from pathlib import Path

import pytest
from smoke_checklist import REPOSITORY, TEMPLATE, collect_metadata, fill_checklist, preconditions, table_rows

from trainer.run.environment import snapshot

MANIFEST = {"git": {"commit": "0123abcd" * 5, "dirty": False}}

FIELDS = """
    Date, Operator, Location, Machine, GPU (model, VRAM), Driver version, CUDA version, Python version,
    PyTorch version, diffusers version, transformers version, datasets version, torchvision version, OS, Repo path,
    Git commit, Working tree clean (Y/N)
"""

ROWS = {
    "Install extras": 'python -m pip install -e "./difftrain[text2image,dev]"',
    "Confirm repo root": "pwd",
    "CUDA availability": 'python -c "import torch; print(torch.cuda.is_available())"',
    "Run unit tests": 'pytest ./difftrain/tests -m "not slow and not integration" -v',
    "Run GPU smoke": 'pytest ./difftrain/tests -m "slow and cuda and text2image" -v --run-slow --run-integration',
    "Smoke command in CI": 'pytest ./tests -m "slow and cuda and text2image" -v --run-slow --run-integration '
    "--basetemp ./_ci_tmp/pytest_tmp",
    "Smoke log path": "./_ci_tmp/logs/text2image_smoke.log",
    "Pytest temp path": "./_ci_tmp/pytest_tmp",
    "Uploaded artifact": "text2image-smoke-${{ github.run_id }}",
    "Create dummy dataset": "python ./difftrain/scripts/make_dummy_imagefolder.py "
    "--output-dir ./data/smoke_text2image --num-images 4 --image-size 64",
    "Validate config + env snapshot": "python ./difftrain/scripts/validate_config.py "
    "--config ./difftrain/configs/smoke_text2image.yaml --output-dir ./difftrain/_tmp_run --deterministic",
    "Run training smoke": "python ./difftrain/scripts/train_text_to_image.py "
    "--config ./difftrain/configs/smoke_text2image.yaml --output-dir ./difftrain/_tmp_run",
    "fp16 smoke": "python ./difftrain/scripts/train_text_to_image.py "
    "--config ./difftrain/configs/smoke_text2image.yaml --output-dir ./difftrain/_tmp_run_fp16",
    "bf16 smoke": "python ./difftrain/scripts/train_text_to_image.py "
    "--config ./difftrain/configs/smoke_text2image.yaml --output-dir ./difftrain/_tmp_run_bf16",
}

# Besides the commands of the rows; both pages must have them.
POLICIES = (
    "curl -fsSIL https://huggingface.co >/dev/null || export HF_ENDPOINT=https://hf-mirror.com",
    "source ./scripts/setup_runtime_env.sh",
    "CUBLAS_WORKSPACE_CONFIG",
    ":4096:8",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
)

NIGHTLY = f"{ROWS['Smoke command in CI']} 2>&1 | tee ./_ci_tmp/logs/text2image_smoke.log"


def cells(path: Path) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in table_rows(path.read_text().splitlines()).values()}


def metadata() -> dict[str, str]:
    return collect_metadata(snapshot(), MANIFEST)


def test_this_machine_fills_every_field_of_the_checklist(tmp_path):
    out = tmp_path / "filled.md"
    fill_checklist(TEMPLATE, out, metadata(), {"Run GPU smoke": ("PASS", "3 passed | 0 failed\nin 9 s")})
    rows = cells(out)
    for field in metadata():
        assert rows[field][0]
    assert rows["Git commit"] == [MANIFEST["git"]["commit"]]
    assert rows["Working tree clean (Y/N)"] == ["Y"]
    assert rows["Run GPU smoke"][2:] == ["PASS", r"3 passed \| 0 failed in 9 s"]
    assert rows["Run unit tests"][2:] == ["NA", "not part of this run"]
    assert "" not in [row[2] for row in rows.values() if len(row) == 4]


def test_filling_in_changes_nothing_but_the_empty_cells(tmp_path):
    out = tmp_path / "filled.md"
    fill_checklist(TEMPLATE, out, metadata(), {})
    before, after = TEMPLATE.read_text().splitlines(), out.read_text().splitlines()
    rows = table_rows(before)
    assert len(before) == len(after)
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        if number in rows:
            kept = 1 if len(rows[number]) == 2 else 3
            assert table_rows(["|-|", new])[1][:kept] == rows[number][:kept]
        else:
            assert old == new


@pytest.mark.parametrize(
    ("more", "results", "fault"),
    [
        ({"Datum": "today"}, {}, "no such row: Datum"),
        ({}, {"Run GPU smok": ("PASS", "")}, "no such row: Run GPU smok"),
        ({}, {"Run GPU smoke": ("OK", "")}, "neither PASS, FAIL nor NA"),
        ({"Machine": " "}, {}, "no value for: Machine"),
    ],
)
def test_what_does_not_fit_the_checklist_is_refused(tmp_path, more, results, fault):
    with pytest.raises(ValueError, match=fault):
        fill_checklist(TEMPLATE, tmp_path / "filled.md", metadata() | more, results)
    assert not (tmp_path / "filled.md").exists()


def test_a_checklist_with_two_rows_of_one_name_is_refused(tmp_path):
    template = tmp_path / "template.md"
    template.write_text("| Field | Value |\n| --- | --- |\n| Date | |\n| Date | |\n")
    with pytest.raises(ValueError, match="more than one row: Date"):
        fill_checklist(template, tmp_path / "filled.md", {"Date": "today"}, {})


def test_what_holds_before_the_run_is_filled_in_too(tmp_path):
    fill_checklist(TEMPLATE, tmp_path / "filled.md", metadata(), preconditions())
    rows = cells(tmp_path / "filled.md")
    assert rows["Install extras"][2] == "PASS"
    assert rows["Confirm repo root"][2:] == ["PASS", str(REPOSITORY)]
    assert rows["CUDA availability"][2] in ("PASS", "NA")


def test_several_gpus_and_a_dirty_checkout_are_written_out():
    gpu = {"name": "NVIDIA H200", "memory_bytes": 141 * 2**30}
    env = snapshot() | {"gpus": [gpu, gpu], "driver": "580.65.06", "cuda": "13.0"}
    found = collect_metadata(env, {"git": {"commit": None, "dirty": True}})
    assert found["GPU (model, VRAM)"] == "2 x NVIDIA H200, 141 GiB"
    assert (found["Driver version"], found["CUDA version"]) == ("580.65.06", "13.0")
    assert found["Working tree clean (Y/N)"] == "N"


def test_the_checklist_has_every_field_and_every_row():
    rows = cells(TEMPLATE)
    fields = " ".join(FIELDS.split()).replace("(model, VRAM)", "(model; VRAM)").split(", ")
    assert [field.replace(";", ",") for field in fields] == list(metadata())
    assert set(metadata()) <= set(rows)
    for label, command in ROWS.items():
        assert rows[label][0] == f"`{command}`"
        assert len(rows[label]) == 4


def test_the_checklist_has_every_policy_artifact_and_section():
    text = TEMPLATE.read_text()
    for part in (
        *POLICIES,
        ":16:8",
        "`text2image-smoke`",
        "`data.data_root: data/smoke_text2image`",
        "`hf-internal-testing/tiny-stable-diffusion-pipe`",
        *("`env.json`", "`config.resolved.yaml`", "`run_manifest.json`", "`metadata.jsonl`"),
        *("`checkpoint-1.pt`", "`checkpoint-2.pt`", "`train.precision`"),
        *("Issues encountered", "Proposed fixes", "Next actions"),
    ):
        assert part in text


def test_the_runbook_has_every_command_and_policy():
    text = (REPOSITORY / "docs" / "cloud_gpu_test_runbook.md").read_text()
    by_hand = ("Create dummy dataset", "Validate config + env snapshot", "Run training smoke")
    for label in ("Install extras", "Run unit tests", "Run GPU smoke", *by_hand):
        assert ROWS[label] in text
    for part in (*POLICIES, NIGHTLY, "nvidia-smi", "docs/mvp_smoke_checklist.md", "configs/smoke_text2image.yaml"):
        assert part in text


def test_the_nightly_lane_runs_the_command_of_the_runbook():
    assert NIGHTLY in (REPOSITORY / ".github" / "workflows" / "ci.yml").read_text()
