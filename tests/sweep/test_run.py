import json
import math
import os
import shutil
import time
import tomllib
from dataclasses import replace
from functools import partial

import preloaded
import pytest
import torch
from torch._dynamo.utils import counters

from flipproof.cli.main import main
from flipproof.config import load_config
from flipproof.errors import ConfigError
from flipproof.files import temporary_name
from flipproof.measure.evaluate import evaluate
from flipproof.models import recompute
from flipproof.models.load import byte_tokenizer
from flipproof.records import unsealed
from flipproof.sweep import run as sweep_run
from flipproof.sweep.run import sweep
from flipproof.sweep.store import SweepDirectory
from flipproof.sweep.table import resolved

GRID = {"p": "1e-4:1e-2:3", "sites": "w,wx", "layers": "all,block", "seeds": "2", "protection": "none,guard"}
FEWER = GRID | {"layers": "all"}
THRESHOLDS = {"w_zero_out_t": "0.5", "x_zero_out_t": "8"}


@pytest.fixture
def model_dir(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def settings(model_dir, bitflip=THRESHOLDS, **table):
    return load_config(
        [],
        {
            "model": {"hf_model_path": str(model_dir)},
            "training": {"seq_len": 32, "local_batch_size": 2},
            "data": {"source": "stdlib", "max_tokens": 20_000},
            "eval": {"num_samples": 4, "trials": 2},
            "bitflip": bitflip,
            "sweep": table,
        },
    )


def points(directory):
    """By id, without times, in the order in which they were written."""
    files = sorted((directory / "points").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    found = {}
    for path in files:
        point = json.loads(path.read_text())
        assert point.pop("seconds") >= 0
        assert path.name == f"{point['id'].replace('/', '-')}.json"
        found[point["id"]] = point
    return found


EVERY_BIT = {f"{operand}_p_{field}": 1e-3 for operand in "wx" for field in ("exp", "frac")}
W_EVERY_BIT = {"w_p_exp": 1e-3, "w_p_frac": 1e-3}


@pytest.mark.parametrize(
    ("table", "kept", "same_faults"),
    [
        ({"sites": "wx,w", "protection": "guard,none"}, {}, EVERY_BIT),
        ({"sites": "w,x", "protection": "guard"}, {"w_faults": "persistent"}, W_EVERY_BIT),
        (
            {"sites": "x,w", "bits": "20-24,sign", "protection": "secded+guard"},
            {"x_faults": "persistent"},
            {"x_p_bits": {"20-24": 1e-3}, "x_protection": "secded"},
        ),
        (
            {"sites": "w", "layers": "model.layers.1.,all", "bits": "exp", "protection": "parity+guard"},
            {},
            {"w_p_bits": {"exp": 1e-3}, "w_protection": "parity", "include_patterns": ["model.layers.1."]},
        ),
        (
            {"sites": "w,x", "protection": "tmr-sign+exp+guard"},
            {"w_p_row": 0.01, "row_bytes": 64},
            W_EVERY_BIT | {"w_protected_bits": ["sign", "exp"]},
        ),
        ({"sites": "head,w", "protection": "guard"}, {}, W_EVERY_BIT | {"sites": ["head"]}),
        ({"sites": "embedding,w", "protection": "guard"}, {}, W_EVERY_BIT | {"sites": ["embedding"]}),
        ({"sites": "kv,wx", "bits": "frac", "protection": "none"}, {}, {"kv_p_bits": {"frac": 1e-3}}),
    ],
)
def test_a_point_is_what_eval_says_of_the_same_faults(model_dir, tmp_path, table, kept, same_faults):
    """To the last digit, though the sweep's model has more faulty layers and had other faults before. The first value
    of each axis is compared."""
    thresholds = THRESHOLDS if "guard" in table["protection"] else {}
    sweep(settings(model_dir, thresholds | kept, p="1e-3,5e-2", seeds="2", **table), tmp_path / "sweep")
    measured = list(points(tmp_path / "sweep").values())
    first = {"p": 1e-3} | {axis: value.split(",")[0] for axis, value in table.items()}
    found = {point["seed"]: point["loss"] for point in measured if first.items() <= point.items()}
    config = settings(model_dir, thresholds)
    config = replace(config, bitflip=replace(config.bitflip, **kept, **same_faults))
    arms = evaluate(config)
    assert [found[1], found[2]] == list(arms["flipped"].trial_losses)
    assert found[1] != found[2]
    assert len(found) == 2
    header = unsealed((tmp_path / "sweep" / "sweep.json").read_text())
    assert header["clean"]["loss"] == arms["clean"].loss
    assert header["tokens"] == measured[0]["tokens"] == arms["clean"].tokens


def test_what_a_sweep_leaves_behind(model_dir, tmp_path):
    said = sweep(settings(model_dir, **GRID), tmp_path / "sweep")
    header = unsealed((tmp_path / "sweep" / "sweep.json").read_text())
    clean, guard = header.pop("clean"), header.pop("guard")
    assert header == {
        "model": str(model_dir),
        "dtype": "float32",
        "text": "held-out stdlib",
        "tokens": 4 * 31,
        "axes": {
            "p": [1e-4, 1e-3, 1e-2],
            "sites": ["w", "wx"],
            "layers": ["all", "model.layers.0.", "model.layers.1."],
            "bits": ["all"],
            "protection": ["none", "guard"],
            "seeds": 2,
        },
        "overhead": {"none": 0.0, "guard": 0.0},
        "format": "float32",
        "stored_bits": {"none": {"w": 32}, "guard": {"w": 32}},
        "voltages": None,
        "thresholds": {"w": 0.5, "x": 8.0},
        "planned": 72,
        "sequences_per_pass": 2,
    }
    arms = evaluate(settings(model_dir))
    assert (clean["loss"], guard["loss"]) == (arms["clean"].loss, arms["guard"].loss)
    assert clean["perplexity"] == pytest.approx(math.exp(clean["loss"]))
    measured = points(tmp_path / "sweep")
    cells = {(point["p"], point["sites"], point["layers"], point["protection"]) for point in measured.values()}
    assert len(cells) == 36
    assert {point["seed"] for point in measured.values()} == {1, 2}
    assert all(name == f"{name.split('/')[0]}/{point['seed']}" for name, point in measured.items())
    table = tomllib.loads((tmp_path / "sweep" / "sweep.toml").read_text())
    assert table["sweep"] == {"p": "1e-4:1e-2:3", "sites": "w,wx", "layers": "all,block", "bits": "all",
                              "protection": "none,guard", "seeds": 2}  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == [
        "claims", "points", "sweep.json", "sweep.toml"
    ]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "sweep" / "claims").iterdir()) == ["sweep.lock"]
    assert "72 of 72 points" in said
    assert f"flipproof report {tmp_path / 'sweep'}" in said


