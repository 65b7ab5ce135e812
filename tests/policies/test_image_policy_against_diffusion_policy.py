"""The image policy and its encoder against the real package on robomimic, bit for bit. Skipped where they are not
installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip(
    "diffusion_policy.workspace.train_diffusion_transformer_hybrid_workspace",
    reason="needs the diffusion_policy package with what it imports, robomimic 0.2 above all",
)

import dill
import torch
from diffusion_policy.common.normalize_util import get_image_range_normalizer
from diffusion_policy.workspace.train_diffusion_transformer_hybrid_workspace import (
    TrainDiffusionTransformerHybridWorkspace,
)
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from bacinfer import FastDiffusionPolicy
from bacinfer.policies import diffusion_policy, load_policy
from bacinfer.policies.checkpoint import write_checkpoint
from bacinfer.policies.reference import DiffusionTransformerHybridImagePolicy, LinearNormalizer
from bacinfer.tasks import make_simulated_task
from tiny_image_policies import (
    VARIANTS,
    act,
    image_normalizer,
    image_observations,
    image_policy,
    randomise_all,
    tiny_image_config,
)

SHIPPED = Path(__file__).parents[2] / "assets" / "pusht_image" / "pusht_image_transformer.ckpt"


def real_policy(variant: str) -> Any:
    cfg = tiny_image_config(variant)
    torch.manual_seed(0)
    policy = randomise_all(instantiate(cfg.policy)).eval()
    policy.set_normalizer(image_normalizer(cfg))
    return policy


def pair(variant: str) -> tuple[DiffusionTransformerHybridImagePolicy, Any]:
    """Ours and the real one with the real one's weights."""
    reference, real = image_policy(variant), real_policy(variant)
    reference.load_state_dict(real.state_dict(), strict=True)
    return reference, real


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dicts_load_both_ways_and_actions_are_equal(variant: str) -> None:
    reference, real = pair(variant)
    obs = image_observations(variant)
    assert_equal(reference.state_dict(), real.state_dict())
    assert_equal(act(reference, obs), act(real, obs))
    ours = image_policy(variant)
    real.load_state_dict(ours.state_dict(), strict=True)
    assert_equal(act(ours, obs), act(real, obs))


@pytest.mark.parametrize("variant", VARIANTS)
def test_encodings_are_equal(variant: str) -> None:
    reference, real = pair(variant)
    obs = {name: values.flatten(0, 1) for name, values in image_observations(variant).items()}
    encodings = []
    for policy in (reference, real):
        torch.manual_seed(0)
        with torch.no_grad():
            encodings.append(policy.obs_encoder(policy.normalizer.normalize(obs)))
    assert torch.equal(encodings[0], encodings[1])
    assert encodings[0].shape == (4, reference.obs_dim)


@pytest.mark.parametrize("variant", ["pusht", "batch_norm", "random_crop", "no_crop", "odd_crop"])
def test_training_encodings_see_the_same_crops(variant: str) -> None:
    reference, real = pair(variant)
    obs = {name: values.flatten(0, 1) for name, values in image_observations(variant).items()}
    encodings = []
    for policy in (reference.train(), real.train()):
        torch.manual_seed(0)
        encodings.append(policy.obs_encoder(policy.normalizer.normalize(obs)))
    assert torch.equal(encodings[0], encodings[1])


@pytest.mark.parametrize("variant", ["pusht", "square", "condition_encoder", "inpainting"])
def test_losses_and_gradients_are_equal(variant: str) -> None:
    # not in training mode: there the real pool draws noise of standard deviation 0, which moves all noise after it
    reference, real = pair(variant)
    action = 512 * torch.rand(2, 10, reference.action_dim)
    batch = {"obs": image_observations(variant, steps=10), "action": action}
    losses, gradients = [], []
    for policy in (reference, real):
        torch.manual_seed(1)
        loss = policy.compute_loss(batch)
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)  # the mean is taken in another order
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


def test_optimizer_groups_are_in_the_same_order() -> None:
    shapes = []
    for policy in pair("square"):
        names = {parameter: name for name, parameter in policy.named_parameters()}
        groups = policy.get_optimizer(**tiny_image_config().optimizer).param_groups
        shapes.append([([names[p] for p in group["params"]], group["weight_decay"]) for group in groups])
    assert shapes[0] == shapes[1]


def test_the_normaliser_of_images() -> None:
    ours = LinearNormalizer()
    ours.add_image("image")
    for name, value in get_image_range_normalizer().state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name.replace("params_dict.", "params_dict.image.")], value)


