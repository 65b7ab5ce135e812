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
    return safe_pickle.load(io.BytesIO(data), PLAIN_DATA)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_comes_back_whole(protocol: int) -> None:
    data = {
        "numbers": [1, 2.5, None, True, 10**30],
        "text": ("a", b"\xff"),
        "ordered": OrderedDict(a=1),
        "tensor": torch.arange(6.0).reshape(2, 3).T,
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "dtype": torch.float16,
        "shape": torch.Size([2, 3]),
        "array": np.arange(6, dtype=np.float32).reshape(2, 3),
        "words": np.array(["a", "b"]),
        "scalar": np.float64(0.5),
    }
    result = load(pickle.dumps(data, protocol=protocol))
    assert isinstance(result, dict)
    assert result.keys() == data.keys()
    for key in ("numbers", "text", "ordered", "dtype", "shape", "scalar"):
        assert result[key] == data[key]
    for key in ("tensor", "half", "parameter"):
        assert torch.equal(result[key], data[key])
        assert result[key].dtype == data[key].dtype
    for key in ("array", "words"):
        np.testing.assert_array_equal(result[key], data[key])


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


def test_a_storage_inside_is_read_as_weights_only(tmp_path: Path) -> None:
    marker = tmp_path / "was_here"
    inner = io.BytesIO()
    torch.save(Hostile(marker), inner)

    class Storage:
        def __reduce__(self) -> tuple:
            return torch.storage._load_from_bytes, (inner.getvalue(),)

    with pytest.raises(pickle.UnpicklingError):
        load(pickle.dumps(Storage()))
    assert not marker.exists()


def test_no_codec_but_latin1_is_looked_up() -> None:
    class Text:
        def __reduce__(self) -> tuple:
            import _codecs

            return _codecs.encode, ("a", "utf-16")

    with pytest.raises(safe_pickle.UnsafePickleError, match="utf-16"):
        load(pickle.dumps(Text(), protocol=2))
