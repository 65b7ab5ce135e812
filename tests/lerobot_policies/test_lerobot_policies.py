"""LeRobot's policies with plans: their actions, and what else is left alone. Needs lerobot."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

if importlib.util.find_spec("lerobot") is None:
    pytest.skip("needs lerobot, in an environment of its own", allow_module_level=True)

from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE

import bacinfer.lerobot
import tiny_lerobot as tiny
from bacinfer import CacheSchedule, SamplingPlan
from bacinfer.core.engines import onednn
from bacinfer.core.engines.observing import observe_residuals
from bacinfer.core.engines.planned_scheduler import PlannedScheduler
from bacinfer.core.sampler import Sampler
from bacinfer.core.warm_start import WarmStart
from bacinfer.lerobot.registry import SUPPORTED_TYPES

CASES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "multi_task_dit": (tiny.multi_task_dit, {}),
    "multi_task_dit, DDIM": (tiny.multi_task_dit, {"noise_scheduler_type": "DDIM", "use_rope": False}),
    "multi_task_dit, Euler": (tiny.multi_task_dit, {"objective": "flow_matching"}),
    "multi_task_dit, Runge-Kutta": (
        tiny.multi_task_dit,
        {"objective": "flow_matching", "integration_method": "rk4", "num_integration_steps": 3},
    ),
    "xvla": (tiny.xvla, {}),
    "smolvla": (tiny.smolvla, {}),
    "smolvla, self-attention": (tiny.smolvla, {"attention_mode": "self_attn", "num_steps": 4}),
    "pi0": (tiny.pi0, {}),
    "pi05": (tiny.pi05, {}),
    "evo1": (tiny.evo1, {"num_inference_timesteps": 8}),
    "groot": (tiny.groot, {}),
    "vla_jepa": (tiny.vla_jepa, {}),
    "fastwam": (tiny.fastwam, {}),
}
WITH_REAL_TIME_CHUNKING = ("smolvla", "pi0", "pi05", "evo1", "groot")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Makes the policy of a case, or gives it again."""
    directory, policies = tmp_path_factory.mktemp("policies"), dict[str, Any]()

    def make(case: str) -> Any:
        if case not in policies:
            function, settings = CASES[case]
            policies[case] = function(directory, **settings)
        return bacinfer.lerobot.remove(policies[case])

    return make


@pytest.fixture(params=CASES)
def policy(request: pytest.FixtureRequest, made: Callable[[str], Any]) -> Any:
    return made(request.param)


def act(policy: Any, **arguments: Any) -> Tensor:
    """The chunk that follows the first observation, as `lerobot-eval` comes to it."""
    torch.manual_seed(5)
    policy.reset()
    if arguments or not hasattr(policy, "objective"):
        return policy.predict_action_chunk(tiny.observation(policy), **arguments)
    return bacinfer.lerobot.handle(policy)(tiny.observation(policy))


def periodic(policy: Any, interval: int) -> CacheSchedule:
    found = bacinfer.lerobot.summary(policy)
    return CacheSchedule.periodic(found.blocks, found.num_inference_steps, interval)


def snapshot(policy: nn.Module) -> list[dict[str, Any]]:
    """What the policy's modules hold, but for the flags that eval() sets."""
    return [{k: v for k, v in vars(m).items() if k != "training"} for m in policy.modules()]


def test_every_supported_policy_is_tested() -> None:
    assert {case.split(",")[0] for case in CASES} == set(SUPPORTED_TYPES)


def test_updating_everything_changes_nothing(policy: Any) -> None:
    plain = act(policy)
    bacinfer.lerobot.apply(policy, SamplingPlan(), engine="eager")
    assert torch.equal(act(policy), plain)
    bacinfer.lerobot.remove(policy)
    seen: list[int] = []
    with observe_residuals(bacinfer.lerobot.handle(policy), lambda block, step, residual: seen.append(step)):
        assert torch.equal(act(policy), plain)  # layer by layer from its blocks
    found = bacinfer.lerobot.summary(policy)
    trajectories = 2 if policy.name == "fastwam" else 1  # it denoises the entries of a batch one after another
    assert seen == trajectories * [k for k in range(found.num_inference_steps) for _ in found.blocks]


