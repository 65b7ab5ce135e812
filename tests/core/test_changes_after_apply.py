"""What may happen to a policy after `apply_cache`: whatever it is, no action is another policy's.

The changes are data, `MUTATIONS`: another one is a line there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn

import bacinfer
from bacinfer.core.engines.fused import runners
from bacinfer.core.engines.fused.native_library import NativeUnavailableError
from core.fused.fused_helpers import act, apply_cache, make_policy, make_scheduler

BOUND = 1e-4  # of normalised actions; every change moves them by a hundred times as much


@dataclass(frozen=True)
class Mutation:
    """One change to a Diffusion Policy policy with decoder layers, made after its first call.

    Attributes:
        name: What it does.
        make: Does it, to a policy; whatever concerns other policies too through a monkeypatch.
        refused: What the next call says, as a pattern, where it is refused; None: its actions are those of the changed
            policy.
        leaves_a_trace: Whether the very next call can see it; otherwise it takes `refresh`.
    """

    name: str
    make: Callable[[Any, pytest.MonkeyPatch], object]
    refused: str | None = None
    leaves_a_trace: bool = True


def layers(policy: Any) -> Any:
    return policy.model.decoder.layers


def scaled(output: Tensor) -> Tensor:
    return output * 1.5


def wrap(owner: Any, name: str, change: Callable[[Any], Any] = scaled) -> None:
    """Replaces a method of one object by one that changes its result."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: change(original(*args, **kwargs)))


def damped(output: Any) -> Any:
    output.prev_sample = 0.9 * output.prev_sample
    return output


def step_wrapped(policy: Any, _: pytest.MonkeyPatch) -> None:
    wrap(policy.noise_scheduler, "step", damped)


