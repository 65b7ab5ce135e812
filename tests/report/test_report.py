"""The report: what is on the page, what is said where something is missing, and what is an error."""

from __future__ import annotations

import csv
import re
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from bacinfer.commands.report import main
from bacinfer.core.schedule import CacheSchedule
from bacinfer.experiments.store import ResultsStore
from bacinfer.report.page import write_report
from bacinfer.report.sections import comparisons
from bacinfer.report.sections.runs import run_table
from bacinfer.report.sections.schedules import schedule_map
from bacinfer.report.table import export_parquet, format_methods
from report.report_helpers import (
    ASSETS,
    BLOCKS,
    SELECTED,
    K,
    bac_row,
    plain_row,
    read_map,
    similarity,
    write_many_results,
    write_results,
    write_run,
    write_table,
)

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">$x_$'


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write_results(tmp_path / "results")


def test_everything_is_on_one_page(results: Path) -> None:
    html = write_report(results).read_text()
    for text in (
        "BAC 5, BU 1",
        "a computer (cpu), 3 threads",
        "batch 1",
        f"K = {K}",
        "[0.200, 0.300]",
        "plain: score 0.50",
    ):
        assert text in html
    assert html.count("<video") == 2
    assert html.count('src="data:video/mp4;base64,') == 2
    assert html.count("<svg") == 4  # Pareto, schedule, similarities, errors
    assert html.count('class="selected"') == 1
    assert read_map(html)["blocks"] == BLOCKS


def test_the_page_refers_to_nothing_that_it_needs(results: Path) -> None:
    html = write_report(results).read_text()
    assert "default-src 'none'" in html
    assert not re.findall(r"""(?:src|srcset|poster)=["'](?!data:)""", html)
    assert not re.findall(r"""url\(["']?(?!#)|@import|<link|<iframe""", html)
    assert not [link for link in re.findall(r'<a href="([^"]*)"', html) if not (results / link).is_file()]


def test_pictures_lie_beside_it_as_png_and_svg(results: Path, tmp_path: Path) -> None:
    page = write_report(results, tmp_path / "elsewhere" / "page.html")
    figures = page.with_name("page_figures")
    names = {path.stem.split("-")[0] for path in figures.rglob("*.png")}
    assert names == {"pareto", "schedules", "similarity_cosine", "block_errors"}
    assert {path.with_suffix(".png") for path in figures.rglob("*.svg")} == set(figures.rglob("*.png"))
    assert not list(results.glob("report*"))


def test_the_table_lies_beside_it_as_csv(results: Path) -> None:
    write_report(results)
    with (results / "report.csv").open(newline="", encoding="utf-8") as file:
        plain, bac = csv.DictReader(file)
    assert (plain["method"], bac["method"], bac["directory"]) == ("plain", "bac:5:1", "runs/bac-5-1-bac")
    assert (float(bac["speedup"]), bac["training_seed"], bac["sub_scores"]) == (4.0, "", "")


