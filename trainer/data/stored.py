"""Where the rows of a data set of Hugging Face `datasets` lie: on disk, in parquet files, or on the hub.

A stranger may have made the data set: no code of it is run, no file is read that its folder does not hold, and on the
hub its README chooses among its own parquet files and nothing else.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from trainer.data.folder import Folder
from trainer.data.index import file_identity
from trainer.data.metadata import shown
from trainer.errors import UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
INSTALL = 'pip install "difftrain[text2image]"'
SPLITS = {  # what files of each split are called, by the rules of `datasets`
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


class Wanted(NamedTuple):
    """Which data set, as the config names it."""

    dataset: str
    split: str
    revision: str | None
    config_name: str | None


class Stored(NamedTuple):
    """Where the rows of a data set lie."""

    arrow: list[str]
    identity: list[Any] | None  # changes with any row
    folder: Folder  # where pictures may lie that the rows name and do not hold
    commit: str | None


def find(want: Wanted) -> Stored:
    """The Arrow files that hold the rows; parquet is converted once, into the cache of `datasets`."""
    if not os.path.lexists(want.dataset) and not glob.has_magic(want.dataset):
        if not HUB_ID.fullmatch(want.dataset) or want.dataset.endswith(".parquet"):
            fix = f"relative paths start at the working directory, {os.getcwd()}"
            raise UserError(f"{want.dataset!r} does not exist", "data.dataset", fix)
        return _on_hub(want)
    for name in ("revision", "config_name"):
        if getattr(want, name) is not None:
            what = f"{name} is for data sets on the hub, and {want.dataset!r} is a path"
            raise UserError(what, f"data.{name}", "leave it out")
    if os.path.isdir(want.dataset):
        there = os.listdir(want.dataset)
        if "dataset_dict.json" in there:
            return _saved_dict(want)
        if "state.json" in there:
            return _saved(want, want.dataset)
    return _parquet(want)


def _saved_dict(want: Wanted) -> Stored:
    splits = _json(os.path.join(want.dataset, "dataset_dict.json")).get("splits")
    if not isinstance(splits, list) or want.split not in splits or os.path.basename(want.split) != want.split:
        raise _no_split(want.split, splits if isinstance(splits, list) else [], want.dataset)
    if (found := Folder(want.dataset).find(f"{want.split}/state.json")) != "file":
        seen = "is a link that leaves the data set's folder" if found == "outside" else "is missing"
        raise UserError(f"{want.split}/state.json {seen}", want.dataset, "copy the data set again")
    return _saved(want, os.path.join(want.dataset, want.split), named=True)


def _saved(want: Wanted, folder: str, named: bool = False) -> Stored:
    path = os.path.join(folder, "state.json")
    state = _json(path)
    split = want.split if named else state.get("_split") or "train"
    if split != want.split:
        raise _no_split(want.split, [split], folder)
    if state.get("_indices_files"):
        raise UserError("it was saved by a release of `datasets` before 2.0", path, "save it again")
    try:
        names = [entry["filename"] for entry in state["_data_files"]]
        inside = all(name == os.path.basename(name) and name.endswith(".arrow") for name in names)
    except (LookupError, TypeError) as error:
        raise UserError("it does not list the data set's files", path, "save the data set again") from error
    if not inside:
        raise UserError(f"it names files outside of the data set's folder: {shown(names)}", path, "do not trust it")
    root = Folder(folder)
    if gone := [name for name in names if root.find(name) != "file"]:
        raise UserError(f"{shown(gone[0])} is missing, or a link that leaves the folder", folder, "copy it again")
    arrow = [os.path.join(root.root, name) for name in names]
    return Stored(arrow, _identities(arrow), root, None)


def _parquet(want: Wanted) -> Stored:
    if os.path.isdir(want.dataset):
        found = glob.glob("**/*.parquet", root_dir=want.dataset, recursive=True)
        if not found:
            seen = "there is neither state.json, dataset_dict.json nor a parquet file"
            raise UserError(seen, want.dataset, "name what save_to_disk wrote, or a folder of parquet files")
        files = [os.path.join(want.dataset, name) for name in _of_split(want, sorted(found), want.dataset)]
        root = want.dataset
    else:
        paths = [want.dataset] if os.path.exists(want.dataset) else sorted(glob.glob(want.dataset, recursive=True))
        if not paths or not all(path.endswith(".parquet") and os.path.isfile(path) for path in paths):
            seen = f"{want.dataset!r} is no parquet file" if paths else f"no file is called {want.dataset!r}"
            raise UserError(seen, "data.dataset", "files end in .parquet")
        by_name = {os.path.basename(path): path for path in paths}
        chosen = set(_of_split(want, sorted(by_name), want.dataset))
        files = [path for path in paths if os.path.basename(path) in chosen]
        root = os.path.dirname(files[0]) or "."
    return Stored(_converted(want, files, _states(files)), _identities(files), Folder(root), None)


def _on_hub(want: Wanted) -> Stored:
    """The files of the split, downloaded. Rows are read from parquet alone, and no code of a data set is run."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError("the hub needs huggingface_hub, which is not installed", "data.dataset", INSTALL) from error
    with _hub_errors(want.dataset, want.revision), _no_progress_bars():
        try:
            info = huggingface_hub.HfApi().dataset_info(want.dataset, revision=want.revision)
            commit, names = str(info.sha), [str(each.rfilename) for each in info.siblings or []]
            card = info.card_data.to_dict() if info.card_data else {}
        except huggingface_hub.errors.OfflineModeIsEnabled:  # what was downloaded before is still there
            folder = huggingface_hub.snapshot_download(
                want.dataset, repo_type="dataset", revision=want.revision, local_files_only=True
            )
            commit, names, card = os.path.basename(folder), glob.glob("**/*", root_dir=folder, recursive=True), {}
            readme = os.path.join(folder, "README.md")
            if os.path.exists(readme):
                card = huggingface_hub.metadata_load(readme) or {}
        inside = [name for name in names if name.endswith(".parquet") and not {"", ".."} & {*name.split("/")}]
        chosen = _of_repository(want, sorted(inside), card)
        folder = huggingface_hub.snapshot_download(
            want.dataset,
            repo_type="dataset",
            revision=commit,
            allow_patterns=[*map(glob.escape, chosen), "README.md"],
        )
    files = [os.path.join(folder, name) for name in chosen]
    identity = [want.dataset, commit, chosen] if COMMIT.fullmatch(commit) else None
    return Stored(_converted(want, files, identity or _states(files)), identity, Folder(folder), commit)


