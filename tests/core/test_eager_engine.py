from __future__ import annotations

import copy
import inspect
import pickle
import threading
import warnings

import dill
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bacinfer import CacheSchedule, FastDiffusionPolicy, ResidualBlock, register_layer, unregister_layer
from bacinfer.core.blocks import find_blocks
from bacinfer.core.engines.observing import observe_residuals
from helpers import WIDTH, DecoderModel, TinyPolicy, act, decoder_model, encoder_model, observation

apply_cache, remove_cache = FastDiffusionPolicy.apply_cache, FastDiffusionPolicy.remove_cache


def plain_actions(policy: TinyPolicy, **kwargs) -> Tensor:  # type: ignore[no-untyped-def]
    return act(remove_cache(copy.deepcopy(policy)), **kwargs)


def instance_attributes(policy: TinyPolicy) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in policy.named_modules()}


VARIANTS = [
    pytest.param(make, norm_first, id=f"{make.__name__}-{'pre' if norm_first else 'post'}-norm")
    for make in (decoder_model, encoder_model)
    for norm_first in (True, False)
]


# -- equality with the plain policy ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "norm_first"), VARIANTS)
def test_update_everywhere_equals_plain_bit_for_bit(make, norm_first: bool) -> None:  # type: ignore[no-untyped-def]
    policy = TinyPolicy(make(3, norm_first))
    plain = act(policy)
    cached = act(apply_cache(policy, cache_threshold=1, cache_mode="threshold"))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize(("make", "norm_first"), VARIANTS)
def test_computing_block_by_block_equals_the_layer(make, norm_first: bool) -> None:  # type: ignore[no-untyped-def]
    # An observer makes every layer run as its blocks, even where its own forward would do.
    policy = TinyPolicy(make(3, norm_first))
    plain = act(policy)
    with observe_residuals(policy, lambda block, step, residual: None):
        observed = act(policy)
    if make is decoder_model:
        assert torch.equal(observed, plain)
    else:  # nn.TransformerEncoderLayer's own forward is a fused kernel that rounds differently
        torch.testing.assert_close(observed, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("make", "norm_first"), VARIANTS)
def test_removal_restores_the_policy_exactly(make, norm_first: bool) -> None:  # type: ignore[no-untyped-def]
    policy = TinyPolicy(make(2, norm_first))
    attributes, plain = instance_attributes(policy), act(policy)
    apply_cache(policy, cache_threshold=4)
    assert not torch.equal(act(policy), plain)
    remove_cache(policy)
    assert torch.equal(act(policy), plain)
    assert instance_attributes(policy) == attributes
    assert policy.predict_action.__func__ is TinyPolicy.predict_action
    assert all("forward" not in vars(module) for module in policy.modules())


def test_removal_restores_methods_that_were_instance_attributes(policy: TinyPolicy) -> None:
    own_predict, own_forward = policy.predict_action, policy.model.decoder.layers[0].forward
    policy.predict_action = own_predict
    policy.model.decoder.layers[0].forward = own_forward
    remove_cache(apply_cache(policy))
    assert vars(policy)["predict_action"] is own_predict
    assert vars(policy.model.decoder.layers[0])["forward"] is own_forward


def test_removal_without_a_cache_changes_nothing(policy: TinyPolicy) -> None:
    attributes = instance_attributes(policy)
    assert remove_cache(policy) is policy
    assert instance_attributes(policy) == attributes


def test_removal_refuses_to_destroy_a_later_patch(policy: TinyPolicy) -> None:
    apply_cache(policy)
    cached = policy.predict_action
    policy.predict_action = lambda obs: cached(obs)
    with pytest.raises(RuntimeError, match=r"TinyPolicy.predict_action was replaced"):
        remove_cache(policy)
    assert FastDiffusionPolicy.summary(policy).mode == "threshold"
    policy.predict_action = cached
    remove_cache(policy)


