"""Diffusion Policy checkpoints: reading them without running what is in them, writing them, building their policies."""

from __future__ import annotations

import io
import re
import types
import typing
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import dill
import omegaconf
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from bacinfer import assets, safe_pickle
from bacinfer.policies import diffusion_policy
from bacinfer.policies.reference import STAND_INS

_TRUST = (
    "If you trust its source, load it with trust_checkpoint=True (--trust_checkpoint): that runs code from the file"
)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        cfg: the configuration it was trained with.
        state_dicts: tensors of ``model``, ``ema_model`` and, in training checkpoints, ``optimizer``.
        pickles: training progress, each value a pickle of its own (see :meth:`progress`).
        trusted: its source is trusted, so its configuration may name any class.
    """

    path: Path
    cfg: DictConfig
    state_dicts: dict[str, Any]
    pickles: dict[str, bytes] = field(default_factory=dict)
    trusted: bool = False

    def progress(self, name: str, default: Any = None) -> Any:
        """A plain value of ``pickles``, such as ``global_step``."""
        if name not in self.pickles:
            return default
        return safe_pickle.load(io.BytesIO(self.pickles[name]), {})


def load_policy(checkpoint: str | Path, device: str | torch.device = "cpu", *, trust_checkpoint: bool = False) -> Any:
    """The policy of a Diffusion Policy checkpoint, ready to act (EMA weights where it has them, eval mode).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no readable checkpoint, asks for more than data, or its policy cannot be built here.
    """
    return build_policy(read_checkpoint(checkpoint, trust_checkpoint=trust_checkpoint), device)


def read_checkpoint(path: str | Path, *, trust_checkpoint: bool = False) -> Checkpoint:
    """Read a checkpoint's configuration and tensors, onto the CPU.

    Nothing in the file is run unless ``trust_checkpoint``: then it is unpickled with dill, as Diffusion Policy does.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no readable checkpoint, or asks for more than data.
    """
    path = Path(path)
    _require_torch_archive(path)
    try:
        payload = torch.load(
            path,
            map_location="cpu",
            pickle_module=dill if trust_checkpoint else _DATA_ONLY,
            weights_only=False,
        )
    except safe_pickle.UnsafePickleError as error:
        raise ValueError(f"{path} holds more than data: {error}. {_TRUST}") from error
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise ValueError(f"{path} cannot be read, it may be damaged: {type(error).__name__}: {error}") from error

    found = sorted(map(str, payload)) if isinstance(payload, dict) else type(payload).__name__
    if not isinstance(payload, dict) or not {"cfg", "state_dicts"} <= payload.keys():
        raise ValueError(f"{path} is no Diffusion Policy checkpoint: expected 'cfg' and 'state_dicts', found {found}")
    cfg, state_dicts, pickles = payload["cfg"], payload["state_dicts"], payload.get("pickles", {})
    if not isinstance(cfg, DictConfig) or not isinstance(state_dicts, dict) or not isinstance(pickles, dict):
        raise ValueError(
            f"{path} is no Diffusion Policy checkpoint: cfg is {type(cfg).__name__} (expected DictConfig), state_dicts "
            f"is {type(state_dicts).__name__}, pickles is {type(pickles).__name__} (expected dict)"
        )
    if not trust_checkpoint:
        cfg = _plain_config(path, cfg)
    return Checkpoint(path, cfg, state_dicts, pickles, trusted=trust_checkpoint)


def write_checkpoint(
    path: str | Path, cfg: DictConfig, state_dicts: Mapping[str, Any], progress: Mapping[str, Any]
) -> None:
    """Write a checkpoint that Diffusion Policy's workspaces load; ``progress`` are values such as ``global_step``.

    The file appears at once and whole: an interrupted write leaves what was there before.
    """
    payload = {
        "cfg": cfg,
        "state_dicts": dict(state_dicts),
        "pickles": {name: dill.dumps(value) for name, value in progress.items()},
    }
    with assets.atomic_write(path) as temporary:
        torch.save(payload, temporary, pickle_module=dill)


def build_policy(checkpoint: Checkpoint, device: str | torch.device = "cpu") -> Any:
    """Build the policy that a checkpoint describes, with its acting weights, on ``device``, in eval mode.

    Raises:
        ValueError: the configuration lacks something or names classes from elsewhere.
        RuntimeError: the policy's class is not installed, or the weights do not fit it.
    """
    policy = create_policy(checkpoint)
    policy.load_state_dict(acting_weights(checkpoint), strict=True)
    return policy.to(device).eval()


def create_policy(checkpoint: Checkpoint) -> Any:
    """The policy that ``checkpoint.cfg`` describes, freshly initialised.

    The classes are those of the ``diffusion_policy`` package where it can be imported; the reference implementation
    stands in for its low-dimensional transformer policy where not.
    """
    settings = _with_classes(_policy_settings(checkpoint), checkpoint)
    try:
        return instantiate(settings)
    except InstantiationException as error:
        raise ValueError(f"{checkpoint.path}: cfg.policy cannot be built: {error.__cause__ or error}") from error


def acting_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The weights that act, the EMA's where the checkpoint has one, in single precision (a file may keep halves)."""
    use_ema = OmegaConf.select(checkpoint.cfg, "training.use_ema", default=False)
    name = "ema_model" if use_ema else "model"
    if name not in checkpoint.state_dicts:
        found = ", ".join(checkpoint.state_dicts) or "none"
        raise ValueError(f"{checkpoint.path} has no weights {name!r} (training.use_ema={use_ema}); it has {found}")
    halves = (torch.float16, torch.bfloat16)
    weights = checkpoint.state_dicts[name]
    return {
        key: value.float() if torch.is_tensor(value) and value.dtype in halves else value
        for key, value in weights.items()
    }


