"""The reference implementation against the real package, bit for bit. Skipped where that is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusion_policy", reason="needs the diffusion_policy package with what it imports")

import dill
import torch
from diffusion_policy.common.sampler import create_indices
from diffusion_policy.model.common.normalizer import LinearNormalizer as RealNormalizer
from diffusion_policy.model.diffusion.ema_model import EMAModel as RealEMAModel
from diffusion_policy.workspace.train_diffusion_transformer_lowdim_workspace import (
    TrainDiffusionTransformerLowdimWorkspace,
)
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from bacinfer.policies import diffusion_policy, load_policy, read_checkpoint
from bacinfer.policies.checkpoint import write_checkpoint
from bacinfer.policies.reference import STAND_INS, DiffusionTransformerLowdimPolicy, LinearNormalizer
from bacinfer.training.averaged_weights import make_ema
from bacinfer.training.dataset import sequence_windows
from tiny_policies import VARIANTS, fitted_normalizer, observations, randomise, tiny_config


def real_policy(cfg: DictConfig) -> Any:
    policy = randomise(instantiate(cfg.policy)).eval()
    policy.set_normalizer(fitted_normalizer())
    return policy


def reference_policy(cfg: DictConfig, weights: dict[str, torch.Tensor]) -> DiffusionTransformerLowdimPolicy:
    settings: Any = OmegaConf.to_container(cfg.policy)
    settings["_target_"] = STAND_INS[settings["_target_"]]
    settings["model"]["_target_"] = STAND_INS[settings["model"]["_target_"]]
    policy = instantiate(settings).eval()
    policy.load_state_dict(weights, strict=True)
    return policy


def act(policy: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    with torch.no_grad():
        return policy.predict_action(observations())


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_weights_give_equal_actions_losses_and_gradients(variant: str) -> None:
    cfg = tiny_config(variant)
    real = real_policy(cfg)
    reference = reference_policy(cfg, real.state_dict())
    assert list(reference.state_dict()) == list(real.state_dict())
    assert_equal(reference.state_dict(), real.state_dict())
    assert_equal(act(reference), act(real))

    batch = {"obs": 400 * torch.rand(4, 16, 20), "action": 400 * torch.rand(4, 16, 2)}
    losses, gradients = [], []
    for policy in (reference.train(), real.train()):
        torch.manual_seed(1)
        loss = policy.compute_loss(batch)
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in policy.model.named_parameters() if p.numel() > 0})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)  # the mean is taken in another order
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_optimizer_groups_are_in_the_same_order(variant: str) -> None:
    cfg = tiny_config(variant)
    real = real_policy(cfg)
    reference = reference_policy(cfg, real.state_dict())
    shapes = []
    for policy in (reference, real):
        names = {parameter: name for name, parameter in policy.model.named_parameters()}
        groups = policy.get_optimizer(**cfg.optimizer).param_groups
        shapes.append([([names[p] for p in group["params"]], group["weight_decay"]) for group in groups])
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_of_the_workspace_loads(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = TrainDiffusionTransformerLowdimWorkspace(tiny_config(variant))
    workspace._output_dir = str(tmp_path)
    for seed, policy in enumerate((workspace.model, workspace.ema_model)):
        randomise(policy, seed)
        policy.set_normalizer(fitted_normalizer())
    path = tmp_path / "latest.ckpt"
    workspace.save_checkpoint(path=path, use_thread=False)

    expected = act(workspace.ema_model.eval())
    loaded = load_policy(path)
    assert type(loaded) is type(workspace.ema_model)
    assert_equal(act(loaded), expected)
    monkeypatch.setattr(diffusion_policy, "find", _only_diffusers)
    reference = load_policy(path)
    assert isinstance(reference, DiffusionTransformerLowdimPolicy)
    assert_equal(act(reference), expected)
    assert read_checkpoint(path).progress("global_step") == 0


def _only_diffusers(target: str) -> Any:
    if target.startswith("diffusion_policy."):
        raise ImportError(target)
    return _find(target)


_find = diffusion_policy.find


def test_a_checkpoint_of_ours_loads_in_the_workspace(tmp_path: Path) -> None:
    cfg = tiny_config()
    trained, ema = real_policy(cfg), randomise(real_policy(cfg), seed=5)
    reference = reference_policy(cfg, trained.state_dict())
    optimizer = reference.get_optimizer(**cfg.optimizer)
    reference.compute_loss({"obs": torch.rand(4, 16, 20), "action": torch.rand(4, 16, 2)}).backward()
    optimizer.step()
    path = tmp_path / "latest.ckpt"
    states = {"model": reference.state_dict(), "ema_model": ema.state_dict(), "optimizer": optimizer.state_dict()}
    write_checkpoint(path, cfg, states, {"global_step": 12, "epoch": 3})

    payload = torch.load(path, pickle_module=dill, weights_only=False)
    workspace = TrainDiffusionTransformerLowdimWorkspace(payload["cfg"])
    workspace.load_payload(payload)
    assert (workspace.global_step, workspace.epoch) == (12, 3)
    assert_equal(act(workspace.model.eval()), act(reference.eval()))
    assert_equal(act(workspace.ema_model.eval()), act(ema))
    restored = workspace.optimizer.state_dict()["state"]
    for index, state in optimizer.state_dict()["state"].items():
        assert torch.equal(restored[index]["exp_avg"], state["exp_avg"])


@pytest.mark.parametrize("lengths", [(40, 25, 16), (12, 30, 5), (9, 10)])
def test_windows(lengths: tuple[int, ...]) -> None:
    ends = np.cumsum(lengths)
    rows = []
    for first, last, begin, end in create_indices(ends, 16, np.ones(len(ends), dtype=bool), 1, 7):
        row = np.empty(16, dtype=np.int64)
        row[begin:end] = np.arange(first, last)
        row[:begin], row[end:] = first, last - 1  # as its sampler repeats the edges
        rows.append(row)
    assert sequence_windows(tuple(int(end) for end in ends), 16, 1, 7).tolist() == np.array(rows).tolist()


def test_normaliser() -> None:
    data = {"obs": torch.randn(100, 5) * 300, "action": torch.rand(100, 2)}
    data["obs"][:, 3] = 7.0
    real, ours = RealNormalizer(), LinearNormalizer.fit(data)
    real.fit(data)
    assert ours.state_dict().keys() == real.state_dict().keys()
    for key, value in real.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-6, atol=1e-6)


def test_moving_average() -> None:
    settings = {"inv_gamma": 1.0, "power": 0.75, "max_value": 0.9}
    torch.manual_seed(0)
    model, theirs = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    our_ema = make_ema(theirs.parameters(), update_after_step=0, min_value=0.0, **settings)
    their_ema = RealEMAModel(theirs, **settings)
    for _ in range(400):
        with torch.no_grad():
            model.weight.normal_()
            model.bias.normal_()
        our_ema.step(model.parameters())
        their_ema.step(model)
        torch.testing.assert_close(our_ema.shadow_params, list(theirs.parameters()), rtol=1e-5, atol=1e-6)