def test_a_killed_sweep_goes_on_to_the_same_points(model_dir, tmp_path):
    config = settings(model_dir, **FEWER)
    sweep(config, tmp_path / "whole")
    whole = points(tmp_path / "whole")
    for file in ("sweep.toml", "sweep.json"):
        text = (tmp_path / "whole" / file).read_text()
        (tmp_path / "killed").mkdir(exist_ok=True)
        (tmp_path / "killed" / file).write_text(text)
    there = [path.name for path in (tmp_path / "whole" / "points").iterdir()]
    for directory in ("points", "claims"):
        (tmp_path / "killed" / directory).mkdir()
    for name in there[: len(there) * 2 // 5]:
        shutil.copy2(tmp_path / "whole" / "points" / name, tmp_path / "killed" / "points")
    half = temporary_name(tmp_path / "killed" / "points" / there[-1])
    half.write_text('{"id')
    os.utime(half, (0, 0))
    (tmp_path / "killed" / "claims" / there[-1].replace(".json", ".lock")).write_text("")
    sweep(config, tmp_path / "killed")
    assert not half.exists()
    assert points(tmp_path / "killed") == whole

    def files():
        return {path.name: path.read_bytes() for path in (tmp_path / "killed" / "points").iterdir()}

    before = files()
    sweep(config, tmp_path / "killed")
    assert files() == before


def test_two_processes_share_a_sweep(model_dir, tmp_path, monkeypatch):
    config = settings(model_dir, **FEWER | {"p": "1e-5:1e-2:5"})
    (tmp_path / "run.toml").write_text(config.to_toml())
    other = preloaded.start(main, ["sweep", "--config", str(tmp_path / "run.toml"), "--to", str(tmp_path / "two")])
    while other.is_alive() and not any((tmp_path / "two").glob("points/*.json")):
        time.sleep(0.01)
    own = []
    write = SweepDirectory.write
    monkeypatch.setattr(SweepDirectory, "write", lambda *args: (own.append(args[1].id), write(*args)))
    sweep(config, tmp_path / "two")
    other.join()
    assert other.exitcode == 0
    shared = points(tmp_path / "two")
    assert len(own) < len(shared) == 40
    own.clear()
    sweep(config, tmp_path / "one")
    assert len(own) == 40
    assert shared == points(tmp_path / "one")
    assert (tmp_path / "two" / "sweep.json").read_text() == (tmp_path / "one" / "sweep.json").read_text()


@pytest.fixture
def guards_alone(monkeypatch):
    """torch.compile without its slow half, and with patience for next to nothing that is done otherwise."""
    recompute._recomputing.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(recompute, "_VARIANTS", 1)
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1):
        yield
    recompute._recomputing.cache_clear()


