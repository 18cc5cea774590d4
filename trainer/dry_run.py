"""One real step, to see whether the run fits this machine and what takes the memory."""

from __future__ import annotations

import time

import torch

from trainer.auto_values import resolve_auto
from trainer.failure import caused_by, explained
from trainer.preflight import Preflight, surveyed
from trainer.run.rundir import RunDir
from trainer.runtime import Runtime
from trainer.step import train_step
from trainer.summary import describe
from trainer.training import Training, assemble


def dry_run(checked: Preflight) -> None:
    """Do one real step and print what it took, part by part; nothing is written."""
    config = checked.config
    train = config.train
    runtime = Runtime(train.precision, train.deterministic, train.collective_timeout_seconds)
    say = runtime.say
    try:
        checked = resolve_auto(surveyed(checked, runtime), runtime, None)
        for line in checked.equations() if runtime.is_main else ():
            say(line)
        training = assemble(checked, runtime, RunDir(config.train.output_dir or ""), None, first_step_only=True)
        for line in describe(training)[:-1]:
            say(line)
        say("dry run: one step")
        runtime.forget_peak_memory()  # of loading
        started = time.monotonic()
        result = train_step(training, training.batches(0, 1))
        loss, norm = result.sums[0].item(), result.grad_norm.item()
        say(f"  loss {loss:.4f}, gradient norm {norm:.4g}, {time.monotonic() - started:.1f} s (the first step is slow)")
        parts = memory_by_part(training)
        for name, size in parts.items():
            say(f"  {name:34} {size / 2**30:8.3f} GiB")
        peak = runtime.memory()["peak_memory_bytes"]
        rest = "activations and the rest" if runtime.device.type == "cuda" else "activations, libraries, the rest"
        say(f"  {rest:34} {(peak - sum(parts.values())) / 2**30:8.3f} GiB")
        say(f"  {'peak of rank 0, measured':34} {peak / 2**30:8.3f} GiB")
        say("nothing was written")
    except Exception as error:  # noqa: BLE001
        raise caused_by(explained(error, config, checked.topology), error)  # noqa: B904
    finally:
        runtime.close()


def memory_by_part(training: Training) -> dict[str, int]:
    """Bytes that each part of the state holds on this rank after a step; activations come on top at the peak."""

    def size(tensors) -> int:
        return sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t))

    state, components = training.state, training.components
    weights = list(state.weights().values())
    trained = {id(weight) for weight in weights}
    text_encoder = components.text_encoder if components.loaded("text_encoder") else None
    beside = (*components.unet.parameters(), *(text_encoder.parameters() if text_encoder else ()))
    frozen = [p for p in beside if id(p) not in trained]
    optimizer = [value for entry in state.optimizer.state.values() for value in entry.values()]
    return {
        "trained weights": size(weights),
        "gradients": size(weight.grad for weight in weights),
        f"optimizer ({training.config.optimizer.kind})": size(optimizer),
        "EMA": size(state.ema.average.values()) if state.ema else 0,
        "frozen UNet and text encoder": size(frozen),
        "VAE": size(components.vae.parameters()) if components.loaded("vae") else 0,
    }
