"""Fills in docs/mvp_smoke_checklist.md from what a smoke run knows."""

from __future__ import annotations

import getpass
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
TEMPLATE = REPOSITORY / "docs" / "mvp_smoke_checklist.md"
FILLED_NAME = "mvp_smoke_checklist.filled.md"

PIPE = re.compile(r"(?<!\\)\|")
RULE = re.compile(r"\|(\s*-+\s*\|)+")
VERDICTS = {"PASS", "FAIL", "NA"}
FREE_ROWS = {"Issues encountered", "Proposed fixes", "Next actions"}  # may stay empty


def fill_checklist(template: Path, out: Path, metadata: dict[str, str], results: dict[str, tuple[str, str]]) -> None:
    """Writes `template` to `out` with its tables filled in, by the first cell of each row.

    A table of two columns takes its values from `metadata`, one of five PASS, FAIL or NA and a note from `results`, and
    NA where they say nothing. Raises ValueError for a label that no row has, or two have, for any other verdict, and
    for a row without a value, `FREE_ROWS` apart; then `out` is not written.
    """
    if bad := {verdict for verdict, _ in results.values()} - VERDICTS:
        raise ValueError(f"neither PASS, FAIL nor NA: {sorted(bad)}")
    lines = template.read_text(encoding="utf-8").splitlines()
    rows = table_rows(lines)
    found = {2: [], 5: []}
    empty = []
    for number, cells in rows.items():
        label = cells[0]
        found[len(cells)].append(label)
        if len(cells) == 2:
            cells[1] = _cell(metadata.get(label, ""))
            if not cells[1] and label not in FREE_ROWS:
                empty.append(label)
        else:
            verdict, note = results.get(label, ("NA", "not part of this run"))
            cells[3:] = verdict, _cell(note)
        lines[number] = f"| {' | '.join(cells)} |"
    unknown = [label for label in metadata if label not in found[2]] + [r for r in results if r not in found[5]]
    twice = [label for label, count in Counter(found[2] + found[5]).items() if count > 1]
    for fault, labels in (("no such row", unknown), ("more than one row", twice), ("no value for", empty)):
        if labels:
            raise ValueError(f"{template.name}: {fault}: {', '.join(labels)}")
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def table_rows(lines: list[str]) -> dict[int, list[str]]:
    """The cells of every row of every table, without its two head lines, by line number."""
    rows: dict[int, list[str]] = {}
    inside = False
    for number, line in enumerate(lines):
        if not line.startswith("|"):
            inside = False
        elif RULE.fullmatch(line.strip()):
            inside = True
        elif inside:
            rows[number] = [cell.strip() for cell in PIPE.split(line.strip())[1:-1]]
    return rows


def collect_metadata(env: dict[str, Any], manifest: dict[str, Any]) -> dict[str, str]:
    """A value for every row of the run's metadata, from the contents of env.json and run_manifest.json."""
    cpu, system, packages = env["cpu"], env["os"], env["packages"]
    git = manifest.get("git") or {}
    gpus = Counter(f"{gpu['name']}, {_gib(gpu['memory_bytes'])}" for gpu in env["gpus"])
    cores = f"{cpu['physical_cores']} cores, {cpu['logical_cores']} threads"
    dirty = git.get("dirty")
    return {
        "Date": env["time"],
        "Operator": os.environ.get("DIFFTRAIN_OPERATOR") or _user(),
        "Location": os.environ.get("DIFFTRAIN_LOCATION") or env["hostname"],
        "Machine": f"{cpu['model']}, {cores}, {_gib(cpu['memory_bytes'])}",
        "GPU (model, VRAM)": "; ".join(f"{count} x {gpu}" for gpu, count in gpus.items()) or "none",
        "Driver version": env["driver"] or "none",
        "CUDA version": env["cuda"] or "none (torch without CUDA)",
        "Python version": env["python"]["version"],
        "PyTorch version": packages.get("torch") or "not installed",
        **{
            f"{package} version": packages.get(package) or "not installed"
            for package in ("diffusers", "transformers", "datasets", "torchvision")
        },
        "OS": f"{system['name']}, {system['system']} {system['release']}, {system['machine']}",
        "Repo path": str(REPOSITORY),
        "Git commit": git.get("commit") or "not a git checkout",
        "Working tree clean (Y/N)": "unknown" if dirty is None else "N" if dirty else "Y",
    }


def preconditions() -> dict[str, tuple[str, str]]:
    """The rows of "Before the run", as this process finds them: that it has come so far proves the first two."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "Install extras": ("PASS", f"imported from {sys.prefix}"),
        "Confirm repo root": ("PASS", str(REPOSITORY)),
        "CUDA availability": ("PASS", torch.cuda.get_device_name()) if cuda else ("NA", "False: no CUDA device here"),
    }


def _gib(size_bytes: int | None) -> str:
    return "? GiB" if size_bytes is None else f"{size_bytes / 2**30:.0f} GiB"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return f"user {os.getuid()}"


def _cell(text: str) -> str:
    """`text` as one cell: on one line, its bars escaped."""
    return PIPE.sub(r"\\|", " ".join(text.split()))
