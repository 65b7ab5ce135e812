"""Tiny Diffusion Policy policies for the fused engine, with a normaliser that leaves actions in [-1, 1] units, and
what it means that two of them agree."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from hypothesis import strategies as st
from torch import Tensor

from bacinfer import CacheSchedule, FastDiffusionPolicy
from bacinfer.core.blocks import find_blocks
from bacinfer.core.engines.denoising_steps import DenoisingSteps, read_steps
from bacinfer.core.engines.fused import native
from bacinfer.core.engines.fused.constants import Constants
from bacinfer.core.engines.fused.native_library import native_library
from bacinfer.core.engines.fused.networks import read_network
from bacinfer.policies import Checkpoint
from bacinfer.policies.checkpoint import create_policy
from bacinfer.policies.reference import LinearNormalizer
from core.fused.native_executable import EMULATOR
from tiny_policies import VARIANTS, observations, randomise, tiny_config

apply_cache, remove_cache = FastDiffusionPolicy.apply_cache, FastDiffusionPolicy.remove_cache

# How far actions may be from double precision: so many times as far as those of the reference, and so much of the
# largest value. (Over 1200 random policies, schedules and schedulers the engines needed 2.2 times, and half of them 1.)
ERROR_FACTOR, ERROR_FLOOR = 4.0, 1e-6

_CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
LEFT_OUT = ["", "-mno-avx512bf16", "-mno-avx512f"] if "avx512" in _CPU and not EMULATOR else [""]
"""What compilers are told to leave out, of the instructions that the processor has."""


def make_policy(variant: str = "causal", *overrides: str, scheduler: Any = None) -> Any:
    """A policy with random weights whose actions are its normalised ones."""
    torch.manual_seed(0)
    policy = randomise(create_policy(Checkpoint(Path("tiny.ckpt"), tiny_config(variant, *overrides), {})))
    units = {"obs": (torch.zeros(20), torch.full((20,), 512.0)), "action": (-torch.ones(2), torch.ones(2))}
    policy.set_normalizer(LinearNormalizer.from_ranges(units))
    if scheduler is not None:
        policy.noise_scheduler = scheduler
    return policy.eval()


def make_scheduler(kind: str = "ddpm", num_train_timesteps: int = 10, **settings: Any) -> Any:
    scheduler_class = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[kind]
    return scheduler_class(num_train_timesteps=num_train_timesteps, beta_schedule="squaredcos_cap_v2", **settings)


@torch.no_grad()
def make_constants(policy: Any, update_every: int = 1, sampler: DenoisingSteps | None = None) -> Constants:
    K = policy.num_inference_steps
    blocks = find_blocks(policy.model)
    schedule = CacheSchedule(K, {block.key: tuple(range(0, K, update_every)) for block in blocks})
    sampler = sampler or read_steps(policy.noise_scheduler, K)
    return Constants(read_network(policy.model, blocks), schedule, sampler, torch.float32)


def draw_policy(data: st.DataObject) -> tuple[Any, CacheSchedule, int]:
    """A policy of any kind and size, a schedule of it, and the batch that it is called with."""
    variant = data.draw(st.sampled_from(sorted(VARIANTS)))
    steps = data.draw(st.integers(1, 12))
    kind = data.draw(st.sampled_from(["ddpm", "ddim"]))
    scheduler_settings: dict[str, Any] = {
        "prediction_type": data.draw(st.sampled_from(["epsilon", "sample", "v_prediction"])),
        "clip_sample": data.draw(st.booleans()),
    }
    if kind == "ddpm":
        scheduler_settings["variance_type"] = data.draw(st.sampled_from(["fixed_small", "fixed_small_log"]))
    horizon = 8 if variant == "action_steps_only" else data.draw(st.integers(10, 19))
    n_emb, heads = data.draw(st.sampled_from([(16, 2), (12, 1), (24, 4)]))
    sizes = [f"horizon={horizon}", f"policy.model.n_emb={n_emb}", f"policy.model.n_head={heads}"]
    if variant == "action_steps_only":
        sizes = sizes[1:]
    scheduler = make_scheduler(kind, data.draw(st.sampled_from([12, 50])), **scheduler_settings)
    policy = make_policy(variant, f"policy.num_inference_steps={steps}", *sizes, scheduler=scheduler)
    schedule = CacheSchedule(
        steps, {key: data.draw(_update_steps(steps)) for key in [block.key for block in find_blocks(policy.model)]}
    )
    return policy, schedule, data.draw(st.integers(1, 5))


def _update_steps(num_steps: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.sets(st.integers(1, max(1, num_steps - 1)), max_size=num_steps).map(
        lambda steps: (0, *sorted(s for s in steps if s < num_steps))
    )


def leave_out(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code is what the compiler makes with `flag`, one of `LEFT_OUT`."""
    if flag:
        monkeypatch.setenv("CXX", f"c++ {flag}")
        library = native_library.__wrapped__()
        monkeypatch.setattr(native, "native_library", lambda: library)


