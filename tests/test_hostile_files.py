"""Files made to do harm, or damaged by chance: each ends in data or in a clear error, soon and in little memory."""

from __future__ import annotations

import copy
import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from bacinfer import files
from bacinfer.policies.checkpoint import Checkpoint, create_policy
from bacinfer.policies.diffusion_policy import POLICIES
from hostile_files import ATTACKS, mutate, read_all, write_attacks
from tiny_policies import tiny_config, write_tiny_checkpoint

SECONDS = 10  # of processor time; hangs would take years
MEMORY = 10**9  # the interpreter with its libraries included

HARMLESS = {"ordered_dict_attributes", "frame", "memo"}  # the first keeps the dict, the others say more than they use


def require_clear_ends(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["kind"] in ("data", "ValueError"), result
        assert result["kind"] == "data" or result["file"] in result["message"], result
        assert len(result["message"]) < 3000, result
        assert result["seconds"] < SECONDS, result
        assert result["memory"] < MEMORY, result


def test_attacks_are_refused(tmp_path: Path) -> None:
    write_attacks(tmp_path)
    results = read_all(tmp_path)
    require_clear_ends(results)
    assert len(results) == len(ATTACKS)
    assert {Path(result["file"]).stem for result in results if result["kind"] == "data"} <= HARMLESS


def genuine_data() -> list[Any]:
    base = torch.arange(24.0).reshape(4, 6)
    return [
        [0, 3, 50, 99],
        {"decoder.layers.0_sa_block": 0.5, "decoder.layers.1_ff_block": np.float64(1.5)},
        {"m": [base, base[1:, ::2], base.T.half()], "n": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))},
        {
            "m": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
            "n": np.asfortranarray(np.eye(3)),
            "o": np.arange(3) > 1,
        },
        {"m": {"cosine": np.eye(4), "l1": [[0.0, 1.0], [1.0, 0.0]]}},
        OrderedDict(a=(1, b"bytes", None, True, -(10**30), 1e300), b={}),
    ]


def test_damaged_pickles(tmp_path: Path) -> None:
    pickles = [pickle.dumps(data, protocol) for data in genuine_data() for protocol in range(2, 6)]
    chance = random.Random(0)
    for number in range(2000):
        (tmp_path / f"{number}.pkl").write_bytes(mutate(chance.choice(pickles), chance, pickles))
    require_clear_ends(read_all(tmp_path))


def test_damaged_arrays(tmp_path: Path) -> None:
    original = tmp_path / "original.npz"
    files.write_arrays(original, {"a": np.eye(3), "b": np.arange(4)}, {"demos": [1, 2]})
    data = original.read_bytes()
    original.unlink()
    chance = random.Random(0)
    for number in range(300):
        (tmp_path / f"{number}.npz").write_bytes(mutate(data, chance, [data]))
    require_clear_ends(read_all(tmp_path))


def test_changed_configurations(tmp_path: Path) -> None:
    cfg = tiny_config()
    OmegaConf.set_struct(cfg, False)
    weights = create_policy(Checkpoint(tmp_path, cfg, {})).state_dict()
    targets = [*POLICIES, *(target for parts in POLICIES.values() for known in parts.values() for target in known)]
    values: list[Any] = [10**10, 10**30, 0, -1, 7.5, 1e300, float("nan"), True, None, "", "5", "???", b"5", [], {}, [1]]
    values += [*targets, "os.system", *({"_target_": target} for target in targets)]
    values += ["${policy}", "${policy.horizon}", "${.horizon}", "${..horizon}", "x ${name} ${name}", "${nothing}"]
    chance = random.Random(0)
    for number in range(100):
        changed = copy.deepcopy(cfg)
        sections = [changed, changed.policy, changed.policy.model, changed.policy.noise_scheduler]
        for _ in range(chance.choice((1, 1, 2, 5))):
            section = chance.choice(sections)
            section[chance.choice([*section, "extra"])] = chance.choice(values)
        torch.save({"cfg": changed, "state_dicts": {"ema_model": weights}}, tmp_path / f"{number}.ckpt")
    results = read_all(tmp_path)
    for result in results:
        if result["kind"] == "RuntimeError":  # a known class that is not installed here
            assert "real-stanford" in result["message"], result
            result["kind"] = "ValueError"
    require_clear_ends(results)


def test_damaged_checkpoints(tmp_path: Path) -> None:
    original = write_tiny_checkpoint(tmp_path / "original.ckpt")
    archive = original.read_bytes()
    with zipfile.ZipFile(original) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    original.unlink()
    (pickle_name,) = (name for name in entries if name.endswith("data.pkl"))
    others = [entries[pickle_name], *(pickle.dumps(data, 2) for data in genuine_data())]
    chance = random.Random(0)
    for number in range(60):
        (tmp_path / f"{number}_archive.ckpt").write_bytes(mutate(archive, chance, [archive]))
    for number in range(200):
        with zipfile.ZipFile(tmp_path / f"{number}_pickle.ckpt", "w") as file:
            for name, data in entries.items():
                file.writestr(name, mutate(data, chance, others) if name == pickle_name else data)
    require_clear_ends(read_all(tmp_path))
