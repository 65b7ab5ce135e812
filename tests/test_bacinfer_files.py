"""BACInfer's files: what they are, what is read of them, and that nothing else is unpickled."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from bacinfer import assets, bacinfer_files
from bacinfer.bacinfer_files import block_key, module_name


def test_paths_are_those_of_the_reference() -> None:
    run = assets.RunAssets(Path("assets/pusht/original"))
    steps = bacinfer_files.steps_file(run.steps_dir("cosine"), "decoder.layers.0.dropout1", 10, "cosine")
    assert str(steps) == (
        "assets/pusht/original/optimal_steps/cosine/decoder.layers.0.dropout1/"
        "optimal_steps_decoder.layers.0.dropout1_10_cosine.pkl"
    )
    selection = bacinfer_files.selection_file(run.directory, 5)
    assert str(selection) == "assets/pusht/original/bu_block_selection/top_5_error_blocks.pkl"
    errors = bacinfer_files.block_errors_file(run.directory)
    assert str(errors) == "assets/pusht/original/bu_block_selection/block_l1_errors.pkl"


@pytest.mark.parametrize(
    ("module", "key"),
    [
        ("decoder.layers.11.dropout2", "decoder.layers.11_mha_block"),
        ("model.encoder.layers.0.dropout2", "model.encoder.layers.0_ff_block"),
        ("encoder.layers.0.dropout3", None),
        ("decoder.layers.0.linear1", None),
        ("drop", None),
    ],
)
def test_keys_of_modules(module: str, key: str | None) -> None:
    assert block_key(module) == key
    if key is not None:
        assert module_name(key) == module


@pytest.mark.parametrize("block", ["blocks.0_ff_block", "decoder.layers.0_gate", "encoder.layers.0_mha_block", "head"])
def test_blocks_that_bacinfer_has_no_name_for(block: str) -> None:
    with pytest.raises(ValueError, match=rf"cannot name the block '{block}'.*leave out --bacinfer_files"):
        module_name(block)


def test_steps_files_are_plain_pickles_with_json_beside_them(tmp_path: Path) -> None:
    path = bacinfer_files.write_steps(tmp_path, "decoder.layers.0_sa_block", "l1", np.array([0, 4, 9]), 100)  # type: ignore[arg-type]
    assert pickle.loads(path.read_bytes()) == [0, 4, 9]
    assert path.with_suffix(".txt").read_text() == "0 4 9\n"
    assert path.with_suffix(".json").read_text() == (
        '{"metric": "l1", "steps": [0, 4, 9], "num_steps": 3, "num_inference_steps": 100}\n'
    )
    assert path.parent.name == "decoder.layers.0.dropout1"
    assert bacinfer_files.read_steps(path) == ([0, 4, 9], 100)
    assert bacinfer_files.available_steps(tmp_path) == {("l1", 3)}


@pytest.mark.parametrize("stored", [np.array([0, 2]), (0, 2), [np.int64(0), np.int32(2)]])
def test_steps_files_of_others_may_hold_arrays(tmp_path: Path, stored: object) -> None:
    path = tmp_path / "steps.pkl"
    path.write_bytes(pickle.dumps(stored))
    assert bacinfer_files.read_steps(path) == ([0, 2], None)


def test_damaged_description_of_a_steps_file(tmp_path: Path) -> None:
    path = bacinfer_files.write_steps(tmp_path, "decoder.layers.0_sa_block", "l1", [0], 100)
    path.with_suffix(".json").write_text("{")
    with pytest.raises(ValueError, match="line 1: this is no JSON"):
        bacinfer_files.read_steps(path)


@pytest.mark.parametrize(
    "stored",
    [[0, "2"], [0, 2.0], [0, None], [0, [2]], [True], np.array(3), np.array([[0, 2]]), np.array([0.5]), {0: 2}],
)
def test_steps_files_of_other_things(tmp_path: Path, stored: object) -> None:
    path = tmp_path / "steps.pkl"
    path.write_bytes(pickle.dumps(stored))
    with pytest.raises(
        ValueError, match=r"steps\.pkl: (expected a list of update steps|update steps must be integers), found"
    ):
        bacinfer_files.read_steps(path)


@pytest.mark.parametrize("text", ["[" * 10**5, "{", b"\xff", "1" * 10**5, '{"num_inference_steps": ' + "[" * 10**5])
def test_a_description_without_end_is_a_clear_error(tmp_path: Path, text: str | bytes) -> None:
    path = bacinfer_files.write_steps(tmp_path, "decoder.layers.0_sa_block", "l1", [0], 100)
    path.with_suffix(".json").write_bytes(text.encode() if isinstance(text, str) else text)
    # before Python 3.10.7 a number may have any length
    with pytest.raises(ValueError, match=r"dropout1_1_l1\.json.*(this is no JSON|expected the description)") as error:
        bacinfer_files.read_steps(path)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("value", [10**400, float("nan"), float("inf"), "1", None, 1j, np.complex64(1), np.ones(2)])
def test_block_errors_are_finite_numbers(tmp_path: Path, value: object) -> None:
    path = tmp_path / "errors.pkl"
    path.write_bytes(pickle.dumps({"a": value}))
    with pytest.raises(ValueError, match=r"errors\.pkl"):
        bacinfer_files.read_block_errors(path)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_is_read(tmp_path: Path, protocol: int) -> None:
    data = {
        "lists": [1, 2.5, "text", None, True, (1, b"bytes")],
        "arrays": np.arange(6, dtype=np.float32).reshape(2, 3),
        "scalar": np.float64(0.5),
        "tensors": [torch.arange(4.0), torch.zeros(2, dtype=torch.float16)],
    }
    path = tmp_path / "data.pkl"
    path.write_bytes(pickle.dumps(data, protocol))
    read = bacinfer_files.read_pickle(path)
    assert read["lists"] == data["lists"]
    assert np.array_equal(read["arrays"], data["arrays"])
    assert read["scalar"] == 0.5
    assert all(torch.equal(a, b) for a, b in zip(read["tensors"], data["tensors"], strict=True))


class Call:
    def __init__(self, function: object, *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize(
    ("hostile", "named"),
    [
        (Call(os.system, "touch executed"), "system"),
        (Call(eval, "open('executed', 'w')"), "eval"),
        (Call(getattr, os, "system"), "getattr"),
        (Path("x"), "pathlib"),
        (torch.nn.Linear(1, 1), "torch"),
    ],
)
def test_nothing_else_is_unpickled(tmp_path: Path, monkeypatch, hostile: object, named: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.pkl"
    try:
        path.write_bytes(pickle.dumps({"a": [hostile]}))
    except TypeError:  # modules cannot be pickled, so name the function directly
        path.write_bytes(b"cbuiltins\ngetattr\n.")
    with pytest.raises(ValueError, match=named) as error:
        bacinfer_files.read_pickle(path)
    assert str(path) in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_pickled_storage_cannot_smuggle_code(tmp_path: Path, monkeypatch) -> None:
    # A tensor's storage is pickled as bytes that are themselves unpickled.
    monkeypatch.chdir(tmp_path)
    inner = pickle.dumps(Call(os.system, "touch executed"))
    path = tmp_path / "hostile.pkl"
    path.write_bytes(pickle.dumps(Call(torch.storage._load_from_bytes, inner)))
    with pytest.raises(ValueError, match=r"hostile.pkl"):
        bacinfer_files.read_pickle(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content",
    [
        [1],
        {"decoder.layers.0.dropout1": [np.zeros(2), np.zeros(3)]},
        {"decoder.layers.0.dropout1": "text"},
        {"decoder.layers.0.dropout1": [object]},
        {"decoder.layers.0.dropout1": torch.ones(2) + 1j},
    ],
)
def test_activations_of_another_form(tmp_path: Path, content: object) -> None:
    path = tmp_path / "activations.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"activations.pkl"):
        assets.read_activations(assets.RunAssets(tmp_path))


def test_missing_activations(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="record them first"):
        assets.read_activations(assets.RunAssets(tmp_path))
