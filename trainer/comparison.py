"""What differs between two runs, from what made them to what came out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.config_file import load_config
from trainer.resume import differences
from trainer.run.manifest import changes, read_manifest
from trainer.run.metrics import read as read_metrics
from trainer.run.records import changes_since, read_records
from trainer.run.rundir import RunDir

# Of a metrics line: all that is not a function of config and step, and the step itself.
NOT_COMPARED = ("step", "timing")


@dataclass
class Comparison:
    """What is the same and what is not: section -> name -> (value in A, value in B); empty where nothing differs."""

    sections: dict[str, dict[str, tuple[Any, Any]]] = field(default_factory=dict)
    first_step: int | None = None  # the first step at which a number differs
    common_steps: int = 0
    records: dict[str, str] | None = None  # what became of each, by key; None if the data are equal or not both listed

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not any(self.sections.values())


def compare(a: RunDir, b: RunDir) -> Comparison:
    """The differences of two run directories; raises UserError if one of them is not the folder of a run."""
    manifests = read_manifest(a.manifest), read_manifest(b.manifest)
    found = Comparison()
    ours, theirs = (load_config(run_dir.resolved_config).config.model_dump(mode="json") for run_dir in (a, b))
    found.sections["config"] = differences(ours, theirs)
    found.sections["config"].pop("train.output_dir", None)  # where it lies is not what it is
    found.sections["environment"] = pairs(*(json.loads(run_dir.environment.read_bytes()) for run_dir in (a, b)))
    for section in ("git", "model", "data", "topology"):
        found.sections[section] = pairs(*(manifest[section] for manifest in manifests))
    found.sections["plugins"] = pairs(*(manifest["config"].get("plugins", {}) for manifest in manifests))
    if "fingerprint" in found.sections["data"]:
        fingerprints = [manifest["data"]["fingerprint"] for manifest in manifests]
        found.records = changes_since(a, fingerprints[0], read_records(b, fingerprints[1]))
    found.sections["metrics"] = _metrics(a, b, found)
    return found


def pairs(a: Mapping[str, Any], b: Mapping[str, Any], ignored: Iterable[str] = ("time",)) -> dict[str, tuple[Any, Any]]:
    """The dotted names at which two trees of facts differ, each with both values; None where a name is absent."""
    return {name: (change["was"], change["now"]) for name, change in changes(a, b, ignored).items()}


def told(title: str, differences: Mapping[str, str], at_most: int) -> Iterator[str]:
    """Lines for people: the title, a line for each of the first differences, and how many more there are."""
    yield title
    for name, what in list(differences.items())[:at_most]:
        yield f"  {name}: {what}"
    if len(differences) > at_most:
        yield f"  and {len(differences) - at_most} more"


def _metrics(a: RunDir, b: RunDir, found: Comparison) -> dict[str, tuple[Any, Any]]:
    """The numbers that differ at the first step at which any does."""
    lines = [read_metrics(run_dir.metrics) for run_dir in (a, b)]
    found.common_steps = min(map(len, lines))
    for one, other in zip(*lines, strict=False):
        if different := line_differences(one, other):
            found.first_step = one["step"]
            return different
    return {}


def line_differences(one: Mapping[str, Any], other: Mapping[str, Any], relative: float = 0.0) -> dict[str, Any]:
    """What two metrics lines of one step both have and differ in, each with both values, in the order of the first.

    Numbers with a fraction may differ by `relative`.
    """
    names = [name for name in one if name in other and name not in NOT_COMPARED]
    return {name: (one[name], other[name]) for name in names if not _equal(one[name], other[name], relative)}


def _equal(a: Any, b: Any, relative: float) -> bool:
    if relative and isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=relative)
    return a == b
