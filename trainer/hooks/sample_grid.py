"""samples/: the fixed prompts, drawn with the averaged weights, a grid each time; and sheets of all times together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import PrivateAttr

from trainer.files import write_atomic
from trainer.hook import CollectiveHook

if TYPE_CHECKING:
    from PIL.Image import Image

    from trainer.run.rundir import RunDir
    from trainer.training import Training

PROGRESS_ROWS = 12  # at most: the first, the newest, and others evenly between


class SampleGrid(CollectiveHook):
    """The ranks share the prompts; rank 0 writes. A picture that cannot be written does not end the run."""

    prompts: tuple[str, ...]
    every_steps: int
    max_steps: int
    seed: int
    sampler_steps: int
    guidance: float
    _warned: bool = PrivateAttr(False)  # of a failure that has not ended yet

    def due(self, step: int, last: bool) -> bool:
        return step == self.max_steps or step % self.every_steps == 0  # not when a signal wants the process gone

    def on_start(self, training: Training) -> None:
        if training.state.step == 0:
            self.after_step(training, last=False)

    def after_step(self, training: Training, last: bool) -> None:
        runtime, sampler = training.runtime, training.sampler(self.sampler_steps, self.guidance)
        mine = range(runtime.rank, len(self.prompts), runtime.world_size)
        with training.evaluating():
            pictures = sampler.draw([self.prompts[i] for i in mine], self.seed, mine) if mine else []
        drawn = {i: picture for part in runtime.gather(list(zip(mine, pictures, strict=True))) for i, picture in part}
        if not runtime.is_main:
            return
        weights = "EMA weights" if training.state.ema else "current weights"
        title = f"step {training.state.step} · {weights} · {self.sampler_steps} steps · guidance {self.guidance:g}"
        try:
            self._write(training.run_dir, training.state.step, title, [drawn[i] for i in range(len(self.prompts))])
            self._warned = False
        except OSError as error:
            if not self._warned:
                step = training.state.step
                print(f"warning: the samples of step {step} and maybe later ones were not written: {error}", flush=True)
            self._warned = True

    def _write(self, run_dir: RunDir, step: int, title: str, pictures: list[Image]) -> None:
        """The step's grid, then the sheets over all steps so far, from the files alone: a resume goes on with them."""
        from trainer.grid import grid_png, labelled_grid, pictures_in, png, progress_sheet

        run_dir.samples.mkdir(parents=True, exist_ok=True)
        grid = labelled_grid(pictures, self.prompts, title)
        write_atomic(run_dir.sample(step), grid_png(grid, self.prompts, pictures[0].width))
        rows = {}
        for earlier in run_dir.sample_steps():
            if earlier <= step and (found := pictures_in(run_dir.sample(earlier), self.prompts)):
                rows[f"step {earlier}"] = found
        titles = list(rows)
        some = (
            titles
            if len(titles) <= PROGRESS_ROWS
            else [titles[round(i * (len(titles) - 1) / (PROGRESS_ROWS - 1))] for i in range(PROGRESS_ROWS)]
        )
        for path, chosen in ((run_dir.progress, some), (run_dir.first_and_last, {titles[0]: 0, titles[-1]: 0})):
            write_atomic(path, png(progress_sheet({title: rows[title] for title in chosen}, self.prompts)))