def _of_repository(want: Wanted, names: Sequence[str], card: Mapping[str, Any]) -> list[str]:
    """Those of a repository's parquet files that the configuration and the split name, by its README or by name."""
    where = f"hub data set {want.dataset}"
    if not names:
        fix = "if the hub shows it in its viewer, data.revision=refs/convert/parquet is a copy in parquet"
        raise UserError("it has no parquet file", where, fix)
    configs = {
        str(each.get("config_name", "default")): each
        for each in card.get("configs") or []
        if isinstance(each, dict) and each.get("data_files")
    }
    if configs:
        default = [name for name, each in configs.items() if each.get("default")] or [
            name for name in configs if name == "default" or len(configs) == 1
        ]
        name = want.config_name or (default[0] if default else None)
        if name not in configs:
            raise _no_config(want.config_name, configs, where)
        splits = _data_files(configs[name]["data_files"])
        if None not in splits:
            if want.split not in splits:
                raise _no_split(want.split, splits, where)
            return _matching(names, splits[want.split], where)
        names = _matching(names, splits[None], where)
    else:
        above = {name.split("/")[0] for name in names if "/" in name} - {"data", *set().union(*SPLITS.values())}
        if want.config_name is not None:
            names = [name for name in names if want.config_name in name.split("/")[:-1]]
            if not names:
                raise _no_config(want.config_name, above, where)
        elif len(above) > 1:
            raise _no_config(None, above, where)
    return _of_split(want, names, where)


def _of_split(want: Wanted, names: Sequence[str], where: str) -> list[str]:
    """Those of the files that belong to the split, told by what they and their folders are called."""
    shard = re.compile(rf"(.*/)?{re.escape(want.split)}(-\d+(-of-\d+)?)?\.parquet")
    if exact := [name for name in names if shard.fullmatch(name) or f"/{want.split}/" in f"/{name}"]:
        return exact
    words = {name: set(re.split(r"[^a-z0-9]+", name.lower())) for name in names}
    said = {split: [name for name in names if words[name] & also] for split, also in SPLITS.items()}
    if found := said.get(want.split):
        return found
    if any(said.values()) or want.split != "train":
        raise _no_split(want.split, [split for split, found in said.items() if found] or ["train"], where)
    return list(names)


