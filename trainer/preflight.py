"""Everything about a run that can be known, and refused, before torch is imported or a weight is read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from trainer.config import Config
from trainer.config_file import LoadedConfig
from trainer.data.fingerprint import FINGERPRINT_FORMAT, MOST_LISTED, Digests, Leaf, leaves
from trainer.data.plan import split
from trainer.data.record import Records
from trainer.data.topology import Topology, deal
from trainer.errors import UserError
from trainer.models.base import Provenance
from trainer.run.manifest import config_facts, run_facts
from trainer.run.provenance import git_facts, module_hashes


@dataclass(frozen=True)
class Preflight:
    """A checked config with its opened data and dealt batch. Rank 0 alone knows what the pictures hold."""

    loaded: LoadedConfig
    records: Records
    training_indices: Sequence[int]
    held_out_indices: Sequence[int]
    topology: Topology
    provenance: Provenance
    data_fingerprint: str  # "" on other ranks
    contents: Digests | None  # of each picture; None on other ranks, and of more than MOST_LISTED

    @property
    def config(self) -> Config:
        """The checked config."""
        return self.loaded.config

    def equations(self) -> list[str]:
        """Every derived number of the run, as a user can check it."""
        train, data, deal = self.config.train, self.config.data, self.topology
        images, epoch = train.max_steps * train.global_batch_size, len(self.training_indices)
        ranks = f"{deal.world_size} rank{'s' * (deal.world_size > 1)}"
        steps, batch = train.max_steps, deal.global_batch
        empty, again = self.records.empty_captions, batch / epoch
        return [
            *([f"note   {empty} of {len(self.records)} records have an empty caption"] if empty else []),
            f"data   {len(self.records)} records = {epoch} to train on + {len(self.held_out_indices)} held out "
            f"({data.kind}, fingerprint {self.data_fingerprint[:12]})",
            f"batch  {_images(batch)} = {_images(deal.micro_batch)} x {ranks} x {deal.accumulation} accumulation",
            f"run    {steps} steps x {_images(batch)} = {_images(images)} = {images / epoch:.4g} epochs"
            f"{'; batches run on from one epoch into the next: every record counts' if epoch % batch else ''}",
            *([f"note   {_images(batch)} / {epoch} records = {again:.3g} reads of each per step"] if again > 1 else []),
        ]

    def manifest_facts(self, command: Sequence[str], provenance: Provenance | None = None) -> dict[str, Any]:
        """What run_manifest.json says of this start; `provenance` is what loading the model found out beyond ours."""
        train, deal, model = self.config.train, self.topology, provenance or self.provenance
        return run_facts(
            command=command,
            config={
                **config_facts(self.loaded.path, self.loaded.text, self.config.to_yaml()),
                "plugins": module_hashes(self.config.plugins),
            },
            git=git_facts(),
            seed=train.seed,
            deterministic=train.deterministic,
            model={"kind": self.config.model.kind, **asdict(model)},
            topology={
                "world_size": deal.world_size,
                "micro_batch_size": deal.micro_batch,
                "accumulation": deal.accumulation,
                "num_machines": int(os.environ.get("GROUP_WORLD_SIZE", "1")),
            },
            data={
                "kind": self.config.data.kind,
                "records": len(self.records),
                "training": len(self.training_indices),
                "held_out": len(self.held_out_indices),
                "fingerprint": self.data_fingerprint,
                "fingerprint_format": FINGERPRINT_FORMAT,
            },
        )

    def leaves(self) -> Iterator[Leaf] | None:
        """What each record is, by index; None where `contents` are not known."""
        return None if self.contents is None else leaves(self.records, self.contents)


def preflight(loaded: LoadedConfig, rank: int, world_size: int) -> Preflight:
    """The checked run; raises UserError for data, model files or batch sizes that cannot work.

    Rank 0 hashes every picture that no earlier start has, and says so if it takes long.
    """
    config = loaded.config
    try:
        topology = deal(config.train.global_batch_size, config.train.micro_batch_size, rank, world_size)
    except ValueError as error:
        raise UserError(f"config: {error}", loaded.where("train.global_batch_size")) from None
    config.model.check()
    if config.cache is not None:
        config.cache.check(config.data)
    for hook in config.hooks:
        hook.check(config)
    records = config.data.open()
    training, held_out = split(records, config.data.validation_fraction)
    provenance = config.model.provenance()
    fingerprint, contents = _fingerprint(records) if rank == 0 else ("", None)
    return Preflight(loaded, records, training, held_out, topology, provenance, fingerprint, contents)


def _fingerprint(records: Records) -> tuple[str, Digests | None]:
    """The fingerprint, and the hashes below it if they are few enough to keep."""
    contents = records.contents(say=partial(print, flush=True))
    if len(records) > MOST_LISTED:
        return records.fingerprint(contents), None
    kept = Digests(contents)
    return records.fingerprint(kept), kept


def _images(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"
