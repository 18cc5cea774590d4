"""samples/step-NNNNNN.png: the fixed prompts, drawn with the averaged weights."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from trainer.hook import CollectiveHook
from trainer.run.files import write_atomic

if TYPE_CHECKING:
    from trainer.training import Training


class SampleGrid(CollectiveHook):
    """The ranks share the prompts; rank 0 writes the grid. A picture that cannot be written does not end the run."""

    prompts: tuple[str, ...]
    every_steps: int
    max_steps: int
    seed: int
    sampler_steps: int
    guidance: float

    def due(self, step: int, last: bool) -> bool:
        return step == self.max_steps or step % self.every_steps == 0  # not when a signal wants the process gone

    def on_start(self, training: Training) -> None:
        if training.state.step == 0:
            self.after_step(training, last=False)

    def after_step(self, training: Training, last: bool) -> None:
        from trainer.grid import labelled_grid
        from trainer.sampler import Sampler

        runtime, family = training.runtime, training.config.model
        sampler = Sampler(
            family,
            training.components,
            training.config.objective,
            training.vae,
            training.config.data.image_size,
            self.sampler_steps,
            self.guidance,
        )
        mine = range(runtime.rank, len(self.prompts), runtime.world_size)
        training.model.eval()
        with training.state.averaged(), runtime.autocast():
            pictures = sampler.draw([self.prompts[i] for i in mine], self.seed, mine) if mine else []
        training.model.train()
        drawn = {i: picture for part in runtime.gather(list(zip(mine, pictures, strict=True))) for i, picture in part}
        if not runtime.is_main:
            return
        weights = "EMA weights" if training.state.ema else "current weights"
        title = f"step {training.state.step} · {weights} · {self.sampler_steps} steps · guidance {self.guidance:g}"
        grid = labelled_grid([drawn[i] for i in range(len(self.prompts))], self.prompts, title)
        png = io.BytesIO()
        grid.save(png, "PNG")
        path = training.run_dir.sample(training.state.step)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, png.getvalue())
        except OSError as error:
            print(f"warning: {path} was not written: {error}", flush=True)
