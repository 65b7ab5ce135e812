from __future__ import annotations

import inspect

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

from bacinfer import Sampler
from bacinfer.core.engines.base import UnsupportedPolicyError
from bacinfer.core.engines.denoising_steps import plan_steps, read_steps, runge_kutta_steps
from core.fused.fused_helpers import make_scheduler

PREDICTIONS = ("epsilon", "sample", "v_prediction")


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("settings", [{}, {"clip_sample": False}, {"clip_sample_range": 0.3}], ids=str)
@pytest.mark.parametrize(
    ("kind", "variance"),
    [("ddpm", {"variance_type": "fixed_small"}), ("ddpm", {"variance_type": "fixed_small_log"}), ("ddim", {})],
    ids=str,
)
@pytest.mark.parametrize("K", [100, 16, 1])
def test_every_step_is_that_of_diffusers(
    kind: str, variance: dict, prediction_type: str, settings: dict, K: int
) -> None:  # type: ignore[type-arg]
    scheduler = make_scheduler(kind, 100, prediction_type=prediction_type, **variance, **settings)
    sampler = read_steps(scheduler, K)
    assert sampler.timesteps == tuple(int(t) for t in scheduler.timesteps)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 3, generator=generator)
    for step, t in zip(sampler.steps, scheduler.timesteps, strict=True):
        y = torch.randn(x.shape, generator=generator)
        before = generator.get_state()
        expected = scheduler.step(y, t, x, generator=generator).prev_sample
        drew = not torch.equal(generator.get_state(), before)
        assert step.draws_noise == drew
        generator.set_state(before)
        noise = torch.randn(x.shape, generator=generator) if drew else 0.0
        x0 = (step.a * x + step.b * y) / step.s
        x0 = x0 if sampler.clip is None else x0.clamp(-sampler.clip, sampler.clip)
        found = step.c * x0 + step.d * x + step.e * y + step.sigma * noise
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        x = expected.clamp(-3, 3)


@pytest.mark.skipif(
    "timesteps" not in inspect.signature(DPMSolverMultistepScheduler.set_timesteps).parameters,
    reason="this diffusers chooses the timesteps of DPM-Solver++ itself",
)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(("algorithm", "eta"), [("dpmsolver++", 0.0), ("sde-dpmsolver++", 1.0)])
@pytest.mark.parametrize("timesteps", [(80, 60, 40, 20, 0), (99, 50, 3), (40,)], ids=str)
def test_dpm_is_that_of_diffusers(timesteps: tuple[int, ...], algorithm: str, eta: float, prediction_type: str) -> None:
    scheduler = make_scheduler("ddpm", 100, prediction_type=prediction_type, clip_sample=False)
    steps = plan_steps(scheduler, Sampler("dpm", timesteps, eta))
    theirs = DPMSolverMultistepScheduler.from_config(scheduler.config, algorithm_type=algorithm)
    theirs.set_timesteps(timesteps=list(timesteps))
    generator, other = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    x = expected = torch.linspace(-2, 2, 24).view(2, 4, 3)
    x0 = None
    for step, t in zip(steps.steps, theirs.timesteps, strict=True):
        y = torch.sin(3 * expected + t)
        expected = theirs.step(y, t, expected, generator=generator).prev_sample
        noise = torch.randn(x.shape, generator=other)
        x, x0 = steps.next_sample(step, x, y, noise, x0)
        assert step.draws_noise == (step.sigma > 0)
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (make_scheduler(thresholding=True), "dynamic thresholding"),
        (make_scheduler(variance_type="fixed_large"), "variance_type is 'fixed_large'"),
        (DPMSolverMultistepScheduler(num_train_timesteps=10), "is a DPMSolverMultistepScheduler"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_formulas_lack_is_refused(scheduler, reason: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UnsupportedPolicyError, match=reason):
        read_steps(scheduler, 10)


def test_a_scheduler_that_computes_something_else_is_refused() -> None:
    class Damped(DDIMScheduler):
        def step(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            result = super().step(*args, **kwargs)
            result.prev_sample *= 0.9
            return result

    Damped.__name__ = "DDIMScheduler"  # as a fork of diffusers would call it
    with pytest.raises(UnsupportedPolicyError, match="computes another step at timestep 9"):
        read_steps(Damped(num_train_timesteps=10), 10)


def test_runge_kutta_of_order_four() -> None:
    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        return torch.sin(3 * x) + t * x

    x = found = torch.linspace(-1, 1, 5, dtype=torch.float64)
    times = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    for t, h in ((0.0, 0.3), (0.3, 0.7)):
        k1 = velocity(x, t)
        k2 = velocity(x + h / 2 * k1, t + h / 2)
        k3 = velocity(x + h / 2 * k2, t + h / 2)
        k4 = velocity(x + h * k3, t + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    memories = [torch.full_like(x, torch.nan)] * 2
    for step in runge_kutta_steps(times).steps:
        for keep in step.keeps:
            before = keep.old * memories[keep.memory] if keep.old else 0
            memories[keep.memory] = before + keep.new * found
        y = velocity(found, float(step.timestep))
        found = step.d * found + step.e * y + (0 if step.adds is None else memories[step.adds])
    torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-12)
