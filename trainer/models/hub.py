"""Weights from the model hub: the part of a repository that is needed, as a local folder."""

from __future__ import annotations

from pathlib import Path

from trainer.errors import UserError
from trainer.models.folder import STEMS, weight_files, weight_patterns

SMALL_FILES = [
    "model_index.json",
    *(f"{name}/config.json" for name in STEMS),
    "tokenizer/*",
    "scheduler/scheduler_config.json",
]


def fetch_folder(hub_id: str, revision: str | None, variant: str | None) -> Path:
    """The local snapshot of a hub model: one commit for all its components, and named after that commit.

    Fetches safetensors only, and of a component that has `variant` no other weights. What the cache holds already is
    not fetched again, and is enough to work offline. Raises UserError if the model cannot be had.
    """
    weights = [f"{name}/{pattern}" for name in STEMS for pattern in weight_patterns(name, variant)]
    folder = _snapshot(hub_id, revision, SMALL_FILES + weights)
    plain = [name for name in STEMS if (folder / name).is_dir() and not weight_files(folder, name, variant)]
    if variant is not None and plain:
        weights = [f"{name}/{pattern}" for name in plain for pattern in weight_patterns(name, None)]
        _snapshot(hub_id, folder.name, weights)
    return folder


def fetch_small_files(hub_id: str, revision: str | None) -> Path:
    """As `fetch_folder`, but without a weight: the configs and the tokenizer."""
    return _snapshot(hub_id, revision, SMALL_FILES)


def _snapshot(hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        # Said, though the switch is on: some releases ask the hub all the same for a revision that is a commit.
        offline = constants.HF_HUB_OFFLINE
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns, local_files_only=offline))
    except GatedRepoError:
        what = "the hub gives this model only to accounts that accepted its terms"
        fix = "accept them on the model's page, then log in with `hf auth login`"
    except RepositoryNotFoundError:
        what = "the hub has no such model, or it is private"
        fix = "check the name in model.pretrained; log in with `hf auth login` if it is private"
    except RevisionNotFoundError:
        what, fix = f"the hub model has no revision {revision!r}", "check model.revision"
    except LocalEntryNotFoundError:
        what = "the model is not complete in the local cache, and the hub is offline or out of reach"
        fix = "connect, or copy the model here and give its folder as model.pretrained"
    except (OSError, ValueError) as error:
        what = f"the model could not be fetched: {(str(error).splitlines() or [type(error).__name__])[0][:300]}"
        fix = "try again, or give a local folder as model.pretrained"
    raise UserError(what, hub_id, fix)