def test_the_table_as_parquet(results: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert main([str(results), f"--parquet={tmp_path / 'rows.parquet'}"]) == 0
    table = parquet.read_table(tmp_path / "rows.parquet")
    assert [field.name for field in table.schema] == [*asdict(plain_row()), "directory"]
    kinds = ("method", "speedup", "training_seed", "disturb", "sub_scores")
    assert [str(table.schema.field(name).type) for name in kinds] == ["string", "double", "int64", "bool", "string"]
    for row, found in zip(ResultsStore(results).rows(), table.to_pylist(), strict=True):
        assert found == {**asdict(row), "directory": row.directory}
    export_parquet(tmp_path / "rows.parquet", [replace(plain_row(), sub_scores={"p1": {"mean": 0.5}})])
    assert parquet.read_table(tmp_path / "rows.parquet")["sub_scores"].to_pylist() == ['{"p1": {"mean": 0.5}}']


def test_parquet_without_pyarrow(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main([str(results), f"--parquet={tmp_path / 'rows.parquet'}"]) == 2
    assert "pip install 'bacinfer[parquet]'" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.parquet"))


def test_similarities_are_those_to_the_step_that_is_reused() -> None:
    schedule = CacheSchedule(K, {block: [0, 5, 6] for block in BLOCKS})
    data = schedule_map("BAC", schedule, [SELECTED], "cosine", {BLOCKS[1]: similarity(1)}).data
    first, second, *others = data["similarities"]
    assert first is None
    assert others == [None] * 4
    assert second[0] is second[5] is second[6] is None
    assert second[4] == pytest.approx(similarity(1)[0, 4], rel=1e-3)
    assert second[19] == pytest.approx(similarity(1)[6, 19], rel=1e-3)


def test_similarities_of_another_k_are_not_shown() -> None:
    schedule = CacheSchedule(10, {BLOCKS[0]: [0, 5]})
    assert schedule_map("BAC", schedule, (), "cosine", {BLOCKS[0]: similarity(0)}).data["similarities"] == [None]


def test_a_map_fills_the_update_steps() -> None:
    drawn = schedule_map("BAC", CacheSchedule(K, {BLOCKS[0]: [0, 1, 2, 7], BLOCKS[1]: [0]}))
    assert drawn.updates == "M0 0h3v1h-3zM7 0h1v1h-1zM0 1h1v1h-1z"
    assert [row.label for row in drawn.rows] == ["0 sa_block", "0 mha_block"]
    assert drawn.mean_updates == 2.5


def test_settings_are_columns_where_they_differ() -> None:
    same = run_table([plain_row(), bac_row()])
    assert "noise seed" not in same.header
    table = run_table([plain_row(), bac_row(noise_seed=7, training_seed=1)])
    column = table.header.index("noise seed")
    assert [row[column].number for row in table.rows] == [3, 7]
    assert [row[table.header.index("training seed")].text for row in table.rows] == ["–", "1"]
    assert all(len(row) == len(table.header) for row in table.rows)


def test_smoke_tests_are_called_so() -> None:
    said = (
        "pick_place is a smoke test (one denoising step solves it 100 times of 100): it tells no method from another."
    )
    assert format_methods([bac_row(task="pick_place"), bac_row(task="pick_place")]).count(said) == 1
    assert "smoke test" not in format_methods([bac_row(task="pusht"), bac_row(task="a task of one's own")])


def test_what_files_say_is_text(results: Path) -> None:
    hostile = {"checkpoint": HOSTILE, "label": HOSTILE, "task": HOSTILE, "hardware": HOSTILE, "finished": HOSTILE}
    rows = [replace(plain_row(), **hostile), bac_row(**hostile)]
    write_table(results, rows)
    block = "<script>alert(3)</script>.0_<b>"  # no block key
    text = (results / rows[1].directory / "plan.json").read_text().replace(BLOCKS[0], "<img onerror=x>.0_sa_block")
    (results / rows[1].directory / "plan.json").write_text(text)
    html = write_report(results).read_text()
    assert "&lt;img src=x" in html
    assert "<img" not in html
    assert html.count("<script") == 2  # its own, and the map's data
    (results / rows[1].directory / "plan.json").write_text(text.replace(BLOCKS[1], block))
    html = write_report(results).read_text()
    assert "does not end in" in html
    assert "<script>alert" not in html


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("runs/bac-5-1-bac/media", "1 of the 2 methods were not filmed"),
        ("runs/bac-5-1-bac/plan.json", "plan.json"),
        (ASSETS, "assets directory is no longer there"),
        (f"{ASSETS}/similarity_matrices.npz", "no similarity_matrices.npz"),
        (f"{ASSETS}/block_errors.json", "no block_errors.json"),
    ],
)
def test_what_is_missing_is_said(results: Path, missing: str, said: str) -> None:
    path = results / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert said in write_report(results).read_text()


@pytest.mark.parametrize(
    "damaged", ["runs/bac-5-1-bac/plan.json", f"{ASSETS}/similarity_matrices.npz", "runs/bac-5-1-bac/scores.json"]
)
def test_what_is_damaged_is_said(results: Path, damaged: str) -> None:
    (results / damaged).write_text("{ not what")
    html = write_report(results).read_text()
    assert Path(damaged).name in html or "cannot be shown" in html
    assert "BAC 5, BU 1" in html


def test_large_videos_are_left_out(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (results / "runs/plain-plain/media/100000.mp4").stat().st_size
    monkeypatch.setattr(comparisons, "MAX_FILM_BYTES", size)
    html = write_report(results).read_text()
    assert html.count("<video") == 1
    assert "too large" in html


def test_pictures_of_as_many_comparisons_as_asked_for(tmp_path: Path) -> None:
    rows = [bac_row(str(seed), noise_seed=seed) for seed in range(3)]
    write_table(tmp_path, rows)
    for row in rows:
        write_run(tmp_path, row)
    html = write_report(tmp_path, num_pictured=2).read_text()
    assert html.count("Cost and quality") == 2
    assert html.count('<details class="map"') == 1  # it is the same schedule
    assert "--pictured 3" in html
    assert "No episode was filmed" in html
    assert "--pictured" not in write_report(tmp_path, num_pictured=3).read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, r"notes.txt.*expected runs/\*/row.json"), ("key,task\n", "results_table.csv is of an earlier version")],
)
def test_a_foreign_directory(
    tmp_path: Path, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    if content is not None:
        (tmp_path / "results_table.csv").write_text(content)
    assert main([str(tmp_path)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "report.html").exists()


def test_no_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


def test_a_failure_leaves_the_last_page(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = write_report(results)
    before = page.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_report(results)
    assert page.read_bytes() == before
    assert not list(results.glob(".*part*"))


def test_500_runs_are_written_in_five_seconds(tmp_path: Path) -> None:
    """Of processor time: how busy the machine is does not matter."""
    write_report(write_results(tmp_path / "first"))  # imports, fonts
    results = write_many_results(tmp_path / "many")
    start = time.process_time()
    html = write_report(results).read_text()
    assert time.process_time() - start < 5
    assert html.count('scope="row"') == 500
    assert html.count('<details class="map"') == 250  # of two comparisons
