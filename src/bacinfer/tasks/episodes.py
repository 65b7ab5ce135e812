"""Episodes of a simulated task, from the initial state of a seed to their end, and what follows their steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bacinfer.tasks.video import Frame

Observation = Mapping[str, NDArray[np.floating]]
"""What is observed at one moment, by the names that policies know it by: ``{"obs": [obs_dim]}``, or pictures."""


class Simulator(Protocol):
    """An environment, at the initial state of a seed when it is made."""

    @property
    def observation(self) -> Observation:
        """In data units; pictures [C, H, W], from 0 to 1."""
        ...

    def step(self, action: NDArray[np.floating]) -> tuple[float, bool]:
        """Executes an action [action_dim] (data units); the reward, and whether the task is solved now."""
        ...

    def render(self) -> Frame:
        """A picture of the present state, for people."""
        ...

    def camera(self, size: int) -> Frame:
        """What a policy that sees would see of the present state, [size, size, 3]: no trace of an action."""
        ...


@dataclass(frozen=True)
class State:
    """What an episode looks like at its start, and after each step.

    Attributes:
        observation: of one moment.
        action: [action_dim], the action that led here; None at the start.
        reward: what that action gave.
        solved: the task is solved here, which ends the episode.
        done: the episode ends here.
        render, camera: draw the state, see `Simulator`. Later calls draw a later state: call at once or not at all.
    """

    observation: Observation
    action: NDArray[np.floating] | None
    reward: float
    solved: bool
    done: bool
    render: Callable[[], Frame]
    camera: Callable[[int], Frame]


Recorder = Callable[[State], None]
"""Is shown every state of an episode, as it comes."""

Recording = Callable[[int], AbstractContextManager[Recorder]]
"""Opens the recorder of a seed's episode; it is closed when that ends, or with the exception that breaks it off."""


class Episode:
    """One episode, with the observations that a policy sees. An exception in it closes its recorders and ends it."""

    def __init__(
        self,
        seed: int,
        simulator: Simulator,
        n_obs_steps: int,
        max_steps: int,
        recordings: Sequence[Recording] = (),
    ) -> None:
        self.seed = seed
        self.max_steps = max_steps
        self.rewards: list[float] = []
        self.done = False
        self._simulator = simulator
        self._history = [simulator.observation] * n_obs_steps
        self._open_recorders = ExitStack()
        with self._recorded() as stack:
            self._recorders = [stack.enter_context(recording(seed)) for recording in recordings]
            self._record(None, solved=False)

    def execute(self, actions: NDArray[np.floating]) -> None:
        """Steps through an action chunk [n_action_steps, action_dim] (data units); stops where the episode ends.

        Raises:
            RuntimeError: an action is not finite (the simulator would crash on it).
        """
        if self.done:
            return
        with self._recorded():
            if not np.isfinite(actions).all():
                raise RuntimeError(f"seed {self.seed}: the policy's action is not finite at step {len(self.rewards)}")
            unseen = 0 if self._recorders else len(actions) - len(self._history)
            for index, action in enumerate(actions):
                reward, solved = self._simulator.step(action)
                self.rewards.append(reward)
                self.done = solved or len(self.rewards) >= self.max_steps
                if index >= unseen or self.done:  # drawing a picture takes four times as long as a step of Push-T
                    self._history = [*self._history[1:], self._simulator.observation]
                self._record(action, solved)
                if self.done:
                    return

    @property
    def observation(self) -> dict[str, NDArray[np.float32]]:
        """The last observations, each entry [n_obs_steps, ...]; the first one stands in for those before it.

        Where an action chunk ends the episode early, what comes before the last one may be older.
        """
        return {
            name: np.stack([moment[name] for moment in self._history]).astype(np.float32) for name in self._history[0]
        }

    def break_off(self) -> None:
        """Closes the recorders of an episode that is not done as after an exception."""
        error = RuntimeError(f"the episode of seed {self.seed} was broken off")
        self._open_recorders.__exit__(RuntimeError, error, None)

    def _record(self, action: NDArray[np.floating] | None, solved: bool) -> None:
        reward = self.rewards[-1] if self.rewards else 0.0
        simulator = self._simulator
        state = State(self._history[-1], action, reward, solved, self.done, simulator.render, simulator.camera)
        for recorder in self._recorders:
            recorder(state)

    @contextmanager
    def _recorded(self) -> Iterator[ExitStack]:
        """Leaves the recorders open, unless the episode ends inside."""
        with self._open_recorders.pop_all() as stack:
            yield stack
            if not self.done:
                self._open_recorders = stack.pop_all()


@dataclass(frozen=True)
class Progress:
    """How far an episode is: what the policy sees of it, its score (highest reward) so far, and what broke it."""

    observation: dict[str, NDArray[np.float32]] | None
    num_steps: int = 0
    score: float = 0.0
    done: bool = False
    error: str | None = None


class EpisodeHost:
    """Runs episodes side by side in one process. What breaks one is reported, and leaves the others as they are."""

    def __init__(self, make_episode: Callable[[int], Episode]) -> None:
        self._make_episode = make_episode
        self._episodes: dict[int, Episode] = {}

    def start(self, seeds: Sequence[int]) -> dict[int, Progress]:
        return {seed: self._advance(seed, None) for seed in seeds}

    def execute(self, chunks: Mapping[int, NDArray[np.floating]]) -> dict[int, Progress]:
        """Executes an action chunk in the episode of each seed."""
        return {seed: self._advance(seed, chunk) for seed, chunk in chunks.items()}

    def close(self) -> None:
        for episode in self._episodes.values():
            episode.break_off()
        self._episodes.clear()

    def _advance(self, seed: int, chunk: NDArray[np.floating] | None) -> Progress:
        try:
            if chunk is None:
                self._episodes[seed] = self._make_episode(seed)
            elif seed not in self._episodes:
                raise RuntimeError("the episode was lost with its process")
            else:
                self._episodes[seed].execute(chunk)
        except Exception as error:
            self._episodes.pop(seed, None)
            return Progress(None, done=True, error=f"{type(error).__name__}: {error}")
        episode = self._episodes[seed]
        if episode.done:
            del self._episodes[seed]  # and its simulator with it
        score = max(episode.rewards, default=0.0)
        return Progress(episode.observation, len(episode.rewards), score, episode.done)