def _policy_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """``cfg.policy`` as plain data, interpolations resolved."""
    try:
        policy = OmegaConf.select(checkpoint.cfg, "policy")
        if not isinstance(policy, DictConfig) or "_target_" not in policy:
            raise ValueError(f"{checkpoint.path}: cfg.policy names no class (_target_): {policy}")
        settings: Any = OmegaConf.to_container(policy, resolve=True, throw_on_missing=True)
    except omegaconf.errors.OmegaConfBaseException as error:
        raise ValueError(f"{checkpoint.path}: cfg.policy is incomplete: {error}") from error
    for key, value in _leaves(settings):
        if isinstance(value, str) and "${" in value and not checkpoint.trusted:  # put together from parts
            raise ValueError(f"{checkpoint.path}: cfg.policy.{key} resolves to an interpolation, {value!r}. {_TRUST}")
    return settings


def _with_classes(node: Any, checkpoint: Checkpoint) -> Any:
    """A copy of ``node`` in which every ``_target_`` is the class itself, so that nothing else can be called."""
    if isinstance(node, list):
        return [_with_classes(value, checkpoint) for value in node]
    if not isinstance(node, dict):
        return node
    return {
        key: _find_class(value, checkpoint) if key == "_target_" else _with_classes(value, checkpoint)
        for key, value in node.items()
    }


def _find_class(target: Any, checkpoint: Checkpoint) -> Any:
    # importing a module runs it: first the name must be one of the packages', then the object be defined there
    refusal = f"{checkpoint.path}: the configuration asks to call {target!r}, which is no part of a policy. {_TRUST}"
    if not checkpoint.trusted and not diffusion_policy.names_policy_part(target):
        raise ValueError(refusal)
    try:
        found = diffusion_policy.find(target)
    except ImportError as error:
        if target in STAND_INS:
            return STAND_INS[target]
        raise RuntimeError(
            f"{checkpoint.path} needs {target}, which cannot be imported ({error}). {diffusion_policy.INSTALL_HINT}"
        ) from error
    if not checkpoint.trusted and not diffusion_policy.is_policy_part(found):
        raise ValueError(refusal)
    return found


def _require_torch_archive(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is no PyTorch archive ({path.stat().st_size} bytes): it is cut short, or no checkpoint"
        )
    with zipfile.ZipFile(path) as archive:
        names = {name.split("/", 1)[-1] for name in archive.namelist()}
    if "constants.pkl" in names:
        raise ValueError(f"{path} is a TorchScript program, expected a Diffusion Policy checkpoint")
    if "data.pkl" not in names:
        raise ValueError(f"{path} is a zip archive, but not one of PyTorch: it has no data.pkl")


def _plain_config(path: Path, cfg: DictConfig) -> DictConfig:
    """A configuration with the content of ``cfg``: plain data and references among them, nothing hidden.

    Other interpolations call something: once an ``eval`` resolver is registered, reading one runs code.
    """
    try:
        content = OmegaConf.to_container(cfg, resolve=False)
    except Exception as error:  # an object put together by a pickle may be inconsistent in any way
        raise ValueError(f"{path}: cfg cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: cfg is no mapping but {content!r}")
    for key, value in _leaves(content):
        if type(value) not in _PLAIN_TYPES:
            raise ValueError(f"{path}: cfg.{key} is a {type(value).__name__}, expected plain data. {_TRUST}")
        if isinstance(value, str) and "${" in _REFERENCE.sub("", value):
            raise ValueError(
                f"{path}: cfg.{key} holds an interpolation that calls something, {value!r}. Save checkpoints with a "
                f"resolved configuration (OmegaConf.resolve), as Diffusion Policy's train.py does. {_TRUST}"
            )
    return DictConfig(content)


_PLAIN_TYPES = (str, bytes, int, float, bool, type(None))
_REFERENCE = re.compile(r"\$\{[\w.\[\]]+\}")  # to another entry, such as ${task.obs_dim}


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in nested dicts and lists, with the path to it."""
    if type(node) not in (dict, list):
        yield key, node
        return
    for name, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield from _leaves(value, f"{key}.{name}" if key else str(name))


def _load_data_type(name: str) -> type:
    """In the place of dill's function of this purpose, which also hands out the types of code and functions."""
    if name not in _DATA_TYPES:
        raise safe_pickle.UnsafePickleError(f"it asks for the type {name!r}")
    return _DATA_TYPES[name]


_DATA_TYPES = {t.__name__: t for t in (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)}

_CHECKPOINT_GLOBALS: dict[tuple[str, str], Any] = {
    **safe_pickle.TENSOR_GLOBALS,
    **safe_pickle.ARRAY_GLOBALS,
    **{(module, name): t for module in ("builtins", "__builtin__") for name, t in _DATA_TYPES.items()},
    ("collections", "defaultdict"): defaultdict,
    ("typing", "Any"): typing.Any,
    ("dill._dill", "_load_type"): _load_data_type,
    ("omegaconf.dictconfig", "DictConfig"): DictConfig,
    ("omegaconf.listconfig", "ListConfig"): ListConfig,
    ("omegaconf.base", "ContainerMetadata"): omegaconf.base.ContainerMetadata,
    ("omegaconf.base", "Metadata"): omegaconf.base.Metadata,
    ("omegaconf.nodes", "AnyNode"): omegaconf.nodes.AnyNode,
}


class _CheckpointUnpickler(safe_pickle.RestrictedUnpickler):
    def __init__(self, file: IO[bytes], **settings: Any) -> None:
        super().__init__(file, _CHECKPOINT_GLOBALS, **settings)


# what torch.load takes as its pickle module
_DATA_ONLY = types.SimpleNamespace(__name__="data_only", Unpickler=_CheckpointUnpickler)
