"""The comparison command: its table, its pictures, and going on."""

from __future__ import annotations

from pathlib import Path

import pytest

from bacinfer.commands.compare import DEFAULT_METHODS, main
from bacinfer.experiments.method import parse_methods
from bacinfer.experiments.store import ResultsStore
from bacinfer.report.pareto import kind, plot_pareto
from bacinfer.report.sections.comparisons import comparisons
from bacinfer.report.sections.runs import run_table
from bacinfer.tasks import PushTTask
from small_experiments import make_row


@pytest.fixture
def command(checkpoint: Path, tmp_path: Path) -> list[str]:
    return [f"--checkpoint={checkpoint}", f"--output_dir={tmp_path / 'out'}", "--n_test=2", "--latency_calls=2"]


def test_table_and_pictures(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--methods=ddim:4,uniform:3,ddim:5+bac:2:1"]) == 0
    printed = capsys.readouterr().out
    labels = ["plain", "DDIM 4", "uniform 3", "DDIM 5 + BAC 2, BU 1"]
    assert all(label in printed for label in labels)
    table = (tmp_path / "out" / "comparison.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:6]] == labels
    assert (tmp_path / "out" / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "out" / "pareto.svg").read_text()


def test_more_methods_later(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--methods=ddim:4"]) == 0
    first = ResultsStore(tmp_path / "out").rows()
    assert main([*command, "--methods=ddim:4,threshold:5"]) == 0
    assert ResultsStore(tmp_path / "out").rows()[:2] == first
    assert capsys.readouterr().err.count("kept") == 2


def test_disturbed_and_undisturbed_runs_are_never_mixed_up(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PushTTask, "disturbed_before", range(2, 20))  # the episodes of these tests are short
    assert main([*command, "--methods=ddim:4"]) == 0
    assert "2 episodes from seed" in capsys.readouterr().out
    assert main([*command, "--methods=ddim:4", "--disturb"]) == 0
    output = capsys.readouterr()
    assert "2 disturbed episodes from seed" in output.out
    assert (output.err.count("evaluated"), output.err.count("kept")) == (2, 0)
    assert "2 disturbed episodes from seed" in (tmp_path / "out" / "pareto.svg").read_text()
    rows = ResultsStore(tmp_path / "out").rows()
    assert [[row.disturb for row in group] for group in comparisons(rows)] == [[False, False], [True, True]]
    assert "disturbed" in run_table(rows).header


def test_a_film_of_what_is_kept(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = [*command, "--n_test=1", "--latency_calls=1", "--methods=ddim:4"]
    assert main(command) == 0
    assert main([*command, "--film"]) == 2
    output = capsys.readouterr()
    assert "plain was evaluated without a film" in output.err
    assert "DDIM 4" in output.out
    assert main([*command, "--film", "--force"]) == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--methods=taylor:3", "unknown|no such method"),
        ("--methods=uniform:11", "num_caches must be an integer in 1..10"),
        ("--methods=bac:3:7", "num_bu_blocks must be in 1..6"),
        ("--disturb", "up to step 139, but its episodes have 24 steps"),
        ("--assets_dir=nowhere", "no directory nowhere"),
        ("--assets_dir=. --methods=ddim:4+bac:2:1,uniform:3", "--assets_dir has no effect"),
    ],
)
def test_mistakes_show_before_anything_slow(
    command: list[str], tmp_path: Path, wrong: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *wrong.split()]) == 2
    errors = capsys.readouterr().err
    assert any(part in errors for part in message.split("|"))
    assert not list((tmp_path / "out").glob("runs/*/row.json"))


def test_default_methods_are_methods() -> None:
    assert len(parse_methods(DEFAULT_METHODS)) == DEFAULT_METHODS.count(",") + 1


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("plain", "plain"),
        ("BAC 10, BU 5", "BAC"),
        ("DDIM 16 + BAC 8, BU 5", "DDIM + BAC"),
        ("block-wise ACS 10 (l1)", "block-wise ACS (l1)"),
    ],
)
def test_methods_of_a_kind(label: str, expected: str) -> None:
    assert kind(make_row(label=label)) == expected


def test_pictures_of_tasks_without_episode_scores(tmp_path: Path) -> None:
    rows = [make_row("a", label="plain", score=None), make_row("b", label="DDIM 4", score=None, speedup=2.0, flops=1)]
    png, svg = tmp_path / "pareto.png", tmp_path / "pareto.svg"
    plot_pareto(rows, png, svg)
    assert png.stat().st_size > 1000
    assert svg.stat().st_size > 1000
