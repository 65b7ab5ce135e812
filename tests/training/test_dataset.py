from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bacinfer.training.dataset import read_demonstrations, read_pusht_demonstrations, sequence_windows


def test_windows_by_hand() -> None:
    windows = sequence_windows((5, 9), horizon=4, pad_before=1, pad_after=2)
    assert windows.tolist() == [
        [0, 0, 1, 2],
        [0, 1, 2, 3],
        [1, 2, 3, 4],
        [2, 3, 4, 4],
        [3, 4, 4, 4],
        [5, 5, 6, 7],
        [5, 6, 7, 8],
        [6, 7, 8, 8],
        [7, 8, 8, 8],
    ]


def test_without_padding_an_episode_shorter_than_the_horizon_gives_none() -> None:
    assert sequence_windows((3, 8), horizon=4).tolist() == [[3, 4, 5, 6], [4, 5, 6, 7]]
    assert sequence_windows((1,), horizon=4, pad_before=0, pad_after=1).shape == (0, 4)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    horizon=st.integers(1, 8),
    data=st.data(),
)
def test_a_window_stays_in_its_episode_and_moves_one_step_at_a_time(
    lengths: list[int], horizon: int, data: st.DataObject
) -> None:
    pads = st.integers(0, horizon - 1)
    pad_before, pad_after = data.draw(pads), data.draw(pads)
    ends = np.cumsum(lengths).tolist()
    windows = sequence_windows(tuple(ends), horizon, pad_before, pad_after)
    expected = sum(max(0, length - horizon + pad_before + pad_after + 1) for length in lengths)
    assert windows.shape == (expected, horizon)
    episode = np.repeat(np.arange(len(lengths)), lengths)
    for window in windows.tolist():
        assert len({episode[step] for step in window}) == 1
        assert set(np.diff(window)) <= {0, 1}


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    steps = np.arange(6, dtype=np.float32)
    return {
        "keypoint": np.arange(6 * 18, dtype=np.float32).reshape(6, 9, 2),
        "state": np.stack([1000 + steps, 2000 + steps, steps, steps, steps], axis=1),
        "action": np.stack([steps, 10 * steps], axis=1).astype(np.float64),
        "n_contacts": np.zeros((6, 1), dtype=np.float32),
        "episode_ends": np.array([4, 6]),
    }


def check(path: Path) -> None:
    demonstrations = read_pusht_demonstrations(path)
    assert demonstrations.episode_ends == (4, 6)
    assert demonstrations.obs.dtype == demonstrations.action.dtype == torch.float32
    assert demonstrations.obs[1].tolist() == [*range(18, 36), 1001, 2001]
    assert demonstrations.action[3].tolist() == [3, 30]
    batch = demonstrations.batch(torch.tensor([[0, 1], [4, 5]]))
    assert batch["obs"].shape == (2, 2, 20)
    assert batch["action"].tolist() == [[[0, 0], [1, 10]], [[4, 40], [5, 50]]]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_file(arrays: dict[str, np.ndarray], tmp_path: Path, save: Any) -> None:
    save(tmp_path / "demos.npz", **arrays)
    check(tmp_path / "demos.npz")


def write_zarr(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    zarr = pytest.importorskip("zarr", reason="needs zarr")
    root = zarr.open(str(path), "w")
    for name, array in arrays.items():
        group = root.require_group("meta" if name == "episode_ends" else "data")
        group.create_dataset(name, data=array, shape=array.shape)
    return path


def test_a_zarr_folder(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    check(write_zarr(tmp_path / "replay.zarr", arrays))


@pytest.mark.parametrize("kind", ["npz", "zarr"])
def test_observations_as_they_are(arrays: dict[str, np.ndarray], tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"demos.{kind}"
    arrays = {"obs": arrays["state"], "action": arrays["action"], "episode_ends": arrays["episode_ends"]}
    if kind == "zarr":
        write_zarr(path, arrays)
    else:
        np.savez(path, **arrays)
    demonstrations = read_demonstrations(path)
    assert demonstrations.episode_ends == (4, 6)
    assert demonstrations.obs.tolist() == arrays["obs"].tolist()
    assert demonstrations.action.tolist() == arrays["action"].tolist()


def test_a_zarr_folder_without_zarr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zarr", None)
    (tmp_path / "replay.zarr").mkdir()
    with pytest.raises(RuntimeError, match="pip install"):
        read_pusht_demonstrations(tmp_path / "replay.zarr")


def test_what_cannot_be_read(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = tmp_path / "demos.npz"
    with pytest.raises(FileNotFoundError, match=r"demos\.npz"):
        read_pusht_demonstrations(path)
    np.savez(path, **{name: arrays[name] for name in ("action", "state")})
    with pytest.raises(ValueError, match=r"lacks \['episode_ends', 'keypoint'\]; it has \['action', 'state'\]"):
        read_pusht_demonstrations(path)
    for ends in ([4, 7], [4, 4, 6], [5, 4, 6]):
        np.savez(path, **{**arrays, "episode_ends": np.array(ends)})
        with pytest.raises(ValueError, match="episodes end at step"):
            read_pusht_demonstrations(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{path} is not a complete \.npz file"):
        read_pusht_demonstrations(path)
    np.savez(path, **{**arrays, "action": np.array([{"a": 1}] * 6, dtype=object)})
    with pytest.raises(ValueError, match=rf"{path} is not a complete \.npz file"):
        read_pusht_demonstrations(path)
