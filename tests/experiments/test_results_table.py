"""The results table: what is written is read, by any number of processes, whatever happens to one of them."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bacinfer.experiments.results_table import ResultsTable
from small_experiments import make_row


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20),
    st.floats(allow_nan=False),
    st.one_of(st.none(), st.integers()),
)
def test_what_is_written_is_read(tmp_path: Path, text: str, number: float, seed: int | None) -> None:
    table = ResultsTable(tmp_path / str(hash((text, number, seed))))
    row = make_row(label=text, speedup=number, training_seed=seed, score=None if seed is None else number)
    table.append(row)
    assert table.rows() == [row]
    assert table.find("a") == row
    assert table.find("b") is None


def test_the_last_row_of_a_key_counts(tmp_path: Path) -> None:
    table = ResultsTable(tmp_path)
    assert table.rows() == []
    for row in (make_row("a", n_test=1), make_row("b"), make_row("a", n_test=2)):
        table.append(row)
    assert [(row.key, row.n_test) for row in table.rows()] == [("a", 2), ("b", 3)]
    assert len(table.path.read_text().splitlines()) == 4


@pytest.mark.parametrize("cut", [1, 2, 5, 100])
def test_a_torn_last_line_is_dropped(tmp_path: Path, cut: int) -> None:
    table = ResultsTable(tmp_path)
    table.append(make_row("a"))
    table.append(make_row("b", label='quoted, "label"', finished="höher"))
    table.path.write_bytes(table.path.read_bytes()[:-cut])
    assert [row.key for row in table.rows()] == ["a"]
    table.append(make_row("c"))
    assert [row.key for row in table.rows()] == ["a", "c"]


def test_a_torn_header_is_dropped(tmp_path: Path) -> None:
    table = ResultsTable(tmp_path)
    table.path.write_text("key,tas")
    assert table.rows() == []
    table.append(make_row("a"))
    assert table.rows() == [make_row("a")]


@pytest.mark.parametrize("content", ["Method,Steps\nBAC,10\n", "notes"])
def test_what_is_no_table_is_left_alone(tmp_path: Path, content: str) -> None:
    table = ResultsTable(tmp_path)
    table.path.write_text(content)
    for use in (table.rows, lambda: table.append(make_row())):
        with pytest.raises(ValueError, match="no results table of this version"):
            use()
    assert table.path.read_text() == content


@pytest.mark.parametrize(("damage", "message"), [("text,", "line 2: expected"), (",three,", "line 2: .*three")])
def test_a_damaged_line_is_named(tmp_path: Path, damage: str, message: str) -> None:
    table = ResultsTable(tmp_path)
    table.append(make_row())
    content = table.path.read_text()
    header, line = content.splitlines()
    table.path.write_text(f"{header}\n{damage + line if 'text' in damage else line.replace(',3,', damage, 1)}\n")
    with pytest.raises(ValueError, match=message):
        table.rows()


@pytest.mark.parametrize("foreign", [b"", b"# a note", b'"not closed', b"\xff\xfe", b"nul\0", b"<<<<<<< HEAD"])
def test_a_foreign_line_is_named(tmp_path: Path, foreign: bytes) -> None:
    table = ResultsTable(tmp_path)
    for key in "abc":
        table.append(make_row(key))
    lines = table.path.read_bytes().splitlines(keepends=True)
    content = b"".join([*lines[:2], foreign + b"\n", *lines[2:]])
    table.path.write_bytes(content)
    for use in (table.rows, lambda: table.append(make_row("d"))):
        with pytest.raises(ValueError, match=rf"{table.path}, line 3: .*; delete the line, or restore it"):
            use()
    assert table.path.read_bytes() == content


def test_a_table_that_an_editor_saved(tmp_path: Path) -> None:
    table = ResultsTable(tmp_path)
    table.append(make_row("a"))
    table.path.write_bytes(table.path.read_bytes().replace(b"\n", b"\r\n"))
    assert table.rows() == [make_row("a")]


def test_a_line_break_would_be_a_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line break"):
        ResultsTable(tmp_path).append(make_row(label="two\nlines"))


def append_many(directory: Path, worker: int, count: int) -> None:
    table = ResultsTable(directory)
    for number in range(count):
        table.append(make_row(f"{worker}-{number}", label="x" * 500))


def test_two_processes_never_clobber_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=append_many, args=(tmp_path, worker, 20)) for worker in range(2)]
    for process in workers:
        process.start()
    for process in workers:
        process.join()
    assert [process.exitcode for process in workers] == [0, 0]
    rows = ResultsTable(tmp_path).rows()
    assert {row.key for row in rows} == {f"{worker}-{number}" for worker in range(2) for number in range(20)}
    assert rows[0] == replace(make_row(label="x" * 500), key=rows[0].key)


def hold(directory: Path, claimed: Any) -> None:
    with ResultsTable(directory).claim("a"):
        claimed.set()
        multiprocessing.Event().wait()


def test_a_claim_ends_with_its_process(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    claimed = context.Event()
    worker = context.Process(target=hold, args=(tmp_path, claimed))
    worker.start()
    assert claimed.wait(60)
    worker.kill()
    worker.join()
    with ResultsTable(tmp_path).claim("a"):
        pass
