"""Checkpoints made to run code when they are read, and what they get."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dill
import pytest
import torch
from omegaconf import OmegaConf

from bacinfer.policies import load_policy, read_checkpoint
from bacinfer.policies.checkpoint import Checkpoint, build_policy, create_policy, write_checkpoint
from tiny_policies import fitted_normalizer, tiny_config


class Call:
    """Unpickles as the result of a call."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A folder that every attack here tries to make."""
    path = tmp_path / "was_here"
    yield path
    assert not path.exists()


def save(path: Path, **payload: Any) -> Path:
    torch.save({"cfg": tiny_config(), "state_dicts": {}, **payload}, path, pickle_module=dill)
    return path


@pytest.mark.parametrize("place", ["cfg", "state_dicts", "extra"])
def test_a_call_in_the_pickle_is_not_made(place: str, marker: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", **{place: Call(os.mkdir, str(marker))})
    with pytest.raises(ValueError, match=r"a\.ckpt holds more than data.*mkdir.*--trust_checkpoint"):
        load_policy(path)


def test_a_call_hidden_in_the_configuration_is_not_made(marker: Path, tmp_path: Path) -> None:
    cfg = tiny_config()
    cfg._content["name"]._val = Call(os.mkdir, str(marker))
    with pytest.raises(ValueError, match=r"mkdir"):
        read_checkpoint(save(tmp_path / "a.ckpt", cfg=cfg))


def test_progress_is_not_unpickled_until_asked_and_then_only_as_plain_data(marker: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", pickles={"epoch": pickle.dumps(Call(os.mkdir, str(marker)))})
    checkpoint = read_checkpoint(path)
    with pytest.raises(ValueError, match="mkdir"):
        checkpoint.progress("epoch")


@pytest.mark.parametrize("name", ["CodeType", "FunctionType", "ModuleType", "type", "object", "classmethod"])
def test_dill_does_not_hand_out_types_that_make_code(name: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", extra=Call(dill._dill._load_type, name))
    with pytest.raises(ValueError, match=rf"the type '{name}'"):
        read_checkpoint(path)


def test_code_put_together_with_dill_does_not_run(marker: Path, tmp_path: Path) -> None:
    def attack() -> int:
        marker.mkdir()
        return 1

    path = save(tmp_path / "a.ckpt", extra=attack)
    with pytest.raises(ValueError, match="dill"):
        read_checkpoint(path)


def with_policy_target(key: str, target: str, **arguments: Any) -> Checkpoint:
    cfg = tiny_config()
    node = {"_target_": target, **arguments}
    OmegaConf.update(cfg, key, node, merge=False, force_add=True)
    return Checkpoint(Path("hostile.ckpt"), cfg, {})


@pytest.mark.parametrize("key", ["policy", "policy.model", "policy.noise_scheduler", "policy.model.n_emb"])
@pytest.mark.parametrize(
    "target",
    [
        "os.mkdir",
        "posix.mkdir",
        "diffusers.schedulers.scheduling_ddpm.os.mkdir",
        "diffusers.os.mkdir",
        "bacinfer.policies.checkpoint.Path.mkdir",
    ],
)
def test_the_configuration_cannot_name_other_functions(key: str, target: str, marker: Path) -> None:
    checkpoint = with_policy_target(key, target, path=str(marker))
    with pytest.raises((ValueError, RuntimeError), match=r"hostile\.ckpt.*mkdir"):
        create_policy(checkpoint)


@pytest.mark.parametrize("name", ["randn_tensor", "dataclass", "np", "math", "register_to_config"])
def test_what_a_scheduler_module_imported_is_no_part_of_a_policy(name: str) -> None:
    checkpoint = with_policy_target("policy.noise_scheduler", f"diffusers.schedulers.scheduling_ddpm.{name}")
    with pytest.raises((ValueError, RuntimeError), match=r"no part of a policy|cannot be imported"):
        create_policy(checkpoint)


def test_a_target_hidden_in_a_list_is_found(marker: Path) -> None:
    checkpoint = with_policy_target(
        "policy.noise_scheduler",
        "diffusers.schedulers.scheduling_ddpm.DDPMScheduler",
        trained_betas=[{"_target_": "os.mkdir", "path": str(marker)}],
    )
    with pytest.raises(ValueError, match=r"os\.mkdir"):
        create_policy(checkpoint)


@pytest.fixture
def eval_resolver() -> Iterator[None]:
    """As importing one of Diffusion Policy's workspaces leaves it."""
    OmegaConf.register_new_resolver("eval", eval, replace=True)
    yield
    OmegaConf.clear_resolver("eval")


@pytest.mark.usefixtures("eval_resolver")
@pytest.mark.parametrize("key", ["policy.model.n_emb", "task.name", "name"])
@pytest.mark.parametrize("form", ["${{eval:'{0}'}}", "a ${{ eval:'{0}'}}", "${{${{.which}}:'{0}'}}"])
def test_interpolations_that_call_something_are_refused(key: str, form: str, marker: Path, tmp_path: Path) -> None:
    cfg = tiny_config()
    code = f'__import__("os").mkdir("{marker}")'
    OmegaConf.update(cfg, f"{key.rpartition('.')[0]}.which".lstrip("."), "eval", force_add=True)
    OmegaConf.update(cfg, key, form.format(code))
    with pytest.raises(ValueError, match=rf"cfg\.{key} holds an interpolation that calls something"):
        read_checkpoint(save(tmp_path / "a.ckpt", cfg=cfg))


@pytest.mark.usefixtures("eval_resolver")
def test_an_interpolation_put_together_from_parts_does_not_run(marker: Path, tmp_path: Path) -> None:
    cfg = tiny_config()
    OmegaConf.update(cfg, "dollar", "$", force_add=True)
    cfg.policy.model.n_emb = '${dollar}{eval:\'__import__("os").mkdir("' + str(marker) + "\")'}"
    checkpoint = read_checkpoint(save(tmp_path / "a.ckpt", cfg=cfg))
    with pytest.raises(ValueError, match="resolves to an interpolation"):
        create_policy(checkpoint)


@pytest.mark.parametrize("hide", [lambda node: node, lambda node: [node], lambda node: (node,)])
def test_a_configuration_hidden_inside_a_value_is_found(hide: Callable, marker: Path, tmp_path: Path) -> None:
    cfg = tiny_config()
    attack = OmegaConf.create({"_target_": "os.mkdir", "path": str(marker)})
    cfg.policy.model._content["n_emb"]._val = hide(attack)
    with pytest.raises(ValueError, match=r"cfg\.policy\.model\.n_emb.* is a (DictConfig|tuple), expected plain data"):
        load_policy(save(tmp_path / "a.ckpt", cfg=cfg))


@pytest.mark.parametrize("content", [3, None, "${name}", "a: b", [1]])
def test_an_inconsistent_configuration_is_an_error(content: Any, tmp_path: Path) -> None:
    cfg = tiny_config()
    cfg.__dict__["_content"] = content
    with pytest.raises(ValueError, match=r"a\.ckpt"):
        read_checkpoint(save(tmp_path / "a.ckpt", cfg=cfg))


def test_plain_references_are_resolved(tmp_path: Path) -> None:
    cfg = tiny_config()
    cfg.policy.model.n_head = "${n_obs_steps}"
    cfg.policy.model.output_dim = "${.input_dim}"
    policy = create_policy(read_checkpoint(save(tmp_path / "a.ckpt", cfg=cfg)))
    assert policy.model.decoder.layers[0].self_attn.num_heads == 2
    assert policy.model.head.out_features == 2


def test_a_missing_resolver_is_a_clear_error_for_a_trusted_checkpoint_too(tmp_path: Path) -> None:
    cfg = tiny_config()
    cfg.policy.model.n_emb = "${eval:'8 * 2'}"
    path = save(tmp_path / "a.ckpt", cfg=cfg)
    with pytest.raises(ValueError, match="eval"):
        build_policy(read_checkpoint(path, trust_checkpoint=True))


class Custom:
    """A class that no checkpoint of Diffusion Policy needs."""


def test_a_trusted_checkpoint_may_hold_anything(tmp_path: Path) -> None:
    cfg = tiny_config()
    policy = create_policy(Checkpoint(Path("new"), cfg, {}))
    policy.set_normalizer(fitted_normalizer())
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, cfg, {"ema_model": policy.state_dict(), "helper": Custom()}, {})
    with pytest.raises(ValueError, match="Custom"):
        load_policy(path)
    loaded = load_policy(path, trust_checkpoint=True)
    assert torch.equal(loaded.state_dict()["model.pos_emb"], policy.state_dict()["model.pos_emb"])


def test_the_configuration_of_a_trusted_checkpoint_may_name_any_class() -> None:
    checkpoint = with_policy_target("policy", "collections.Counter", a=2)
    with pytest.raises(ValueError, match=r"collections\.Counter"):
        create_policy(checkpoint)
    trusted = Checkpoint(checkpoint.path, checkpoint.cfg, {}, trusted=True)
    assert create_policy(trusted) == {"a": 2}
