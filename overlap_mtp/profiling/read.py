"""Tell by a file's first bytes what it is, and read it."""

from __future__ import annotations

import gzip
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from overlap_mtp.profiling.kineto import read_kineto
from overlap_mtp.profiling.nsys import read_nsys
from overlap_mtp.profiling.trace import Profile, ProfileError

GZIP, SQLITE = b"\x1f\x8b", b"SQLite format 3\x00"


def read_profile(path: Path) -> Profile:
    """Read an SQLite export of Nsight Systems or a trace of torch.profiler, gzipped or not.

    Raises:
        ProfileError: the file is neither, or it is damaged, empty or of an unknown schema.
    """
    try:
        with unpacked(path) as plain:
            return _read_plain(path, plain)
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ProfileError(f"{path.name}: {reason}") from error


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
        plain = Path(folder) / path.name
        with gzip.open(path, "rb") as packed, plain.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
        yield plain


def starts_with(path: Path, mark: bytes) -> bool:
    """Return whether these are the first bytes of the file."""
    with path.open("rb") as file:
        return file.read(len(mark)) == mark


def _read_plain(path: Path, plain: Path) -> Profile:
    with plain.open("rb") as file:
        head = file.read(100)
    if not head.strip():
        raise ProfileError(f"{path.name}: the file is empty")
    if head.startswith(SQLITE):
        _check_length(plain, head)
        return read_nsys(plain)
    if path.suffix in (".nsys-rep", ".qdrep"):
        raise ProfileError(f"{path.name}: export it first: nsys export --type sqlite {path.name}")
    if head.lstrip()[:1] in (b"{", b"["):
        return read_kineto(path, plain.read_text(encoding="utf-8", errors="replace"))
    raise ProfileError(
        f"{path.name}: not a profile: neither an SQLite export of Nsight Systems nor a JSON trace of torch.profiler"
    )


def _check_length(path: Path, head: bytes) -> None:
    """Check that the file is complete: SQLite notices a missing end only if it has to read it.

    `head` is https://www.sqlite.org/fileformat.html, "The Database Header": 100 bytes.
    """
    page_bytes = int.from_bytes(head[16:18]) or 1
    pages, size = int.from_bytes(head[28:32]), path.stat().st_size
    if len(head) < 100 or pages * (65536 if page_bytes == 1 else page_bytes) > size:
        raise ProfileError(f"{path.name}: the SQLite file is not complete: it ends after {size} bytes")
