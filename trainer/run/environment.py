"""env.json: the machine and the software of a run, without a secret. Neither imports torch nor needs it installed."""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

import psutil
import pynvml

from trainer import __version__
from trainer.run.redaction import REDACTED, is_secret_name, redact

# Listed even when absent, so that null says "not installed" instead of nothing.
ALWAYS_LISTED = ("torch", "torchvision", "accelerate", "diffusers", "transformers", "datasets", "safetensors", "peft")
ALWAYS_LISTED += ("pillow", "numpy")

THREAD_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

ALLOWED_VARIABLES = set(
    """
    CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER CUDA_LAUNCH_BLOCKING CUDA_MODULE_LOADING CUBLAS_WORKSPACE_CONFIG
    NVIDIA_TF32_OVERRIDE NVIDIA_VISIBLE_DEVICES PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF PYTORCH_ENABLE_MPS_FALLBACK
    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE TORCH_DISTRIBUTED_DEBUG TORCH_COMPILE_DISABLE TORCHDYNAMO_DISABLE
    HF_HUB_OFFLINE TRANSFORMERS_OFFLINE HF_DATASETS_OFFLINE HF_ENDPOINT HF_HOME HF_HUB_CACHE
    PYTHONHASHSEED PYTHONOPTIMIZE TOKENIZERS_PARALLELISM LANG LC_ALL TZ
    WORLD_SIZE RANK LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK NODE_RANK MASTER_ADDR MASTER_PORT
    TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS
    SLURM_JOB_ID SLURM_JOB_NAME SLURM_JOB_PARTITION SLURM_JOB_NUM_NODES SLURM_JOB_NODELIST SLURM_NNODES SLURM_NTASKS
    SLURM_NODEID SLURM_PROCID SLURM_LOCALID SLURM_CPUS_PER_TASK SLURM_RESTART_COUNT SLURM_ARRAY_JOB_ID
    SLURM_ARRAY_TASK_ID OPENBLAS_NUM_THREADS VECLIB_MAXIMUM_THREADS NUMEXPR_NUM_THREADS
    """.split()  # noqa: SIM905 (sixty names, one a line otherwise)
)
ALLOWED_PREFIXES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "OMP_", "MKL_", "KMP_", "GOMP_", "ACCELERATE_")


def snapshot(device_facts: dict[str, Any] | None = None) -> dict[str, Any]:
    """The content of env.json; what is not there, or does not say, is null.

    `device_facts` is what a loaded torch knows exactly: its keys replace the ones found here, new ones are added.
    """
    gpus, driver = nvidia_gpus()
    packages = installed_packages()
    cudnn = (version for name, version in packages.items() if name.startswith("nvidia-cudnn") and version)
    return {
        "time": utc_time(),
        "hostname": socket.gethostname(),
        "python": {
            "version": platform.python_version(),
            "implementation": platform.python_implementation(),
            "executable": sys.executable,
        },
        "os": {
            "system": platform.system(),
            "release": platform.release(),
            "name": _distribution(),
            "machine": platform.machine(),
            "libc": " ".join(filter(None, platform.libc_ver())) or None,
        },
        "cpu": cpu_facts(),
        "gpus": gpus,
        "driver": driver,
        "cuda": _torch_build("cuda"),
        "cudnn": next(cudnn, None),
        "threads": {name: os.environ.get(name) for name in THREAD_SETTINGS},
        "environment": environment_variables(),
        "packages": packages,
    } | (device_facts or {})


def utc_time() -> str:
    """Now, as 2026-01-31T12:00:00+00:00. For people: nothing in a run is ordered by it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def cpu_facts() -> dict[str, Any]:
    """Model, cores (`usable_cores` are those this process may run on) and memory in bytes."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {
        "model": _cpu_model(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "usable_cores": usable,
        "memory_bytes": psutil.virtual_memory().total,
    }


def nvidia_gpus() -> tuple[list[dict[str, Any]], str | None]:
    """The NVIDIA GPUs of the machine and the driver's version; ([], None) without a driver.

    NVML counts every GPU of the machine; CUDA_VISIBLE_DEVICES, which may hide some, is among the variables.
    """

    def ask(question: Callable[..., Any], *arguments: Any) -> Any:
        try:
            answer = question(*arguments)
        except pynvml.NVMLError:  # a field that this GPU or driver does not know
            return None
        return answer.decode() if isinstance(answer, bytes) else answer

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return [], None
    try:
        gpus = []
        for index in range(ask(pynvml.nvmlDeviceGetCount) or 0):
            if (gpu := ask(pynvml.nvmlDeviceGetHandleByIndex, index)) is None:
                gpus.append({"name": None, "memory_bytes": None, "used_bytes": None, "uuid": None, "capability": None})
                continue
            memory, capability = ask(pynvml.nvmlDeviceGetMemoryInfo, gpu), None
            if version := ask(pynvml.nvmlDeviceGetCudaComputeCapability, gpu):
                capability = f"{version[0]}.{version[1]}"
            gpus.append(
                {
                    "name": ask(pynvml.nvmlDeviceGetName, gpu),
                    "memory_bytes": memory and int(memory.total),
                    "used_bytes": memory and int(memory.used),
                    "uuid": ask(pynvml.nvmlDeviceGetUUID, gpu),
                    "capability": capability,
                }
            )
        return gpus, ask(pynvml.nvmlSystemGetDriverVersion)
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def installed_packages() -> dict[str, str | None]:
    """The version of every installed distribution by its normalised name, sorted; ALWAYS_LISTED may be null."""
    packages: dict[str, str | None] = dict.fromkeys(ALWAYS_LISTED)
    found: dict[str, str] = {}
    parser = HeaderParser()
    for distribution in importlib.metadata.distributions():
        # Of a wheel, of an egg, and of an .egg-info that is a file, as Debian's packages have it.
        text = next(filter(None, map(distribution.read_text, ("METADATA", "PKG-INFO", ""))), "")
        # `distribution.metadata` parses the whole file, read-me included, at each access: 0.2 s for 200 packages.
        facts = parser.parsestr(text.partition("\n\n")[0])
        if (name := facts["Name"]) and (version := facts["Version"]):  # a half-removed package has neither
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version)  # the first one is imported
    return dict(sorted((packages | found | {"difftrain": __version__}).items()))


def environment_variables() -> dict[str, str]:
    """The allow-listed environment variables, with anything like a secret in their values replaced."""
    return {
        name: REDACTED if is_secret_name(name) else redact(value)
        for name, value in sorted(os.environ.items())
        if name in ALLOWED_VARIABLES or name.startswith(ALLOWED_PREFIXES)
    }


def _torch_build(name: str) -> str | None:
    """`cuda` or `hip` as torch was built with it, read from torch/version.py without importing torch (2 s)."""
    with contextlib.suppress(ImportError, ValueError, OSError, SyntaxError):
        spec = importlib.util.find_spec("torch")
        if spec and spec.origin:
            text = Path(spec.origin).with_name("version.py").read_text()
            if match := re.search(rf"^{name}\s*(?::[^=\n]*)?=\s*(.+)$", text, re.MULTILINE):
                return ast.literal_eval(match[1].strip())
    return None


def _cpu_model() -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, timeout=2).stdout.strip() or None
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def _distribution() -> str | None:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME")
    except OSError:
        return f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else None
