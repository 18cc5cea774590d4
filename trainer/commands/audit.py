"""Read every record of a data set and report each defect, duplicate and cut caption; no picture is ever touched.

Two files are written: `audit.json` with everything, for programs, and beside it `audit.html`, for people. Exit code 0:
a run with this config could start on this data. 1: its policies refuse the data, or with --run a record is not what
that run had. 2: there is nothing to audit, for the config or the source itself is at fault.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.commands.train import add_config_file_arguments
from trainer.errors import StorageFailed, UserError

if TYPE_CHECKING:
    from trainer.config import Config
    from trainer.data.audit.album import Album
    from trainer.data.audit.findings import Tokenizer
    from trainer.data.record import Records

EXAMPLE = "difftrain audit --config configs/sd15_finetune.yaml --set data.data_root=my_pictures --output audit.json"
OURS = b'{\n  "difftrain_audit": '  # how a report of ours begins
ANNOUNCED_AFTER_SECONDS, SAID_EVERY_SECONDS = 2.0, 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `audit` takes."""
    add_config_file_arguments(parser)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("audit.json"),
        metavar="FILE",
        help="the JSON report (default: audit.json in the working directory); the HTML page lies beside it",
    )
    parser.add_argument(
        "--workers",
        type=_workers,
        default=None,
        metavar="N",
        help="processes that read (default: one a core); 0 reads in this one, which a crashing decoder would end",
    )
    parser.add_argument(
        "--run", type=Path, metavar="FOLDER", help="compare each record with the hashes that this run recorded"
    )


def run(args: argparse.Namespace) -> int:
    """Write both reports and print what they come to: 0 or 1. Raises UserError if there is nothing to audit."""
    from trainer import __version__
    from trainer.config_file import load_config
    from trainer.files import to_json, write_atomic

    page = _check_output(args.output)
    loaded = load_config(args.config, args.overrides, None, print)
    config = loaded.config
    # What a policy would refuse is to be listed, not to end the list: a missing file is a record like any other.
    records = config.data.model_copy(update={"on_bad": "skip"}).open()
    folder: Path | None = args.run
    recorded = None if folder is None else _recorded(folder)
    from trainer.data.audit.findings import Asked, facts
    from trainer.data.audit.page import html_page
    from trainer.data.audit.summary import summary

    workers = _cores() if args.workers is None else args.workers
    started = time.monotonic()
    album = _read(records, workers)
    seconds = time.monotonic() - started
    asked = Asked(config.data, records, config.train.global_batch_size, config.train.seed)
    compared = None if folder is None or recorded is None else _compared(folder, recorded, records, album)
    found = {"difftrain_audit": __version__, "config": str(args.config), "overrides": args.overrides}
    found |= facts(asked, album, _tokenizer(config), compared)
    found["timing"] = {
        "workers": workers,
        "read_seconds": round(seconds, 2),
        "records_per_second": round(len(records) / max(seconds, 1e-9), 1),
    }
    content = to_json(found)
    assert content.startswith(OURS), "a later audit could not tell that this one is ours"
    try:
        write_atomic(args.output, content.decode())
        write_atomic(page, html_page(found, records).encode("utf-8", "replace"))
    except OSError as error:
        raise StorageFailed(f"the report could not be written: {error}") from error
    for line in summary(found):
        print(line)
    print(f"report {page}, {args.output}")
    return found["verdict"]["exit_code"]


def _workers(text: str) -> int:
    if not text.isdecimal() or int(text) > 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1024")
    return int(text)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_output(output: Path) -> Path:
    """Where the page goes; raises UserError where a report cannot be written, or would replace what is not one."""
    if output.suffix.lower() != ".json":
        raise UserError(f"the report is JSON, but {str(output)!r} does not end in .json", "--output")
    if not output.parent.is_dir():
        raise UserError(f"there is no folder {str(output.parent)!r}", "--output", "make it first")
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"the folder {str(output.parent)!r} cannot be written", "--output")
    from trainer.data.audit.page import HEAD

    page = output.with_suffix(".html")
    for path, head in ((output, OURS), (page, HEAD.encode())):
        if path.is_symlink() or path.exists():
            try:
                with path.open("rb") as file:
                    ours = path.is_file() and not path.is_symlink() and file.read(len(head)) == head
            except OSError:
                ours = False
            if not ours:
                raise UserError(f"{path} is there, and is no report of an audit", "--output", "give another name")
    return page


def _read(records: Records, workers: int) -> Album:
    from trainer.data.audit.album import Album
    from trainer.data.audit.reading import read_all

    progress = _Progress(len(records))
    try:
        return Album.of(records, read_all(records, workers), progress.one_more)
    finally:
        progress.end()


class _Progress:
    """A bar on a terminal, else a line now and then once it takes long."""

    def __init__(self, total: int):
        self.total, self.done, self.bar = total, 0, None
        if sys.stdout.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, unit="record", file=sys.stdout, dynamic_ncols=True, leave=False)

    def one_more(self) -> None:
        if not self.done:  # what goes before it is the start of the processes
            self.started = time.monotonic()
            self.due = self.started + ANNOUNCED_AFTER_SECONDS
        self.done += 1
        if self.bar is not None:
            self.bar.update()
        elif (now := time.monotonic()) >= self.due:
            self.due, rate = now + SAID_EVERY_SECONDS, self.done / (now - self.started)
            left = (self.total - self.done) / rate
            print(
                f"audit  {self.done:,} of {self.total:,} records, {rate:,.0f} a second, {left:,.0f} s to go", flush=True
            )

    def end(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _tokenizer(config: Config) -> Tokenizer | str:
    """The run's own, or why it cannot be had: that ends no audit."""
    from trainer.data.audit.findings import Tokenizer

    model = config.model
    try:
        tokenizer = model.load_tokenizer()
    except UserError as error:
        return f"captions are not counted in tokens: {error.what}"
    except ImportError as error:
        return f"captions are not counted in tokens: {error.name or error} is not installed"
    return Tokenizer(lambda texts: model.token_counts(tokenizer, texts), model.prompt_room(tokenizer))


def _recorded(folder: Path) -> Mapping[str, Any]:
    """What a run's manifest says of its data; raises UserError if there is none."""
    from trainer.run.manifest import read_manifest
    from trainer.run.rundir import RunDir

    return read_manifest(RunDir(folder).manifest)["data"]


def _compared(folder: Path, recorded: Mapping[str, Any], records: Records, album: Album) -> dict[str, Any]:
    """What became of the records that the run had, by key; None, and why, where nothing can say it."""
    from trainer.data.fingerprint import FINGERPRINT_FORMAT, leaves
    from trainer.run.records import changes_since
    from trainer.run.rundir import RunDir

    changes, why, differs = None, None, False
    if recorded.get("fingerprint_format") != FINGERPRINT_FORMAT:
        why = "the run has another kind of fingerprint"
    elif records.fingerprint(album) == recorded["fingerprint"]:
        changes = {}
    else:
        differs = True
        changes = changes_since(RunDir(folder), recorded["fingerprint"], leaves(records, album))
        if changes is None:
            why = "the data is not what it was, but the run has no list of its records to say where"
    return {"path": str(folder), "differs": differs, "changes": changes, "why": why}
