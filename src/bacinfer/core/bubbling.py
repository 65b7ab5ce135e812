"""Bubbling Union (BU): high-error blocks also update whenever a feed-forward block downstream of them does.

Reusing a residual in an early layer makes the input of every later layer stale; a later feed-forward block that
is recomputed then works on stale inputs, and the error surges (BAC, arXiv 2506.13456).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from bacinfer.core.schedule import CacheSchedule

_BLOCK_KEY = re.compile(r"(?:^|\.)(\d+)_(\w+)$")


def bubbling_union(schedule: CacheSchedule, selected: Collection[str]) -> CacheSchedule:
    """The schedule in which each selected block also updates at the steps of the feed-forward blocks downstream.

    Every selected block's update steps become the union of its own and those that `schedule` gives to each
    ``ff_block`` whose layer index is at least its own.

    Args:
        schedule: The blocks' own update steps, as the ACS found them.
        selected: Keys of the high-error blocks (see `select_blocks`).

    Raises:
        ValueError: if a selected block is not in the schedule, or a key does not have the form
            ``<layers>.<index>_<kind>``.
    """
    unknown = [block for block in selected if block not in schedule.update_steps]
    if unknown:
        raise ValueError(
            f"bubbling union selects blocks without a schedule: {unknown}; scheduled are {list(schedule.update_steps)}"
        )
    feed_forward = {b: steps for b, steps in schedule.update_steps.items() if split_block_key(b)[1] == "ff_block"}
    union = dict(schedule.update_steps)
    for block in selected:
        layer, _ = split_block_key(block)
        downstream = [steps for b, steps in feed_forward.items() if split_block_key(b)[0] >= layer]
        union[block] = tuple(sorted(set(union[block]).union(*downstream)))
    return replace(schedule, update_steps=union, label=f"{schedule.label}, BU {len(selected)}")


def split_block_key(block: str) -> tuple[int, str]:
    """Layer index and kind of a block key: ``decoder.layers.3_ff_block`` is ``(3, 'ff_block')``.

    Raises:
        ValueError: if the key does not have that form.
    """
    match = _BLOCK_KEY.search(block)
    if match is None:
        raise ValueError(
            f"block key {block!r} does not end in '<layer index>_<kind>', as in 'decoder.layers.3_ff_block'"
        )
    return int(match[1]), match[2]


def layer_and_kind(block: str) -> tuple[str, str]:
    """Layer and kind of a block, for tables and pictures: ``('decoder.layers.3', 'ff_block')``.

    A layer without a number has a key that does not tell the two apart: then the key stands for both.
    """
    match = _BLOCK_KEY.search(block)
    return (block[: match.end(1)], match[2]) if match else (block, block)


def block_error(residuals: Tensor) -> float:
    """How much a block's residual changes over denoising: the mean over all pairs of steps i < j of mean |r_i − r_j|.

    Args:
        residuals: [K, ...], the residual at each denoising step.

    Raises:
        ValueError: if there are fewer than two steps.
    """
    if len(residuals) < 2:
        raise ValueError(f"the error of a block needs at least two denoising steps, got {len(residuals)}")
    flat = residuals.reshape(len(residuals), -1).double()
    return float(torch.pdist(flat, p=1).mean() / flat.shape[1])


def select_blocks(errors: Mapping[str, float], num_blocks: int) -> dict[str, float]:
    """The `num_blocks` blocks with the largest error, largest first (equal errors: in the order given).

    Raises:
        ValueError: if `num_blocks` is not in 1..number of blocks.
    """
    if not 1 <= num_blocks <= len(errors):
        raise ValueError(f"num_bu_blocks must be in 1..{len(errors)}, the number of blocks, got {num_blocks}")
    return dict(sorted(errors.items(), key=lambda item: -item[1])[:num_blocks])
