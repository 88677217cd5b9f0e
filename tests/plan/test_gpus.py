import json

import pytest
from planned import config_of

from flipproof.cli.main import main
from flipproof.errors import ConfigError
from flipproof.plan.estimate import Request, make_plan
from flipproof.plan.gpus import GPUS, benched, gpu_called, gpu_named
from flipproof.plan.recommend import recommend


def test_every_gpu_has_a_peak_and_a_name_that_cuda_knows():
    assert {name: gpu.peak(2) / 1e12 for name, gpu in GPUS.items()} == {
        "a100-40": 312.0,
        "a100-80": 312.0,
        "h100": 989.4,
        "h200": 989.4,
        "b200": 2250.0,
        "l40s": 362.0,
        "4090": 165.2,
        "5090": 209.5,
    }
    assert gpu_called("H100") is gpu_called("nvidia-h100") is GPUS["h100"]


@pytest.mark.parametrize(
    ("cuda", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("", None),
    ],
)
def test_a_gpu_is_known_by_what_cuda_calls_it_whole(cuda, name):
    assert gpu_named(cuda) == name


def write(path, hardware="NVIDIA H200", product=788.0, copy=4300.0, **more):
    """A record as flipproof bench writes it, by hand, and so without a hash."""
    values = {
        "about": {"hardware": hardware, "backend": "triton", "date": "2026-11-27"},
        "speeds": {"product_tflop_s": product, "copy_gb_s": copy},
        "rows": [{"table": "t", "name": "clone()", "ms": 0.2, "ratio": 1.0, "gib_held": None}],
    }
    path.write_text(json.dumps(values | more))
    return path


def test_half_the_speeds_take_twice_the_time(tmp_path):
    config = config_of("8B", 2)

    def planned(product, copy):
        return make_plan(config, Request(1, gpu="h200", bench=write(tmp_path / "b.json", product=product, copy=copy)))

    whole, half = planned(800.0, 4000.0), planned(400.0, 1000.0)
    assert half.pace.products == pytest.approx(2 * whole.pace.products)
    assert half.pace.flips == pytest.approx(4 * whole.pace.flips)
    assert half.memory == whole.memory
    assert half.gpu.link == GPUS["h200"].link


def test_what_an_h100_and_an_h200_measured_plans_what_their_table_does(tmp_path):
    for name, hardware, product, copy in (
        ("h100", "NVIDIA H100 80GB HBM3", 798.0, 3000.0),
        ("h200", "NVIDIA H200", 788.0, 4300.0),
    ):
        path = write(tmp_path / "b.json", hardware, product, copy)
        by_bench, by_table = (
            make_plan(config_of("8B", 2), Request(1, gpu=name, bench=bench)).pace.tokens_per_second
            for bench in (path, None)
        )
        assert by_bench == pytest.approx(by_table, rel=0.02)


def test_recommend_counts_with_the_bench_too(tmp_path):
    config, path = config_of("8B", 2), write(tmp_path / "b.json", product=78.8)
    (slow, *_), (fast, *_) = (recommend(config, Request(1, gpu="h200", bench=bench)) for bench in (path, None))
    assert slow.plan.pace.products > 5 * fast.plan.pace.products


def test_a_gpu_that_the_table_lacks_has_its_own_name_and_the_memory_and_link_of_the_one_named(tmp_path):
    gpu = benched(GPUS["h200"], write(tmp_path / "b.json", "NVIDIA H20", 120.0, 3600.0))
    assert (gpu.name, gpu.memory, gpu.link) == ("H20", GPUS["h200"].memory, GPUS["h200"].link)
    assert (gpu.peak(2), gpu.bandwidth) == (pytest.approx(150e12), pytest.approx(4000))


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (None, "No such file or directory"),
        ("half of", "it holds no speeds of a GPU; what flipproof bench --to FILE writes on one is allowed"),
        ("[1, 2]", "it holds no speeds of a GPU"),
        ('{"about": {"hardware": "x86_64 CPU"}, "speeds": null, "rows": []}', "it holds no speeds of a GPU"),
        ('{"about": {"hardware": "NVIDIA H200"}, "rows": []}', "it holds no speeds of a GPU"),  # an earlier version's
        ({"product": 0.0}, "0 TFLOP/s and 4300 GB/s; speeds above 0 are allowed"),
        ({"copy": "fast"}, "it holds no speeds of a GPU"),
        ({"blake2b": "0123456789abcdef"}, "it holds no speeds of a GPU"),  # damaged
        ({"hardware": "NVIDIA H100 80GB HBM3"}, "it was measured on NVIDIA H100 80GB HBM3; say --gpu h100"),
    ],
)
def test_a_file_that_is_no_such_bench_is_one_line(written, said, tmp_path, capsys):
    path = tmp_path / "b.json"
    if isinstance(written, dict):
        write(path, **written)
    elif written is not None:
        path.write_text(written)
    with pytest.raises(ConfigError) as caught:
        benched(GPUS["h200"], path)
    (line,) = caught.value.problems
    assert line.startswith(f"--bench {path}: {said}")
    for more in ([], ["--recommend"]):
        assert main(["plan", "--config", "8b", "--gpus", "1", "--gpu", "h200", "--bench", str(path), *more]) != 0
        printed = capsys.readouterr()
        assert line in printed.err
        assert printed.out == ""
