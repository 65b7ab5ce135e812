"""LeRobot's checkpoints: the policy in one, observations for it from a data set, and writing one that holds a plan."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lerobot.configs.policies import PreTrainedConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.utils import INFO_PATH
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from safetensors import SafetensorError, safe_open

from bacinfer.core.apply import apply
from bacinfer.core.plan import Fingerprint, SamplingPlan
from bacinfer.files import atomic_write, read_json, write_json
from bacinfer.lerobot.installation import CONFIG, WEIGHTS
from bacinfer.lerobot.registry import SUFFIX, adapter_of, handle

if TYPE_CHECKING:
    from lerobot.policies.pretrained import PreTrainedPolicy

Preprocessor = Callable[[Mapping[str, Any]], dict[str, Any]]


def load_policy(checkpoint: Path, device: str = "cpu") -> PreTrainedPolicy:
    """The policy of a checkpoint's directory, ready to act.

    Raises:
        FileNotFoundError: the directory lacks a file.
        ValueError: a file is damaged or another release's, an encoder that it names is missing, there is no adapter for
            its type, it holds a plan already, or it adapts another checkpoint (PEFT).
    """
    for name in (CONFIG, WEIGHTS):
        if not (checkpoint / name).is_file():
            raise FileNotFoundError(
                f"{checkpoint} is no checkpoint of LeRobot's, it has no {name}; name the directory that has it "
                f"(outputs/train/…/checkpoints/last/pretrained_model)"
            )
    config = _read_config(checkpoint, device)
    policy_class = get_policy_class(config.type)
    try:
        adapter_of(policy_class)
        with safe_open(checkpoint / WEIGHTS, "pt"):  # pi0 only warns of damaged ones, and keeps random ones
            pass
    except (TypeError, SafetensorError) as error:
        raise ValueError(f"{checkpoint} cannot be run: {error}") from error
    try:
        return policy_class.from_pretrained(checkpoint, config=config)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"lerobot cannot make the policy of {checkpoint}: {error} (encoders that its {CONFIG} names are looked for "
            f"from the working directory on, then on the Hub)"
        ) from error


def _read_config(checkpoint: Path, device: str) -> PreTrainedConfig:
    from draccus.utils import DraccusException  # not before lerobot, whose absence has a sentence

    written = read_json(checkpoint / CONFIG)
    if isinstance(written, dict) and str(written.get("type")).endswith(SUFFIX):
        raise ValueError(f"{checkpoint} holds a plan already; name the checkpoint that it was exported from")
    try:
        config = PreTrainedConfig.from_pretrained(checkpoint, cli_overrides=[f"--device={device}"])
    except (ValueError, TypeError, DraccusException) as error:
        raise ValueError(f"lerobot {version('lerobot')} cannot read {checkpoint / CONFIG}: {error}") from error
    if config.use_peft:
        raise ValueError(f"{checkpoint} holds an adapter of another checkpoint (PEFT); merge the two first")
    return config


def load_preprocessor(checkpoint: Path, policy: PreTrainedPolicy) -> Preprocessor:
    """From a frame of a data set to a batch of one on the policy's device, as the checkpoint says."""
    return load_processors(checkpoint, policy)[0]


def load_processors(checkpoint: Path, policy: PreTrainedPolicy) -> tuple[Preprocessor, Any]:
    """What a policy's observations go through, and what its actions do, as the checkpoint says."""
    overrides = {"device_processor": {"device": policy.config.device}}
    return make_pre_post_processors(policy.config, pretrained_path=str(checkpoint), preprocessor_overrides=overrides)


class Episodes:
    """The episodes of a data set, as the observations of a `Task`.

    Args:
        dataset: The directory of a LeRobot data set, or its name on the Hub.
        preprocessor: What the policy's observations go through.
        chunk: How many steps lie between two calls of the policy.

    Raises:
        FileNotFoundError: there is no such data set.
    """

    def __init__(self, dataset: str, preprocessor: Preprocessor, chunk: int) -> None:
        self.dataset = _read_dataset(dataset)
        self.preprocessor = preprocessor
        self.chunk = chunk

    def observations(self, policy: Any, demo_idx: int, num_observations: int) -> Iterator[dict[str, Any]]:
        """What the policy observes at its first calls of an episode.

        Raises:
            ValueError: there is no such episode.
        """
        if demo_idx >= self.dataset.num_episodes:
            raise ValueError(f"there is no episode {demo_idx}: the data set has {self.dataset.num_episodes}, from 0 on")
        episode = self.dataset.meta.episodes[demo_idx]
        frames = range(episode["dataset_from_index"], episode["dataset_to_index"], self.chunk)
        for index in frames[:num_observations]:
            frame = self.dataset[index]
            yield self.preprocessor({k: v for k, v in frame.items() if k == "task" or k.startswith("observation.")})


def _read_dataset(dataset: str) -> LeRobotDataset:
    root = Path(dataset)
    if (root / INFO_PATH).is_file():
        return LeRobotDataset(root.name, root=root)
    if root.is_dir():
        raise FileNotFoundError(f"{root} is no data set of LeRobot's, it has no {INFO_PATH}")
    try:
        return LeRobotDataset(dataset)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"there is no directory {dataset}, and no such data set on the Hub: {error}") from error


def export(checkpoint: Path, policy: PreTrainedPolicy, plan: SamplingPlan, out: Path) -> None:
    """Writes a copy of a checkpoint that holds a plan, by which LeRobot's own commands run it.

    LeRobot needs the plugin ``lerobot_policy_bacinfer`` to load it.

    Args:
        checkpoint: The directory that `policy` was loaded from.
        policy: Its policy, to which the plan is applied.
        plan: The plan.
        out: The new directory.

    Raises:
        TypeError, ValueError: as `bacinfer.lerobot.apply`.
        FileExistsError: `out` is there already.
    """
    if out.exists():
        raise FileExistsError(f"{out} is there already; name a new directory")
    apply(handle(policy), plan)
    if plan.made_for is None:
        plan = replace(plan, made_for=Fingerprint.of(handle(policy)))
    config = read_json(checkpoint / CONFIG)
    with atomic_write(out) as temporary:
        shutil.copytree(checkpoint, temporary)
        write_json(temporary / CONFIG, {**config, "type": config["type"] + SUFFIX, "bac_plan": plan.to_json()})
