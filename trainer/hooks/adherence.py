"""adherence.json: how often the model draws what a prompt says, in combinations it has seen and in held-out ones."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import Field, PrivateAttr

from trainer.data.sources.shapes import Shapes
from trainer.errors import UserError
from trainer.files import write_json
from trainer.hook import CollectiveHook

if TYPE_CHECKING:
    from trainer.adherence import Question
    from trainer.config import Config
    from trainer.data.shape_reading import Reading
    from trainer.sampler import Sampler
    from trainer.training import Training

AT_ONCE = 32  # pictures: for networks of this size more at once are faster, and need little memory


class Adherence(CollectiveHook):
    """Draws captions of the `shapes` source with the averaged weights and reads the pictures back."""

    kind = "adherence"

    prompts: int = Field(default=96, ge=1, description="Prompts of seen combinations, and as many of held-out ones.")
    every_steps: int | None = Field(
        default=None,
        ge=1,
        description="Optimizer steps between measurements, which join metrics.jsonl; null measures at the end alone.",
    )
    seed: int = Field(default=0, ge=0, description="Decides the starting noise of each prompt.")
    sampler_steps: int = Field(default=25, ge=1, le=1000, description="Network evaluations per picture.")
    guidance: float = Field(default=3.0, ge=0, description="Classifier-free guidance scale; 1 turns guidance off.")

    _max_steps: int = PrivateAttr(0)
    _report: dict[str, Any] = PrivateAttr(default_factory=dict)

    def check(self, config: Config) -> None:
        if not isinstance(config.data, Shapes):
            raise UserError(
                f"the hook `adherence` can read pictures of `shapes` alone, and this run's are of `{config.data.kind}`",
                "hooks",
                "take it out",
            )

    def on_start(self, training: Training) -> None:
        self._max_steps = training.config.train.max_steps

    def due(self, step: int, last: bool) -> bool:
        # Not when a signal wants the process gone.
        return step == self._max_steps or (self.every_steps is not None and step % self.every_steps == 0)

    def measure(self, training: Training) -> dict[str, float]:
        from trainer.adherence import mistakes, shares_right

        sampler = replace(training.sampler(self.sampler_steps, self.guidance), at_once=AT_ONCE)
        asked = self._asked(training)
        with training.evaluating():
            read_back = {name: self._answers(training, sampler, questions) for name, questions in asked.items()}
        self._report = {name: shares_right(asked[name], read_back[name]) for name in asked}
        self._report["mistakes"] = [each for name in asked for each in mistakes(asked[name], read_back[name])]
        return {
            f"adherence_{name}_{word}": share
            for name in asked
            for word, share in self._report[name].items()
            if word != "n"
        }

    def after_step(self, training: Training, last: bool) -> None:
        from trainer.adherence import chance, table

        step, runtime = training.state.step, training.runtime
        rows = {name.replace("_", " "): self._report[name] for name in self._asked(training)}
        if step == self._max_steps:
            untrained = self._untrained(training)
            rows |= {"before the first step": untrained, "chance": chance()}
            if runtime.is_main:
                self._write(training, untrained)
        weights = "EMA" if training.state.ema else "current"
        runtime.say(
            f"adherence at step {step}, {weights} weights, {self.prompts} prompts a row, "
            f"{self.sampler_steps} sampler steps, guidance {self.guidance:g}\n{table(rows)}"
        )

    def _asked(self, training: Training) -> dict[str, list[Question]]:
        """The questions, as `seen` and, if anything is held out, `held_out`."""
        from trainer.adherence import asked_of

        source = training.config.data
        assert isinstance(source, Shapes), "check() saw to it"
        return asked_of(source, self.prompts)

    def _answers(self, training: Training, sampler: Sampler, asked: list[Question]) -> list[Reading]:
        """What the pictures show; the ranks share the work, and every rank gets all of it."""
        from trainer.adherence import answers

        rank, world_size = training.runtime.rank, training.runtime.world_size
        shares = training.runtime.gather(answers(sampler, asked[rank::world_size], self.seed))
        return [shares[index % world_size][index // world_size] for index in range(len(asked))]

    def _untrained(self, training: Training) -> dict[str, float]:
        """The same for seen combinations with the weights before the first step, which are a function of the config."""
        from trainer.adherence import shares_right
        from trainer.training import first_components

        components = first_components(training.config)
        for network in (components.unet, components.text_encoder):
            network.to(training.runtime.device).eval()  # pyright: ignore[reportArgumentType]
        sampler = training.sampler(self.sampler_steps, self.guidance)
        sampler = replace(sampler, components=components, at_once=AT_ONCE)
        with training.runtime.autocast():
            seen = self._asked(training)["seen"]
            shares = shares_right(seen, self._answers(training, sampler, seen))
        training.encoders.rest()
        return shares

    def _write(self, training: Training, untrained: dict[str, float]) -> None:
        from trainer.adherence import chance

        path = training.run_dir.adherence
        settings = self.model_dump(include={"prompts", "seed", "sampler_steps", "guidance"})
        report = {"step": training.state.step, "held_out": None, **self._report}
        report |= {"untrained": untrained, "chance": chance(), "settings": settings}
        try:
            write_json(path, report)
        except OSError as error:
            print(f"warning: {path} was not written: {error}", flush=True)
