"""The eager engine: layers with cache-aware forwards. Works with any policy whose layer classes are registered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bacinfer.core.blocks import Block
from bacinfer.core.engines.base import EngineStatus, Phase
from bacinfer.core.engines.planned_scheduler import warm_steps
from bacinfer.core.engines.sampling_call import SamplingCall
from bacinfer.core.engines.trajectory import COLD, WARM, Trajectory
from bacinfer.core.handle import PolicyHandle
from bacinfer.core.module_tree import ModuleTree
from bacinfer.core.patching import Patch, remove_patches

_TRAINS = attrgetter("training")


class EagerEngine:
    """Patches what samples, the model's forward and the forward of every layer that holds blocks.

    Attributes:
        products: Makes a context in which the policy samples; subclasses say by it how products are computed.

    Raises:
        RuntimeError: at sampling, if the number of denoising steps, the model or the forward of a layer's class has
            changed, the model is in train mode with dropout, or there are not exactly K steps.
    """

    name: ClassVar[str] = "eager"
    products: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __init__(self, policy: Any, blocks: Sequence[Block], phases: Sequence[Phase]) -> None:
        self.policy = policy
        self.reason = ""  # why this engine, where that was for the library to decide
        self.handle = PolicyHandle.of(policy)
        self.phases = tuple(phases)
        self._modules = ModuleTree(self.handle.model)
        self.trajectory = Trajectory([phase.schedule.num_inference_steps for phase in phases])
        layers = [list(group) for _, group in groupby(blocks, key=lambda block: block.layer_name)]
        self.layers = [_CachedLayer(layer_blocks, phases, self.trajectory) for layer_blocks in layers]
        self.patches: list[Patch] = [*self.handle.patches, *self.layers, _Sampling(*self.handle.sample, self)]
        if self.handle.steps == "model":
            self.patches.append(_CountedModel(self.handle.model, self.trajectory))
        else:
            self.layers[0].starts_step = True
        if hasattr(self.handle.owner, "compute_loss"):
            self.patches.append(_Loss(self.handle.owner, self.trajectory))

    @property
    def status(self) -> EngineStatus:
        return EngineStatus(self.name, self.reason)

    def attach(self) -> None:
        for patch in self.patches:
            patch.install()

    def detach(self) -> None:
        remove_patches(self.patches)
        self.trajectory.end()

    def refresh(self) -> None:
        """Nothing to do: the layers compute with the weights that they have."""

    def begin(self, phase: int = COLD) -> None:
        policy, K = self.policy, self.trajectory.lengths[COLD]
        if (found := policy.num_inference_steps) != K:
            raise RuntimeError(
                f"policy.num_inference_steps is {found}, but the cache was applied for K = {K}; apply a schedule for "
                f"K = {found}, or remove the cache first"
            )
        if policy.model is not self.handle.model:
            raise RuntimeError("policy.model was replaced after the cache was applied to it; apply the cache again")
        for layer in self.layers:
            layer.check_class()
        if any(map(_TRAINS, self._modules.now())):
            _refuse_dropout(self.handle.model)
        self.trajectory.begin(phase)

    def denoise(self, call: SamplingCall) -> Tensor:
        """See `Engine`; a loop like `conditional_sample`'s."""
        steps = warm_steps(self.handle.owner, self.phases[WARM])
        self.begin(WARM)
        x, x0 = call.draw_noise() if call.start is None else call.start, None
        for step in steps.steps:
            x = torch.where(call.is_given, call.given, x)
            with self.products():
                output = self.handle.model(x, torch.tensor(step.timestep, device=x.device), call.condition)
            noise = call.draw_noise() if step.draws_noise else torch.zeros_like(x)
            x, x0 = steps.next_sample(step, x, output, noise, x0)
        return torch.where(call.is_given, call.given, x)


