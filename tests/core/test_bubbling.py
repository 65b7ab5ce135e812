from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bacinfer import CacheSchedule, bubbling_union
from bacinfer.core.bubbling import block_error, select_blocks, split_block_key

STEPS = {
    "decoder.layers.0_sa_block": (0, 1),
    "decoder.layers.0_ff_block": (0, 2),
    "decoder.layers.1_mha_block": (0, 3),
    "decoder.layers.1_ff_block": (0, 4),
    "decoder.layers.2_ff_block": (0, 5),
}
SCHEDULE = CacheSchedule(10, STEPS, "x")


def test_selected_block_takes_the_steps_of_feed_forward_blocks_from_its_layer_on() -> None:
    schedule = bubbling_union(SCHEDULE, ["decoder.layers.1_mha_block"])
    assert schedule.update_steps == {**STEPS, "decoder.layers.1_mha_block": (0, 3, 4, 5)}


def test_union_is_with_the_acs_steps_not_with_steps_that_bu_added() -> None:
    # Layer 0's feed-forward block is extended itself; layer 0's self-attention must not see the extension twice.
    selected = ["decoder.layers.1_ff_block", "decoder.layers.0_sa_block"]
    schedule = bubbling_union(SCHEDULE, selected)
    assert schedule.update_steps["decoder.layers.0_sa_block"] == (0, 1, 2, 4, 5)
    assert schedule.update_steps["decoder.layers.1_ff_block"] == (0, 4, 5)


def test_one_selected_block_is_enough() -> None:
    assert bubbling_union(SCHEDULE, ["decoder.layers.0_ff_block"]).num_updates("decoder.layers.0_ff_block") == 4


def test_layers_are_compared_as_numbers() -> None:
    schedule = CacheSchedule(9, {"l.2_sa_block": (0, 1), "l.10_ff_block": (0, 7), "l.1_ff_block": (0, 8)})
    assert bubbling_union(schedule, ["l.2_sa_block"]).update_steps["l.2_sa_block"] == (0, 1, 7)


def test_unknown_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"without a schedule: \['decoder.layers.9_ff_block'\]"):
        bubbling_union(SCHEDULE, ["decoder.layers.9_ff_block"])


@given(st.sets(st.sampled_from(sorted(STEPS))))
def test_union_only_adds_steps_and_only_to_selected_blocks(selected: set[str]) -> None:
    schedule = bubbling_union(SCHEDULE, sorted(selected))
    for block, steps in STEPS.items():
        assert set(steps) <= set(schedule.update_steps[block])
        assert block in selected or schedule.update_steps[block] == steps
    assert SCHEDULE.update_steps == STEPS


def test_split_block_key() -> None:
    assert split_block_key("decoder.layers.12_mha_block") == (12, "mha_block")
    for key in ("decoder", "decoder.layers.x_ff_block", ""):
        with pytest.raises(ValueError, match="layer index"):
            split_block_key(key)


def test_block_error_is_the_mean_over_pairs() -> None:
    residuals = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(0))
    pairs = list(itertools.combinations(range(6), 2))
    expected = sum((residuals[i] - residuals[j]).abs().mean().item() for i, j in pairs) / len(pairs)
    assert block_error(residuals) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="at least two"):
        block_error(residuals[:1])


def test_select_blocks_takes_the_largest_errors() -> None:
    errors = {"a": 1.0, "b": 3.0, "c": 2.0, "d": 3.0}
    assert list(select_blocks(errors, 3)) == ["b", "d", "c"]
    for number in (0, 5):
        with pytest.raises(ValueError, match=r"in 1\.\.4"):
            select_blocks(errors, number)
