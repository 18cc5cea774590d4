"""From a checked run to its end: ranks up, state built or resumed, hooks around the loop, a last word."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial

from trainer import loop
from trainer.auto_values import resolve_auto, with_resolved
from trainer.checkpoint import Found, sealed, set_aside_after
from trainer.control import Control
from trainer.errors import RunEnd, Stopped, UserError
from trainer.failure import as_status, caused_by, crashed, explained
from trainer.files import open_atomic, write_atomic, write_json
from trainer.hooks.standard import standard_hooks
from trainer.peers import PeerFailed
from trainer.preflight import Preflight, surveyed
from trainer.resume import choose_start, refuse_changes, refuse_other_inputs
from trainer.run.lock import RunLock
from trainer.run.manifest import read_manifest, record_end
from trainer.run.metrics import check as check_metrics
from trainer.run.metrics import first_lines
from trainer.run.records import changes_since
from trainer.run.rundir import RunDir
from trainer.runtime import Runtime
from trainer.summary import describe, last_word, over_long
from trainer.training import assemble

SAVE_SECONDS = 60.0  # that a save under way is waited for where the main thread is stuck


def launch(checked: Preflight, run_dir: RunDir, resume: str, allowed: Sequence[str]) -> None:
    """Train to the last step; raises the RunEnd of every other ending."""
    config = checked.config
    train = config.train
    runtime = Runtime(train.precision, train.deterministic, train.collective_timeout_seconds)
    control, lock = Control(run_dir if runtime.is_main else None), RunLock(run_dir.path)
    may_hang, step = False, 0
    try:
        checked = surveyed(checked, runtime)
        seen, start = runtime.from_main(
            lambda: (run_dir.checkpoint_steps(), _start(checked, run_dir, lock, resume, allowed, runtime.say))
        )
        step = start.sidecar["step"] if start else 0
        checked = resolve_auto(checked, runtime, start)
        _train(checked, runtime, run_dir, lock, seen, start, control)
        runtime.gather(None)  # all have come this far, so none leaves while another one still talks to it
    except Stopped:
        raise
    except Exception as error:  # noqa: BLE001
        may_hang = runtime.may_hang_at_its_end
        raise _ended(checked, runtime, run_dir, lock, step, error)  # noqa: B904 (and no local name for it: see loop.run)
    finally:
        lock.release()
        control.close()
        if not may_hang:
            runtime.close()


def _ended(
    checked: Preflight, runtime: Runtime, run_dir: RunDir, lock: RunLock, step: int, error: Exception
) -> BaseException:
    """What ended the job, for those who read it. Rank 0 writes it down, but for a refusal, which writes nothing."""
    end = runtime.blame(explained(error, checked.config, checked.topology), step)
    if runtime.is_main and not isinstance(end, UserError) and run_dir.manifest.is_file() and lock.may_write():
        with contextlib.suppress(RunEnd, OSError):  # it must not hide the reason
            record_end(run_dir.manifest, *as_status(end))
    end = crashed(end, run_dir, runtime.rank, runtime.world_size)
    if isinstance(end, RunEnd):
        end.at_once = runtime.may_hang_at_its_end
    return caused_by(end, error)


def _train(
    checked: Preflight,
    runtime: Runtime,
    run_dir: RunDir,
    lock: RunLock,
    seen: list[int],
    start: Found | None,
    control: Control,
) -> None:
    """Everything that holds a wrapped model: gone when this returns, before the process group is."""
    started, say = time.monotonic(), runtime.say
    for line in checked.equations() if runtime.is_main else ():
        say(line)
    if idle := runtime.idle_gpus():
        say(f"note   {idle} GPUs here stay idle; accelerate launch --multi_gpu trainer/train.py uses them")
    training = assemble(checked, runtime, run_dir, start)
    for line in [*describe(training), *over_long(training)] if runtime.is_main else ():
        say(line)
    first = training.first_step
    runtime.from_main(lambda: prepare_folder(run_dir, lock, seen, start, say))
    hooks = standard_hooks(checked, training, start)
    gc.enable()  # `train` switched it off for the start-up
    with runtime.watching(lambda: training.state.step, partial(_leave_at_once, runtime, run_dir, lock)):
        loop.run(training, hooks, control, say)
    last_word(training, first, time.monotonic() - started, say)


def _leave_at_once(runtime: Runtime, run_dir: RunDir, lock: RunLock, end: PeerFailed) -> None:
    """End this process, whose main thread is stuck, for a rank that fell silent; one rank says so."""
    if runtime.is_main and lock.may_write():
        with contextlib.suppress(RunEnd, OSError):
            record_end(run_dir.manifest, *as_status(end))
    if end.of_one_rank or runtime.is_main:
        print(f"{end.state}: {end}", file=sys.stderr, flush=True)
    for thread in threading.enumerate():
        if thread.name.startswith("checkpoint-"):
            thread.join(SAVE_SECONDS)
    os._exit(end.exit_code)


def _start(
    checked: Preflight, run_dir: RunDir, lock: RunLock, resume: str, allowed: Sequence[str], say: loop.Say
) -> Found | None:
    """Rank 0: the checkpoint to go on from, None for step 0; raises UserError if it may not go on. Writes nothing."""
    lock.refuse_if_held()
    start = choose_start(run_dir, resume, say)
    if start is None:
        return None
    step = start.sidecar["step"]
    saved = start.load()["config"]
    refuse_changes(saved, with_resolved(checked.config, saved), allowed, say)
    inputs = {"data_fingerprint": checked.data_fingerprint, "model_files": checked.provenance.files}
    trained_in = RunDir(start.path.parent)
    refuse_other_inputs(
        start.sidecar,
        inputs,
        allowed,
        lambda: changes_since(trained_in, start.sidecar["data_fingerprint"], checked.leaves()),
        say,
    )
    if step > checked.config.train.max_steps:
        raise UserError(
            f"the checkpoint is of step {step}, past the last step",
            checked.loaded.where("train.max_steps"),
            "raise train.max_steps",
        )
    check_metrics(trained_in.metrics, step)
    if run_dir.manifest.exists():
        read_manifest(run_dir.manifest)
    say(f"resume {start.path} at step {step}")
    return start


def prepare_folder(run_dir: RunDir, lock: RunLock, seen: list[int], start: Found | None, say: loop.Say) -> None:
    """Rank 0: the folder as the next step wants it; raises UserError if another run took it in the meantime."""
    run_dir.create()
    lock.take()
    if run_dir.checkpoint_steps() != seen:  # the start was chosen from others
        raise UserError("another run has just written this folder", str(run_dir.path), "look, and start again")
    for request in (run_dir.stop_request, run_dir.save_request):
        request.unlink(missing_ok=True)  # meant for the run before
    for stray in run_dir.sweep():
        say(f"note   removed {stray}, left half-written by a killed run")
    for orphan in run_dir.uncommitted():
        say(f"note   {orphan.name} has no sidecar, so it is no checkpoint; its {orphan.stat().st_size:,} bytes can go")
    if start is None:
        return
    if not _is_branch(start, run_dir):
        for name in set_aside_after(run_dir, start.sidecar["step"]):
            say(f"note   renamed {name} to {name}.damaged")
        return
    # The history and the first checkpoint of a branch are the other run's. The sidecar commits them: the copy, which
    # takes long, comes first, while the folder does not hold a run yet, and then the history in one step.
    step = start.sidecar["step"]
    with open(start.path, "rb") as there, open_atomic(run_dir.checkpoint(step)) as here:
        shutil.copyfileobj(there, here)
    write_atomic(run_dir.metrics, first_lines(RunDir(start.path.parent).metrics, step))
    write_json(run_dir.sidecar(step), sealed(start.sidecar))


def _is_branch(start: Found, run_dir: RunDir) -> bool:
    return start.path.parent.resolve() != run_dir.path.resolve()
