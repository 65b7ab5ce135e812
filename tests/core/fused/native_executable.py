"""`native.cpp` as an executable: for another processor, run by an emulator, in place of the library.

With ``BACINFER_EMULATOR`` (say ``qemu-aarch64``) and a cross compiler in ``CXX``, the tests in this directory run
programs so (`conftest.py`). A program's structs and the memory that they point to become a file, which the process
maps at the addresses that are written into it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bacinfer.core.engines.fused import native
from bacinfer.core.engines.fused.native_library import COMPILER_OPTIONS, SOURCE
from bacinfer.core.engines.fused.program import Program

MAIN = Path(__file__).with_name("native_main.cpp")
EMULATOR = shlex.split(os.environ.get("BACINFER_EMULATOR", ""))
_ADDRESS = 0x100000000000  # of the memory in the other process: far from what it has of its own
_ALIGNMENT = 64
_SECONDS = 300


class NativeExecutable:
    """Compiled with ``$CXX`` into `directory`, for the processor that it compiles for."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "native_main"
        options = [*COMPILER_OPTIONS, "-static", f'-DNATIVE_SOURCE="{SOURCE}"', str(MAIN), "-o", str(self.path)]
        subprocess.run([*shlex.split(os.environ.get("CXX", "c++")), *options], check=True, timeout=_SECONDS)

    def __call__(self, *arguments: str) -> str:
        """What it puts out."""
        command = [*EMULATOR, str(self.path), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        assert done.returncode == 0, f"{shlex.join(command)} ended with {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout


class ExecutableLibrary:
    """What a program asks the library for while it is encoded."""

    def __init__(self, executable: NativeExecutable) -> None:
        width, _, structs = executable().partition("\n")
        self.executable = executable
        self.panel_width = lambda: int(width)
        self.structs = lambda: structs.encode()


class ExecutableProgram(native.NativeProgram):
    """A program that the executable runs."""

    def __init__(self, program: Program, *, precision: str | None = None) -> None:
        super().__init__(program, precision=precision)
        self.memory = _Memory(self._struct, self._kept)

    def run(self) -> None:
        self.program.encode_condition()
        with tempfile.NamedTemporaryFile() as file:
            file.write(self.memory.image())
            file.flush()
            self._library.executable(file.name, str(_ADDRESS), str(self.num_threads))
            self.memory.load(Path(file.name).read_bytes())


class _Memory:
    """A program's struct, the arrays of structs that it points to, and the tensors that these point to."""

    def __init__(self, program: Any, tensors: list[Any]) -> None:
        blocks, instructions = (
            ctypes.cast(pointer, ctypes.POINTER(pointer._type_ * count)).contents
            for pointer, count in (
                (program.blocks, program.num_blocks),
                (program.instructions, program.num_instructions),
            )
        )
        self._structs = [program, *blocks, *instructions]
        storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
        storages.pop(0, None)  # of what has no elements
        regions = [(ctypes.addressof(part), ctypes.sizeof(part)) for part in (program, blocks, instructions)]
        self._regions = [*regions, *storages.items()]
        self._starts: dict[int, int] = {}  # where each region is in the image
        size = 0
        for address, length in self._regions:
            self._starts[address] = size
            size += -(-length // _ALIGNMENT) * _ALIGNMENT
        self._size = size

    def image(self) -> bytearray:
        image = bytearray(self._size)
        for address, length in self._regions:
            start = self._starts[address]
            image[start : start + length] = ctypes.string_at(address, length)
        for struct in self._structs:
            start = self._place(ctypes.addressof(struct))
            for offset in _pointers(type(struct)):
                slot = slice(start + offset, start + offset + 8)
                pointer = int.from_bytes(image[slot], "little")
                if pointer:
                    image[slot] = (_ADDRESS + self._place(pointer)).to_bytes(8, "little")
        return image

    def load(self, image: bytes) -> None:
        """Takes over what the tensors are now."""
        for address, length in self._regions[3:]:
            start = self._starts[address]
            ctypes.memmove(address, image[start : start + length], length)

    @functools.cached_property
    def _sorted(self) -> list[int]:
        return sorted(self._starts)

    def _place(self, address: int) -> int:
        """Where the image has what is at an address."""
        region = self._sorted[bisect_right(self._sorted, address) - 1]
        return self._starts[region] + address - region


def _pointers(struct: type[ctypes.Structure]) -> Iterator[int]:
    """The offsets of the pointers in a struct."""
    for name, kind, *_ in struct._fields_:
        offset = getattr(struct, name).offset
        if issubclass(kind, ctypes.Structure):
            yield from (offset + inner for inner in _pointers(kind))
        elif kind is ctypes.c_void_p or issubclass(kind, ctypes._Pointer):  # type: ignore[attr-defined]
            yield offset
