"""An error from somewhere below, put so that its reader knows what to do."""

from __future__ import annotations

import re
import shlex
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trainer.errors import Diverged, RunEnd, UserError
from trainer.files import write_atomic
from trainer.run.redaction import redact

if TYPE_CHECKING:
    from trainer.config import Config
    from trainer.data.topology import Topology
    from trainer.run.rundir import RunDir
    from trainer.training import Training

NAMED_RECORDS = 8


class Crashed(RunEnd):
    """An error that nobody foresaw, in one line, with its traceback in a file."""

    of_one_rank = True


def explained(error: BaseException, config: Config, topology: Topology, steps: int = 0) -> BaseException:
    """A UserError for what the user can mend, of this rank alone; any other error as it is.

    After `steps` > 0 of this start it is no refusal: the exit code is 1, and another try may get further.
    """
    known = _known(error, config, topology)
    if known is None:
        return error
    known.of_one_rank = True
    if steps:
        known.exit_code, known.state = 1, "failed"
    return known


def as_status(end: BaseException) -> tuple[str, int, str]:
    """State, exit code and reason, as the manifest has them."""
    if isinstance(end, RunEnd):
        return end.state, end.exit_code, str(end)
    return "failed", 1, f"{type(end).__name__}: {end}"


def caused_by(end: BaseException, error: BaseException) -> BaseException:
    """`end`, as `raise end from error` would have it; `error` may be the same."""
    if end is not error:
        end.__cause__ = error
    return end


def _known(error: BaseException, config: Config, topology: Topology) -> UserError | None:
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in text:
        asked = re.search(r"[Tt]ried to allocate ([\d.]+ ?\w+)|you tried to allocate (\d+ bytes)", text)
        size = f" (asked for {asked[1] or asked[2]})" if asked else ""
        where = "train.micro_batch_size"
        return UserError(
            f"out of memory with {topology.micro_batch} images at a time{size}", where, _lower(config, topology)
        )
    if "InvalidCxxCompiler" in text or "Failed to find C compiler" in text:  # Inductor's words, and Triton's
        return UserError(
            "torch.compile finds no compiler for C and C++ on this machine",
            "train.compile",
            "install g++ (or set CXX and CC), or set train.compile=none",
        )
    if isinstance(error, RuntimeError) and (missing := re.match(r"(.+?) does not have a deterministic impl", text)):
        return UserError(
            f"{missing[1]} has no deterministic implementation on this device",
            "train.deterministic",
            "set it to false, or do without the operation",
        )
    return None


def _lower(config: Config, topology: Topology) -> str:
    """What to lower, and to how much."""
    share = topology.global_batch // topology.world_size
    smaller = [size for size in range(topology.micro_batch // 2, 0, -1) if share % size == 0]
    ways = []
    if smaller:
        ways.append(
            f"train.micro_batch_size={smaller[0]} ({share // smaller[0]} x accumulation instead of "
            f"{topology.accumulation}; the run stays the same)"
        )
    if not config.train.gradient_checkpointing:
        ways.append("train.gradient_checkpointing=true")
    if config.train.precision == "fp32":
        ways.append("train.precision=bf16")
    ways.append(f"a data.image_size below {config.data.image_size}")
    return "set " + ", or ".join(ways)


def diverged(training: Training, step: int) -> Diverged:
    """The gradient stayed non-finite up to the 1-based `step`; with that step's records on all ranks, from the plan."""
    train, batch, samples = training.config.train, training.topology.global_batch, training.samples
    slots = range((step - 1) * batch, step * batch)
    named = [f"{slot} {samples.records[samples.plan.record(slot)].key}" for slot in slots[:NAMED_RECORDS]]
    more = f" and {batch - NAMED_RECORDS} more" if batch > NAMED_RECORDS else ""
    return Diverged(
        f"the gradient was not finite in {train.max_bad_steps} steps in a row, the last is step {step}\n"
        f"  it was fed, by slot: {', '.join(named)}{more}\n"
        f"  all it drew has the keys (seed {train.seed}, stream, slot); `difftrain replay "
        f"{shlex.quote(str(training.run_dir.path))} --step {step}` computes it again, sample by sample"
    )


def crashed(error: BaseException, run_dir: RunDir, rank: int, world_size: int) -> BaseException:
    """An unforeseen error in one line, with its traceback in a file of the run; any other end as it is.

    The error itself if that file cannot be written: Python then prints the traceback.
    """
    if isinstance(error, RunEnd):
        return error
    path = run_dir.traceback(rank)
    text = redact("".join(traceback.format_exception(error)))
    try:
        write_atomic(path, text)
    except OSError:
        return error
    at = traceback.extract_tb(error.__traceback__)[-1]
    what = redact(f"{type(error).__name__}: {error}")
    end = Crashed(f"{what}\n  in {_short(at.filename)}:{at.lineno} {at.name}\n  traceback: {path}")
    end.traceback = text if world_size == 1 else None  # those of several ranks would bury the cause
    return end


def _short(filename: str) -> str:
    """The last parts of a path: enough to find it."""
    return "/".join(Path(filename).parts[-3:])
