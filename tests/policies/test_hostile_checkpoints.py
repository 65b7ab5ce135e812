"""Checkpoints made to run code when they are read, or to take all memory and time, and what they get."""

from __future__ import annotations

import os
import pickle
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dill
import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from bacinfer.policies import diffusion_policy, load_policy, read_checkpoint
from bacinfer.policies.checkpoint import Checkpoint, build_policy, create_policy, write_checkpoint
from bacinfer.policies.configuration import least_weights, require_known_policy
from tiny_policies import fitted_normalizer, tiny_config, write_tiny_checkpoint


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


def changed(key: str, value: Any) -> Checkpoint:
    cfg = tiny_config()
    OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    return Checkpoint(Path("hostile.ckpt"), cfg, {})


def with_policy_target(key: str, target: str, **arguments: Any) -> Checkpoint:
    return changed(key, {"_target_": target, **arguments})


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
    with pytest.raises(ValueError, match=r"no part of a transformer policy"):
        create_policy(checkpoint)


def test_a_target_hidden_in_a_list_is_found(marker: Path) -> None:
    checkpoint = with_policy_target(
        "policy.noise_scheduler",
        "diffusers.schedulers.scheduling_ddpm.DDPMScheduler",
        trained_betas=[{"_target_": "os.mkdir", "path": str(marker)}],
    )
    with pytest.raises(ValueError, match=r"os\.mkdir"):
        create_policy(checkpoint)


HYBRID = "diffusion_policy.policy.diffusion_transformer_hybrid_image_policy.DiffusionTransformerHybridImagePolicy"
VISION = "diffusion_policy.model.vision."
MODEL = {"_target_": "diffusion_policy.model.diffusion.transformer_for_diffusion.TransformerForDiffusion"}


@pytest.mark.parametrize("weights", ["r3m", "IMAGENET1K_V1", None])
def test_what_may_download_is_not_called(weights: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusion_policy, "find", lambda target: pytest.fail(f"{target} was imported"))
    encoder = {
        "_target_": f"{VISION}multi_image_obs_encoder.MultiImageObsEncoder",
        "rgb_model": {"_target_": f"{VISION}model_getter.get_resnet", "name": "resnet18", "weights": weights},
    }
    with pytest.raises(ValueError, match=r"hostile\.ckpt: cfg\.policy\.obs_encoder\._target_ .*--trust_checkpoint"):
        create_policy(changed("policy.obs_encoder", encoder))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("policy.extra", MODEL),
        ("policy.extra", [[MODEL]]),
        ("policy.model.extra", MODEL),
        ("policy.noise_scheduler", MODEL),
        ("policy.model._target_", ["a", "b"]),
        ("policy.model._target_", 3),
        ("policy.model._target_", None),
        ("policy.model._target_", MODEL["_target_"] + ".forward"),
        ("policy.model._partial_", True),
        ("policy._partial_", True),
        ("policy.model._args_", [1]),
        ("policy.model._convert_", "all"),
        ("policy._recursive_", False),
    ],
)
def test_known_classes_are_built_at_their_place_only(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"hostile\.ckpt: cfg\.{key}.*(transformer policy|how the policy is built)"):
        create_policy(changed(key, value))


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("noise_scheduler.num_train_timesteps", [10**10, 0, -1, 1e3, True, "100", None]),
        ("num_inference_steps", [10**10, 0, -3, 7.5, True, "5", [5]]),
        ("model.n_layer", [10**9, 0, -1, 2.0, None]),
        ("model.n_cond_layers", [10**9, -1]),
        ("model.n_emb", [10**9, 0, {}]),
        ("model.n_head", [10**9, 0]),
        ("model.input_dim", [10**9, 0]),
        ("model.cond_dim", [10**9, -1]),
        ("model.horizon", [10**9, 0]),
        ("model.n_obs_steps", [10**9, 0]),
        ("horizon", [10**9, False]),
        ("obs_dim", [10**9, 0]),
        ("noise_scheduler.steps_offset", [10**30]),
        ("shape_meta.obs.camera", [{"type": "rgb", "shape": [3, 4000, 4000]}, {"shape": [4000, 4000]}, {"shape": "a"}]),
        ("shape_meta.obs.camera.shape", [[3, 10**9, 10**9], [-1]]),
    ],
)
def test_sizes_beyond_those_of_policies_are_refused(key: str, values: list[Any]) -> None:
    for value in values:
        start = time.process_time()
        with pytest.raises(ValueError, match=rf"hostile\.ckpt: cfg\.policy\.{key}.* expected (a whole number|up to)"):
            create_policy(changed(f"policy.{key}", value))
        assert time.process_time() - start < 1


