from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bacinfer import files
from bacinfer.commands.train import main
from bacinfer.policies import load_policy, read_checkpoint
from bacinfer.tasks import MetaWorldTask, make_task, task_name
from bacinfer.tasks.base import Rollout
from bacinfer.training import trainer as trainer_module
from bacinfer.training.configuration import read_config
from bacinfer.training.dataset import Demonstrations, read_pusht_demonstrations
from bacinfer.training.demonstrations import load_demonstrations
from bacinfer.training.precision import PRECISIONS
from bacinfer.training.trainer import Trainer
from bacinfer.training.weights import export_checkpoint

# 38 windows in batches of 8: four steps an epoch, six windows left over
TINY = [
    "policy.model.n_layer=1",
    "policy.model.n_head=2",
    "policy.model.n_emb=8",
    "policy.noise_scheduler.num_train_timesteps=5",
    "policy.num_inference_steps=5",
    "dataloader.batch_size=8",
    "training.num_epochs=3",
    "training.lr_warmup_steps=2",
    "training.log_every=2",
    "training.checkpoint_every=1",
    "optimizer.learning_rate=0.01",
]
TOTAL_STEPS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "demos.npz"
    np.savez(
        path,
        keypoint=rng.uniform(0, 512, (52, 9, 2)),
        state=rng.uniform(0, 512, (52, 5)),
        action=rng.uniform(0, 512, (52, 2)),
        episode_ends=np.array([30, 52]),
    )
    return path


@pytest.fixture
def demonstrations(data: Path) -> Demonstrations:
    return read_pusht_demonstrations(data)


def trainer(demonstrations: Demonstrations, output_dir: Path, *overrides: str, **settings: Any) -> Trainer:
    return Trainer(read_config([*TINY, *overrides]), demonstrations, output_dir, **settings)


def states(path: Path) -> dict[str, Any]:
    return read_checkpoint(path / "checkpoints" / "latest.ckpt").state_dicts


def assert_equal(first: Any, second: Any) -> None:
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif torch.is_tensor(first):
        assert torch.equal(first, second)
    else:
        assert first == second


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(
    steps: int, demonstrations: Demonstrations, tmp_path: Path
) -> None:
    whole = trainer(demonstrations, tmp_path / "whole")
    assert whole.total_steps == TOTAL_STEPS
    assert whole.run()

    first = trainer(demonstrations, tmp_path / "parts")
    for _ in range(steps):
        first.step()
    first.save(first.latest_path)
    torch.manual_seed(99)  # another process, another random state
    second = trainer(demonstrations, tmp_path / "parts")
    assert second.global_step == steps
    assert second.run()

    assert_equal(states(tmp_path / "parts"), states(tmp_path / "whole"))


