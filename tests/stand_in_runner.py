"""A stand-in for Diffusion Policy's environment runners: their constructor, their `run`, their log and their videos."""

from __future__ import annotations

import sys
import uuid
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from bacinfer.tasks.video import open_video

STAND_IN_RUNNER = "diffusion_policy.env_runner.stand_in_runner.StandInRunner"
FPS = Fraction(25, 2)  # the kitchen's


class StandInRunner:
    """Shows its episodes' seeds, then counts upwards; every episode scores 0.5.

    Attributes:
        closed: those whose environments were closed.
        failure: what the environments fail with, at their first step.
    """

    closed: ClassVar[list[StandInRunner]] = []
    failure: ClassVar[Exception | None] = None

    def __init__(
        self,
        output_dir: str,
        n_train: int = 6,
        n_train_vis: int = 2,
        train_start_idx: int = 0,
        n_test: int = 50,
        n_test_vis: int = 4,
        test_start_seed: int = 10_000,
        max_steps: int = 3,
        n_obs_steps: int = 1,
        obs_dim: int = 1,
        n_envs: int | None = None,
        **_: Any,
    ) -> None:
        if max_steps < 0:
            raise FileNotFoundError(2, "No such file or directory", "data/robomimic/low_dim.hdf5")
        self.settings = SimpleNamespace(**{name: value for name, value in locals().items() if name != "self"})
        self.kind, self.num_videos = ("train", n_train_vis) if n_train else ("test", n_test_vis)
        self.seeds = [*range(train_start_idx, train_start_idx + n_train)]
        self.seeds += range(test_start_seed, test_start_seed + n_test)
        self.env = SimpleNamespace(close=lambda **_: self.closed.append(self))

    def run(self, policy: Any) -> dict[str, Any]:
        settings = self.settings
        policy.reset()
        obs = torch.tensor(self.seeds, dtype=torch.float32)[:, None, None]
        obs = obs.repeat(1, settings.n_obs_steps, settings.obs_dim)
        for step in range(settings.max_steps):
            policy.predict_action({"obs": obs + step})
            if self.failure is not None:
                raise self.failure
        log: dict[str, Any] = {f"{self.kind}/sim_max_reward_{seed}": np.float64(0.5) for seed in self.seeds}
        for seed in self.seeds[: self.num_videos]:
            log[f"{self.kind}/sim_video_{seed}"] = SimpleNamespace(_path=self._film())  # as wandb's
        return log | {f"{self.kind}/mean_score": 0.5, f"{self.kind}/p1": 0.75}

    def _film(self) -> str:
        media = Path(self.settings.output_dir) / "media"
        media.mkdir(parents=False, exist_ok=True)
        path = media / f"{uuid.uuid4().hex[:8]}.mp4"
        with open_video(path, FPS) as video:
            for step in range(self.settings.max_steps):
                video.append(np.full((64, 96, 3), 20 * step % 256, dtype=np.uint8))
        return str(path)


def install(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Makes `STAND_IN_RUNNER` importable, whether the package is there or not; returns its module."""
    module: Any = ModuleType(STAND_IN_RUNNER.rpartition(".")[0])
    module.StandInRunner = StandInRunner
    monkeypatch.setattr(StandInRunner, "__module__", module.__name__)
    monkeypatch.setattr(StandInRunner, "closed", [])
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module
