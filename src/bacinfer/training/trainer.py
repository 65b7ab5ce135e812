"""Trains a transformer policy on demonstrations; a run can be interrupted and resumed."""

from __future__ import annotations

import copy
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from omegaconf import DictConfig
from tqdm import tqdm

from bacinfer.policies import Checkpoint, read_checkpoint, write_checkpoint
from bacinfer.policies.checkpoint import create_policy
from bacinfer.policies.device import check_device
from bacinfer.tasks import make_task
from bacinfer.training.averaged_weights import make_ema
from bacinfer.training.dataset import TrainingData, sequence_windows
from bacinfer.training.log import TrainingLog
from bacinfer.training.normalization import fit_normalizer
from bacinfer.training.precision import PRECISIONS, autocast, matmul_precision
from bacinfer.training.weights import read_initial_weights


class Trainer:
    """A training run: what is trained, how far it is, and the folder that it writes to.

    ``{output_dir}/checkpoints/latest.ckpt`` holds everything that a run needs to go on, random state included:
    an interrupted and resumed run takes the same steps as an uninterrupted one on the same machine, and its log has the
    same entries, but for their samples per second.
    """

    def __init__(
        self, cfg: DictConfig, demonstrations: TrainingData, output_dir: Path, init_from: Path | None = None
    ) -> None:
        self.cfg = cfg
        self.output_dir = output_dir
        self.device = check_device(cfg.training.device)
        if cfg.training.precision not in PRECISIONS:
            raise ValueError(f"training.precision is {cfg.training.precision!r}; known: {', '.join(PRECISIONS)}")
        for name in ("log_every", "checkpoint_every"):
            if cfg.training[name] < 1:
                raise ValueError(f"training.{name}={cfg.training[name]}: expected at least 1")
        if not cfg.training.use_ema:
            raise ValueError("training.use_ema=false: this training always averages the weights; leave it true")
        self.demonstrations = demonstrations.to(self.device)
        dataset = cfg.task.dataset
        self.windows = sequence_windows(
            demonstrations.episode_ends, dataset.horizon, dataset.pad_before, dataset.pad_after
        ).to(self.device)
        if len(self.windows) == 0:
            raise ValueError(f"no demonstration is long enough for a window of {dataset.horizon} steps")
        self.batch_size = min(cfg.dataloader.batch_size, len(self.windows))
        self.steps_per_epoch = len(self.windows) // self.batch_size
        self.total_steps = self.steps_per_epoch * cfg.training.num_epochs
        self.global_step = 0
        self._order: torch.Tensor | None = None  # of the windows, in this epoch
        self._losses: list[torch.Tensor] = []  # of the steps since the last entry of the log

        latest = read_checkpoint(self.latest_path) if cfg.training.resume and self.latest_path.exists() else None
        torch.manual_seed(cfg.training.seed)
        self.policy = create_policy(Checkpoint(self.latest_path, cfg, {}))
        if latest is not None:
            self.policy.load_state_dict(latest.state_dicts["model"])
        elif init_from is not None:
            self.policy.load_state_dict(read_initial_weights(init_from))
        else:
            self.policy.set_normalizer(
                fit_normalizer(demonstrations, cfg.training.normalize_obs, cfg.training.obs_gain)
            )
        self.policy.to(self.device).train()
        self._ema_policy = copy.deepcopy(self.policy).eval().requires_grad_(False)
        if latest is not None:
            self._ema_policy.load_state_dict(latest.state_dicts["ema_model"])
        self.ema = make_ema(self._ema_policy.parameters(), **_arguments(cfg.ema))
        self.optimizer = self.policy.get_optimizer(**cfg.optimizer)
        if latest is not None:
            self._resume(latest)
        self.lr_scheduler = get_scheduler(
            cfg.training.lr_scheduler,
            self.optimizer,
            num_warmup_steps=cfg.training.lr_warmup_steps,
            num_training_steps=self.total_steps,
            last_epoch=self.global_step - 1,
        )
        self.log = TrainingLog(output_dir / "logs.jsonl", resume_step=self.global_step)
        if cfg.training.compile:
            self.policy.model.compile()

    @property
    def latest_path(self) -> Path:
        return self.output_dir / "checkpoints" / "latest.ckpt"

    @property
    def epoch(self) -> int:
        return self.global_step // self.steps_per_epoch

    @property
    def ema_policy(self) -> Any:
        """The policy with the averaged weights of the steps so far; every access brings the same object up to date."""
        self.ema.copy_to(self._ema_policy.parameters())
        return self._ema_policy

    def run(self) -> bool:
        """Train to the end (returns True), or to an interrupt (SIGINT, SIGTERM); ``latest.ckpt`` is then up to date."""
        training = self.cfg.training
        with (
            _interrupts() as interrupted,
            matmul_precision("high" if training.precision == "tf32" else "highest"),
            tqdm(total=self.total_steps, initial=self.global_step, unit="step", mininterval=1) as bar,
        ):
            started, first_step = time.perf_counter(), self.global_step
            while self.global_step < self.total_steps and not interrupted():
                self.step()
                bar.update()
                if self.global_step % training.log_every == 0:
                    loss = torch.stack(self._losses).mean().item()
                    samples = (self.global_step - first_step) * self.batch_size
                    bar.set_postfix(loss=f"{loss:.4f}")
                    self._add_to_log(train_loss=loss, samples_per_second=samples / (time.perf_counter() - started))
                    self._losses.clear()
                    started, first_step = time.perf_counter(), self.global_step
                if self.global_step % self.steps_per_epoch == 0:
                    self._end_epoch()
        self.save(self.latest_path)
        return self.global_step >= self.total_steps

    def step(self) -> torch.Tensor:
        """One optimisation step on the next batch; returns its loss."""
        with autocast(self.device, self.cfg.training.precision):
            loss = self.policy.compute_loss(self.demonstrations.batch(self._next_windows()))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        self.ema.step(self.policy.parameters())
        self.global_step += 1
        self._losses.append(loss.detach())
        return self._losses[-1]

    def save(self, path: Path) -> None:
        """Write the run's state as a Diffusion Policy checkpoint."""
        states = {
            "model": self.policy.state_dict(),
            "ema_model": self.ema_policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        progress = {
            "global_step": self.global_step,
            "epoch": self.epoch,
            "rng_state": _rng_state(self.device),
            "unlogged_losses": [loss.item() for loss in self._losses],
        }
        write_checkpoint(path, self.cfg, states, progress)

    def _resume(self, latest: Checkpoint) -> None:
        self.optimizer.load_state_dict(latest.state_dicts["optimizer"])
        self.global_step = self.ema.optimization_step = latest.progress("global_step")
        _set_rng_state(self.device, latest.progress("rng_state"))
        self._losses = [torch.tensor(loss, device=self.device) for loss in latest.progress("unlogged_losses", [])]

    def _next_windows(self) -> torch.Tensor:
        # Shuffled anew each epoch, from the epoch's own seed: resuming within an epoch needs no more state.
        # What is left over at the end of an epoch is too small for a batch and is dropped.
        epoch, position = divmod(self.global_step, self.steps_per_epoch)
        if position == 0 or self._order is None:
            generator = torch.Generator().manual_seed(self.cfg.training.seed + epoch)
            self._order = torch.randperm(len(self.windows), generator=generator).to(self.device)
        return self.windows[self._order[position * self.batch_size : (position + 1) * self.batch_size]]

    def _end_epoch(self) -> None:
        training = self.cfg.training
        if training.rollout_every and self.epoch % training.rollout_every == 0:
            self._rollout()
        if self.epoch % training.checkpoint_every == 0:
            self.save(self.latest_path)
            self.log.plot(self.output_dir / "loss.png")

    def _rollout(self) -> None:
        """Score the EMA policy from training start seeds; keep it if it is among the best."""
        first = self.cfg.task.env_runner.train_start_seed
        seeds = range(first, first + self.cfg.training.rollout_episodes)
        score = make_task(self.cfg).rollout(self.ema_policy, seeds).mean_score
        self._add_to_log(train_mean_score=score)
        directory = self.latest_path.parent
        self.save(directory / f"epoch={self.epoch:04d}-train_mean_score={score:.3f}.ckpt")
        kept = sorted(directory.glob("epoch=*.ckpt"), key=lambda path: float(path.stem.rpartition("=")[2]))
        for path in kept[: max(0, len(kept) - self.cfg.training.keep_best)]:
            path.unlink()

    def _add_to_log(self, **entry: float) -> None:
        lr = self.lr_scheduler.get_last_lr()[0]
        self.log.add(global_step=self.global_step, epoch=self.epoch, lr=lr, **entry)


def _arguments(cfg: DictConfig) -> dict[str, Any]:
    return {str(key): value for key, value in cfg.items() if key != "_target_"}


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Yields whether SIGINT or SIGTERM came: a step under way is finished and the state saved first."""
    received: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: received.append(number)) for number in signals]
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _rng_state(device: torch.device) -> dict[str, bytes]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: state.numpy().tobytes() for name, state in states.items()}


def _set_rng_state(device: torch.device, states: dict[str, bytes]) -> None:
    tensors = {name: torch.frombuffer(bytearray(state), dtype=torch.uint8) for name, state in states.items()}
    torch.set_rng_state(tensors["cpu"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
