"""What a policy is: where its denoising model, its number of denoising steps and its sampling are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import nn

from bacinfer.core.patching import Patch

if TYPE_CHECKING:
    from bacinfer.core.engines.loops import Loop


class Policy(Protocol):
    """A policy that names its parts as Diffusion Policy does; any other one takes a `PolicyHandle`.

    Attributes:
        model: The denoising model, called once a denoising step.
        num_inference_steps: K, the number of denoising steps of one call.
    """

    @property
    def model(self) -> nn.Module: ...

    @property
    def num_inference_steps(self) -> int: ...

    def predict_action(self, observation: Any, /) -> Any:
        """Samples one action chunk: from a dict of tensors [B, ...] to one with ``action`` [B, T, D]."""


@dataclass(frozen=True)
class PolicyHandle:
    """A policy whose parts have other names. Every function takes it in the place of the policy.

    Attributes:
        model: The denoising model, called once a denoising step.
        num_inference_steps: K, the number of denoising steps of one call.
        sample: An object and the name of its method that denoises one action chunk, ``(policy, "sample_actions")``.
            The method is replaced on this very object while a plan is applied to it.
        steps: Where denoising steps are counted: at the calls of ``"model"``, or, where the loop calls the model's
            layers itself, at those of its ``"first block"``.
        act: Takes an observation and returns actions by way of `sample`, where that is called with something else,
            such as what was encoded of the observation; None: `sample` takes observations.
        patches: What else is replaced while a plan is applied: for a loop that computes the layers' work without
            calling them, a patch that calls the model in its place.
        num_steps: An object and its attribute that `sample` reads the number of its steps from, which a plan's sampler
            sets during each call. None: plans with a sampler are refused.
        scheduler: Likewise the diffusers scheduler that the loop goes through, for DDIM, DPM-Solver++ and given
            timesteps. None: a sampler changes the number of steps only.
        n_action_steps: Actions of a chunk that are executed before the next one is sampled, where that is known.
        loop: The denoising loop, where it is one that programs can stand for (`core.engines.loops`); another method
            than `sample`, which comes to it.

    Raises:
        TypeError: if the model is no module, or the object has no such method.
        ValueError: if K is not a positive integer, or `steps` is something else.
    """

    model: nn.Module
    num_inference_steps: int
    sample: tuple[Any, str]
    steps: Literal["model", "first block"] = "model"
    act: Callable[[Any], Any] | None = None
    patches: tuple[Patch, ...] = ()
    num_steps: tuple[Any, str] | None = None
    scheduler: tuple[Any, str] | None = None
    n_action_steps: int | None = None
    loop: Loop | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"policy.model must be a torch.nn.Module, got {type(self.model).__name__}")
        if not callable(getattr(*self.sample, None)):
            raise TypeError(f"{type(self.owner).__name__} has no method {self.sample[1]!r}")
        K = self.num_inference_steps
        if isinstance(K, bool) or not isinstance(K, int) or K < 1:
            raise ValueError(f"num_inference_steps must be an integer >= 1, got {K!r}")
        if self.steps not in ("model", "first block"):
            raise ValueError(f"steps are counted at the 'model' or the 'first block', got {self.steps!r}")

    @classmethod
    def of(cls, policy: Any) -> PolicyHandle:
        """The handle of a policy as it is now; of a handle itself.

        Raises:
            TypeError: if it lacks a part of `Policy`.
        """
        if isinstance(policy, cls):
            return policy
        missing = [name for name in ("model", "num_inference_steps", "predict_action") if not hasattr(policy, name)]
        if missing:
            raise TypeError(
                f"{type(policy).__name__} is not a diffusion policy that can be cached: it has no "
                f"{', '.join(missing)}. If its parts have other names, say so with a bacinfer.PolicyHandle"
            )
        return cls(
            policy.model,
            policy.num_inference_steps,
            (policy, "predict_action"),
            num_steps=(policy, "num_inference_steps"),
            scheduler=(policy, "noise_scheduler"),
        )

    @property
    def num_own_steps(self) -> int:
        """Steps of the loop: K, or fewer where an integrator of higher order calls the model several times a step."""
        return self.num_inference_steps if self.num_steps is None else getattr(*self.num_steps)

    @property
    def owner(self) -> Any:
        """The object that samples; what is applied to a policy is remembered there."""
        return self.sample[0]

    def __call__(self, observation: Any) -> Any:
        """Samples one action chunk."""
        act = self.act or getattr(*self.sample)
        return act(observation)