def _converted(want: Wanted, files: Sequence[str], states: list[Any]) -> list[str]:
    """The Arrow files that `datasets` makes of parquet files, because single rows of parquet cannot be read.

    They lie in its cache, in a folder for the files' `states`: it would itself take a file for the one it converted
    whose path and time of change are the same, which is how `cp -p` and `rsync -t` leave another one.
    """
    try:
        import datasets
        from datasets import config as settings
    except ImportError as error:
        raise UserError("parquet needs `datasets`, which is not installed", "data.dataset", INSTALL) from error
    state = hashlib.sha256(json.dumps(states).encode()).hexdigest()[:32]
    cache = os.path.join(settings.HF_DATASETS_CACHE, "difftrain", state)
    with _no_progress_bars():
        try:
            table = datasets.load_dataset(
                "parquet", data_files={"train": list(files)}, split="train", keep_in_memory=False, cache_dir=cache
            )
        except Exception as error:  # whatever its readers raise is about the files
            cause = error.__cause__ or error
            seen = " ".join(str(cause).split())[:300] or type(cause).__name__
            fix = "compare it with the original, and see if the disk of HF_DATASETS_CACHE is full"
            raise UserError(f"parquet cannot be read: {seen}", want.dataset, fix) from error
    return [entry["filename"] for entry in table.cache_files]


def _identities(files: Sequence[str]) -> list[Any] | None:
    identities = [file_identity(path) for path in files]
    return None if None in identities else identities


def _states(files: Sequence[str]) -> list[Any]:
    """What tells files from others that are put in their places; any time of change, so that young files are told."""
    there = [os.stat(path) for path in files]
    states = [[each.st_size, each.st_mtime_ns, each.st_ctime_ns, each.st_ino] for each in there]
    return [[os.path.realpath(path), *state] for path, state in zip(files, states, strict=True)]


def _json(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            value = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"it cannot be read: {error}", path, "save the data set again") from error
    if not isinstance(value, dict):
        raise UserError("it is no JSON object", path, "save the data set again")
    return value


def _data_files(told: Any) -> dict[str | None, list[str]]:
    """Patterns by split, as a README's `data_files` has them; those of no split under None."""
    splits: dict[str | None, list[str]] = {}
    for each in told if isinstance(told, list) else [told]:
        split, paths = (each.get("split"), each.get("path")) if isinstance(each, dict) else (None, each)
        splits.setdefault(split, []).extend(map(str, paths if isinstance(paths, list) else [paths]))
    return splits


def _matching(names: Sequence[str], patterns: Sequence[str], where: str) -> list[str]:
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    regexes = [
        re.compile("".join(parts.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*\*|\*|\?)", pattern)))
        for pattern in patterns
    ]
    found = [name for name in names if any(regex.fullmatch(name) for regex in regexes)]
    if not found:
        raise UserError(f"no parquet file is called {', '.join(patterns)}, as its README says", where, "see its page")
    return found


def _no_split(split: str, there: Sequence[Any] | Mapping[Any, Any], where: str) -> UserError:
    names = [str(each) for each in there]
    fix = f"set data.split={names[0]}" if len(names) == 1 else "set data.split"
    return UserError(f"there is no split {split!r}; there is {', '.join(names) or 'none'}", where, fix)


def _no_config(name: str | None, there: Any, where: str) -> UserError:
    seen = "it has several configurations" if name is None else f"there is no configuration {name!r}"
    return UserError(f"{seen}; there are {', '.join(sorted(there)) or 'none'}", where, "set data.config_name")


@contextlib.contextmanager
def _hub_errors(dataset: str, revision: str | None) -> Iterator[None]:
    """Errors of the hub, each in one line."""
    from huggingface_hub import errors

    where = f"hub data set {dataset}"
    try:
        yield
    except errors.GatedRepoError as error:
        fix = "ask for access on its page, then `hf auth login` or set HF_TOKEN"
        raise UserError("its owner has not let you in", where, fix) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"there is no revision {revision!r}", where, "see its page on the hub") from error
    except errors.RepositoryNotFoundError as error:
        fix = "check the name; for a private one `hf auth login` or set HF_TOKEN; a path starts with ./ or /"
        raise UserError("the hub has no such data set, nor does a path of this name exist", where, fix) from error
    except errors.LocalEntryNotFoundError as error:
        fix = "download it once without HF_HUB_OFFLINE, or check the network"
        what = "no path of this name exists, it is not downloaded, and the hub cannot be reached"
        raise UserError(what, where, fix) from error
    except UserError:
        raise
    except Exception as error:  # the HTTP library under the hub's client has changed before
        seen = " ".join(str(error).split())[:300] or type(error).__name__
        fix = "check the network; HF_HUB_OFFLINE=1 reads what was downloaded before"
        what = f"no path of this name exists, and the hub cannot be reached: {seen}"
        raise UserError(what, where, fix) from error


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Both libraries draw on stderr what a log file cannot show."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):
            from huggingface_hub import utils

            if not utils.are_progress_bars_disabled():
                utils.disable_progress_bars()
                stack.callback(utils.enable_progress_bars)
        with contextlib.suppress(ImportError):
            import datasets

            if not datasets.are_progress_bars_disabled():
                datasets.disable_progress_bars()
                stack.callback(datasets.enable_progress_bars)
        yield