def log_entries(output_dir: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (output_dir / "logs.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name != "samples_per_second"} for entry in entries]


@pytest.mark.parametrize("steps", [[1], [3, 1, 4], [6], [8, 3]])
def test_the_log_of_a_resumed_run_is_that_of_an_uninterrupted_one(
    steps: list[int], demonstrations: Demonstrations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = Rollout({"train/mean_score": 0.5}, [], 0.0)
    monkeypatch.setattr(trainer_module, "make_task", lambda cfg: SimpleNamespace(rollout=lambda *_: rollout))
    settings = ["training.log_every=3", "training.rollout_every=1"]
    assert trainer(demonstrations, tmp_path / "whole", *settings).run()
    for number in steps:
        run = trainer(demonstrations, tmp_path / "parts", *settings)
        interrupt_after(run, number)
        assert not run.run()
    killed = trainer(demonstrations, tmp_path / "parts", *settings)
    monkeypatch.setattr(killed, "save", lambda path: None)
    killed.run()
    assert trainer(demonstrations, tmp_path / "parts", *settings).run()
    assert log_entries(tmp_path / "parts") == log_entries(tmp_path / "whole")
    assert [entry["global_step"] for entry in log_entries(tmp_path / "parts")] == [3, 4, 6, 8, 9, 12, 12]


def interrupt_after(run: Trainer, number: int) -> None:
    step, first_step = run.step, run.global_step

    def interrupted_step() -> torch.Tensor:
        loss = step()
        if run.global_step == first_step + number:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    run.step = interrupted_step  # type: ignore[method-assign]


def test_an_interrupt_finishes_the_step_and_saves(demonstrations: Demonstrations, tmp_path: Path) -> None:
    run = trainer(demonstrations, tmp_path)
    interrupt_after(run, 6)
    handler = signal.getsignal(signal.SIGINT)
    assert not run.run()
    assert signal.getsignal(signal.SIGINT) is handler
    checkpoint = read_checkpoint(run.latest_path)
    assert (checkpoint.progress("global_step"), checkpoint.progress("epoch")) == (6, 1)


def test_every_window_comes_once_an_epoch_in_a_new_order(demonstrations: Demonstrations, tmp_path: Path) -> None:
    run = trainer(demonstrations, tmp_path)
    orders = []
    for _ in range(2):
        seen = []
        for _ in range(run.steps_per_epoch):
            seen += run._next_windows().tolist()
            run.global_step += 1
        assert len({tuple(window) for window in seen}) == len(seen) == 32
        orders.append(seen)
    assert orders[0] != orders[1]


def test_the_learning_rate_warms_up_and_follows_a_cosine(demonstrations: Demonstrations, tmp_path: Path) -> None:
    run = trainer(demonstrations, tmp_path)
    rates = []
    for _ in range(TOTAL_STEPS):
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.step()
    warm = [0.0, 0.005]
    cosine = [0.01 * 0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(10)]
    assert rates == pytest.approx([*warm, *cosine])
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0)


def test_the_ema_weights_follow_the_model(demonstrations: Demonstrations, tmp_path: Path) -> None:
    run = trainer(demonstrations, tmp_path)
    expected = None
    for step in range(6):
        run.step()
        weight = run.policy.model.head.weight.detach().clone()
        decay = 0.0 if step < 2 else 1 - step**-0.75
        expected = weight if expected is None else decay * expected + (1 - decay) * weight
    torch.testing.assert_close(run.ema_policy.model.head.weight, expected)
    assert not torch.equal(run.ema_policy.model.head.weight, run.policy.model.head.weight)


def test_training_learns(demonstrations: Demonstrations, tmp_path: Path) -> None:
    trainer(demonstrations, tmp_path, "training.num_epochs=60", "training.log_every=20").run()
    losses = [json.loads(line)["train_loss"] for line in (tmp_path / "logs.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]


def test_the_checkpoint_is_a_policy_with_the_data_s_range(demonstrations: Demonstrations, tmp_path: Path) -> None:
    run = trainer(demonstrations, tmp_path)
    run.run()
    policy = load_policy(run.latest_path)
    assert_equal(policy.state_dict(), run.ema_policy.state_dict())
    normalised = policy.normalizer["action"].normalize(demonstrations.action)
    torch.testing.assert_close(normalised.amax(0), torch.ones(2))
    torch.testing.assert_close(normalised.amin(0), -torch.ones(2))
    assert policy.predict_action({"obs": demonstrations.obs[None, :2]})["action"].shape == (1, 8, 2)


def test_starting_from_a_checkpoint(demonstrations: Demonstrations, tmp_path: Path) -> None:
    source = trainer(demonstrations, tmp_path / "first")
    source.run()
    other_data = Demonstrations(demonstrations.obs * 2, demonstrations.action * 2, demonstrations.episode_ends)
    run = trainer(other_data, tmp_path / "second", init_from=source.latest_path)
    assert run.global_step == 0
    # the weights belong to the range that they were trained with, so that comes along
    assert_equal(run.policy.state_dict(), source.ema_policy.state_dict())
    assert_equal(run.ema_policy.state_dict(), source.ema_policy.state_dict())


def test_starting_from_safetensors(demonstrations: Demonstrations, tmp_path: Path) -> None:
    source = trainer(demonstrations, tmp_path / "first")
    path = tmp_path / "weights.safetensors"
    tensors = {
        "stats.obs_min": torch.zeros(20),
        "stats.obs_max": torch.full((20,), 512.0),
        "stats.action_min": torch.zeros(2),
        "stats.action_max": torch.full((2,), 256.0),
    }
    save_file({**source.policy.model.state_dict(), **tensors}, path)
    run = trainer(demonstrations, tmp_path / "second", init_from=path)
    assert_equal(run.policy.model.state_dict(), source.policy.model.state_dict())
    assert run.policy.normalizer["action"].normalize(torch.tensor([[0.0, 128.0]])).tolist() == [[-1, 0]]
    assert run.policy.normalizer["obs"].normalize(torch.full((1, 20), 512.0)).tolist() == [[1] * 20]

    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        trainer(demonstrations, tmp_path / "third", init_from=tmp_path / "none.safetensors")
    save_file(source.policy.model.state_dict(), path)
    with pytest.raises(ValueError, match=r"stats\.obs_min"):
        trainer(demonstrations, tmp_path / "third", init_from=path)


def test_an_unfinished_run_goes_on_rather_than_starting_from_other_weights(
    demonstrations: Demonstrations, tmp_path: Path
) -> None:
    run = trainer(demonstrations, tmp_path)
    run.step()
    run.save(run.latest_path)
    again = trainer(demonstrations, tmp_path, init_from=tmp_path / "not_even_there.ckpt")
    assert again.global_step == 1
    assert trainer(demonstrations, tmp_path, "training.resume=false").global_step == 0


def test_exporting_keeps_the_acting_weights_alone(demonstrations: Demonstrations, tmp_path: Path) -> None:
    run = trainer(demonstrations, tmp_path)
    run.run()
    small = tmp_path / "small.ckpt"
    export_checkpoint(run.latest_path, small)
    checkpoint = read_checkpoint(small)
    assert set(checkpoint.state_dicts) == {"model", "ema_model"}
    assert checkpoint.progress("global_step") == TOTAL_STEPS
    expected = {
        name: value.half().float() if name.startswith("model.") else value
        for name, value in run.ema_policy.state_dict().items()
    }
    assert_equal(load_policy(small).state_dict(), expected)
    assert small.stat().st_size < run.latest_path.stat().st_size / 2


def test_rollouts_keep_the_best_checkpoints(
    demonstrations: Demonstrations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.25, 0.75, 0.5])
    seeds_seen = []

    class FakeTask:
        def rollout(self, policy: Any, seeds: range) -> Rollout:
            assert not policy.training
            seeds_seen.append(list(seeds))
            return Rollout({"train/mean_score": next(scores)}, [], 0.0)

    monkeypatch.setattr(trainer_module, "make_task", lambda cfg: FakeTask())
    settings = ["training.rollout_every=1", "training.rollout_episodes=2", "training.keep_best=2"]
    trainer(demonstrations, tmp_path, *settings).run()
    assert seeds_seen == [[0, 1]] * 3
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "latest.ckpt",
        "epoch=0002-train_mean_score=0.750.ckpt",
        "epoch=0003-train_mean_score=0.500.ckpt",
    }


@pytest.mark.parametrize(("keep", "kept"), [(0, []), (1, ["epoch=0002-train_mean_score=0.500.ckpt"])])
def test_how_many_of_the_best_are_kept(
    keep: int, kept: list[str], demonstrations: Demonstrations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.25, 0.5])
    rollout = SimpleNamespace(rollout=lambda *_: Rollout({"train/mean_score": next(scores)}, [], 0.0))
    monkeypatch.setattr(trainer_module, "make_task", lambda cfg: rollout)
    settings = ["training.rollout_every=1", f"training.keep_best={keep}", "training.num_epochs=2"]
    trainer(demonstrations, tmp_path, *settings).run()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [*kept, "latest.ckpt"]


@pytest.mark.parametrize("name", ["log_every", "checkpoint_every"])
def test_an_interval_of_nothing(name: str, demonstrations: Demonstrations, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"training.{name}=0: expected at least 1"):
        trainer(demonstrations, tmp_path, f"training.{name}=0")


def test_bfloat16_stays_near_single_precision(demonstrations: Demonstrations, tmp_path: Path) -> None:
    losses = []
    for precision in PRECISIONS:
        run = trainer(demonstrations, tmp_path / precision, f"training.precision={precision}")
        losses.append(torch.stack([run.step() for _ in range(TOTAL_STEPS)]))
        assert {parameter.dtype for parameter in run.policy.parameters()} == {torch.float32}
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0], rtol=0.05, atol=0)
    assert not torch.equal(losses[2], losses[0])
    with pytest.raises(ValueError, match=r"'fp8'; known: fp32, tf32, bf16"):
        trainer(demonstrations, tmp_path / "fp8", "training.precision=fp8")


