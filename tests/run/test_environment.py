"""env.json says what ran, and neither it nor anything beside it holds a secret."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pynvml
import pytest

from trainer import __version__
from trainer.files import to_json
from trainer.run import environment
from trainer.run.environment import installed_packages, nvidia_gpus, snapshot
from trainer.run.manifest import Manifest, config_facts, run_facts, start_entry
from trainer.run.provenance import git_facts
from trainer.run.redaction import redact, redact_argv, redact_tree

REPOSITORY = Path(__file__).resolve().parents[2]


def git(folder, *arguments):
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false", *arguments]
    names = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run(command, cwd=folder, env=names, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "a checkout ü"
    folder.mkdir()
    git(folder, "init", "--initial-branch", "work")
    (folder / "code.py").write_text("x = 1\n")
    (folder / ".gitignore").write_text("ignored\n")
    git(folder, "add", ".")
    git(folder, "commit", "--message", "first")
    return folder


def test_the_snapshot_names_the_machine_and_every_installed_package():
    facts = json.loads(to_json(snapshot()))
    assert facts["python"]["version"] == platform.python_version()
    assert facts["os"]["system"] == platform.system()
    assert facts["cpu"]["logical_cores"] == os.cpu_count()
    assert facts["cpu"]["memory_bytes"] > 2**27
    assert facts["packages"]["psutil"] == version("psutil")
    assert facts["packages"]["pyyaml"] == version("PyYAML")
    assert facts["packages"]["difftrain"] == __version__
    assert list(facts["packages"]) == sorted(facts["packages"])
    for name in ("gpus", "driver", "cuda", "cudnn", "threads", "environment", "time", "hostname"):
        assert name in facts


def test_a_package_that_matters_is_null_when_absent(monkeypatch):
    monkeypatch.setattr(environment.importlib.metadata, "distributions", list)
    packages = installed_packages()
    for name in (
        "torchvision",
        "torch",
        "accelerate",
        "diffusers",
        "transformers",
        "datasets",
        "safetensors",
        "pillow",
    ):
        assert packages[name] is None


def test_the_snapshot_needs_no_torch(tmp_path):
    """An installed torch is read, not imported; one that could not even be imported is read all the same."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise SystemExit('torch was imported')")
    (tmp_path / "torch/version.py").write_text("__version__ = '9.9'\ncuda: Optional[str] = '12.8'\nhip = None\n")
    code = (
        "import json, sys; from trainer.run.environment import snapshot; facts = snapshot();"
        "assert 'torch' not in sys.modules and 'accelerate' not in sys.modules; print(json.dumps(facts['cuda']))"
    )
    paths = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | paths, capture_output=True, text=True)
    assert done.stdout.strip() == '"12.8"', done.stderr


def test_what_a_loaded_torch_knows_replaces_what_was_guessed():
    facts = snapshot({"cudnn": "91002", "cuda": "13.0", "matmul_tf32": False})
    assert (facts["cudnn"], facts["cuda"], facts["matmul_tf32"]) == ("91002", "13.0", False)
    assert facts["packages"]


def test_a_field_that_the_gpu_driver_does_not_know_is_null(monkeypatch):
    class Memory:
        total, used = 80 * 2**30, 2**30

    def unknown(*_):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: f"handle {index}",
        "nvmlDeviceGetMemoryInfo": lambda gpu: Memory,
        "nvmlDeviceGetName": lambda gpu: b"NVIDIA H100",
        "nvmlDeviceGetUUID": unknown,
        "nvmlDeviceGetCudaComputeCapability": lambda gpu: [9, 0],
        "nvmlSystemGetDriverVersion": lambda: "580.1",
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    gpu = {"name": "NVIDIA H100", "memory_bytes": 80 * 2**30, "used_bytes": 2**30, "uuid": None, "capability": "9.0"}
    assert nvidia_gpus() == ([gpu], "580.1")
    monkeypatch.setattr(pynvml, "nvmlInit", unknown)
    assert nvidia_gpus() == ([], None)


