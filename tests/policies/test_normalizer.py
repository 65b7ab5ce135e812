from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bacinfer.policies.reference import LinearNormalizer


def test_limits_by_hand() -> None:
    data = torch.tensor([[0.0, 5.0, 7.0], [10.0, 5.0, 9.0], [5.0, 5.0, 8.0]])
    normalizer = LinearNormalizer.fit({"obs": data})
    expected = torch.tensor([[-1.0, 0.0, -1.0], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])  # a constant channel goes to 0
    torch.testing.assert_close(normalizer["obs"].normalize(data), expected, rtol=0, atol=1e-6)
    stats = normalizer.params_dict["obs"]["input_stats"]
    assert stats["min"].tolist() == [0, 5, 7]
    assert stats["max"].tolist() == [10, 5, 9]
    assert stats["mean"].tolist() == [5, 5, 8]
    assert stats["std"].tolist() == [5, 0, 1]
    torch.testing.assert_close(
        LinearNormalizer.from_ranges({"obs": (stats["min"], stats["max"])})["obs"].normalize(data), expected
    )


@given(
    st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), min_size=2, max_size=20),
)
def test_round_trip_and_range(rows: list[list[float]]) -> None:
    data = torch.tensor(rows)
    field = LinearNormalizer.fit({"x": data})["x"]
    normalised = field.normalize(data)
    assert normalised.abs().max() <= 1 + 1e-2  # a range of 1e-4 at 1e4 is below float32's resolution
    torch.testing.assert_close(field.unnormalize(normalised), data, rtol=1e-5, atol=2e-2)


def test_any_leading_shape() -> None:
    data = torch.randn(4, 3, 5)
    normalizer = LinearNormalizer.fit({"x": data})
    each = torch.stack([normalizer["x"].normalize(row) for row in data])
    assert torch.equal(normalizer.normalize({"x": data})["x"], each)
    torch.testing.assert_close(normalizer.unnormalize({"x": each})["x"], data)


def test_the_state_dict_decides_which_fields_there_are() -> None:
    source = LinearNormalizer.fit({"obs": torch.randn(9, 4), "action": torch.randn(9, 2)})
    holder = nn.ModuleDict({"normalizer": LinearNormalizer()})
    holder.load_state_dict({f"normalizer.{key}": value for key, value in source.state_dict().items()}, strict=True)
    loaded = holder["normalizer"]
    assert loaded.state_dict().keys() == source.state_dict().keys()
    x = torch.randn(3, 4)
    assert torch.equal(loaded["obs"].normalize(x), source["obs"].normalize(x))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    source.params_dict["obs"]["scale"].zero_()  # a copy was loaded
    assert loaded.params_dict["obs"]["scale"].abs().min() > 0


def test_a_field_that_was_never_fitted_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"no field 'obs'.*never fitted"):
        LinearNormalizer()["obs"]
    with pytest.raises(RuntimeError, match=r"no field 'obs'.*action"):
        LinearNormalizer.fit({"action": torch.randn(4, 2)})["obs"]


def test_an_image_goes_from_minus_1_to_1() -> None:
    normalizer = LinearNormalizer.fit({"action": torch.rand(5, 2)})
    normalizer.add_image("image")
    image = torch.tensor([0.0, 0.5, 1.0]).reshape(1, 1, 3, 1, 1).expand(2, 4, 3, 6, 7)
    assert torch.equal(normalizer["image"].normalize(image), 2 * image - 1)
    assert normalizer.state_dict()["params_dict.image.scale"].shape == (1,)
