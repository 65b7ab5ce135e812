from __future__ import annotations

from collections.abc import Iterator

import pytest

from bacinfer.core.engines.fused import native, runners
from core.fused.native_executable import EMULATOR, ExecutableLibrary, ExecutableProgram, NativeExecutable


@pytest.fixture(scope="session")
def native_executable(tmp_path_factory: pytest.TempPathFactory) -> NativeExecutable:
    return NativeExecutable(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="session", autouse=bool(EMULATOR))
def _emulated(native_executable: NativeExecutable) -> Iterator[None]:
    """Programs run in the executable, wherever they would run in the library."""
    library = ExecutableLibrary(native_executable)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(native, "native_library", lambda: library)
        monkeypatch.setattr(runners, "NativeProgram", ExecutableProgram)
        yield