def test_only_allow_listed_variables_are_kept(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("MY_PRIVATE_NOTE", "not yours")
    monkeypatch.setenv("ACCELERATE_HUB_TOKEN", "hush")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:hush@mirror.example/x")
    facts = snapshot()
    assert facts["environment"]["OMP_NUM_THREADS"] == facts["threads"]["OMP_NUM_THREADS"] == "3"
    assert facts["environment"]["NCCL_DEBUG"] == "INFO"
    assert facts["environment"]["HF_ENDPOINT"] == "https://[redacted]@mirror.example/x"
    assert "not yours" not in json.dumps(facts)
    assert "hush" not in json.dumps(facts)


def test_no_secret_reaches_any_file_of_a_run(tmp_path, monkeypatch, checkout):
    secrets = {
        "HF_TOKEN": "hf_not_in_the_usual_form",
        "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    hidden = [*secrets.values(), "s3cr3t-pw", "hunter22", "ghp_abcdefghijklmnopqrst0123", "opaque one", "in-the-url"]
    git(checkout, "remote", "add", "origin", "https://me:s3cr3t-pw@git.example/o/r.git")
    facts = run_facts(
        command=[
            *(
                "train.py",
                "--hub-token",
                "hunter22",
                "--set",
                "tracking.api_key=opaque one",
                f"name={secrets['HF_TOKEN']}",
            ),
            *("--resume", "https://u:in-the-url@h/x", "--note", "use ghp_abcdefghijklmnopqrst0123"),
        ],
        config=config_facts("c.yaml", "text", "text"),
        git=git_facts(checkout),
        seed=1,
        deterministic=False,
        model={"kind": "sd", "source": "https://u:in-the-url@h/m", "revision": None, "files": None},
        topology={"world_size": 1, "micro_batch_size": 1, "accumulation": 1, "num_machines": 1},
        data={"records": 1, "fingerprint": "f"},
    )
    changed = {"tracking.api_key": {"was": None, "now": "opaque one"}}
    manifest = Manifest(tmp_path / "run_manifest.json")
    manifest.begin(facts, start_entry(facts, 0, config_changes=changed), {})
    manifest.end("failed", 1, f"401 from https://u:in-the-url@h with {secrets['WANDB_API_KEY']}")
    written = (tmp_path / "run_manifest.json").read_text() + json.dumps(snapshot())
    assert [secret for secret in hidden if secret in written] == []
    assert "git.example/o/r.git" in written
    assert "--hub-token" in written


@pytest.mark.parametrize(
    "text, secret",
    [
        ("https://user:pa@ss/w0rd@host/repo", "w0rd"),
        ("cloning https://onlytoken@github.com/o/r", "onlytoken"),
        ("Authorization: Bearer abcdef123456", "abcdef123456"),
        ("token hf_AbCdEfGhIjKlMnOpQrSt expired", "hf_AbCd"),
        ("sk-proj-abcdefghijklmnop1234", "abcdefghijklmnop"),
        ("id AKIAIOSFODNN7EXAMPLE used", "IOSFODNN7"),
        ("wandb_key=0123456789abcdef0123456789abcdef01234567", "89abcdef"),
        ("--my_token abc --x 1", "abc"),
        ("--ssh-key=abc", "abc"),
        ("{'password': 'a b c'}", "a b c"),
        ('{"api_key": "xyzzy"}', "xyzzy"),
        ("s3://b/k?X-Amz-Security-Token=xyzzy&e=1", "xyzzy"),
        ("url=https://h/p?access_token=xyzzy", "xyzzy"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIB\n-----END RSA PRIVATE KEY-----", "MIIB"),
    ],
)
def test_what_could_be_a_secret_is_hidden(text, secret):
    shown = redact(text)
    assert secret not in shown
    assert "[redacted]" in shown
    assert redact(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "commit 0123456789abcdef0123456789abcdef01234567",
        "git@github.com:owner/repo.git ssh://git@github.com/o/r https://huggingface.co/a/b?x=1",
        "--tokenizer clip --set data.image_key=jpg max_tokens=77 pad_token_id=49407",
        "/data/hf_datasets/author=me loss: 0.5 key: value task-sk-run",
        "C:\\x http://localhost:8000/a",
    ],
)
def test_what_a_reader_needs_is_left_alone(text, monkeypatch):
    for name in [name for name in os.environ if name not in ("PATH", "HOME")]:
        monkeypatch.delenv(name)
    assert redact(text) == text
    assert redact_argv(text.split(" ")) == text.split(" ")
    assert redact_tree({"a": [text, 1, None]}) == {"a": [text, 1, None]}


def test_git_facts_of_a_clean_a_changed_and_a_detached_checkout(checkout):
    clean = git_facts(checkout)
    assert clean == {
        "commit": git(checkout, "rev-parse", "HEAD"),
        "branch": "work",
        "dirty": False,
        "untracked": 0,
        "diff_sha256": None,
        "remote": None,
    }
    (checkout / "ignored").write_text("output")
    assert git_facts(checkout) == clean
    (checkout / "new.py").write_text("y = 2\n")
    assert git_facts(checkout) == clean | {"dirty": True, "untracked": 1}
    hashes = []
    for text in ("x = 2\n", "x = 3\n", "x = 2\n"):
        (checkout / "code.py").write_text(text)
        hashes.append(git_facts(checkout)["diff_sha256"])
    assert hashes[0] == hashes[2] != hashes[1]
    git(checkout, "config", "diff.noprefix", "true")
    git(checkout, "config", "diff.external", "false")
    git(checkout, "add", "code.py")
    git(checkout, "checkout", "--detach")
    detached = git_facts(checkout)
    assert detached["branch"] is None
    assert detached["diff_sha256"] == hashes[0]


def test_the_remote_is_origin_without_its_login(checkout):
    git(checkout, "remote", "add", "backup", "https://me:s3cr3t-pw@backup.example/r.git")
    assert git_facts(checkout)["remote"] == "https://[redacted]@backup.example/r.git"
    git(checkout, "remote", "add", "origin", "git@git.example:o/r.git")
    assert git_facts(checkout)["remote"] == "git@git.example:o/r.git"


def test_a_git_hook_that_started_us_does_not_mislead(checkout, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(checkout.parent / "elsewhere"))
    assert git_facts(checkout)["branch"] == "work"


def test_git_facts_are_null_where_no_checkout_tracks_the_code(checkout, tmp_path, monkeypatch):
    nothing = dict.fromkeys(("commit", "branch", "dirty", "untracked", "diff_sha256", "remote"))
    (tmp_path / "plain").mkdir()
    installed = checkout / "ignored" / "site-packages"  # a virtual environment inside somebody's checkout
    installed.mkdir(parents=True)
    (installed / "code.py").write_text("")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert git_facts(tmp_path / "plain") == git_facts(installed) == git_facts(tmp_path / "absent") == nothing
    empty = tmp_path / "empty"
    empty.mkdir()
    git(empty, "init")
    assert git_facts(empty) == nothing
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_facts(checkout) == nothing


def test_packages_of_any_form_of_metadata_are_listed(tmp_path, monkeypatch):
    for number, (folder, name) in enumerate(
        [("a.dist-info", "METADATA"), ("b.egg-info", "PKG-INFO"), (".", "c.egg-info")]
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        text = f"Metadata-Version: 1.0\nName: Some_Package.{number}\nVersion: {number}.5\n\nVersion: of the read-me\n"
        (tmp_path / folder / name).write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    packages = installed_packages()
    assert {name: packages.get(name) for name in packages if name.startswith("some")} == {
        "some-package-0": "0.5",
        "some-package-1": "1.5",
        "some-package-2": "2.5",
    }