class _Sampling(Patch):
    """What samples: one denoising trajectory."""

    def __init__(self, owner: Any, name: str, engine: EagerEngine) -> None:
        super().__init__(owner, name)
        self.engine = engine

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.engine.begin()
        try:
            with self.engine.products():
                actions = self.original(*args, **kwargs)
            self.engine.trajectory.check_complete()
            return actions
        finally:
            self.engine.trajectory.end()


class _Loss(Patch):
    """`compute_loss`: its model calls are no denoising steps, also where `reset_cache` announced some."""

    def __init__(self, policy: Any, trajectory: Trajectory) -> None:
        super().__init__(policy, "compute_loss")
        self.trajectory = trajectory

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with self.trajectory.suspended():
            return self.original(*args, **kwargs)


class _CountedModel(Patch):
    """The model's forward: one denoising step."""

    def __init__(self, model: nn.Module, trajectory: Trajectory) -> None:
        super().__init__(model, "forward")
        self.trajectory = trajectory

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with self.trajectory.model_call(_described(args, kwargs)):
            return self.original(*args, **kwargs)


class _CachedLayer(Patch):
    """A layer's forward, block by block: each computed and stored, or its stored residual reused."""

    def __init__(self, blocks: Sequence[Block], phases: Sequence[Phase], trajectory: Trajectory) -> None:
        super().__init__(blocks[0].layer, "forward")
        self.trajectory = trajectory
        self.name_in_model, self.adapter = blocks[0].layer_name, blocks[0].adapter
        self.input_name = self.adapter.input_name
        self.blocks = [
            (block, block.key, [phase.schedule.update_mask(block.key) for phase in phases]) for block in blocks
        ]
        masks_of_phases = zip(*(masks for *_, masks in self.blocks), strict=True)
        self.nothing_to_store = [_nothing_to_store(masks) for masks in masks_of_phases]
        self.starts_step = False  # whether each call is the next denoising step

    def check_class(self) -> None:
        """Raises RuntimeError if the layer's class computes something else by now than what was split into blocks."""
        if not self.adapter.fits(self.owner):
            raise RuntimeError(
                f"layer {self.name_in_model!r} got another forward through its class ({type(self.owner).__name__}) "
                f"after the cache was applied; apply the cache again, or undo that"
            )

    def run(self, *args: Any, **kwargs: Any) -> Any:
        trajectory = self.trajectory
        if self.starts_step:
            trajectory.start_step(_described(args, kwargs))
        step, phase = trajectory.step, trajectory.phase
        if step is None or (self.nothing_to_store[phase][step] and trajectory.observer is None):
            # Its own forward, whose fused kernels may round differently from its parts.
            return self.original(*args, **kwargs)
        trajectory.enter(self.name_in_model, step)
        x, *args = args or (kwargs.pop(self.input_name),)  # type: ignore[assignment]
        for block, key, updates in self.blocks:
            if updates[phase][step]:
                residual = block.spec.residual(self.owner, x, *args, **kwargs)
                trajectory.residuals[key] = residual.detach()
            else:
                residual = trajectory.residuals[key]
            if trajectory.observer is not None:
                trajectory.observer(block, step, residual)
            x = block.spec.merge(self.owner, x, residual, *args, **kwargs)
        return x


def _described(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Shapes, dtypes and devices of a call's tensors."""
    return [(tuple(a.shape), a.dtype, str(a.device)) for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]


def _nothing_to_store(masks: Sequence[tuple[bool, ...]]) -> tuple[bool, ...]:
    """For each step, whether all blocks of a layer are computed there and none is reused at the next step."""
    everything = [all(updates) for updates in zip(*masks, strict=True)]
    return tuple(now and after for now, after in zip(everything, [*everything[1:], True], strict=True))


def _refuse_dropout(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module.training:
            p = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "dropout", 0.0)
            if isinstance(p, float) and p > 0:
                raise RuntimeError(
                    f"{name or type(model).__name__} is in train mode with dropout p = {p}, so a stored residual "
                    f"would repeat one random mask; call policy.eval() before sampling with a cache"
                )
