"""What a noise scheduler does at each denoising step, as numbers that are known before the loop starts.

A step of DDPM (Ho et al., 2020, eq. 7), of DDIM (Song et al., 2021, eq. 12 and 16) or of DPM-Solver++ (Lu et al., 2022,
algorithm 2) takes the sample x and the model's output y to

    x0 = clamp((a x + b y) / s)
    x' = c x0 + d x + e y + f p + sigma z,    z ~ N(0, 1),  p: x0 of the step before

(Predicting noise, s is thousandths at the first steps, where x and b y nearly cancel: they do so before the division.)

The numbers are computed in single precision like diffusers computes them: so they round alike.
Nothing of diffusers is imported: its schedulers are recognised by their class, and every step is compared with what
the scheduler itself makes of the same numbers, so that one of another release that computes something else is
refused rather than mistaken.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bacinfer.core.engines.base import UnsupportedPolicyError
from bacinfer.core.patching import replaced_methods
from bacinfer.core.sampler import Sampler

_NUM_COMPARED = 10  # of a scheduler's own steps, where a plan takes others of its kind


@dataclass(frozen=True)
class Keep:
    """Keeps a sum over evaluations in one of two memories: it becomes ``old`` times itself and ``new`` times x."""

    memory: int
    old: float
    new: float


NUM_MEMORIES = 2


@dataclass(frozen=True)
class DenoisingStep:
    """One denoising step; the letters are those of the formulas above. Without `draws_noise` no noise is drawn.

    Attributes:
        timestep: What the model is told; of flow matching the time, from 0 to 1.
        keeps: What is kept of x before the step, for later ones of an integrator of higher order.
        adds: Which memory is added to x'; None: none.
    """

    timestep: int | float
    a: float
    b: float
    s: float
    c: float
    d: float
    e: float
    sigma: float
    draws_noise: bool
    f: float = 0.0
    keeps: tuple[Keep, ...] = ()
    adds: int | None = None


@dataclass(frozen=True)
class DenoisingSteps:
    """The steps of a trajectory, and the bound that x0 is clamped to (None: not clamped)."""

    steps: tuple[DenoisingStep, ...]
    clip: float | None

    @property
    def timesteps(self) -> tuple[int | float, ...]:
        return tuple(step.timestep for step in self.steps)

    def next_sample(
        self, step: DenoisingStep, x: Tensor, y: Tensor, noise: Tensor, previous: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x' and x0, by the formulas above; `previous` is x0 of the step before, for steps with f."""
        x0 = (step.a * x + step.b * y) / step.s
        x0 = x0 if self.clip is None else x0.clamp(-self.clip, self.clip)
        following = step.c * x0 + step.d * x + step.e * y + step.sigma * noise
        if step.f:
            assert previous is not None
            following = following + step.f * previous
        return following, x0


def read_steps(scheduler: Any, num_inference_steps: int) -> DenoisingSteps:
    """The steps of a diffusers `DDPMScheduler` or `DDIMScheduler`, whose timesteps are set as sampling sets them.

    Raises:
        UnsupportedPolicyError: it is another scheduler, or uses something that these formulas lack.
    """
    kind = _scheduler_kind(scheduler)
    replaced = replaced_methods(scheduler)
    if replaced:
        raise UnsupportedPolicyError(f"somebody replaced {', '.join(replaced)} of its noise scheduler")
    config = scheduler.config
    if config.get("thresholding"):
        raise UnsupportedPolicyError("its scheduler uses dynamic thresholding")
    scheduler.set_timesteps(num_inference_steps)
    timesteps = [int(t) for t in scheduler.timesteps]
    if len(timesteps) != num_inference_steps:
        raise UnsupportedPolicyError(f"its scheduler makes {len(timesteps)} steps of K = {num_inference_steps}")
    alphas = scheduler.alphas_cumprod.cpu()
    if kind == "DDPMScheduler":
        following = [*timesteps[1:], -1]
        steps = [_ddpm_step(config, alphas, t, prev) for t, prev in zip(timesteps, following, strict=True)]
    else:
        stride = config["num_train_timesteps"] // num_inference_steps
        final = scheduler.final_alpha_cumprod.cpu()
        steps = [_ddim_step(config, alphas, final, t, t - stride) for t in timesteps]
    found = DenoisingSteps(tuple(steps), _clip(config))
    _compare_with(scheduler, found)
    return found


