"""The first steps of a run, computed again here, and compared with what it recorded."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import PrivateAttr

from trainer.comparison import line_differences
from trainer.data.fingerprint import FINGERPRINT_FORMAT
from trainer.hook import Hook, MainHook, RunView
from trainer.preflight import Preflight
from trainer.repetition import Recorded, Say, advance, assembled, recorded, runtime_of
from trainer.resume import refuse_second_run
from trainer.run.environment import snapshot
from trainer.run.manifest import changes
from trainer.run.records import changes_since
from trainer.run.rundir import RunDir

if TYPE_CHECKING:
    from trainer.runtime import Runtime

OTHER_RANKS = 1e-4  # relative: sums over another number of ranks are rounded in another order


@dataclass
class Reproduction:
    """What came out. `inputs` and `circumstances`: section -> name -> (recorded, now), empty where nothing differs."""

    inputs: dict[str, dict[str, tuple[Any, Any]]]  # data and model: what the run was made from
    records: dict[str, str]  # what became of the records that changed, by key
    circumstances: dict[str, dict[str, tuple[Any, Any]]]  # code, environment: what may explain another result
    steps: int  # compared
    relative: float  # the difference that numbers with a fraction may have; 0 is equality to the bit
    first_step: int | None = None  # at which a quantity differs
    quantities: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # which, at that step

    @property
    def equal(self) -> bool:
        """Whether the inputs are as recorded and every step is."""
        return not any(self.inputs.values()) and self.first_step is None


class Witness(MainHook):
    """Compares the steps with those on record, up to the first that differs."""

    essential: ClassVar[bool] = True

    expected: list[dict[str, Any]]
    relative: float
    _first_step: int | None = PrivateAttr(None)
    _quantities: dict[str, tuple[Any, Any]] = PrivateAttr(default_factory=dict)

    def on_metrics(self, view: RunView, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            different = line_differences(self.expected[line["step"] - 1], line, self.relative)
            if different and self._first_step is None:
                self._first_step, self._quantities = line["step"], different


def reproduce(run_dir: RunDir, steps: int, output_dir: RunDir | None, say: Say) -> Reproduction:
    """Compute the first `steps` steps of a run again; raises UserError if they cannot be.

    With an `output_dir`, what is computed here is kept there, as a run of its own.
    """
    if output_dir is not None:
        output_dir.check_writable()
        refuse_second_run(output_dir)
    record = recorded(run_dir, str(output_dir.path) if output_dir else None)
    steps = min(steps, len(record.lines), record.one_config_until or steps)
    checked = record.preflight()
    topologies = [s["topology"]["world_size"] for s in record.manifest["starts"] if s["from_step"] < steps]
    same_ranks = set(topologies) == {checked.topology.world_size}
    found = Reproduction(
        inputs=_inputs(record, checked),
        records=_records(record, checked),
        circumstances={},
        steps=steps,
        relative=0.0 if same_ranks else OTHER_RANKS,
    )
    witness = Witness(expected=record.lines, relative=found.relative)
    with runtime_of(record, checked, say) as runtime:
        found.circumstances = _circumstances(record, checked, snapshot(runtime.device_facts()))
        if not same_ranks:
            say(
                f"note   the run had {', '.join(map(str, sorted(set(topologies))))} ranks, here "
                f"{checked.topology.world_size}: numbers may differ by {OTHER_RANKS:g} of their size"
            )
        _steps_again(checked, runtime, steps, output_dir, witness, say)
    found.first_step, found.quantities = witness._first_step, witness._quantities
    return found


def _steps_again(
    checked: Preflight, runtime: Runtime, steps: int, output_dir: RunDir | None, witness: Witness, say: Say
) -> None:
    """Everything that holds a wrapped model: gone when this returns, before the process group is."""
    from trainer.hooks.standard import truth_hooks

    training = assembled(checked, runtime, None)
    hooks: list[Hook] = [hook for hook in checked.config.hooks if hook.repeatable and witness.relative == 0]
    hooks.append(witness)
    if output_dir is not None:
        runtime.from_main(output_dir.create)
        hooks += truth_hooks(checked, training, None)
    say(f"computing steps 1 to {steps} again")
    advance(training, hooks, steps, say, over=lambda: witness._first_step is not None)


def _inputs(record: Recorded, checked: Preflight) -> dict[str, dict[str, tuple[Any, Any]]]:
    """What the run was made from: the data and the model's files."""
    if not _is_main():
        return {}
    found: dict[str, dict[str, tuple[Any, Any]]] = {"data": {}, "model": {}}
    if _data_changed(record, checked):
        found["data"]["fingerprint"] = (record.manifest["data"]["fingerprint"], checked.data_fingerprint)
    recorded, files = record.manifest["model"]["files"], checked.provenance.files
    if recorded is not None and files is not None:
        found["model"] = _pairs(changes(recorded, files))
    return found


def _records(record: Recorded, checked: Preflight) -> dict[str, str]:
    if not _is_main() or not _data_changed(record, checked):
        return {}
    return changes_since(record.run_dir, record.manifest["data"]["fingerprint"], checked.leaves()) or {}


def _data_changed(record: Recorded, checked: Preflight) -> bool:
    data = record.manifest["data"]
    same_kind = data.get("fingerprint_format") == FINGERPRINT_FORMAT
    return same_kind and data["fingerprint"] != checked.data_fingerprint


def _circumstances(record: Recorded, checked: Preflight, here: dict[str, Any]) -> dict[str, dict[str, tuple[Any, Any]]]:
    facts = checked.manifest_facts(["reproduce"])
    code, code_here = (
        {"commit": manifest["git"]["commit"], "diff_sha256": manifest["git"]["diff_sha256"]}
        | manifest["config"].get("plugins", {})
        for manifest in (record.manifest, facts)
    )
    return {
        "code": _pairs(changes(code, code_here)),
        "environment": _pairs(changes(record.environment, here, ignored=("time", "environment"))),
    }


def _pairs(changed: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (change["was"], change["now"]) for name, change in changed.items()}


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"
