import gzip
import json

import torch
from torch import nn

from flipproof.train.trace import StepProfiler


def profile_steps(run_dir, first_step, steps):
    """Train for some steps, of which the n-th multiplies n rows."""
    model = nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    profiler = StepProfiler(run_dir, rank=1, first_step=first_step)
    for step in range(first_step + 1, first_step + steps + 1):
        model(torch.ones(step, 8)).sum().backward()
        optimizer.step()
        profiler.step()
    profiler.close()
    profiler.close()  # nothing is left to do


def events(run_dir):
    with gzip.open(run_dir / "profile" / "trace-rank1.json.gz", "rt") as file:
        return json.load(file)["traceEvents"]


def rows_multiplied(run_dir):
    """Rows of each product that the trace holds, in order of time."""
    found = [event for event in events(run_dir) if event.get("name") == "aten::addmm"]
    return [event["args"]["Input Dims"][1][0] for event in sorted(found, key=lambda event: event["ts"])]


def test_the_third_and_fourth_step_are_in_the_trace_with_shapes_and_their_numbers(tmp_path):
    profile_steps(tmp_path, first_step=10, steps=6)
    assert rows_multiplied(tmp_path) == [13, 14]
    names = {event.get("name") for event in events(tmp_path)}
    assert {"aten::linear", "autograd::engine::evaluate_function: AddmmBackward0"} <= names
    assert {name for name in names if name and name.startswith("ProfilerStep")} == {
        "ProfilerStep#13",
        "ProfilerStep#14",
    }


def test_a_short_run_writes_what_there_is(tmp_path):
    profile_steps(tmp_path, first_step=0, steps=3)
    assert rows_multiplied(tmp_path) == [3]


def test_a_run_too_short_for_a_trace_ends_well(tmp_path):
    profile_steps(tmp_path, first_step=0, steps=1)
    assert not list(tmp_path.rglob("*.gz"))


def test_after_the_profiled_steps_the_profiler_is_off(tmp_path):
    profiler = StepProfiler(tmp_path, rank=0, first_step=0)
    enabled = []
    for _ in range(4):
        profiler.step()
        enabled.append(torch.autograd.profiler._is_profiler_enabled)
    assert enabled == [False, True, True, False]
    written = (tmp_path / "profile" / "trace-rank0.json.gz").read_bytes()
    profiler.step()
    profiler.close()
    assert (tmp_path / "profile" / "trace-rank0.json.gz").read_bytes() == written
