"""The cache of a run, filled or looked through without training."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from trainer.auto_values import resolve_auto
from trainer.encoder_cache.disk import Disk
from trainer.encoding import Encoders, encoded
from trainer.errors import UserError
from trainer.preflight import Preflight, surveyed
from trainer.runtime import Runtime


def fill(checked: Preflight) -> None:
    """Encode, on all ranks, what a run with this config would encode at its start; raises UserError as that would."""
    config, cache = checked.config, disk_of(checked)
    train = config.train
    runtime = Runtime(train.precision, train.deterministic, train.collective_timeout_seconds)
    try:
        checked = resolve_auto(surveyed(checked, runtime), runtime, None)
        config = checked.config
        for line in checked.data_lines() if runtime.is_main else ():
            runtime.say(line)
        roll = runtime.from_main(lambda: checked.seen.call.roll)
        components = config.model.load(train.seed)
        encoders = Encoders(components, runtime.device, config.model.vae_precision)
        encoded(checked, cache, roll, components, encoders, runtime)
    finally:
        runtime.close()


def verify(checked: Preflight, say: Callable[[str], None]) -> Iterator[tuple[Path, str | None]]:
    """Each file of the cache's folders, of whatever model, with what is wrong with it or None; every byte is read."""
    from trainer.cached.store import verify_store

    parent = Path(os.path.expanduser(disk_of(checked).dir))
    if not parent.is_dir():
        raise UserError("there is no cache yet", str(parent), "difftrain cache without --verify makes one")
    for folder in sorted(path for path in parent.iterdir() if (path / "recipe.json").exists()):
        for name, fault in verify_store(folder, say):
            yield folder / name, fault


def disk_of(checked: Preflight) -> Disk:
    """The cache that stays on disk; raises UserError if the config has none."""
    cache = checked.config.cache
    if not isinstance(cache, Disk):
        seen = "no `cache`" if cache is None else f"cache.kind {cache.kind}"
        raise UserError(
            f"the config has {seen}: there is nothing to fill", "cache", "add a section such as cache: {dir: cache}"
        )
    return cache
