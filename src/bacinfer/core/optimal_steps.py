"""Mode 'optimal': the schedule that the analysis left in an assets directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from bacinfer import assets, bacinfer_files
from bacinfer.core.blocks import Block
from bacinfer.core.bubbling import block_error, bubbling_union, select_blocks
from bacinfer.core.schedule import CacheSchedule, check_num_updates, check_update_steps


def read_optimal_schedule(
    blocks: Sequence[Block],
    num_inference_steps: int,
    steps_dir: str | Path,
    num_caches: int,
    metric: str,
    num_bu_blocks: int,
) -> CacheSchedule:
    """Each block's update steps from ``steps_dir``, after bubbling union.

    A block without stored steps is missing in the schedule, hence computed at every step.

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
    check_num_updates(num_caches, num_inference_steps)
    if num_bu_blocks < 0:
        raise ValueError(f"num_bu_blocks must be >= 0, got {num_bu_blocks}")
    stored = assets.read_schedule(steps_dir, num_caches, metric)
    keys = [block.key for block in blocks]
    if stored is None or not stored.update_steps.keys() & set(keys):
        raise FileNotFoundError(_nothing_found(Path(steps_dir), num_caches, metric, stored))
    if stored.num_inference_steps not in (None, num_inference_steps):
        raise ValueError(
            f"{steps_dir}: {metric} {num_caches} was made for K = {stored.num_inference_steps} denoising steps, the "
            f"policy has {num_inference_steps}; run the analysis again for this policy"
        )
    update_steps = {
        key: check_update_steps(stored.update_steps[key], num_inference_steps, f"{steps_dir}: {key}")
        for key in keys
        if key in stored.update_steps
    }
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
    run, keys = assets.RunAssets.of_steps_dir(steps_dir), {block.key for block in blocks}
    selected = stored_selection(run, num_blocks)
    if selected is None:
        try:
            residuals = assets.read_activations(run)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"bubbling union needs {run.block_errors}, or residuals to select the blocks from, and neither is "
                f"there: {error}"
            ) from error
        # BACInfer records other layers as well.
        errors = {block: block_error(torch.from_numpy(r)) for block, r in residuals.items() if block in keys}
        selected = select_blocks(errors, num_blocks)
    unknown = set(selected) - keys
    if unknown:
        raise ValueError(f"{run.directory} selects blocks that the policy does not have: {sorted(unknown)}")
    return selected


def stored_selection(run: assets.RunAssets, num_blocks: int) -> dict[str, float] | None:
    """The blocks that bubbling union extends, from the errors that the analysis left; None if it left none.

    BACInfer's selection of so many blocks is used where BACInfer's files are all there is.

    Raises:
        ValueError: if a file is damaged or holds another number of blocks, or there are not so many blocks.
    """
    path = bacinfer_files.selection_file(run.directory, num_blocks)
    if path.is_file() and not run.block_errors.is_file():
        selected = bacinfer_files.read_block_errors(path)
        if len(selected) != num_blocks:
            raise ValueError(f"{path}: expected {num_blocks} blocks, found {len(selected)}")
        return selected
    try:
        errors = assets.read_block_errors(run)
    except FileNotFoundError:
        return None
    return select_blocks(errors, num_blocks)


def _nothing_found(steps_dir: Path, num_caches: int, metric: str, stored: assets.StoredSchedule | None) -> str:
    message = f"no update steps for metric {metric!r} with {num_caches} caches in {steps_dir}: "
    if stored is not None:
        return f"{message}it has those of other blocks than the policy's: {list(stored.update_steps)[:5]}"
    available = assets.available_schedules(steps_dir)
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
