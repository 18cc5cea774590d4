"""Check this machine: versions, GPUs, disk, network, determinism settings."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.run.environment import cpu_facts, installed_packages, nvidia_gpus
from trainer.run.redaction import redact
from trainer.run.rundir import RunDir

EXAMPLE = "difftrain doctor --output-dir runs"

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
INSTALL = 'pip install -e ".[text2image]" -c constraints.txt'
GIB = 2**30
NETWORK_SECONDS = 2.0

# CUBLAS_WORKSPACE_CONFIG values with which cuBLAS is deterministic (cuBLAS manual, "Results reproducibility").
DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")


@dataclass(frozen=True)
class Finding:
    """One line of the report. A `problem` stops or spoils a run; a `note` is worth knowing before one."""

    level: str  # "ok", "note" or "problem"
    topic: str
    text: str
    fix: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the runs will go, and in which form to answer."""
    parser.add_argument("--output-dir", default="runs", metavar="FOLDER", help="where runs will go (default: runs)")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the findings: 0 if none is a problem, else 1."""
    torch = import_torch()
    gpus, driver = nvidia_gpus()
    findings = [
        *python_and_os(),
        *packages(),
        *torchvision(),
        *accelerators(torch, gpus, driver),
        *determinism(bool(gpus)),
        *machine(args.output_dir),
        *limits(),
        *hub(),
        *macos(),
    ]
    if isinstance(torch, str):
        findings.append(Finding("problem", "torch", f"is installed but cannot be imported: {torch}", INSTALL))
    problems = sum(finding.level == "problem" for finding in findings)
    if args.json:
        print(json.dumps({"problems": problems, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        print("\n".join(_line(finding) for finding in findings))
        print(f"{problems} problem{'s' * (problems != 1)}" if problems else "no problem found")
    return 1 if problems else 0


def python_and_os() -> Iterator[Finding]:
    """The interpreter against `requires-python`, and the system."""
    floor = _requires_python()
    python = platform.python_version()
    good = _satisfies(python, floor)
    text = f"{python}, wanted {floor}, at {sys.executable}"
    yield Finding("ok" if good else "problem", "python", text, None if good else "make an environment with a newer one")
    if platform.system() in ("Linux", "Darwin"):
        yield Finding("ok", "system", f"{platform.platform()}")
    else:
        yield Finding("problem", "system", f"{platform.system()} is not supported", "use Linux, macOS, or WSL 2")


def packages() -> Iterator[Finding]:
    """Each package of the base install and of the text2image extra against its range in the project's own metadata."""
    installed = installed_packages()
    for requirement in requirements():
        match = re.match(r"\s*([A-Za-z0-9._-]+)\s*(?:\[[^]]*\])?\s*([^;]*)(?:;(.*))?", requirement)
        assert match, f"not a requirement: {requirement}"
        name, wanted, marker = re.sub(r"[-_.]+", "-", match[1]).lower(), match[2].strip(" ()"), match[3] or ""
        extra = re.search(r"""extra\s*==\s*["']([^"']+)["']""", marker)
        if extra and extra[1] != "text2image":
            continue
        version = installed.get(name)
        if version is None:
            yield Finding("problem", name, f"missing, wanted {wanted or 'any version'}", INSTALL)
        elif not _satisfies(version, ",".join(part for part in wanted.split(",") if not part.strip().startswith("<"))):
            yield Finding("problem", name, f"{version} is too old, wanted {wanted}", INSTALL)
        elif not _satisfies(version, wanted):
            yield Finding("note", name, f"{version} is newer than what was tested ({wanted})", INSTALL)
        else:
            yield Finding("ok", name, f"{version}, wanted {wanted or 'any version'}")


def requirements() -> list[str]:
    """The project's requirements as in its metadata: the installed ones, else those of pyproject.toml."""
    try:
        return importlib.metadata.requires("difftrain") or []
    except importlib.metadata.PackageNotFoundError:
        project = _project()
        lines = list(project["dependencies"])
        for extra, wanted in project["optional-dependencies"].items():
            lines += [f'{requirement}; extra == "{extra}"' for requirement in wanted]
        return lines


