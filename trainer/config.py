"""The config: one frozen value that, with a step, decides everything a run does."""

from __future__ import annotations

from typing import Literal

import yaml
from pydantic import Field

from trainer.data.record import Source
from trainer.ema import EmaSpec
from trainer.encoder_cache.base import EncodingCache
from trainer.hook import Hook
from trainer.lr import LrLaw
from trainer.models.base import ModelFamily
from trainer.objectives.base import Objective
from trainer.optimizers import OptimizerSpec
from trainer.registry import Section
from trainer.timesteps import TimestepLaw
from trainer.weighting import Weighting

Precision = Literal["fp32", "fp16", "bf16"]


class TrainSection(Section):
    """The run as a whole."""

    output_dir: str | None = Field(
        default=None, description="The run directory; null means `runs/<name of the config file>`."
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Decides, with a sample's slot, everything random.")
    max_steps: int = Field(ge=1, description="Optimizer steps of the whole run.")
    precision: Precision = Field(default="fp32", description="Compute precision; the trainable weights stay fp32.")
    global_batch_size: int = Field(ge=1, description="Images per optimizer step over all ranks.")
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="Images per rank per forward; null means global_batch_size / ranks, no accumulation.",
    )
    deterministic: bool = Field(
        default=False, description="Use only deterministic kernels; an operation without one raises."
    )
    log_every: int = Field(
        default=10, ge=1, description="Steps between writes of metrics.jsonl, and between device syncs."
    )
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, description="Gradients are scaled down to this global norm; null turns clipping off."
    )
    max_bad_steps: int = Field(
        default=10,
        ge=1,
        description="Steps in a row with a non-finite gradient that end the run as diverged, once they are written.",
    )
    collective_timeout_seconds: float = Field(
        default=600,
        ge=5,
        description="How long ranks wait for one that is silent; then the run ends and names it.",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations: less memory, about 30 % slower."
    )
    compile: Literal["none", "blocks", "full"] = Field(
        default="none",
        description="Compile the networks that train: `blocks` those parts of them that repeat, which takes minutes at "
        "a start; `full` the UNet in one piece, which takes longer. Other rounding, the same samples.",
    )
    norm_precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="Of the UNet's norms. Autocast computes them and what follows in fp32; bf16 halves their memory "
        "traffic. Other rounding, the same samples; needs precision bf16.",
    )
    channels_last: bool = Field(
        default=False,
        description="Keep the UNet's weights and activations with channels innermost. It pays on GPUs, once compiled.",
    )
    cudnn_benchmark: bool = Field(
        default=False,
        description="Let cuDNN time its convolutions and take the fastest: other rounding from start to start.",
    )


class ValidationSection(Section):
    """Sample grids from fixed prompts and seeds, and the loss on held-out records."""

    prompts: tuple[str, ...] = Field(default=(), description="Prompts of the sample grid; none means no grid.")
    every_steps: int = Field(ge=1, description="Optimizer steps between validations; step 0 and the end are included.")
    seed: int = Field(
        default=0, ge=0, description="Decides the starting noise of each prompt, and the noise of the held-out loss."
    )
    sampler_steps: int = Field(default=20, ge=1, le=1000, description="Network evaluations per picture.")
    guidance: float = Field(default=5.0, ge=0, description="Classifier-free guidance scale; 1 turns guidance off.")
    max_records: int = Field(
        default=64, ge=1, description="Held-out records (data.validation_fraction) the loss is taken over."
    )


class CheckpointSection(Section):
    """When state is saved; the last step always is."""

    every_steps: int = Field(default=500, ge=1, description="Optimizer steps between checkpoints.")
    keep_last: int = Field(
        default=3, ge=2, description="Newest checkpoints that are kept; at least two, so that one may be bad."
    )
    keep_every_steps: int | None = Field(
        default=None, ge=1, description="Checkpoints of steps that this divides are kept too; null keeps none of them."
    )
    keep_best: int = Field(
        default=0, ge=0, description="Checkpoints with the lowest validation_loss that are kept too."
    )
    background: bool = Field(
        default=True,
        description="Copy the state and write it beside the next steps; false makes the steps wait for the disk.",
    )


class Config(Section):
    """Everything a run is made of."""

    plugins: tuple[str, ...] = Field(
        default=(), description="Python modules with further kinds, imported before validation."
    )
    model: ModelFamily
    data: Source
    train: TrainSection
    objective: Objective
    weighting: Weighting = Field(default_factory=lambda: Weighting.parse({}))
    timesteps: TimestepLaw = Field(default_factory=lambda: TimestepLaw.parse({}))
    optimizer: OptimizerSpec = Field(default_factory=lambda: OptimizerSpec.parse({}))
    lr: LrLaw
    ema: EmaSpec | None = None
    cache: EncodingCache | None = None
    validation: ValidationSection | None = None
    checkpoint: CheckpointSection = CheckpointSection()
    hooks: tuple[Hook, ...] = Field(
        default=(), description="Further hooks by kind, run after the built-in ones in this order."
    )

    def to_yaml(self) -> str:
        """Every value of the run, defaults included, as YAML that loads as an equal config."""
        values = {name: value for name, value in self.model_dump(mode="json").items() if value is not None}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