def plan_steps(scheduler: Any, sampler: Sampler) -> DenoisingSteps:
    """The steps that a plan's sampler makes of a diffusers scheduler's noise levels.

    Raises:
        UnsupportedPolicyError: the scheduler has no such levels, or takes steps that these formulas lack.
    """
    if not all(hasattr(scheduler, name) for name in ("config", "alphas_cumprod", "set_timesteps")):
        raise UnsupportedPolicyError(f"its noise scheduler is no diffusers scheduler but {scheduler!r}")
    config = scheduler.config
    if config.get("thresholding"):
        raise UnsupportedPolicyError("its scheduler uses dynamic thresholding")
    num_levels = config["num_train_timesteps"]
    timesteps = sampler.timesteps
    if (timesteps[0] + 1 if timesteps else sampler.num_steps) > num_levels:
        raise UnsupportedPolicyError(f"it was trained with {num_levels} timesteps, which {sampler.spec} exceeds")
    spaced = copy.copy(scheduler)  # setting timesteps leaves the policy's own scheduler alone
    if timesteps is None:
        spaced.set_timesteps(sampler.num_steps)
        timesteps = tuple(int(t) for t in spaced.timesteps)
    alphas = scheduler.alphas_cumprod.cpu()
    pairs = list(zip(timesteps, [*timesteps[1:], -1], strict=True))
    if sampler.kind == "own" and _scheduler_kind(scheduler) == "DDPMScheduler":
        read_steps(spaced, min(num_levels, _NUM_COMPARED))  # its own steps are those of the formulas
        steps = [_ddpm_step(config, alphas, t, following) for t, following in pairs]
    elif sampler.kind == "dpm":
        levels = alphas.double()
        befores = [None, *timesteps[:-1]]
        steps = [_dpm_step(config, levels, b, t, n, sampler.eta) for b, (t, n) in zip(befores, pairs, strict=True)]
    else:
        final = getattr(scheduler, "final_alpha_cumprod", torch.ones(())).cpu()
        steps = [_ddim_step(config, alphas, final, t, following, sampler.eta) for t, following in pairs]
    return DenoisingSteps(tuple(steps), _clip(config))


def euler_steps(times: Tensor) -> DenoisingSteps:
    """Those that integrate the velocity which a model predicts at each time but the last, ``x + (t' - t) y``."""
    steps = [_linear_step(float(t), d=1.0, e=float(following - t)) for t, following in pairwise(times)]
    return DenoisingSteps(tuple(steps), clip=None)


def runge_kutta_steps(times: Tensor) -> DenoisingSteps:
    """Those of the classical Runge-Kutta method of order 4, four evaluations between two times.

    From x the velocities are k1 at x, k2 at ``x2 = x + h/2 k1``, k3 at ``x3 = x + h/2 k2`` and k4 at ``x4 = x + h k3``,
    and ``x' = x + h/6 (k1 + 2 k2 + 2 k3 + k4) = (-x + x2 + 2 x3 + x4) / 3 + h/6 k4``.
    """
    start, total = 0, 1  # the memories
    steps: list[DenoisingStep] = []
    for time, following in pairwise(times):
        t, h = float(time), float(following - time)
        steps += [
            _linear_step(t, d=1.0, e=h / 2, keeps=(Keep(start, 0.0, 1.0), Keep(total, 0.0, -1 / 3))),
            _linear_step(t + h / 2, d=0.0, e=h / 2, keeps=(Keep(total, 1.0, 1 / 3),), adds=start),
            _linear_step(t + h / 2, d=0.0, e=h, keeps=(Keep(total, 1.0, 2 / 3),), adds=start),
            _linear_step(t + h, d=1 / 3, e=h / 6, adds=total),
        ]
    return DenoisingSteps(tuple(steps), clip=None)


def _linear_step(t: float, d: float, e: float, keeps: tuple[Keep, ...] = (), adds: int | None = None) -> DenoisingStep:
    """``x' = d x + e y``, and what was kept."""
    return DenoisingStep(t, a=0.0, b=0.0, s=1.0, c=0.0, d=d, e=e, sigma=0.0, draws_noise=False, keeps=keeps, adds=adds)


def _clip(config: Any) -> float | None:
    return float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample") else None


def _scheduler_kind(scheduler: Any) -> str:
    kind = type(scheduler).__name__
    if kind not in ("DDPMScheduler", "DDIMScheduler"):
        raise UnsupportedPolicyError(f"its noise scheduler is a {kind}; known are DDPMScheduler and DDIMScheduler")
    return kind


def _predicted_x0(prediction_type: str, alpha: Tensor) -> tuple[float, float, float]:
    """a, b and s: x0 from the sample and what the model predicts."""
    signal, noise = float(alpha**0.5), float((1 - alpha) ** 0.5)
    if prediction_type == "epsilon":
        return 1.0, -noise, signal
    if prediction_type == "sample":
        return 0.0, 1.0, 1.0
    if prediction_type == "v_prediction":
        return signal, -noise, 1.0
    raise UnsupportedPolicyError(f"its scheduler's prediction_type is {prediction_type!r}")


