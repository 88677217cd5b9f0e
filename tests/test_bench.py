import json

import pytest
import torch

from flipproof import bench as bench_module
from flipproof.bench import bench, medians
from flipproof.errors import ConfigError
from flipproof.plan.gpus import GPUS, benched


def test_medians_take_turns_and_are_the_middle_of_the_rounds(monkeypatch):
    clock = iter([0.0, 0.001, 0.0, 0.010, 0.0, 0.003, 0.0, 0.030, 0.0, 0.002, 0.0, 0.020])
    monkeypatch.setattr(bench_module.time, "perf_counter", lambda: next(clock))
    calls = []
    times = medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, "cpu", rounds=3)
    assert times == pytest.approx({"a": 2.0, "b": 20.0})
    assert "".join(calls) == "aabb" + "ab" * 3


def test_the_tables_and_the_file_say_the_same(monkeypatch, tmp_path):
    def run_once(functions, device):
        for function in functions.values():
            function()
        return {name: 2.5 * (len(functions) - i) for i, name in enumerate(functions)}

    real = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, **kw: real(*[_small(s) for s in shape], **kw))
    monkeypatch.setattr(bench_module, "medians", run_once)
    told = []
    text = bench("cpu", tmp_path / "new" / "bench.json", told.append)
    assert told == [text]
    written = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert written["about"]["backend"] == "reference (NumPy)"
    for row in written["rows"]:
        line = next(line for line in text.splitlines() if line.strip().startswith(f"{row['name']} "))
        assert f"{row['ratio']:.3f}" in line
    firsts = {row["table"]: row["ms"] for row in reversed(written["rows"])}
    assert all(row["ratio"] == pytest.approx(row["ms"] / firsts[row["table"]]) for row in written["rows"])
    assert {"clone()", "faulty LoRA", "clean LoRA (PEFT)"} <= {row["name"] for row in written["rows"]}


def _small(size):
    if isinstance(size, tuple):
        return tuple(min(s, 1024) for s in size)
    return min(size, 1024)


def test_speeds_are_what_is_done_over_its_time(monkeypatch):
    done = {}

    def run_once(functions, device):
        done.update((name, function()) for name, function in functions.items())
        return {"product": 0.5, "copy": 4.0}

    torch.manual_seed(0)
    a, b = (torch.randn(64, 64, dtype=torch.bfloat16) for _ in range(2))
    torch.manual_seed(0)
    monkeypatch.setattr(bench_module, "medians", run_once)
    found = bench_module.speeds("cpu", side=64, copied=1000)
    assert found == {"product_tflop_s": 2 * 64**3 / 0.5e-3 / 1e12, "copy_gb_s": 2 * 1000 / 4e-3 / 1e9}
    assert torch.equal(done["product"], a @ b)
    assert done["copy"].numel() == 1000
    monkeypatch.undo()
    assert all(speed > 0 for speed in bench_module.speeds("cpu", side=64, copied=1000).values())


def test_what_a_gpu_measured_is_what_plan_reads(monkeypatch, tmp_path):
    measured = {"product_tflop_s": 400.0, "copy_gb_s": 1800.0}
    for name in ("_operations", "_small", "_layers"):
        monkeypatch.setattr(bench_module, name, lambda device: [])
    monkeypatch.setattr(bench_module, "speeds", lambda device: measured)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    text = bench("cuda", tmp_path / "bench.json")
    assert "a large product 400 TFLOP/s in bfloat16, a copy 1,800 GB/s" in text
    gpu = benched(GPUS["a100-80"], tmp_path / "bench.json")
    assert gpu.peak(2) == pytest.approx(400e12 / 0.8)
    assert gpu.bandwidth == pytest.approx(1800 / 0.9)


def test_bad_input_is_told_before_anything_runs(tmp_path):
    (tmp_path / "there.json").touch()
    with pytest.raises(ConfigError, match="exists already"):
        bench("cpu", tmp_path / "there.json")
    with pytest.raises(ConfigError, match=r"there\.json is not a directory"):
        bench("cpu", tmp_path / "there.json" / "below.json")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no GPU"):
            bench("cuda")
