"""Disturbances: a seed determines when something is moved and by how much, whatever the policy does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from bacinfer.tasks import MetaWorldTask, PushTTask, pusht
from bacinfer.tasks.disturbances import DisturbedSimulator
from bacinfer.tasks.episodes import Recorder, State
from bacinfer.tasks.pusht import PushTSimulator
from simulated_task import NoisyPolicy, WalkTask

SEEDS = range(20_000, 20_012)


class Pushes:
    """Writes down what moved a walker besides its actions: a file a seed, with the step and the amount."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()

    @contextmanager
    def __call__(self, seed: int) -> Iterator[Recorder]:
        positions, walked = [], []

        def record(state: State) -> None:
            positions.append(float(state.observation["obs"][0]))
            if state.action is not None:
                walked.append(float(state.action[0]))

        yield record
        pushed = np.diff(positions) - walked
        np.save(self.directory / f"{seed}.npy", np.round(pushed, 5))

    @property
    def all(self) -> dict[int, list[tuple[int, float]]]:
        """(step, amount) of every push, by seed."""
        pushed = {seed: np.load(self.directory / f"{seed}.npy") for seed in SEEDS}
        return {seed: [(int(i), float(a[i])) for i in a.nonzero()[0]] for seed, a in pushed.items()}


def pushes(directory: Path, scale: float = 0.01, seeds: range = SEEDS, **options: int) -> dict:
    recording = Pushes(directory)
    WalkTask().rollout(NoisyPolicy(scale), seeds, disturb=True, recordings=[recording], **options)
    return recording.all


def test_equal_seeds_are_disturbed_equally(tmp_path: Path) -> None:
    """Whatever the policy, the sampling noise, the batches and the processes are."""
    first = pushes(tmp_path / "first", n_workers=0)
    assert all(len(found) == 1 for found in first.values())
    assert pushes(tmp_path / "policy", scale=0.03, n_workers=0) == first
    assert pushes(tmp_path / "noise", noise_seed=5, n_workers=0) == first
    assert pushes(tmp_path / "batches", n_envs=5, n_workers=0) == first
    assert pushes(tmp_path / "processes", n_workers=2) == first
    assert pushes(tmp_path / "order", seeds=SEEDS[::-1], n_workers=0) == first


def test_different_seeds_are_disturbed_differently(tmp_path: Path) -> None:
    found = [push for (push,) in pushes(tmp_path / "all", n_workers=0).values()]
    steps, amounts = zip(*found, strict=True)
    assert len(set(amounts)) == len(SEEDS)
    assert len(set(steps)) > len(SEEDS) / 3
    assert set(steps) <= set(WalkTask.disturbed_before)


def test_up_to_the_disturbance_an_episode_is_the_undisturbed_one() -> None:
    plain, disturbed = (WalkTask().episode(SEEDS[0], disturb=disturb) for disturb in (False, True))
    walks = np.random.default_rng(0).uniform(-0.01, 0.01, (30, 1))
    equal = []
    for walk in walks:
        for episode in (plain, disturbed):
            episode.execute(walk[None])
        equal.append(np.array_equal(plain.observation["obs"][-1], disturbed.observation["obs"][-1]))
    (step,) = np.diff(equal).nonzero()[0] + 1
    assert equal == [True] * step + [False] * (len(walks) - step)
    assert step in WalkTask.disturbed_before


def test_nothing_is_disturbed_unasked() -> None:
    task, policy = WalkTask(), NoisyPolicy()
    plain = task.rollout(policy, SEEDS, n_workers=0)
    disturbed = task.rollout(policy, SEEDS, n_workers=0, disturb=True)
    assert task.rollout(policy, SEEDS, n_workers=0).log == plain.log
    assert all(plain.scores[seed] != disturbed.scores[seed] for seed in SEEDS)


def centre(simulator: PushTSimulator) -> np.ndarray:
    block = simulator._env.block
    return np.array(block.local_to_world(block.center_of_gravity))


def test_the_block_of_push_t() -> None:
    moved, turned = [], []
    for seed in range(30):
        simulator = PushTTask().simulator(seed)
        simulator._env.block.angle, simulator._env.block.position = 0.0, (256.0, 211.0)
        before = centre(simulator)
        simulator.disturb(np.random.default_rng(seed))
        moved.append(np.hypot(*(centre(simulator) - before)))
        turned.append(abs(simulator._env.block.angle))
    shortest, longest = pusht.PUSHES
    assert shortest - 1e-6 <= min(moved) < 0.5 * (shortest + longest) < max(moved) <= longest + 1e-6
    assert min(turned) < 0.1 * pusht.TURN < 0.9 * pusht.TURN < max(turned) <= pusht.TURN


def test_the_block_stays_on_the_board_and_its_push_is_seen() -> None:
    for seed in range(30):
        simulator = PushTTask().simulator(seed)
        pusher = simulator.observation["obs"][18:]
        for _ in range(5):
            simulator.disturb(np.random.default_rng(seed))  # always in the same direction
        before = simulator.observation["obs"][:18]
        simulator.step(pusher)
        block = simulator._env.block
        corners = [block.local_to_world(corner) for shape in block.shapes for corner in shape.get_vertices()]
        assert 5 < np.min(corners) < np.max(corners) < 507
        assert np.abs(simulator.observation["obs"][:18] - before).max() > 10


@pytest.mark.parametrize("env_name", ["drawer-open-v3", "pick-place-v3"])
def test_the_hand_of_the_arm(env_name: str) -> None:
    task = MetaWorldTask("arm", env_name)
    for seed in (0, 1):
        still, pushed = task.simulator(seed), task.simulator(seed)
        pushed.disturb(np.random.default_rng(seed))
        for _ in range(15):
            for simulator in (still, pushed):
                simulator.step(np.zeros(4))
        x, y, z = (pushed.observation["obs"] - still.observation["obs"])[:3]
        assert 0.025 < np.hypot(x, y) < 0.085
        assert abs(z) < 0.01


def test_a_disturbed_simulator_is_the_simulator_otherwise() -> None:
    task = WalkTask()
    plain, disturbed = task.simulator(7), DisturbedSimulator(task.simulator(7), 7, range(5, 6))
    for _ in range(5):
        assert plain.step(np.array([0.1])) == disturbed.step(np.array([0.1]))
    np.testing.assert_array_equal(plain.observation["obs"], disturbed.observation["obs"])
    np.testing.assert_array_equal(plain.render(), disturbed.render())
    np.testing.assert_array_equal(plain.camera(8), disturbed.camera(8))


def test_a_task_without_disturbances_refuses() -> None:
    class Steady(WalkTask):
        disturbed_before = range(0)

    with pytest.raises(ValueError, match=r"task walk cannot be disturbed: its Steady cannot .*leave out --disturb"):
        Steady().rollout(NoisyPolicy(), [1], disturb=True)
    with pytest.raises(ValueError, match="happens up to step 19, but its episodes have 19 steps"):
        WalkTask(max_steps=19).rollout(NoisyPolicy(), [1], disturb=True)
