"""The rows of the GPU benchmark: a loop with one thing changed, compared with fp32 and with the bare loop, and timed.

Whatever befalls a row, out of memory included, becomes a row, and the next one begins with an empty device.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from gpu_device import Marks, Telemetry, free_memory, peak, spread, wait_for
from gpu_loops import BareLoop, OurLoop, quietly
from gpu_script import ScriptLoop
from gpu_step import Data
from row_file import Row

import trainer.muon
from trainer.ema import Ema

LARGEST_LOSS_GAP = 1e-3  # between a loop and the bare one, relative, at any step
LARGEST_ERROR = 2e-2  # of a network's answer against fp32, relative, before the first step


@dataclass(frozen=True)
class Plan:
    """What a row builds."""

    loop: Literal["bare", "difftrain", "script"]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    around: Callable[[], AbstractContextManager[Any]] = nullcontext  # within it the row is built and timed
    same_losses: bool = True  # as the bare loop's, within LARGEST_LOSS_GAP
    encoders: bool = False
    needs: str | None = None  # a precision without which the row does not exist


@contextlib.contextmanager
def ema_before() -> Iterator[None]:
    """Within it averages move as they did before they were one fused kernel: by a rate on the device, slowly."""

    @torch.no_grad()
    def update(self: Ema, weights: Mapping[str, torch.Tensor], step: int, skipped: torch.Tensor) -> None:
        averages, current = list(self.average.values()), list(weights.values())
        rates = [(1 - self.spec.decay_at(step)) * (1 - skipped)] * len(averages)
        torch._foreach_lerp_(averages, current, rates)  # pyright: ignore[reportPrivateImportUsage]

    fused, Ema.update = Ema.update, update
    try:
        yield
    finally:
        Ema.update = fused


@contextlib.contextmanager
def muon_in(how: Literal["fp32", "tf32", "bf16"]) -> Iterator[None]:
    """Within it Muon multiplies in that precision."""

    def in_tf32(matrices: torch.Tensor) -> torch.Tensor:
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return trainer.muon.in_fp32(matrices)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    usual = trainer.muon.orthogonalised
    of = {"fp32": trainer.muon.in_fp32, "tf32": in_tf32, "bf16": trainer.muon.in_bf16}
    trainer.muon.orthogonalised = of[how]
    try:
        yield
    finally:
        trainer.muon.orthogonalised = usual


def ours(overrides: Mapping[str, Any] | None = None, **more: Any) -> Plan:
    """difftrain with something changed."""
    return Plan("difftrain", overrides or {}, **more)


FASTER = {"train.norm_precision": "bf16", "train.channels_last": True}
COMPILED = {"train.compile": "blocks"}
MUON = {"optimizer": {"kind": "muon"}}
PLANS: dict[str, Plan] = {
    "bare": Plan("bare"),
    "difftrain": ours(),
    "bare again": Plan("bare"),
    "EMA off": ours({"ema": None}),
    "EMA as before": ours(around=ema_before),
    "deterministic": ours({"train.deterministic": True}),
    "log_every 1": ours({"train.log_every": 1}),
    "norms bf16": ours({"train.norm_precision": "bf16"}, same_losses=False, needs="bf16"),
    "channels_last": ours({"train.channels_last": True}, same_losses=False),
    "cudnn.benchmark": ours({"train.cudnn_benchmark": True}, same_losses=False),
    "checkpointing": ours({"train.gradient_checkpointing": True}),
    "Muon fp32": ours(MUON, around=partial(muon_in, "fp32"), same_losses=False),
    "Muon tf32": ours(MUON, around=partial(muon_in, "tf32"), same_losses=False),
    "Muon bf16": ours(MUON, around=partial(muon_in, "bf16"), same_losses=False),
    "compile blocks": ours(COMPILED, same_losses=False),
    "compile blocks, norms bf16, channels_last": ours(COMPILED | FASTER, same_losses=False, needs="bf16"),
    "compile full": ours({"train.compile": "full"}, same_losses=False),
    "compile full, norms bf16, channels_last": ours(
        {"train.compile": "full"} | FASTER, same_losses=False, needs="bf16"
    ),
    "script, encoders at each step": Plan("script", same_losses=False, encoders=True),
    "script, cached": Plan("script", same_losses=False),
}
GROUPS: dict[str, tuple[str, ...]] = {
    "loop": ("bare", "difftrain", "bare again"),
    "options": (
        *("bare", "difftrain", "EMA off", "EMA as before", "log_every 1"),
        *("norms bf16", "channels_last", "cudnn.benchmark"),
    ),
    "deterministic": ("bare", "difftrain", "deterministic"),
    "muon": ("Muon fp32", "Muon tf32", "Muon bf16"),
    "micro": ("checkpointing",),
    "sweep": ("difftrain", "checkpointing"),
    "script": ("script, encoders at each step", "script, cached", "difftrain"),
    "blocks": ("bare", "difftrain", "compile blocks", "compile blocks, norms bf16, channels_last"),
    "full": ("compile full", "compile full, norms bf16, channels_last"),
}


def measured(name: str, data: Data, telemetry: Telemetry, flops: float, rate: float, bare: Row | None) -> Row:
    """The row of a plan. `flops`: TFLOP of a step; `rate`: TFLOP/s of a matmul; `bare`: the row to compare with."""
    plan, step = PLANS[name], data.step
    row: Row = {"model": step.model, "pixels": step.pixels, "batch": step.batch, "accumulation": step.accumulation}
    row |= {"precision": step.precision, "steps": step.steps}
    row["options"] = ", ".join(f"{option}={value}" for option, value in plan.overrides.items())
    began, bad = time.perf_counter(), None
    torch.backends.cudnn.benchmark = False  # as the row before may have left it
    try:
        with plan.around(), quietly(), tempfile.TemporaryDirectory() as folder:
            bad = fill(row, plan, data, telemetry, Path(folder))
        row |= rates_of(row, flops, rate, step.images)
        bad = bad or compared(row, plan, bare)
    except Exception as error:  # noqa: BLE001
        bad = row_error(error)
    if plan.overrides.get("train.compile"):
        torch.compiler.reset()
    clean_up()
    free_memory(data.device)
    row["row_seconds"] = round(time.perf_counter() - began, 1)
    return row | ({"error": bad} if bad else {})


def row_error(error: Exception) -> str:
    """An error in one line; one that begins with `out of memory` if that is what it is."""
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):  # a run tells it in its own words
        return f"out of memory: {' '.join(str(error).split())}"[:200]
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def clean_up() -> None:
    """Forget the runtime of a row that did not come to its own end."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    torch.use_deterministic_algorithms(False)


