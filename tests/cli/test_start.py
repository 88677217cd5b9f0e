"""What is imported before it is needed: each in a process of its own, since others have long imported everything."""

import subprocess
import sys

import pytest

import flipproof

HEAVY = ("torch", "transformers", "numpy", "scipy", "pandas", "matplotlib", "datasets", "pyarrow", "safetensors")


def printed_by(code):
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_help_version_and_errors_import_nothing_heavy(tmp_path):
    (tmp_path / "bad.toml").write_text("[training]\nlr = 'fast'\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("[model]\nhf_model_path = 'm'\n")
    commands = [
        ["--version"],
        ["--help"],
        ["train", "--help"],
        ["eval", "--help", "all"],
        ["trian"],
        ["eval", "m", "--xyzzy"],
        ["train", "m", "--devices", "many"],
        ["train", "--config", "nowhere.toml", "--devices", "2"],
        ["train", "--config", str(tmp_path / "bad.toml")],
        ["train", "--config", "nowhere.toml"],
        ["eval", "./nowhere"],
        ["eval", str(tmp_path / "run")],
        ["export", "nowhere", "--to", "x"],
        ["report", "nowhere"],
        ["config", "70b"],
        ["keys", "training"],
    ]
    code = f"""
import contextlib, io, sys
from flipproof.cli.main import main
for command in {commands}:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main(command)
        except SystemExit as stop:
            code = stop.code
    assert code == 2 if err.getvalue() else code == 0 and out.getvalue(), command
    for name in {HEAVY} :
        if name in sys.modules:
            print(f"{{name}}:{{command}}")
"""
    assert printed_by(code) == []


ORDERS = [
    "import flipproof; f = flipproof.faults",
    "from flipproof import faults as f",
    "from flipproof.faults.spec import BitFlipSpec; from flipproof import faults as f",
    "import flipproof.faults.inject; import flipproof; f = flipproof.faults",
    "import flipproof; f = flipproof.faults; import flipproof.faults.inject; assert flipproof.faults is f",
    "import flipproof.faults; f = flipproof.faults; from flipproof.faults import spec; from flipproof import flip",
    "from flipproof import *; f = faults",
]


def test_faults_is_the_function_in_whichever_order_things_are_imported():
    """The subpackage has its name, and would become the attribute where it is imported. A process for each order; all
    are forks of one, so that torch, and what flipproof needs of it, is imported once."""
    code = f"""
import os, sys
import torch.distributed.fsdp, torch.distributed.tensor
from torch import nn
assert not any(name.startswith("flipproof") for name in sys.modules)
for order in {ORDERS}:
    if not os.fork():
        there = {{}}
        exec(order, there)
        exec("from flipproof.faults.spec import BitFlipSpec; import flipproof", there)
        f, flipproof = there["f"], there["flipproof"]
        model = nn.Sequential(nn.Linear(8, 8))
        flipproof.inject(model, flipproof.BitFlipSpec(w_zero_out_t=0.0))
        with f(model, guard=False):
            assert flipproof.faulty_layers(model)
        print(f.__module__, flipproof.faults is f, sys.modules["flipproof.faults"].__name__, flush=True)
        os._exit(0)
    os.wait()
"""
    assert printed_by(code) == ["flipproof.faults.inject", "True", "flipproof.faults"] * len(ORDERS)


def test_every_public_name_is_there_and_listed():
    for name in flipproof.__all__:
        assert getattr(flipproof, name).__module__.startswith("flipproof.faults.")
    assert set(flipproof.__all__) <= set(dir(flipproof))
    with pytest.raises(AttributeError, match="module 'flipproof' has no attribute 'xyzzy'"):
        _ = flipproof.xyzzy
