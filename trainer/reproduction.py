"""The first steps of a run, computed again here, and compared with what it recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import PrivateAttr

from trainer.comparison import line_differences, pairs
from trainer.data.fingerprint import FINGERPRINT_FORMAT
from trainer.hook import Hook, MainHook, RunView
from trainer.preflight import Preflight, surveyed
from trainer.repetition import Recorded, Say, advance, assembled, recorded, runtime_of
from trainer.resume import refuse_second_run
from trainer.run.environment import snapshot
from trainer.run.metrics import finite
from trainer.run.records import changes_since
from trainer.run.rundir import RunDir

if TYPE_CHECKING:
    from trainer.runtime import Runtime

OTHER_ROUNDING = 1e-4  # relative: on other ranks, threads or micro batches sums are made in another order


@dataclass(frozen=True)
class Reproduction:
    """What came out. Sections: name -> (recorded, now), empty where nothing differs, None where it is not known.

    On other ranks than 0 nothing is compared, and nothing differs.
    """

    inputs: dict[str, dict[str, tuple[Any, Any]] | None]  # data and model: what the run was made from
    records: dict[str, str]  # what became of the records that changed, by key
    circumstances: dict[str, dict[str, tuple[Any, Any]]]  # code, environment: what may explain another result
    steps: int  # compared
    relative: float  # the difference that numbers with a fraction may have; 0 is equality to the bit
    first_step: int | None  # at which a quantity differs
    quantities: dict[str, tuple[Any, Any]]  # which, at that step

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
    _differences: list[tuple[int, dict[str, tuple[Any, Any]]]] = PrivateAttr(default_factory=list)

    def on_metrics(self, view: RunView, lines: list[dict[str, Any]]) -> None:
        self._compared += len(lines)
        for line in lines:
            if different := line_differences(self.expected[line["step"] - 1], finite(line), self.relative):
                self._differences.append((line["step"], different))

    @property
    def compared(self) -> int:
        """How many steps were compared."""
        return self._compared

    @property
    def differences(self) -> Sequence[tuple[int, dict[str, tuple[Any, Any]]]]:
        """The steps that differ, ascending, each with the quantities that do."""
        return self._differences


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
    if relative:
        why = "other ranks, threads, micro batches or kernels than the run's"
        say(f"note   {why}: numbers may differ by {relative:g}, relatively")
    with runtime_of(first, checked, say) as runtime:
        checked = surveyed(checked, runtime)
        _steps_again(checked, runtime, steps, output_dir, witness, say)
        is_main, here = runtime.is_main, snapshot(runtime.device_facts())
    was = _fingerprint(record) if is_main else None
    changed = was not in (None, checked.data_fingerprint)
    first_step, quantities = witness.differences[0] if witness.differences else (None, {})
    return Reproduction(
        inputs=_inputs(record, checked, was) if is_main else {},
        records=changes_since(record.run_dir, was, checked.leaves()) or {} if changed else {},
        circumstances=_circumstances(record, checked, here),
        steps=witness.compared,
        relative=relative,
        first_step=first_step,
        quantities=quantities,
    )


def _same_rounding(record: Recorded, steps: int, checked: Preflight) -> bool:
    """Whether sums are made in one order in all of the steps, and here.

    That is so with the same ranks, micro batch, threads and kernels; those here are the first start's.
    """

    def order(start: dict[str, Any]) -> tuple[Any, ...]:
        ranks, micro_batch = start["topology"]["world_size"], start["topology"]["micro_batch_size"]
        return ranks, micro_batch, start.get("torch_threads"), record.kernels(start)

    first, *others = (start for start in record.starts if start["from_step"] < steps)
    if record.kernels(first)["train.cudnn_benchmark"]:
        return False  # a stopwatch chose them
    here = checked.topology.world_size, checked.topology.micro_batch, first.get("torch_threads"), record.kernels(first)
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
    advance(training, hooks, steps, say, over=lambda: bool(witness.differences))


def _inputs(record: Recorded, checked: Preflight, was: str | None) -> dict[str, dict[str, tuple[Any, Any]] | None]:
    """What the run was made from: the data, whose fingerprint `was` this, and the model's files."""
    found: dict[str, dict[str, tuple[Any, Any]] | None] = {"data": None, "model": None}
    if was is not None:
        found["data"] = pairs({"fingerprint": was}, {"fingerprint": checked.data_fingerprint})
    files, files_here = record.manifest["model"]["files"], checked.provenance.files
    if files is not None and files_here is not None:
        found["model"] = pairs(files, files_here)
    return found


def _fingerprint(record: Recorded) -> str | None:
    """Of the data of the first start; None if it was taken in another way than today's."""
    data = record.manifest["data"]
    if data.get("fingerprint_format") != FINGERPRINT_FORMAT:
        return None
    return record.starts[0].get("data_fingerprint", data["fingerprint"])


def _circumstances(record: Recorded, checked: Preflight, here: dict[str, Any]) -> dict[str, dict[str, tuple[Any, Any]]]:
    start, facts = record.starts[0], checked.manifest_facts(["reproduce"])
    code = {"commit": start["git_commit"], "diff_sha256": start["git_diff_sha256"]}
    code_here = {name: facts["git"][name] for name in code}
    plugins, plugins_here = (manifest["config"].get("plugins", {}) for manifest in (record.manifest, facts))
    return {
        "code": pairs({**code, **plugins}, {**code_here, **plugins_here}),
        "environment": pairs(record.environment_of(0), here, ignored=("time", "environment")),
    }
