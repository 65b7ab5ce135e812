from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from bacinfer import safe_pickle

PLAIN_DATA = {**safe_pickle.TENSOR_GLOBALS, **safe_pickle.ARRAY_GLOBALS}


def load(data: bytes) -> object:
    return safe_pickle.load(data, PLAIN_DATA)


PROTOCOLS = pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))


@PROTOCOLS
def test_plain_data_comes_back_whole(protocol: int) -> None:
    data = {
        "numbers": [1, 2.5, None, True, 10**30],
        "text": ("a", b"\xff", b""),
        "ordered": OrderedDict(a=1),
        "dtype": torch.float16,
        "shape": torch.Size([2, 3]),
        "scalar": np.float64(0.5),
    }
    assert load(pickle.dumps(data, protocol=protocol)) == data


@PROTOCOLS
@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3).T,
        torch.arange(10)[3::2],
        torch.tensor([1.5], dtype=torch.bfloat16),
        torch.tensor(2, dtype=torch.int8),
        torch.tensor([True, False]),
        torch.tensor([1 + 2j]),
        torch.empty(0, 3),
        torch.nn.Parameter(torch.ones(2)),
        torch.nn.Parameter(torch.ones(2), requires_grad=False),
    ],
)
def test_tensors_come_back_whole(tensor: torch.Tensor, protocol: int) -> None:
    result = load(pickle.dumps(tensor, protocol=protocol))
    assert type(result) is type(tensor)
    assert torch.equal(result, tensor)
    assert (result.dtype, result.shape, result.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
    assert result.requires_grad == tensor.requires_grad


@PROTOCOLS
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(24, dtype=np.int16).reshape(2, 3, 4).transpose(1, 0, 2),
        np.arange(10)[::3],
        np.array([True, False]),
        np.array([1 + 2j], dtype=np.complex64),
        np.array(0.5),
        np.empty((0, 3)),
    ],
)
def test_arrays_come_back_whole(array: np.ndarray, protocol: int) -> None:
    result = load(pickle.dumps(array, protocol=protocol))
    assert type(result) is np.ndarray
    assert result.dtype == array.dtype
    np.testing.assert_array_equal(result, array)


def test_a_tensor_keeps_sharing_its_storage() -> None:
    base = torch.zeros(4)
    first, second = load(pickle.dumps([base, base[2:]]))  # type: ignore[misc]
    assert torch.equal(first, base)
    assert torch.equal(second, base[2:])


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def test_a_function_is_not_called(tmp_path: Path) -> None:
    marker = tmp_path / "was_here"
    with pytest.raises(safe_pickle.UnsafePickleError, match=r"mkdir"):
        load(pickle.dumps([1, Hostile(marker)]))
    assert not marker.exists()


@pytest.mark.parametrize("name", ["builtins eval", "builtins getattr", "torch.hub load", "torch load", "os system"])
def test_other_names_are_refused_though_their_module_is_known(name: str) -> None:
    module, attribute = name.split()
    with pytest.raises(safe_pickle.UnsafePickleError, match=rf"{module}\.{attribute}"):
        load(f"c{module}\n{attribute}\n.".encode())


def test_a_dotted_name_does_not_reach_into_an_admitted_object() -> None:
    data = pickle.PROTO + b"\x04" + b"\x8c\x05torch\x8c\x0cSize.__new__\x93."
    with pytest.raises(safe_pickle.UnsafePickleError, match=r"Size\.__new__"):
        load(data)


@pytest.mark.parametrize("target", ["torch Size", "torch._utils _rebuild_tensor_v2"])
def test_attributes_of_classes_and_functions_are_not_changed(target: str) -> None:
    module, name = target.split()
    set_attribute = b"}X\x05\x00\x00\x00pwnedK\x01sb."  # {"pwned": 1}, BUILD
    with pytest.raises(safe_pickle.UnsafePickleError, match="change"):
        load(f"c{module}\n{name}\n".encode() + set_attribute)
    assert not hasattr(PLAIN_DATA[module, name], "pwned")


def test_nothing_in_a_storage_is_called(tmp_path: Path) -> None:
    marker = tmp_path / "was_here"
    inner = io.BytesIO()
    torch.save(Hostile(marker), inner)

    class Storage:
        def __reduce__(self) -> tuple:
            return torch.storage._load_from_bytes, (inner.getvalue(),)

    with pytest.raises(ValueError, match=r"instruction|damaged"):
        load(pickle.dumps(Storage()))
    assert not marker.exists()


def test_no_codec_but_latin1_is_looked_up() -> None:
    class Text:
        def __reduce__(self) -> tuple:
            import _codecs

            return _codecs.encode, ("a", "utf-16")

    with pytest.raises(safe_pickle.UnsafePickleError, match="utf-16"):
        load(pickle.dumps(Text(), protocol=2))


def test_a_reference_that_is_repeated_is_data_as_long_as_that_takes_little() -> None:
    shared = [0.5] * 10
    assert load(pickle.dumps({"a": shared, "b": shared})) == {"a": shared, "b": shared}
    large = np.zeros(10**6)
    assert len(load(pickle.dumps([large] * 4))) == 4  # type: ignore[arg-type]
    with pytest.raises(safe_pickle.UnsafePickleError, match="far more than its size"):
        load(pickle.dumps([large] * 20))


def test_what_a_file_says_is_shortened_for_an_error() -> None:
    assert safe_pickle.shorten("a.b") == "a.b"
    assert len(safe_pickle.shorten("a" * 10**6)) < 300
    assert "\x1b" not in safe_pickle.shorten("\x1b[31m")
