"""QLoRA on several processes, of which each has all quantised weights, against the same runs in one process."""

import pytest
from quantised_models import checkpoint
from rounding import training_moved
from sharded_runs import (
    MOVED,
    alone,
    arguments,
    arms,
    assert_bitwise_the_same_run,
    assert_same_run,
    make_home,
    run_jobs,
    stopped_after,
)
from transformers import AutoModelForCausalLM

WHOLE = ("--parallelism.sharding_strategy", "no_shard")
FAULTS = ("--bitflip.w_p_exp", "None", "--bitflip.w_p_frac", "None", "--bitflip.w_code_p", "0.003",
          "--bitflip.w_scale_p_exp", "0.001")  # fmt: skip
MEASURED_LITTLE = ("--eval.trials", "1", "--training.save_freq", "0")
LOADED = "loaded"


def of(home, name):
    loaded = ["--model.hf_model_path", f"{home}/fp8", "--model.tokenizer", "bytes"]
    return *(loaded if name == LOADED else ["--model.quantize", name]), *FAULTS


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = make_home(tmp_path_factory.mktemp("sharded"))
    model = AutoModelForCausalLM.from_pretrained(home / "base")
    checkpoint(model, home / "fp8", "compressed-tensors", "fp8")
    return home


NAMES = ["nf4", "int4-asym-g32", "nvfp4", LOADED]


@pytest.fixture(scope="module")
def single(home):
    for name in NAMES:
        alone(*arguments(home, f"single/{name}", 4, *of(home, name)))
        for seed in range(MOVED):
            with training_moved(seed):
                alone(*arguments(home, f"single/{name}.moved{seed}", 4, *of(home, name), *MEASURED_LITTLE))
    return home / "single"


@pytest.fixture(scope="module")
def pair(home, single):
    jobs = {name: arguments(home, f"pair/{name}", 2, *of(home, name), *WHOLE) for name in NAMES}
    run_jobs(home / "pair.jobs", 2, jobs)
    stopped_after(4, home / "pair" / "nf4", home / "again")
    run_jobs(home / "again.jobs", 2, {"again": arguments(home, "again", 2, *of(home, "nf4"), *WHOLE, "--resume")})
    return home / "pair"


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_what_one_trains(single, pair, name):
    """And measure it: its arms are compared, too."""
    assert_same_run(pair / name, single / name)
    assert arms(pair / name)["recovered"]["trial_losses"] != arms(pair / name)["flipped"]["trial_losses"]


def test_they_go_on_from_a_checkpoint(home, pair):
    assert_bitwise_the_same_run(home / "again", pair / "nf4")
