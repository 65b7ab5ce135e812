from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException

from bacinfer import FastDiffusionPolicy
from bacinfer.policies import load_policy, write_checkpoint
from bacinfer.policies.reference import STAND_INS
from bacinfer.policies.reference.vision import ObservationEncoder, SpatialSoftmax
from tiny_image_policies import VARIANTS, act, image_observations, image_policy, tiny_image_config

SMALL = {"image": {"shape": [3, 40, 44], "type": "rgb"}, "place": {"shape": [2]}}


def encoder(crop_shape: tuple[int, int] | None = (32, 35), fixed_crop: bool = True) -> ObservationEncoder:
    torch.manual_seed(0)
    return ObservationEncoder(SMALL, crop_shape, fixed_crop, group_norm=True).eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_actions_have_the_right_shape_and_depend_on_seed_and_every_observation(variant: str) -> None:
    policy = image_policy(variant, "policy.num_inference_steps=3")
    obs = image_observations(variant)
    first = act(policy, obs)
    width = policy.action_dim
    assert first["action_pred"].shape == (2, 10, width)
    assert torch.equal(first["action"], first["action_pred"][:, 1:9])
    assert torch.equal(act(policy, obs)["action"], first["action"])
    assert not torch.equal(act(policy, obs, seed=1)["action"], first["action"])
    for name, values in obs.items():
        changed = act(policy, {**obs, name: values.flip(-1)})["action"]
        assert (changed - first["action"]).abs().max() > 0.01, name  # pixels


@torch.no_grad()
def test_an_image_s_features_and_vectors_as_they_are_in_the_order_of_the_keys() -> None:
    swapped = ObservationEncoder(dict(reversed(SMALL.items())), None, True, group_norm=True)
    obs = {"image": torch.rand(5, 3, 40, 44), "place": torch.rand(5, 2)}
    features = swapped(obs)
    assert swapped.output_dim == 66
    assert features.shape == (5, 66)
    assert torch.equal(features[:, :2], obs["place"])
    assert features[:, 2:].min() == 0  # rectified
    assert torch.equal(features[:, 2:], torch.relu(swapped.obs_nets["image"](obs["image"])))


def crops(encoder: ObservationEncoder, images: torch.Tensor) -> torch.Tensor:
    """What the network sees of the images."""
    seen = []
    handle = encoder.obs_nets["image"].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        encoder({"image": images, "place": torch.zeros(len(images), 2)})
    handle.remove()
    return seen[0]


def test_evaluation_sees_the_centre() -> None:
    images = torch.rand(3, 3, 40, 44)
    # 8 rows and 9 columns are left over: half of the columns, 4.5, rounds to the even 4
    assert torch.equal(crops(encoder(), images), images[:, :, 4:36, 4:39])
    assert torch.equal(crops(encoder((33, 33)), images), images[:, :, 4:37, 6:39])  # 3.5 and 5.5
    assert torch.equal(crops(encoder(None), images), images)


@pytest.mark.parametrize("fixed_crop", [True, False])
def test_training_sees_random_parts(fixed_crop: bool) -> None:
    # each pixel tells its place
    images = torch.arange(40 * 44.0).reshape(1, 1, 40, 44).expand(200, 3, 40, 44)
    seen = crops(encoder(fixed_crop=fixed_crop).train(), images)
    places = set()
    for crop in seen:
        top, left = divmod(int(crop[0, 0, 0]), 44)
        assert torch.equal(crop, images[0, :, top : top + 32, left : left + 35])
        places.add((top, left))
    # published policies never saw the last place
    assert {top for top, _ in places} == set(range(8))
    assert {left for _, left in places} == set(range(9))
    evaluated = crops(encoder(fixed_crop=fixed_crop), images)
    assert (evaluated != evaluated[:1]).any() == (not fixed_crop)


def test_spatial_softmax_finds_a_peak() -> None:
    pool = SpatialSoftmax(channels=4, height=5, width=9)
    with torch.no_grad():
        pool.nets.weight.zero_()
        pool.nets.weight[:, 0] = 1
    features = torch.zeros(1, 4, 5, 9)
    assert pool(features).abs().max() < 1e-6  # uniform: the centre
    features[0, 0, 1, 6] = 100
    torch.testing.assert_close(pool(features), torch.tensor([0.5, -0.5]).expand(1, 32, 2))


def test_the_names_of_published_checkpoints() -> None:
    weights = image_policy("square").state_dict()
    for camera in ("agentview_image", "robot0_eye_in_hand_image"):
        net = f"obs_encoder.obs_nets.{camera}"
        assert weights[f"{net}.backbone.nets.0.weight"].shape == (64, 3, 7, 7)
        assert weights[f"{net}.nets.0.nets.7.0.downsample.1.bias"].shape == (512,)
        assert weights[f"{net}.nets.1.nets.weight"].shape == (32, 512, 1, 1)
        assert weights[f"{net}.pool.pos_x"].shape == (1, 9)
        assert weights[f"{net}.nets.3.weight"].shape == (64, 64)
        twice = weights[f"{net}.backbone.nets.4.1.bn2.weight"], weights[f"{net}.nets.0.nets.4.1.bn2.weight"]
        assert twice[0].data_ptr() == twice[1].data_ptr()
    assert sum(name.startswith("obs_encoder") for name in weights) == 2 * 132


