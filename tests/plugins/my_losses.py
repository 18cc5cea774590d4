"""A plug-in as a user would write it: an objective, a weighting and a hook."""

from __future__ import annotations

from trainer.hook import MainHook
from trainer.objectives.base import Objective
from trainer.weighting import Weighting


class Shifted(Objective):
    """A straight path whose target is the noise."""

    kind = "shifted"

    def alpha_sigma(self, t):
        return 1 - t, t

    def model_time(self, t):
        return 1000 * t

    def target(self, x0, eps, t):
        return eps

    def x0(self, x_t, pred, t):
        return (x_t - t.view(-1, 1, 1, 1) * pred) / (1 - t).view(-1, 1, 1, 1)

    def x0_factor(self, t):
        return ((1 - t) / t).square()


class Halves(Weighting):
    """Half of everything."""

    kind = "halves"

    share: float = 0.5

    def weight(self, snr, x0_factor):
        return self.share * snr.new_ones(snr.shape)


class Diary(MainHook):
    """Writes the step of every line."""

    kind = "diary"

    name: str = "diary.txt"

    def on_metrics(self, view, lines):
        with open(view.folder / self.name, "a") as file:
            file.writelines(f"{line['step']}\n" for line in lines)
