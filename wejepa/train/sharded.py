"""Checkpoints of a model whose weights are spread over processes: each writes its share, and each reads what it needs.

Such a checkpoint is a folder with a checkpoint's usual name:

    manifest.json     the size and SHA-256 of every other file
    rest.pt           what is no tensor, as a checkpoint of one file holds it
    .metadata         where the parts of each tensor are
    __0_0.distcp ...  the parts that process 0 wrote, and so on

The last two are torch.distributed.checkpoint's, so that the folder fits any number of processes, or none. `.metadata` is a pickle. It is
opened only where it matches the manifest, and by an unpickler that knows the classes of such a file and nothing else: a folder from a
stranger, whose manifest matches, cannot run code either.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from wejepa.errors import CheckpointError
from wejepa.files import flush_folder, flushed
from wejepa.train.ranks import Ranks

__all__ = ["Shards", "write_shards"]

FORMAT = "wejepa sharded checkpoint 1"
MANIFEST, REST, METADATA = "manifest.json", "rest.pt", ".metadata"
CLASSES = {  # what the metadata is made of
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "torch.serialization": {"_get_layout"},
}  # fmt: skip


def write_shards(path: Path, tensors: dict[str, Tensor], rest: dict[str, Any], ranks: Ranks) -> None:
    """Write a checkpoint's folder so that it is there whole or not at all. Every process calls it, and all return when it is there.

    Args:
        path: the folder; with processes on several machines, in a file system that these share.
        tensors: DTensors, of which each process writes its share; and whole ones, which the first process writes.
        rest: what else the checkpoint holds; the first process writes it.
        ranks: the processes.

    Raises:
        CheckpointError: on every process, where one of them could not write; nothing of it is left.
    """
    aside = path.with_name(f".{path.name}.{ranks.from_first(os.getpid())}.tmp")

    def finish() -> None:
        with flushed(aside / REST) as file:
            torch.save(rest, file)
        files = {name: signature(aside / name) for name in (REST, METADATA)}
        for each in written:
            files |= each
        with flushed(aside / MANIFEST) as file:
            file.write(json.dumps({"format": FORMAT, "files": files}, indent=1).encode())
        flush_folder(aside)
        aside.rename(path)
        flush_folder(path.parent)

    try:
        ranks.once(lambda: aside.mkdir(parents=True))
        dcp.save(tensors, storage_writer=_Writer(aside), planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True))
        own = ranks.together(lambda: {file.name: signature(file) for file in aside.glob(f"__{ranks.rank}_*")})
        written = ranks.gather(own)
        ranks.once(finish)
    except (OSError, RuntimeError, CheckpointException) as error:
        reason = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error  # those of all processes
        if isinstance(reason, KeyboardInterrupt):
            raise reason from error
        raise CheckpointError(f"cannot write {path} ({reason}): free some space or choose another hardware.output_dir") from error
    finally:
        if ranks.first:
            shutil.rmtree(aside, ignore_errors=True)


class Shards:
    """A checkpoint's folder, whose files are all there and match their checksums.

    Args:
        path: the folder.
        part: (0, 1) where this process checks every file; (rank, processes) where they divide the shards' files among themselves.

    Attributes:
        rest: the file of what is no tensor.
        tensors: every tensor's shape and type, by name: tensors without memory.

    Raises:
        CheckpointError: a file is missing, truncated or damaged, and the message names it; or the folder is no checkpoint.
    """

    def __init__(self, path: Path, part: tuple[int, int] = (0, 1)):
        self.path, self.rest = path, path / REST
        files = self._manifest()
        rank, world = part
        for name in [REST, METADATA, *sorted(files.keys() - {REST, METADATA})[rank::world]]:
            with refused_as_damaged(path / name):
                if (path / name).stat().st_size != files[name]["bytes"]:
                    raise ValueError(f"it has {(path / name).stat().st_size} bytes of {files[name]['bytes']}")
                if signature(path / name) != files[name]:
                    raise ValueError("it does not match its checksum")
        with refused_as_damaged(path / METADATA):
            self._metadata = unpickled(path / METADATA)
            kept = self._metadata.state_dict_metadata
            for name, tensor in kept.items():
                if not isinstance(tensor, TensorStorageMetadata):
                    raise ValueError(f"{name} is no tensor")
                if sum(math.prod(part.sizes) for part in tensor.chunks) != math.prod(tensor.size):
                    raise ValueError(f"the parts of {name} do not make a whole")
            strangers = {part.relative_path for part in self._metadata.storage_data.values()} - files.keys()
            if strangers:
                raise ValueError(f"{min(strangers)} is not in {MANIFEST}")
            self.tensors = {name: torch.empty(t.size, dtype=t.properties.dtype, device="meta") for name, t in kept.items()}

    def read(self, into: dict[str, Tensor]) -> None:
        """Fill tensors, whole ones or this process's shares in DTensors: no process waits for another.

        Raises:
            CheckpointError: a part cannot be read.
        """
        with refused_as_damaged(self.path), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # what no_dist asks for
            dcp.load(into, storage_reader=_Reader(self.path, self._metadata), no_dist=True)

    def _manifest(self) -> dict[str, dict[str, Any]]:
        """What the manifest says of the files, by their names."""
        if not (self.path / MANIFEST).is_file():
            raise CheckpointError(f"there is no checkpoint {self.path}: the folder has no {MANIFEST}; check the path, or take another one")
        with refused_as_damaged(self.path / MANIFEST):
            manifest = json.loads((self.path / MANIFEST).read_text())
            if manifest["format"] != FORMAT:
                raise ValueError(f"its format is {manifest['format']!r}, not {FORMAT!r}")
            for name, kept in manifest["files"].items():
                if name != Path(name).name or kept.keys() != {"bytes", "sha256"}:
                    raise ValueError(f"what it says of {name!r}")
            missing = {REST, METADATA} - manifest["files"].keys()
            if missing:
                raise ValueError(f"it does not tell of {min(missing)}")
            return manifest["files"]


class _Writer(dcp.FileSystemWriter):
    """Writes what is the same wherever it is written."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # the usual one holds the path


class _Reader(dcp.FileSystemReader):
    """Reads by metadata that were read before, and checked."""

    def __init__(self, path: Path, metadata: Metadata):
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in it")
        return super().find_class(module, name)


def unpickled(path: Path) -> Metadata:
    """What a file of torch.distributed.checkpoint's metadata holds."""
    with open(path, "rb") as file:
        metadata = _Unpickler(file).load()
    if not isinstance(metadata, Metadata):
        raise ValueError(f"it holds a {type(metadata).__name__}")
    return metadata


@contextlib.contextmanager
def refused_as_damaged(path: Path) -> Iterator[None]:
    """Whatever goes wrong with a file is damage to it."""
    try:
        yield
    except (Exception, CheckpointException) as error:  # the latter is no Exception; and an unpickler raises what it stumbles over
        if isinstance(error, CheckpointException):
            error = next(iter(error.failures.values()))[0]
        reason = "it is missing" if isinstance(error, FileNotFoundError) else f"{error}".partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} is truncated, damaged or not of a wejepa checkpoint ({reason}): take another one") from error


def signature(path: Path) -> dict[str, Any]:
    """A file's size and checksum, as the manifest keeps them."""
    with open(path, "rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
