"""What flips cost on this machine: the operation beside ``clone()``, the layer beside clean ones, as ratios of one run.

Every time is a median. Variants that are compared take turns, so that a machine that slows down slows them all. On a
GPU times are those of the device, L2 flushed before each repetition; on a CPU those of the clock, sizes being smaller.
"""

import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flipproof.errors import ConfigError
from flipproof.faults.draw import FaultData
from flipproof.faults.guard import guard_of, limits_of
from flipproof.faults.inject import inject
from flipproof.faults.op import BACKENDS
from flipproof.faults.spec import BitFlipSpec, LoraSpec
from flipproof.files import check_new
from flipproof.records import write_new_record

_RANK = 32


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    table: str
    name: str
    ms: float
    ratio: float
    """Time over that of the table's first line."""
    gib_held: float | None = None
    """Of a layer: memory that forward leaves allocated for backward, its output included."""


def bench(device: str | None = None, to: Path | None = None, tell: Callable[[str], None] | None = None) -> str:
    """Measure, and return the tables.

    Args:
        device: "cpu" or "cuda". Default: the GPU where there is one.
        to: a JSON file to write as well, which must not exist.
        tell: called with the tables before anything is written to ``to``.

    Raises:
        ConfigError: where there is no such device, or ``to`` exists or could not; before anything is measured.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(["--device cuda: torch sees no GPU here; flipproof doctor says more"])
    if to is not None:
        check_new(to, "--to", "file")
    measured = speeds(device) if device == "cuda" else None
    rows = [*_operations(device), *_small(device), *_layers(device)]
    machine = about(device)
    said = tables(machine, rows)
    if measured:
        product, copy = measured["product_tflop_s"], measured["copy_gb_s"]
        said += f"\n\na large product {product:.0f} TFLOP/s in bfloat16, a copy {copy:,.0f} GB/s (read and written)"
    if tell:
        tell(said)
    if to is not None:
        write_new_record(to, {"about": machine, "speeds": measured, "rows": [vars(row) for row in rows]}, "--to")
    return said


def about(device: str) -> dict[str, str]:
    """Hardware, date and versions, for whoever reads the figures later."""
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    found = {"hardware": hardware, "backend": BACKENDS[device], "date": date.today().isoformat()}
    for package in ("torch", "triton", "peft", "mase-triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


# -- timing -----------------------------------------------------------------------------------------------------------


def medians(functions: dict[str, Callable[[], Any]], device: str, rounds: int = 5) -> dict[str, float]:
    """Median milliseconds of each function; the functions take turns."""
    once = _gpu_ms if device == "cuda" else _cpu_ms
    for function in functions.values():  # compilation and first touches stay out
        function()
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(once(function))
    return {name: statistics.median(values) for name, values in times.items()}


def _gpu_ms(function: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(function, warmup=5, rep=30, return_mode="median"))


def _cpu_ms(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return (time.perf_counter() - begin) * 1e3


def _host_us(function: Callable[[], Any]) -> float:
    """Microseconds until an asynchronous call is back, the device being idle."""
    times = []
    for _ in range(200):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[50:]) * 1e6


def rows_of(table: str, times: dict[str, float], held: dict[str, float] | None = None) -> list[Row]:
    """The rows of a table: name -> milliseconds, beside those of the first; and the GiB held, where they are known."""
    first = next(iter(times.values()))
    return [Row(table, name, ms, ms / first, held[name] if held else None) for name, ms in times.items()]


# -- the machine -------------------------------------------------------------------------------------------------------


def speeds(device: str, side: int = 8192, copied: int = 2**31) -> dict[str, float]:
    """What ``flipproof plan --bench`` counts with: 10¹² FLOPs a second of a product of bfloat16 matrices of
    (side, side), and 10⁹ bytes a second that a copy of so many bytes reads and writes."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.zeros(copied, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    functions = {"product": lambda: torch.matmul(a, b, out=product), "copy": lambda: target.copy_(source)}
    ms = medians(functions, device)
    return {"product_tflop_s": 2 * side**3 / ms["product"] / 1e9, "copy_gb_s": 2 * copied / ms["copy"] / 1e6}


# -- the operation ----------------------------------------------------------------------------------------------------