@pytest.mark.usefixtures("guards_alone")
def test_a_compiled_sweep_compiles_each_curve_once_whatever_its_rates(model_dir, tmp_path):
    """And measures what one that is not compiled does."""
    grid = {"sites": "w,wx", "layers": "all,block", "protection": "none,guard", "seeds": "1"}
    graphs = []
    for p in ("1e-3", "1e-4,1e-3,1e-2"):
        config = settings(model_dir, p=p, **grid)
        before = counters["stats"]["unique_graphs"]
        sweep(replace(config, training=replace(config.training, compile=True)), tmp_path / p)
        graphs.append(counters["stats"]["unique_graphs"] - before)
        torch._dynamo.reset()
    assert graphs[0] == graphs[1] > 1
    assert resolved(config).training.compile is None  # as an evaluation has it
    sweep(config, tmp_path / "plain")
    assert points(tmp_path / "plain") == points(tmp_path / p)


def test_a_budget_stops_and_the_next_start_goes_on(model_dir, tmp_path, monkeypatch):
    """On a clock where everything takes a second, so 10 minutes are a few hundred looks at it."""
    from flipproof.sweep import run as module

    ticks = iter(range(10**6))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(ticks)))
    grid = FEWER | {"seeds": "4"}
    said = sweep(settings(model_dir, **grid, budget_minutes="2"), tmp_path / "sweep")
    some = points(tmp_path / "sweep")
    assert 12 <= len(some) < 48
    assert {point["seed"] for point in list(some.values())[:12]} == {1}
    assert f"{len(some)} of 48 points" in said
    assert "left for the same command again" in said
    sweep(settings(model_dir, **grid), tmp_path / "sweep")
    every = points(tmp_path / "sweep")
    assert len(every) == 48
    assert some.items() <= every.items()


def test_voltages_are_carried(model_dir, tmp_path):
    (tmp_path / "chip.csv").write_text("voltage,ber,p_exp,p_frac\n0.8,0,0,0\n0.7,1e-3,1e-5,1e-2\n")
    table = {"voltage": str(tmp_path / "chip.csv"), "sites": "w", "seeds": "1", "protection": "none"}
    said = sweep(settings(model_dir, **table), tmp_path / "sweep")
    header = unsealed((tmp_path / "sweep" / "sweep.json").read_text())
    assert header["voltages"] == [[0.8, 0.0], [0.7, 1e-3]]
    measured = {point["voltage"]: point for point in points(tmp_path / "sweep").values()}
    assert measured[0.8]["loss"] == header["clean"]["loss"]
    assert (measured[0.7]["p"], measured[0.8]["p"]) == (1e-3, 0.0)
    arms = evaluate(settings(model_dir, {"w_p_exp": "1e-5", "w_p_frac": "1e-2"}))
    assert measured[0.7]["loss"] == arms["flipped"].trial_losses[0]
    assert said.splitlines()[0].split() == ["voltage", "p", "w"]
    (tmp_path / "chip.csv").write_text("voltage,ber\n0.8,0\n0.7,2e-3\n")
    with pytest.raises(ConfigError, match="holds another sweep, of voltages"):
        sweep(settings(model_dir, **table), tmp_path / "sweep")


