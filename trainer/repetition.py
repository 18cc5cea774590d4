"""The steps of a recorded run, computed again: in the one loop, with other hooks, and until a given step."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.config_file import load_config, reloaded
from trainer.control import Asked
from trainer.errors import Diverged, Stopped, UserError
from trainer.files import sha256_file
from trainer.preflight import Preflight, preflight
from trainer.resume import KERNELS, among, differences, free_keys
from trainer.run.manifest import flat, read_manifest
from trainer.run.metrics import read as read_metrics
from trainer.run.rundir import RunDir

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trainer.checkpoint import Found
    from trainer.hook import Hook
    from trainer.runtime import Runtime
    from trainer.training import Training

Say = Callable[[str], None]


@dataclass(frozen=True)
class Recorded:
    """What a run left: enough to compute its steps again."""

    run_dir: RunDir
    manifest: dict[str, Any]
    environment: dict[str, Any]  # of the last start
    lines: list[dict[str, Any]]  # of metrics.jsonl
    starts: list[dict[str, Any]]  # those whose steps are on record, in order

    def start_of(self, step: int) -> int:
        """Which of `starts` computed the 1-based `step`."""
        return max(number for number, start in enumerate(self.starts) if start["from_step"] < step)

    def config(self, start: dict[str, Any]) -> dict[str, Any]:
        """Every value of the config of a start; raises UserError if it is not on record."""
        digest = start["resolved_sha256"]
        configs = self.manifest.get("configs", {})
        if digest in configs:
            return configs[digest]
        resolved = self.run_dir.resolved_config  # a run of before there were `configs`
        if resolved.is_file() and sha256_file(resolved) == digest:
            return load_config(resolved).config.model_dump(mode="json")
        raise UserError("the config of these steps is not on record", str(self.run_dir.manifest))

    def same_steps(self, one: dict[str, Any], other: dict[str, Any]) -> bool:
        """Whether two starts compute the same steps, but for the rounding of sums: of equal config and data."""
        changed = differences(self.config(one), self.config(other))
        free = free_keys(reloaded(self.config(one), self.run_dir.manifest).config)
        same_data = one.get("data_fingerprint") == other.get("data_fingerprint")
        return same_data and all(among(key, free) for key in changed)

    def kernels(self, start: dict[str, Any]) -> dict[str, Any]:
        """What a start chose of the kernels: a run from before there was a choice had the defaults."""
        values = flat(reloaded(self.config(start), self.run_dir.manifest).config.model_dump(mode="json"))
        return {key: values[key] for key in KERNELS}

    def checked(self, start: dict[str, Any], output_dir: str | None = None) -> Preflight:
        """The run as it was then, checked again, for this process among those of its launch."""
        rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        values = copy.deepcopy(self.config(start))
        train = values["train"]
        train["max_steps"] = max(train["max_steps"], len(self.lines))  # raised since: `same_steps` has seen to the rate
        train["micro_batch_size"] = min(start["topology"]["micro_batch_size"], train["global_batch_size"] // ranks)
        if output_dir is not None:
            train["output_dir"] = output_dir
        return preflight(reloaded(values, self.run_dir.manifest), rank, ranks)

    def environment_of(self, start: int) -> dict[str, Any]:
        """env.json as it was at one of `starts`, by dotted name: what later starts changed is taken back."""
        values = flat(self.environment)
        later = self.manifest["starts"][self.manifest["starts"].index(self.starts[start]) + 1 :]
        for each in reversed(later):
            values |= {name: change["was"] for name, change in each["environment_changes"].items()}
        return values


def recorded(run_dir: RunDir) -> Recorded:
    """The record of a run; raises UserError if the folder holds none."""
    manifest = read_manifest(run_dir.manifest)
    lines = read_metrics(run_dir.metrics)
    if not manifest["starts"] or not lines:
        raise UserError("no step of this run is on record", str(run_dir.path), "is this the folder of a run?")
    try:
        environment = json.loads(run_dir.environment.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{run_dir.environment.name} cannot be read: {error}", str(run_dir.path)) from None
    starts: list[dict[str, Any]] = []
    for start in manifest["starts"]:
        while starts and starts[-1]["from_step"] >= start["from_step"]:
            starts.pop()  # all its steps were computed again
        starts.append(start)
    if starts[0]["from_step"]:
        raise UserError(
            f"this run branched off another one at step {starts[0]['from_step']}: its first steps are that run's",
            str(run_dir.path),
            "take the run that it came from",
        )
    return Recorded(run_dir, manifest, environment, lines, starts)


@contextmanager
def runtime_of(start: dict[str, Any], checked: Preflight, say: Say) -> Iterator[Runtime]:
    """The ranks and device for it, with as many threads as that start had: sums are rounded in their order."""
    import torch

    from trainer.runtime import Runtime

    threads, train = torch.get_num_threads(), checked.config.train
    runtime = Runtime(train.precision, train.deterministic, train.collective_timeout_seconds)
    recorded_threads = start.get("torch_threads") or threads
    if runtime.device.type == "cpu" and recorded_threads != threads:
        say(f"note   {recorded_threads} CPU threads, as the run had, instead of {threads}")
        torch.set_num_threads(recorded_threads)
    try:
        yield runtime
    finally:
        torch.set_num_threads(threads)
        runtime.close()


class Until:
    """Asks the loop to stop after a step, or as soon as `over` says so."""

    why = "far enough"

    def __init__(self, training: Training, step: int, over: Callable[[], bool] = lambda: False):
        self.training, self.step, self.over = training, step, over

    def asked(self) -> Asked:
        """STOP once it is time."""
        return Asked.STOP if self.training.state.step >= self.step or self.over() else Asked.NOTHING


def assembled(checked: Preflight, runtime: Runtime, start: Found | None) -> Training:
    """The run at `start`, or before its first step."""
    from trainer.training import assemble

    return assemble(checked, runtime, RunDir(checked.config.train.output_dir or ""), start)


def advance(training: Training, hooks: Sequence[Hook], step: int, say: Say, over: Callable[[], bool] = lambda: False):
    """Compute the steps up to `step`, with `hooks` alone around them."""
    from trainer import loop

    if training.state.step < step:
        with suppress(Stopped, Diverged):  # a run that diverged has no more steps
            loop.run(training, hooks, Until(training, step, over), say)