def _draw(p: float, t: float | Tensor | None, device: str) -> tuple[Any, ...]:
    rates = torch.tensor([p, p], dtype=torch.float64)
    limits = None if t is None else limits_of(guard_of(t), torch.bfloat16)
    if limits is not None and limits.dim():
        limits = limits.to(device)
    return rates, limits, torch.tensor(7, device=device), torch.tensor(3, device=device), 0


def _operations(device: str) -> list[Row]:
    shape = (28672, 8192) if device == "cuda" else (4096, 8192)
    x = torch.randn(shape, device=device, dtype=torch.bfloat16)
    y = x.clone()
    a = torch.randn(_RANK, shape[1], device=device) * 0.01
    b = torch.randn(shape[0], _RANK, device=device) * 0.01
    ops = torch.ops.flipproof

    def out_of_place(p: float, t: float | Tensor | None = 100.0) -> Callable[[], Any]:
        draw = _draw(p, t, device)
        return lambda: ops.flip(x, *draw)

    def in_place(p: float) -> Callable[[], Any]:
        draw = _draw(p, None, device)
        return lambda: ops.flip_(y, *draw)

    features, rows = torch.full((x.shape[1],), 100.0), torch.full((len(x), 1), 256.0)
    merge_draw, by_row = _draw(2**-16, 256.0, device), _draw(2**-16, rows, device)
    functions: dict[str, Callable[[], Any]] = {"clone()": x.clone}
    functions |= {f"flip, guard, p = 2^-{n}": out_of_place(2.0**-n) for n in (24, 16, 14, 12, 11, 10, 8, 7)}
    functions |= {f"flip, guard, p = {p}": out_of_place(p) for p in (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.49, 0.4999, 0.5)}
    functions["flip, no guard, p = 2^-16"] = out_of_place(2**-16, None)
    functions["flip, guard by feature, p = 2^-16"] = out_of_place(2**-16, features)
    functions["flip, guard by row, p = 2^-16"] = out_of_place(2**-16, rows)
    functions |= {f"in place, p = 2^-{n}": in_place(2.0**-n) for n in (24, 16, 12)}
    functions["merge, flip, guard, r = 32, p = 2^-16"] = lambda: ops.merge(x, a, b, 1.0, *merge_draw)
    functions["merge, flip, guard by row, r = 32, p = 2^-16"] = lambda: ops.merge(x, a, b, 1.0, *by_row)
    functions |= _mase(x, device)
    return rows_of(f"the operation, bfloat16, {shape[0]} x {shape[1]}, p in both fields", medians(functions, device))


def _mase(x: Tensor, device: str) -> dict[str, Callable[[], Any]]:
    """The reference kernel, where it is installed."""
    if device != "cuda":
        return {}
    try:
        from mase_triton.random_bitflip.functional import random_bitflip_fn
    except ImportError:
        return {}

    def flip(n: int) -> Callable[[], Any]:
        return lambda: random_bitflip_fn(x, n, n, 0, 0, 100.0)

    return {f"mase-triton, p = 2^-{n}": flip(n) for n in (16, 24)}


def _small(device: str) -> list[Row]:
    if device != "cuda":
        return []
    x = torch.randn(2048, 1024, device=device, dtype=torch.bfloat16)
    draw = _draw(2**-16, 100.0, device)

    def flip() -> Tensor:
        y: Tensor = torch.ops.flipproof.flip(x, *draw)
        return y

    times = medians({"clone()": x.clone, "flip, guard, p = 2^-16": flip}, device)
    host = {name: _host_us(function) / 1e3 for name, function in (("clone()", x.clone), ("flip", flip))}
    return [
        *rows_of("a small tensor, bfloat16, 2048 x 1024, time on the device", times),
        *rows_of("the same, time until the call is back", host),
    ]


# -- the layer --------------------------------------------------------------------------------------------------------


class _Root(nn.Module):
    def __init__(self, columns: int, rows: int, device: str) -> None:
        super().__init__()
        self.linear = nn.Linear(columns, rows, bias=False, device=device, dtype=torch.bfloat16)
        self.linear.weight.requires_grad_(False)


def _clean(columns: int, rows: int, device: str) -> nn.Module:
    return _Root(columns, rows, device).linear


