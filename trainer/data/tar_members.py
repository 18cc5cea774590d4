"""The regular files of a tar archive and where their bytes lie, read in one pass and never unpacked.

Names are labels here, nothing is ever opened or written by them. Links, devices, pipes and sparse files are refused,
because leaving one out would leave out a sample without a word. Headers are ustar, GNU's long names and pax.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from trainer.data.metadata import shown
from trainer.errors import UserError

BLOCK_BYTES = 512
READ_AT_ONCE = 1 << 20
MAX_HEADER_BYTES = 1 << 20  # of a long name or a pax header: a stranger's archive may claim any size
END = bytes(BLOCK_BYTES)
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
REFUSED = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
FETCH_AGAIN = "fetch or write the shard again"


@dataclass
class Member:
    """A regular file of an archive; its bytes can be read until the next member is asked for."""

    name: str
    offset: int  # of its first byte in the archive
    size: int
    _take: Callable[[int], bytes] = field(repr=False)
    _left: int = field(default=-1, repr=False)

    def __post_init__(self) -> None:
        self._left = self.size

    def chunks(self) -> Iterator[bytes]:
        """The bytes not read yet, in pieces of at most 1 MiB."""
        while self._left:
            piece = self._take(min(self._left, READ_AT_ONCE))
            self._left -= len(piece)
            yield piece

    def read(self) -> bytes:
        """All bytes not read yet."""
        return b"".join(self.chunks())


def members(file: BinaryIO, where: str) -> Iterator[Member]:
    """The regular files of the archive, in order; `file` is read from its start and never sought.

    Raises UserError naming `where` and the byte for an archive that is cut off, compressed, damaged, or holds anything
    but regular files and directories.
    """
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        try:
            data = file.read(count)
            while len(data) < count and (more := file.read(count - len(data))):
                data += more
        except OSError as error:
            raise UserError(f"shard cannot be read at byte {at:,}: {error.strerror}", where) from error
        at += len(data)
        if len(data) < count:
            raise UserError(f"the shard is cut off at byte {at:,}", where, FETCH_AGAIN)
        return data

    named: dict[str, str] = {}  # what a header before the file's own says of it: `path`, `size`
    while (block := take(BLOCK_BYTES)) != END:
        start = at - BLOCK_BYTES
        header = _header(block, start, where)
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE):
            told = _pax(_extension(take, header, start, where), start, where)
            if header.type == tarfile.XGLTYPE:
                if told.keys() & {"path", "size"}:
                    raise _refused("a pax header that names all members after it", start, where)
            else:
                named |= told
            continue
        if header.type == tarfile.GNUTYPE_LONGNAME:
            named["path"] = _text(_extension(take, header, start, where).rstrip(b"\0"))
            continue
        if header.type == tarfile.GNUTYPE_LONGLINK:
            _extension(take, header, start, where)
            continue
        name, size = named.get("path", header.name), _size(named.get("size"), header.size, start, where)
        named = {}
        if header.type == tarfile.DIRTYPE:
            continue
        if header.type not in tarfile.REGULAR_TYPES or header.type == tarfile.GNUTYPE_SPARSE:
            kind = REFUSED.get(header.type, f"a member of the unknown type {header.type!r}")
            raise _refused(f"{kind}, {shown(name)},", start, where)
        if name.endswith("/"):  # how the oldest archives mark a directory
            continue
        member = Member(name, at, size, take)
        yield member
        for _ in member.chunks():
            pass
        take(-size % BLOCK_BYTES)


def _header(block: bytes, start: int, where: str) -> tarfile.TarInfo:
    for magic, name in COMPRESSED.items():
        if start == 0 and block.startswith(magic):
            fix = "unpack it once: a picture inside cannot be reached without reading all before it"
            raise UserError(f"the shard is compressed with {name}", where, fix)
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        what = "not a tar archive" if start == 0 else f"the shard is damaged: no tar header at byte {start:,}"
        raise UserError(f"{what} ({error})", where, FETCH_AGAIN) from error


def _extension(take: Callable[[int], bytes], header: tarfile.TarInfo, start: int, where: str) -> bytes:
    if not 0 <= header.size <= MAX_HEADER_BYTES:
        raise _refused(f"a header of {header.size:,} bytes", start, where)
    data = take(header.size)
    take(-header.size % BLOCK_BYTES)
    return data


def _pax(data: bytes, start: int, where: str) -> dict[str, str]:
    """`path` and `size` of a pax header: records of `length key=value` and a line feed, which the length counts too."""
    told = {}
    while data.strip(b"\0"):
        digits, space, _ = data.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        key, equals, value = data[len(digits) + 1 : max(length - 1, 0)].partition(b"=")
        if not space or not equals or not len(digits) + 1 < length <= len(data) or data[length - 1 : length] != b"\n":
            raise UserError(f"the shard is damaged: no pax header at byte {start:,}", where, FETCH_AGAIN)
        if key.startswith(b"GNU.sparse."):
            raise _refused("a sparse file", start, where)
        if key in (b"path", b"size"):
            told[key.decode()] = _text(value)
        data = data[length:]
    return told


def _size(told: str | None, otherwise: int, start: int, where: str) -> int:
    size = otherwise if told is None else int(told) if told.isascii() and told.isdigit() and len(told) < 19 else -1
    if size < 0:
        raise UserError(f"the shard is damaged: a member of no size at byte {start:,}", where, FETCH_AGAIN)
    return size


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _refused(what: str, start: int, where: str) -> UserError:
    fix = "write the shard from regular files alone (tar --dereference --hard-dereference)"
    return UserError(f"the shard holds {what} at byte {start:,}", where, fix)
