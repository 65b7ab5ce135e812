"""Teaches an image policy of Push-T to see, and lets it act as a policy of states: where its training starts.

    python scripts/teach_pusht_vision.py --data data/pusht/pusht_cchi_v7_replay.zarr --out outputs/seeing.ckpt

From actions alone an encoder learns slowly what is in a picture. Here it is told: a linear map of its features has to
give what the policy of states observes, in pictures of the demonstrations and of other scenes. That map then stands
before the weights with which the policy of states took its observations. KEY=VALUE changes entries of
training/config/train.yaml, as for `bacinfer train`.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from bacinfer.commands.options import add_debug_argument, run_command
from bacinfer.policies import Checkpoint, load_policy, read_checkpoint, write_checkpoint
from bacinfer.policies.checkpoint import create_policy
from bacinfer.policies.device import check_device
from bacinfer.policies.reference import LinearNormalizer
from bacinfer.tasks.pusht import KEYPOINTS, observation
from bacinfer.training.configuration import read_config
from bacinfer.training.dataset import read_episodes
from bacinfer.training.log import TrainingLog
from bacinfer.training.precision import autocast
from bacinfer.training.pusht_images import read_frames
from bacinfer.training.weights import export_checkpoint, read_initial_weights

SETTINGS = (
    "task=pusht_image",
    "horizon=16",  # as the policy of states
    "policy.crop_shape=null",  # what is at the border is seen, and where it is on the board
    "optimizer.learning_rate=1e-3",
    "dataloader.batch_size=1024",
)
BOARD = (5, 507)  # where positions can be, pixels
SHIFT, TURN = 100, math.pi  # by which scenes are moved, at most: pixels, radians
ELSEWHERE = 0.3  # of the moved scenes have the pusher anywhere
HELD_OUT = 50  # of so many moved scenes one is tested
WARMUP = 0.05  # of the time
EXACT = 0.02  # errors below it count by their square, normalised: about 5 pixels


def moved(states: NDArray[np.floating], count: int) -> NDArray[np.float32]:
    """`count` scenes [count, 5] (pusher x, y, block x, y, block angle) that are `states` [steps, 5] moved as a whole.

    Most are moved by little. What has been in touch stays in touch, unless the pusher is put anywhere on the board.
    Equal arguments give equal scenes, of which the frames are drawn once.
    """
    random = np.random.default_rng(0)
    kept: list[NDArray[np.floating]] = []
    while sum(map(len, kept)) < count:
        scenes = states[random.integers(len(states), size=count)].astype(np.float64)
        amount = random.random((count, 1)) ** 2
        shift = amount * random.uniform(-SHIFT, SHIFT, (count, 2))
        turn = amount[:, 0] * random.uniform(-TURN, TURN, count)
        cos, sin = np.cos(turn), np.sin(turn)
        x, y = (scenes[:, :2] - scenes[:, 2:4]).T
        scenes[:, 2:4] += shift
        scenes[:, :2] = scenes[:, 2:4] + np.stack([cos * x - sin * y, sin * x + cos * y], axis=1)
        scenes[:, 4] += turn
        elsewhere = random.random(count) < ELSEWHERE
        scenes[elsewhere, :2] = random.uniform(*BOARD, (count, 2))[elsewhere]
        points = observation(scenes)
        kept.append(scenes[(points > BOARD[0]).all(1) & (points < BOARD[1]).all(1)])
    return np.concatenate(kept)[:count].astype(np.float32)


class Seeing(nn.Module):
    """An image policy's encoder, and a linear map from its features to keypoints, as a policy of states has them."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.encoder, self.normalizer = policy.obs_encoder, policy.normalizer
        self.keypoints = nn.Linear(self.encoder.output_dim, KEYPOINTS.size)

    def forward(self, frames: Tensor, position: Tensor) -> Tensor:
        """Keypoints [B, 18] from frames [B, C, H, W], uint8, and the pusher's position [B, 2], pixels."""
        obs = self.normalizer.normalize({"image": frames.float() / 255, "agent_pos": position})
        features = self.encoder(obs)
        with torch.autocast(features.device.type, enabled=False):
            return self.keypoints(features.float())

    def connect(self, policy: Any, way_in: nn.Linear) -> None:
        """Let the image policy take what it sees as a policy of states takes, by `way_in`, what it observes."""
        weight, bias = self.keypoints.weight.data.cpu(), self.keypoints.bias.data.cpu()
        position = F.pad(torch.eye(2), (weight.shape[1] - 2, 0))  # the last two features, as they are
        weight, bias = torch.cat([weight, position]), F.pad(bias, (0, 2))
        policy.model.cond_obs_emb.weight.data.copy_(way_in.weight.data @ weight)
        policy.model.cond_obs_emb.bias.data.copy_(way_in.weight.data @ bias + way_in.bias.data)

    def resume(self, policy: Any, way_in: nn.Linear) -> None:
        """The map that `connect` left in an image policy; its encoder is here as it is."""
        back, taken = torch.linalg.pinv(way_in.weight.data), policy.model.cond_obs_emb
        self.keypoints.weight.data.copy_((back @ taken.weight.data)[: KEYPOINTS.size])
        self.keypoints.bias.data.copy_((back @ (taken.bias.data - way_in.bias.data))[: KEYPOINTS.size])