def test_a_policy_has_few_cameras_and_settings() -> None:
    cameras = {f"camera{i}": {"shape": [3, 84, 84], "type": "rgb"} for i in range(20)}
    with pytest.raises(ValueError, match=r"cfg\.policy\.shape_meta\.obs has 20 entries, 20 of them cameras"):
        create_policy(changed("policy.shape_meta", {"obs": cameras}))
    with pytest.raises(ValueError, match=r"cfg\.policy\.shape_meta\.obs has 1000 entries"):
        create_policy(changed("policy.shape_meta", {"obs": {f"o{i}": {"shape": [2]} for i in range(1000)}}))


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({"n_emb": 16384}, 6_442_450_944),
        ({"n_emb": 16384, "n_layer": 1}, 3_221_225_472),
        ({"n_emb": 512, "n_cond_layers": 256}, 811_597_824),
    ],
)
def test_a_model_is_not_built_before_the_file_has_the_weights_for_it(
    settings: dict[str, int], needed: int, tmp_path: Path
) -> None:
    cfg = tiny_config()
    cfg.policy.model.update(settings)
    path = save(tmp_path / "a.ckpt", cfg=cfg, state_dicts={"ema_model": {"model.head.weight": torch.zeros(10)}})
    with pytest.raises(ValueError, match=rf"a\.ckpt: cfg\.policy asks for {needed:,} weights or more, there are 10"):
        load_policy(path)


def test_settings_left_out_or_of_another_policy_do_not_hide_a_large_model() -> None:
    lowdim, transformer = dict(tiny_config().policy), {**MODEL, "n_emb": 16384}
    assert least_weights({**lowdim, "model": transformer}) >= 12 * 8 * 16384**2
    hidden = {"_target_": HYBRID, "n_emb": 16384, "model": {"n_emb": 2, "n_layer": 1}}
    assert least_weights(hidden) >= 12 * 8 * 16384**2
    with pytest.raises(ValueError, match=r"cfg\.policy\.model\._target_"):
        require_known_policy({"_target_": HYBRID, "model": MODEL})


def test_sizes_of_published_policies_are_within_the_bounds() -> None:
    settings = OmegaConf.to_container(tiny_config(), resolve=True)["policy"]  # type: ignore[call-overload]
    settings["model"] |= {"n_layer": 12, "n_head": 12, "n_emb": 768, "horizon": 64, "n_cond_layers": 4}
    settings["noise_scheduler"]["num_train_timesteps"] = settings["num_inference_steps"] = 1000
    require_known_policy(settings)
    camera = {"shape": [3, 240, 320], "type": "rgb"}
    image = {
        "_target_": HYBRID,
        "shape_meta": {
            "obs": {"camera_0": camera, "camera_1": camera, "pose": {"shape": [9]}},
            "action": {"shape": [10]},
        },
        "noise_scheduler": {
            "_target_": "diffusers.schedulers.scheduling_ddim.DDIMScheduler",
            "num_train_timesteps": 100,
        },
        "crop_shape": [216, 288],
        "n_layer": 8,
        "n_emb": 256,
        "num_inference_steps": None,
    }
    require_known_policy(image)


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
    with pytest.raises(ValueError, match=r"cfg\.policy\.model\.n_emb resolves to an interpolation"):
        read_checkpoint(save(tmp_path / "a.ckpt", cfg=cfg))


@pytest.mark.parametrize("hide", [lambda node: node, lambda node: [node], lambda node: (node,)])
def test_a_configuration_hidden_inside_a_value_is_found(hide: Callable, marker: Path, tmp_path: Path) -> None:
    cfg = tiny_config()
    attack = OmegaConf.create({"_target_": "os.mkdir", "path": str(marker)})
    cfg.policy.model._content["n_emb"]._val = hide(attack)
    with pytest.raises(
        ValueError, match=r"cfg\.policy\.model\.n_emb.* is a (ConfigRecord|list|tuple), expected plain data"
    ):
        load_policy(save(tmp_path / "a.ckpt", cfg=cfg))


