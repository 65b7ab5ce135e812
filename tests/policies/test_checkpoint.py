from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import dill
import pytest
import torch
from omegaconf import OmegaConf

from bacinfer.policies import Checkpoint, build_policy, diffusion_policy, load_policy, read_checkpoint
from bacinfer.policies.checkpoint import create_policy, write_checkpoint
from bacinfer.policies.reference import DiffusionTransformerLowdimPolicy
from tiny_policies import VARIANTS, fitted_normalizer, observations, randomise, tiny_config

UNET = "diffusion_policy.policy.diffusion_unet_hybrid_image_policy.DiffusionUnetHybridImagePolicy"


def make_policy(cfg: Any) -> Any:
    policy = randomise(create_policy(Checkpoint(Path("new"), cfg, {})))
    policy.set_normalizer(fitted_normalizer())
    return policy.eval()


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Any]:
    cfg = tiny_config()
    policy = make_policy(cfg)
    path = tmp_path / "latest.ckpt"
    states = {"model": policy.state_dict(), "ema_model": policy.state_dict()}
    write_checkpoint(path, cfg, states, {"global_step": 7, "epoch": 1, "name": "tiny"})
    return path, policy


@torch.no_grad()
def act(policy: Any) -> torch.Tensor:
    torch.manual_seed(0)
    return policy.predict_action(observations())["action_pred"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_policy_survives_the_file(variant: str, tmp_path: Path) -> None:
    cfg = tiny_config(variant)
    policy = make_policy(cfg)
    path = tmp_path / "latest.ckpt"
    write_checkpoint(path, cfg, {"model": {}, "ema_model": policy.state_dict()}, {})
    loaded = load_policy(path)
    assert not loaded.training
    assert loaded.state_dict().keys() == policy.state_dict().keys()
    for key, value in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    assert torch.equal(act(loaded), act(policy))


def test_what_is_read(written: tuple[Path, Any]) -> None:
    path, _ = written
    checkpoint = read_checkpoint(path)
    assert checkpoint.path == path
    assert checkpoint.cfg == tiny_config()
    assert set(checkpoint.state_dicts) == {"model", "ema_model"}
    assert [checkpoint.progress(name) for name in ("global_step", "epoch", "name", "other")] == [7, 1, "tiny", None]


def test_ema_weights_act_where_the_run_had_them(tmp_path: Path) -> None:
    cfg = tiny_config()
    model, ema = make_policy(cfg), randomise(make_policy(cfg), seed=5)
    states = {"model": model.state_dict(), "ema_model": ema.state_dict()}
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, cfg, states, {})
    assert torch.equal(act(load_policy(path)), act(ema))
    cfg.training.use_ema = False
    write_checkpoint(path, cfg, states, {})
    assert torch.equal(act(load_policy(path)), act(model))
    write_checkpoint(path, cfg, {"ema_model": ema.state_dict()}, {})
    with pytest.raises(ValueError, match=r"no weights 'model' \(training.use_ema=False\); it has ema_model"):
        load_policy(path)


def test_half_precision_on_disk_is_single_precision_in_the_policy(written: tuple[Path, Any], tmp_path: Path) -> None:
    _, policy = written
    halves = {key: value.half() if key.startswith("model.") else value for key, value in policy.state_dict().items()}
    path = tmp_path / "half.ckpt"
    write_checkpoint(path, tiny_config(), {"ema_model": halves}, {})
    loaded = load_policy(path)
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, halves[key].float())
    torch.testing.assert_close(act(loaded), act(policy), rtol=0, atol=5.0)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_checkpoint_of_plain_torch_save_is_read(protocol: int, written: tuple[Path, Any], tmp_path: Path) -> None:
    path, policy = written
    payload = {
        "cfg": tiny_config(),
        "state_dicts": {"model": {}, "ema_model": policy.state_dict()},
        "pickles": {"epoch": dill.dumps(1)},
    }
    plain = tmp_path / "plain.ckpt"
    torch.save(payload, plain, pickle_protocol=protocol)
    checkpoint = read_checkpoint(plain)
    assert checkpoint.cfg == read_checkpoint(path).cfg
    assert checkpoint.progress("epoch") == 1
    assert torch.equal(act(build_policy(checkpoint)), act(policy))


def test_optimizers_of_training_checkpoints_are_read(written: tuple[Path, Any], tmp_path: Path) -> None:
    _, policy = written
    optimizer = policy.get_optimizer(1e-3, 1e-4, (0.9, 0.95))
    policy.compute_loss({"obs": torch.rand(2, 16, 20), "action": torch.rand(2, 16, 2)}).backward()
    optimizer.step()
    path = tmp_path / "training.ckpt"
    write_checkpoint(path, tiny_config(), {"model": policy.state_dict(), "optimizer": optimizer.state_dict()}, {})
    read = read_checkpoint(path).state_dicts["optimizer"]
    assert read["param_groups"] == optimizer.state_dict()["param_groups"]
    torch.testing.assert_close(read["state"], optimizer.state_dict()["state"], rtol=0, atol=0)


