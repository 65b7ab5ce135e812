"""The store of results: what is written is read, by any number of processes, whatever happens to one of them."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bacinfer.experiments.store import ResultsStore
from small_experiments import make_row


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.floats(allow_nan=False),
    st.none() | st.integers(),
)
def test_what_is_written_is_read(tmp_path: Path, text: str, number: float, seed: int | None) -> None:
    store = ResultsStore(tmp_path / str(hash((text, number, seed))))
    parts = None if seed is None else {"p1": {"mean": number}}
    row = make_row(
        label=text, speedup=number, training_seed=seed, score=None if seed is None else number, sub_scores=parts
    )
    store.write(row)
    assert store.rows() == [row]
    assert store.find("a") == row
    assert store.find("b") is None


def test_rows_are_in_the_order_in_which_runs_finished(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    assert store.rows() == []
    for key, second in (("c", 1), ("a", 3), ("b", 2)):
        store.write(make_row(key, finished=f"2026-01-01T00:00:0{second}.000+00:00"))
    assert [row.key for row in store.rows()] == ["c", "b", "a"]


def test_the_last_row_of_a_run_counts(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    for row in (make_row("a", n_test=1), make_row("b"), make_row("a", n_test=2)):
        store.write(row)
    assert [(row.key, row.n_test) for row in store.rows()] == [("a", 2), ("b", 3)]


def test_a_killed_writer_leaves_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    store = ResultsStore(tmp_path)
    store.write(make_row("a"))
    monkeypatch.setattr("os.replace", killed)
    for key in "ab":
        with pytest.raises(KeyboardInterrupt):
            store.write(make_row(key, n_test=100))
    assert store.rows() == [make_row("a")]


def test_runs_can_be_copied_and_deleted(tmp_path: Path) -> None:
    one, other = ResultsStore(tmp_path / "one"), ResultsStore(tmp_path / "other")
    rows = [make_row(key) for key in "ab"]
    for row in rows:
        one.write(row)
    shutil.copytree(one.directory / rows[0].directory, other.directory / rows[0].directory)
    shutil.rmtree(one.directory / rows[0].directory)
    assert (one.rows(), other.rows()) == ([rows[1]], [rows[0]])


def test_results_of_an_earlier_version_are_refused(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    table = tmp_path / "results_table.csv"
    table.write_text("key,task\n")
    for use in (store.rows, store.check, lambda: store.find("a")):
        with pytest.raises(ValueError, match=f"{table} is of an earlier version .* Choose another results directory"):
            use()
    assert table.read_text() == "key,task\n"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: "", "line 1: this is no JSON"),
        (lambda data: "<<<<<<< HEAD\n" + json.dumps(data), "line 1: this is no JSON"),
        (
            lambda data: json.dumps(data, indent=2).replace('"n_test": 3', '"n_test": three'),
            r"line \d\d: this is no JSON",
        ),
        (lambda data: "[]", "no row of this version"),
        (lambda data: json.dumps({**data, "more": 1}), "no row of this version"),
        (lambda data: json.dumps({**data, "n_test": "three"}), "n_test is 'three', expected int"),
        (lambda data: json.dumps({**data, "flops": None}), "flops is None, expected int"),
        (lambda data: json.dumps({**data, "key": "b"}), "is the row of runs/text-b"),
    ],
)
def test_a_damaged_row_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    store = ResultsStore(tmp_path)
    store.write(make_row("a"))
    store.write(make_row("c"))
    path = tmp_path / make_row("a").directory / "row.json"
    path.write_text(damage(json.loads(path.read_text())))
    content = path.read_text()
    for use in (store.rows, lambda: store.find("a")):
        with pytest.raises(ValueError, match=rf"{path}.*{message}.*delete the file, and run the command again"):
            use()
    assert path.read_text() == content
    assert store.find("c") == make_row("c")  # the others go on


def write_many(directory: Path, worker: int, count: int) -> None:
    store = ResultsStore(directory)
    for number in range(count):
        store.write(make_row(f"{worker}-{number}", label="x" * 500))
        store.write(make_row("shared", label=str(worker) * 500))
        store.rows()


def test_two_processes_never_clobber_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write_many, args=(tmp_path, worker, 10)) for worker in range(2)]
    for process in workers:
        process.start()
    for process in workers:
        process.join()
    assert [process.exitcode for process in workers] == [0, 0]
    rows = ResultsStore(tmp_path).rows()
    assert {row.key for row in rows} == {
        "shared",
        *(f"{worker}-{number}" for worker in range(2) for number in range(10)),
    }
    assert rows[0] == replace(make_row(label="x" * 500), key=rows[0].key)


def hold(directory: Path, claimed: Any) -> None:
    with ResultsStore(directory).claim("a"):
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
    with ResultsStore(tmp_path).claim("a"):
        pass
