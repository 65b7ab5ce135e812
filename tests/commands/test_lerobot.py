"""The commands for LeRobot's checkpoints, where lerobot is not installed."""

from __future__ import annotations

import sys

import pytest

import bacinfer.lerobot
from bacinfer.commands.cli import main


class NoLeRobot:
    """Finds no lerobot, whether it is there or not."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        if name == "lerobot":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize(
    "arguments", ["lerobot export checkpoint plan.json out", "steps --lerobot checkpoint --dataset data -o out"]
)
def test_without_lerobot_it_is_said(
    arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith(("lerobot", "bacinfer.lerobot.checkpoint"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(bacinfer.lerobot, "checkpoint", raising=False)
    monkeypatch.setattr(sys, "meta_path", [NoLeRobot, *sys.meta_path])
    assert main(arguments.split()) == 2
    assert "needs lerobot, which is not installed here: pip install lerobot==0.6.1" in capsys.readouterr().err