def test_weights_that_changed_on_disk_are_noticed(written: tuple[Path, Any]) -> None:
    path, policy = written
    stored = policy.state_dict()["model.head.weight"].numpy().tobytes()
    data = path.read_bytes()
    path.write_bytes(data.replace(stored, stored[:-1] + bytes([stored[-1] ^ 1])))
    with pytest.raises(ValueError, match=r"latest\.ckpt.*damaged.*CRC"):
        load_policy(path)


def test_shared_tensors_are_stored_once(written: tuple[Path, Any], tmp_path: Path) -> None:
    path, policy = written
    write_checkpoint(tmp_path / "one.ckpt", tiny_config(), {"ema_model": policy.state_dict()}, {})
    assert path.stat().st_size < 1.3 * (tmp_path / "one.ckpt").stat().st_size


def test_an_interrupted_write_leaves_the_old_file(written: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = written
    before = path.read_bytes()

    def fail(payload: Any, target: Path, **_: Any) -> None:
        Path(target).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(path, tiny_config(), {}, {})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_weights_that_do_not_fit_are_an_error(written: tuple[Path, Any]) -> None:
    checkpoint = read_checkpoint(written[0])
    checkpoint.state_dicts["ema_model"]["model.surplus"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"latest\.ckpt: the weights do not fit[\s\S]*model\.surplus"):
        build_policy(checkpoint)
    del checkpoint.state_dicts["ema_model"]["model.surplus"]
    del checkpoint.state_dicts["ema_model"]["model.head.bias"]
    with pytest.raises(ValueError, match=r"latest\.ckpt: the weights do not fit[\s\S]*model\.head\.bias"):
        build_policy(checkpoint)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt"):
        load_policy(tmp_path / "nowhere.ckpt")


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file(written: tuple[Path, Any], kept: float) -> None:
    path, _ = written
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError, match=r"latest\.ckpt.*cut short"):
        load_policy(path)


def test_a_damaged_pickle(written: tuple[Path, Any], tmp_path: Path) -> None:
    path, _ = written
    damaged = tmp_path / "damaged.ckpt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(damaged, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, data[:300] if name.endswith("data.pkl") else data)
    with pytest.raises(ValueError, match="may be damaged"):
        load_policy(damaged)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    text = tmp_path / "notes.ckpt"
    text.write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"no zip archive \(16 bytes\)"):
        load_policy(text)

    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match="not one of PyTorch"):
        load_policy(archive)

    script = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), script)
    with pytest.raises(ValueError, match="TorchScript"):
        load_policy(script)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ({"weights": 1, "step": 2}, r"found \['step', 'weights'\]"),
        ([1, 2], "found list"),
        ({"cfg": {"policy": 1}, "state_dicts": {}}, "cfg is dict"),
        ({"cfg": OmegaConf.create({}), "state_dicts": []}, "state_dicts is list"),
    ],
)
def test_archives_of_other_things(payload: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    torch.save(payload, path)
    with pytest.raises(ValueError, match=message):
        load_policy(path)


def test_an_incomplete_configuration(written: tuple[Path, Any]) -> None:
    checkpoint = read_checkpoint(written[0])
    checkpoint.cfg.policy.model.input_dim = "???"
    with pytest.raises(ValueError, match=r"cfg\.policy is incomplete.*input_dim"):
        build_policy(checkpoint)
    for policy in ({"n_emb": 3}, "causal", None):
        checkpoint.cfg.policy = policy
        with pytest.raises(ValueError, match=r"names no class"):
            build_policy(checkpoint)
    OmegaConf.set_struct(checkpoint.cfg, False)
    del checkpoint.cfg["policy"]
    with pytest.raises(ValueError, match=r"names no class"):
        build_policy(checkpoint)


def test_settings_that_contradict_each_other(written: tuple[Path, Any]) -> None:
    checkpoint = read_checkpoint(written[0])
    checkpoint.cfg.policy.model.time_as_cond = False
    with pytest.raises(ValueError, match=r"cfg\.policy cannot be built"):
        build_policy(checkpoint)


def test_a_policy_without_stand_in_names_what_to_install(
    written: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_installed(target: str) -> Any:
        raise ModuleNotFoundError("No module named 'diffusion_policy'")

    monkeypatch.setattr(diffusion_policy, "find", not_installed)
    checkpoint = read_checkpoint(written[0], trust_checkpoint=True)
    checkpoint.cfg.policy = {"_target_": UNET}
    with pytest.raises(RuntimeError, match=r"DiffusionUnetHybridImagePolicy.*No module.*real-stanford"):
        create_policy(checkpoint)


def test_the_reference_stands_in_when_the_package_cannot_be_imported(
    written: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = diffusion_policy.find

    def only_diffusers(target: str) -> Any:
        if target.startswith("diffusion_policy."):
            raise ImportError("zarr is missing")
        return find(target)

    monkeypatch.setattr(diffusion_policy, "find", only_diffusers)
    policy = load_policy(written[0])
    assert isinstance(policy, DiffusionTransformerLowdimPolicy)
    assert torch.equal(act(policy), act(written[1]))
