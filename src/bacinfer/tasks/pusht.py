"""Push-T as Diffusion Policy evaluates it (observations, initial states, score), on gym-pusht's simulator.

An observation is 20 numbers in pixels (0..512): nine keypoints of the T block, x0, y0, x1, y1, …, then the pusher's
x, y. A reward is min(coverage / 0.95, 1), the score of an episode its highest reward.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from bacinfer.tasks.base import (
    FIRST_TEST_SEED,
    Rollout,
    check_count,
    check_rollout,
    policy_device,
    seeded_noise,
    timed_call,
)
from bacinfer.tasks.video import VideoWriter, open_video

KEYPOINTS = np.array(
    [
        [9.26978671, 90.04097352],
        [-60.98347236, -1.18672976],
        [60.91275558, -1.39336422],
        [-0.27050344, 25.54362499],
        [-14.06492758, 122.81585355],
        [39.00273850, 32.85740428],
        [-39.96641442, 32.72965545],
        [-16.82434438, 62.86317892],
        [23.54146122, -1.70028811],
    ]
)
"""The nine points in the block's frame (origin: the block's position, axes: its angle), pixels.

Diffusion Policy draws them at random with a fixed seed. They agree within 1e-6 px with the median over the 25,650
steps of the human demonstrations. Half of the steps are within 1.5e-5 px of that (the data is float32), 93 % within
0.01 px; the rest, up to 2 px, has a pose and keypoints that were recorded an instant apart.
"""

MAX_STEPS = 300
BATCH_SIZE = 50
VIDEO_SIZE = 384


class PushTTask:
    """Push-T for any policy that takes ``{"obs": [B, n_obs_steps, 20]}``."""

    name = "pusht"

    def __init__(self, n_obs_steps: int = 2, max_steps: int = MAX_STEPS) -> None:
        self.n_obs_steps = n_obs_steps
        self.max_steps = max_steps

    def observations(self, policy: Any, demo_idx: int, count: int = 1) -> Iterator[dict[str, Tensor]]:
        """See `Task.observations`; `demo_idx` is the seed of the initial state."""
        check_count(count)
        episode = Episode(demo_idx, self.n_obs_steps, self.max_steps)
        observations: list[dict[str, Tensor]] = []
        with seeded_noise(policy, demo_idx):
            while True:
                observations.append(_batch([episode], policy_device(policy)))
                if len(observations) == count:
                    break
                action, _ = timed_call(policy, observations[-1])
                episode.execute(action["action"][0].cpu().numpy())
                if episode.done:
                    break
        return iter(observations)

    def rollout(
        self,
        policy: Any,
        seeds: Sequence[int],
        *,
        noise_seed: int = 0,
        video_dir: str | Path | None = None,
        video_seeds: Sequence[int] = (),
        batch_size: int = BATCH_SIZE,
    ) -> Rollout:
        """One episode per seed, `batch_size` of them at a time.

        Each batch starts torch's generator at `noise_seed` + its first seed and keeps its composition until its
        last episode ends, so that two policies that draw the same number of samples see the same noise at the same
        call of the same episode.

        Raises:
            ValueError: no seeds, repeated seeds, or videos of seeds that are not rolled out.
            RuntimeError: gym-pusht is not installed.
        """
        check_rollout(seeds, video_dir, video_seeds)
        videos = {seed: Path(video_dir) / f"{seed}.mp4" for seed in video_seeds} if video_dir else {}

        start = time.perf_counter()
        episodes: list[Episode] = []
        policy_seconds: list[float] = []
        batches = [seeds[i : i + batch_size] for i in range(0, len(seeds), batch_size)]
        with tqdm(total=len(batches) * self.max_steps, desc="Push-T rollout", unit="step") as bar:
            for batch_seeds in batches:
                with ExitStack() as stack:
                    batch = [
                        Episode(
                            seed,
                            self.n_obs_steps,
                            self.max_steps,
                            stack.enter_context(open_video(videos[seed])) if seed in videos else None,
                        )
                        for seed in batch_seeds
                    ]
                    stack.enter_context(seeded_noise(policy, noise_seed + batch_seeds[0]))
                    policy_seconds += self._run(policy, batch, bar)
                episodes += batch

        seconds = time.perf_counter() - start
        return Rollout(
            log=_log({episode.seed: max(episode.rewards) for episode in episodes}),
            policy_seconds=policy_seconds,
            env_seconds=seconds - sum(policy_seconds),
            num_steps={episode.seed: len(episode.rewards) for episode in episodes},
            videos=videos,
        )

    def _run(self, policy: Any, episodes: Sequence[Episode], bar: tqdm[Any]) -> list[float]:
        """Runs a batch of episodes to their ends; the wall time of each policy call."""
        device = policy_device(policy)
        policy_seconds = []
        steps = 0
        while not all(episode.done for episode in episodes):
            action, seconds = timed_call(policy, _batch(episodes, device))
            policy_seconds.append(seconds)
            for episode, chunk in zip(episodes, action["action"].cpu().numpy(), strict=True):
                episode.execute(chunk)
            longest = max(len(episode.rewards) for episode in episodes)
            bar.update(longest - steps)
            steps = longest
        bar.update(self.max_steps - steps)
        return policy_seconds


class Episode:
    """One environment from its initial state to its end, with the observations that the policy sees."""

    def __init__(
        self, seed: int, n_obs_steps: int = 2, max_steps: int = MAX_STEPS, video: VideoWriter | None = None
    ) -> None:
        self.seed = seed
        self.max_steps = max_steps
        self.rewards: list[float] = []
        self.done = False
        self._video = video
        self._env = make_env()
        state, _ = self._env.reset(options={"reset_to_state": initial_state(seed)})
        self._history = [observation(state)] * n_obs_steps
        self._record()

    def execute(self, actions: NDArray[np.floating]) -> None:
        """Steps through an action chunk [n_action_steps, 2] (pixels); stops where the episode ends.

        Raises:
            RuntimeError: an action is not finite (the simulator would crash on it).
        """
        if not np.isfinite(actions).all():
            raise RuntimeError(f"seed {self.seed}: the policy's action is not finite at step {len(self.rewards)}")
        for action in actions:
            if self.done:
                return
            state, reward, solved, _, _ = self._env.step(action)
            self._history = [*self._history[1:], observation(state)]
            self.rewards.append(float(reward))
            self.done = bool(solved) or len(self.rewards) >= self.max_steps
            self._record()

    @property
    def observation(self) -> NDArray[np.float32]:
        """The last observations, [n_obs_steps, 20]; the first one stands in for those before it."""
        return np.stack(self._history).astype(np.float32)

    def _record(self) -> None:
        if self._video is not None:
            self._video.append(self._env.render())


def make_env() -> Any:
    """gym-pusht's environment, which reports the pusher's and the block's pose.

    Raises:
        RuntimeError: gym-pusht is not installed.
    """
    try:
        from gym_pusht.envs import PushTEnv
    except ImportError as error:
        raise RuntimeError("Push-T rollouts need gym-pusht: pip install 'bacinfer[sim]'") from error
    return PushTEnv(obs_type="state", visualization_width=VIDEO_SIZE, visualization_height=VIDEO_SIZE)


def initial_state(seed: int) -> NDArray[np.float64]:
    """Pusher x, y, block x, y (pixels), block angle (radians) of a seed, as in Diffusion Policy's environment.

    The environment sets the block's position, then its angle; the second turns the block about its centre of
    gravity, so the block does not end up at the position drawn here.
    """
    random = np.random.RandomState(seed)  # the generator of the published scores
    pusher = random.randint(50, 450), random.randint(50, 450)
    block = random.randint(100, 400), random.randint(100, 400)
    return np.array([*pusher, *block, random.randn() * 2 * np.pi - np.pi], dtype=np.float64)


def observation(state: NDArray[np.floating]) -> NDArray[np.float64]:
    """States [..., 5] (pusher x, y, block x, y, block angle) to observations [..., 20]."""
    state = np.asarray(state, dtype=np.float64)
    cos, sin = np.cos(state[..., 4]), np.sin(state[..., 4])
    rotation = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], -2)  # for row vectors
    keypoints = KEYPOINTS @ rotation + state[..., None, 2:4]
    return np.concatenate([keypoints.reshape(*state.shape[:-1], -1), state[..., :2]], axis=-1)


def _batch(episodes: Sequence[Episode], device: torch.device) -> dict[str, Tensor]:
    observations = np.stack([episode.observation for episode in episodes])
    return {"obs": torch.from_numpy(observations).to(device)}


def _log(scores: dict[int, float]) -> dict[str, float]:
    """Diffusion Policy's runner log: each seed's score, the mean of test and of training seeds."""
    log: dict[str, float] = {}
    for prefix in ("train/", "test/"):
        group = {seed: score for seed, score in scores.items() if (seed >= FIRST_TEST_SEED) == (prefix == "test/")}
        log |= {f"{prefix}sim_max_reward_{seed}": score for seed, score in group.items()}
        if group:
            log[f"{prefix}mean_score"] = float(np.mean(list(group.values())))
    return log