def torchvision() -> Iterator[Finding]:
    """An installed torchvision must import, in a process of its own: a broken one can crash."""
    version = installed_packages()["torchvision"]
    if version is None:
        yield Finding("ok", "torchvision", "absent, not needed")
        return
    command = [sys.executable, "-c", "import torchvision"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        reason = None if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        reason = "no end after 60 s"
    if reason is None:
        yield Finding("ok", "torchvision", f"{version}, imports; not needed")
    else:
        text = (
            f"{version} does not import ({reason}); transformers then fails too, since it imports any that is installed"
        )
        yield Finding("problem", "torchvision", text, "pip uninstall torchvision")


def accelerators(torch: Any, gpus: list[dict[str, Any]], driver: str | None) -> Iterator[Finding]:
    """GPUs and driver as the driver sees them, then as torch does, and which precisions they train in."""
    for index, gpu in enumerate(gpus):
        if gpu["memory_bytes"] is None:
            yield Finding("note", f"gpu {index}", f"{gpu['name'] or 'unknown'}: its memory cannot be read")
            continue
        total, used = gpu["memory_bytes"] / GIB, gpu["used_bytes"] / GIB
        text = f"{gpu['name']}, {total:.0f} GiB, {used:.1f} GiB in use, compute capability {gpu['capability']}"
        busy = used > 0.1 * total
        yield Finding("note" if busy else "ok", f"gpu {index}", text, "nvidia-smi names who uses it" if busy else None)
    if gpus:
        yield Finding("ok", "driver", f"{driver}")
    if torch is None or isinstance(torch, str):
        return
    if torch.cuda.is_available():
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        seen = f"torch {torch.__version__} sees {torch.cuda.device_count()} of them, CUDA {torch.version.cuda}"
        yield Finding("ok", "cuda", seen)
        if supported:
            yield Finding("ok", "bf16", "supported by the GPU")
        else:
            yield Finding("note", "bf16", "not supported by this GPU", "train.precision: fp16 or fp32")
    elif gpus and os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1"):
        yield Finding("note", "cuda", "CUDA_VISIBLE_DEVICES hides every GPU", "unset CUDA_VISIBLE_DEVICES")
    elif gpus and torch.version.cuda is None:
        yield Finding(
            "problem", "cuda", f"torch {torch.__version__} was built without CUDA", "reinstall torch with CUDA"
        )
    elif gpus:
        text = f"torch {torch.__version__} cannot use the GPUs: CUDA {torch.version.cuda}, driver {driver}"
        yield Finding("problem", "cuda", text, "update the driver, or install a torch built for an older CUDA")
    elif torch.backends.mps.is_available():
        yield Finding("ok", "mps", "an Apple GPU; bitwise promises are made for CPU and CUDA only")
    else:
        yield Finding("note", "gpu", "none: runs use the CPU, in fp32 or bf16 (fp16 is refused); enough for the demo")


def determinism(cuda: bool) -> Iterator[Finding]:
    """The settings that `train.deterministic` rests on."""
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    fix = "export CUBLAS_WORKSPACE_CONFIG=:4096:8"
    if workspace in DETERMINISTIC_WORKSPACES:
        yield Finding("ok", "cublas", f"CUBLAS_WORKSPACE_CONFIG={workspace}")
    elif workspace is not None:
        text = f"CUBLAS_WORKSPACE_CONFIG={workspace} is none of the deterministic {', '.join(DETERMINISTIC_WORKSPACES)}"
        yield Finding("problem" if cuda else "note", "cublas", text, fix)
    elif cuda:
        yield Finding("note", "cublas", "CUBLAS_WORKSPACE_CONFIG is unset; deterministic runs on CUDA need it", fix)
    else:
        yield Finding("ok", "cublas", "CUBLAS_WORKSPACE_CONFIG is unset, and not needed without CUDA")
    threads = os.environ.get("OMP_NUM_THREADS")
    usable = cpu_facts()["usable_cores"] or os.cpu_count()
    text = (
        f"OMP_NUM_THREADS={threads or 'unset'}, {usable} cores usable; on a CPU, bits are equal at equal thread counts"
    )
    if threads is None:
        text += ", and torchrun sets 1"
    yield Finding("ok", "threads", text)


def machine(output_dir: str) -> Iterator[Finding]:
    """Memory, and whether and how much can be written where the runs go."""
    cpu = cpu_facts()
    yield Finding("ok", "memory", f"{cpu['memory_bytes'] / GIB:.0f} GiB, {cpu['model'] or 'unknown CPU'}")
    try:
        RunDir(output_dir).check_writable()
    except UserError as error:
        yield Finding("problem", "disk", str(error))
        return
    folder = next(folder for folder in (Path(output_dir), *Path(output_dir).parents) if folder.is_dir())
    free = shutil.disk_usage(folder).free / GIB
    text = f"{free:.0f} GiB free for '{output_dir}'; a checkpoint of SD 1.5 with AdamW and EMA takes about 14"
    level = "ok" if free >= 50 else "note" if free >= 1 else "problem"
    yield Finding(level, "disk", text, None if level == "ok" else "free some, or lower checkpoint.keep_last")


def limits() -> Iterator[Finding]:
    """What loader workers run into: open files, and shared memory for batches."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= soft < 1024
    yield Finding(
        "note" if few else "ok", "open files", f"{soft} at most, {hard} on request", "ulimit -n 4096" if few else None
    )
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return
    size, free = shutil.disk_usage(shm).total / GIB, shutil.disk_usage(shm).free / GIB
    text = f"{size:.3g} GiB of shared memory, {free:.3g} free"
    if free >= 1:
        yield Finding("ok", "/dev/shm", text)
    else:
        fix = "docker run --shm-size=8g (or --ipc=host), or data.num_workers: 0"
        yield Finding("note", "/dev/shm", f"{text}: loader workers can die of a bus error", fix)


def hub() -> Iterator[Finding]:
    """Whether a model hub answers; never a problem, since local models and the demo need none."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON"):
            yield Finding("ok", "hub", f"not asked: {name} is on, only local and cached models can be used")
            return
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    reason = why_unreachable(endpoint)
    if reason is None:
        yield Finding("ok", "hub", f"{redact(endpoint)} answers")
    else:
        text = f"{redact(endpoint)} does not answer ({redact(reason)}): only local and cached models can be used"
        yield Finding("note", "hub", text)


