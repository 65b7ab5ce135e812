"""The state of a running cache: which denoising step runs, and the residuals that are stored."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from bacinfer.core.blocks import Block

COLD, WARM = 0, 1
"""The phases: trajectories from noise, and from a warm start."""

ResidualObserver = Callable[[Block, int, Tensor], None]

_TWO_THREADS = "a cached policy was called from two threads at once; give each thread its own copy.deepcopy(policy)"


class Trajectory:
    """One denoising trajectory after another, each of as many model calls as its phase has.

    Args:
        lengths: The phases' numbers of model calls.

    Attributes:
        phase: That of the trajectory that runs, or of the next one.
        step: The denoising step index while the model runs within a trajectory, otherwise None; where it is
            None nothing is cached, so a model call outside a trajectory (a training loss) computes everything.
        residuals: Block key to the residual that is stored.
        observer: Called with every residual that is used (see `observing`).
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)
        self.phase = COLD
        self.step: int | None = None
        self.residuals: dict[str, Tensor] = {}
        self.observer: ResidualObserver | None = None
        self._calls: int | None = None  # model calls of this trajectory; None: no trajectory runs
        self._entered: dict[str, int] = {}  # layer to the step at which it ran last
        self._inputs: object = None
        self._thread: int | None = None
        self._exclusive = False  # all steps run at once, in buffers of their own

    def __reduce__(self) -> tuple[type[Trajectory], tuple[tuple[int, ...]]]:
        """A copy of a policy takes no part in what the original is doing."""
        return Trajectory, (self.lengths,)

    @property
    def num_inference_steps(self) -> int:
        """Of the trajectory that runs."""
        return self.lengths[self.phase]

    def begin(self, phase: int = COLD) -> None:
        """The next model call is step 0 of a phase; forgets what an earlier trajectory left.

        Raises:
            RuntimeError: if another thread is running all steps at once.
        """
        if self._exclusive:
            raise RuntimeError(_TWO_THREADS)
        self.end()
        self.phase = phase
        self._calls = 0
        self._thread = threading.get_ident()

    def end(self) -> None:
        """No trajectory runs; frees the residuals."""
        self.step = self._calls = self._inputs = self._thread = None
        self.residuals.clear()
        self._entered.clear()

    def start_step(self, inputs: object) -> None:
        """The next denoising step begins, if a trajectory runs.

        Args:
            inputs: Shapes, dtypes and devices of what the model, or its first block, is called with.

        Raises:
            RuntimeError: if the trajectory is over, its inputs change their shape, or another thread began it.
        """
        if self._calls is None:
            return
        try:
            self._check(self._calls, inputs)
        except RuntimeError:
            self.end()
            raise
        self.step = self._calls
        self._calls += 1

    @contextmanager
    def model_call(self, inputs: object) -> Iterator[None]:
        """One call of the model: within the block a denoising step runs, see `start_step`."""
        self.start_step(inputs)
        try:
            yield
        except BaseException:
            self.end()
            raise
        self.step = None

    def enter(self, layer: str, step: int) -> None:
        """`layer` stores or reuses residuals at `step`.

        Raises:
            RuntimeError: if it did at this step before: one stored residual cannot serve two places.
        """
        if self._entered.get(layer) == step:
            raise RuntimeError(
                f"layer {layer!r} ran twice in denoising step {step}: the model has it in two places, and one stored "
                f"residual cannot serve both; give each place a layer of its own (copy.deepcopy), or remove the cache"
            )
        self._entered[layer] = step

    @property
    def is_running(self) -> bool:
        return self._calls is not None

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Within the block all steps run at once, without model calls; `complete` says that they did.

        Raises:
            RuntimeError: if another thread began the trajectory.
        """
        if threading.get_ident() != self._thread:
            raise RuntimeError(_TWO_THREADS)
        self._exclusive = True
        try:
            yield
        finally:
            self._exclusive = False

    def complete(self) -> None:
        """All K steps are done."""
        self._calls = self.num_inference_steps

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Within the block the model's calls belong to no trajectory: everything is computed."""
        state = self._calls, self.step
        self._calls = self.step = None
        try:
            yield
        finally:
            self._calls, self.step = state

    def _check(self, step: int, inputs: object) -> None:
        if threading.get_ident() != self._thread:
            raise RuntimeError(_TWO_THREADS)
        if step >= self.num_inference_steps:
            raise RuntimeError(
                f"there are more than K = {self.num_inference_steps} denoising steps in one trajectory. "
                f"In a loop of your own, call policy.reset_cache() before each trajectory; if your sampler calls the "
                f"model several times a step, the schedule must be made for that number of calls"
            )
        if step == 0:
            self._inputs = inputs
        elif inputs != self._inputs:
            raise RuntimeError(
                f"the model's inputs changed within a denoising trajectory: {self._inputs} at step 0, {inputs} at "
                f"step {step}. Residuals of one batch do not fit another; call policy.reset_cache() in between"
            )

    def check_complete(self) -> None:
        """Raises RuntimeError unless the trajectory had exactly K model calls."""
        if self._calls != self.num_inference_steps:
            raise RuntimeError(
                f"sampling took {self._calls} denoising steps, but the schedule was made for "
                f"K = {self.num_inference_steps}"
            )
