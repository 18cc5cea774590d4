"""Everything about a run that can be known, and refused, before torch is imported or a weight is read."""

from __future__ import annotations

import os
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from trainer.config import Config
from trainer.config_file import LoadedConfig
from trainer.data.fingerprint import FINGERPRINT_FORMAT, MOST_LISTED, Digests, Leaf, leaves
from trainer.data.plan import BucketPlan
from trainer.data.record import Records, Source
from trainer.data.roll import LeftOut, RollCall, call_roll
from trainer.data.topology import Topology, deal
from trainer.errors import UserError
from trainer.models.base import Provenance
from trainer.run.manifest import config_facts, run_facts
from trainer.run.provenance import git_facts, module_hashes

if TYPE_CHECKING:
    from numpy import ndarray

    from trainer.runtime import Runtime

MOST_BUCKETS = 12  # that the start names


@dataclass
class Survey:
    """What rank 0 saw of the data: every picture was looked at, by this start or an earlier one."""

    fingerprint: str
    contents: Digests | None  # sha256 of each picture; None of more than MOST_LISTED that no cache needs
    sizes: ndarray | None  # [N, 2] uint32: width and height of each picture; None if nothing needs them
    call: RollCall

    def forget_what_is_done_with(self) -> None:
        """Before the first step: keep of each record one byte, or, where the run lists them, what it lists."""
        self.sizes = None
        if self.call.roll.records > MOST_LISTED:
            self.contents = None


@dataclass(frozen=True)
class Preflight:
    """A checked config with its opened data and dealt batch."""

    loaded: LoadedConfig
    records: Records
    topology: Topology
    provenance: Provenance
    survey: Survey | None  # None on other ranks than 0, and, of several ranks, before `surveyed`

    @property
    def config(self) -> Config:
        """The checked config."""
        return self.loaded.config

    @property
    def seen(self) -> Survey:
        """What rank 0 knows, on rank 0."""
        assert self.survey is not None, "rank 0 alone looked at the data"
        return self.survey

    @property
    def data_fingerprint(self) -> str:
        """The data's fingerprint; "" on other ranks than 0."""
        return self.survey.fingerprint if self.survey else ""

    def equations(self) -> list[str]:
        """Every derived number of the run, as a user can check it. Rank 0 alone can tell."""
        train, deal, roll = self.config.train, self.topology, self.seen.call.roll
        images, epoch = train.max_steps * train.global_batch_size, roll.trained
        ranks = f"{deal.world_size} rank{'s' * (deal.world_size > 1)}"
        steps, batch, again = train.max_steps, deal.global_batch, deal.global_batch / epoch
        runs_on = epoch % batch and not roll.buckets
        return [
            *self.data_lines(),
            f"batch  {_images(batch)} = {_images(deal.micro_batch)} x {ranks} x {deal.accumulation} accumulation",
            f"run    {steps} steps x {_images(batch)} = {_images(images)} = {images / epoch:.4g} epochs"
            f"{'; batches run on from one epoch into the next: every record counts' if runs_on else ''}",
            *([f"note   {_images(batch)} / {epoch} records = {again:.3g} reads of each per step"] if again > 1 else []),
        ]

    def data_lines(self) -> list[str]:
        """Of these, what concerns the data alone."""
        data, (roll, left_out, without_caption) = self.config.data, self.seen.call
        left = f" + {len(left_out):,} left out" if left_out else ""
        return [
            *([f"note   {without_caption:,} of {len(self.records):,} records have no caption"] * bool(without_caption)),
            *([f"note   the first record left out: {left_out[0].reason}"] if left_out else []),
            f"data   {len(self.records)} records = {roll.trained} to train on + {len(roll.held_out)} held out{left} "
            f"({data.kind}, fingerprint {self.data_fingerprint[:12]})",
            *self.records.notes(),
            *self._buckets(),
        ]

    def _buckets(self) -> list[str]:
        plan = self.seen.call.roll.plan(self.config.data, self.topology.global_batch, self.config.train.seed)
        if not isinstance(plan, BucketPlan):
            return []
        rows = plan.table()
        batches, repeats = sum(row.batches for row in rows), sum(row.repeats for row in rows)
        dropped = sum(row.dropped for row in rows)
        shapes = ", ".join(f"{row.bucket} {row.records:,}" for row in rows[:MOST_BUCKETS])
        more = f", and {len(rows) - MOST_BUCKETS} more" if len(rows) > MOST_BUCKETS else ""
        made = len(self.config.data.buckets())
        return [
            f"shapes {len(rows)} of {made} buckets have records: {shapes}{more}",
            f"epoch  {batches:,} batches of one shape each = {batches * plan.global_batch:,} images = "
            f"{sum(row.records for row in rows):,} records + {repeats:,} read ahead of their next epoch "
            f"- {dropped:,} dropped",
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
                **self.records.provenance(),
                "records": len(self.records),
                "training": self.seen.call.roll.trained,
                "held_out": len(self.seen.call.roll.held_out),
                "left_out": len(self.seen.call.left_out),
                "without_caption": self.seen.call.without_caption,
                "fingerprint": self.data_fingerprint,
                "fingerprint_format": FINGERPRINT_FORMAT,
            },
        )

    def leaves(self) -> Iterator[Leaf] | None:
        """What each record is, by index; None where `contents` are not known, or are too many to list."""
        if self.survey is None or self.survey.contents is None or len(self.records) > MOST_LISTED:
            return None
        return leaves(self.records, self.survey.contents)


