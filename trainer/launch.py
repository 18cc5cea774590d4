"""From a checked run to its end: ranks up, state built or resumed, hooks around the loop, a last word."""

from __future__ import annotations

import contextlib
import gc
import os
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import nn

from trainer import loop
from trainer.checkpoint import Found, sealed, set_aside_after
from trainer.control import Control
from trainer.data.captions import possible_captions
from trainer.errors import RunEnd, Stopped, UserError
from trainer.failure import as_status, caused_by, crashed, explained
from trainer.files import open_atomic, write_atomic, write_json
from trainer.hooks.progress import duration
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
from trainer.settle import as_settled, settled
from trainer.training import Training, assemble

SAVE_SECONDS = 60.0  # that a save under way is waited for where the main thread is stuck
MOST_COUNTED = 20_000  # records whose captions are counted at a start: a second's work


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
        checked = settled(checked, runtime, start)
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
    _last_word(training, first, time.monotonic() - started, say)


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
    refuse_changes(saved, as_settled(checked.config, saved), allowed, say)
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


def describe(training: Training) -> list[str]:
    """What was built, as lines for the start of a run."""
    config, runtime = training.config, training.runtime
    components = training.components
    sizes = [f"unet {_count(components.unet)}"]
    for name in ("text_encoder", "vae"):
        what, precision = name.replace("_", " "), f" in {config.model.vae_precision}" if name == "vae" else ""
        here = components.loaded(name)
        sizes.append(f"{what} {_count(getattr(components, name))}{precision}" if here else f"{what} not loaded: cached")
    source = components.provenance
    revision = f"@{source.revision}" if source.revision else ""
    lr = config.lr
    trained_as = components.scheduler.get("prediction_type")
    layers = [layer for network in training.state.modules.values() for layer in network.modules()]
    drops = any(isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0 for layer in layers)
    mismatch = trained_as is not None and trained_as != config.objective.kind
    return [
        f"model  {source.source}{revision}: {', '.join(sizes)}",
        f"loss   {config.objective.kind}, {config.weighting.kind} weighting, {config.timesteps.kind} timesteps; "
        f"{config.optimizer.kind}, {lr.kind} lr {lr.peak:g} after {lr.warmup_steps} warm-up steps",
        f"ranks  {runtime.world_size} on {runtime.device.type}, {config.train.precision}, seed {config.train.seed}"
        f"{', deterministic' if config.train.deterministic else ''}",
        *([f"note   this model was trained to predict {trained_as}, not {config.objective.kind}"] if mismatch else []),
        *(["note   this model has dropout, and what it drops depends on the micro batch"] if drops else []),
        f"output {training.run_dir.path}",
    ]


def over_long(training: Training) -> list[str]:
    """How many captions the text encoder cannot read to their end, if there are any; of much data, in a part of it."""
    config, records = training.config, training.samples.records
    family, tokenizer = config.model, training.components.tokenizer
    room, stride = family.prompt_room(tokenizer), -(-len(records) // MOST_COUNTED)
    captions = [each for index in range(0, len(records), stride) for each in records[index].captions]
    if not config.data.caption_shuffle_tags:
        captions = list(possible_captions(config.data, captions))
    could_be = [caption for caption in captions if len(caption.encode()) > room]  # a token is a byte at least
    cut = sum(count > room for count in family.token_counts(tokenizer, could_be))
    part = "" if stride == 1 else f" of every {stride}th record"
    told = f"note   {cut:,} of {len(captions):,} captions{part} are longer than the {room} tokens that are read"
    return [f"{told}; model.prompt_chunks takes more of them"] if cut else []


def _count(module: nn.Module) -> str:
    total = sum(parameter.numel() for parameter in module.parameters())
    trainable = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    state = (
        "trained" if trainable == total else "frozen" if trainable == 0 else f"of which {trainable / 1e6:.3g} M trained"
    )
    return f"{total / 1e6:.3g} M {state}"


def _last_word(training: Training, first: int, seconds: float, say: loop.Say) -> None:
    state, run_dir, train = training.state, training.run_dir, training.config.train
    steps = state.step - first
    images = steps * train.global_batch_size
    rows = {
        "steps": f"{steps} ({first} -> {state.step})",
        "images": f"{images}",
        "images/s": f"{images / seconds:.4g} (start-up, saving and sampling included)",
        "wall time": duration(seconds),
        "checkpoint": str(run_dir.checkpoint(state.step)),
        "metrics": str(run_dir.metrics),
        "go on with": resume_command(training),
    }
    if cut := training.captions_cut:
        rows["cut"] = f"{cut} captions were longer than the text encoder reads; model.prompt_chunks takes more of them"
    samples = run_dir.sample(state.step)
    if samples.is_file():
        rows["samples"] = str(samples)
    for name, value in rows.items():
        say(f"  {name:11} {value}")


def resume_command(training: Training) -> str:
    """The command that goes on with this run, from the working directory of this process."""
    resolved = shlex.quote(str(training.run_dir.resolved_config))
    ranks = training.runtime.world_size
    train_py = Path(__file__).with_name("train.py")
    program = f"torchrun --nproc-per-node {ranks} {shlex.quote(str(train_py))}" if ranks > 1 else "difftrain train"
    if training.runtime.local_world_size != ranks:
        program = "the launch command of this job with"
    return f"{program} --config {resolved} --resume auto"