def test_applying_again_replaces(policy: TinyPolicy) -> None:
    once = act(apply_cache(copy.deepcopy(policy), cache_threshold=3))
    apply_cache(policy, cache_threshold=5)
    apply_cache(policy, cache_threshold=2)
    apply_cache(policy, cache_threshold=3)
    assert torch.equal(act(policy), once)
    remove_cache(policy)
    assert "predict_action" not in vars(policy)


def test_refused_cache_leaves_the_old_one(policy: TinyPolicy) -> None:
    expected = act(apply_cache(policy, cache_threshold=3))
    with pytest.raises(ValueError, match="cache_threshold"):
        apply_cache(policy, cache_threshold=0)
    assert torch.equal(act(policy), expected)


def test_original_restores_a_cached_policy(policy: TinyPolicy) -> None:
    plain = act(policy)
    apply_cache(apply_cache(policy), cache_mode="original")
    assert torch.equal(act(policy), plain)
    assert FastDiffusionPolicy.summary(policy).mode == "original"


# -- truth that can be computed by hand ------------------------------------------------------------------------------


class Doubling(nn.Module):
    """x -> x + x -> 2x + 10·2x: two residual blocks, counted."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Identity(), nn.Identity()
        self.calls = {"first": 0, "second": 0}

    def forward(self, x: Tensor) -> Tensor:
        for name in ("first", "second"):
            x = x + self.residual(name, x)
        return x

    def residual(self, name: str, x: Tensor) -> Tensor:
        self.calls[name] += 1
        return x if name == "first" else 10 * x


class Counting:
    """The model's input grows by one at each denoising step; the action is the list of its outputs."""

    def __init__(self, num_inference_steps: int) -> None:
        self.model = nn.Sequential(Doubling())
        self.num_inference_steps = num_inference_steps

    def predict_action(self, obs: Tensor) -> list[float]:
        return [self.model(obs + k).item() for k in range(self.num_inference_steps)]


@pytest.fixture
def counting():  # type: ignore[no-untyped-def]
    blocks = [ResidualBlock(n, n, lambda layer, x, n=n: layer.residual(n, x)) for n in ("first", "second")]
    register_layer(Doubling, blocks)
    yield Counting(num_inference_steps=5)
    unregister_layer(Doubling)


def test_stored_residuals_are_reused_between_updates(counting: Counting) -> None:
    assert counting.predict_action(torch.tensor(1.0)) == [22 * x for x in (1, 2, 3, 4, 5)]
    counting.model[0].calls.update(first=0, second=0)
    schedule = CacheSchedule(5, {"0_first": (0, 3), "0_second": (0, 1, 4)})
    apply_cache(counting, schedule=schedule)
    # first stores 1 at step 0 and 4 at step 3; second stores ten times what it gets at steps 0, 1 and 4.
    expected = [
        (1 + 1) + 10 * (1 + 1),
        (2 + 1) + 10 * (2 + 1),
        (3 + 1) + 10 * (2 + 1),
        (4 + 4) + 10 * (2 + 1),
        (5 + 4) + 10 * (5 + 4),
    ]
    for _ in range(2):  # a second trajectory starts afresh
        assert counting.predict_action(torch.tensor(1.0)) == expected
    assert counting.model[0].calls == {"first": 4, "second": 6}


