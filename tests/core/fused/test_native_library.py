from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from bacinfer import FastDiffusionPolicy
from bacinfer.core.engines.fused import native_library as library_module
from bacinfer.core.engines.fused import runners
from bacinfer.core.engines.fused.native_library import NativeUnavailableError, native_library
from core.fused.fused_helpers import act, act_with, apply_cache, make_policy


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    """`native_library` with an empty cache directory, and without what this process loaded before."""
    monkeypatch.setenv("BACINFER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(library_module, "native_library", native_library.__wrapped__)
    return native_library.__wrapped__


def test_it_is_compiled_once(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    assert load().panel_width() in (16, 32)
    (compiled,) = (tmp_path / "cache").iterdir()
    before = compiled.stat().st_mtime_ns
    monkeypatch.setattr(library_module, "_compile", lambda *_: pytest.fail("compiled again"))
    assert load().panel_width() in (16, 32)
    assert compiled.stat().st_mtime_ns == before


def test_another_compiler_gets_another_file(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    load()
    monkeypatch.setenv("CXX", "c++ -DANOTHER")
    load()
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(
    ("compiler", "message"),
    [("no-such-compiler", "there is no C\\+\\+ compiler"), ("c++ -fno-such-flag", "the compiler failed.*no-such-flag")],
)
def test_a_compiler_that_is_missing_or_fails(load, compiler: str, message: str, monkeypatch, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(NativeUnavailableError, match=message):
        load()
    assert not list(tmp_path.glob("cache/*"))  # nothing half-written


def test_a_cache_directory_that_cannot_be_used(load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "file").touch()
    monkeypatch.setenv("BACINFER_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(NativeUnavailableError, match="cannot be kept in"):
        load()


def test_without_a_compiler_programs_run_from_python(monkeypatch, tmp_path: Path, caplog) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("BACINFER_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    native_library.cache_clear()
    runners._warn_once.cache_clear()
    try:
        policy = make_policy()
        expected = act_with(policy, "eager", cache_threshold=3)
        apply_cache(policy, cache_threshold=3)
        with caplog.at_level(logging.WARNING, "bacinfer"):
            assert (act(policy) - expected).abs().max() < 1e-5
        (record,) = caplog.records
        assert "there is no C++ compiler (no-such-compiler)" in record.getMessage()
        assert FastDiffusionPolicy.summary(policy).engine == "fused"
    finally:
        native_library.cache_clear()
    assert os.listdir(tmp_path) == []
