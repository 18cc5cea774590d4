"""difftrain doctor finds what would stop a run on this machine, and names the fix."""

import argparse
import json
import subprocess
import sys
import types

import pytest

from trainer.commands import doctor
from trainer.commands.doctor import Finding


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def run(*arguments):
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return doctor.run(parser.parse_args(arguments))


def levels(findings):
    return {finding.topic: finding.level for finding in findings}


def fake_torch(cuda_build: str | None = "12.8", available=False, bf16=True):
    cuda = types.SimpleNamespace(
        is_available=lambda: available, device_count=lambda: 1, is_bf16_supported=lambda including_emulation: bf16
    )
    mps = types.SimpleNamespace(is_available=lambda: False)
    return types.SimpleNamespace(
        __version__="2.13.0",
        cuda=cuda,
        version=types.SimpleNamespace(cuda=cuda_build),
        backends=types.SimpleNamespace(mps=mps),
    )


GPU = {"name": "H100", "memory_bytes": 80 * 2**30, "used_bytes": 2**30, "uuid": "u", "capability": "9.0"}


def test_the_exit_code_is_1_if_there_is_a_problem(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "packages", lambda: [Finding("ok", "psutil", "7.0"), Finding("note", "x", "hm")])
    assert run("--output-dir", str(tmp_path / "runs")) == 0
    assert capsys.readouterr().out.endswith("no problem found\n")
    monkeypatch.setattr(doctor, "packages", lambda: [Finding("problem", "torch", "missing", "pip install it")])
    assert run("--output-dir", str(tmp_path / "runs")) == 1
    out = capsys.readouterr().out
    assert "problem  torch          missing\n" in out
    assert "fix: pip install it\n" in out
    assert out.endswith("1 problem\n")
    assert run("--json", "--output-dir", str(tmp_path / "runs")) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["problems"] == 1
    assert {"level": "problem", "topic": "torch", "text": "missing", "fix": "pip install it"} in answer["findings"]
    assert list(tmp_path.iterdir()) == []  # it leaves nothing where the runs will go


def test_versions_are_held_against_the_projects_own_metadata(monkeypatch):
    monkeypatch.setattr(
        doctor.importlib.metadata,
        "requires",
        lambda name: ["psutil>=5.9.0", 'torch<2.14,>=2.10; extra == "text2image"', 'ruff>=99; extra == "dev"'],
    )

    def of(torch):
        monkeypatch.setattr(doctor, "installed_packages", lambda: {"psutil": "5.9", "torch": torch})
        return levels(doctor.packages())

    assert of("2.13.0+cpu") == {"psutil": "ok", "torch": "ok"}
    assert of("2.10") == {"psutil": "ok", "torch": "ok"}
    assert of("2.9.1")["torch"] == "problem"
    assert of("2.14.0")["torch"] == "note"
    assert of(None)["torch"] == "problem"


def test_a_missing_package_comes_with_the_pip_line(monkeypatch):
    monkeypatch.setattr(doctor, "installed_packages", dict)
    findings = list(doctor.packages())
    assert {finding.level for finding in findings} == {"problem"}
    assert all(finding.fix == 'pip install -e ".[text2image]" -c constraints.txt' for finding in findings)
    assert {"torch", "accelerate", "pydantic"} <= {finding.topic for finding in findings}
    assert "ruff" not in {finding.topic for finding in findings}


def test_a_checkout_that_is_not_installed_is_read_from_its_pyproject(monkeypatch):
    def absent(name):
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "requires", absent)
    monkeypatch.setattr(doctor.importlib.metadata, "metadata", absent)
    wanted = doctor.requirements()
    assert any(line.startswith("torch>=") and line.endswith('; extra == "text2image"') for line in wanted)
    assert any(line.startswith("psutil") and "extra" not in line for line in wanted)
    assert next(doctor.python_and_os()).level == "ok"


def test_a_broken_torchvision_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "installed_packages", lambda: {"torchvision": None})
    assert [finding.level for finding in doctor.torchvision()] == ["ok"]
    monkeypatch.setattr(doctor, "installed_packages", lambda: {"torchvision": "0.9"})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (finding,) = doctor.torchvision()
    assert finding.level == "problem"
    assert "nms does not exist" in finding.text
    assert "transformers" in finding.text
    assert finding.fix == "pip uninstall torchvision"
    (tmp_path / "torchvision.py").write_text("")
    assert [finding.level for finding in doctor.torchvision()] == ["ok"]


def test_a_gpu_that_torch_cannot_use_is_a_problem(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    seen = levels(doctor.accelerators(fake_torch(available=True), [GPU], "580.1"))
    assert seen == {"gpu 0": "ok", "driver": "ok", "cuda": "ok", "bf16": "ok"}
    assert levels(doctor.accelerators(fake_torch(available=True, bf16=False), [GPU], "580.1"))["bf16"] == "note"
    for torch, driver, said in (
        (fake_torch(cuda_build=None), "580.1", "built without CUDA"),
        (fake_torch(), "470.1", "CUDA 12.8, driver 470.1"),
    ):
        finding = list(doctor.accelerators(torch, [GPU], driver))[-1]
        assert finding.level == "problem"
        assert said in finding.text
    assert levels(doctor.accelerators(None, [GPU | {"used_bytes": 70 * 2**30}], "580.1"))["gpu 0"] == "note"
    assert levels(doctor.accelerators(fake_torch(cuda_build=None), [], None)) == {"gpu": "note"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert levels(doctor.accelerators(fake_torch(), [GPU], "580.1"))["cuda"] == "note"


def test_cublas_settings_matter_on_cuda_only(monkeypatch):
    for value, on_cuda, on_cpu in ((None, "note", "ok"), (":4096:8", "ok", "ok"), (":4096:2", "problem", "note")):
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        if value:
            monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", value)
        assert levels(doctor.determinism(cuda=True))["cublas"] == on_cuda
        assert levels(doctor.determinism(cuda=False))["cublas"] == on_cpu


def test_a_place_that_cannot_be_written_is_a_problem(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert levels(doctor.machine(str(tmp_path / "file" / "runs")))["disk"] == "problem"
    assert levels(doctor.machine(str(tmp_path / "a" / "b")))["disk"] in ("ok", "note")


def test_the_hub_is_not_asked_while_offline(monkeypatch):
    monkeypatch.setattr(doctor, "why_unreachable", lambda endpoint: pytest.fail("asked while offline"))
    assert "HF_HUB_OFFLINE is on" in next(doctor.hub()).text


def test_a_hub_that_does_not_answer_is_a_note(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://me:hunter22@127.0.0.1:9")
    (finding,) = doctor.hub()
    assert finding.level == "note"
    assert "does not answer" in finding.text
    assert "hunter22" not in finding.text


def test_importing_doctor_does_not_import_torch():
    code = "import sys, trainer.commands.doctor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=doctor.PYPROJECT.parent).returncode == 0


def test_a_torch_that_cannot_be_imported_is_a_problem_not_a_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "import_torch", lambda: "libcudart.so.12: cannot open shared object file")
    assert run("--output-dir", str(tmp_path)) == 1
    assert "libcudart.so.12" in capsys.readouterr().out