def fill(row: Row, plan: Plan, data: Data, telemetry: Telemetry, folder: Path) -> str | None:
    """Build the plan's loop, look at its answer, and time it, all into `row`; what is wrong with the answer, if so."""
    loop = built(plan, data, folder)
    try:
        if not isinstance(loop, ScriptLoop):
            began = time.perf_counter()
            row["fp32_error"] = data.error_of(loop.answer())
            row["first_forward_seconds"] = round(time.perf_counter() - began, 2)  # with what has to be compiled
            if not row["fp32_error"] <= LARGEST_ERROR:
                return f"the answer is {row['fp32_error']:.3g} from that of fp32, more than {LARGEST_ERROR}: not timed"
            row["attention"] = attention_of(loop.answer)
        marks = Marks(data.device)
        wait_for(data.device)
        with telemetry.during(row):
            row["losses"] = loop.run(marks)
            wait_for(data.device)
        device, host = (gaps[data.step.warm - 1 :] for gaps in marks.gaps())
        row |= spread(device) | {"host_ms": spread(host)["ms"]} | peak(data.device)
        return None
    finally:
        loop.close()


def built(plan: Plan, data: Data, folder: Path) -> BareLoop | OurLoop | ScriptLoop:
    """The loop of a plan, on the device."""
    if plan.loop == "bare":
        return BareLoop(data)
    if plan.loop == "script":
        return ScriptLoop(data, plan.encoders)
    return OurLoop(data, folder, plan.overrides)


def rates_of(row: Row, flops: float, rate: float, images: int) -> Row:
    """Speeds of a timed row: images a second, TFLOP a second, and percent of a matmul's rate."""
    if "ms" not in row:
        return {}
    tflops = flops / row["ms"] * 1000
    return {
        "images_per_second": round(1000 * images / row["ms"], 2),
        "tflops": round(tflops, 4),
        "percent_of_matmul": round(100 * tflops / rate, 2) if rate else None,
    }


def compared(row: Row, plan: Plan, bare: Row | None) -> str | None:
    """Put time and losses over those of the bare loop into `row`; what is wrong with them, if they should be alike."""
    if "ms" not in row or bare is None or "ms" not in bare:
        return None
    row["over_bare"] = round(row["ms"] / bare["ms"], 4)
    if plan.loop == "script":
        return None
    gaps = [abs(ours - theirs) / abs(theirs) for ours, theirs in zip(row["losses"], bare["losses"], strict=True)]
    row["loss_gap"] = max(gaps)
    if plan.same_losses and not row["loss_gap"] <= LARGEST_LOSS_GAP:
        return f"its losses are {row['loss_gap']:.2g} from the bare loop's, more than {LARGEST_LOSS_GAP}"
    return None


def attention_of(forward: Callable[[], Any]) -> str:
    """The kinds of attention that a forward called, as PyTorch names them, most frequent first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        forward()
    prefix, counts = "aten::_scaled_dot_product_", {}
    for event in profile.events() or ():
        if event.name.startswith(prefix):
            kind = event.name.removeprefix(prefix)
            counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{kind} x {counts[kind]}" for kind in sorted(counts, key=lambda kind: -counts[kind])) or "none"