def test_with_products_of_onednn(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "MIN_ROWS", 1)
    monkeypatch.setattr(onednn, "MIN_WEIGHTS", 1)
    plain = act(policy)
    bacinfer.lerobot.apply(policy, SamplingPlan(), engine="onednn")
    torch.testing.assert_close(act(policy), plain, rtol=1e-3, atol=1e-3)
    assert bacinfer.lerobot.summary(policy).engine == "onednn"


def test_a_plan_is_found_applied_and_removed(policy: Any, tmp_path: Path) -> None:
    plain, modules, keys = act(policy), snapshot(policy), list(policy.state_dict())
    policy.select_action(tiny.observation(policy))  # an episode is under way
    observations = [tiny.observation(policy, batch=1, seed=seed) for seed in range(2)]
    random_state = torch.get_rng_state()
    expected = copy.deepcopy(policy).select_action(tiny.observation(policy))
    plan = bacinfer.lerobot.find_plan(policy, observations, num_updates=2, num_bu_blocks=1)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(policy.select_action(tiny.observation(policy)), expected)  # from the chunk of before
    plan.save(tmp_path / "plan.json")

    bacinfer.lerobot.apply(policy, tmp_path / "plan.json")
    assert list(policy.state_dict()) == keys
    found = bacinfer.lerobot.summary(policy)
    assert found.schedule == plan.cache
    assert found.flops_fraction < 1
    cached = act(policy)
    assert not torch.equal(cached, plain)
    torch.testing.assert_close(cached, plain, atol=0.7, rtol=0)
    assert torch.equal(act(policy), cached)

    policy.reset()
    torch.manual_seed(5)
    first = policy.select_action(tiny.observation(policy))
    assert torch.equal(first[:, : tiny.MOVES], cached[:, 0, : tiny.MOVES])
    bacinfer.lerobot.remove(policy)
    assert torch.equal(act(policy), plain)
    policy.reset()
    for before, after in zip(modules, snapshot(policy), strict=True):
        assert before.keys() == after.keys()
        assert all(after[k] is v for k, v in before.items() if k not in ("_queues", "_action_queue"))


def test_measured_on_whole_chunks(made: Callable[[str], Any]) -> None:
    policy = made("xvla")
    plans = {"every third": periodic(policy, 3)}
    found = bacinfer.lerobot.measure(policy, plans, [tiny.observation(policy, 1)], num_calls=1)
    assert found.rows["every third"].flops < found.rows["plain"].flops
    assert found.rows["every third"].action_error.mean > 0


