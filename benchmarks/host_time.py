"""Microseconds that the host spends on a step without the network, by part: a figure that noise cannot hide.

The network is one number that its input is multiplied by, so that all else is what is left: loader, draws, collectives,
clipping, optimizer, EMA, metrics, hooks. It is time of this thread on a core, so that neither other processes nor
waiting for other ranks is in it, and the median over groups of steps, each with one log step. Time on the wall, with
the network, is shown too.

    python benchmarks/host_time.py
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comparison import conclude
from gpu_goals import HOST_MICROSECONDS
from row_file import Row, append, finished
from stopwatch import LOG_EVERY, Groups, Stopwatch

if TYPE_CHECKING:
    from trainer.training import Training

RANKS = (1, 2)


def identity_training(folder: Path, steps: int, tensors: int) -> Training:
    """A run of the tiny model whose network multiplies its input by the product of `tensors` numbers that are 1."""
    import torch

    from trainer.config import Config
    from trainer.config_file import LoadedConfig
    from trainer.models.tiny import Tiny
    from trainer.preflight import preflight, surveyed
    from trainer.run.rundir import RunDir
    from trainer.runtime import Runtime
    from trainer.training import assemble

    class Ones(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.numbers = torch.nn.ParameterList(torch.nn.Parameter(torch.ones(())) for _ in range(tensors))

        def forward(self, x_t: Any, time: Any, **_: Any) -> tuple[Any]:
            return (x_t * torch.stack(list(self.numbers)).prod(),)

    class Identity(Tiny):
        kind = "identity"

        def load(self, seed: int) -> Any:
            return replace(super().load(seed), load_unet=Ones)

        def predict(self, unet: Any, x_t: Any, time: Any, cond: Any) -> Any:
            return unet(x_t, time, encoder_hidden_states=cond)[0]

    runtime = Runtime("fp32", deterministic=False)
    config = Config.model_validate(
        {
            "model": {"kind": "identity"},
            "data": {"kind": "shapes", "image_size": 32, "num_workers": 0, "num_images": 8},
            "train": {"max_steps": steps, "global_batch_size": 2, "log_every": LOG_EVERY},
            "objective": {"kind": "epsilon"},
            "lr": {"kind": "constant", "peak": 1e-12, "warmup_steps": 0},
            "ema": {"decay": 0.999},
        }
    )
    checked = preflight(LoadedConfig(config, Path("host_time"), "", {}), runtime.rank, runtime.world_size)
    return assemble(surveyed(checked, runtime), runtime, RunDir(folder), None)


def parts_of(watch: Stopwatch, training: Training) -> None:
    """Say which calls of a run are which part."""
    import torch

    import trainer.data.loader
    import trainer.loop
    import trainer.step

    samples = training.samples
    kept = {size: samples.batch(list(range(size))) for size in (1, 2)}
    config, topology = training.config, training.topology

    def batch(slots: list[int]) -> Any:
        """A batch as from a cache: what is drawn for it is drawn, what would be read is there."""
        before = kept[len(slots)]
        shape = tuple(before.eps.shape[1:])
        drawn = {name: trainer.data.loader.normal(0, name, slots, shape) for name in ("noise", "posterior")}
        t = torch.tensor(config.timesteps.draw(0, slots, topology.global_batch), dtype=torch.float32)
        return replace(before, slots=slots, t=t, eps=drawn["noise"], posterior_eps=drawn["posterior"])

    samples.batch = batch
    latents = {size: training.latent_source.latents(each) for size, each in kept.items()}
    conds = {size: training.components.text_encoder(each.text[:, 0])[0] for size, each in kept.items()}
    for size, each in kept.items():
        kept[size] = replace(each, text=conds[size].detach(), pixels=torch.empty(0))
    training.latent_source.latents = lambda batch: latents[len(batch.slots)]
    watch.times(samples, "batch", "draws")
    watch.times(trainer.step, "next", "loader")
    watch.times(trainer.data.loader.Batch, "to", "to the device")
    watch.times(trainer.step, "sample_losses", "objective")
    for name in ("sum", "max", "any", "gather", "sum_modulo"):
        watch.times(training.runtime, name, "collectives")
    watch.times(training.runtime, "backward", "backward")
    watch.times(training.model, "forward", "forward")
    watch.times(torch.nn.utils, "get_total_norm", "clip")
    watch.times(torch.nn.utils, "clip_grads_with_norm_", "clip")
    watch.times(training.state.optimizer, "step", "optimizer")
    watch.times(training.state.optimizer, "zero_grad", "optimizer")
    assert training.state.ema is not None, "the run has an average"
    watch.times(training.state.ema, "update", "EMA")
    watch.times(trainer.loop.PendingMetrics, "add", "metrics")
    watch.times(trainer.loop.PendingMetrics, "drain", "metrics")
    for name in ("collective_due", "measure", "metrics", "after_step"):
        watch.times(trainer.loop.Crew, name, "hooks")


def measured(steps: int, tensors: int) -> dict[str, float]:
    """Microseconds of a step by part on this rank; call it once a process, for it changes what it measures."""
    import torch

    torch.set_num_threads(1)
    from trainer import loop, step
    from trainer.control import Control
    from trainer.hook import MainHook, RunView
    from trainer.hooks.metrics import Metrics
    from trainer.hooks.progress import Progress

    watch = Stopwatch()
    groups = Groups(watch)

    class Ends(MainHook):
        def due(self, step: int, last: bool) -> bool:
            return True

        def after_step(self, view: RunView, last: bool) -> None:
            groups.step(view.step)

    step.next = next  # pyright: ignore[reportAttributeAccessIssue]  # a name of the module's own, to be timed
    with tempfile.TemporaryDirectory() as folder:
        training = identity_training(Path(folder), steps, tensors)
        parts_of(watch, training)
        control = Control()
        try:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                loop.run(training, [Metrics(), Progress(), Ends()], control, print)
        finally:
            control.close()
        runtime = training.runtime
        del training
        runtime.close()
    return groups.microseconds() if runtime.is_main else {}  # hooks of this type run on rank 0 alone


def of_ranks(ranks: int, steps: int, tensors: int = 1, seconds: float = 600) -> Row:
    """The figure on `ranks` processes of this machine, as rank 0 sees it; raises if they take over so many seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": 1}
    command = [sys.executable, __file__, "--child", "--steps", str(steps), "--tensors", str(tensors)]
    processes = []
    for rank in range(ranks):
        own = {"RANK": rank, "LOCAL_RANK": rank, **common} if ranks > 1 else {"OMP_NUM_THREADS": 1, **common}
        environment = os.environ | {name: str(value) for name, value in own.items()}
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    try:
        ended = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, said) in zip(processes, ended, strict=True):
        if process.returncode:
            raise RuntimeError(f"a rank ended with {process.returncode}: {said[-2000:]}")
    parts = json.loads(ended[0][0].splitlines()[-1])
    figures = {"microseconds": parts.pop("all"), "low_microseconds": parts.pop("low")}
    figures["wall_microseconds"] = parts.pop("wall")
    return {"ranks": ranks, "steps": steps, "tensors": tensors, **figures, "parts": parts}