def test_a_checkpoint_of_the_workspace_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = tiny_image_config("square")
    workspace = TrainDiffusionTransformerHybridWorkspace(cfg, output_dir=str(tmp_path))
    for policy in (workspace.model, workspace.ema_model):
        randomise_all(policy)
        policy.set_normalizer(image_normalizer(cfg))
    path = tmp_path / "latest.ckpt"
    workspace.save_checkpoint(path=path, use_thread=False)

    obs = image_observations("square")
    expected = act(workspace.ema_model.eval(), obs)
    loaded = load_policy(path)
    assert type(loaded) is type(workspace.ema_model)
    assert_equal(act(loaded, obs), expected)
    monkeypatch.setattr(diffusion_policy, "find", _only_diffusers)
    reference = load_policy(path)
    assert isinstance(reference, DiffusionTransformerHybridImagePolicy)
    assert_equal(act(reference, obs), expected)


def _only_diffusers(target: str) -> Any:
    if target.startswith("diffusion_policy."):
        raise ImportError(target)
    return _find(target)


_find = diffusion_policy.find


def test_the_shipped_policy_acts_as_its_file_does_in_the_real_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    payload = torch.load(SHIPPED, pickle_module=dill, weights_only=False)
    workspace = get_class(payload["cfg"]._target_)(payload["cfg"])  # as the package's own eval.py
    workspace.load_payload(payload)
    real = workspace.ema_model.eval()
    assert type(real).__module__.startswith("diffusion_policy.")
    monkeypatch.setattr(diffusion_policy, "find", _only_diffusers)
    reference = load_policy(SHIPPED)
    assert isinstance(reference, DiffusionTransformerHybridImagePolicy)
    assert_equal(reference.state_dict(), real.state_dict())

    seen = list(make_simulated_task(payload["cfg"]).observations(reference, 100_000, count=3))
    obs = {name: torch.cat([step[name] for step in seen]) for name in seen[0]}
    frames = {name: values.flatten(0, 1) for name, values in obs.items()}
    with torch.no_grad():
        features = [policy.obs_encoder(policy.normalizer.normalize(frames)) for policy in (reference, real)]
    assert torch.equal(*features)
    assert features[0].std(dim=0).max() > 0.1  # what is seen differs, and so does what is done
    assert_equal(act(reference, obs), act(real, obs))


def test_a_checkpoint_of_ours_loads_in_the_workspace(tmp_path: Path) -> None:
    cfg = tiny_image_config()
    reference = image_policy()
    optimizer = reference.get_optimizer(**cfg.optimizer)
    reference.compute_loss({"obs": image_observations(), "action": torch.rand(2, 10, 2)}).backward()
    optimizer.step()
    weights = reference.state_dict()
    states = {"model": weights, "ema_model": weights, "optimizer": optimizer.state_dict()}
    write_checkpoint(tmp_path / "latest.ckpt", cfg, states, {"global_step": 12, "epoch": 3})

    workspace = TrainDiffusionTransformerHybridWorkspace(OmegaConf.create(cfg), output_dir=str(tmp_path))
    workspace.load_checkpoint(path=tmp_path / "latest.ckpt")
    assert (workspace.global_step, workspace.epoch) == (12, 3)
    obs = image_observations()
    assert_equal(act(workspace.model.eval(), obs), act(reference, obs))
    restored = workspace.optimizer.state_dict()["state"]
    for index, state in optimizer.state_dict()["state"].items():
        assert torch.equal(restored[index]["exp_avg"], state["exp_avg"])


def test_the_fused_engine_runs_the_real_policy() -> None:
    policy, obs = real_policy("square"), image_observations("square")

    def normalised(engine: str) -> torch.Tensor:
        FastDiffusionPolicy.apply_cache(policy, cache_threshold=4, engine=engine)
        actions = act(policy, obs)["action_pred"]
        assert FastDiffusionPolicy.summary(policy).engine == {"auto": "fused"}.get(engine, engine)
        return policy.normalizer["action"].normalize(actions)

    torch.testing.assert_close(normalised("auto"), normalised("eager"), rtol=0, atol=1e-5)


def test_random_places_are_drawn_as_the_real_crop_draws_them() -> None:
    from diffusion_policy.model.vision.crop_randomizer import CropRandomizer

    reference, _ = pair("pusht")
    images = torch.from_numpy(np.random.default_rng(0).random((20, 3, 96, 96), dtype=np.float32))
    torch.manual_seed(3)
    expected = CropRandomizer((3, 96, 96), 84, 84).train().forward_in(images)
    torch.manual_seed(3)
    assert torch.equal(reference.train().obs_encoder._crop(images), expected)