def test_the_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    command = ["--output_dir", str(output), "--data", str(data)]
    assert main([*command, *TINY]) == 0
    steps = [json.loads(line)["global_step"] for line in (output / "logs.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 8, 10, 12]
    assert (output / "loss.png").stat().st_size > 0
    assert main([*command, "--export", str(tmp_path / "small.ckpt")]) == 0
    assert load_policy(tmp_path / "small.ckpt").horizon == 16
    assert main([*command, *TINY, "training.num_epochs=4"]) == 0
    assert "step 12" in capsys.readouterr().err
    assert read_checkpoint(output / "checkpoints" / "latest.ckpt").progress("global_step") == 16


@pytest.mark.parametrize(
    ("task", "environment"),
    [("assembly", "assembly-v3"), ("drawer_open", "drawer-open-v3"), ("pick_place", "pick-place-v3")],
)
def test_the_robot_arm_s_configuration(task: str, environment: str) -> None:
    cfg = read_config([f"task={task}"])
    found = make_task(cfg)
    assert isinstance(found, MetaWorldTask)
    assert (found.name, found.env_name) == (task, environment)
    assert (cfg.policy.model.input_dim, cfg.policy.model.cond_dim, cfg.policy.horizon) == (4, 10, 16)
    assert cfg.policy.num_inference_steps == 100


def test_the_robot_arm_s_demonstrations_are_recorded_if_there_are_none(tmp_path: Path) -> None:
    data = tmp_path / "data" / "arm.npz"
    command = [
        "-o",
        str(tmp_path / "run"),
        "--data",
        str(data),
        "task=drawer_open",
        "task.dataset.num_demonstrations=1",
    ]
    command += [*TINY, "training.num_epochs=1", "training.rollout_every=1", "training.rollout_episodes=1"]
    command += ["task.env_runner.max_steps=8"]
    assert main(command) == 0
    assert load_policy(tmp_path / "run" / "checkpoints" / "latest.ckpt").obs_dim == 10
    assert json.loads((tmp_path / "run" / "logs.jsonl").read_text().splitlines()[-1])["train_mean_score"] == 0
    recorded = data.stat().st_mtime_ns
    assert main([*command, "training.num_epochs=2"]) == 0
    assert data.stat().st_mtime_ns == recorded


def test_an_unknown_task_is_refused_with_those_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-o", str(tmp_path), "task=juggling"]) == 2
    error = capsys.readouterr().err
    assert "juggling" in error
    assert "drawer_open" in error


def test_block_pushing(tmp_path: Path) -> None:
    cfg = read_config(["task=block_pushing"])
    assert task_name(cfg) == "block_pushing"
    assert (cfg.policy.horizon, cfg.policy.n_obs_steps, cfg.policy.n_action_steps) == (5, 3, 1)
    assert (cfg.policy.model.input_dim, cfg.policy.model.cond_dim, cfg.policy.model.n_emb) == (2, 16, 256)
    assert (cfg.task.dataset.pad_before, cfg.task.dataset.pad_after) == (2, 0)
    rng = np.random.default_rng(0)
    data = tmp_path / "demos.npz"
    np.savez(data, obs=rng.normal(size=(30, 16)), action=rng.normal(size=(30, 2)), episode_ends=np.array([12, 30]))
    command = ["-o", str(tmp_path / "run"), "--data", str(data), "task=block_pushing"]
    assert main([*command, *TINY, "training.num_epochs=1"]) == 0
    policy = load_policy(tmp_path / "run" / "checkpoints" / "latest.ckpt")
    assert (policy.obs_dim, policy.action_dim, policy.n_action_steps) == (16, 2, 1)


def test_block_pushing_from_demonstrations_of_the_expert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = read_config(["task=block_pushing_expert"])
    assert task_name(cfg) == "block_pushing"
    assert (cfg.policy.horizon, cfg.policy.n_obs_steps, cfg.policy.n_action_steps) == (4, 1, 2)
    runner = cfg.task.env_runner
    assert (runner.n_obs_steps, runner.n_action_steps, runner.obs_eef_target) == (1, 2, False)
    assert (cfg.task.dataset.pad_before, cfg.task.dataset.pad_after) == (0, 0)
    rng = np.random.default_rng(0)
    arrays = {"obs": rng.normal(size=(30, 16)), "action": rng.normal(size=(30, 2)), "episode_ends": np.array([12, 30])}
    files.write_arrays(tmp_path / "demos.npz", arrays, {"env_name": "block_pushing", "count": 2})
    command = ["-o", str(tmp_path / "run"), "--data", str(tmp_path / "demos.npz"), "task=block_pushing_expert", *TINY]
    assert main([*command, "training.num_epochs=1"]) == 2
    assert "was recorded with count 2 instead of 1200" in capsys.readouterr().err
    assert main([*command, "training.num_epochs=1", "task.dataset.num_demonstrations=2"]) == 0
    assert load_policy(tmp_path / "run" / "checkpoints" / "latest.ckpt").n_action_steps == 2
    cfg.task.dataset.num_demonstrations = 2
    shown = load_demonstrations(cfg, tmp_path / "demos.npz")
    assert shown.fields["obs"][:, 8:10].abs().max() == 0  # as in the runner
    cfg.task.obs_eef_target = True
    torch.testing.assert_close(
        load_demonstrations(cfg, tmp_path / "demos.npz").fields["obs"], torch.from_numpy(arrays["obs"]).float()
    )


def test_recording_block_pushing_needs_its_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "diffusion_policy", None)
    monkeypatch.chdir(tmp_path)
    assert main(["-o", "run", "task=block_pushing_expert"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: demonstrations of block pushing need its environment")
    assert "Install the package diffusion_policy" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_shipped_policy_of_block_pushing_has_the_command_s_settings() -> None:
    shipped = read_checkpoint(Path(__file__).parents[2] / "assets/block_pushing/block_pushing_transformer.ckpt").cfg
    assert read_config(["task=block_pushing_expert"]) == shipped


def test_entries_that_follow_from_others() -> None:
    cfg = read_config(["n_obs_steps=3", "n_action_steps=5", "n_latency_steps=1"])
    assert (cfg.task.dataset.pad_before, cfg.task.dataset.pad_after) == (3, 4)
    assert (cfg.policy.model.input_dim, cfg.policy.model.output_dim, cfg.policy.model.cond_dim) == (2, 2, 20)
    cfg = read_config(["obs_as_cond=false", "task.dataset.pad_after=0"])
    assert (cfg.task.dataset.pad_before, cfg.task.dataset.pad_after) == (1, 0)
    assert (cfg.policy.model.input_dim, cfg.policy.model.output_dim, cfg.policy.model.cond_dim) == (22, 22, 0)


def test_what_the_observations_are_mapped_to(demonstrations: Demonstrations, tmp_path: Path) -> None:
    data = {"obs": demonstrations.obs, "action": demonstrations.action}
    ranges = trainer(demonstrations, tmp_path / "range").policy.normalizer.normalize(data)
    assert ranges["obs"].aminmax() == pytest.approx((-1, 1))
    spread = trainer(demonstrations, tmp_path / "std", "training.normalize_obs=std").policy.normalizer.normalize(data)
    torch.testing.assert_close(spread["obs"].std(0), torch.ones(20))
    torch.testing.assert_close(spread["obs"].mean(0), torch.zeros(20), atol=1e-4, rtol=0)
    torch.testing.assert_close(spread["action"], ranges["action"])
    for kind in ("range", "std"):
        overrides = (f"training.normalize_obs={kind}", "training.obs_gain=10")
        gained = trainer(demonstrations, tmp_path / f"{kind}_10", *overrides).policy.normalizer
        torch.testing.assert_close(gained.normalize(data)["obs"], 10 * {"range": ranges, "std": spread}[kind]["obs"])
        torch.testing.assert_close(gained.normalize(data)["action"], ranges["action"])
        torch.testing.assert_close(gained.unnormalize(gained.normalize(data))["obs"], demonstrations.obs)
    of_each = trainer(demonstrations, tmp_path / "each", f"training.obs_gain={[3] * 19 + [0]}").policy.normalizer
    torch.testing.assert_close(of_each.normalize(data)["obs"][:, :19], 3 * ranges["obs"][:, :19])
    torch.testing.assert_close(of_each.normalize(data)["obs"][:, 19], torch.zeros(len(data["obs"])))
    with pytest.raises(ValueError, match=r"obs_gain has 2 numbers: expected one, or 20, as many as an observation has"):
        trainer(demonstrations, tmp_path / "two", "training.obs_gain=[1, 1]")
    with pytest.raises(ValueError, match=r"obs_gain is 0: expected more than 0"):
        trainer(demonstrations, tmp_path / "none", "training.obs_gain=0")
    with pytest.raises(ValueError, match=r"normalize_obs is 'max'; known: range, std"):
        trainer(demonstrations, tmp_path / "max", "training.normalize_obs=max")


def test_training_without_averaging_is_refused(demonstrations: Demonstrations, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use_ema"):
        trainer(demonstrations, tmp_path, "training.use_ema=false")


def test_too_short_demonstrations(tmp_path: Path) -> None:
    short = Demonstrations(torch.zeros(5, 20), torch.zeros(5, 2), (5,))
    with pytest.raises(ValueError, match="window of 16 steps"):
        trainer(short, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.npz"], r"nowhere.npz"),
        (["training.nonsense=1"], "training.nonsense"),
        (["nonsense"], "nonsense"),
        (["training.device=tpu9"], "tpu9"),
    ],
)
def test_a_user_s_mistake_is_one_line(
    arguments: list[str], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--output_dir", str(tmp_path), "--data", str(data), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
