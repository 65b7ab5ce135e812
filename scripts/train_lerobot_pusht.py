"""Trains LeRobot's multi_task_dit on Push-T's demonstrations, as states, and writes it as LeRobot's checkpoint.

    python scripts/train_lerobot_pusht.py --data data/pusht/pusht_cchi_v7_replay.zarr --out assets/pusht_lerobot

Needs lerobot (see docs/how-to/lerobot.md). Policy, loss and processors are LeRobot's own. Nothing is downloaded: the
policy's text encoder is a tiny one with random weights, which LeRobot never trains. The checkpoint names it by the path
``OUT/clip``, as given: LeRobot loads it from the same working directory. The same command goes on where it was killed.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.optimization import get_scheduler
from gym_pusht.envs import PushTEnv
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.multi_task_dit import MultiTaskDiTConfig, MultiTaskDiTPolicy
from lerobot.utils.constants import (
    ACTION,
    OBS_ENV_STATE,
    OBS_LANGUAGE_ATTENTION_MASK,
    OBS_LANGUAGE_TOKENS,
    OBS_STATE,
)
from numpy.typing import NDArray
from pymunk import Space
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from bacinfer.commands.options import add_debug_argument, run_command
from bacinfer.files import atomic_write
from bacinfer.lerobot.state_processor import AppendEnvironmentState
from bacinfer.training.averaged_weights import make_ema
from bacinfer.training.dataset import read_episodes, sequence_windows
from bacinfer.training.precision import autocast

HORIZON, ACTIONS, OBSERVATIONS = 16, 8, 2
BATCH = 64
LEARNING_RATE, WARMUP_STEPS = 1e-3, 500
SAVE_EVERY_S = 180
CPU = torch.device("cpu")


def corners(poses: NDArray[np.floating]) -> NDArray[np.float32]:
    """gym-pusht's ``environment_state`` [steps, 16] at poses of the block [steps, 3], in pixels and radians."""
    _, shapes = PushTEnv.add_tee(Space(), (0, 0), 0)
    cos, sin = np.cos(poses[:, 2]), np.sin(poses[:, 2])
    turned = np.array([[cos, -sin], [sin, cos]])
    moved = np.einsum("ijs,kj->ski", turned, PushTEnv.get_keypoints(shapes)) + poses[:, None, :2]
    return moved.reshape(len(poses), -1).astype(np.float32)


def read(path: Path) -> tuple[dict[str, Tensor], Tensor]:
    """What LeRobot's Push-T would have shown at all steps of the demonstrations, and the windows of steps."""
    arrays, episode_ends = read_episodes(path, ("state", "action"))
    state = arrays["state"]
    frames = {OBS_STATE: state[:, :2], OBS_ENV_STATE: corners(state[:, 2:]), ACTION: arrays["action"]}
    windows = sequence_windows(episode_ends, HORIZON, OBSERVATIONS - 1, ACTIONS - 1)
    return {name: torch.from_numpy(array.astype(np.float32)) for name, array in frames.items()}, windows


