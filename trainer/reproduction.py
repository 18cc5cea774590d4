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
from trainer.run.metrics import finite
from trainer.run.records import changes_since
from trainer.run.rundir import RunDir

if TYPE_CHECKING:
    from trainer.runtime import Runtime

OTHER_ROUNDING = 1e-4  # relative: on other ranks, threads or micro batches sums are made in another order


@dataclass
class Reproduction:
    """What came out. Sections: name -> (recorded, now), empty where nothing differs, None where it is not known."""

    inputs: dict[str, dict[str, tuple[Any, Any]] | None]  # data and model: what the run was made from
    records: dict[str, str]  # what became of the records that changed, by key
    circumstances: dict[str, dict[str, tuple[Any, Any]] | None]  # code, environment: what may explain another result
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
    _compared: int = PrivateAttr(0)
    _first_step: int | None = PrivateAttr(None)
    _quantities: dict[str, tuple[Any, Any]] = PrivateAttr(default_factory=dict)

    def on_metrics(self, view: RunView, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            self._compared += 1
            different = line_differences(self.expected[line["step"] - 1], finite(line), self.relative)
            if different and self._first_step is None:
                self._first_step, self._quantities = line["step"], different


def reproduce(run_dir: RunDir, steps: int, output_dir: RunDir | None, say: Say) -> Reproduction:
    """Compute the first `steps` steps of a run again; raises UserError if they cannot be.

    With an `output_dir`, what is computed here is kept there, as a run of its own.
    """
    if output_dir is not None:
        output_dir.check_writable()
        refuse_second_run(output_dir)
    record = recorded(run_dir)
    first = record.starts[0]
    steps = min(steps, len(record.lines))
    for start in record.starts[1:]:
        if start["from_step"] < steps and not record.same_steps(first, start):
            steps = start["from_step"]
            say(f"note   the run went on from step {steps} with another config or other data: the steps before count")
    checked = record.checked(first, str(output_dir.path) if output_dir else None)
    relative = 0.0 if _same_rounding(record, steps, checked) else OTHER_ROUNDING
    witness = Witness(expected=record.lines, relative=relative)
    with runtime_of(first, checked, say) as runtime:
        found = Reproduction(
            inputs=_inputs(record, checked),
            records=_records(record, checked),
            circumstances=_circumstances(record, checked, snapshot(runtime.device_facts())),
            steps=steps,
            relative=relative,
        )
        if relative:
            say(
                f"note   other ranks, threads or micro batches than the run had: numbers may differ by {relative:g} of "
                "their size"
            )
        _steps_again(checked, runtime, steps, output_dir, witness, say)
    found.steps = witness._compared
    found.first_step, found.quantities = witness._first_step, witness._quantities
    return found


def _same_rounding(record: Recorded, steps: int, checked: Preflight) -> bool:
    """Whether sums are made in one order in all of the steps, and here: of the same ranks, micro batch and threads."""

    def order(start: dict[str, Any]) -> tuple[Any, ...]:
        return start["topology"]["world_size"], start["topology"]["micro_batch_size"], start.get("torch_threads")

    first, *others = (start for start in record.starts if start["from_step"] < steps)
    here = checked.topology.world_size, checked.topology.micro_batch, first.get("torch_threads")
    return all(order(start) == here for start in (first, *others))


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


def _inputs(record: Recorded, checked: Preflight) -> dict[str, dict[str, tuple[Any, Any]] | None]:
    """What the run was made from: the data and the model's files."""
    if not _is_main():
        return {}
    found: dict[str, dict[str, tuple[Any, Any]] | None] = {"data": None, "model": None}
    was = _fingerprint(record)
    if was is not None:
        now = checked.data_fingerprint
        found["data"] = {} if was == now else {"fingerprint": (was, now)}
    files, files_here = record.manifest["model"]["files"], checked.provenance.files
    if files is not None and files_here is not None:
        found["model"] = _pairs(changes(files, files_here))
    return found


def _records(record: Recorded, checked: Preflight) -> dict[str, str]:
    was = _fingerprint(record)
    if not _is_main() or was in (None, checked.data_fingerprint):
        return {}
    return changes_since(record.run_dir, was, checked.leaves()) or {}


def _fingerprint(record: Recorded) -> str | None:
    """Of the data of the first start; None if it was taken in another way than today's."""
    data = record.manifest["data"]
    if data.get("fingerprint_format") != FINGERPRINT_FORMAT:
        return None
    return record.starts[0].get("data_fingerprint", data["fingerprint"])


def _circumstances(
    record: Recorded, checked: Preflight, here: dict[str, Any]
) -> dict[str, dict[str, tuple[Any, Any]] | None]:
    start, facts = record.starts[0], checked.manifest_facts(["reproduce"])
    code = {"commit": start["git_commit"], "diff_sha256": start["git_diff_sha256"]}
    code_here = {name: facts["git"][name] for name in code}
    plugins, plugins_here = (manifest["config"].get("plugins", {}) for manifest in (record.manifest, facts))
    return {
        "code": _pairs(changes({**code, **plugins}, {**code_here, **plugins_here})),
        "environment": _pairs(changes(record.environment_of(0), here, ignored=("time", "environment"))),
    }


def _pairs(changed: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (change["was"], change["now"]) for name, change in changed.items()}


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"