def test_a_checkpoint_loads_without_robomimic_and_torchvision(tmp_path: Path) -> None:
    policy = image_policy()
    path = tmp_path / "image.ckpt"
    weights = policy.state_dict()
    write_checkpoint(path, tiny_image_config(), {"model": weights, "ema_model": weights}, {})
    if type(loaded := load_policy(path)) in STAND_INS.values():
        obs = image_observations()
        assert torch.equal(act(loaded, obs)["action"], act(policy, obs)["action"])
    program = (
        "import sys\n"
        "for name in ('robomimic', 'torchvision', 'diffusion_policy'): sys.modules[name] = None\n"
        "from bacinfer.policies import load_policy\n"
        f"print(type(load_policy({str(path)!r})).__module__)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "bacinfer.policies.reference.image_policy"


@pytest.mark.parametrize("variant", ["pusht", "square", "inpainting"])
def test_the_fused_engine_runs_it(variant: str) -> None:
    policy = image_policy(variant)
    obs = image_observations(variant)

    def normalised(engine: str, **cache: object) -> torch.Tensor:
        cached = FastDiffusionPolicy.apply_cache(copy.deepcopy(policy), engine=engine, **cache)
        actions = act(cached, obs)["action_pred"]
        assert FastDiffusionPolicy.summary(cached).engine == {"auto": "fused"}.get(engine, engine)
        return policy.normalizer["action"].normalize(actions)

    plain = policy.normalizer["action"].normalize(act(policy, obs)["action_pred"])
    torch.testing.assert_close(normalised("fused", cache_mode="original"), plain, rtol=0, atol=1e-5)
    cached = normalised("auto", cache_threshold=4)
    torch.testing.assert_close(cached, normalised("eager", cache_threshold=4), rtol=0, atol=1e-5)
    assert not torch.allclose(cached, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"agent_pos": None}, r"must hold \['agent_pos', 'image'\], found \['image'\]"),
        ({"past_action": torch.zeros(2, 1, 2)}, "past_action"),
        (
            {"image": torch.zeros(2, 1, 3, 96, 96)},
            r"'image' of shape \(2, 1, 3, 96, 96\), expected \[B, 2, 3, 96, 96\]",
        ),
        ({"image": torch.zeros(2, 2, 96, 96, 3)}, r"expected \[B, 2, 3, 96, 96\]"),
        ({"agent_pos": torch.zeros(2, 2)}, r"expected \[B, 2, 2\]"),
        ({"image": torch.zeros(2, 2, 3, 96, 96, dtype=torch.uint8)}, "uint8, expected floats from 0 to 1"),
    ],
)
def test_a_wrong_observation_is_refused(changed: dict, message: str) -> None:
    obs = {name: value for name, value in {**image_observations(), **changed}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        image_policy().predict_action(obs)


def test_extra_observation_steps_are_ignored() -> None:
    policy, obs = image_policy(), image_observations(steps=4)
    seen = {name: values[:, :2] for name, values in obs.items()}
    torch.testing.assert_close(act(policy, obs)["action"], act(policy, seen)["action"], rtol=0, atol=0.01)  # pixels


def test_what_no_encoder_can_see() -> None:
    with pytest.raises(InstantiationException, match=r"'image' is an image of 96 × 96, no larger than crop_shape"):
        image_policy("pusht", "policy.crop_shape=[96,84]")
    with pytest.raises(InstantiationException, match="'image' is of type 'depth'; known: rgb, low_dim"):
        image_policy("pusht", "task.shape_meta.obs.image.type=depth")


@pytest.mark.parametrize("variant", ["pusht", "inpainting"])
def test_the_loss_falls_when_it_is_minimised(variant: str) -> None:
    policy = image_policy(variant, "policy.crop_shape=[32,32]")
    batch = {"obs": image_observations(variant, batch=2, steps=10), "action": 512 * torch.rand(2, 10, 2)}
    optimizer = policy.get_optimizer(1e-3, 1e-6, 3e-3, (0.9, 0.95))
    losses = []
    for _ in range(12):
        torch.manual_seed(0)
        loss = policy.compute_loss(batch)
        loss.backward()
        seen = policy.obs_encoder.obs_nets["image"].backbone.nets[0].weight.grad
        assert (seen is not None) == policy.obs_as_cond  # painted features are none that could be made easy
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_pictures_are_encoded_once_for_several_draws_of_noise() -> None:
    policy = image_policy("pusht", "policy.crop_shape=[32,32]")
    obs, action = image_observations(steps=2), 512 * torch.rand(2, 10, 2)
    encoded = []
    policy.obs_encoder.register_forward_hook(lambda module, inputs, output: encoded.append(output))
    torch.manual_seed(0)
    loss = policy.compute_loss({"obs": obs, "action": action.repeat_interleave(3, dim=0)})
    torch.manual_seed(0)
    repeated = {name: values.repeat_interleave(3, dim=0) for name, values in obs.items()}
    torch.testing.assert_close(
        loss, policy.compute_loss({"obs": repeated, "action": action.repeat_interleave(3, dim=0)})
    )
    assert [len(features) for features in encoded] == [4, 12]


def test_weight_decay_of_transformer_and_encoder() -> None:
    policy = image_policy()
    groups = policy.get_optimizer(1e-3, 1e-6, 1e-4, (0.9, 0.95)).param_groups
    assert [group["weight_decay"] for group in groups] == [1e-3, 0.0, 1e-6]
    assert sum(len(group["params"]) for group in groups) == len(
        [name for name, _ in policy.named_parameters() if name.startswith(("model.", "obs_encoder."))]
    )
