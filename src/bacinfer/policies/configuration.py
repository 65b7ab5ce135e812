"""The configuration of a checkpoint that is not trusted: plain data, and a policy of known parts and sizes.

OmegaConf's objects are not built from the file: their inside could be anything. What the pickle says of them is read as
records, and turned into a new configuration.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig

from bacinfer.policies import diffusion_policy
from bacinfer.safe_pickle import MENTIONED, Budget, Mentioned, Record, UnsafePickleError, shorten

Keys = tuple[Any, ...]
"""The way to an entry, through sections and lists."""

# -- from the pickle to plain data -----------------------------------------------------------------------------------


class ConfigRecord(Record):
    """A pickled ``DictConfig``, its entries in ``state['_content']``."""


class ListConfigRecord(Record):
    """A pickled ``ListConfig``, its entries in ``state['_content']``."""


class ValueRecord(Record):
    """A pickled ``AnyNode``, its value in ``state['_val']``."""


class MetadataRecord(Record):
    """What OmegaConf knows of the types of a structured configuration; checkpoints have none."""


_TYPES = (
    *("bool", "int", "float", "complex", "str", "bytes", "list", "tuple", "dict", "set", "frozenset"),
    *("long", "unicode"),  # what protocol 2 calls int and str
)


def _mention_type(name: str) -> Mentioned:
    """In the place of dill's function of this purpose, which also hands out the types of code and functions."""
    if name not in _TYPES:
        raise UnsafePickleError(f"it asks for the type {shorten(repr(name))}")
    return MENTIONED


def _default_dict(factory: Any = None) -> dict:
    """The caches of OmegaConf's resolvers."""
    return {}


CONFIG_GLOBALS: dict[tuple[str, str], Any] = {
    **{(module, name): MENTIONED for module in ("builtins", "__builtin__") for name in _TYPES},
    ("typing", "Any"): MENTIONED,
    ("dill._dill", "_load_type"): _mention_type,
    ("collections", "defaultdict"): _default_dict,
    ("omegaconf.dictconfig", "DictConfig"): ConfigRecord,
    ("omegaconf.listconfig", "ListConfig"): ListConfigRecord,
    ("omegaconf.nodes", "AnyNode"): ValueRecord,
    ("omegaconf.base", "ContainerMetadata"): MetadataRecord,
    ("omegaconf.base", "Metadata"): MetadataRecord,
}

_MOST_TEXT = 2**20  # bytes of a configuration with its references resolved; published ones have 10⁴
_ENTRY = 256  # bytes of an entry, besides its text
_DEPTH = 32  # of sections in sections, and of references to references
_REFERENCE = re.compile(r"\$\{([\w.\[\]]+)\}")  # to another entry, such as ${task.obs_dim}


def plain_configuration(record: ConfigRecord) -> DictConfig:
    """A configuration with the content of a pickled one, references resolved: nothing in it calls anything when read.

    Other interpolations call something: once an ``eval`` resolver is registered, reading one runs code.

    Raises:
        UnsafePickleError: names the entry that is no plain data, calls something, or refers to nothing.
    """
    content = _content(record, (), Budget(_MOST_TEXT))
    if not isinstance(content, dict):
        raise UnsafePickleError(f"cfg is no mapping but {shorten(repr(content))}")
    return DictConfig(_resolve(content, content, (), 0, Budget(_MOST_TEXT)))


def _content(node: Any, keys: Keys, budget: Budget) -> Any:
    """The dicts, lists and values that a record stands for."""
    budget.spend(_ENTRY)
    if len(keys) > _DEPTH:
        raise UnsafePickleError(f"{_name(keys)} lies more than {_DEPTH} levels deep")
    if isinstance(node, ValueRecord):
        return _value(node.state["_val"], keys, budget)
    if isinstance(node, (ConfigRecord, ListConfigRecord)):
        inside = node.state["_content"]
        if isinstance(node, ConfigRecord) and type(inside) is dict:
            return {key: _content(child, (*keys, key), budget) for key, child in inside.items()}
        if isinstance(node, ListConfigRecord) and type(inside) is list:
            return [_content(child, (*keys, index), budget) for index, child in enumerate(inside)]
        return _value(inside, keys, budget)  # None, or a reference to a whole section
    raise UnsafePickleError(f"{_name(keys)} is a {type(node).__name__}, expected an entry of a configuration")


def _value(value: Any, keys: Keys, budget: Budget) -> Any:
    if type(value) not in (str, bytes, int, float, bool, type(None)):
        raise UnsafePickleError(f"{_name(keys)} is a {type(value).__name__}, expected plain data")
    if isinstance(value, str) and ("${" in _REFERENCE.sub("", value) or "\\${" in value):
        raise UnsafePickleError(
            f"{_name(keys)} holds an interpolation that calls something, {shorten(repr(value))}. Save checkpoints with "
            "a resolved configuration (OmegaConf.resolve), as Diffusion Policy's train.py does"
        )
    budget.spend(len(value) if isinstance(value, (str, bytes)) else 0)
    return value


def _resolve(root: Any, node: Any, keys: Keys, depth: int, budget: Budget) -> Any:
    """A copy of `node`, which lies at `keys`, with the values that its references refer to."""
    budget.spend(_ENTRY + (len(node) if isinstance(node, str) else 0))
    if depth > 2 * _DEPTH:
        raise UnsafePickleError(f"{_name(keys)} refers to itself, or through too many others")
    if isinstance(node, dict):
        return {key: _resolve(root, child, (*keys, key), depth + 1, budget) for key, child in node.items()}
    if isinstance(node, list):
        return [_resolve(root, child, (*keys, index), depth + 1, budget) for index, child in enumerate(node)]
    if not isinstance(node, str) or "${" not in node:
        return node

    def referred(match: re.Match[str]) -> Any:
        target = _target(match[1], keys)
        return _resolve(root, _find(root, target, keys), target, depth + 1, budget)

    whole = _REFERENCE.fullmatch(node)
    if whole:
        return referred(whole)
    text = _REFERENCE.sub(lambda match: str(referred(match)), node)
    if "${" in text:  # put together from parts
        raise UnsafePickleError(f"{_name(keys)} resolves to an interpolation, {shorten(repr(text))}")
    return text


