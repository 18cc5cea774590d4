"""Which files a folder holds, asked by names that a stranger may have written."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Found = Literal["file", "missing", "not a file", "outside"]


class BadNameError(ValueError):
    """A file name that is refused whatever the folder holds."""


def relative_name(name: str) -> str:
    """The one spelling of a relative file name, without `./` and `//`; raises BadNameError if it leads elsewhere."""
    if not name:
        raise BadNameError("the file name is empty")
    if "\0" in name:
        raise BadNameError(f"{name!r} holds a NUL, as no file's name does")
    if name.startswith("/"):
        raise BadNameError(f"{name!r} is an absolute path; names are relative to data_root")
    if ".." in name.split("/"):
        raise BadNameError(f"{name!r} contains '..' and may leave data_root")
    return posixpath.normpath(name)


def leads_out(root: str, path: str, real: Callable[[str], str] = os.path.realpath) -> bool:
    """Whether a link on the way to a file leaves `root`, which is a real path; `real` resolves a directory."""
    return not _holds(root, os.path.realpath(path) if os.path.islink(path) else real(os.path.dirname(path)))


def _holds(root: str, real_path: str) -> bool:
    return real_path == root or real_path.startswith(os.path.join(root, ""))


class Folder:
    """The regular files below a root. Each directory is listed once, and no link that leaves the root is followed."""

    def __init__(self, root: str):
        self.root = os.path.realpath(root)
        self._listings: dict[str, _Listing] = {}

    def find(self, name: str) -> Found:
        """What a name made by `relative_name` stands for."""
        directory, _, base = name.rpartition("/")
        listing = self._listings.get(directory)
        if listing is None:
            listing = self._listings[directory] = self._list(directory)
        if base in listing.files:
            return "file"
        return listing.others.get(base, listing.missing)

    def _list(self, directory: str) -> _Listing:
        path = os.path.realpath(os.path.join(self.root, directory))
        if not _holds(self.root, path):
            return _Listing(missing="outside")
        listing = _Listing()
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    kind = self._kind(entry)
                    if kind == "file":
                        listing.files.add(entry.name)
                    else:
                        listing.others[entry.name] = kind
        except OSError:  # not there, not a directory, or not ours to read: none of its files can be opened
            return _Listing()
        return listing

    def _kind(self, entry: os.DirEntry[str]) -> Found:
        if not entry.is_symlink():
            return "file" if entry.is_file(follow_symlinks=False) else "not a file"
        target = os.path.realpath(entry.path)
        if not _holds(self.root, target):
            return "outside"
        if os.path.isfile(target):
            return "file"
        return "not a file" if os.path.exists(target) else "missing"


@dataclass
class _Listing:
    files: set[str] = field(default_factory=set)
    others: dict[str, Found] = field(default_factory=dict)
    missing: Found = "missing"  # what a name stands for that is in neither