def test_the_command_line(model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = ["--data.source", "stdlib", "--data.max_tokens", "20000", "--training.seq_len", "32"]
    few = ["--eval.num_samples", "2", "--seeds", "1", "--sites", "w,x"]
    (tmp_path / "run.toml").write_text('[sweep]\np = [1e-4, "1e-3:1e-2:2"]\nseeds = 3\nbits = 20\n')
    assert main(["sweep", str(model_dir), "--to", "out", "--config", "run.toml", *config, *few]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["p", "w", "x"]
    losses = {(point["sites"], point["p"]): point["loss"] for point in points(tmp_path / "out").values()}
    assert [[float(text) for text in row] for row in rows[1:4]] == [
        [p, *(pytest.approx(math.exp(losses[sites, p]), rel=1e-3) for sites in "wx")] for p in (1e-4, 1e-3, 1e-2)
    ]
    (tmp_path / "bad.toml").write_text("[sweep]\nseads = 3\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    start = ["sweep", str(model_dir), *config]
    for argv, words in (
        ([*start, "--to", "new"], "sweep.p is not set"),
        ([*start, "--to", "new", "--config", "bad.toml"], "sweep.seads: unknown key; did you mean seeds?"),
        ([*start, "--to", "new", "--p", "0.6"], "sweep.p = '0.6': a flip probability from 0 to 0.5"),
        ([*start, "--to", "new", "--p", "1e-3", "--sites", "v"], "sweep.sites = 'v'"),
        ([*start, "--to", "new", "--p", "1e-3", "--protection", "guard"], "the guard needs bitflip.w_zero_out_t"),
        ([*start, "--to", "new", "--p", "1e-3", "--layers", "q_prj"], "did you mean q_proj?"),
        ([*start, "--to", "other", "--p", "1e-3"], "--to other: holds something that is no sweep (notes.txt)"),
        ([*start, "--to", "out", "--config", "run.toml", *few, "--bits", "21"], "of sweep.bits = 20; here it is 21"),
        ([*start, "--p", "1e-3"], "--to is missing"),
    ):
        assert main(argv) == 2
        out, err = capsys.readouterr()
        (line,) = [line for line in err.splitlines() if "error:" in line]
        assert words in line
        assert not out
    assert sorted(os.listdir()) == ["bad.toml", "model", "other", "out", "run.toml"]
    assert os.listdir("other") == ["notes.txt"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--layers", "q_prj"], "sweep.layers = 'q_prj': no faulty layer has that in its name; did you mean q_proj?"),
        (["--bits", "31", "--training.dtype", "bfloat16"], "bit '31': bfloat16 has bits 0 to 15"),
        (["--bits", "31", "--training.mixed_precision_param", "float16"], "bit '31': float16 has bits 0 to 15"),
        (["--until-ci", "0.01"], "--until-ci: unknown flag"),
        (["--eval.until_ci", "0.01"], "eval.until_ci = 0.01: a sweep has sweep.seeds"),
        (["--to", "there"], "there: holds another sweep, of sequences_per_pass = 3; here it is 1"),
    ],
)
def test_a_bad_grid_is_told_before_weights_and_text_are_read(model_dir, tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_run, "build_model", lambda *_: pytest.fail("weights were read"))
    argv = ["sweep", str(model_dir), "--data.source", "no/such/text.txt", "--training.seq_len", "32", "--p", "1e-3"]
    if "there" in flags:
        there = SweepDirectory(tmp_path / "there")
        config = load_config([], {"model": {"hf_model_path": str(model_dir)}, "sweep": {"p": "1e-3"}})
        config = replace(config, data=replace(config.data, source="no/such/text.txt"))
        config = replace(config, training=replace(config.training, seq_len=32))
        there.begin(resolved(config)).release()
        there.write_header({"sequences_per_pass": 3, "voltages": None})
    assert main([*argv, *([] if "there" in flags else ["--to", "new"]), *flags]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert words in line
    assert not (tmp_path / "new").exists()


def test_a_guard_that_cuts_is_warned_of_with_the_base_first(learned_llama_dir, tmp_path, capsys):
    argv = ["sweep", str(learned_llama_dir), "--to", str(tmp_path / "out"), "--p", "1e-3", "--sites", "w"]
    argv += ["--data.source", "stdlib", "--data.max_tokens", "20000", "--training.seq_len", "32"]
    argv += ["--seeds", "1", "--eval.num_samples", "2", "--bitflip.w_zero_out_t", "0.03"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    header = json.loads((tmp_path / "out" / "sweep.json").read_text())
    base = f"clean perplexity {header['clean']['perplexity']:.4g}, behind the guard alone "
    base += f"{header['guard']['perplexity']:.4g}"
    assert f"{base}; 1 of 1 points" in out
    said = [line for line in err.splitlines() if base in line or "the guard alone, before" in line]
    assert len(said) == 2
    assert f"costs {header['guard']['loss'] - header['clean']['loss']:.4g} nats" in said[1]
    assert "without a guard" not in err  # there is one
