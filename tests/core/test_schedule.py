from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacinfer import CacheSchedule

BLOCKS = ["decoder.layers.0_sa_block", "decoder.layers.0_ff_block"]


def steps_of(num_steps: int) -> st.SearchStrategy[list[int]]:
    return st.sets(st.integers(1, num_steps - 1)).map(lambda s: [0, *sorted(s)])


schedules = st.integers(2, 30).flatmap(
    lambda K: st.builds(
        CacheSchedule, st.just(K), st.dictionaries(st.sampled_from(BLOCKS), steps_of(K)), st.text(max_size=10)
    )
)


def test_every_step_updates_everywhere() -> None:
    schedule = CacheSchedule.every_step(BLOCKS, 4)
    assert schedule.update_steps == dict.fromkeys(BLOCKS, (0, 1, 2, 3))


@pytest.mark.parametrize(("interval", "steps"), [(1, (0, 1, 2, 3, 4, 5, 6)), (3, (0, 3, 6)), (4, (0, 4)), (9, (0,))])
def test_periodic_updates_every_interval(interval: int, steps: tuple[int, ...]) -> None:
    assert CacheSchedule.periodic(BLOCKS, 7, interval).update_steps == dict.fromkeys(BLOCKS, steps)


def test_unified_gives_all_blocks_the_same_steps() -> None:
    schedule = CacheSchedule.unified(BLOCKS, 10, [0, 4, 9])
    assert schedule.update_steps == dict.fromkeys(BLOCKS, (0, 4, 9))
    assert schedule.update_mask(BLOCKS[0]) == tuple(k in (0, 4, 9) for k in range(10))
    assert schedule.num_updates(BLOCKS[1]) == 3


def test_block_without_steps_is_computed_everywhere() -> None:
    schedule = CacheSchedule(5, {BLOCKS[0]: (0,)})
    assert schedule.update_mask(BLOCKS[1]) == (True,) * 5
    assert schedule.num_updates(BLOCKS[1]) == 5


def test_last_step_is_added_once() -> None:
    schedule = CacheSchedule(5, {BLOCKS[0]: (0, 2), BLOCKS[1]: (0, 4)}).with_last_step()
    assert schedule.update_steps == {BLOCKS[0]: (0, 2, 4), BLOCKS[1]: (0, 4)}


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "first update step must be 0"),
        ([1, 2], "first update step must be 0"),
        ([-1, 0], "first update step must be 0"),
        ([0, 3, 2], "ascend"),
        ([0, 2, 2], "ascend"),
        ([0, 5], "does not exist with K = 5"),
        ([0, 2.0], "must be integers"),
        ([0, "2"], "must be integers"),
        ([False, True], "must be integers"),
        ("01", "list of integers"),
        (3, "list of integers"),
    ],
)
def test_invalid_steps_are_refused(steps: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        CacheSchedule(5, {BLOCKS[0]: steps})  # type: ignore[dict-item]
    assert BLOCKS[0] in str(error.value)


@pytest.mark.parametrize("K", [0, -1, 2.5, "10", True])
def test_invalid_number_of_steps_is_refused(K: object) -> None:
    with pytest.raises(ValueError, match="num_inference_steps must be an integer >= 1"):
        CacheSchedule(K, {})  # type: ignore[arg-type]


@pytest.mark.parametrize("interval", [0, -3, 1.5])
def test_invalid_interval_is_refused(interval: object) -> None:
    with pytest.raises(ValueError, match="cache_threshold"):
        CacheSchedule.periodic(BLOCKS, 5, interval)  # type: ignore[arg-type]


def test_steps_are_frozen_plain_integers() -> None:
    steps = np.array([0, 3])
    schedule = CacheSchedule(5, {BLOCKS[0]: steps})  # type: ignore[dict-item]
    steps[1] = 4
    assert schedule.update_steps[BLOCKS[0]] == (0, 3)
    assert all(type(s) is int for s in schedule.update_steps[BLOCKS[0]])
    with pytest.raises(TypeError):
        schedule.update_steps[BLOCKS[0]] = (0,)  # type: ignore[index]
    with pytest.raises(AttributeError):
        schedule.num_inference_steps = 9  # type: ignore[misc]


@given(schedules)
def test_round_trips(schedule: CacheSchedule) -> None:
    for copied in (
        CacheSchedule.from_json(schedule.to_json()),
        pickle.loads(pickle.dumps(schedule)),
        copy.deepcopy(schedule),
    ):
        assert copied == schedule
        assert hash(copied) == hash(schedule)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', '{"version": 99}', "nonsense"])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected a schedule|not a schedule|Expecting value"):
        CacheSchedule.from_json(text)


def test_picture() -> None:
    schedule = CacheSchedule(6, {BLOCKS[0]: (0, 3), BLOCKS[1]: (0, 1, 5)}, "example")
    assert str(schedule).splitlines() == [
        "example: K = 6, 2 blocks",
        "decoder.layers.0_sa_block █··█·· 2",
        "decoder.layers.0_ff_block ██···█ 3",
    ]


def test_picture_of_many_steps_is_narrowed() -> None:
    schedule = CacheSchedule(6, {"b": (0, 3)}, "example")
    assert schedule.picture(width=3).splitlines()[1] == "b ██· 2"
    assert "2 steps a column" in schedule.picture(width=3)
