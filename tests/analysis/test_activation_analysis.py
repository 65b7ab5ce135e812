"""Averages over observations."""

from __future__ import annotations

import numpy as np
import pytest

from bacinfer.analysis.block_statistics import RunningMean


def test_running_mean_is_the_mean_and_does_not_depend_on_a_break() -> None:
    generator = np.random.default_rng(0)
    observations = [{"a": generator.normal(size=(3, 3)), "b": generator.normal(size=())} for _ in range(5)]
    through = RunningMean()
    for observation in observations:
        through.add(observation)

    before = RunningMean()
    for observation in observations[:2]:
        before.add(observation)
    after = RunningMean(before.means, before.count)
    for observation in observations[2:]:
        after.add(observation)

    assert through.count == after.count == 5
    for name in ("a", "b"):
        np.testing.assert_allclose(through.means[name], np.mean([o[name] for o in observations], axis=0), atol=1e-6)
        np.testing.assert_array_equal(through.means[name], after.means[name])


def test_running_mean_refuses_another_shape() -> None:
    mean = RunningMean()
    mean.add({"a": np.zeros((3, 3))})
    with pytest.raises(ValueError, match="differ"):
        mean.add({"a": np.zeros((4, 4))})
