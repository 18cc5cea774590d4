"""The hooks that every run has, in the order in which they act."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from trainer.checkpoint import Retention
from trainer.hook import Hook
from trainer.hooks.bad_samples import BadSamples
from trainer.hooks.checkpointing import Checkpointing
from trainer.hooks.held_out_loss import HeldOutLoss
from trainer.hooks.manifest import ManifestFile
from trainer.hooks.metrics import Metrics
from trainer.hooks.progress import Progress
from trainer.hooks.sample_grid import SampleGrid
from trainer.preflight import Preflight
from trainer.resume import differences_from
from trainer.run.environment import snapshot
from trainer.run.manifest import config_facts

if TYPE_CHECKING:
    from trainer.checkpoint import Found
    from trainer.training import Training


def standard_hooks(checked: Preflight, training: Training, start: Found | None) -> list[Hook]:
    """Truth first (manifest, metrics), then what may fail, then the config's own hooks."""
    config = training.config
    hooks = truth_hooks(checked, training, start)
    if training.runtime.is_main:
        hooks.append(Progress())
    sidecar = {
        "config_sha256": config_facts("", "", config.to_yaml())["resolved_sha256"],
        "data_fingerprint": checked.data_fingerprint,
        "model_files": training.components.provenance.files,
        "versions": {
            name: _version(name) for name in ("torch", "accelerate", "diffusers", "transformers", "difftrain")
        },
    }
    validation, checkpoint = config.validation, config.checkpoint
    if validation is not None and training.held_out is not None:
        hooks.append(HeldOutLoss(every_steps=validation.every_steps, max_steps=config.train.max_steps))
    hooks.append(
        Checkpointing(
            every_steps=checkpoint.every_steps,
            retention=Retention(checkpoint.keep_last, checkpoint.keep_every_steps, checkpoint.keep_best),
            background=checkpoint.background,
            sidecar_facts=sidecar,
        )
    )
    if validation is not None and validation.prompts:
        hooks.append(SampleGrid(max_steps=config.train.max_steps, **validation.model_dump(exclude={"max_records"})))
    return [*hooks, *config.hooks]


def truth_hooks(checked: Preflight, training: Training, start: Found | None) -> list[Hook]:
    """The manifest and the metrics, on rank 0: what no run goes without."""
    config, runtime = training.config, training.runtime
    if not runtime.is_main:
        return []
    changed = differences_from(start.load()["config"], config) if start else {}
    return [
        ManifestFile(
            facts=checked.manifest_facts([sys.argv[0], *sys.argv[1:]], training.components.provenance),
            environment=snapshot(runtime.device_facts()),
            resolved_config=config.to_yaml(),
            config_changes={key: {"was": old, "now": new} for key, (old, new) in changed.items()},
            checkpoint_every=config.checkpoint.every_steps,
            leaves=checked.leaves,
        ),
        Metrics(),
        BadSamples(
            left_out=tuple((checked.records[record].key, reason) for record, reason in checked.seen.call.left_out)
        ),
    ]


def _version(package: str) -> Any:
    try:
        return version(package)
    except PackageNotFoundError:  # an uninstalled checkout of difftrain
        return None
