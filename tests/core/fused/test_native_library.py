from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bacinfer import FastDiffusionPolicy
from bacinfer.core.engines.fused import native as native_module
from bacinfer.core.engines.fused import native_library as library_module
from bacinfer.core.engines.fused import runners
from bacinfer.core.engines.fused.native_library import NativeUnavailableError, native_library
from core.fused.fused_helpers import act, act_with, apply_cache, assert_agree, make_policy, with_cache

Load = Callable[[], ctypes.CDLL]
Start = Callable[[], "subprocess.Popen[str]"]

REAL_SOURCE = library_module.SOURCE
SMALL_SOURCE = 'extern "C" int panel_width() { return 16; }'
CHILD = "import runpy, sys; print(runpy.run_path(sys.argv[1])['native_library']().panel_width())"

AVX512 = Path("/proc/cpuinfo").is_file() and "avx512f" in Path("/proc/cpuinfo").read_text()
SOMEBODY_ELSE = 12345
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to somebody else")


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache directory that is not there yet, for a source that compiles in no time."""
    directory, source = tmp_path / "cache", tmp_path / "native.cpp"
    source.write_text(SMALL_SOURCE)
    monkeypatch.setattr(library_module, "SOURCE", source)
    monkeypatch.setenv("BACINFER_CACHE_DIR", str(directory))
    return directory


@pytest.fixture
def load(cache: Path) -> Load:
    """`native_library` without what this process loaded before."""
    return native_library.__wrapped__


@pytest.fixture
def kept(load: Load, cache: Path) -> Path:
    """A library that was compiled before."""
    load()
    (path,) = cache.iterdir()
    return path


@pytest.fixture
def start(cache: Path) -> Start:
    """Starts a process that loads the library."""
    module = shutil.copy(library_module.__file__, cache.parent)  # beside the source of this test

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", CHILD, module], text=True, stdout=subprocess.PIPE)

    return start


@pytest.fixture
def no_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled"))


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: pytest.fail("loaded"))


# -- compiling -------------------------------------------------------------------------------------------------------


def test_it_is_compiled_once(kept: Path, load: Load, no_compiling: None) -> None:
    assert load().panel_width() == 16
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_another_compiler_gets_another_file(load: Load, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "c++ -DANOTHER")
    load()
    assert len(list(kept.parent.iterdir())) == 2


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("no-such-compiler", r"there is no C\+\+ compiler \(no-such-compiler\)"),
        ("c++ -fno-such-flag", "the compiler failed.*no-such-flag"),
        ("c++ -DNAME='it", "CXX is .*, which is no command line"),
    ],
)
def test_a_compiler_that_is_missing_or_fails(
    load: Load, compiler: str, message: str, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(NativeUnavailableError, match=message):
        load()
    assert not list(cache.glob("*"))  # nothing half-written


@pytest.mark.usefixtures("kept")
def test_a_kept_library_needs_no_compiler(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert load().panel_width() == 16


def test_without_a_compiler_programs_run_from_python(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    native_library.cache_clear()
    runners._warn_once.cache_clear()
    try:
        policy = make_policy()
        eager = with_cache(policy, "eager", cache_threshold=3)
        apply_cache(policy, cache_threshold=3)
        with caplog.at_level(logging.WARNING, "bacinfer"):
            assert_agree(act(policy), eager)
        (record,) = caplog.records
        assert "there is no C++ compiler (no-such-compiler)" in record.getMessage()
        assert FastDiffusionPolicy.summary(policy).engine == "fused"
    finally:
        native_library.cache_clear()
    assert os.listdir(cache) == []


def test_several_processes_compile_at_once(start: Start, cache: Path) -> None:
    children = [start() for _ in range(4)]
    assert [child.communicate(timeout=300)[0] for child in children] == ["16\n"] * 4
    assert [path.suffix for path in cache.iterdir()] == [".so"]


def test_it_is_on_the_disk_before_it_has_its_name(load: Load, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Path]] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(list(cache.glob("*.so"))))
    load()
    assert seen == [[]]


@pytest.mark.skipif(not AVX512, reason="needs a processor with AVX-512")
@pytest.mark.parametrize(("flag", "width"), [("-mavx512f", 32), ("-mno-avx512f", 16)])
def test_vectors_are_as_wide_as_the_compiler_is_told(
    load: Load, flag: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_module, "SOURCE", REAL_SOURCE)
    monkeypatch.setenv("CXX", f"c++ {flag}")
    assert load().panel_width() == width


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:5000], lambda content: bytes(len(content)), lambda content: b""],
    ids=["truncated", "zeros", "empty"],
)
def test_a_damaged_library_is_compiled_anew(kept: Path, damage: Callable[[bytes], bytes], start: Start) -> None:
    content = kept.read_bytes()
    kept.unlink()  # this process has loaded it, and would end with the file that it maps
    kept.write_bytes(damage(content))
    child = start()
    assert child.communicate(timeout=300)[0] == "16\n"
    assert child.returncode == 0  # and no signal
    assert content in [path.read_bytes() for path in kept.parent.iterdir()]


# -- where it is kept ------------------------------------------------------------------------------------------------


def without_home(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> Path:
    """What the cache directory is then."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for variable in ("BACINFER_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return temporary / f"bacinfer-{os.geteuid()}"


