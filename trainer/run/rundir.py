"""The run directory: what each file is called, and whether a run may start there."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from pathlib import Path

from trainer.errors import UserError
from trainer.files import fsync_folder, sweep_temp_files, temp_path

_SAMPLE = re.compile(r"step-([0-9]{6,})\.png")
_SIDECAR = re.compile(r"checkpoint-(0|[1-9][0-9]*)\.json")


class RunDir:
    """The files of one run. Making the object touches nothing."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.resolved_config = self.path / "config.resolved.yaml"
        self.environment = self.path / "env.json"
        self.manifest = self.path / "run_manifest.json"
        self.metrics = self.path / "metrics.jsonl"
        self.records = self.path / "records.jsonl"
        self.bad_samples = self.path / "bad_samples.jsonl"
        self.adherence = self.path / "adherence.json"
        self.samples = self.path / "samples"
        self.progress = self.path / "progress.png"  # the validation prompts at every step that drew them
        self.stop_request = (
            self.path / "stop.request"
        )  # empty files of `difftrain stop` and `difftrain save`, which the
        self.save_request = self.path / "save.request"  # job removes when it has seen them
        self.first_and_last = self.path / "first_and_last.png"

    def checkpoint(self, step: int) -> Path:
        """The weights and optimizer state after optimizer step `step`; without its sidecar it does not exist."""
        return self.path / f"checkpoint-{step}.pt"

    def sidecar(self, step: int) -> Path:
        """What commits `checkpoint(step)`: its size and hash, written last."""
        return self.path / f"checkpoint-{step}.json"

    def traceback(self, rank: int) -> Path:
        """Where a rank that fails by an error of ours, or of a plug-in, leaves the whole of it."""
        return self.path / f"traceback-rank-{rank}.txt"

    def sample(self, step: int) -> Path:
        """The grid of validation pictures after step `step`; the caller makes the folder."""
        return self.samples / f"step-{step:06d}.png"

    def sample_steps(self) -> list[int]:
        """The steps that have such a grid, ascending."""
        names = os.listdir(self.samples) if self.samples.is_dir() else []
        return sorted(int(match[1]) for name in names if (match := _SAMPLE.fullmatch(name)))

    def checkpoint_steps(self) -> list[int]:
        """The steps that have a sidecar, ascending by number; nothing is verified, no clock is read."""
        try:
            names = os.listdir(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(int(match[1]) for name in names if (match := _SIDECAR.fullmatch(name)))

    def uncommitted(self) -> list[Path]:
        """The checkpoint files without a sidecar, of a kill between the two or of a sidecar that was set aside."""
        committed = {self.checkpoint(step).name for step in self.checkpoint_steps()}
        return sorted(path for path in self.path.glob("checkpoint-*.pt") if path.name not in committed)

    def holds_run(self) -> bool:
        """Whether a step was taken here: metrics.jsonl has a whole line, or a checkpoint sidecar exists."""
        if self.checkpoint_steps():
            return True
        try:
            with open(self.metrics, "rb") as file:
                return file.readline().endswith(b"\n")
        except (FileNotFoundError, NotADirectoryError):
            return False

    def check_writable(self) -> None:
        """Raises UserError, in one line, if a run could not write here; leaves nothing behind either way.

        The proof is a file made and removed in the folder, or in the nearest parent there is: permission bits say
        nothing to root, and nothing about a read-only mount.
        """
        try:
            folder = self._nearest_folder()
            probe = temp_path(folder / "writable")
            try:
                with open(probe, "wb") as file:
                    file.write(b"\0")
            finally:
                with contextlib.suppress(FileNotFoundError):
                    probe.unlink()
        except (OSError, ValueError) as error:
            raise self._unusable(error) from None

    def create(self) -> None:
        """Makes the folder and its missing parents, durably; raises UserError if that cannot be."""
        try:
            nearest = self._nearest_folder()
            self.path.mkdir(parents=True, exist_ok=True)
            folder = self.path
            while folder != nearest:
                folder = folder.parent
                fsync_folder(folder)
        except (OSError, ValueError) as error:
            raise self._unusable(error) from None

    def sweep(self) -> list[str]:
        """The temp files of a killed run, now removed, as paths relative to the folder."""
        return sweep_temp_files(self.path) + [f"samples/{name}" for name in sweep_temp_files(self.samples)]

    def _nearest_folder(self) -> Path:
        """The folder itself or the nearest parent that exists; raises OSError if the rest cannot be made below it."""
        if "\0" in str(self.path):
            raise ValueError("a path cannot hold a NUL character")
        missing: list[str] = []
        for folder in (self.path, *self.path.parents):
            if folder.is_dir():
                longest = os.pathconf(folder, "PC_NAME_MAX")
                if any(len(os.fsencode(name)) > longest for name in missing):
                    raise OSError(errno.ENAMETOOLONG, f"a name in it has more than {longest} bytes")
                return folder
            if os.path.lexists(folder):
                kind = "a link to nowhere" if folder.is_symlink() and not folder.exists() else "not a folder"
                raise OSError(errno.ENOTDIR, f"'{folder}' is {kind}")
            missing.append(folder.name)
        raise FileNotFoundError(errno.ENOENT, "the current folder is gone")

    def _unusable(self, error: Exception) -> UserError:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        at = error.filename if isinstance(error, OSError) else None
        at = Path(os.fsdecode(at)).parent if at and "difftrain-tmp-" in str(at) else at
        at = f" ('{at}')" if at and str(at) != str(self.path) else ""
        return UserError(f"output folder '{self.path}' cannot be written: {reason}{at}; choose another --output-dir")
