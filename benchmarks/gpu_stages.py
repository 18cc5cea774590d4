"""The stages of `scripts/gpu_check.py`: what each runs, and for how long at most. Most useful first.

Needs the standard library alone.
"""

from __future__ import annotations

from dataclasses import dataclass

CPU_SIZE = "2x64"  # images x pixels of every row in the rehearsal
CPU_STEPS = ("--warm", "1", "--steps", "4")
CPU_HOST_STEPS = ("--steps", "300")


@dataclass(frozen=True)
class Stage:
    """Rows that are measured by one process."""

    seconds: float  # its own time-out
    script: str | None = "gpu.py"  # of benchmarks/; None for what gpu_check.py does itself
    rows: tuple[str, ...] = ()  # of benchmarks/gpu.py
    model: str = "sd15"
    sizes: tuple[str, ...] = ("32x512",)
    accumulation: int = 1
    rehearsed: bool = True  # on the CPU, with the tiny model

    def arguments(self, name: str, device: str, model: str | None) -> list[str]:
        """Of the script, but for the file and the budget; `model` takes the place of the stage's own."""
        small = device == "cpu"
        if self.script != "gpu.py":
            return ["--stage", name, *(CPU_HOST_STEPS if small else ())]
        sizes = [CPU_SIZE] if small else self.sizes
        words = ["--stage", name, "--device", device, "--model", model or self.model, "--sizes", *sizes]
        words += ["--accumulation", str(min(self.accumulation, 2) if small else self.accumulation)]
        return [*words, "--rows", *self.rows, *(CPU_STEPS if small else ())]


STAGES: dict[str, Stage] = {
    "machine": Stage(60, None),
    "tests": Stage(120, None),
    "ceilings": Stage(60, rows=("ceilings",)),
    "sd15": Stage(120, rows=("loop",), sizes=("32x512", "64x512")),
    "sd21": Stage(90, rows=("loop",), model="sd21", rehearsed=False),
    "256px": Stage(90, rows=("loop",), sizes=("128x256",), rehearsed=False),
    "micro": Stage(60, rows=("micro",), sizes=("4x512",), accumulation=8),
    "vae": Stage(60, rows=("vae",), sizes=("16x512",)),
    "script": Stage(90, rows=("script",)),
    "blocks": Stage(240, rows=("blocks",), rehearsed=False),
    "full": Stage(400, rows=("full",), rehearsed=False),
    "options": Stage(300, rows=("options", "deterministic", "muon")),
    "save": Stage(150, rows=("save",)),
    "host": Stage(120, "host_time.py"),
    "sweep": Stage(240, rows=("sweep",), sizes=("4x512", "8x512", "16x512", "32x512", "64x512"), rehearsed=False),
    "sdxl": Stage(180, rows=("loop",), model="sdxl", sizes=("4x1024", "8x1024"), rehearsed=False),
}

# Of the tests, where there is a GPU: what only it can show, and all that its kernels touch. Without one: their twins.
GPU_TESTS = ("tests/test_ema.py", "tests/text2image/test_cuda.py", "tests/text2image/test_smoke.py")
GPU_MARKS = "cuda and not integration"
CPU_TESTS = ("tests/text2image/test_cuda.py",)
CPU_MARKS = "not cuda and not slow"
CPU_NAMES = "changes_no_bit"  # enough to rehearse the rows: all of them run among the other tests anyway
