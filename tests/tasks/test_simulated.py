"""Rollouts of a simulated task: batches, noise, processes, failures, and what recorders see."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from bacinfer.tasks.episodes import Recorder, State
from bacinfer.tasks.simulated import SMALLEST_HALF
from bacinfer.tasks.video import read_video
from bacinfer.tasks.workers import EPISODES_PER_WORKER, default_num_workers
from simulated_task import NoisyPolicy, WalkTask

SEEDS = range(20_000, 20_000 + 2 * SMALLEST_HALF)


class Diary:
    """Keeps every state of every episode, and how the episode ended."""

    def __init__(self) -> None:
        self.states: dict[int, list[State]] = {}
        self.endings: dict[int, str] = {}

    @contextmanager
    def __call__(self, seed: int) -> Iterator[Recorder]:
        self.states[seed] = []
        try:
            yield self.states[seed].append
        except BaseException as error:
            self.endings[seed] = type(error).__name__
            raise
        self.endings[seed] = "end"


@pytest.mark.parametrize(
    ("num_seeds", "n_envs", "sizes"),
    [
        (1, 50, [1]),
        (30, 50, [30]),
        (31, 50, [16, 15]),
        (32, 50, [16, 16]),
        (50, 50, [25, 25]),
        (100, 50, [25, 25, 25, 25]),
        (5, 3, [3, 2]),
        (3, 1, [1, 1, 1]),
    ],
)
def test_batches(num_seeds: int, n_envs: int, sizes: list[int]) -> None:
    policy = NoisyPolicy()
    WalkTask(max_steps=8).rollout(policy, range(num_seeds), n_envs=n_envs, n_workers=0)
    assert [len(obs) for obs in policy.seen] == sizes


def test_two_batches_take_turns() -> None:
    policy = NoisyPolicy(scale=0.0)
    WalkTask(max_steps=24).rollout(policy, SEEDS, n_workers=0)
    first_seeds = [int(obs[0, -1, 0]) for obs in policy.seen]
    assert first_seeds == [SEEDS[0], SEEDS[SMALLEST_HALF]] * 3


def test_results_do_not_depend_on_the_number_of_processes() -> None:
    task = WalkTask()
    alone = task.rollout(NoisyPolicy(), SEEDS, n_workers=0)
    for n_workers in (1, 2):
        beside = task.rollout(NoisyPolicy(), SEEDS, n_workers=n_workers)
        assert beside.log == alone.log
        assert beside.num_steps == alone.num_steps
    assert len(set(alone.scores.values())) == len(SEEDS)


def test_a_batch_sees_its_own_noise_wherever_it_stands() -> None:
    """Its noise depends on its first seed and on nothing that other batches draw in between."""
    task = WalkTask()
    both = task.rollout(NoisyPolicy(), SEEDS, n_workers=0)
    second = task.rollout(NoisyPolicy(), SEEDS[SMALLEST_HALF:], n_workers=0)
    assert second.scores == {seed: both.scores[seed] for seed in SEEDS[SMALLEST_HALF:]}
    other = task.rollout(NoisyPolicy(), SEEDS[SMALLEST_HALF:], noise_seed=1, n_workers=0)
    assert all(other.scores[seed] != second.scores[seed] for seed in other.scores)


def test_the_random_state_is_left_as_it_was() -> None:
    policy = NoisyPolicy()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    WalkTask().rollout(policy, SEEDS, n_workers=0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_broken_episode_is_named_and_the_others_count(n_workers: int) -> None:
    whole = WalkTask().rollout(NoisyPolicy(), SEEDS, n_workers=n_workers)
    task = WalkTask(faults={SEEDS[3]: "step", SEEDS[20]: "start"})
    with pytest.warns(RuntimeWarning, match=rf"2 of {len(SEEDS)} episodes failed.*{SEEDS[3]}: .*the world ended"):
        rollout = task.rollout(NoisyPolicy(), SEEDS, n_workers=n_workers)
    assert rollout.failures == {
        SEEDS[3]: "FloatingPointError: the world ended",
        SEEDS[20]: "OSError: no such world",
    }
    others = {seed: score for seed, score in whole.scores.items() if seed not in rollout.failures}
    assert rollout.scores == others
    assert rollout.mean_score == pytest.approx(np.mean(list(others.values())))
    assert rollout.log[f"test/error_{SEEDS[3]}"] == "FloatingPointError: the world ended"


def test_a_process_that_dies_takes_only_its_own_episodes_with_it() -> None:
    whole = WalkTask().rollout(NoisyPolicy(), SEEDS, n_workers=0)
    with pytest.warns(RuntimeWarning, match="process"):
        rollout = WalkTask(faults={SEEDS[2]: "die"}).rollout(NoisyPolicy(), SEEDS, n_workers=2)
    assert SEEDS[2] in rollout.failures
    assert set(SEEDS[1::2]) <= rollout.scores.keys()  # the other process
    assert rollout.scores == {seed: whole.scores[seed] for seed in rollout.scores}
    # and the next rollout has a new process in its place
    assert WalkTask().rollout(NoisyPolicy(), SEEDS, n_workers=2).scores == whole.scores


def test_an_error_if_no_episode_is_left() -> None:
    task = WalkTask(faults={1: "start", 2: "step"})
    with pytest.raises(RuntimeError, match=r"all 2 episodes failed: seed 1: OSError: no such world; seed 2: "):
        task.rollout(NoisyPolicy(), [1, 2])


def test_actions_that_are_not_finite() -> None:
    with pytest.raises(RuntimeError, match="the policy's action is not finite at step 0"):
        WalkTask().rollout(NoisyPolicy(scale=float("nan")), [1])


def test_recorders_see_every_state() -> None:
    diary = Diary()
    policy = NoisyPolicy(scale=0.2)
    rollout = WalkTask().rollout(policy, [7, 8], recordings=[diary], n_workers=0)
    assert diary.endings == {7: "end", 8: "end"}
    for seed, states in diary.states.items():
        assert len(states) == rollout.num_steps[seed] + 1
        assert states[0].action is None
        position = seed
        for state in states[1:]:
            assert state.action is not None
            position += float(state.action[0])
            assert state.observation["obs"][0] == pytest.approx(position)
            assert state.reward == pytest.approx(abs(position - seed))
            assert state.solved == (state.reward >= 1)
        assert [state.done for state in states] == [False] * rollout.num_steps[seed] + [True]
        assert rollout.scores[seed] == max(state.reward for state in states)


def test_recorders_are_closed_with_the_error_that_breaks_their_episode() -> None:
    diary = Diary()
    with pytest.warns(RuntimeWarning, match="the world ended"):
        WalkTask(faults={7: "step"}).rollout(NoisyPolicy(), [7, 8], recordings=[diary], n_workers=0)
    assert diary.endings == {7: "FloatingPointError", 8: "end"}


def test_recorders_are_closed_when_the_rollout_is_interrupted() -> None:
    class Interrupted(NoisyPolicy):
        def predict_action(self, obs_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            if len(self.seen) == 2:
                raise KeyboardInterrupt
            return super().predict_action(obs_dict)

    diary = Diary()
    with pytest.raises(KeyboardInterrupt):
        WalkTask().rollout(Interrupted(), [7, 8], recordings=[diary], n_workers=0)
    assert diary.endings == {7: "RuntimeError", 8: "RuntimeError"}


@pytest.mark.parametrize("n_workers", [0, 2])
def test_videos(n_workers: int, tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="the world ended"):
        rollout = WalkTask(max_steps=12, faults={9: "step"}).rollout(
            NoisyPolicy(), [7, 8, 9], video_dir=tmp_path, video_seeds=[8, 9], n_workers=n_workers
        )
    assert rollout.videos == {8: tmp_path / "8.mp4"}
    assert [path.name for path in tmp_path.iterdir()] == ["8.mp4"]  # nothing of the broken episode
    assert len(list(read_video(tmp_path / "8.mp4"))) == rollout.num_steps[8] + 1


def test_recorders_that_cannot_be_sent_to_a_process() -> None:
    lock = threading.Lock()

    @contextmanager
    def locked(seed: int) -> Iterator[Recorder]:
        with lock:
            yield lambda state: None

    with pytest.raises(pickle.PicklingError):
        WalkTask().rollout(NoisyPolicy(), [1], recordings=[locked], n_workers=1)
    WalkTask().rollout(NoisyPolicy(), [1], recordings=[locked], n_workers=0)


def test_few_episodes_need_no_processes() -> None:
    assert default_num_workers(EPISODES_PER_WORKER - 1) == 0
    assert 1 <= default_num_workers(1000) <= 1000 // EPISODES_PER_WORKER


@pytest.mark.parametrize(("name", "value"), [("n_envs", 0), ("n_workers", -1)])
def test_numbers_that_make_no_sense(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} = {value}"):
        WalkTask().rollout(NoisyPolicy(), [1], **{name: value})
