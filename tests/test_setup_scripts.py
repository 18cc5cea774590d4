from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
NAMES = ("CUBLAS_WORKSPACE_CONFIG", "PYTHONHASHSEED", "TOKENIZERS_PARALLELISM", "HF_ENDPOINT")

# Prints the variables, and what the script left behind or changed in the shell.
SOURCED = """
set -euo pipefail
before="$(set +o)"
source "$1" > "$2"
[ "$before" = "$(set +o)" ] || echo "options changed"
typeset -f | grep -i difftrain || true
for name in CUBLAS_WORKSPACE_CONFIG PYTHONHASHSEED TOKENIZERS_PARALLELISM HF_ENDPOINT; do
    eval "echo $name=\\${$name-unset}"
done
"""

every_shell = pytest.mark.parametrize(
    "shell",
    [
        "bash",
        pytest.param("zsh", marks=pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")),
    ],
)


@pytest.fixture
def source(tmp_path):
    """Sources setup_runtime_env.sh in a shell; hands back the variables and what it printed."""

    def run(shell: str, curl: str | None = "exit 1", **environment: str) -> tuple[dict[str, str], str]:
        tools = tmp_path / "tools"
        tools.mkdir()
        for tool in ("cat", "grep", shell):
            (tools / tool).symlink_to(shutil.which(tool) or tool)
        if curl is not None:
            (tools / "curl").write_text(f"#!/bin/sh\n{curl}\n")
            (tools / "curl").chmod(0o755)
        base = {name: value for name, value in os.environ.items() if name not in NAMES and "OFFLINE" not in name}
        flags = ["-f"] if shell == "zsh" else []
        done = subprocess.run(
            [shell, *flags, "-c", SOURCED, shell, SCRIPTS / "setup_runtime_env.sh", tmp_path / "said"],
            env=base | {"PATH": str(tools)} | environment,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert (done.returncode, done.stderr) == (0, "")
        lines = done.stdout.splitlines()
        assert [line.partition("=")[0] for line in lines] == list(NAMES)
        return dict(line.split("=", 1) for line in lines), (tmp_path / "said").read_text()

    return run


@every_shell
def test_without_a_network_the_endpoint_is_left_unset(source, shell):
    variables, said = source(shell)
    assert variables == {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_ENDPOINT": "unset",
    }
    assert "CUBLAS_WORKSPACE_CONFIG=:4096:8" in said
    assert "offline" in said


@every_shell
def test_the_mirror_is_taken_only_when_the_official_hub_does_not_answer(source, shell):
    variables, said = source(shell, curl='case "$*" in *hf-mirror.com*) exit 0;; *) exit 28;; esac')
    assert variables["HF_ENDPOINT"] == "https://hf-mirror.com"
    assert "HF_ENDPOINT=https://hf-mirror.com" in said


@every_shell
def test_the_official_hub_is_the_default(source, shell):
    variables, said = source(shell, curl="exit 0")
    assert variables["HF_ENDPOINT"] == "unset"
    assert "https://huggingface.co" in said


@every_shell
@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_in_offline_mode_nothing_is_asked(source, shell, name, tmp_path):
    asked = tmp_path / "asked"
    variables, said = source(shell, curl=f"echo x >> {asked}", **{name: "True"})
    assert variables["HF_ENDPOINT"] == "unset"
    assert "offline" in said
    assert not asked.exists()


@every_shell
def test_what_the_user_set_stays(source, shell, tmp_path):
    asked = tmp_path / "asked"
    mine = {
        "CUBLAS_WORKSPACE_CONFIG": ":16:8",
        "PYTHONHASHSEED": "7",
        "TOKENIZERS_PARALLELISM": "true",
        "HF_ENDPOINT": "https://hub.example",
    }
    variables, _ = source(shell, curl=f"echo x >> {asked}", **mine)
    assert variables == mine
    assert not asked.exists()


@every_shell
def test_a_workspace_setting_that_is_not_deterministic_is_replaced(source, shell):
    variables, _ = source(shell, CUBLAS_WORKSPACE_CONFIG=":0:0")
    assert variables["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@every_shell
def test_a_missing_curl_is_said_and_passed_over(source, shell):
    variables, said = source(shell, curl=None)
    assert variables["HF_ENDPOINT"] == "unset"
    assert "curl" in said


@every_shell
def test_an_endpoint_that_swallows_packets_costs_seconds(shell, tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    began = time.monotonic()
    # A proxy at an address that is not routed stands for a network that swallows packets.
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment |= {"https_proxy": "http://192.0.2.1:9", "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    environment.pop("HF_ENDPOINT", None)
    subprocess.run(
        [shell, "-c", 'set -eu; . "$1"', shell, SCRIPTS / "setup_runtime_env.sh"],
        env=environment,
        check=True,
        capture_output=True,
        timeout=30,
    )
    assert time.monotonic() - began < 10


@every_shell
def test_executed_instead_of_sourced_it_says_so(shell):
    done = subprocess.run([shell, SCRIPTS / "setup_runtime_env.sh"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "source" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("script", ["demo.sh", "test.sh", "environment.sh", "setup_runtime_env.sh", "../.ci/run"])
def test_every_script_parses(script):
    subprocess.run(["bash", "-n", SCRIPTS / script], check=True, timeout=30)


def test_set_up_without_a_usable_python_says_which_one_it_wants(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname", "uname"):
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    for name in ("python3", "python3.12"):  # a version manager's shims answer without a Python behind them
        (tools / name).write_text("#!/bin/sh\necho 'command not found' >&2\nexit 127\n")
        (tools / name).chmod(0o755)
    checkout = tmp_path / "check out"
    (checkout / "scripts").mkdir(parents=True)
    for script in ("demo.sh", "environment.sh", "environment_ready.py"):
        shutil.copy(SCRIPTS / script, checkout / "scripts")
    environment = {"PATH": str(tools), "HOME": str(tmp_path)}
    done = subprocess.run(
        ["bash", checkout / "scripts" / "demo.sh"], env=environment, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    assert "no Python 3.11, 3.12 or 3.13" in done.stderr
    assert not (checkout / ".venv").exists()
