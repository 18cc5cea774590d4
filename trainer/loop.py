"""The one training loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from trainer.control import Asked
from trainer.errors import Stopped, UserError
from trainer.failure import as_status, caused_by, diverged, explained
from trainer.hook import CollectiveHook, Hook, MainHook, RunView
from trainer.step import StepResult, train_step

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.control import Asks
    from trainer.data.loader import Batch
    from trainer.training import Training

Say = Callable[[str], None]


def run(training: Training, hooks: Sequence[Hook], control: Asks, say: Say) -> None:
    """Train to the last step; raises Stopped, Diverged or StorageFailed for the other ways a run can end."""
    crew = Crew(training, hooks, say)
    try:
        crew.start()
        training.runtime.forget_peak_memory()  # of building the cache, and of loading the networks
        with contextlib.closing(training.batches(training.state.step, training.config.train.max_steps)) as batches:
            _steps(training, crew, control, batches)
    except BaseException as error:  # noqa: BLE001
        # Not by way of a local name: with the traceback it would make a cycle, which keeps the loader's workers alive.
        raise _ended(training, crew, error)  # noqa: B904
    crew.end("done", 0, f"{training.state.step} steps")


def _ended(training: Training, crew: Crew, error: BaseException) -> BaseException:
    """What ended the run, for those who read it; the hooks have heard of it."""
    steps = training.state.step - training.first_step
    end = explained(error, training.config, training.topology, steps)
    end = training.runtime.blame(end, training.state.step)
    crew.end(*as_status(end))
    return caused_by(end, error)


def _steps(training: Training, crew: Crew, control: Asks, batches: Iterator[Batch]) -> None:
    train, state = training.config.train, training.state
    pending, postponed = PendingMetrics(training), False
    while state.step < train.max_steps:
        started = time.perf_counter()
        try:
            result = train_step(training, batches)
        except BaseException:
            if postponed and training.runtime.world_size == 1:  # of several ranks the others are elsewhere
                with contextlib.suppress(Exception):  # it must not hide the reason
                    crew.metrics(pending.drain())
            raise
        seconds = time.perf_counter() - started
        if postponed:
            crew.metrics(pending.drain())
        pending.add(result, seconds)
        asked = training.runtime.max(control.asked())
        stopping = asked == Asked.STOP
        last = stopping or state.step == train.max_steps
        collective = crew.collective_due(last, asked == Asked.SAVE)
        due = last or collective or state.step % train.log_every == 0
        # Where steps are queued, lines that nothing waits for are written once the next step is: the device has work.
        postponed = due and training.runtime.queues_steps and not (last or collective)
        if due and not postponed:
            lines = pending.drain()  # first: what follows would wait for these steps and be blamed for their time
            lines[-1] |= crew.measure(collective)
            crew.metrics(lines)
        crew.after_step(collective, last, asked == Asked.SAVE)
        pending.refuse_too_many_unreadable()
        if pending.diverged_at is not None:
            raise diverged(training, pending.diverged_at)
        if stopping and state.step < train.max_steps:
            raise Stopped(f"{control.why or 'another rank was asked to stop'}: step {state.step} is done and saved")


class PendingMetrics:
    """Steps whose numbers are on their way to the host; one wait, for the newest of them, has them all."""

    def __init__(self, training: Training):
        self.training = training
        self.results: list[StepResult] = []
        self.numbers: list[Callable[[], Tensor]] = []
        self.seconds = 0.0
        self.bad_steps = 0  # in a row, up to the last drain
        self.diverged_at: int | None = None  # the first step at which they were too many
        self.unreadable: set[str] = set()  # keys of records that were read at the start and could not be read since

    def add(self, result: StepResult, seconds: float) -> None:
        """Remember a step that took `seconds` of the host's time."""
        self.results.append(result)
        row = torch.stack([*result.sums, result.grad_norm, result.skipped])
        self.numbers.append(self.training.runtime.copy_to_host(row))
        self.seconds += seconds

    def drain(self) -> list[dict[str, Any]]:
        """One metrics line per step since the last drain, at least one."""
        started = time.perf_counter()
        numbers = torch.stack([arrived() for arrived in self.numbers]).tolist()
        batch = self.training.topology.global_batch
        per_step = (self.seconds + time.perf_counter() - started) / len(self.results)
        memory = self.training.runtime.memory()
        own = [result.substitutes for result in self.results]
        # One of the sums tells all ranks whether any of them has a substitute to hand in.
        *digests, any_substitute = self.training.runtime.sum_modulo(
            [*(result.batch_digest for result in self.results), sum(map(len, own))]
        )
        everyone = self.training.runtime.gather(own) if any_substitute else []
        lines: list[dict[str, Any]] = []
        for result, digest, (loss, cut, grad_norm, skipped) in zip(self.results, digests, numbers, strict=True):
            self.bad_steps = self.bad_steps + 1 if skipped else 0
            if self.bad_steps == self.training.config.train.max_bad_steps and self.diverged_at is None:
                self.diverged_at = result.step
            self.training.captions_cut += int(cut)
            lines.append(
                {
                    "step": result.step,
                    "batch": f"{digest:016x}",
                    "loss": loss,
                    "lr": result.lr,
                    "grad_norm": grad_norm,
                    "skipped": bool(skipped),
                    "captions_cut": int(cut),
                    "images_seen": result.step * batch,
                    "timing": {
                        "step_seconds": per_step,
                        "data_wait_seconds": result.data_wait_seconds,
                        "images_per_second": batch / per_step,
                        **memory,
                    },
                }
            )
        for ranks_own in everyone:
            for line, substitutes in zip(lines, ranks_own, strict=True):
                if substitutes:
                    line.setdefault("substitutes", []).extend(substitute._asdict() for substitute in substitutes)
                self.unreadable.update(substitute.key for substitute in substitutes)
        self.results, self.numbers, self.seconds = [], [], 0.0
        return lines

    def refuse_too_many_unreadable(self) -> None:
        """Raise UserError, on all ranks, if more records are left out or replaced than the data's policy allows."""
        training = self.training
        data, total = training.config.data, len(training.samples.records)
        count = training.unreadable + len(self.unreadable)
        if self.unreadable and count > data.max_bad_fraction * total:
            raise UserError(
                f"{count:,} of {total:,} records cannot be read, more than data.max_bad_fraction = "
                f"{data.max_bad_fraction:g} of them; bad_samples.jsonl lists them",
                "data.max_bad_fraction",
                "is the storage there? mend them or raise it",
            )


