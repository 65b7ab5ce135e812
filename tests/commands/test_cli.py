from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from bacinfer.commands import cli

ROOT = Path(__file__).parents[1]


def test_help_lists_every_command(capsys) -> None:
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    for name, subcommand in cli.SUBCOMMANDS.items():
        assert f"  {name}" in printed
        assert subcommand.help in printed


@pytest.mark.parametrize("name", cli.SUBCOMMANDS)
def test_every_command_explains_itself(name: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bacinfer"])
    try:
        status = cli.main([name, "--help"])
    except SystemExit as exit_:
        status = exit_.code
    assert status == 0
    assert len(capsys.readouterr().out) > 200


@pytest.mark.parametrize("name", cli.SUBCOMMANDS)
def test_every_command_is_a_module_to_run(name: str) -> None:
    module = importlib.import_module(cli.SUBCOMMANDS[name].module)
    assert 'if __name__ == "__main__":' in Path(module.__file__).read_text()


def test_unknown_command(capsys) -> None:
    assert cli.main(["stpes"]) == 2
    assert "there is no 'bacinfer stpes'" in capsys.readouterr().err
    assert cli.main([]) == 2


def test_installed_command_runs() -> None:
    command = Path(sys.executable).with_name("bacinfer")
    printed = subprocess.check_output([command, "--help"], text=True)
    assert "bacinfer COMMAND" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["steps", "-c", "nowhere.ckpt", "-o", "out"], "nowhere.ckpt"),
        (["steps", "-c", "pyproject.toml", "-o", "out"], "pyproject.toml"),
        (["run", "-c", "nowhere.ckpt", "-o", "out", "-d", "abacus"], "abacus"),
        (["eval", "--checkpoint", "nowhere.ckpt", "--output_dir", "out"], "nowhere.ckpt"),
        (["bu", "-o", "nowhere", "-t", "task", "--num_blocks", "1"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments: list[str], message: str, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["bacinfer"])
    assert cli.main(arguments) == 2
    errors = capsys.readouterr().err.strip()
    assert errors.startswith("error: ")
    assert message in errors
    assert "Traceback" not in errors
    assert not (ROOT / "out").exists()
