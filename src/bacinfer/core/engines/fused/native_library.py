"""Compiles `native.cpp` for this machine, once, and loads it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from bacinfer import files

logger = logging.getLogger("bacinfer")

SOURCE = Path(__file__).with_name("native.cpp")
_COMPILE_SECONDS = 120


class NativeUnavailableError(RuntimeError):
    """Why compiled code cannot be had here, as the end of a sentence ("there is no …")."""


@functools.cache
def native_library() -> ctypes.CDLL:
    """The compiled library, from the user's cache directory if it was compiled before.

    The directory is ``$BACINFER_CACHE_DIR``, or ``bacinfer`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; the compiler is
    ``$CXX``, or ``c++``.

    Raises:
        NativeUnavailableError: there is no compiler, or it fails.
    """
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if not compiler or shutil.which(compiler[0]) is None:
        raise NativeUnavailableError(f"there is no C++ compiler ({' '.join(compiler) or 'CXX is empty'})")
    flags = ["-O3", "-std=c++17", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread", _native_flag()]
    command = [*compiler, *flags, str(SOURCE)]
    directory = _cache_directory()
    path = directory / f"native-{_digest(command)}.so"
    try:
        if not path.is_file():
            _compile(command, path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailableError(f"compiled code cannot be kept in {directory} ({error})") from error


def _compile(command: list[str], path: Path) -> None:
    logger.info("compiling %s, once for this machine", path)
    with files.atomic_write(path) as temporary:
        try:
            subprocess.run(
                [*command, "-o", str(temporary)], check=True, capture_output=True, text=True, timeout=_COMPILE_SECONDS
            )
        except subprocess.CalledProcessError as error:
            raise NativeUnavailableError(
                f"the compiler failed: {shlex.join(command)}: {error.stderr[-500:]}"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise NativeUnavailableError(f"the compiler took more than {_COMPILE_SECONDS} s") from error


def _cache_directory() -> Path:
    if "BACINFER_CACHE_DIR" in os.environ:
        return Path(os.environ["BACINFER_CACHE_DIR"])
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bacinfer"
    except RuntimeError:  # no home directory
        return Path(tempfile.gettempdir()) / f"bacinfer-{os.getuid()}"


def _native_flag() -> str:
    """For the instructions that this very processor has."""
    return "-march=native" if platform.machine().lower() in ("x86_64", "amd64", "i686") else "-mcpu=native"


def _digest(command: list[str]) -> str:
    """Of all that the compiled code depends on: the source, the compiler and its flags, the processor."""
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=False).stdout
    parts = [SOURCE.read_text(), shlex.join(command), version, platform.platform(), _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
