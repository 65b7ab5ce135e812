"""Compiles `native.cpp` and its headers for this machine, once, and loads it.

The cache directory holds ``native-<key>-<digest>.so``. The key stands for what was compiled and for which machine; the
digest is the file's own, so that a file that was cut short or overwritten is compiled anew instead of loaded: it would
end the process. As the name is the digest, processes that compile at the same time do not disturb each other.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger("bacinfer")

SOURCE = Path(__file__).with_name("native.cpp")
COMPILER_OPTIONS = ("-O3", "-std=c++17", "-ffp-contract=fast", "-pthread")
_COMPILE_SECONDS = 120
_OPENMP = ("GOMP_parallel", "omp_get_num_threads")
_LOADED = getattr(os, "RTLD_NOLOAD", 0) | os.RTLD_NOW  # a library that the process has, no other copy


class NativeUnavailableError(RuntimeError):
    """Why compiled code cannot be had here, as the end of a sentence ("there is no …")."""


@functools.cache
def native_library() -> ctypes.CDLL:
    """The compiled library, from the user's cache directory if it was compiled before.

    The directory is ``$BACINFER_CACHE_DIR``, or ``bacinfer`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; the compiler is
    ``$CXX``, or ``c++``. It is needed only where there is no compiled library.

    Raises:
        NativeUnavailableError: there is no compiler, or it fails, or the directory is not the user's alone.
    """
    command, directory = _compiler_command(), _cache_directory()
    key = _key(command)
    try:
        directory.mkdir(0o700, parents=True, exist_ok=True)
        risk = _risk(directory)
        if risk is not None:
            raise NativeUnavailableError(
                f"{directory}, from which code would be loaded, {risk}; make it yours alone, or set BACINFER_CACHE_DIR "
                f"to a directory that is"
            )
        return ctypes.CDLL(str(_find(directory, key) or _compile(command, directory, key)))
    except OSError as error:
        raise NativeUnavailableError(
            f"compiled code cannot be kept in {directory} ({error}); set BACINFER_CACHE_DIR to another directory"
        ) from error


@functools.cache
def openmp() -> tuple[ctypes.c_void_p | None, ctypes.c_void_p | None]:
    """What starts threads of PyTorch's OpenMP, and what counts them; None, None where that is not known to be GNU's.

    PyTorch's wheels for Linux bring GNU's with them (``GOMP_parallel``). Other packages may have brought theirs too.
    """
    found = list(Path(torch.__file__).with_name("lib").glob("libgomp*.so*"))
    if len(found) != 1:
        return None, None
    try:
        library = ctypes.CDLL(str(found[0]), mode=_LOADED)
        start, count = (ctypes.cast(getattr(library, name), ctypes.c_void_p) for name in _OPENMP)
    except (OSError, AttributeError):  # PyTorch has not loaded it, or it is another one
        return None, None
    return start, count


def _compiler_command() -> list[str]:
    given = os.environ.get("CXX", "").strip() or "c++"
    try:
        compiler = shlex.split(given)
    except ValueError as error:
        raise NativeUnavailableError(f"CXX is {given!r}, which is no command line ({error})") from error
    return [*compiler, *COMPILER_OPTIONS, "-shared", "-fPIC", _native_flag()]


def _native_flag() -> str:
    """For the instructions that this very processor has."""
    return "-march=native" if platform.machine().lower() in ("x86_64", "amd64", "i686") else "-mcpu=native"


def _cache_directory() -> Path:
    given = os.environ.get("BACINFER_CACHE_DIR")
    if given:
        directory = Path(given)
    else:
        try:
            directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bacinfer"
        except RuntimeError:  # no home directory
            directory = Path(tempfile.gettempdir()) / f"bacinfer-{os.geteuid()}"
    if not directory.is_absolute():
        raise NativeUnavailableError(
            f"the cache directory is {str(directory)!r}, which is no absolute path; set BACINFER_CACHE_DIR to one"
        )
    return directory


def _risk(path: Path) -> str | None:
    """Why somebody else may have made what is there, as the end of a sentence about it; None: only the user may."""
    for found in (path.lstat(), path.stat()):  # a link, and what it leads to
        if found.st_uid != os.geteuid():
            return f"belongs to user {found.st_uid}, not to you"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written by others (mode {stat.S_IMODE(found.st_mode):o})"
    return None


def _key(command: list[str]) -> str:
    """Of all that the compiled code depends on: the source, the compiler and its flags, the system, the processor.

    But not the compiler's version: what another one made is as good, and it may be gone.
    """
    system = (platform.system(), platform.machine(), *platform.libc_ver(), _processor())
    sources = [path.read_text() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
    return _digest("\0".join([*sources, shlex.join(command), *system]).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _find(directory: Path, key: str) -> Path | None:
    """A library that was compiled before and is as it was then."""
    for path in directory.glob(f"native-{key}-*.so"):
        if _risk(path) is None and path.stem.endswith(_digest(path.read_bytes())):
            return path
    return None


def _compile(command: list[str], directory: Path, key: str) -> Path:
    if shutil.which(command[0]) is None:
        raise NativeUnavailableError(f"there is no C++ compiler ({command[0]})")
    logger.info("compiling %s into %s, once for this machine", SOURCE.name, directory)
    with tempfile.TemporaryDirectory(prefix=".compiling-", dir=directory) as temporary:
        library = Path(temporary, "native.so")
        command = [*command, str(SOURCE), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
        except subprocess.CalledProcessError as error:
            raise NativeUnavailableError(
                f"the compiler failed: {shlex.join(command)}: {error.stderr[-500:]}"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise NativeUnavailableError(f"the compiler took more than {_COMPILE_SECONDS} s") from error
        library.chmod(stat.S_IRUSR | stat.S_IWUSR)
        with library.open("rb") as file:
            path = directory / f"native-{key}-{_digest(file.read())}.so"
            os.fsync(file.fileno())
        return library.replace(path)