@pytest.mark.parametrize("case", WITH_REAL_TIME_CHUNKING)
def test_real_time_chunking(case: str, made: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = made(case)
    monkeypatch.setattr(policy.config, "rtc_config", RTCConfig(enabled=True, execution_horizon=4), raising=False)
    if hasattr(policy, "init_rtc_processor"):
        policy.init_rtc_processor()
    try:
        left_over = act(policy)[:, 3:]
        chunk = {"inference_delay": 2, "prev_chunk_left_over": left_over}
        plain = act(policy, **chunk)
        assert not torch.equal(plain, act(policy))
        bacinfer.lerobot.apply(policy, SamplingPlan())
        assert torch.equal(act(policy, **chunk), plain)
        bacinfer.lerobot.apply(policy, periodic(policy, 2))
        graphs: list[bool] = []
        handle = bacinfer.lerobot.handle(policy)
        with observe_residuals(
            handle, lambda block, step, residual: graphs.append(step % 2 and residual.requires_grad)
        ):
            cached = act(policy, **chunk)
        assert torch.equal(act(policy, **chunk), cached)
        assert not torch.equal(cached, plain)
        assert not any(graphs)
    finally:
        bacinfer.lerobot.remove(policy)
        monkeypatch.undo()
        if hasattr(policy, "init_rtc_processor"):
            policy.init_rtc_processor()


def test_saved_copied_and_pickled_as_before(policy: Any, tmp_path: Path) -> None:
    policy.save_pretrained(tmp_path / "before")
    try:
        pickle.dumps(policy)
        pickles = True
    except (pickle.PicklingError, AttributeError):  # π's layer classes are local
        pickles = False
    plain = act(policy)
    bacinfer.lerobot.apply(policy, periodic(policy, 2))
    cached = act(policy)
    policy.save_pretrained(tmp_path / "after")
    for path in (tmp_path / "before").iterdir():
        assert path.read_bytes() == (tmp_path / "after" / path.name).read_bytes()
    copies = [copy.deepcopy(policy), *([pickle.loads(pickle.dumps(policy))] if pickles else [])]
    bacinfer.lerobot.remove(policy)
    assert torch.equal(act(policy), plain)
    for other in copies:
        assert torch.equal(act(other), cached)
        assert torch.equal(act(bacinfer.lerobot.remove(other)), plain)


def test_training_is_left_alone(made: Callable[[str], Any]) -> None:
    policy = made("multi_task_dit")
    seen = tiny.observation(policy)
    generator = torch.Generator().manual_seed(3)
    batch = {
        OBS_STATE: torch.rand(2, 2, tiny.STATE, generator=generator),
        ACTION: torch.rand(2, 8, tiny.MOVES, generator=generator),
        **{key: seen[key] for key in (OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK)},
    }

    def loss() -> float:
        torch.manual_seed(4)
        return policy.forward(dict(batch))[0].item()

    plain = loss()
    bacinfer.lerobot.apply(policy, periodic(policy, 2))
    act(policy)
    assert loss() == plain


def test_another_number_of_steps_is_an_error(made: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = made("smolvla")
    bacinfer.lerobot.apply(policy, periodic(policy, 2))
    for steps, message in ((9, "took 9 denoising steps"), (11, "more than K = 10")):
        monkeypatch.setattr(policy.config, "num_steps", steps)
        with pytest.raises(RuntimeError, match=message):
            act(policy)


def with_steps(policy: Any, num_steps: int) -> Any:
    """A copy that was configured to take so many steps."""
    configured = copy.deepcopy(policy)
    setattr(*bacinfer.lerobot.handle(configured).num_steps, num_steps)
    return configured


def test_fewer_own_steps_are_those_of_the_configuration(policy: Any) -> None:
    modules, stored = snapshot(policy), copy.deepcopy(policy.config)
    expected = act(with_steps(policy, 2))
    bacinfer.lerobot.apply(policy, SamplingPlan(sampler=Sampler("own", 2)), engine="eager")
    assert torch.equal(act(policy), expected)
    assert policy.config == stored  # which save_pretrained writes
    calls_a_step = 4 if getattr(policy.config, "integration_method", "") == "rk4" else 1
    assert bacinfer.lerobot.summary(policy).num_inference_steps == 2 * calls_a_step
    bacinfer.lerobot.remove(policy)
    assert snapshot(policy) == modules


@pytest.mark.parametrize("case", ["smolvla", "multi_task_dit, Runge-Kutta"])
def test_a_plan_is_found_for_fewer_steps(case: str, made: Callable[[str], Any]) -> None:
    policy = made(case)
    seen = [tiny.observation(policy, batch=1)]
    found = bacinfer.lerobot.find_plan(policy, seen, num_updates=2, num_bu_blocks=1, sampler=Sampler("own", 2))
    configured = with_steps(policy, 2)
    same = bacinfer.lerobot.find_plan(configured, seen, num_updates=2, num_bu_blocks=1)
    assert found.cache == same.cache
    expected = act(bacinfer.lerobot.apply(configured, same))
    assert torch.equal(act(bacinfer.lerobot.apply(policy, found)), expected)


@pytest.mark.parametrize(
    "sampler", [Sampler("ddim", 3), Sampler("ddim", (80, 40, 0), 0.5), Sampler("dpm", 3), Sampler("own", (90, 30, 0))]
)
def test_other_samplers_of_a_diffusion_policy(made: Callable[[str], Any], sampler: Sampler) -> None:
    policy = made("multi_task_dit")
    scheduler = policy.objective.noise_scheduler
    plain = act(policy)
    bacinfer.lerobot.apply(policy, SamplingPlan(sampler=sampler), engine="eager")
    found = act(policy)
    assert policy.objective.noise_scheduler is scheduler
    handle = bacinfer.lerobot.handle(bacinfer.lerobot.remove(policy))
    policy.objective.noise_scheduler = PlannedScheduler(scheduler, sampler)  # what itself is tested by its definition
    policy.objective.num_inference_steps, K = sampler.num_steps, policy.objective.num_inference_steps
    try:
        expected = act(policy)
    finally:
        policy.objective.noise_scheduler, policy.objective.num_inference_steps = scheduler, K
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)
    assert handle.num_inference_steps == K


def test_what_no_loop_here_can_do_is_refused(made: Callable[[str], Any]) -> None:
    for case in ("xvla", "multi_task_dit, Euler"):
        with pytest.raises(ValueError, match="its handle names no scheduler"):
            bacinfer.lerobot.apply(made(case), SamplingPlan(sampler=Sampler("ddim", 5)))
    policy = made("multi_task_dit")
    with pytest.raises(ValueError, match="trained with 100 timesteps, which own:101 exceeds"):
        bacinfer.lerobot.apply(policy, SamplingPlan(sampler=Sampler("own", 101)))
    warm = SamplingPlan(warm_start=WarmStart(Sampler("ddim", (50, 0)), num_executed=6))
    with pytest.raises(ValueError, match="a warm start replaces the denoising loop"):
        bacinfer.lerobot.apply(policy, warm)


def test_other_code_is_refused(made: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = made("xvla")
    layer = type(policy.model.transformer.blocks[0])
    monkeypatch.setattr(layer, "forward", lambda self, x: x)
    with pytest.raises(ValueError, match=r"is another than that of lerobot 0\.6\.1"):
        bacinfer.lerobot.apply(policy, SamplingPlan())


def test_a_replaced_forward_is_refused(made: Callable[[str], Any]) -> None:
    policy = made("smolvla")
    model = policy.model.vlm_with_expert
    model.forward = lambda *args, **kwargs: None
    try:
        with pytest.raises(ValueError, match=r"vlm_with_expert\.forward was replaced"):
            bacinfer.lerobot.apply(policy, SamplingPlan())
    finally:
        del model.forward


def test_a_policy_without_an_adapter_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"Linear is no LeRobot policy that can be cached; those of type multi_task_dit"
    ):
        bacinfer.lerobot.apply(nn.Linear(1, 1), SamplingPlan())


def test_lerobot_is_imported_by_its_policies_alone() -> None:
    code = "import bacinfer, bacinfer.lerobot, sys; sys.exit('lerobot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_compiled_as_lerobot_compiles(made: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs by a plan stays outside of the graphs; a plan that is removed is seen by them."""
    policy = made("multi_task_dit")
    plain = act(policy)
    bacinfer.lerobot.apply(policy, periodic(policy, 2))
    cached = act(policy)
    monkeypatch.setattr(policy, "predict_action_chunk", torch.compile(policy.predict_action_chunk, backend="eager"))
    for _ in range(3):
        assert torch.equal(act(policy), cached)
    bacinfer.lerobot.remove(policy)
    assert torch.equal(act(policy), plain)
