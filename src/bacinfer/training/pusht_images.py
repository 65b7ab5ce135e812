"""Push-T demonstrations as pictures: gym-pusht draws the recorded states, once."""

from __future__ import annotations

import hashlib
import io
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from tqdm import tqdm

from bacinfer.tasks.pusht import IMAGE_SIZE, draw_state, make_env
from bacinfer.training.dataset import read_episodes

FRAME = (3, IMAGE_SIZE, IMAGE_SIZE)
"""Colours, height and width of a frame."""


@dataclass(frozen=True)
class ImageDemonstrations:
    """Recorded episodes, one after the other.

    Attributes:
        image: [steps, *FRAME], uint8.
        agent_pos: [steps, 2], the pusher's x and y, pixels.
        action: [steps, 2], pixels.
        episode_ends: one past the last step of each episode, ascending.
        n_obs_steps: a policy sees the first steps of each window, so many.
        noise_draws: so often are a window's actions denoised each time that its pictures are encoded.
    """

    image: torch.Tensor
    agent_pos: torch.Tensor
    action: torch.Tensor
    episode_ends: tuple[int, ...]
    n_obs_steps: int
    noise_draws: int = 1

    @property
    def fields(self) -> dict[str, torch.Tensor]:
        """What a policy's normaliser maps to [-1, 1]."""
        return {"image": self.image, "agent_pos": self.agent_pos, "action": self.action}

    def to(self, device: str | torch.device) -> ImageDemonstrations:
        image, agent_pos, action = (values.to(device) for values in self.fields.values())
        return replace(self, image=image, agent_pos=agent_pos, action=action)

    def batch(self, windows: torch.Tensor) -> dict[str, Any]:
        """The steps at ``windows`` [B, horizon]: ``action`` [B * noise_draws, horizon, 2], and ``obs``, of the first
        steps: ``image`` [B, n_obs_steps, *FRAME], 0 to 1, and ``agent_pos`` [B, n_obs_steps, 2]."""
        seen = windows[:, : self.n_obs_steps]
        obs = {"image": self.image[seen].float() / 255, "agent_pos": self.agent_pos[seen]}
        return {"obs": obs, "action": self.action[windows].repeat_interleave(self.noise_draws, dim=0)}


def read_pusht_images(path: str | Path, frames_dir: str | Path, **settings: int) -> ImageDemonstrations:
    """Read Push-T demonstrations from an ``.npz`` file or from Diffusion Policy's ``.zarr`` folder, with their frames.

    The frames are drawn if `frames_dir` does not have them; drawing that was interrupted goes on where it was.

    Args:
        **settings: ``n_obs_steps`` and ``noise_draws``, see `ImageDemonstrations`.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: arrays are missing or do not belong together.
        RuntimeError: frames are to be drawn and gym-pusht is not installed; the zarr package is needed and is not.
    """
    arrays, episode_ends = read_episodes(path, ("state", "action"))
    state, action = arrays["state"].astype(np.float32), arrays["action"].astype(np.float32)
    return ImageDemonstrations(
        read_frames(state, Path(frames_dir)),
        torch.from_numpy(state[:, :2].copy()),
        torch.from_numpy(action),
        episode_ends,
        **settings,
    )


def read_frames(states: NDArray[np.floating], directory: Path) -> torch.Tensor:
    """The frames [steps, *FRAME] of states, uint8, from a file in `directory` that is drawn if it is not there.

    Raises:
        RuntimeError: they are to be drawn and gym-pusht is not installed.
    """
    path = directory / f"pusht_{hashlib.sha256(states.tobytes()).hexdigest()[:16]}.npy"
    if not path.exists():
        draw_frames(states, path)
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def draw_frames(states: NDArray[np.floating], path: Path) -> None:
    """Write the frame of each state [steps, 5] (pusher x, y, block x, y, block angle) to an ``.npy`` file.

    They are collected in a file beside it, which takes its name once it has all of them. Running it again completes it.
    """
    header = io.BytesIO()
    shape = (len(states), *FRAME)
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    start, frame_size = header.tell(), math.prod(FRAME)

    env = make_env()
    env.reset()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with FileLock(f"{path}.lock"):
        if path.exists():  # another process was faster
            return
        with part.open("ab") as file:
            if file.tell() < start:
                file.truncate(0)
                file.write(header.getvalue())
            drawn = (file.tell() - start) // frame_size
            file.truncate(start + drawn * frame_size)
            for state in tqdm(states[drawn:], desc="frames", initial=drawn, total=len(states), unit="frame"):
                file.write(draw_state(env, state).transpose(2, 0, 1).tobytes())
        os.replace(part, path)
