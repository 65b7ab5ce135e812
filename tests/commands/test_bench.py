"""The command that times a policy on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bacinfer.commands.bench import main
from bacinfer.measurement import bench as bench_module


@pytest.fixture
def command(checkpoint: Path) -> list[str]:
    return [f"--checkpoint={checkpoint}", "--calls=2"]


@pytest.fixture
def _known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def made_up(device: torch.device) -> bench_module.Machine:
        return bench_module.Machine("a computer", "cpu", 1, "", None, "3", "2", "1", 1e9, 4e9, 1e9)

    monkeypatch.setattr(bench_module, "measure_machine", made_up)


def test_a_table_of_engines_precisions_and_plans(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, f"--output_dir={tmp_path}", "--methods=lossless,own:4", "--batches=1,3"]) == 0
    printed = capsys.readouterr().out
    data = json.loads((tmp_path / "bench.json").read_text())
    found = [(t["method"], t["engine"], t["precision"], t["batch"]) for t in data["timings"]]
    one = [("plain", None, None)]
    ways = [("eager", None), ("onednn", None), *(("fused", precision) for precision in (None, "bf16", "int8"))]
    one += [(method, *how) for method in ("lossless", "own:4") for how in ways]
    assert found == [(*variant, batch) for batch in (1, 3) for variant in one]
    for timing in data["timings"]:
        assert 0 < timing["p50"] <= timing["p99"]
        assert (timing["bandwidth_share"] is None) == (timing["engine"] != "fused")
        assert (timing["product_share"] is None) == (timing["engine"] != "fused" or timing["precision"] == "int8")
    plain = {t["batch"]: t["p50"] for t in data["timings"] if t["engine"] is None}
    assert all(t["speedup"] == pytest.approx(plain[t["batch"]] / t["p50"]) for t in data["timings"])
    assert data["machine"]["product_rate"] > 1e9
    assert data["machine"]["bandwidth"] > 1e8
    assert "GFLOP/s in single precision" in printed
    table = (tmp_path / "bench.md").read_text()
    assert sum(line.startswith("|") for line in table.splitlines()) == 2 + len(found)


@pytest.mark.usefixtures("_known_machine")
def test_shares_are_of_the_machine_in_the_variants_precision(command: list[str], tmp_path: Path) -> None:
    assert main([*command, f"--output_dir={tmp_path}", "--methods=lossless", "--engines=fused"]) == 0
    _, single, half, byte = json.loads((tmp_path / "bench.json").read_text())["timings"]
    for timing, rate, size in ((single, 1e9, 4), (half, 4e9, 2)):
        # each weight is read for 16 rows, and multiplied and added with each
        weights = timing["bandwidth_share"] * timing["p50"] * 1e9 / size
        assert timing["product_share"] == pytest.approx(2 * 16 * weights / timing["p50"] / rate)
    assert byte["bandwidth_share"] * byte["p50"] == pytest.approx(single["bandwidth_share"] * single["p50"] / 4)
    assert single["product_share"] * single["p50"] == pytest.approx(4 * half["product_share"] * half["p50"])


@pytest.mark.usefixtures("_known_machine")
def test_what_cannot_run_is_named(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--methods=lossless", "--engines=fused,cuda_graph"]) == 0
    assert "lossless, cuda_graph: engine 'cuda_graph' cannot run this policy" in capsys.readouterr().out
    assert main([*command, "--methods=lossless", "--engines=cuda_graph"]) == 2
    assert "no engine can run any of the plans: engine 'cuda_graph' cannot" in capsys.readouterr().err


@pytest.mark.usefixtures("_known_machine")
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--engines=rocket", "there is no rocket; there are eager, onednn, fused"),
        ("--batches=0", "expected at least one, of at least one observation each"),
        ("--calls=0", "the latency of 0 calls"),
        ("--threads=0", "--threads 0: expected at least one"),
        ("--methods=unified:99", "num_caches must be an integer in 1..10"),
    ],
)
def test_mistakes_are_sentences(
    command: list[str], argument: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--methods=lossless", argument]) == 2
    assert message in capsys.readouterr().err
