"""Mode 'optimal': the schedule that the analysis left in an assets directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from bacinfer import assets
from bacinfer.core.blocks import Block
from bacinfer.core.bubbling import block_error, bubbling_union, select_blocks
from bacinfer.core.schedule import CacheSchedule, check_update_steps


def read_optimal_schedule(
    blocks: Sequence[Block],
    num_inference_steps: int,
    steps_dir: str | Path,
    num_caches: int,
    metric: str,
    num_bu_blocks: int,
) -> CacheSchedule:
    """Each block's update steps from ``steps_dir``, after bubbling union.

    A block without a steps file is missing in the schedule, hence computed at every step.

    Args:
        blocks: The policy's blocks.
        num_inference_steps: K of the policy.
        steps_dir: ``assets/<task>/original/optimal_steps/<metric>``.
        num_caches: M, the number of update steps that the ACS gave to each block.
        metric: The similarity that the ACS used.
        num_bu_blocks: How many high-error blocks bubbling union extends; 0 for none.

    Raises:
        ValueError: if M is not in 1..K, a file is damaged or its steps are invalid for this K, or there are not
            `num_bu_blocks` known blocks.
        FileNotFoundError: if no block has steps for this metric and M; the message lists what is there.
    """
    if not 1 <= num_caches <= num_inference_steps:
        raise ValueError(f"num_caches must be in 1..{num_inference_steps} (K), got {num_caches}")
    if num_bu_blocks < 0:
        raise ValueError(f"num_bu_blocks must be >= 0, got {num_bu_blocks}")
    update_steps = {}
    for block in blocks:
        path = assets.steps_file(steps_dir, block.module_name, num_caches, metric)
        if path.is_file():
            steps = assets.read_steps(path, num_inference_steps)
            update_steps[block.key] = check_update_steps(steps, num_inference_steps, str(path))
    if not update_steps:
        raise FileNotFoundError(_nothing_found(Path(steps_dir), num_caches, metric))
    schedule = CacheSchedule(num_inference_steps, update_steps, f"optimal {metric}, M = {num_caches}")
    if num_bu_blocks == 0:
        return schedule
    selected = selected_blocks(blocks, steps_dir, num_bu_blocks)
    # A block without a schedule is computed at every step already.
    return bubbling_union(schedule, [block for block in selected if block in update_steps])


def selected_blocks(blocks: Sequence[Block], steps_dir: str | Path, num_blocks: int) -> dict[str, float]:
    """The blocks that bubbling union extends, with their errors: as selected by the analysis, or from its residuals.

    Raises:
        ValueError: if a file is damaged, names blocks that the policy lacks, or holds another number of blocks.
        FileNotFoundError: if neither the selection nor residuals are there.
    """
    run = assets.RunAssets.of_steps_dir(steps_dir)
    selected = stored_selection(run, num_blocks)
    if selected is None:
        keys = {block.module_name: block.key for block in blocks}
        try:
            residuals = assets.read_activations(run.activations)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"bubbling union needs {run.selected_blocks(num_blocks)}, or residuals to select the blocks from, and "
                f"neither is there: {error}"
            ) from error
        # BACInfer records outputs of other modules as well.
        errors = {keys[m]: block_error(torch.from_numpy(r)) for m, r in residuals.items() if m in keys}
        selected = select_blocks(errors, num_blocks)
    unknown = set(selected) - {block.key for block in blocks}
    if unknown:
        raise ValueError(f"{run.directory} selects blocks that the policy does not have: {sorted(unknown)}")
    return selected


def stored_selection(run: assets.RunAssets, num_blocks: int) -> dict[str, float] | None:
    """The blocks that bubbling union extends as the analysis left them, selected or with all errors; None if neither.

    Raises:
        ValueError: if a file is damaged or holds another number of blocks, or there are not so many blocks.
    """
    path = run.selected_blocks(num_blocks)
    if path.is_file():
        selected = assets.read_block_errors(path)
        if len(selected) != num_blocks:
            raise ValueError(f"{path}: expected {num_blocks} blocks, found {len(selected)}")
        return selected
    if run.block_errors.is_file():
        return select_blocks(assets.read_block_errors(run.block_errors), num_blocks)
    return None


def _nothing_found(steps_dir: Path, num_caches: int, metric: str) -> str:
    message = f"no update steps for metric {metric!r} with {num_caches} caches in {steps_dir}: "
    available = assets.available_steps(steps_dir)
    if available:
        found = ", ".join(f"{name} {number}" for name, number in available)
        return f"{message}it has those for {found}"
    if steps_dir.is_dir():
        names = sorted(p.name for p in steps_dir.iterdir())[:5]
        return f"{message}it holds {names or 'nothing'}; expected is assets/<task>/original/optimal_steps/<metric>"
    return (
        f"{message}there is no such directory. Compute the steps first: "
        f"python -m bacinfer.analysis.get_optimal_cache_update_steps -c CHECKPOINT -o assets/TASK"
    )
