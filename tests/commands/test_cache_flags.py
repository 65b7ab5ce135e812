"""The flags of a cache: every command that has them honours or refuses each, before it does anything else."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from bacinfer.commands.cli import SUBCOMMANDS

COMMANDS = {
    "run": ["-o", "out"],
    "collect": ["-o", "out", "-t", "task"],
    "eval": ["-o", "out"],
    "collect-data": ["-o", "out", "--use_bac"],
}
VALUES = {
    "cache_threshold": "5",
    "optimal_steps_dir": "steps",
    "num_caches": "10",
    "metric": "l1",
    "num_bu_blocks": "3",
    "bu": None,
    "edit_steps": "0,4",
}
MODES: dict[str, tuple[list[str], set[str]]] = {
    "original": (["--cache_mode=original"], set()),
    "threshold": (["--cache_mode=threshold"], {"cache_threshold", "num_caches"}),
    "threshold with an interval": (["--cache_mode=threshold", "--cache_threshold=4"], {"cache_threshold"}),
    "optimal": (
        ["--cache_mode=optimal", "--optimal_steps_dir=steps"],
        {"optimal_steps_dir", "num_caches", "metric", "num_bu_blocks", "bu"},
    ),
    "edit": (["--cache_mode=edit", "--edit_steps=0,2"], {"edit_steps"}),
}


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refusal(capsys: pytest.CaptureFixture[str], command: str, *flags: str) -> str:
    """What a command says of its flags; that there is no checkpoint if it has nothing to say of them."""
    main = importlib.import_module(SUBCOMMANDS[command].module).main
    assert main(["--checkpoint=nowhere.ckpt", *COMMANDS[command], *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert list(Path().iterdir()) == []
    return line


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("flag", VALUES)
def test_a_flag_has_an_effect_or_is_refused(
    command: str, mode: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, effective = MODES[mode]
    said = refusal(capsys, command, *flags, f"--{flag}" if VALUES[flag] is None else f"--{flag}={VALUES[flag]}")
    if flag in effective:
        assert "nowhere.ckpt" in said
    else:
        name = "num_bu_blocks" if flag == "bu" else flag
        assert f"error: {name}=" in said
        assert "has no effect" in said


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", sorted(VALUES.keys() - {"optimal_steps_dir"}))
def test_a_flag_without_a_mode_is_refused(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, command, f"--{flag}" if VALUES[flag] is None else f"--{flag}={VALUES[flag]}")
    assert "has no effect" in said or "needs optimal_steps_dir" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_mode_needs(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "needs optimal_steps_dir" in refusal(capsys, command, "--cache_mode=optimal")
    assert "needs edit_steps" in refusal(capsys, command, "--cache_mode=edit")
    assert "nowhere.ckpt" in refusal(capsys, command, "--optimal_steps_dir=steps")
    assert "nowhere.ckpt" in refusal(capsys, command, "--cache_mode=threshold", "--metric=cosine", "--num_bu_blocks=0")


@pytest.mark.parametrize("command", COMMANDS)
def test_two_numbers_of_blocks(command: str) -> None:
    main = importlib.import_module(SUBCOMMANDS[command].module).main
    with pytest.raises(SystemExit):
        main(["--checkpoint=nowhere.ckpt", *COMMANDS[command], "--num_bu_blocks=3", "--bu"])