def test_what_is_made_is_the_users_alone(load: Load, cache: Path) -> None:
    before = os.umask(0)
    try:
        load()
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (cache, *cache.iterdir())] == [0o700, 0o600]


def test_a_file_that_others_may_write_is_compiled_anew(load: Load, kept: Path) -> None:
    kept.chmod(0o666)
    assert load().panel_width() == 16
    assert kept.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o1777])
def test_a_directory_that_others_may_write_is_refused(load: Load, kept: Path, no_loading: None, mode: int) -> None:
    kept.parent.chmod(mode)
    with pytest.raises(NativeUnavailableError, match=rf"can be written by others \(mode {mode:o}\); make it yours"):
        load()


def test_a_directory_that_somebody_prepared_is_refused(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_loading: None
) -> None:
    directory = without_home(monkeypatch, tmp_path)
    directory.mkdir()
    directory.chmod(0o777)
    with pytest.raises(NativeUnavailableError, match="can be written by others"):
        load()
    assert list(directory.iterdir()) == []


def test_a_directory_of_somebody_else_is_refused(
    load: Load, kept: Path, no_loading: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(NativeUnavailableError, match=f"belongs to user {me}, not to you"):
        load()


@only_root
def test_root_refuses_the_directories_of_users(load: Load, kept: Path, no_loading: None) -> None:
    os.chown(kept.parent, SOMEBODY_ELSE, -1)
    with pytest.raises(NativeUnavailableError, match=f"belongs to user {SOMEBODY_ELSE}, not to you"):
        load()


@pytest.mark.parametrize("owner", [os.geteuid(), pytest.param(SOMEBODY_ELSE, marks=only_root)])
def test_a_link_is_followed_if_it_is_the_users_own(
    load: Load, kept: Path, owner: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "link"
    link.symlink_to(kept.parent)
    os.chown(link, owner, -1, follow_symlinks=False)
    monkeypatch.setenv("BACINFER_CACHE_DIR", str(link))
    if owner == os.geteuid():
        assert load().panel_width() == 16
    else:
        with pytest.raises(NativeUnavailableError, match=f"belongs to user {owner}, not to you"):
            load()


def test_a_directory_in_the_temporary_one_replaces_a_home(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = without_home(monkeypatch, tmp_path)
    assert load().panel_width() == 16
    assert directory.stat().st_mode & 0o777 == 0o700


def test_an_empty_variable_is_none(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACINFER_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load()
    assert len(list((tmp_path / "xdg" / "bacinfer").iterdir())) == 1


@pytest.mark.parametrize("variable", ["BACINFER_CACHE_DIR", "XDG_CACHE_HOME"])
def test_a_relative_directory_is_refused(
    load: Load, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")
    monkeypatch.delenv("BACINFER_CACHE_DIR")
    monkeypatch.setenv(variable, "somewhere")
    with pytest.raises(NativeUnavailableError, match=r"is 'somewhere.*', which is no absolute path"):
        load()
    assert os.listdir() == []


def test_a_directory_that_cannot_be_made(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BACINFER_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(NativeUnavailableError, match=r"cannot be kept in .*; set BACINFER_CACHE_DIR"):
        load()


# -- what it must agree with -----------------------------------------------------------------------------------------


def test_structs_of_another_layout_never_run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class _Norm(ctypes.Structure):
        _fields_ = (("weight", ctypes.c_void_p), ("epsilon", ctypes.c_float), ("bias", ctypes.c_void_p))

    policy = make_policy()
    expected = act_with(policy, "fused", cache_threshold=3)
    monkeypatch.setattr(native_module, "_STRUCTS", (_Norm, *native_module._STRUCTS[1:]))
    runners._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "bacinfer"):
        found = act_with(policy, "fused", cache_threshold=3)
    (record,) = caplog.records
    assert "has the struct 'Norm 24 weight 0 bias 8 epsilon 16', where native.py has 'Norm 24" in record.getMessage()
    assert not torch.equal(found, expected)  # as PyTorch computed it
    assert_agree(found, with_cache(policy, "eager", cache_threshold=3))
