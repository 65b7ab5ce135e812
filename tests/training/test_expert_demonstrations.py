"""Demonstrations of the scripted experts: what is recorded, and that it repeats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bacinfer.files import read_arrays
from bacinfer.training import expert_demonstrations
from bacinfer.training.dataset import read_demonstrations
from bacinfer.training.expert_demonstrations import check_recorded, record_demonstrations


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "new" / "pick_place.npz"
    record_demonstrations(path, "pick-place-v3", 3, disturbed=1.0)
    return path


def test_equal_arguments_give_equal_demonstrations(disturbed: Path, tmp_path: Path) -> None:
    record_demonstrations(tmp_path / "again.npz", "pick-place-v3", 3, disturbed=1.0)
    first, again = (read_arrays(path)[0] for path in (disturbed, tmp_path / "again.npz"))
    assert set(first) == {"obs", "action", "episode_ends", "seeds"}
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert len(first["episode_ends"]) == len(set(first["seeds"])) == 3
    assert max(first["seeds"]) < 10_000


def test_a_file_knows_how_it_was_recorded(disturbed: Path, tmp_path: Path) -> None:
    asked = {"env_name": "pick-place-v3", "count": 3, "disturbed": 1.0}
    check_recorded(disturbed, asked)
    with pytest.raises(ValueError, match=rf"{disturbed} was recorded with count 3 instead of 4, disturbed 1.0 instead"):
        check_recorded(disturbed, asked | {"count": 4, "disturbed": 0.0})
    with pytest.raises(ValueError, match="env_name pick-place-v3 instead of drawer-open-v3"):
        check_recorded(disturbed, asked | {"env_name": "drawer-open-v3"})
    np.savez(tmp_path / "elsewhere.npz", obs=np.zeros(1))
    check_recorded(tmp_path / "elsewhere.npz", asked)
    check_recorded(tmp_path, asked)


def test_they_are_clean_actions_that_solve_the_task(disturbed: Path) -> None:
    demonstrations = read_demonstrations(disturbed)
    assert demonstrations.obs.shape == (demonstrations.episode_ends[-1], 10)
    assert demonstrations.action.shape == (demonstrations.episode_ends[-1], 4)
    assert demonstrations.action.abs().max() <= 1
    for end in demonstrations.episode_ends:
        puck, goal = demonstrations.obs[end - 1, 4:7], demonstrations.obs[end - 1, 7:10]
        assert (puck - goal).norm() < 0.09  # solved within 0.07, a step later


def test_undisturbed_ones_start_where_the_task_starts(disturbed: Path, tmp_path: Path) -> None:
    record_demonstrations(tmp_path / "plain.npz", "pick-place-v3", 3)
    hands = {}
    for path in (disturbed, tmp_path / "plain.npz"):
        demonstrations = read_demonstrations(path)
        starts = [0, *demonstrations.episode_ends[:-1]]
        hands[path.stem] = np.abs(demonstrations.obs[starts, :3].numpy() - [0, 0.6, 0.2]).max()
    assert hands["plain"] < 0.02 < hands["pick_place"]


def test_an_expert_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_demonstrations, "MAX_STEPS", 2)
    with pytest.raises(RuntimeError, match="solved 0 of 4 episodes"):
        record_demonstrations(tmp_path / "none.npz", "pick-place-v3", 2)
    assert list(tmp_path.iterdir()) == []
