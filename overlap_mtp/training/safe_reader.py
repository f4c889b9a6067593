"""Read torch's distributed checkpoints without running code that a file may hold.

`.metadata` and the objects among the saved values are pickles, which torch would load whatever they contain.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo  # torch has no public name for it
from torch.serialization import _get_layout  # the same

NAMES = (
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)
PATHS = ("pathlib", "pathlib._local")  # the second since Python 3.13
ALLOWED: dict[tuple[str, str], Any] = {
    **{(dcp_metadata.__name__, name): getattr(dcp_metadata, name) for name in NAMES},
    **{(module, one.__name__): one for module in PATHS for one in (PosixPath, PurePosixPath)},
    (_StorageInfo.__module__, "_StorageInfo"): _StorageInfo,
    ("torch.serialization", "_get_layout"): _get_layout,
    ("torch", "Size"): torch.Size,
    ("collections", "OrderedDict"): OrderedDict,
}


class MetadataUnpickler(pickle.Unpickler):
    """Read a `.metadata`. It may name only what torch writes into one; nothing else is imported or called."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class or function that the file names. Raises UnpicklingError if it is not allowed."""
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(
                f".metadata names {module}.{name}, which no checkpoint needs: it may be an attack, do not load it"
            )
        return ALLOWED[module, name]


class SafeReader(dcp.FileSystemReader):
    """torch's reader of a folder, without its unpickling.

    Args:
        path: the checkpoint's folder.
        names: the files that it may read.
    """

    def __init__(self, path: Path, names: Collection[str]) -> None:
        super().__init__(path)
        self._folder, self._names = path, names

    def read_metadata(self, *_: Any, **__: Any) -> dcp.Metadata:
        """Read `.metadata`. Raises UnpicklingError for content that no checkpoint has."""
        with (self._folder / ".metadata").open("rb") as file:
            metadata = MetadataUnpickler(file).load()
        if not isinstance(metadata, dcp.Metadata) or not isinstance(metadata.storage_data, dict):
            raise pickle.UnpicklingError(".metadata does not describe a checkpoint")
        if strange := {one.relative_path for one in metadata.storage_data.values()} - {*self._names}:
            raise pickle.UnpicklingError(f".metadata names {strange.pop()!r}, which is not in run.json")
        metadata.storage_meta = dcp_metadata.StorageMeta(load_id=self.load_id)
        return metadata


class SafePlanner(dcp.DefaultLoadPlanner):
    """torch's planner; objects may hold tensors, numbers, strings and containers of them."""

    def load_bytes(self, read_item: dcp.ReadItem, value: io.BytesIO) -> None:
        """Load an object. Raises UnpicklingError if it holds anything else."""
        known = io.BytesIO()
        torch.save(torch.load(value, map_location="cpu", weights_only=True), known)
        known.seek(0)
        super().load_bytes(read_item, known)
