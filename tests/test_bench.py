import json

import pytest
import torch

from flipproof import bench as bench_module
from flipproof.bench import bench, medians
from flipproof.errors import ConfigError


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


def test_bad_input_is_told_before_anything_runs(tmp_path):
    (tmp_path / "there.json").touch()
    with pytest.raises(ConfigError, match="exists already"):
        bench("cpu", tmp_path / "there.json")
    with pytest.raises(ConfigError, match=r"there\.json is not a directory"):
        bench("cpu", tmp_path / "there.json" / "below.json")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no GPU"):
            bench("cuda")
