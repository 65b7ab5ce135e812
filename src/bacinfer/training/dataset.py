"""Demonstrations, and the windows of them that a policy is trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from bacinfer import assets


class TrainingData(Protocol):
    """Recorded episodes, one after the other, as training uses them."""

    @property
    def episode_ends(self) -> tuple[int, ...]:
        """One past the last step of each episode, ascending."""
        ...

    @property
    def fields(self) -> Mapping[str, torch.Tensor]:
        """What the normaliser maps to [-1, 1], each [steps, …], in data units: the observations, the action."""
        ...

    def to(self, device: str | torch.device) -> TrainingData: ...

    def batch(self, windows: torch.Tensor) -> dict[str, Any]:
        """The steps at ``windows`` [B, horizon], as the policy's `compute_loss` takes them."""
        ...


@dataclass(frozen=True)
class Demonstrations:
    """Recorded episodes, one after the other.

    Attributes:
        obs: [steps, obs_dim], data units.
        action: [steps, action_dim], data units.
        episode_ends: one past the last step of each episode, ascending.
    """

    obs: torch.Tensor
    action: torch.Tensor
    episode_ends: tuple[int, ...]

    @property
    def fields(self) -> dict[str, torch.Tensor]:
        return {"obs": self.obs, "action": self.action}

    def to(self, device: str | torch.device) -> Demonstrations:
        return Demonstrations(self.obs.to(device), self.action.to(device), self.episode_ends)

    def batch(self, windows: torch.Tensor) -> dict[str, torch.Tensor]:
        """The steps at ``windows`` [B, horizon]: ``obs`` [B, horizon, obs_dim], ``action`` [B, horizon, action_dim]."""
        return {"obs": self.obs[windows], "action": self.action[windows]}


def read_pusht_demonstrations(path: str | Path) -> Demonstrations:
    """Read Push-T demonstrations from an ``.npz`` file or from Diffusion Policy's ``.zarr`` folder.

    An observation is the nine keypoints of the T (x0, y0, x1, y1, …), then the pusher's x and y, in pixels.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: arrays are missing or do not belong together.
        RuntimeError: the zarr package is needed and not installed.
    """
    arrays, episode_ends = read_episodes(path, ("keypoint", "state", "action"))
    keypoints = arrays["keypoint"].reshape(episode_ends[-1], -1)
    obs = np.concatenate([keypoints, arrays["state"][:, :2]], axis=1)
    return _demonstrations(obs, arrays["action"], episode_ends)


def read_demonstrations(path: str | Path) -> Demonstrations:
    """Read ``obs``, ``action`` and ``episode_ends`` from an ``.npz`` file or from Diffusion Policy's ``.zarr`` folder.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: arrays are missing or do not belong together.
        RuntimeError: the zarr package is needed and not installed.
    """
    arrays, episode_ends = read_episodes(path, ("obs", "action"))
    return _demonstrations(arrays["obs"], arrays["action"], episode_ends)


def read_episodes(path: str | Path, names: Iterable[str]) -> tuple[dict[str, NDArray[Any]], tuple[int, ...]]:
    """The named arrays of demonstrations, an ``.npz`` file or a ``.zarr`` folder, and where their episodes end.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: arrays are missing or do not belong together.
        RuntimeError: the zarr package is needed and not installed.
    """
    path = Path(path)
    places = {name: f"data/{name}" for name in names} | {"episode_ends": "meta/episode_ends"}
    if not path.exists():
        raise FileNotFoundError(
            f"no demonstrations at {path}: expected an .npz file or Diffusion Policy's .zarr folder "
            f"(for training, --data names another place, and --help where the published ones are)"
        )
    if path.is_dir():
        group = _open_zarr(path)
        arrays = {name: np.asarray(group[place]) for name, place in places.items() if place in group}
    else:
        stored = assets.read_arrays(path)[0]
        arrays = {name: stored[name] for name in places if name in stored}
    return arrays, _check_episodes(path, arrays, places)


def sequence_windows(
    episode_ends: tuple[int, ...], horizon: int, pad_before: int = 0, pad_after: int = 0
) -> torch.Tensor:
    """Step indices [windows, horizon] of every window that lies in one episode.

    A window may reach ``pad_before`` steps before the episode and ``pad_after`` steps beyond it; the first or last
    step is repeated there.
    """
    windows = []
    start = 0
    for end in episode_ends:
        first = torch.tensor(range(start - pad_before, end - horizon + pad_after + 1), dtype=torch.long)
        windows.append((first[:, None] + torch.arange(horizon)).clamp(start, end - 1))
        start = end
    return torch.cat(windows)


def _check_episodes(path: Path, arrays: Mapping[str, NDArray[Any]], names: Iterable[str]) -> tuple[int, ...]:
    """The episodes' ends; raises ValueError if an array is missing or has another number of steps."""
    if missing := set(names) - arrays.keys():
        raise ValueError(f"{path} lacks {sorted(missing)}; it has {sorted(arrays)}")
    ends = arrays["episode_ends"]
    lengths = {name: len(array) for name, array in arrays.items() if name != "episode_ends"}
    if set(lengths.values()) != {int(ends[-1])} or np.any(np.diff(ends, prepend=0) <= 0):
        raise ValueError(f"{path}: episodes end at step {ends[-1]}, ascending, but the arrays have {lengths} steps")
    return tuple(int(end) for end in ends)


def _demonstrations(obs: NDArray[Any], action: NDArray[Any], episode_ends: tuple[int, ...]) -> Demonstrations:
    return Demonstrations(
        torch.from_numpy(obs.astype(np.float32)), torch.from_numpy(action.astype(np.float32)), episode_ends
    )


def _open_zarr(path: Path) -> Any:
    try:
        import zarr
    except ImportError as error:
        raise RuntimeError(f"reading the folder {path} needs the zarr package: pip install 'bacinfer[zarr]'") from error
    return zarr.open(str(path), mode="r")