def macos() -> Iterator[Finding]:
    """What differs on macOS."""
    if sys.platform != "darwin":
        return
    for text in (
        "one process on the CPU or the Apple GPU: several ranks are not tested here, and there is no CUDA or NCCL",
        "loader workers are spawned, not forked: they start slowly, and a plug-in's data source must pickle",
        "fsync does not flush the drive's own cache: a power cut can take the newest checkpoint, a kill cannot",
    ):
        yield Finding("note", "macos", text)


def why_unreachable(endpoint: str) -> str | None:
    """Why `endpoint` does not answer within NETWORK_SECONDS, or None if it does, with whatever status.

    In a thread, because looking up a name has no time limit of its own.
    """
    answer = [f"no answer within {NETWORK_SECONDS:g} s"]

    def ask() -> None:
        try:
            request = urllib.request.Request(endpoint, method="HEAD")
            urllib.request.urlopen(request, timeout=NETWORK_SECONDS).close()
            answer[0] = ""
        except urllib.error.HTTPError:
            answer[0] = ""
        except (OSError, ValueError) as error:
            answer[0] = str(getattr(error, "reason", None) or error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(NETWORK_SECONDS)
    return answer[0] or None


def import_torch() -> Any:
    """The module torch; None if it is not installed; why not, if it is installed and broken."""
    try:
        import torch
    except ModuleNotFoundError as error:
        return None if error.name == "torch" else str(error)
    except (ImportError, OSError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return torch


def _requires_python() -> str:
    try:
        return importlib.metadata.metadata("difftrain")["Requires-Python"]
    except importlib.metadata.PackageNotFoundError:
        return _project()["requires-python"]


def _project() -> dict[str, Any]:
    return tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]


def _satisfies(version: str, wanted: str) -> bool:
    """Whether `version` lies in ranges such as ">=2.10,<2.14"; suffixes like rc1 or +cpu do not count."""
    tests: dict[str, Callable[[list[int], list[int]], bool]] = {
        ">=": lambda seen, bound: seen >= bound,
        "<=": lambda seen, bound: seen <= bound,
        "==": lambda seen, bound: seen == bound,
        "!=": lambda seen, bound: seen != bound,
        ">": lambda seen, bound: seen > bound,
        "<": lambda seen, bound: seen < bound,
    }
    for operator, bound in re.findall(r"(>=|<=|==|!=|>|<)\s*([0-9][0-9.]*)", wanted):
        if not tests[operator](_release(version), _release(bound)):
            return False
    return True


def _release(version: str) -> list[int]:
    """The first four numbers of a version, so that 2.10 and 2.10.0 are equal."""
    match = re.match(r"[0-9]+(?:\.[0-9]+)*", version)
    numbers = [int(number) for number in match[0].split(".")] if match else []
    return (numbers + [0] * 4)[:4]


def _line(finding: Finding) -> str:
    width = max(60, shutil.get_terminal_size((120, 20)).columns)
    start = f"{finding.level:8} {finding.topic:14} "
    indent = " " * len(start)
    text = textwrap.fill(
        finding.text,
        width,
        initial_indent=start,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return text + (f"\n{indent}fix: {finding.fix}" if finding.fix else "")