def make_policy(cfg: DictConfig, state_policy: Any) -> Any:
    """The image policy of a configuration, with everything of a policy of states but its way in."""
    policy = create_policy(Checkpoint(Path("the configuration"), cfg, {}))
    weights = state_policy.model.state_dict()
    own = policy.model.state_dict()
    policy.model.load_state_dict(weights | {name: own[name] for name in own if name.startswith("cond_obs_emb.")})
    ranges = {}
    for name in ("obs", "action"):
        field = state_policy.normalizer[name]
        ranges[name] = (field.unnormalize(torch.tensor(-1.0)), field.unnormalize(torch.tensor(1.0)))
    position = (ranges["obs"][0][-2:], ranges["obs"][1][-2:])
    normalizer = LinearNormalizer.from_ranges({"agent_pos": position, "action": ranges["action"]})
    normalizer.add_image("image")
    policy.set_normalizer(normalizer)
    return policy


@dataclass(frozen=True)
class Scenes:
    """Frames [n, C, H, W], uint8, the pusher's positions [n, 2], pixels, and keypoints [n, 18], normalised."""

    frames: Tensor
    position: Tensor
    keypoints: Tensor

    def __getitem__(self, index: Tensor | slice) -> Scenes:
        return Scenes(self.frames[index], self.position[index], self.keypoints[index])

    def __len__(self) -> int:
        return len(self.frames)


def read_scenes(cfg: DictConfig, data: Path, count: int, state_policy: Any, device: torch.device) -> Scenes:
    """The demonstrations' scenes and `count` moved ones, in this order."""
    demonstrated = read_episodes(data, ("state",))[0]["state"].astype(np.float32)
    parts = [demonstrated, moved(demonstrated, count)]
    frames = [read_frames(states, Path(cfg.training.frames_dir)).to(device) for states in parts]
    observations = torch.from_numpy(observation(np.concatenate(parts))).float()
    normalised = state_policy.normalizer["obs"].normalize(observations)
    return Scenes(torch.cat(frames), observations[:, -2:].to(device), normalised[:, :-2].to(device))


