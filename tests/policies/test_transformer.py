from __future__ import annotations

import math

import pytest
import torch

from bacinfer.policies.reference.transformer import SinusoidalEmbedding, TransformerForDiffusion

SMALL = {"n_layer": 2, "n_head": 2, "n_emb": 16, "p_drop_emb": 0.0, "p_drop_attn": 0.0}


def small_model(**settings: object) -> TransformerForDiffusion:
    torch.manual_seed(0)
    defaults = {"input_dim": 2, "output_dim": 2, "horizon": 6, "n_obs_steps": 3, "cond_dim": 5, "causal_attn": True}
    model = TransformerForDiffusion(**{**SMALL, **defaults, **settings})  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.eval()


def test_sinusoidal_embedding_by_hand() -> None:
    embedding = SinusoidalEmbedding(4)(torch.tensor([0, 3]))
    # half of 4 gives two frequencies: 1 and 1/10000
    expected = [[0, 0, 1, 1], [math.sin(3), math.sin(3e-4), math.cos(3), math.cos(3e-4)]]
    torch.testing.assert_close(embedding, torch.tensor(expected), rtol=1e-6, atol=1e-7)


@torch.no_grad()
def test_a_step_does_not_see_later_steps_or_later_observations() -> None:
    model = small_model()
    sample, cond = torch.randn(1, 6, 2), torch.randn(1, 3, 5)
    plain = model(sample, 4, cond)
    for step in range(6):
        changed = sample.clone()
        changed[:, step] += 1
        difference = (model(changed, 4, cond) - plain).abs().amax(dim=(0, 2))
        assert torch.all(difference[:step] == 0)
        assert torch.all(difference[step:] > 1e-4)
    for step in range(3):
        changed = cond.clone()
        changed[:, step] += 1
        difference = (model(sample, 4, changed) - plain).abs().amax(dim=(0, 2))
        assert torch.all(difference[:step] == 0)
        assert torch.all(difference[step:] > 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"causal_attn": False}, {"causal_attn": False, "n_cond_layers": 1}])
def test_without_the_mask_every_step_sees_all(settings: dict) -> None:
    model = small_model(**settings)
    sample, cond = torch.randn(1, 6, 2), torch.randn(1, 3, 5)
    changed = sample.clone()
    changed[:, -1] += 1
    assert torch.all((model(changed, 4, cond) - model(sample, 4, cond)).abs().amax(dim=(0, 2)) > 1e-4)
    assert not {"mask", "memory_mask"} & model.state_dict().keys()


@torch.no_grad()
def test_the_timestep_is_a_number_a_scalar_tensor_or_one_for_each_sample() -> None:
    model = small_model()
    sample, cond = torch.randn(2, 6, 2), torch.randn(2, 3, 5)
    by_number = model(sample, 7, cond)
    assert torch.equal(model(sample, torch.tensor(7), cond), by_number)
    assert torch.equal(model(sample, torch.tensor([7, 7]), cond), by_number)
    assert not torch.equal(model(sample, torch.tensor([7, 8]), cond)[1], by_number[1])


def test_the_encoder_only_model_reads_time_as_a_token() -> None:
    model = small_model(time_as_cond=False, cond_dim=0)
    assert model.decoder is None
    assert model.pos_emb.shape == (1, 7, 16)
    assert model(torch.randn(2, 6, 2), 3).shape == (2, 6, 2)
    assert not torch.equal(model(torch.zeros(1, 6, 2), 3), model(torch.zeros(1, 6, 2), 4))


def test_observations_for_a_model_without_condition_are_refused() -> None:
    with pytest.raises(ValueError, match="cond_dim"):
        small_model(time_as_cond=False)


def test_weight_decay_falls_on_matrices_only() -> None:
    model = small_model()
    decayed, others = model.get_optim_groups(0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[p] for p in decayed["params"]} | {names[p] for p in others["params"]} == set(names.values())
    assert all(names[p].endswith("weight") and p.ndim == 2 for p in decayed["params"])
    position_like = {"pos_emb", "cond_pos_emb", "_dummy_variable"}
    assert position_like <= {names[p] for p in others["params"]}
    assert all(
        "bias" in names[p] or "norm" in names[p] or "ln_f" in names[p] or names[p] in position_like
        for p in others["params"]
    )
