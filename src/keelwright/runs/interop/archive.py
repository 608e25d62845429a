# SPDX-License-Identifier: Apache-2.0
"""Zip archives from elsewhere, read member by member: no path leaves, no member grows beyond what it declared.

Inspect compresses the members of its logs with Zstandard (method 93 of the zip format, APPNOTE 6.3.8), which the
standard library can open from Python 3.14 on. Before that the package zstandard decompresses them here.
"""

from __future__ import annotations

import importlib
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Any, Self

from keelwright.core.errors import DataError, MissingError, UnsafeInputError

LARGEST_MEMBER = 1 << 29
"""Bytes of one decompressed member; a log keeps one sample in one member."""
MOST_EXPANSION = 2_000
"""Decompressed over compressed bytes, of a member above `_SMALL`. Repetitive real transcripts reach some hundreds."""

_SMALL = 1 << 24
_ZSTANDARD = 93
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_CHUNK = 1 << 20
_ENCRYPTED = 0x1


class Archive:
    """A zip archive open for reading; a context manager."""

    def __init__(self, path: Path, *, largest_member: int = LARGEST_MEMBER) -> None:
        """Open the archive and check every member's name, size and expansion.

        Raises:
            MissingError: There is no such file.
            DataError: It is no zip archive, or is cut off.
            UnsafeInputError: A member's path leaves the archive, or it would fill the memory.
        """
        self.path = path
        if not path.is_file():
            raise MissingError(
                f"There is no file '{path}'.",
                expected="a log file",
                found="a folder" if path.is_dir() else "nothing",
                fix="check the path",
            )
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
            raise DataError(
                f"'{path}' is not a whole zip archive.",
                expected="a log in the .eval format, which is a zip archive",
                found=str(error),
                fix="copy the log again from where it was written",
            ) from error
        # A name that is there twice is read as every zip reader does: the later one counts.
        self._members = {info.filename: info for info in self._zip.infolist() if not info.is_dir()}
        try:
            for info in self._members.values():
                _require_safe(path, info, largest_member)
        except UnsafeInputError:
            self._zip.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._zip.close()

    def names(self) -> list[str]:
        """Return the members' names, in the order of the archive."""
        return list(self._members)

    def read(self, name: str) -> bytes:
        """Return one member, decompressed and checked against its own size and checksum.

        Raises:
            KeyError: There is no such member.
            DataError: The member is damaged, encrypted or compressed in an unknown way.
            MissingError: It is compressed with Zstandard and nothing here can read that.
        """
        info = self._members[name]
        if info.flag_bits & _ENCRYPTED:
            raise self._damaged(name, "an encrypted member")
        try:
            if info.compress_type == _ZSTANDARD and sys.version_info < (3, 14):
                content = self._read_zstandard(info)
            else:
                with self._zip.open(info) as stream:
                    content = stream.read(info.file_size + 1)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, struct.error) as error:
            raise self._damaged(name, str(error) or type(error).__name__) from error
        if len(content) != info.file_size:
            raise self._damaged(name, "more or fewer bytes than the archive says")
        if zlib.crc32(content) != info.CRC:
            raise self._damaged(name, "a wrong checksum")
        return content

    def _read_zstandard(self, info: zipfile.ZipInfo) -> bytes:
        with self.path.open("rb") as stream:
            stream.seek(info.header_offset)
            magic, name_length, extra_length = _LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size))
            if magic != b"PK\x03\x04":
                raise self._damaged(info.filename, "no member where the archive says")
            stream.seek(name_length + extra_length, 1)
            return b"".join(_unpacked(stream, info, self))

    def _damaged(self, name: str, found: str) -> DataError:
        return DataError(
            f"'{self.path}': the member '{name}' cannot be read.",
            expected="a whole member, stored, deflated or compressed with Zstandard",
            found=found,
            fix="copy the log again from where it was written",
        )


def _unpacked(stream: IO[bytes], info: zipfile.ZipInfo, archive: Archive) -> Iterator[bytes]:
    """Yield the decompressed chunks of a Zstandard member: never more bytes than it declared, plus one chunk."""
    zstandard = _zstandard(archive.path)
    left, room = info.compress_size, info.file_size + 1
    decoder = None
    while left and room > 0:
        packed = stream.read(min(_CHUNK, left))
        if not packed:
            raise EOFError("cut off")
        left -= len(packed)
        while packed and room > 0:
            # A long member is several frames.
            decoder = decoder or zstandard.ZstdDecompressor().decompressobj(write_size=_CHUNK)
            try:
                found = decoder.decompress(packed)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            yield found[:room]
            room -= len(found)
            packed = decoder.unused_data if decoder.eof else b""
            decoder = None if decoder.eof else decoder


def _zstandard(path: Path) -> Any:
    try:
        return importlib.import_module("zstandard")
    except ImportError as error:
        raise MissingError(
            f"'{path}' is compressed with Zstandard, which this Python cannot read.",
            expected="the package zstandard",
            found="it is not installed",
            fix='pip install "keelwright[inspect]", or pip install zstandard',
        ) from error


def _require_safe(path: Path, info: zipfile.ZipInfo, largest: int) -> None:
    """Raise `UnsafeInputError` for a path that leaves the archive, or a member that would fill the memory."""
    parts = PurePosixPath(info.filename.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts:
        raise UnsafeInputError(
            f"'{path}' names a file outside itself.",
            expected="paths inside the archive",
            found=info.filename,
            fix="do not use an archive that you do not trust",
        )
    if info.file_size > largest:
        raise UnsafeInputError(
            f"'{path}': the member '{info.filename}' is too large.",
            expected=f"at most {largest} bytes",
            found=f"{info.file_size} bytes",
            fix="write the log again without what made the sample so large, such as images",
        )
    if info.file_size > _SMALL and info.file_size > MOST_EXPANSION * max(1, info.compress_size):
        raise UnsafeInputError(
            f"'{path}': the member '{info.filename}' expands beyond reason.",
            expected=f"at most {MOST_EXPANSION} times its compressed size",
            found=f"{info.compress_size} bytes that become {info.file_size}",
            fix="do not use an archive that you do not trust",
        )
