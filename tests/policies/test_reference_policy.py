from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from bacinfer.policies.reference import STAND_INS, DiffusionTransformerLowdimPolicy
from tiny_policies import VARIANTS, fitted_normalizer, observations, randomise, tiny_config


def reference_policy(variant: str = "causal", *overrides: str) -> DiffusionTransformerLowdimPolicy:
    """Of the reference classes, also where the diffusion_policy package is installed."""
    settings: Any = OmegaConf.to_container(tiny_config(variant, *overrides).policy)
    settings["_target_"] = STAND_INS[settings["_target_"]]
    settings["model"]["_target_"] = STAND_INS[settings["model"]["_target_"]]
    policy = randomise(instantiate(settings)).eval()
    policy.set_normalizer(fitted_normalizer())
    return policy


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_actions_have_the_right_shape_and_depend_on_seed_and_observation(variant: str) -> None:
    policy = reference_policy(variant)
    obs = observations()

    def act(seed: int, obs: dict[str, torch.Tensor] = obs) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return policy.predict_action(obs)

    first = act(0)
    predicted_steps = 8 if policy.pred_action_steps_only else 16
    assert first["action"].shape == (3, 8, 2)
    assert first["action_pred"].shape == (3, predicted_steps, 2)
    for key, value in act(0).items():
        assert torch.equal(value, first[key])
    assert not torch.equal(act(1)["action"], first["action"])
    assert not torch.equal(act(0, {"obs": obs["obs"] + 50})["action"], first["action"])


@torch.no_grad()
def test_the_executed_steps_begin_at_the_latest_observation() -> None:
    result = reference_policy().predict_action(observations())
    assert torch.equal(result["action"], result["action_pred"][:, 1:9])


@torch.no_grad()
@pytest.mark.parametrize("variant", ["inpainting", "encoder_only"])
def test_inpainting_keeps_the_observed_part(variant: str) -> None:
    obs = observations()
    result = reference_policy(variant).predict_action(obs)
    assert result["obs_pred"].shape == (3, 16, 20)
    torch.testing.assert_close(result["obs_pred"][:, :2], obs["obs"], rtol=1e-5, atol=1e-3)
    assert torch.equal(result["action_obs_pred"], result["obs_pred"][:, 1:9])
    changes = (result["obs_pred"][:, 2:] - obs["obs"][:, 1:]).abs()
    assert changes.min() > 0  # the rest is painted, not copied


@torch.no_grad()
def test_sampling_is_the_scheduler_s_loop_around_the_model() -> None:
    policy = reference_policy()
    cond = torch.randn(2, 2, 20)
    zeros = torch.zeros(2, 16, 2)
    sample = policy.conditional_sample(zeros, zeros.bool(), cond, generator=torch.Generator().manual_seed(3))

    generator = torch.Generator().manual_seed(3)
    scheduler = DDPMScheduler(10, beta_schedule="squaredcos_cap_v2")
    scheduler.set_timesteps(10)
    expected = torch.randn(2, 16, 2, generator=generator)
    for t in scheduler.timesteps:
        noise = policy.model(expected, t, cond)
        expected = scheduler.step(noise, t, expected, generator=generator).prev_sample
    assert torch.equal(sample, expected)


@torch.no_grad()
def test_extra_observation_steps_are_ignored() -> None:
    policy = reference_policy()
    obs = observations()["obs"]
    more = torch.cat([obs, torch.randn(3, 4, 20)], dim=1)
    torch.manual_seed(0)
    plain = policy.predict_action({"obs": obs})["action"]
    torch.manual_seed(0)
    longer = policy.predict_action({"obs": more})["action"]
    torch.testing.assert_close(longer, plain, rtol=0, atol=0.01)  # pixels; the memory layout differs


@pytest.mark.parametrize(
    ("obs_dict", "message"),
    [
        ({"obs": torch.zeros(1, 2, 40)}, r"\(1, 2, 40\).*\[B, 2, 20\]"),
        ({"obs": torch.zeros(1, 1, 20)}, r"\(1, 1, 20\)"),
        ({"obs": torch.zeros(2, 20)}, r"\(2, 20\)"),
        ({}, "'obs'"),
        ({"obs": torch.zeros(1, 2, 20), "past_action": torch.zeros(1, 1, 2)}, "past_action"),
    ],
)
def test_a_wrong_observation_is_refused(obs_dict: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reference_policy().predict_action(obs_dict)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_falls_when_it_is_minimised(variant: str) -> None:
    policy = reference_policy(variant).train()
    batch = {"obs": 400 * torch.rand(8, 16, 20), "action": 400 * torch.rand(8, 16, 2)}
    optimizer = policy.get_optimizer(weight_decay=0.0, learning_rate=3e-3, betas=(0.9, 0.95))
    losses = []
    for _ in range(40):
        torch.manual_seed(0)  # one draw of noise and timesteps: the loss is a fixed function of the weights
        loss = policy.compute_loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_the_loss_leaves_out_what_is_observed() -> None:
    policy = reference_policy("inpainting")
    batch = {"obs": 400 * torch.rand(4, 16, 20), "action": 400 * torch.rand(4, 16, 2)}
    seen: dict[str, torch.Tensor] = {}

    def model(trajectory: torch.Tensor, timesteps: torch.Tensor, cond: None) -> torch.Tensor:
        seen["trajectory"] = trajectory
        return torch.zeros_like(trajectory)

    policy.model.forward = model  # type: ignore[assignment]
    torch.manual_seed(0)
    loss = policy.compute_loss(batch)
    torch.manual_seed(0)
    noise = torch.randn(4, 16, 22)
    observed = torch.zeros(4, 16, 22, dtype=torch.bool)
    observed[:, :2, 2:] = True
    torch.testing.assert_close(loss, (noise.masked_fill(observed, 0) ** 2).mean())
    normalised = policy.normalizer.normalize(batch)["obs"]
    assert torch.equal(seen["trajectory"][:, :2, 2:], normalised[:, :2])


def test_predicting_executed_steps_alone_needs_the_condition() -> None:
    with pytest.raises(InstantiationException, match="obs_as_cond"):
        reference_policy("inpainting", "pred_action_steps_only=true")