def _faulty(
    columns: int, rows: int, device: str, exact: bool = True, faults: bool = True, by_channel: bool = False
) -> nn.Module:
    root = _Root(columns, rows, device)
    p = 2**-16
    spec = BitFlipSpec(
        *(p, p, 256.0),  # w_p_exp, w_p_frac, w_zero_out_t
        *(p, p, 8192.0),  # and of x
        exact_gradient=exact,
    )
    inject(root, spec if faults else BitFlipSpec(), LoraSpec(r=_RANK, lora_alpha=_RANK))
    if by_channel:
        layer: Any = root.linear
        layer.x_fault = FaultData(spec.x, torch.full((columns,), 8192.0, device=device))
        layer.w_fault = FaultData(spec.w, torch.full((rows, 1), 256.0, device=device))
    return root.linear


def _peft(columns: int, rows: int, device: str) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    root = _Root(columns, rows, device)
    inject_adapter_in_model(LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=["linear"]), root)
    layer = root.linear
    return layer.to(torch.bfloat16)  # adapters too, which is what makes PEFT fastest


def _layers(device: str) -> list[Row]:
    rows = []
    for tokens, columns, out in ((4096, 8192, 28672), (4096, 4096, 4096)) if device == "cuda" else ((512, 1024, 1024),):
        shape = (columns, out, device)
        layers = _with_peft(shape)
        layers["clean nn.Linear, frozen"] = _clean(*shape)
        layers["faulty LoRA"] = _faulty(*shape)
        layers["faulty LoRA, guards by channel"] = _faulty(*shape, by_channel=True)
        layers["faulty LoRA, exact_gradient = false"] = _faulty(*shape, exact=False)
        layers["our LoRA without faults"] = _faulty(*shape, faults=False)
        x = torch.randn(tokens, columns, device=device, dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn(tokens, out, device=device, dtype=torch.bfloat16)
        for layer in layers.values():
            for name, parameter in layer.named_parameters():
                if "lora_B" in name:  # not zero, as in training
                    nn.init.normal_(parameter, std=0.01)
        title = (
            f"the layer, bfloat16, {tokens} tokens, {columns} -> {out}, r = {_RANK}, p = 2^-16, forward and backward"
        )
        steps = {name: _step(layer, x, grad) for name, layer in layers.items()}
        if device != "cuda":
            rows += rows_of(title, medians(steps, device))
            continue
        for layer in layers.values():
            layer.compile(fullgraph=True)
        held = {name: _held_gib(layer, x) for name, layer in layers.items()}
        rows += rows_of(f"{title}, compiled", medians(steps, device), held)
        graphs = {name: _graph(step) for name, step in steps.items()}
        rows += rows_of(f"{title}, compiled, as CUDA graphs: the device alone", medians(graphs, device))
    return rows


def _with_peft(shape: tuple[int, int, str]) -> dict[str, nn.Module]:
    """PEFT's layer, where PEFT is installed, to compare with."""
    try:
        return {"clean LoRA (PEFT)": _peft(*shape)}
    except ImportError:
        return {}


def _step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    def step() -> None:
        x.grad = None
        for parameter in layer.parameters():
            parameter.grad = None
        layer(x).backward(grad)

    return step


def _graph(step: Callable[[], None]) -> Callable[[], None]:
    """The step, captured; what it costs the host is then out of the figure."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _held_gib(layer: nn.Module, x: Tensor) -> float:
    layer(x)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = layer(x)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    del y
    return held / 2**30


# -- printing -------------------------------------------------------------------------------------------------------


def tables(machine: dict[str, str], rows: list[Row]) -> str:
    """All tables, for people, below a line ``about`` the machine."""
    lines = [", ".join(value if key in ("hardware", "date") else f"{key} {value}" for key, value in machine.items())]
    table = ""
    for row in rows:
        if row.table != table:
            table = row.table
            lines += ["", table, f"  {'':<40} {'ms':>9} {'x first':>8}" + (f" {'GiB held':>9}" if row.gib_held else "")]
        held = f" {row.gib_held:>9.3f}" if row.gib_held else ""
        lines.append(f"  {row.name:<40} {row.ms:>9.4f} {row.ratio:>8.3f}{held}")
    return "\n".join(lines)