def _ddpm_step(config: Any, alphas: Tensor, t: int, previous: int) -> DenoisingStep:
    variance_type = config["variance_type"]
    if variance_type not in ("fixed_small", "fixed_small_log"):
        raise UnsupportedPolicyError(f"its scheduler's variance_type is {variance_type!r}")
    alpha = alphas[t]
    alpha_previous = alphas[previous] if previous >= 0 else torch.ones_like(alpha)
    ratio = alpha / alpha_previous
    a, b, s = _predicted_x0(config["prediction_type"], alpha)
    variance = _posterior_variance(alpha, alpha_previous)
    return DenoisingStep(
        timestep=t,
        a=a,
        b=b,
        s=s,
        c=float(alpha_previous**0.5 * (1 - ratio) / (1 - alpha)),
        d=float(ratio**0.5 * (1 - alpha_previous) / (1 - alpha)),
        e=0.0,
        sigma=float(variance.clamp(min=1e-20) ** 0.5) if t > 0 else 0.0,  # the floor is diffusers'
        draws_noise=t > 0,
    )


def _ddim_step(
    config: Any, alphas: Tensor, final_alpha: Tensor, t: int, previous: int, eta: float = 0.0
) -> DenoisingStep:
    alpha = alphas[t]
    alpha_previous = alphas[previous] if previous >= 0 else final_alpha
    signal, noise = float(alpha**0.5), float((1 - alpha) ** 0.5)
    a, b, s = _predicted_x0(config["prediction_type"], alpha)
    # the predicted noise, from the sample and the model's output
    of_sample, of_output = {
        "epsilon": (0.0, 1.0),
        "sample": (1 / noise, -signal / noise),
        "v_prediction": (noise, signal),
    }[config["prediction_type"]]
    variance = eta**2 * _posterior_variance(alpha, alpha_previous)
    direction = float((1 - alpha_previous - variance) ** 0.5)
    return DenoisingStep(
        timestep=t,
        a=a,
        b=b,
        s=s,
        c=float(alpha_previous**0.5),
        d=direction * of_sample,
        e=direction * of_output,
        sigma=float(variance**0.5),
        draws_noise=eta > 0,
    )


def _dpm_step(config: Any, alphas: Tensor, before: int | None, t: int, following: int, eta: float) -> DenoisingStep:
    """DPM-Solver++(2M): a step of first order, from the x0 that is on a line with those of this step and the one
    before in the logarithm of the signal-to-noise ratio; with eta 1 SDE-DPM-Solver++(2M).

    Args:
        before: The timestep of the step before; None: this is the first one. The first and the last have no such line.
    """
    alpha = alphas[t]
    alpha_next = alphas[following] if following >= 0 else torch.ones_like(alpha)
    variance = eta**2 * _posterior_variance(alpha, alpha_next)
    of_sample = ((1 - alpha_next - variance) / (1 - alpha)) ** 0.5
    of_x0 = float(alpha_next**0.5 - of_sample * alpha**0.5)
    extrapolation = 0.0
    if before is not None and following >= 0:
        last, now, after = torch.logit(alphas[[before, t, following]])
        extrapolation = float((after - now) / (now - last)) / 2
    a, b, s = _predicted_x0(config["prediction_type"], alpha)
    return DenoisingStep(
        timestep=t,
        a=a,
        b=b,
        s=s,
        c=of_x0 * (1 + extrapolation),
        d=float(of_sample),
        e=0.0,
        sigma=float(variance**0.5),
        draws_noise=eta > 0 and following >= 0,
        f=-of_x0 * extrapolation,
    )


def _posterior_variance(alpha: Tensor, alpha_next: Tensor) -> Tensor:
    """Of a sample, given the one before its step and x0 (Ho et al., 2020, eq. 7)."""
    return (1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)


def _compare_with(scheduler: Any, found: DenoisingSteps) -> None:
    """Raises UnsupportedPolicyError unless the scheduler makes the same of random numbers, step by step."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 1, 4, 2, generator=generator)
    for step, t in zip(found.steps, scheduler.timesteps.cpu(), strict=True):
        expected = scheduler.step(y, t, x, generator=generator.manual_seed(int(step.timestep))).prev_sample
        generator.manual_seed(int(step.timestep))
        noise = torch.randn(x.shape, generator=generator) if step.draws_noise else torch.zeros_like(x)
        if not torch.allclose(found.next_sample(step, x, y, noise)[0], expected, rtol=1e-3, atol=1e-4):
            raise UnsupportedPolicyError(
                f"its {type(scheduler).__name__} computes another step at timestep {step.timestep} than its formula"
            )
