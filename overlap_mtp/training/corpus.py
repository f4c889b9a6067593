"""Documents of token ids in files: text, whose tokens are its bytes, or ids in `.bin` and `.npy` files.

Nothing is left out or read as something else without a word: a file is read right, or refused by its name.
"""

from __future__ import annotations

import logging
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

Tokens = npt.NDArray[np.integer]
TOKEN_DTYPES = ("uint16", "uint32")  # of a .bin
PIECE_TOKENS = 4096  # a file of ids and a single file are cut into documents of this length
SAMPLES = 1024  # documents that a fingerprint reads
# Of a .bin that llm.c writes: it begins with a magic number, a version and the number of ids.
HEADER_BYTES = 1024
LLM_C = {(20240520, 1): "uint16", (20240801, 7): "uint32"}  # dtype by magic number and version
# Files that hold tokens or text in a form that is not read here.
CONTAINERS = (
    *(".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".xz", ".zip", ".zst"),
    *(".arrow", ".ds", ".feather", ".h5", ".hdf5", ".idx", ".index", ".mds", ".npz", ".parquet", ".tfrecord"),
    *(".pickle", ".pkl", ".pt", ".pth", ".safetensors"),
)
logger = logging.getLogger(__name__)


class TokenError(ValueError):
    """A token id outside of the vocabulary."""


class DataChangedError(RuntimeError):
    """A file is not what it was when it was opened."""


@dataclass(frozen=True)
class Document:
    """A file of token ids, or a part of one, that is read when it is needed. The tokens of text are its bytes."""

    path: Path
    num_tokens: int
    offset: int = 0  # tokens of the file before this document
    dtype: str = "uint8"
    header_bytes: int = 0  # of the file, before its first token
    stamp: tuple[int, int] | None = None  # bytes and modification time (ns) of the file when it was opened

    def read(self, begin: int, end: int) -> Tokens:
        """Return the tokens in [begin, end). Raises DataChangedError if the file is not what it was."""
        offset = self.header_bytes + (self.offset + begin) * np.dtype(self.dtype).itemsize
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                tokens = np.fromfile(file, self.dtype, end - begin, offset=offset)
        except OSError as error:
            raise DataChangedError(f"{self.path} cannot be read any more: {error}") from error
        if len(tokens) < end - begin or self.stamp not in (None, (status.st_size, status.st_mtime_ns)):
            raise DataChangedError(
                f"{self.path} has changed since it was opened: start again with data that stays"
            )
        return tokens


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, none of them empty. Together they are one stream of tokens."""

    documents: Sequence[Document]

    @cached_property
    def bounds(self) -> npt.NDArray[np.int64]:
        """The position of each document in the stream, and the stream's length."""
        return np.concatenate([[0], np.cumsum([one.num_tokens for one in self.documents])])

    @cached_property
    def fingerprint(self) -> str:
        """Digest the lengths of all documents in order, and PIECE_TOKENS tokens of each of SAMPLES documents."""
        count = len(self.documents)
        crc = zlib.crc32(self.bounds.tobytes())
        for at in np.unique(np.linspace(0, count - 1, min(count, SAMPLES)).astype(int)):
            one = self.documents[at]
            crc = zlib.crc32(one.read(0, min(one.num_tokens, PIECE_TOKENS)).tobytes(), crc)
        return f"{count} documents, {self.bounds[-1]} tokens, CRC-32 {crc:08x}"

    def shuffled(self, seed: int) -> Corpus:
        """Return the same documents in random order, because neighbours in a folder resemble each other."""
        order = np.random.default_rng(seed).permutation(len(self.documents))
        return Corpus([self.documents[at] for at in order])

    def document_at(self, position: int) -> int:
        """Return the index of the document that holds a position of the stream."""
        return int(np.searchsorted(self.bounds, position, side="right")) - 1

    def read(self, begin: int, length: int) -> Tokens:
        """Return tokens of the stream, which starts again at its end."""
        parts, total = [], int(self.bounds[-1])
        while length > 0:
            begin %= total
            at = self.document_at(begin)
            first = begin - int(self.bounds[at])
            last = min(first + length, self.documents[at].num_tokens)
            parts.append(self.documents[at].read(first, last))
            begin, length = begin + last - first, length - (last - first)
        return np.concatenate(parts)


def open_corpus(data: Path | None = None, token_dtype: str = "uint16") -> Corpus:
    """Find the documents under a path. Empty files and programs in a folder are skipped, with a note in the log.

    Args:
        data: a text file, a `.bin` of token ids, a `.npy` of them (1-D, of any integer type), or a folder of text or of
            such files, at any depth, with links followed. In a folder each text file is a document; all other files are
            cut into documents of PIECE_TOKENS tokens. Default: the source files of Python's standard library.
        token_dtype: of a `.bin`, one of TOKEN_DTYPES. One that llm.c has written says itself what it holds.

    Raises:
        ValueError: naming the path, if it is missing, empty, unreadable, no text, or not a whole number of ids.
    """
    if token_dtype not in TOKEN_DTYPES:
        raise ValueError(f"token_dtype must be one of {', '.join(TOKEN_DTYPES)}, got {token_dtype!r}")
    if data is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        skipped = {"site-packages", "dist-packages", "test", "tests"}
        files = [path for path in _files(root, skipped) if path.suffix == ".py" and path.stat().st_size]
        return Corpus([_whole(path, token_dtype) for path in files])
    if not data.exists():
        raise ValueError(
            f"{data} does not exist: give a text file, a .bin or .npy of token ids, or a folder of such files"
        )
    if not data.is_dir():
        return Corpus(list(_pieces(_whole(data, token_dtype))))
    files = list(_files(data))
    empty = [path for path in files if path.is_file() and not path.stat().st_size]
    kept = [path for path in files if path not in {*empty}]
    programs = [path for path in kept if _is_binary(path)]
    for what, some in (("empty", empty), ("not text", programs)):
        if some and not (dist.is_initialized() and dist.get_rank()):  # one rank's word is enough
            logger.warning(
                "%s: %d files are %s and left out, the first is %s", data, len(some), what, some[0]
            )
    documents = [_whole(path, token_dtype) for path in kept if path not in {*programs}]
    if not documents:
        if empty:
            raise ValueError(f"{empty[0]} is empty: add text to it, or remove it")
        raise ValueError(f"{data} holds no text: put files into it, or give another folder")
    of_ids = [one for one in documents if _holds_ids(one.path)]
    if 0 < len(of_ids) < len(documents):
        text = next(one.path for one in documents if not _holds_ids(one.path))
        raise ValueError(
            f"{data} holds token ids ({of_ids[0].path}) and text ({text}): take one of them away"
        )
    return Corpus([piece for one in documents for piece in (_pieces(one) if of_ids else [one])])


def _files(folder: Path, skipped: set[str] = set(), above: tuple[str, ...] = ()) -> Iterator[Path]:  # noqa: B006
    """Yield all paths that are no folders, sorted. Follow links. Raise ValueError for what cannot be listed."""
    above = (*above, os.path.realpath(folder))
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {error.strerror}") from None
    for path in paths:
        if not path.is_dir():
            yield path
        elif os.path.realpath(path) in above:
            raise ValueError(f"{path} is a link to a folder that it is in: take it away")
        elif path.name not in skipped:
            yield from _files(path, skipped, above)


def _holds_ids(path: Path) -> bool:
    return path.suffix.lower() in (".bin", ".npy")


def _is_binary(path: Path) -> bool:
    """Return whether a file is no text, as git sees it. A .txt is taken at its word."""
    if not path.is_file() or path.suffix.lower() in (".txt", ".bin", ".npy", *CONTAINERS):
        return False
    return b"\0" in _head(path, 8000)


def _head(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _whole(path: Path, token_dtype: str) -> Document:
    """Return a file as one document. Raise ValueError if it is not what its name says."""
    if not path.is_file():
        raise ValueError(f"{path} is neither a file nor a link to one: take it away")
    suffix = path.suffix.lower()
    if suffix in CONTAINERS:
        raise ValueError(f"{path} is not read: give text, a .bin or a .npy of token ids")
    head, status = _head(path, HEADER_BYTES), path.stat()
    if not status.st_size:
        raise ValueError(f"{path} is empty: add text to it, or remove it")
    header_bytes, dtype = 0, "uint8"
    if suffix == ".npy":
        header_bytes, dtype = _npy_header(path)
    elif suffix == ".bin":
        header_bytes, dtype = _bin_header(path, head, token_dtype)
    size = status.st_size - header_bytes
    num_tokens, rest = divmod(size, np.dtype(dtype).itemsize)
    if rest:
        raise ValueError(
            f"{path} must hold a whole number of {dtype} token ids, has {size} bytes: check token_dtype"
        )
    if not num_tokens:
        raise ValueError(f"{path} holds no token id: remove it")
    document = Document(path, num_tokens, 0, dtype, header_bytes, (status.st_size, status.st_mtime_ns))
    if suffix == ".bin" and dtype == "uint16" and _is_uint32(document.read(0, min(num_tokens, 1 << 16))):
        raise ValueError(
            f"{path} seems to hold uint32 token ids, since every second uint16 is a high half: check token_dtype"
        )
    return document


def _npy_header(path: Path) -> tuple[int, str]:
    """Return the bytes before the array and its dtype."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):  # numpy's own words advise to unpickle it
        raise ValueError(
            f"{path} is not a readable .npy of integers: write it again with numpy.save"
        ) from None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{path} must hold integers in 1-D, holds {array.dtype} of shape {array.shape}")
    return int(array.offset), array.dtype.str


def _bin_header(path: Path, head: bytes, token_dtype: str) -> tuple[int, str]:
    """Return the bytes before the ids and their dtype: those of a header of llm.c, else the given dtype."""
    if len(head) < HEADER_BYTES:
        return 0, token_dtype
    magic, version, count = np.frombuffer(head, "<i4", 3).tolist()
    dtype = LLM_C.get((magic, version))
    if dtype is None:
        if magic in {one for one, _ in LLM_C}:
            raise ValueError(f"{path} has a header of llm.c, of version {version}, which is not read here")
        return 0, token_dtype
    expected = HEADER_BYTES + count * np.dtype(dtype).itemsize
    if path.stat().st_size != expected:
        raise ValueError(f"{path} should have {expected} bytes by its header, has {path.stat().st_size}")
    return HEADER_BYTES, dtype


def _is_uint32(ids: Tokens) -> bool:
    """Return whether uint16 values are the halves of uint32 ids: every second one is 0, or tiny beside the others."""
    low, high = ids[: len(ids) // 2 * 2].reshape(-1, 2).T
    if len(low) < 8 or not low.any():
        return False
    return not high.any() or bool(high.max() <= 15 and np.median(low) > 255)


def _pieces(whole: Document) -> Iterator[Document]:
    for at in range(0, whole.num_tokens, PIECE_TOKENS):
        yield replace(whole, num_tokens=min(PIECE_TOKENS, whole.num_tokens - at), offset=at)
