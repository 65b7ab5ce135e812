"""Diffusion Policy checkpoints: reading them without running what is in them, writing them, building their policies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dill
import omegaconf
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from bacinfer import files, safe_pickle
from bacinfer.policies import configuration, diffusion_policy
from bacinfer.policies.reference import STAND_INS
from bacinfer.policies.torch_archive import read_archive

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
        """A plain value of ``pickles``, such as ``global_step``.

        Raises:
            ValueError: its pickle is damaged, or holds more than that.
        """
        if name not in self.pickles:
            return default
        try:
            return safe_pickle.load(self.pickles[name], {})
        except ValueError as error:
            raise ValueError(f"{self.path}: {name} cannot be read: {error}") from error


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
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    payload = _load(path, trust_checkpoint)
    found = sorted(map(str, payload)) if isinstance(payload, dict) else type(payload).__name__
    if not isinstance(payload, dict) or not {"cfg", "state_dicts"} <= payload.keys():
        raise ValueError(
            f"{path} is no Diffusion Policy checkpoint: expected 'cfg' and 'state_dicts', "
            f"found {safe_pickle.shorten(found)}"
        )
    cfg, state_dicts, pickles = payload["cfg"], payload["state_dicts"], payload.get("pickles", {})
    if not isinstance(cfg, DictConfig) or not isinstance(state_dicts, dict) or not isinstance(pickles, dict):
        raise ValueError(
            f"{path} is no Diffusion Policy checkpoint: cfg is {type(cfg).__name__} (expected DictConfig), state_dicts "
            f"is {type(state_dicts).__name__}, pickles is {type(pickles).__name__} (expected dict)"
        )
    if not all(isinstance(value, bytes) for value in pickles.values()):
        raise ValueError(f"{path} is no Diffusion Policy checkpoint: its pickles are no bytes")
    return Checkpoint(path, cfg, state_dicts, pickles, trusted=trust_checkpoint)


def _load(path: Path, trusted: bool) -> Any:
    try:
        if trusted:
            return torch.load(path, map_location="cpu", pickle_module=dill, weights_only=False)
        return _load_data(path)
    except safe_pickle.UnsafePickleError as error:
        raise ValueError(f"{path} holds more than data: {error}. {_TRUST}") from error
    except Exception as error:  # a damaged file can raise anything
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be read, it may be damaged: {safe_pickle.shorten(reason)}") from error


def _load_data(path: Path) -> Any:
    """What a checkpoint holds, made of plain data alone."""
    payload = read_archive(path, _GLOBALS)
    limit = safe_pickle.memory_limit(path.stat().st_size)
    if isinstance(payload, dict) and isinstance(payload.get("cfg"), configuration.ConfigRecord):
        cfg = configuration.plain_configuration(payload.pop("cfg"))
        safe_pickle.require_plain(payload, limit)
        return {"cfg": cfg, **payload}
    safe_pickle.require_plain(payload, limit)
    return payload


_GLOBALS = {**configuration.CONFIG_GLOBALS, **safe_pickle.TENSOR_GLOBALS, **safe_pickle.ARRAY_GLOBALS}


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
    with files.atomic_write(path) as temporary:
        torch.save(payload, temporary, pickle_module=dill)


def build_policy(checkpoint: Checkpoint, device: str | torch.device = "cpu") -> Any:
    """Build the policy that a checkpoint describes, with its acting weights, on ``device``, in eval mode.

    Raises:
        ValueError: the configuration lacks something, names other classes than those of known policies or asks for
            unlikely sizes; or the weights do not fit it.
        RuntimeError: the policy's class is not installed.
    """
    settings = _policy_settings(checkpoint)
    weights = acting_weights(checkpoint)
    if not checkpoint.trusted:
        needed, held = configuration.least_weights(settings), sum(value.numel() for value in weights.values())
        if needed > held:
            raise ValueError(f"{checkpoint.path}: cfg.policy asks for {needed:,} weights or more, there are {held:,}")
    policy = _instantiate(settings, checkpoint.path)
    try:
        policy.load_state_dict(weights, strict=True)
    except Exception as error:  # weights of any names may come, and the classes may be anybody's
        raise ValueError(f"{checkpoint.path}: the weights do not fit the policy: {str(error)[:2000]}") from error
    return policy.to(device).eval()


def create_policy(checkpoint: Checkpoint) -> Any:
    """The policy that ``checkpoint.cfg`` describes, freshly initialised.

    The classes are those of the ``diffusion_policy`` package where it can be imported; the reference implementation
    stands in for its transformer policies where not.
    """
    return _instantiate(_policy_settings(checkpoint), checkpoint.path)


def _instantiate(settings: dict[str, Any], path: Path) -> Any:
    settings = _with_classes(settings, path)
    try:
        return instantiate(settings)
    except Exception as error:  # the classes raise what they like
        reason = str(error.__cause__ or error)[:2000]
        raise ValueError(f"{path}: cfg.policy cannot be built: {reason}") from error


def acting_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The weights that act, the EMA's where the checkpoint has one, in single precision (a file may keep halves)."""
    use_ema = _select(checkpoint, "training.use_ema", default=False)
    name = "ema_model" if use_ema else "model"
    if name not in checkpoint.state_dicts:
        found = safe_pickle.shorten(", ".join(map(str, checkpoint.state_dicts)) or "none")
        raise ValueError(f"{checkpoint.path} has no weights {name!r} (training.use_ema={use_ema}); it has {found}")
    weights = checkpoint.state_dicts[name]
    if not isinstance(weights, dict) or not all(torch.is_tensor(value) for value in weights.values()):
        raise ValueError(f"{checkpoint.path}: its weights {name!r} are not all tensors")
    halves = (torch.float16, torch.bfloat16)
    return in_precision(weights, lambda _, weight: torch.float32 if weight.dtype in halves else weight.dtype)