class GatedBlock(nn.Module):
    """An adaLN-gated transformer block (DiT): shift, scale and gate of each branch come from the condition."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.modulation = nn.Linear(dim, 6 * dim)

    def parameters_of(self, branch: int, condition: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shift, scale, gate = self.modulation(condition).chunk(2, -1)[branch].chunk(3, -1)
        return shift, scale, gate

    def branch(self, branch: int, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, _ = self.parameters_of(branch, condition)
        y = self.norm(x) * (1 + scale) + shift
        return self.mlp(y) if branch else self.attention(y, y, y, need_weights=False)[0]

    def gated(self, branch: int, x: Tensor, residual: Tensor, condition: Tensor) -> Tensor:
        return x + self.parameters_of(branch, condition)[2] * residual

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for branch in (0, 1):
            x = self.gated(branch, x, self.branch(branch, x, condition), condition)
        return x


class GatedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GatedBlock(WIDTH) for _ in range(2))
        self.time_emb = nn.Embedding(1000, WIDTH)

    def forward(self, sample: Tensor, timestep: Tensor, cond: Tensor) -> Tensor:
        for layer in self.layers:
            sample = layer(sample, condition=cond.mean(1, keepdim=True) + self.time_emb(timestep))
        return sample


def test_a_gated_layer_class_can_be_registered() -> None:
    register_layer(
        GatedBlock,
        [
            ResidualBlock(
                kind,
                module=module,
                residual=lambda layer, x, condition, i=i: layer.branch(i, x, condition),
                merge=lambda layer, x, residual, condition, i=i: layer.gated(i, x, residual, condition),
                weights=(module,),
            )
            for i, (kind, module) in enumerate([("sa_block", "attention"), ("ff_block", "mlp")])
        ],
    )
    try:
        policy = TinyPolicy(GatedModel())
        plain = act(policy)
        with observe_residuals(policy, lambda block, step, residual: None):
            assert torch.equal(act(policy), plain)
        # With every stored residual equal to the fresh one but the gate, only the gate is fresh: not plain, but close.
        cached = act(apply_cache(policy, cache_threshold=2))
        assert not torch.equal(cached, plain)
        assert (cached - plain).square().mean() < plain.square().mean()
        assert FastDiffusionPolicy.summary(policy).blocks["layers.1_ff_block"].updates == 5
        assert torch.equal(act(dill.loads(dill.dumps(policy))), cached)
        assert torch.equal(act(remove_cache(policy)), plain)
    finally:
        unregister_layer(GatedBlock)


# -- against a simulation of the cache written down independently ----------------------------------------------------


def simulate(policy: TinyPolicy, schedule: CacheSchedule, seed: int = 1) -> Tensor:
    """Caching by forward hooks on the dropouts, whose outputs are the residuals: computes everything, then replaces."""
    policy = copy.deepcopy(policy)
    step, stored, handles = [-1], {}, []

    def replace(key: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
            if schedule.update_mask(key)[step[0]]:
                stored[key] = output
            return stored[key]

        return hook

    for block in find_blocks(policy.model):
        module = block.layer.get_submodule(block.spec.module)
        handles.append(module.register_forward_hook(replace(block.key)))
    policy.model.register_forward_pre_hook(lambda module, args: step.__setitem__(0, step[0] + 1))
    return act(policy, seed=seed)


KEYS = [block.key for block in find_blocks(decoder_model(2))]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(2, 8).flatmap(
        lambda K: st.builds(
            CacheSchedule,
            st.just(K),
            st.fixed_dictionaries(
                {}, optional={k: st.sets(st.integers(1, K - 1)).map(lambda s: (0, *sorted(s))) for k in KEYS}
            ),
        )
    ),
    st.booleans(),
)
def test_random_schedules_equal_the_simulation(schedule: CacheSchedule, norm_first: bool) -> None:
    policy = TinyPolicy(decoder_model(2, norm_first), schedule.num_inference_steps)
    expected = simulate(policy, schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # blocks without a schedule
        apply_cache(policy, schedule=schedule)
    torch.testing.assert_close(act(policy), expected, rtol=0, atol=1e-6)


# -- what may change between calls -----------------------------------------------------------------------------------


def test_batch_and_dtype_may_change_between_calls(policy: TinyPolicy) -> None:
    apply_cache(policy, cache_threshold=3)
    fresh = copy.deepcopy(policy)
    for batch in (2, 5, 1):
        assert torch.equal(act(policy, observation(batch)), act(copy.deepcopy(fresh), observation(batch)))
    in_double = act(policy.double(), observation(2, dtype=torch.float64))
    assert in_double.dtype == torch.float64
    assert torch.equal(in_double, act(copy.deepcopy(fresh).double(), observation(2, dtype=torch.float64)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_may_change_between_calls(policy: TinyPolicy) -> None:
    apply_cache(policy, cache_threshold=3)
    on_cpu = act(policy)
    on_cuda = act(policy.cuda(), {"obs": observation()["obs"].cuda()})
    assert on_cuda.device.type == "cuda"
    assert torch.equal(act(policy.cpu()), on_cpu)


def test_random_stream_is_that_of_the_plain_policy(policy: TinyPolicy) -> None:
    act(policy)
    after_plain = torch.get_rng_state()
    act(apply_cache(policy))
    assert torch.equal(torch.get_rng_state(), after_plain)


def test_process_and_parameters_stay_as_they_are(policy: TinyPolicy) -> None:
    keys, grad = list(policy.state_dict()), torch.is_grad_enabled()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    signature = inspect.signature(policy.predict_action), inspect.signature(policy.model.forward)
    apply_cache(policy)
    act(policy)
    assert list(policy.state_dict()) == keys
    assert (torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled()) == (grad, fast_path)
    assert (inspect.signature(policy.predict_action), inspect.signature(policy.model.forward)) == signature


def test_gradients_flow_through_a_cached_policy(policy: TinyPolicy) -> None:
    apply_cache(policy, cache_threshold=5)
    policy.predict_action(observation())["action"].sum().backward()
    assert all(p.grad is not None for p in policy.model.decoder.parameters())


def test_exception_in_the_middle_leaves_a_usable_policy(policy: TinyPolicy) -> None:
    expected = act(apply_cache(policy, cache_threshold=3))
    calls = [0]

    def fail(module: nn.Module, args: object) -> None:
        calls[0] += 1
        if calls[0] == 5:
            raise KeyboardInterrupt

    handle = policy.model.decoder.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        act(policy)
    handle.remove()
    assert torch.equal(act(policy), expected)


def test_model_outside_of_sampling_is_plain(policy: TinyPolicy) -> None:
    args = torch.randn(3, 4, WIDTH), torch.tensor(7), torch.randn(3, 2, WIDTH)
    expected = policy.model(*args)
    apply_cache(policy)
    for _ in range(3):
        assert torch.equal(policy.model(*args), expected)


def test_own_loop_with_reset_cache(policy: TinyPolicy) -> None:
    x, obs = torch.randn(2, 4, WIDTH), observation()["obs"]

    def loop() -> list[Tensor]:
        return [policy.model(x, torch.tensor(k), obs) for k in range(policy.num_inference_steps)]

    plain = loop()
    apply_cache(policy, cache_threshold=5)
    outputs = []
    for _ in range(2):
        policy.reset_cache()
        outputs.append(loop())
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    fresh = [torch.equal(a, b) for a, b in zip(outputs[0], plain, strict=True)]
    assert fresh[0]
    assert fresh[5]
    assert not fresh[1]
    with pytest.raises(RuntimeError, match=r"reset_cache\(\) before each trajectory"):
        policy.model(x, torch.tensor(0), obs)
    remove_cache(policy)
    assert not hasattr(policy, "reset_cache")


# -- what is refused -------------------------------------------------------------------------------------------------


def test_changed_number_of_steps_is_refused(policy: TinyPolicy) -> None:
    apply_cache(policy)
    policy.num_inference_steps = 20
    with pytest.raises(RuntimeError, match="num_inference_steps is 20, but the cache was applied for K = 10"):
        act(policy)
    policy.num_inference_steps = 10
    act(policy)


def test_sampler_that_calls_the_model_another_number_of_times_is_refused(policy: TinyPolicy) -> None:
    class Twice(TinyPolicy):
        calls = 20

        def predict_action(self, obs_dict: dict[str, Tensor]) -> dict[str, Tensor]:
            for _ in range(self.calls):
                x = self.model(torch.zeros(2, 4, WIDTH), torch.tensor(0), obs_dict["obs"])
            return {"action_pred": x}

    policy = apply_cache(Twice())
    with pytest.raises(RuntimeError, match="more than K = 10 denoising steps"):
        act(policy)
    policy.calls = 9
    with pytest.raises(RuntimeError, match="took 9 denoising steps"):
        act(policy)


def test_train_mode_with_dropout_is_refused(policy: TinyPolicy) -> None:
    apply_cache(policy).train()
    with pytest.raises(RuntimeError, match=r"dropout p = 0.1.*policy.eval\(\)"):
        act(policy)
    act(policy.eval())


def test_train_mode_with_dropout_is_refused_of_a_module_that_came_after_a_call(policy: TinyPolicy) -> None:
    apply_cache(policy)
    act(policy)
    policy.model.came_later = nn.Sequential(nn.Dropout(0.1)).eval()
    act(policy)
    policy.model.came_later[0].train()
    with pytest.raises(RuntimeError, match=r"came_later\.0 is in train mode with dropout p = 0.1"):
        act(policy)


def test_train_mode_without_dropout_is_fine() -> None:
    layer = nn.TransformerDecoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
    act(apply_cache(TinyPolicy(DecoderModel(nn.TransformerDecoder(layer, 1)))).train())


def test_batch_that_changes_within_a_trajectory_is_refused(policy: TinyPolicy) -> None:
    apply_cache(policy).reset_cache()
    policy.model(torch.zeros(2, 4, WIDTH), torch.tensor(0), torch.zeros(2, 2, WIDTH))
    with pytest.raises(RuntimeError, match="inputs changed within a denoising trajectory"):
        policy.model(torch.zeros(1, 4, WIDTH), torch.tensor(1), torch.zeros(1, 2, WIDTH))


def test_a_layer_in_two_places_is_refused(policy: TinyPolicy) -> None:
    policy.model.decoder.layers[1] = policy.model.decoder.layers[0]
    plain = act(policy)
    assert torch.equal(act(apply_cache(policy, cache_threshold=1)), plain)
    apply_cache(policy, cache_threshold=3)
    with pytest.raises(RuntimeError, match=r"'decoder.layers.0' ran twice in denoising step 0.*in two places"):
        act(policy)


def test_a_layer_with_another_forward_of_its_own_is_refused(policy: TinyPolicy) -> None:
    layer = policy.model.decoder.layers[1]
    own_forward = layer.forward
    layer.forward = lambda *args, **kwargs: 2 * own_forward(*args, **kwargs)
    with pytest.raises(ValueError, match=r"the forward of layer 'decoder.layers.1' was replaced"):
        apply_cache(policy)


def test_a_loss_is_never_cached(policy: TinyPolicy) -> None:
    class Trained(TinyPolicy):
        def compute_loss(self, seed: int) -> Tensor:
            args = torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(seed)), torch.tensor(seed)
            return self.model(*args, torch.ones(3, 2, WIDTH)).square().mean()

    policy = Trained()
    expected = [policy.compute_loss(seed) for seed in range(3)]
    apply_cache(policy)
    policy.reset_cache()
    assert [policy.compute_loss(seed) for seed in range(3)] == expected
    assert torch.equal(act(policy), act(apply_cache(Trained())))
    remove_cache(policy)
    assert "compute_loss" not in vars(policy)


# -- copies, pickles, threads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p)), lambda p: dill.loads(dill.dumps(p))],
    ids=["deepcopy", "pickle", "dill"],
)
def test_copies_work_and_share_nothing(policy: TinyPolicy, duplicate) -> None:  # type: ignore[no-untyped-def]
    plain = act(policy)
    cached = act(apply_cache(policy, cache_threshold=3))
    other = duplicate(policy)
    assert torch.equal(act(other), cached)
    for parameter in other.parameters():
        parameter.data.zero_()
    act(other)
    assert torch.equal(act(policy), cached)
    other.num_inference_steps = 3
    remove_cache(other)
    assert torch.equal(act(policy), cached)
    assert torch.equal(act(remove_cache(policy)), plain)


def test_copy_made_in_the_middle_of_a_trajectory(policy: TinyPolicy) -> None:
    expected = act(apply_cache(policy, cache_threshold=3))
    policy.reset_cache()
    policy.model(torch.zeros(1, 4, WIDTH), torch.tensor(0), torch.zeros(1, 2, WIDTH))
    assert torch.equal(act(copy.deepcopy(policy)), expected)


def test_two_policies_each_in_its_thread() -> None:
    policies = [apply_cache(TinyPolicy(decoder_model(n)), cache_threshold=n + 1) for n in (1, 2, 3)]
    expected = [act_with_own_noise(p) for p in policies]
    results: dict[int, list[Tensor]] = {i: [] for i in range(3)}
    start = threading.Barrier(3)

    def work(i: int) -> None:
        start.wait()
        for _ in range(10):
            results[i].append(act_with_own_noise(policies[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(r) == 10 for r in results.values())
    assert all(torch.equal(r, expected[i]) for i in range(3) for r in results[i])


def act_with_own_noise(policy: TinyPolicy) -> Tensor:
    """The model's outputs along a fixed input: threads share the global generator, so no noise is drawn."""
    with torch.no_grad():
        policy.reset_cache()
        x = observation(seed=3)["obs"]
        for k in range(policy.num_inference_steps):
            x = 0.5 * x + policy.model(x, torch.tensor(k), observation()["obs"])
    return x


