"""What ``flipproof plan`` says of a training beside what the training measured."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

from flipproof.errors import ConfigError
from flipproof.plan.estimate import Request, plan_anyway
from flipproof.plan.gpus import gpu_named
from flipproof.plan.picture import memory_bars
from flipproof.report.read import Logged, Started
from flipproof.report.section import Drawing, Section
from flipproof.report.table import Table


def section(run: Started, rows: Sequence[Logged]) -> Section | None:
    """None for what plan does not know: the GPU, the kind of model, or its shape where only a network would say it.

    Args:
        rows: what was logged.
    """
    gpu, model = gpu_named(run.gpu), run.config.model
    known = model.flavor is not None or (model.hf_model_path and Path(model.hf_model_path).exists())
    if gpu is None or not known:
        return None
    try:
        plan = plan_anyway(run.config, Request(run.gpus // run.nodes, run.nodes, gpu))
    except ConfigError:  # a kind of model, or of training, that it does not count
        return None
    compared, fitted = [], ""
    if peaks := [row.peak_memory_gib for row in rows if row.peak_memory_gib is not None]:
        compared.append(_row("peak memory (GiB)", plan.memory.allocated / 2**30, max(peaks)))
    if rates := [row.tokens_per_second for row in rows if row.tokens_per_second]:
        compared.append(_row("tokens/s", plan.pace.tokens_per_second, median(rates)))
        if efficiency := plan.efficiency_at(median(rates)):
            fitted = f" With --efficiency {efficiency:.3g} it says the tokens per second that there were."
    if not compared:
        return None
    parts = [[name, size / 2**30] for name, size in plan.memory.parts.items()]
    return Section(
        "planned",
        "Memory and speed: planned and measured",
        f"What flipproof plan says of this config on {plan.spread.gpus} x {plan.gpu.name}, beside what was logged: "
        "PyTorch's largest peak of any device, and the median of tokens per second. Products are taken to reach "
        f"{plan.request.efficiency:.0%} of the GPU's dense peak.{fitted} Parts are those {plan.memory.when}, when "
        "memory is at its most; the picture adds to them what CUDA holds and what lies idle between allocations.",
        [
            Table("planned.csv", ["", "planned", "measured", "planned over measured"], compared, by_row=True),
            Table("planned-parts.csv", ["part", "GiB"], parts, title="Memory of each GPU by part, as planned"),
        ],
        [Drawing(partial(memory_bars, plan))],
    )


def _row(what: str, planned: float, measured: float) -> list[str | float]:
    return [what, planned, measured, f"{planned / measured - 1:+.1%}" if measured else "–"]