def preflight(loaded: LoadedConfig, rank: int, world_size: int, for_steps: bool = True) -> Preflight:
    """The checked run; raises UserError for data, model files or batch sizes that cannot work.

    A single process looks at every picture that no earlier start has, and says so if it takes long. Of several, rank 0
    does so in `surveyed`, once the others can wait for it. Without `for_steps` the batch need not divide into ranks.
    """
    config = loaded.config
    try:
        shape = (rank, world_size) if for_steps else (0, 1)
        topology = deal(config.train.global_batch_size, config.train.micro_batch_size if for_steps else None, *shape)
    except ValueError as error:
        raise UserError(f"config: {error}", loaded.where("train.global_batch_size")) from None
    _check_kernels(loaded)
    config.model.check()
    if config.cache is not None:
        config.cache.check(config.data, config.model.train_text_encoder)
    for hook in config.hooks:
        hook.check(config)
    checked = Preflight(loaded, config.data.open(), topology, config.model.provenance(), None)
    return replace(checked, survey=_survey(checked)) if world_size == 1 else checked


def _check_kernels(loaded: LoadedConfig) -> None:
    """Raise UserError for a choice of kernels that another one makes meaningless."""
    train = loaded.config.train
    if train.norm_precision == "bf16" and train.precision != "bf16":
        raise UserError(
            f"norms in bf16 between layers in {train.precision} would only lose precision",
            loaded.where("train.norm_precision"),
            "leave it out, or set train.precision: bf16",
        )
    if train.cudnn_benchmark and train.deterministic:
        raise UserError(
            "kernels chosen by a stopwatch differ from start to start, which train.deterministic rules out",
            loaded.where("train.cudnn_benchmark"),
            "turn one of them off",
        )


def surveyed(checked: Preflight, runtime: Runtime) -> Preflight:
    """The same, with what rank 0 saw of the data: on that rank. Every rank calls it; the others wait.

    Raises UserError, on all ranks, with every record that the policies of the data do not allow.
    """
    if runtime.world_size == 1:
        return checked
    seen: list[Survey] = []
    runtime.from_main(lambda: seen.append(_survey(checked)))
    return replace(checked, survey=seen[0] if seen else None)


def _survey(checked: Preflight) -> Survey:
    config = checked.config
    survey = survey_of(config.data, checked.records, keep_contents=config.cache is not None)
    survey.call.roll.plan(config.data, checked.topology.global_batch, config.train.seed)  # refuses one without a batch
    return survey


def survey_of(source: Source, records: Records, keep_contents: bool) -> Survey:
    """One look at every record; raises UserError with all those that the policies of `source` do not allow."""
    needs_sizes = keep_contents or source.bucket_step_px is not None
    sizes, bad = array("I"), list[LeftOut]()

    def contents() -> Iterator[str]:
        for index, look in enumerate(records.looks(say=partial(print, flush=True))):
            if look.fault is not None:
                bad.append(LeftOut(index, f"{records.where(index)}: {look.fault}"))
            if needs_sizes:
                sizes.extend((look.width, look.height))
            yield look.content

    if keep_contents or len(records) <= MOST_LISTED:
        kept = Digests(contents())
        fingerprint = records.fingerprint(kept)
    else:
        kept, seen = None, contents()
        fingerprint = records.fingerprint(seen)
        deque(seen, maxlen=0)  # the fingerprint of drawn records looks at none of them
    both = None
    if needs_sizes:
        import numpy as np

        both = np.frombuffer(sizes, np.uint32).reshape(-1, 2)
    return Survey(fingerprint, kept, both, call_roll(source, records, both, bad))


def _images(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"