def test_one_policy_in_two_threads_is_refused(policy: TinyPolicy) -> None:
    apply_cache(policy).reset_cache()
    errors = []

    def other() -> None:
        try:
            policy.model(torch.zeros(1, 4, WIDTH), torch.tensor(0), torch.zeros(1, 2, WIDTH))
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(errors) == 1
    assert "copy.deepcopy(policy)" in errors[0]


def test_residuals_are_freed_after_each_call(policy: TinyPolicy) -> None:
    apply_cache(policy)
    size = len(pickle.dumps(policy))
    act(policy, observation(64))
    assert len(pickle.dumps(policy)) == size


# -- observing -------------------------------------------------------------------------------------------------------


def test_observer_sees_every_block_and_step(policy: TinyPolicy) -> None:
    attributes = instance_attributes(policy)
    seen: dict[tuple[str, int], Tensor] = {}
    with observe_residuals(policy, lambda block, step, r: seen.__setitem__((block.key, step), r)):
        act(policy)
    assert instance_attributes(policy) == attributes
    assert list(seen) == [(b.key, k) for k in range(10) for b in find_blocks(policy.model)]
    assert {r.shape for r in seen.values()} == {(2, 4, WIDTH)}


def test_observer_sees_what_a_cache_reuses(policy: TinyPolicy) -> None:
    apply_cache(policy, cache_threshold=4)
    plain_cached = act(policy)
    seen: dict[int, Tensor] = {}
    key = KEYS[1]
    with observe_residuals(policy, lambda b, step, r: seen.__setitem__(step, r) if b.key == key else None):
        assert torch.equal(act(policy), plain_cached)
    assert torch.equal(seen[1], seen[0])
    assert torch.equal(seen[3], seen[0])
    assert not torch.equal(seen[4], seen[3])
    assert FastDiffusionPolicy.summary(policy).mode == "threshold"


def test_observing_twice_is_refused(policy: TinyPolicy) -> None:
    apply_cache(policy)
    with (
        observe_residuals(policy, lambda *_: None),
        pytest.raises(RuntimeError, match="already"),
        observe_residuals(policy, lambda *_: None),
    ):
        pass
