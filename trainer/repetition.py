"""The steps of a recorded run, computed again: in the one loop, with other hooks, and until a given step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.config_file import LoadedConfig, load_config
from trainer.control import Asked
from trainer.errors import Stopped, UserError
from trainer.preflight import Preflight, preflight
from trainer.resume import is_free
from trainer.run.manifest import read_manifest
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
    environment: dict[str, Any]
    lines: list[dict[str, Any]]  # of metrics.jsonl
    loaded: LoadedConfig  # as it was before a resume changed anything
    one_config_until: int | None  # the step after which a resume went on with another config

    def preflight(self) -> Preflight:
        """The run checked again, for this process among those of its launch; raises UserError as a start would."""
        return preflight(self.loaded, int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def recorded(run_dir: RunDir, output_dir: str | None = None) -> Recorded:
    """The record of a run; raises UserError if the folder holds none."""
    manifest = read_manifest(run_dir.manifest)
    lines = read_metrics(run_dir.metrics)
    if not manifest["starts"] or not lines:
        raise UserError("no step of this run is on record", str(run_dir.path), "is this the folder of a run?")
    first, *later = manifest["starts"]
    now = load_config(run_dir.resolved_config).config
    harmless = () if now.lr.depends_on_max_steps else ("train.max_steps",)
    overrides = [f"train.micro_batch_size={first['topology']['micro_batch_size']}"]
    until = None
    for start in reversed(later):
        for key, change in start["config_changes"].items():
            if not is_free(key, harmless):
                overrides.append(f"{key}={json.dumps(change['was'])}")
                until = start["from_step"]
    loaded = load_config(run_dir.resolved_config, overrides, output_dir)
    return Recorded(run_dir, manifest, json.loads(run_dir.environment.read_bytes()), lines, loaded, until)


@contextmanager
def runtime_of(record: Recorded, checked: Preflight, say: Say) -> Iterator[Runtime]:
    """The ranks and device for it, with as many threads as the run had: sums are rounded in their order."""
    import torch

    from trainer.runtime import Runtime

    threads, train = torch.get_num_threads(), checked.config.train
    runtime = Runtime(train.precision, train.deterministic, train.collective_timeout_seconds)
    recorded_threads = record.environment.get("torch_threads", threads)
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
        with suppress(Stopped):
            loop.run(training, hooks, Until(training, step, over), say)