@pytest.mark.parametrize("content", [3, None, "${name}", "a: b", [1]])
def test_an_inconsistent_configuration_is_an_error(content: Any, tmp_path: Path) -> None:
    cfg = tiny_config()
    cfg.__dict__["_content"] = content
    with pytest.raises(ValueError, match=r"a\.ckpt"):
        read_checkpoint(save(tmp_path / "a.ckpt", cfg=cfg))


def sixty(form: Callable[[str], Any], first: Any) -> dict[str, Any]:
    """Entries of which each refers to the one before as `form` says."""
    return {"a0": first} | {f"a{i}": form(f"${{a{i - 1}}}") for i in range(1, 61)}


ENDLESS = {
    "text_doubled": sixty(lambda before: before + before, "text"),
    "sections_doubled": sixty(lambda before: {"x": before, "y": before}, {"x": 1}),
    "lists_doubled": sixty(lambda before: [before, before], [1]),
    "itself": {"a0": "${a0}"},
    "each_other": {"a0": "${a1}", "a1": "x ${a0}"},
    "its_section": {"a0": {"b": "${a0}"}},
    "its_section_relatively": {"a0": {"b": "${..a0}"}},
    "long_chain": {"a0": 1} | {f"a{i}": f"${{a{i - 1}}}" for i in range(1, 300)},
    "text_repeated": {"a0": "x" * 10**5, "a1": "${a0}" * 10**3},
    "nowhere": {"a0": "${nowhere}"},
    "nowhere_in_a_section": {"a0": "${policy.nowhere.b}"},
    "in_a_value": {"a0": "${name.b}"},
    "beyond_a_list": {"a0": [1], "a1": "${a0[7]}"},
    "above_all": {"a0": "${....b}"},
    "much_text": {"a0": "x" * 10**7},
    "many_entries": {f"a{i}": i for i in range(4_200)},
}