class Crew:
    """The hooks of a run. A main hook that fails is disabled with one warning, unless it is essential."""

    def __init__(self, training: Training, hooks: Sequence[Hook], say: Say):
        self.training, self.say = training, say
        self.main = [hook for hook in hooks if isinstance(hook, MainHook)] if training.runtime.is_main else []
        self.collective = [hook for hook in hooks if isinstance(hook, CollectiveHook)]
        self.config = training.config.model_dump(mode="json")

    def view(self) -> RunView:
        """What rank 0's hooks may know now."""
        training = self.training
        return RunView(training.run_dir.path, training.state.step, training.config.train.max_steps, self.config)

    def start(self) -> None:
        """Before the first step of this start."""
        self._each_main(lambda hook, view: hook.on_start(view))
        for hook in self.collective:
            hook.on_start(self.training)

    def collective_due(self, last: bool, save_asked: bool) -> list[CollectiveHook]:
        """The collective hooks that act after this step: the same on every rank."""
        return [hook for hook in self.collective if self._due(hook, last, save_asked)]

    def _due(self, hook: Hook, last: bool, save_asked: bool) -> bool:
        return hook.due(self.training.state.step, last) or (save_asked and hook.saves)

    def measure(self, hooks: Sequence[CollectiveHook]) -> dict[str, Any]:
        """What `hooks` add to this step's metrics line."""
        measured: dict[str, Any] = {}
        for hook in hooks:
            measured |= hook.measure(self.training)
        self.training.measured = measured
        return measured

    def metrics(self, lines: list[dict[str, Any]]) -> None:
        """Hand out metrics lines."""
        self._each_main(lambda hook, view: hook.on_metrics(view, lines))

    def after_step(self, collective: Sequence[CollectiveHook], last: bool, save_asked: bool) -> None:
        """After a step, its metrics handed out."""
        for hook in collective:
            hook.after_step(self.training, last)
        self._each_main(lambda hook, view: hook.after_step(view, last) if self._due(hook, last, save_asked) else None)

    def end(self, state: str, exit_code: int, reason: str) -> None:
        """After the run, however it ended; a hook that fails now must not hide why the run ended."""
        ends = [(hook, lambda hook=hook: hook.on_end(self.training)) for hook in self.collective]
        ends += [(hook, lambda hook=hook: hook.on_end(self.view(), state, exit_code, reason)) for hook in self.main]
        for hook, end in ends:
            try:
                end()
            except Exception as error:  # noqa: BLE001
                self.say(f"warning: {type(hook).__name__} failed at the end: {type(error).__name__}: {error}")

    def _each_main(self, act: Callable[[MainHook, RunView], None]) -> None:
        for hook in list(self.main):
            try:
                act(hook, self.view())
            except Exception as error:
                if hook.essential:
                    raise
                self.main.remove(hook)
                self.say(f"warning: {type(hook).__name__} failed and is switched off: {type(error).__name__}: {error}")
