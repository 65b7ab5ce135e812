"""The grammar of methods."""

from __future__ import annotations

import pytest

from bacinfer.experiments.method import PLAIN, Method, parse_method, parse_methods


@pytest.mark.parametrize(
    ("spec", "method", "label"),
    [
        ("plain", PLAIN, "plain"),
        ("ddim:10", Method(ddim_steps=10), "DDIM 10"),
        ("uniform:10", Method("uniform", num_caches=10), "uniform 10"),
        ("threshold:5", Method("threshold", interval=5), "every 5"),
        ("edit:0-20-40", Method("edit", steps=(0, 20, 40)), "steps 0 20 40"),
        ("unified:10", Method("unified", num_caches=10, metric="cosine"), "unified ACS 10"),
        ("blockwise:8:l1", Method("bac", num_caches=8, num_bu_blocks=0, metric="l1"), "block-wise ACS 8 (l1)"),
        ("bac:10:5", Method("bac", num_caches=10, num_bu_blocks=5, metric="cosine"), "BAC 10, BU 5"),
        ("bac:10:5:mse", Method("bac", num_caches=10, num_bu_blocks=5, metric="mse"), "BAC 10, BU 5 (mse)"),
        (
            "ddim:16+bac:8:5",
            Method("bac", num_caches=8, num_bu_blocks=5, metric="cosine", ddim_steps=16),
            "DDIM 16 + BAC 8, BU 5",
        ),
        ("ddim:16+uniform:8", Method("uniform", num_caches=8, ddim_steps=16), "DDIM 16 + uniform 8"),
    ],
)
def test_a_spelling_is_a_method(spec: str, method: Method, label: str) -> None:
    assert parse_method(spec) == method
    assert method.spec == spec
    assert method.label == label


def test_one_method_has_one_spelling() -> None:
    assert parse_method("bac:10:0").spec == "blockwise:10"
    assert parse_method("bac:10:5:cosine").spec == "bac:10:5"
    assert parse_method("ddim:8+plain").spec == "ddim:8"
    assert [method.spec for method in parse_methods("plain, bac:10:0,blockwise:10")] == ["plain", "blockwise:10"]


NO_METHODS = [
    *(
        "bac",
        "bac:10",
        "bac:10:5:5",
        "bac:x:5",
        "uniform:1.5",
        "uniform:-2",
        "plain:3",
        "taylor:3",
        "edit:",
        "edit:0,5",
    ),
    *("uniform:10:l1", "ddim:4+", "ddim:4+ddim:2", "ddim:4,", "uniform:4+ddim:16"),
]


@pytest.mark.parametrize("spec", ["", "bac:10:5 ", *NO_METHODS])
def test_what_is_no_method(spec: str) -> None:
    with pytest.raises(ValueError, match=r"no such method; there are\nplain .*\n"):
        parse_method(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("uniform:0", "num_caches must be at least 1, got 0"),
        ("threshold:0", "interval must be at least 1"),
        ("ddim:0", "ddim_steps must be at least 1"),
        ("unified:5:euclid", "unknown metric 'euclid'"),
    ],
)
def test_impossible_numbers_and_metrics(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_method(spec)


@pytest.mark.parametrize(
    ("spec", "cache_mode"),
    [
        *(("plain", "original"), ("lossless", "original"), ("ddim:4+uniform:2", "threshold"), ("edit:0-2", "edit")),
        *(("unified:3", "edit"), ("blockwise:3", "optimal"), ("bac:3:1", "optimal")),
    ],
)
def test_what_bacinfers_records_call_a_method(spec: str, cache_mode: str) -> None:
    assert parse_method(spec).cache_mode == cache_mode