@pytest.mark.parametrize("name", ENDLESS)
def test_references_without_end_are_refused(name: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", cfg=OmegaConf.create(ENDLESS[name]))
    start = time.process_time()
    with pytest.raises(ValueError, match=r"a\.ckpt holds more than data.*(refers to|far more than its size)"):
        read_checkpoint(path)
    assert time.process_time() - start < 3


def holding_itself() -> DictConfig:
    cfg = tiny_config()
    cfg.__dict__["_content"]["a"] = cfg
    return cfg


def doubled() -> DictConfig:
    cfg = tiny_config()
    for _ in range(60):
        outer = OmegaConf.create({})
        outer.__dict__["_content"] = {"x": cfg, "y": cfg}
        cfg = outer
    return cfg


def nested(depth: int) -> DictConfig:
    cfg = OmegaConf.create({})
    for _ in range(depth):
        outer = OmegaConf.create({})
        outer.__dict__["_content"] = {"x": cfg}
        cfg = outer
    return cfg


def with_inside(key: str, **attributes: Any) -> DictConfig:
    cfg = tiny_config()
    node = cfg._get_node(key)
    node.__dict__.update(attributes)
    return cfg


OBJECTS: dict[str, Callable[[], Any]] = {
    "itself": holding_itself,
    "doubled": doubled,
    "nested": lambda: nested(40),
    "class": lambda: DictConfig,
    "metadata": lambda: tiny_config()._metadata,
    "list": lambda: OmegaConf.create([1]),
    "value_in_place_of_entry": lambda: with_inside("task", _content={"name": "pusht"}),
    "section_in_place_of_value": lambda: with_inside("name", _val={"a": 1}),
    "tensor_in_place_of_value": lambda: with_inside("name", _val=torch.ones(2)),
    "array_in_place_of_value": lambda: with_inside("name", _val=np.ones(2)),
    "type_in_place_of_value": lambda: with_inside("name", _val=dict),
    "list_in_place_of_section": lambda: with_inside("task", _content=[1]),
    "tuple_for_a_key": lambda: with_inside("task", _content={("a", "b"): OmegaConf.create({})}),
}


@pytest.mark.parametrize(
    "state_dicts",
    [{}, {1: {}}, {"ema_model": 3}, {"ema_model": [1]}, {"ema_model": {"a": 1}}, {"ema_model": {1: torch.ones(10**5)}}],
)
def test_weights_that_are_none_are_an_error(state_dicts: dict[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.ckpt.*weights"):
        load_policy(save(tmp_path / "a.ckpt", state_dicts=state_dicts))


@pytest.mark.parametrize("pickles", [{"epoch": 3}, {"epoch": b"\x80\x04]"}, {"epoch": b"cos\nsystem\n."}, [b""]])
def test_progress_that_is_none_is_an_error(pickles: Any, tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", pickles=pickles)
    with pytest.raises(ValueError, match=r"a\.ckpt"):
        read_checkpoint(path).progress("epoch")


@pytest.mark.parametrize("pickle_module", [pickle, dill])
@pytest.mark.parametrize("name", OBJECTS)
def test_no_object_of_a_configuration_is_built_from_the_file(name: str, pickle_module: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"cfg": OBJECTS[name](), "state_dicts": {}}, path, pickle_module=pickle_module)
    with pytest.raises(ValueError, match=r"a\.ckpt"):
        load_policy(path)


def test_plain_references_are_resolved(tmp_path: Path) -> None:
    cfg = tiny_config()
    OmegaConf.set_struct(cfg, False)
    cfg.policy.model.n_head = "${n_obs_steps}"
    cfg.policy.model.output_dim = "${.input_dim}"
    cfg.name = "train_${task.name}_${..n_obs_steps}"
    cfg.task.copies = ["${..obs_dim}", "${...task.obs_dim}", {"shape": "${task.copies[0]}"}]
    cfg.copy = "${ema}"
    checkpoint = read_checkpoint(save(tmp_path / "a.ckpt", cfg=cfg))
    policy = create_policy(checkpoint)
    assert policy.model.decoder.layers[0].self_attn.num_heads == 2
    assert policy.model.head.out_features == 2
    del cfg.name, checkpoint.cfg["name"]
    expected = OmegaConf.to_container(cfg, resolve=True)
    assert OmegaConf.to_container(checkpoint.cfg, resolve=False) == expected


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


# -- the archive -----------------------------------------------------------------------------------------------------


def rewrite(path: Path, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> Path:
    """A copy of a checkpoint, its entries changed; those that become None are left out."""
    copy = path.with_name("a.ckpt")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w", compression) as target:
        for name in source.namelist():
            data = change(name.split("/", 1)[1], source.read(name))
            if data is not None:
                target.writestr(name, data)
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, data: data + b"x" if name == "data/5" else data, "storage of"),
        (lambda name, data: data[:-1] if name == "data/5" else data, "storage of"),
        (lambda name, data: b"" if name == "data/5" else data, "storage of"),
        (lambda name, data: None if name == "data/5" else data, "data/5"),
        (lambda name, data: None if name == "data.pkl" else data, "no data.pkl"),
        (lambda name, data: b"" if name == "data.pkl" else data, "damaged"),
        (lambda name, data: b"big" if name == "byteorder" else data, "big-endian"),
    ],
)
def test_an_archive_that_lacks_something_is_refused(change: Callable, message: str, tmp_path: Path) -> None:
    path = rewrite(write_tiny_checkpoint(tmp_path / "good.ckpt"), change)
    with pytest.raises(ValueError, match=rf"a\.ckpt.*{message}"):
        load_policy(path)


def test_an_archive_that_unpacks_to_more_is_refused(tmp_path: Path) -> None:
    def unfold(name: str, data: bytes) -> bytes:
        return bytes(2**26) if name == "version" else data

    path = rewrite(write_tiny_checkpoint(tmp_path / "good.ckpt"), unfold, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"a\.ckpt.*larger than the file"):
        load_policy(path)


def test_an_archive_that_is_compressed_is_read(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "good.ckpt")
    small = rewrite(path, lambda _, data: data, zipfile.ZIP_DEFLATED)
    assert small.stat().st_size < path.stat().st_size
    weights = load_policy(path).state_dict()
    for name, weight in load_policy(small).state_dict().items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=0)


def test_an_archive_with_the_same_bytes_for_many_entries_is_refused(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "a.ckpt")
    with zipfile.ZipFile(path, "a") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        archive.filelist.extend([largest] * (2**26 // largest.file_size))
        archive._didModify = True
    with pytest.raises(ValueError, match=r"a\.ckpt.*larger than the file"):
        load_policy(path)