def timesteps_wrapped(policy: Any, _: pytest.MonkeyPatch) -> None:
    original = policy.noise_scheduler.set_timesteps

    def reversed_timesteps(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        policy.noise_scheduler.timesteps = policy.noise_scheduler.timesteps.flip(0)

    policy.noise_scheduler.set_timesteps = reversed_timesteps


class ScaledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * super().forward(x)


class ScaledLayer(nn.TransformerDecoderLayer):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 1.5 * super().forward(*args, **kwargs)


class ScaledBlock(nn.TransformerDecoderLayer):
    def _ff_block(self, x: Tensor) -> Tensor:
        return 1.5 * super()._ff_block(x)


def fine_tuned(policy: Any, _: pytest.MonkeyPatch) -> None:
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.01)
    torch.manual_seed(2)
    batch = {"obs": torch.rand(4, 16, 20) * 512, "action": torch.rand(4, 16, 2)}
    policy.compute_loss(batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def others_loaded(policy: Any, _: pytest.MonkeyPatch) -> None:
    other = make_policy()
    fine_tuned(other, _)
    policy.load_state_dict(other.state_dict())


def all_scaled(policy: Any, _: pytest.MonkeyPatch) -> None:
    for parameter in policy.model.parameters():
        parameter.data.mul_(0.9)


def lora_merged(policy: Any, _: pytest.MonkeyPatch) -> None:
    for layer in layers(policy):
        weight = layer.linear1.weight
        weight.data += torch.outer(torch.linspace(0.1, 1, len(weight)), torch.linspace(1, 0.1, weight.shape[1]))


ALPHAS = torch.linspace(0.9, 0.1, 10)


def scheduler_replaced(policy: Any, _: pytest.MonkeyPatch) -> None:
    policy.noise_scheduler = make_scheduler("ddim", prediction_type="sample")


def head_replaced(policy: Any, _: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    policy.model.head = nn.Linear(16, 2)


def layer_replaced(policy: Any, _: pytest.MonkeyPatch) -> None:
    layers(policy)[1] = layers(make_policy())[0]


def method_of_class(owner: Callable[[Any], type], name: str, change: Callable[[Any], Any] = scaled) -> Any:
    """Replaces a method of a class of the policy, which the other policies of the process share."""

    def make(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(owner(policy), name)
        monkeypatch.setattr(owner(policy), name, lambda *args, **kwargs: change(original(*args, **kwargs)))

    return make


def hook_on_all_modules(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return scaled(output) if module is policy.model.head else None

    monkeypatch.setitem(nn.modules.module._global_forward_hooks, -1, hook)


def set_attribute(owner: Callable[[Any], Any], name: str, value: Any) -> Any:
    return lambda policy, _: setattr(owner(policy), name, value)


def first(policy: Any) -> Any:
    return layers(policy)[0]


def output_scaled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return scaled(output)


MUTATIONS = [
    Mutation("hook on a layer", lambda p, _: first(p).register_forward_hook(output_scaled)),
    Mutation("hook on the model", lambda p, _: p.model.register_forward_hook(output_scaled)),
    Mutation("hook on the head", lambda p, _: p.model.head.register_forward_hook(output_scaled)),
    Mutation("pre-hook", lambda p, _: p.model.register_forward_pre_hook(lambda m, args: (0.5 * args[0], *args[1:]))),
    Mutation("hook on all modules", hook_on_all_modules),
    Mutation("head.forward", lambda p, _: wrap(p.model.head, "forward")),
    Mutation("time_emb.forward", lambda p, _: wrap(p.model.time_emb, "forward")),
    Mutation("layer._sa_block", lambda p, _: wrap(first(p), "_sa_block")),
    Mutation("layer._ff_block", lambda p, _: wrap(first(p), "_ff_block")),
    Mutation("layer.activation", set_attribute(first, "activation", torch.sin)),
    Mutation("layer.norm1.eps", set_attribute(lambda p: first(p).norm1, "eps", 10.0)),
    Mutation("layer.norm_first", set_attribute(first, "norm_first", False)),
    Mutation("head.__class__", set_attribute(lambda p: p.model.head, "__class__", ScaledLinear)),
    Mutation("linear1.__class__", set_attribute(lambda p: first(p).linear1, "__class__", ScaledLinear)),
    Mutation("layer.__class__", set_attribute(first, "__class__", ScaledLayer), refused="apply the cache again"),
    Mutation("layer.__class__, another block", set_attribute(first, "__class__", ScaledBlock)),
    Mutation("class of linear layers", method_of_class(lambda p: nn.Linear, "forward")),
    Mutation(
        "class of layers", method_of_class(lambda p: nn.TransformerDecoderLayer, "forward"), "apply the cache again"
    ),
    Mutation("class of layers, a block", method_of_class(lambda p: nn.TransformerDecoderLayer, "_mha_block")),
    Mutation("class of the model", method_of_class(lambda p: type(p.model), "forward")),
    Mutation("class of the policy", method_of_class(type, "conditional_sample")),
    Mutation("class of the scheduler", method_of_class(lambda p: DDPMScheduler, "step", damped)),
    Mutation("class of the scheduler, its variance", method_of_class(lambda p: DDPMScheduler, "_get_variance")),
    Mutation("scheduler.step", step_wrapped),
    Mutation("scheduler.set_timesteps", timesteps_wrapped),
    Mutation("scheduler.alphas_cumprod", set_attribute(lambda p: p.noise_scheduler, "alphas_cumprod", ALPHAS)),
    Mutation("scheduler.alphas_cumprod in place", lambda p, _: p.noise_scheduler.alphas_cumprod.mul_(0.7)),
    Mutation("scheduler.alphas_cumprod by NumPy", lambda p, _: p.noise_scheduler.alphas_cumprod.numpy().__imul__(0.7)),
    Mutation("scheduler", scheduler_replaced),
    Mutation("a layer", layer_replaced),
    Mutation("a layer in two places", lambda p, _: layers(p).__setitem__(1, first(p)), refused="in two places"),
    Mutation(
        "the model", set_attribute(lambda p: p, "model", make_policy().model), refused="policy.model was replaced"
    ),
    Mutation("the model, compiled", lambda p, _: setattr(p, "model", torch.compile(p.model)), refused="was replaced"),
    Mutation("a module", head_replaced),
    Mutation("a parameter", lambda p, _: setattr(first(p).linear1, "weight", nn.Parameter(torch.ones(64, 16)))),
    Mutation("fine-tuned", fine_tuned),
    Mutation("other weights loaded", others_loaded),
    Mutation("rounded to halves", lambda p, _: p.to(torch.float8_e5m2).to(torch.float32)),
    Mutation("all weights scaled through .data", all_scaled),
    Mutation("a LoRA merged through .data", lora_merged),
    Mutation("rows pruned through .data", lambda p, _: first(p).linear1.weight.data[:20].zero_(), leaves_a_trace=False),
    Mutation("a bias by NumPy", lambda p, _: p.model.head.bias.detach().numpy().__iadd__(0.5), leaves_a_trace=False),
]


@pytest.fixture(params=["auto", "auto from Python"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    def unavailable(program: Any) -> Any:
        raise NativeUnavailableError("there is no compiler in this test")

    if request.param == "auto from Python":
        monkeypatch.setattr(runners, "NativeProgram", unavailable)
    return request.param.split()[0]


def actions_after(mutation: Mutation, **cache: Any) -> Tensor:
    """The actions of the call after a mutation, which comes after the first call."""
    policy = make_policy()
    if cache:
        apply_cache(policy, cache_threshold=3, **cache)
    before = act(policy)
    with pytest.MonkeyPatch.context() as monkeypatch:
        mutation.make(policy, monkeypatch)
        if not mutation.leaves_a_trace:
            bacinfer.refresh(policy)
        after = act(policy)
    assert (after - before).abs().max() > 100 * BOUND
    return after


@functools.cache
def eager_actions_after(mutation: Mutation) -> Tensor:
    return actions_after(mutation, engine="eager")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_change_after_the_first_call_is_seen(mutation: Mutation, engine: str) -> None:
    if mutation.refused is not None:
        for name in (engine, "eager"):
            with pytest.raises(RuntimeError, match=mutation.refused):
                actions_after(mutation, engine=name)
    else:
        found = actions_after(mutation, engine=engine)
        torch.testing.assert_close(found, eager_actions_after(mutation), rtol=0, atol=BOUND)


@pytest.mark.parametrize("mutation", [m for m in MUTATIONS if m.refused is None], ids=lambda mutation: mutation.name)
def test_without_caching_a_change_is_what_it_is_for_the_plain_policy(mutation: Mutation) -> None:
    policy, plain = apply_cache(make_policy(), cache_threshold=1), make_policy()
    act(policy)
    for changed in (policy, plain):
        with pytest.MonkeyPatch.context() as monkeypatch:
            mutation.make(changed, monkeypatch)
            bacinfer.refresh(changed)
            changed.after = act(changed)
    torch.testing.assert_close(policy.after, plain.after, rtol=0, atol=BOUND)


@pytest.mark.parametrize("mutation", [m for m in MUTATIONS if not m.leaves_a_trace], ids=lambda mutation: mutation.name)
def test_a_write_without_a_trace_is_seen_in_time(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = apply_cache(make_policy(), cache_threshold=3)
    before = act(policy)
    mutation.make(policy, monkeypatch)
    actions = [act(policy) for _ in range(64)]
    assert torch.equal(actions[0], before)  # or it would belong to those that leave a trace
    torch.testing.assert_close(actions[-1], eager_actions_after(mutation), rtol=0, atol=BOUND)


def test_who_asks_for_a_fused_engine_is_told_that_there_is_none_any_more() -> None:
    policy = apply_cache(make_policy(), engine="fused")
    act(policy)
    policy.model.head.register_forward_hook(output_scaled)
    with pytest.raises(RuntimeError, match=r"engine 'fused' cannot run this policy: its head has forward hooks"):
        act(policy)