def _target(reference: str, keys: Keys) -> Keys:
    """Where a reference leads: ``${.a}`` is an entry beside the one at `keys`, ``${..a}`` beside its section."""
    dots = len(reference) - len(reference.lstrip("."))
    return (*(keys[:-dots] if dots else ()), *re.findall(r"[^.\[\]]+", reference))


def _find(root: Any, target: Keys, keys: Keys) -> Any:
    node = root
    try:
        for key in target:
            node = node[int(key) if isinstance(node, list) else key]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UnsafePickleError(f"{_name(keys)} refers to {_name(target)}, which is not there") from error
    return node


def _name(keys: Keys) -> str:
    return shorten(".".join(map(str, ("cfg", *keys))))


# -- from plain data to a policy that may be built -------------------------------------------------------------------

# What may be asked for, from and to. Published policies have up to 12 layers of width 768, a horizon of 64, a hundred
# numbers in an observation and 1000 training timesteps.
_SIZES = {
    "n_layer": (1, 256),
    "n_cond_layers": (0, 256),
    "n_head": (1, 256),
    "n_emb": (1, 2**14),
    "horizon": (1, 2**10),
    "n_obs_steps": (1, 2**10),
    "n_action_steps": (1, 2**10),
    "obs_dim": (1, 2**12),
    "action_dim": (1, 2**12),
    "input_dim": (1, 2**12),
    "output_dim": (1, 2**12),
    "cond_dim": (0, 2**12),
    "num_train_timesteps": (1, 10_000),
    "num_inference_steps": (1, 10_000),
}
_OPTIONAL = ("n_obs_steps", "num_inference_steps")  # null: as many as the horizon, as in training
_MOST_ELSEWHERE = 2**12  # of a whole number of another name
_MOST_IN_A_SECTION = 64  # settings, observations
_MOST_CAMERAS = 8  # each has a ResNet of its own; published policies have up to 4
_MOST_PIXELS = 2**23  # of a camera, in all colours
_MOST_NUMBERS = 2**12  # of another observation, or an action


def require_known_policy(settings: Mapping[str, Any]) -> None:
    """Makes sure that the settings of a policy, ``cfg.policy``, ask for known classes, in sizes like published ones.

    Raises:
        ValueError: names the entry that does not.
    """
    parts = {("policy", part): classes for part, classes in _parts(settings).items()}
    known = {("policy",): tuple(diffusion_policy.POLICIES)} | parts
    for keys, value in _entries(settings, ("policy",)):
        name = str(keys[-1])
        if name == "_target_" and value not in known.get(keys[:-1], ()):
            raise ValueError(
                f"{_name(keys)} asks to call {shorten(repr(value))}, which is no part of a transformer policy"
            )
        if name.startswith("_") and name != "_target_":
            raise ValueError(f"{_name(keys)} would change how the policy is built")
        if isinstance(value, dict):
            _require_small_section(keys, value)
        _require_size(name, keys, value)


def _parts(settings: Mapping[str, Any]) -> Mapping[str, tuple[str, ...]]:
    """The parts of a known policy, with the classes that they may have."""
    policies = diffusion_policy.POLICIES.items()
    return next((parts for policy, parts in policies if policy == settings["_target_"]), {})


def _require_small_section(keys: Keys, section: Mapping[Any, Any]) -> None:
    cameras = sum(isinstance(entry, dict) and entry.get("type") == "rgb" for entry in section.values())
    if len(section) > _MOST_IN_A_SECTION or cameras > _MOST_CAMERAS:
        raise ValueError(
            f"{_name(keys)} has {len(section)} entries, {cameras} of them cameras, expected up to "
            f"{_MOST_IN_A_SECTION} and {_MOST_CAMERAS}"
        )
    shape, most = section.get("shape", []), _MOST_PIXELS if section.get("type") == "rgb" else _MOST_NUMBERS
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape) or math.prod(shape) > most:
        raise ValueError(f"{_name(keys)}.shape is {shorten(shape)}, expected up to {most} numbers in all")


def _require_size(name: str, keys: Keys, value: Any) -> None:
    if name in _SIZES and not (value is None and name in _OPTIONAL):
        least, most = _SIZES[name]
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{_name(keys)} is {shorten(repr(value))}, expected a whole number in {least}..{most}")
    elif type(value) is int and abs(value) > _MOST_ELSEWHERE:
        raise ValueError(f"{_name(keys)} is {shorten(repr(value))}, expected up to {_MOST_ELSEWHERE}")


def _entries(node: Any, keys: Keys) -> Iterator[tuple[Keys, Any]]:
    """Everything in nested dicts and lists, with the way to it."""
    yield keys, node
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield from _entries(child, (*keys, key))


def least_weights(settings: Mapping[str, Any]) -> int:
    """How many weights a known policy of such settings has at least: its layers' attention and feed-forward."""
    model = settings.get("model") if "model" in _parts(settings) else settings
    if not isinstance(model, dict):
        return 0
    layers = model.get("n_layer", 8) + (model.get("n_cond_layers", 0) if model.get("time_as_cond", True) else 0)
    return 12 * layers * model.get("n_emb", 256) ** 2  # the classes' own defaults are these or larger
