"""Tell by a file's first bytes what it is, and read it."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import stat
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from overlap_mtp.profiling.kineto import read_kineto
from overlap_mtp.profiling.nsys import read_nsys
from overlap_mtp.profiling.trace import Profile, ProfileError

GZIP, SQLITE = b"\x1f\x8b", b"SQLite format 3\x00"
MOST_EXPANSION = 200  # real profiles pack to a tenth or a twentieth; gzip can expand a thousandfold
LEAST_LIMIT_BYTES = 1 << 28  # what any gzipped file may expand to


def read_profile(path: Path) -> Profile:
    """Read an SQLite export of Nsight Systems or a trace of torch.profiler, gzipped or not.

    Raises:
        ProfileError: the file is neither, or it is damaged, empty or of an unknown schema, or it expands without
            end.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise ProfileError(f"{path.name}: not a file on a disk: copy it into one first")
        if is_nsys(path):
            with unpacked(path) as plain:
                profile = _read_export(path, plain)
        else:
            with opened_text(path) as file:
                profile = read_kineto(path.name, file)
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ProfileError(f"{path.name}: {reason}") from error
    return replace(profile, path=str(path), clock=profile.clock or str(path.resolve()))


def is_nsys(path: Path) -> bool:
    """Return whether a file begins as an SQLite file does, and not as JSON does.

    Raises:
        ProfileError: it begins in neither way.
    """
    with _opened(path) as file:
        head = file.read(100)
        if head.startswith(SQLITE):
            return True
        if path.suffix in (".nsys-rep", ".qdrep"):
            raise ProfileError(f"{path.name}: export it first: nsys export --type sqlite {path.name}")
        text = _decoded(head)
        while text.isspace() and (more := file.read(1 << 16)):
            text = _decoded(more)
    if not text or text.isspace():
        raise ProfileError(f"{path.name}: the file is empty")
    if text.lstrip()[:1] not in ("{", "["):
        raise ProfileError(
            f"{path.name}: not a profile: neither an SQLite export of Nsight Systems nor a JSON trace of torch.profiler"
        )
    return False


@contextmanager
def opened_text(path: Path) -> Iterator[io.TextIOWrapper]:
    """Open JSON, gzipped or not, in whichever Unicode encoding it is."""
    with _opened(path) as file:
        encoding = json.detect_encoding(file.read(4))
    with _opened(path) as file, io.TextIOWrapper(io.BufferedReader(file), encoding, "replace") as text:
        yield text


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Unpack a gzipped file for the time of the block, because SQLite reads files and not streams.

    Yields:
        The unpacked file, or `path` itself if it is not gzipped.
    """
    if not starts_with(path, GZIP):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "profile"
        with _opened(path) as packed, plain.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
        yield plain


def starts_with(path: Path, mark: bytes) -> bool:
    """Return whether these are the first bytes of the file."""
    with path.open("rb") as file:
        return file.read(len(mark)) == mark


def _decoded(data: bytes) -> str:
    return data.decode(json.detect_encoding(data), "replace")


def _opened(path: Path) -> io.RawIOBase:
    """Open a file for reading, and unpack it if it is gzipped."""
    if starts_with(path, GZIP):
        return _Bounded(path)
    return path.open("rb", buffering=0)


class _Bounded(io.RawIOBase):
    """A gzipped file, unpacked. It fails if it expands far beyond what a profile does."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = gzip.open(path, "rb")  # noqa: SIM115  # closed in `close`
        self._left = max(LEAST_LIMIT_BYTES, MOST_EXPANSION * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise ProfileError(
                f"{self._path.name}: it expands more than {MOST_EXPANSION}-fold: not a profile"
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def _read_export(path: Path, plain: Path) -> Profile:
    with plain.open("rb") as file:
        _check_length(path, plain, file)
    return read_nsys(path.name, plain)


def _check_length(path: Path, plain: Path, file: IO[bytes]) -> None:
    """Check that the file is complete: SQLite notices a missing end only if it has to read it.

    The head is https://www.sqlite.org/fileformat.html, "The Database Header": 100 bytes.
    """
    head, size = file.read(100), plain.stat().st_size
    page_bytes, pages = int.from_bytes(head[16:18]) or 1, int.from_bytes(head[28:32])
    if len(head) < 100 or pages * (65536 if page_bytes == 1 else page_bytes) > size:
        raise ProfileError(f"{path.name}: the SQLite file is not complete: it ends after {size} bytes")
