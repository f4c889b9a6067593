"""Tells by a file's first bytes what it is, and reads it."""

from __future__ import annotations

import gzip
import shutil
import tempfile
import zlib
from pathlib import Path

from overlap_mtp.profiling.kineto import read_kineto
from overlap_mtp.profiling.nsys import read_nsys
from overlap_mtp.profiling.trace import Profile, ProfileError

GZIP, SQLITE = b"\x1f\x8b", b"SQLite format 3\x00"


def read_profile(path: Path) -> Profile:
    """Reads an SQLite export of Nsight Systems or a trace of torch.profiler, either of them also gzipped.

    Raises ProfileError, with the file's name and the reason, where it is neither, is damaged, empty or of an
    unknown schema.
    """
    try:
        with path.open("rb") as file:
            head = file.read(len(SQLITE))
        if head.startswith(GZIP):
            return _read_gzipped(path)
        return _read_plain(path, path, head)
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ProfileError(f"{path.name}: {reason}") from error


def _read_gzipped(path: Path) -> Profile:
    with tempfile.TemporaryDirectory() as folder:  # SQLite reads files, not streams
        plain = Path(folder) / path.name
        with gzip.open(path, "rb") as packed, plain.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
        with plain.open("rb") as file:
            head = file.read(len(SQLITE))
        return _read_plain(path, plain, head)


def _read_plain(path: Path, plain: Path, head: bytes) -> Profile:
    if not head.strip():
        raise ProfileError(f"{path.name}: the file is empty")
    if head == SQLITE:
        _check_length(plain)
        return read_nsys(plain)
    if path.suffix in (".nsys-rep", ".qdrep"):
        raise ProfileError(f"{path.name}: export it first: nsys export --type sqlite {path.name}")
    if head.lstrip()[:1] in (b"{", b"["):
        return read_kineto(path, plain.read_text(encoding="utf-8", errors="replace"))
    raise ProfileError(
        f"{path.name}: not a profile: neither an SQLite export of Nsight Systems nor a JSON trace of torch.profiler"
    )


def _check_length(path: Path) -> None:
    """SQLite itself notices a missing end only where it has to read it."""
    with path.open("rb") as file:
        head = file.read(100)  # https://www.sqlite.org/fileformat.html, "The Database Header"
    page_bytes = int.from_bytes(head[16:18]) or 1
    pages, size = int.from_bytes(head[28:32]), path.stat().st_size
    if len(head) < 100 or pages * (65536 if page_bytes == 1 else page_bytes) > size:
        raise ProfileError(f"{path.name}: the SQLite file is not complete: it ends after {size} bytes")
