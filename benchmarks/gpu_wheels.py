"""Wheels for a GPU machine without a network: what its Python 3.12 with torch and transformers lacks, about 13 MB.

Needs the standard library and pip alone.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux2014_x86_64", "manylinux_2_17_x86_64", "any")
PURE = (
    *("diffusers", "pydantic", "annotated-types", "typing-inspection", "typing-extensions", "nvidia-ml-py"),
    # What diffusers asks for, and what that needs.
    *("requests", "urllib3", "charset-normalizer", "idna", "certifi"),
)
COMPILED = ("pydantic-core",)
BEYOND_CONSTRAINTS = ("httpx==0.28.1",)  # diffusers imports it; newer hubs bring another client
OURS = ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "trainer")  # what a wheel is made of


def collect(folder: Path) -> None:
    """Download them into `folder`, in the tested versions, our own wheel among them."""
    folder.mkdir(parents=True, exist_ok=True)
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    download(folder, "none", [*(f"{name}=={pins[name]}" for name in PURE), *BEYOND_CONSTRAINTS])
    download(folder, "cp312", [f"{name}=={pins[name]}" for name in COMPILED])
    build(folder)
    wheels = sorted(folder.glob("*.whl"))
    print("\n".join(f"{wheel.stat().st_size / 1e6:6.2f} MB  {wheel.name}" for wheel in wheels))


def build(folder: Path) -> None:
    """Put our own wheel there, made of a copy: a build leaves files in the source, which the next one would take in."""
    with tempfile.TemporaryDirectory() as name:
        for path in OURS:
            (shutil.copytree if (ROOT / path).is_dir() else shutil.copy)(ROOT / path, Path(name) / path)
        pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder.resolve()), name]
        subprocess.run(pip, check=True)


def download(folder: Path, abi: str, requirements: list[str]) -> None:
    """Download wheels for that Python and that binary interface."""
    target = ["--python-version", PYTHON, "--implementation", "cp", "--abi", abi]
    target += [word for platform in PLATFORMS for word in ("--platform", platform)]
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    subprocess.run([*pip, *target, *requirements], check=True)


def install(wheels: Path) -> Path:
    """The folder, outside of any environment, into which the wheels were installed."""
    site = Path(tempfile.mkdtemp(prefix="difftrain-site-"))
    found = [str(wheel) for wheel in sorted(wheels.glob("*.whl"))]
    if not found:
        raise SystemExit(f"{wheels} holds no wheels: fill it with --collect where there is a registry")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*pip, *found], check=True)
    return site