def in_precision(
    weights: Mapping[str, torch.Tensor], dtype_of: Callable[[str, torch.Tensor], torch.dtype]
) -> dict[str, torch.Tensor]:
    """Weights rounded to what `dtype_of` says of each, by name and weight; those with two names stay one."""
    rounded: dict[tuple[Any, ...], torch.Tensor] = {}

    def convert(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        memory = (weight.data_ptr(), weight.dtype, weight.shape, weight.stride(), dtype)
        if memory not in rounded:
            rounded[memory] = weight.to(dtype)
        return rounded[memory]

    return {name: convert(weight, dtype_of(name, weight)) for name, weight in weights.items()}


def _select(checkpoint: Checkpoint, key: str, default: Any = None) -> Any:
    """An entry of the configuration."""
    try:
        return OmegaConf.select(checkpoint.cfg, key, default=default)
    except omegaconf.errors.OmegaConfBaseException as error:
        raise ValueError(f"{checkpoint.path}: cfg.{key} cannot be read: {error}") from error


def _policy_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """``cfg.policy`` as plain data, interpolations resolved; of known classes and sizes, unless it is trusted."""
    policy = _select(checkpoint, "policy")
    if not isinstance(policy, DictConfig) or "_target_" not in policy:
        raise ValueError(f"{checkpoint.path}: cfg.policy names no class (_target_): {safe_pickle.shorten(policy)}")
    try:
        settings: Any = OmegaConf.to_container(policy, resolve=True, throw_on_missing=True)
    except omegaconf.errors.OmegaConfBaseException as error:
        raise ValueError(f"{checkpoint.path}: cfg.policy is incomplete: {error}") from error
    if not checkpoint.trusted:
        try:
            configuration.require_known_policy(settings)
        except ValueError as error:
            raise ValueError(f"{checkpoint.path}: {error}. {_TRUST}") from error
    return settings


def _with_classes(node: Any, path: Path) -> Any:
    """A copy of ``node`` in which every ``_target_`` is the class itself."""
    if isinstance(node, list):
        return [_with_classes(value, path) for value in node]
    if not isinstance(node, dict):
        return node
    return {
        key: _find_class(value, path) if key == "_target_" else _with_classes(value, path)
        for key, value in node.items()
    }


def _find_class(target: str, path: Path) -> Any:
    try:
        return diffusion_policy.find(target)
    except ImportError as error:
        if target in STAND_INS:
            return STAND_INS[target]
        raise RuntimeError(
            f"{path} needs {target}, which cannot be imported ({error}). {diffusion_policy.INSTALL_HINT}"
        ) from error