def write_text_encoder(path: Path) -> None:
    """A tiny CLIP text encoder with a tokenizer of letters."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPTextModel(CLIPTextConfig(vocab_size=len(words), **sizes, **ends)).save_pretrained(path)
    CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[]).save_pretrained(path)


def make_policy(clip: Path, objective: str) -> MultiTaskDiTPolicy:
    config = MultiTaskDiTConfig(
        device="cpu",
        push_to_hub=False,
        input_features={OBS_STATE: PolicyFeature(FeatureType.STATE, (18,))},
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (2,))},
        normalization_mapping={"STATE": NormalizationMode.MEAN_STD, "ACTION": NormalizationMode.MIN_MAX},
        objective=objective,
        n_obs_steps=OBSERVATIONS,
        horizon=HORIZON,
        n_action_steps=ACTIONS,
        hidden_dim=128,
        num_layers=6,
        num_heads=4,
        dropout=0.0,
        use_positional_encoding=True,
        timestep_embed_dim=64,
        text_encoder_name=str(clip),
        tokenizer_max_length=16,
    )
    return MultiTaskDiTPolicy(config)


def make_processors(config: MultiTaskDiTConfig, frames: dict[str, Tensor]) -> tuple[Any, Any]:
    # The blocks' modulation begins with a SiLU, which flattens what is negative: positions become 0 to 4.
    statistics = {
        OBS_STATE: {"mean": torch.zeros(18), "std": torch.full((18,), 128.0)},
        ACTION: {"min": frames[ACTION].amin(0), "max": frames[ACTION].amax(0)},
    }
    preprocessor, postprocessor = make_pre_post_processors(config, dataset_stats=statistics)
    preprocessor.steps = [AppendEnvironmentState(), *preprocessor.steps]
    return preprocessor, postprocessor


class Training:
    """The policy, its average, and what a run needs to go on."""

    def __init__(self, policy: MultiTaskDiTPolicy, total_steps: int, state: Path) -> None:
        self.policy, self.state_path, self.step = policy.train(), state, 0
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, LEARNING_RATE, betas=(0.9, 0.95), weight_decay=1e-3, fused=True
        )
        self.schedule = get_scheduler(
            "cosine", self.optimizer, num_warmup_steps=WARMUP_STEPS, num_training_steps=total_steps
        )
        self.ema = make_ema(
            self.parameters, update_after_step=0, inv_gamma=1.0, power=0.75, min_value=0.0, max_value=0.9995
        )
        if state.exists():
            saved = torch.load(state)
            self.step = saved.pop("step")
            for name, value in saved.items():
                getattr(self, name).load_state_dict(value)
            torch.manual_seed(self.step)

    def take_step(self, batch: dict[str, Tensor]) -> float:
        with autocast(CPU, "bf16"):
            loss, _ = self.policy(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.ema.step(self.parameters)
        self.step += 1
        return loss.item()

    def save(self, out: Path) -> None:
        """The state of the run, and the averaged policy, in half precision, as a checkpoint."""
        state = {name: getattr(self, name).state_dict() for name in ("policy", "optimizer", "schedule", "ema")}
        with atomic_write(self.state_path) as temporary:
            torch.save({"step": self.step, **state}, temporary)
        policy = copy.deepcopy(self.policy)
        self.ema.copy_to(p for p in policy.parameters() if p.requires_grad)
        policy.half().save_pretrained(out)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the demonstrations, .npz or Diffusion Policy's .zarr")
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--state", type=Path, default=Path("outputs/train_lerobot_pusht.pt"), help="the run's state")
    parser.add_argument("--steps", type=int, default=34_000)
    parser.add_argument(
        "--objective",
        choices=["diffusion", "flow_matching"],
        default="diffusion",
        help="what is learned: to denoise by DDPM's steps, or a flow for Euler's method (default: %(default)s)",
    )
    parser.add_argument("--compile", action="store_true", help="a minute at the start, faster steps after it")
    add_debug_argument(parser)
    return parser


def main() -> int:
    return run_command(run, build_parser(), None)


def run(args: argparse.Namespace) -> int:
    torch.manual_seed(0)
    frames, windows = read(args.data)
    if not (args.out / "clip").exists():
        write_text_encoder(args.out / "clip")
    policy = make_policy(args.out / "clip", args.objective)
    processors = make_processors(policy.config, frames)
    for processor in processors:
        processor.save_pretrained(args.out)
    seen = processors[0]({**frames, "task": ""})
    words = {name: seen[name].expand(BATCH, -1) for name in (OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK)}

    training = Training(policy, args.steps, args.state)
    if args.compile:
        policy.noise_predictor.compile()
    losses, saved = list[float](), time.monotonic()
    with tqdm(total=args.steps, initial=training.step, mininterval=10) as bar:
        while training.step < args.steps:
            steps = windows[torch.randint(len(windows), (BATCH,))]
            batch = {OBS_STATE: seen[OBS_STATE][steps[:, :OBSERVATIONS]], ACTION: seen[ACTION][steps], **words}
            losses.append(training.take_step(batch))
            bar.update()
            if training.step % 500 == 0:
                tqdm.write(f"step {training.step}: loss {np.mean(losses):.4f}")
                losses.clear()
            if time.monotonic() - saved > SAVE_EVERY_S or training.step == args.steps:
                training.save(args.out)
                saved = time.monotonic()
    return 0


if __name__ == "__main__":
    sys.exit(main())
