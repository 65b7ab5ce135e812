"""Paths that no record of results can hold are refused by every command, before any work."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from bacinfer.commands.cli import SUBCOMMANDS
from bacinfer.commands.options import path_argument
from bacinfer.experiments.experiment import Experiment

PATHS = {
    "steps": ["--checkpoint", "--output_dir"],
    "collect": ["--checkpoint", "--output_dir", "--task", "--optimal_steps_dir"],
    "schedule": ["--similarity_matrices_dir"],
    "bu": ["--output_dir", "--task", "--cache_mode"],
    "info": ["--assets_dir", "--task"],
    "run": ["--checkpoint", "--output_dir", "--optimal_steps_dir"],
    "eval": ["--checkpoint", "--output_dir", "--optimal_steps_dir"],
    "compare": ["--checkpoint", "--output_dir", "--assets_dir"],
    "report": ["", "--output"],
    "batch": ["--output_dir"],
    "collect-data": ["--checkpoint", "--output_dir", "--optimal_steps_dir"],
    "train": ["--output_dir", "--data", "--init_from", "--export"],
    "demo": ["--checkpoint", "--output_dir"],
}
MODULES = {name: subcommand.module for name, subcommand in SUBCOMMANDS.items()} | {
    "activations": "bacinfer.analysis.activation_analysis",
}
PATHS |= {"activations": PATHS["bu"]}


@pytest.mark.parametrize(("command", "flag"), [(command, flag) for command, flags in PATHS.items() for flag in flags])
@pytest.mark.parametrize("path", ["two\nlines", "nul\0", "carriage\rreturn", "byte\udcff", ""])
def test_a_path_that_cannot_be_recorded(command: str, flag: str, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module(MODULES[command]).main
    with pytest.raises(SystemExit) as exit_:
        main([f"{flag}={path}"] if flag else [path])
    assert exit_.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "the path is empty" in message if not path else "no line break, no NUL" in message


def test_every_other_path_is_taken() -> None:
    for path in ("a b", "-", "ä/…", ".", "/"):
        assert path_argument(path) == Path(path)


@pytest.mark.parametrize("name", ["checkpoint", "assets_dir", "optimal_steps_dir"])
def test_an_experiment_of_such_a_path(name: str) -> None:
    with pytest.raises(ValueError, match="no line break"):
        Experiment(**{"checkpoint": "policy.ckpt", name: "two\nlines"})
