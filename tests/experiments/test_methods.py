"""The grammar of methods."""

from __future__ import annotations

import pytest

from bacinfer.core.sampler import Sampler
from bacinfer.core.warm_start import WarmStart
from bacinfer.experiments.method import PLAIN, Method, parse_method, parse_methods


def warm(*timesteps: int, kind: str = "ddim", distance: float | None = None) -> WarmStart:
    return WarmStart(Sampler(kind, timesteps), max_disagreement=distance)


@pytest.mark.parametrize(
    ("spec", "method", "label"),
    [
        ("plain", PLAIN, "plain"),
        ("ddim:10", Method(sampler=Sampler("ddim", 10)), "DDIM 10"),
        ("uniform:10", Method("uniform", num_caches=10), "uniform 10"),
        ("threshold:5", Method("threshold", interval=5), "every 5"),
        ("edit:0-20-40", Method("edit", steps=(0, 20, 40)), "steps 0 20 40"),
        ("unified:10", Method("unified", num_caches=10, metric="cosine"), "unified ACS 10"),
        ("blockwise:8:l1", Method("bac", num_caches=8, num_bu_blocks=0, metric="l1"), "block-wise ACS 8 (l1)"),
        ("bac:10:5", Method("bac", num_caches=10, num_bu_blocks=5, metric="cosine"), "BAC 10, BU 5"),
        ("bac:10:5:mse", Method("bac", num_caches=10, num_bu_blocks=5, metric="mse"), "BAC 10, BU 5 (mse)"),
        (
            "ddim:16+bac:8:5",
            Method("bac", num_caches=8, num_bu_blocks=5, metric="cosine", sampler=Sampler("ddim", 16)),
            "DDIM 16 + BAC 8, BU 5",
        ),
        ("own:10", Method(sampler=Sampler("own", 10)), "own 10"),
        ("ddim:5:0.5", Method(sampler=Sampler("ddim", 5, 0.5)), "DDIM 5, eta 0.5"),
        ("dpm:5", Method(sampler=Sampler("dpm", 5)), "DPM++ 5"),
        ("ddim:40-20-0", Method(sampler=Sampler("ddim", (40, 20, 0))), "DDIM 40 20 0"),
        ("own:10+lossless", Method("lossless", sampler=Sampler("own", 10)), "own 10 + lossless"),
        (
            "dpm:6+warm:40:3",
            Method(sampler=Sampler("dpm", 6), warm_start=warm(40, 20, 0, kind="dpm")),
            "DPM++ 6 + warm 40 20 0",
        ),
        ("warm:40:3", Method(warm_start=warm(40, 20, 0)), "warm 40 20 0"),
        ("warm:40-10-0", Method(warm_start=warm(40, 10, 0)), "warm 40 10 0"),
        (
            "own:10+warm:40:3:0.2+uniform:2",
            Method("uniform", num_caches=2, sampler=Sampler("own", 10), warm_start=warm(40, 20, 0, distance=0.2)),
            "own 10 + warm 40 20 0 + uniform 2",
        ),
        ("sens:8", Method("sens", budget=8), "sensitivity 8"),
        ("own:20+sens:2.5", Method("sens", budget=2.5, sampler=Sampler("own", 20)), "own 20 + sensitivity 2.5"),
        ("ddim:16+uniform:8", Method("uniform", num_caches=8, sampler=Sampler("ddim", 16)), "DDIM 16 + uniform 8"),
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
    assert parse_method("warm:40-20-0").spec == "warm:40:3"
    assert parse_method("ddim:8:0").spec == "ddim:8"
    assert parse_method("sens:8.0").spec == "sens:8"
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
    *(
        "sens",
        "sens:",
        "sens:8:l1",
        "sens:8:5",
        "sens:-1",
        "uniform:10:l1",
        "ddim:4+",
        "ddim:4+ddim:2",
        "ddim:4,",
        "uniform:4+ddim:16",
    ),
]


@pytest.mark.parametrize("spec", ["", "bac:10:5 ", *NO_METHODS])
def test_what_is_no_method(spec: str) -> None:
    with pytest.raises(ValueError, match=r"(no such method|no sampler|no warm start); there are\nA method .*\n"):
        parse_method(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("uniform:0", "num_caches must be at least 1, got 0"),
        ("sens:0.5", "budget must be at least 1, got 0.5"),
        ("warm:40:3+sens:2", "goes with trajectories that start from noise"),
        ("threshold:0", "interval must be at least 1"),
        ("ddim:0", "a sampler takes at least one step, got 0"),
        ("own:10:0.5", "eta is the noise of ddim and dpm"),
        ("ddim:10:1.5", "eta is the noise of ddim and dpm"),
        ("ddim:0-20", "timesteps must be integers >= 0 in descending order"),
        ("warm:2:9", "there are no 9 timesteps from 2 to 0"),
        ("warm:40:3:0", "max_disagreement must be above 0"),
        ("warm:40:3+bac:2:1", "goes with trajectories that start from noise"),
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
        *(("unified:3", "edit"), ("blockwise:3", "optimal"), ("bac:3:1", "optimal"), ("sens:3", "optimal")),
    ],
)
def test_what_bacinfers_records_call_a_method(spec: str, cache_mode: str) -> None:
    assert parse_method(spec).cache_mode == cache_mode
