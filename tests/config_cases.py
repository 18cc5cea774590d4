"""A complete config, changes to it, and the message that a wrong one ends in, for the tests of the config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.config_file import load_config
from trainer.errors import UserError

Write = Callable[..., Path]

COMPLETE = """\
model: {kind: tiny}
data: {kind: imagefolder, data_root: pictures, image_size: 32, num_workers: 0}
train: {seed: 7, max_steps: 20, precision: fp32, global_batch_size: 4, micro_batch_size: 4, log_every: 1, deterministic: true}
objective: {kind: epsilon}
lr: {kind: constant, peak: 1e-4, warmup_steps: 0}
ema: {decay: 0.99}
checkpoint: {every_steps: 1, keep_last: 3}
"""  # noqa: E501


def changed(*changes: tuple[str, str]) -> str:
    text = COMPLETE
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} is not once in the config"
        text = text.replace(old, new)
    return text


def refusal(path: Path, *overrides: str) -> str:
    """The message of the one UserError that loading ends in."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)
