"""One recorded step fed again, sample by sample: to find the picture behind a spike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.checkpoint import Found, fault_of, find
from trainer.errors import UserError
from trainer.repetition import Recorded, Say, advance, assembled, recorded, runtime_of
from trainer.run.rundir import RunDir

if TYPE_CHECKING:
    from trainer.preflight import Preflight
    from trainer.runtime import Runtime


@dataclass(frozen=True)
class ReplayedSample:
    """One sample of the step, with the weights from before it."""

    slot: int
    key: str
    caption: str  # as trained on: chosen, or dropped
    t: float
    loss: float  # weighted


@dataclass(frozen=True)
class Replayed:
    """The whole global batch; the loss of the step is the mean of its samples'."""

    samples: list[ReplayedSample]
    loss: float
    line: dict[str, Any]  # what the run recorded of this step


def replay(run_dir: RunDir, step: int, say: Say) -> Replayed:
    """Step `step` (1-based) of a run again; raises UserError if it is not on record. Writes nothing.

    Goes on from the newest whole checkpoint before the step, and computes the steps between.
    """
    record = recorded(run_dir)
    if not 1 <= step <= len(record.lines):
        raise UserError(f"step {step} is not on record", str(run_dir.metrics), f"it has steps 1 to {len(record.lines)}")
    number = record.start_of(step)
    start = record.starts[number]
    checked = record.checked(start)
    if checked.topology.world_size > 1:
        raise UserError("replay is one process", "the launch command", "difftrain replay RUN --step N")
    if checked.data_fingerprint != start.get("data_fingerprint", checked.data_fingerprint):
        say("note   the data are not those that the run recorded: `difftrain verify` says more")
    found = _checkpoint(record, number, step - 1)
    with runtime_of(start, checked, say) as runtime:
        return _replay(record, checked, runtime, found, step, say)


def _checkpoint(record: Recorded, number: int, last: int) -> Found | None:
    """The newest whole checkpoint of a step up to `last` from which steps can be computed as start `number` did.

    None to begin before the first step.
    """
    start = record.starts[number]
    while number and record.same_steps(record.starts[number - 1], start):
        number -= 1
    first = record.starts[number]["from_step"]
    for step in reversed([step for step in record.run_dir.checkpoint_steps() if first <= step <= last]):
        if fault_of(record.run_dir, step) is None:
            return find(record.run_dir, step)
    if first:
        raise UserError(
            f"no checkpoint of the steps {first} to {last} is left, and those before had another config or other data",
            str(record.run_dir.path),
            "checkpoint.keep_every_steps keeps more of them",
        )
    return None


def _replay(
    record: Recorded, checked: Preflight, runtime: Runtime, start: Found | None, step: int, say: Say
) -> Replayed:
    """Everything that holds a wrapped model: gone when this returns, before the process group is."""
    import torch

    from trainer.step import sample_losses

    training = assembled(checked, runtime, start)
    if training.state.step < step - 1:
        say(f"computing steps {training.state.step + 1} to {step - 1} again, to have the weights from before it")
    advance(training, [], step - 1, say)
    samples: list[ReplayedSample] = []
    with torch.no_grad():
        for batch in training.batches(step - 1, step):
            losses = sample_losses(training, batch.to(runtime.device)).tolist()
            facts = zip(batch.slots, batch.keys, batch.captions, batch.t.tolist(), losses, strict=True)
            samples += [ReplayedSample(*fact) for fact in facts]
    return Replayed(samples, sum(sample.loss for sample in samples) / len(samples), record.lines[step - 1])