def teach(seeing: Seeing, scenes: Scenes, cfg: DictConfig, seconds: float, log: TrainingLog, step: int = 0) -> int:
    """Steps for a given time, in which the learning rate rises and falls; the last one's number, from `step` on."""
    settings, device = cfg.optimizer, scenes.frames.device
    optimizer = torch.optim.AdamW(
        seeing.parameters(), settings.learning_rate, settings.betas, weight_decay=settings.obs_encoder_weight_decay
    )
    losses, started = list[Tensor](), time.monotonic()
    with tqdm(unit=" frames", unit_scale=True, mininterval=1) as bar:
        while (passed := (time.monotonic() - started) / seconds) < 1:
            rate = min(passed / WARMUP, (1 + math.cos(math.pi * passed)) / 2)
            optimizer.param_groups[0]["lr"] = settings.learning_rate * rate
            batch = scenes[torch.randint(len(scenes), (cfg.dataloader.batch_size,), device=device)]
            with autocast(device, cfg.training.precision):
                seen = seeing(batch.frames, batch.position)
            loss = F.smooth_l1_loss(seen, batch.keypoints, beta=EXACT)
            loss.backward()
            nn.utils.clip_grad_norm_(seeing.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            bar.update(len(batch))
            step += 1
            if len(losses) == cfg.training.log_every:
                mean = torch.stack(losses).mean().item()  # waits for the device
                log.add(global_step=step, lr=settings.learning_rate * rate, train_loss=mean)
                tqdm.write(f"{passed:4.0%}: loss {mean:.5f}")
                losses.clear()
    return step


@torch.no_grad()
def errors(seeing: Seeing, scenes: Scenes, scale: Tensor) -> Tensor:
    """How far off the keypoints are that are seen, [scenes, 9], pixels; `scale` [18]: of the normaliser."""
    parts = [scenes[start : start + 100] for start in range(0, len(scenes), 100)]
    off = torch.cat([seeing(part.frames, part.position) - part.keypoints for part in parts])
    return (off / scale.to(off)).unflatten(1, (-1, 2)).norm(dim=-1)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the demonstrations, .npz or Diffusion Policy's .zarr")
    parser.add_argument(
        "--out", type=Path, required=True, help="the image policy's checkpoint, .ckpt; beside it its log"
    )
    parser.add_argument("--state_policy", type=Path, default=Path("assets/pusht/pusht_transformer.ckpt"))
    parser.add_argument("--init_from", type=Path, metavar="CHECKPOINT", help="of an earlier teaching, to go on from")
    parser.add_argument("--scenes", type=int, default=100_000, help="beside the demonstrations' own")
    parser.add_argument("--seconds", type=float, default=90.0, help="of teaching")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="entries of training/config to change")
    add_debug_argument(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(run, build_parser(), argv)


def run(args: argparse.Namespace) -> int:
    if args.scenes < HELD_OUT:
        raise ValueError(f"--scenes {args.scenes}: expected at least {HELD_OUT}, of which one is tested")
    if args.seconds <= 0:
        raise ValueError(f"--seconds {args.seconds:g}: expected a time above 0")
    cfg = read_config([*SETTINGS, *args.overrides])
    device = check_device(cfg.training.device)
    torch.manual_seed(cfg.training.seed)

    state_policy = load_policy(args.state_policy)
    policy = make_policy(cfg, state_policy)
    seeing, step = Seeing(policy), 0
    if args.init_from:
        step = read_checkpoint(args.init_from).progress("global_step")
        policy.load_state_dict(read_initial_weights(args.init_from))
        seeing.resume(policy, state_policy.model.cond_obs_emb)
    scenes = read_scenes(cfg, args.data, args.scenes, state_policy, device)
    held_out = args.scenes // HELD_OUT
    seeing.to(device)
    if cfg.training.compile:
        seeing.encoder.compile()
    log = TrainingLog(args.out.with_suffix(".jsonl"))
    step = teach(seeing, scenes[:-held_out], cfg, args.seconds, log, step)
    log.plot(args.out.with_suffix(".png"))
    off = errors(seeing, scenes[-held_out:], state_policy.normalizer["obs"].scale[:-2])
    rms, median, worst = off.pow(2).mean().sqrt(), off.median(), off.max()
    print(f"keypoints of {held_out} other scenes: {rms:.2f} pixels off (RMS; median {median:.2f}, worst {worst:.0f})")

    policy.cpu()
    seeing.connect(policy, state_policy.model.cond_obs_emb)
    write_checkpoint(args.out, cfg, {"ema_model": policy.state_dict()}, {"global_step": step, "epoch": 0})
    export_checkpoint(args.out, args.out)  # small
    return 0


if __name__ == "__main__":
    sys.exit(main())