def text_of(row: Row) -> str:
    """A line for people."""
    ranks = f"{row['ranks']} rank{'s' * (row['ranks'] > 1)}"
    whole = f"{row['microseconds']:.0f} us a step without the network (lowest tenth {row['low_microseconds']:.0f})"
    parts = sorted(row["parts"].items(), key=lambda each: -each[1])
    by_part = ", ".join(f"{part} {value:.0f}" for part, value in parts)
    return f"{ranks}: {whole}: {by_part}; {row['wall_microseconds']:.0f} on the wall"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write the JSON: 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000, help="default 3000")
    parser.add_argument("--tensors", type=int, default=1, help="weights of the network; SD 1.5 has 686 (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--file", type=Path, help="append the rows there, and measure none that it holds already")
    parser.add_argument("--stage", default="host", help="what the rows are filed under (default host)")
    parser.add_argument("--budget", type=float, default=600, metavar="SECONDS", help="of all rows (default 600)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    if args.child:
        print(json.dumps(measured(args.steps, args.tensors)), flush=True)
        return 0
    began, rows = time.monotonic(), []
    for ranks in RANKS:
        name = f"{args.stage}: microseconds of a step without the network, {ranks} rank{'s' * (ranks > 1)}"
        if args.file is not None and name in finished(args.file):
            continue
        left = args.budget - (time.monotonic() - began)
        rows.append(of_ranks(ranks, args.steps, args.tensors, left))
        if args.file is not None:
            append(args.file, {"name": name, "stage": args.stage, "device": "cpu", **rows[-1]})
    print("\n".join(map(text_of, rows)))
    conclude({"rows": rows, "goal_microseconds": HOST_MICROSECONDS}, arguments, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
