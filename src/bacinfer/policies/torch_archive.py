"""Files of ``torch.save``, read by our own hand: `safe_pickle` says why."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import torch

from bacinfer import safe_pickle
from bacinfer.safe_zip import open_zip


def read_archive(path: Path, allowed: safe_pickle.Allowed) -> Any:
    """What a file of ``torch.save`` holds, its tensors on the CPU; unchecked as `safe_pickle.RestrictedUnpickler`'s.

    The archive is a folder with a pickle, ``data.pkl``, and a file for each storage, ``data/<key>``.

    Raises:
        FileNotFoundError: there is no such file.
        safe_pickle.UnsafePickleError: it asks for something that is not admitted.
        ValueError: it is damaged, or another kind of file.
    """
    with open_zip(path) as archive:
        names = {name.split("/", 1)[-1]: name for name in archive.namelist()}
        if "constants.pkl" in names:
            raise ValueError("a TorchScript program")
        if "data.pkl" not in names:
            raise ValueError("a zip archive, but not one of PyTorch: it has no data.pkl")
        if "byteorder" in names and archive.read(names["byteorder"]) != b"little":
            raise ValueError("written by a big-endian machine")
        return _ArchiveUnpickler(archive, names, allowed).load()


class _ArchiveUnpickler(safe_pickle.RestrictedUnpickler):
    def __init__(self, archive: zipfile.ZipFile, names: dict[str, str], allowed: safe_pickle.Allowed) -> None:
        data = archive.read(names["data.pkl"])
        super().__init__(io.BytesIO(data), allowed, safe_pickle.memory_limit(len(data)))
        self._archive = archive
        self._names = names
        self._storages: dict[str, torch.UntypedStorage] = {}  # tensors share them

    def persistent_load(self, pid: Any) -> safe_pickle.Storage:
        found = safe_pickle.StorageId.parse(pid)
        if found.key not in self._storages:
            self._storages[found.key] = self._read_storage(found.key)
        memory = self._storages[found.key]
        if memory.nbytes() != found.size:
            raise safe_pickle.UnsafePickleError(
                f"it has a storage of {found.size} bytes, but the archive has {memory.nbytes()} for it"
            )
        return safe_pickle.Storage(memory, found.dtype)

    def _read_storage(self, key: str) -> torch.UntypedStorage:
        entry = self._archive.getinfo(self._names[f"data/{key}"])
        memory = torch.empty(entry.file_size, dtype=torch.uint8)
        with self._archive.open(entry) as file:  # compares the checksum as well
            read = file.readinto(memory.numpy())  # type: ignore[attr-defined]
        if read != entry.file_size:
            raise EOFError(f"{entry.filename} ends after {read} of {entry.file_size} bytes")
        return memory.untyped_storage()