def act(policy: Any, batch: int = 3, seed: int = 1) -> Tensor:
    """All that one call puts out, [B, T, action and painted observation], with the noise of `seed`."""
    torch.manual_seed(seed)
    with torch.no_grad():
        result = policy.predict_action(observations(batch))
    scaled = [result["action_pred"], *([result["obs_pred"] / 512] if "obs_pred" in result else [])]
    return torch.cat(scaled, dim=-1)


def with_cache(policy: Any, engine: str, **cache: Any) -> Any:
    """A copy with a cache that `engine` runs."""
    return apply_cache(copy.deepcopy(policy), engine=engine, **cache)


def act_with(policy: Any, engine: str, batch: int = 3, **cache: Any) -> Tensor:
    """What such a copy puts out."""
    return act(with_cache(policy, engine, **cache), batch)


def assert_agree(found: Tensor, reference: Any, call: Callable[[Any], Tensor] = act, rounding: float = 0.0) -> None:
    """Asserts that `found` is what `reference` puts out, up to what single precision makes of it.

    What rounding does depends on the machine, and samplers magnify it. So both are measured against the reference in
    double precision: `found` may be about as far from it as the reference itself is.

    Args:
        found: What an engine put out.
        reference: A policy, plain or in the eager engine.
        call: What it was called with.
        rounding: What rounding does, where the reference may be nearer by chance (see `effect_of_rounding`).
    """
    exact = in_double_precision(reference, call)
    assert exact.dtype == torch.float64
    error, own = ((output - exact).abs().max().item() for output in (found, call(reference)))
    bound = ERROR_FACTOR * max(own, rounding) + ERROR_FLOOR * max(1.0, exact.abs().max().item())
    assert error <= bound, f"{error:.2g} from double precision, at most {bound:.2g} was expected"


def effect_of_rounding(reference: Any, call: Callable[[Any], Tensor], draws: int = 8) -> float:
    """How far the exact actions move, at most, where each weight is rounded once to single precision: RMS over draws.

    The same on all machines, and no more than what an engine does, which rounds at least once for each weight.
    """
    exact, unit = in_double_precision(reference, call), torch.finfo(torch.float32).eps / 2
    moved = []
    for seed in range(draws):
        policy, generator = copy.deepcopy(reference).double(), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in policy.parameters():
                weight *= 1 + unit * (2 * torch.rand(weight.shape, dtype=torch.float64, generator=generator) - 1)
        moved.append((in_double_precision(policy, call) - exact).abs().max())
    return torch.stack(moved).square().mean().sqrt().item()


def in_double_precision(policy: Any, call: Callable[[Any], Tensor] = act) -> Tensor:
    """What `call` makes of a copy with the same weights and the same noise in double precision."""
    policy = copy.deepcopy(policy).double()
    draw = torch.randn

    def draw_single(*shape: Any, dtype: torch.dtype = torch.float32, **settings: Any) -> Tensor:
        return draw(*shape, dtype=torch.float32, **settings).to(dtype)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch, "randn", draw_single)
        return call(policy)
