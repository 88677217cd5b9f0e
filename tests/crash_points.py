"""Kills a command before each of its file-system events and starts it again: nothing may be lost, and it ends the same.

    python tests/crash_points.py                        # every point of every command: half an hour on two cores
    python tests/crash_points.py train sweep --points 5

An event is one that Python tells its audit hooks of: a file below the command's directory is opened for writing, gets
another name or is deleted, a directory is made or deleted. What libraries write without Python (safetensors) lies
between two of them. The process that dies is forked, so that a point costs no second start of Python; nothing is run
in this one that would start threads that a command needs, which a fork would lose.

After each death whatever has its final name must be whole. Then the command is started again, as a script would, and
what it leaves is compared with what it leaves when nobody kills it: metrics, results, weights and points bit for bit.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import tomllib
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from safetensors.torch import load_file
from texts import sentences
from transformers import LlamaConfig, LlamaForCausalLM

import flipproof.cli.main
import flipproof.files
import flipproof.measure.evaluate
import flipproof.pictures
import flipproof.report.page
import flipproof.sweep.run
import flipproof.train.loop
from flipproof.models.load import byte_tokenizer
from flipproof.train.checkpoint import checkpoint_problems

CONFIG = """
[model]
hf_model_path = "{root}/base"
[training]
{training}
[lora]
r = 2
lora_alpha = 4
[bitflip]
w_p_exp = 0.001
w_zero_out_t = 1.0
[data]
source = "{root}/text.txt"
max_tokens = 5000
[eval]
num_samples = 2
trials = 1
[checkpoint]
keep_last = {keep_last}
[logging]
run_dir = "{root}/run"
"""
TRAINING = {"seq_len": 32, "local_batch_size": 2, "steps": 4, "lr": 1e-2, "save_freq": 1, "log_freq": 1}
CLOCK = ("tokens_per_second", "peak_memory_gib", "seconds")


@dataclass(frozen=True)
class Command:
    """What is killed, in a directory of its own."""

    argv: Callable[[Path], list[str]]
    before: tuple[Callable[[Path], list[str]], ...] = ()
    """Commands that run undisturbed before it."""
    again: Callable[[Path], list[str]] | None = None
    """How it is started again; None: as it was. What it then leaves may also be what it would have left without the
    command, if that had decided nothing yet."""
    keep_last: int = 9


def train(*flags: str) -> Callable[[Path], list[str]]:
    return lambda directory: ["train", "--config", f"{directory}/run.toml", *flags]


def sweep(directory: Path) -> list[str]:
    grid = ["--p", "1e-3,1e-2", "--sites", "w", "--seeds", "2", "--to", f"{directory}/sweep"]
    return ["sweep", "--config", f"{directory}/run.toml", *grid]


def export(directory: Path) -> list[str]:
    return ["export", f"{directory}/run", "--to", f"{directory}/exported"]


def report(directory: Path) -> list[str]:
    return ["report", f"{directory}/run"]


COMMANDS = {
    "train": Command(train("--resume", "auto")),
    "back": Command(train("--resume", "step-2", "--training.lr", "1e-3"), before=(train(),)),
    "back-auto": Command(
        train("--resume", "step-2", "--training.lr", "1e-3"),
        before=(train(),),
        again=train("--resume", "auto", "--training.lr", "1e-3"),
    ),
    "few-kept": Command(train("--resume", "auto"), keep_last=1),
    "sweep": Command(sweep),
    "export": Command(export, before=(train(),)),
    "report": Command(report, before=(train(), report)),
}


# -- dying -------------------------------------------------------------------------------------------------------------

_EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "shutil.rmtree"}


def watch(directory: Path, last: int, counted: Path | None) -> None:
    """From now on write each event below ``directory`` into the file ``counted``, or die before that of number
    ``last``."""
    count, log = 0, None if counted is None else os.open(counted, os.O_WRONLY | os.O_CREAT)

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if event == "open":
            changes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            changes = event in _EVENTS
        # within a tree that goes, names are relative to a directory that is open
        relative = event in ("os.remove", "os.rmdir") and args[-1] not in (-1, None)
        if changes and (relative or (isinstance(args[0], str | os.PathLike) and directory in Path(args[0]).parents)):
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)
            if log is not None:
                os.write(log, f"{event} {args[0]}\n".encode())

    sys.addaudithook(hook)


def forked(argv: list[str], directory: Path, first: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """(exit code, what it says) of a command in a process of its own, in the directory, which calls ``first``."""
    output, into = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(output)
            os.dup2(into, 1)
            os.dup2(into, 2)
            sys.stdout = sys.stderr = os.fdopen(into, "w", buffering=1)
            os.chdir(directory)
            datasets.config.HF_DATASETS_CACHE = directory / "cache"
            first()
            code = flipproof.cli.main.main(argv)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(into)
    with open(output, errors="replace") as stream:
        said = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def run(argv: list[str], directory: Path, last: int = 0, counted: Path | None = None) -> tuple[int, str]:
    """``forked``, and it dies before its event of number ``last``."""
    return forked(argv, directory, lambda: watch(directory, last, counted))


# -- what is left ------------------------------------------------------------------------------------------------------


def broken(directory: Path) -> list[str]:
    """What has its final name and is not whole."""
    problems = [
        f"{path}: {problem}"
        for path in directory.glob("run/checkpoints/step-*")
        for problem in checkpoint_problems(path)
    ]
    readers = {
        ".json": lambda path: json.loads(path.read_text()),
        ".toml": lambda path: tomllib.loads(path.read_text()),
        ".safetensors": load_file,
        ".html": lambda path: path.read_text().rstrip().endswith("</html>") or 1 / 0,
    }
    for path in files(directory):
        try:
            readers.get(path.suffix, lambda _: None)(path)
        except Exception as error:
            problems.append(f"{path}: {error}")
    for name, complete in (("run/adapter", "adapter_config.json"), ("exported", "tokenizer.json")):
        if (directory / name).exists() and not (directory / name / complete).exists():
            problems.append(f"{directory / name} has no {complete}")
    return problems


def files(directory: Path) -> list[Path]:
    """Those that have their final names."""
    found = (path for path in directory.rglob("*") if path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(directory).parts))


def left(directory: Path, below: tuple[str, ...] = ("",)) -> dict[str, bytes]:
    """What a command leaves, without what a clock or the place says; ``below`` are beginnings of names."""
    found = {}
    for path in files(directory):
        name, data = str(path.relative_to(directory)), path.read_bytes()
        if not name.startswith(below) or name.startswith(("cache/", "sweep/claims/", "run/checkpoints/")):
            continue
        if path.suffix == ".jsonl" or path.parent.name == "points":
            lines = [json.loads(line) for line in (data.splitlines() if path.suffix == ".jsonl" else [data])]
            lines = [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]
            data = json.dumps(lines).encode()
        if path.suffix in (".html", ".png", ".log"):
            data = b""  # they are there
        found[name] = data
    return found


# -- all points --------------------------------------------------------------------------------------------------------


def prepare(directory: Path, keep_last: int = 9, root: str | None = None, **training: object) -> None:
    """A model, a text and a config whose paths begin with ``root``, and which has keys of [training] of its own."""
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=256,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory / "base")
    byte_tokenizer().save_pretrained(directory / "base")
    (directory / "text.txt").write_text(sentences()[:20_000])
    keys = "\n".join(f"{key} = {json.dumps(value)}" for key, value in (TRAINING | training).items())
    config = CONFIG.format(root=root or directory, training=keys, keep_last=keep_last)
    (directory / "run.toml").write_text(config)


def crash(name: str, place: Path, points: int | None = None) -> list[str]:
    """What went wrong at the points of one command: at ``points`` of them, evenly spread, or at all. In the directory
    ``place``, which is made, everything happens under one path, as configs name it."""
    command, directory, before, log = COMMANDS[name], place / "now", place / "before", place / "events"
    directory.mkdir(parents=True)
    prepare(directory, command.keep_last)
    for each in command.before:
        code, said = run(each(directory), directory)
        assert code == 0, said
    shutil.copytree(directory, before)
    endings = []
    if command.again:
        code, said = run(command.again(directory), directory)
        assert code == 0, said
        endings.append(left(directory))
        shutil.rmtree(directory)
        shutil.copytree(before, directory)
    code, said = run(command.argv(directory), directory, counted=log)
    assert code == 0, said
    endings.append(left(directory))
    events, problems, died = log.read_text().splitlines(), [], 0
    last = len(events) - 1
    numbers = range(last + 1) if points is None else {round(i * last / max(1, points - 1)) for i in range(points)}
    for number in sorted(numbers):
        shutil.rmtree(directory)
        shutil.copytree(before, directory)
        code, _ = run(command.argv(directory), directory, last=number + 1)
        found = broken(directory)
        died += code == -signal.SIGKILL
        if code not in (0, -signal.SIGKILL):  # 0: a thread may have fewer events than in the run that was counted
            found.append(f"it ended with {code}")
        done = name == "export" and (directory / "exported").exists()  # a second one is refused
        code, said = run((command.again or command.argv)(directory), directory)
        if code != (2 if done else 0):
            found.append(f"started again it ended with {code}: {said[-500:]}")
        now = left(directory)
        expected = now if now in endings else endings[-1]
        found += [f"{file} is another" for file in expected if now.get(file) != expected[file]]
        found += [f"{file} should not be there" for file in now.keys() - expected.keys()]
        found += [f"{path} is left" for path in directory.rglob(".*.tmp")]
        problems += [f"{name}, before event {number + 1} ({events[number]}): {problem}" for problem in found]
    if died < 0.9 * len(numbers):
        problems.append(f"{name}: it died at {died} of {len(numbers)} points only")
    print(f"{name}: {len(numbers)} of {len(events)} points, {len(problems)} problems", file=sys.stderr, flush=True)
    return problems


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", default=[*COMMANDS], metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("--points", type=int, help="So many of each, evenly spread, in the place of all.")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    flipproof.pictures.DPI = 20  # what is drawn takes no more events for that
    flipproof.files._OLD_S = 0.0  # what the dead left is cleared at once, not only after a minute
    with tempfile.TemporaryDirectory() as place:
        problems = [line for name in args.commands for line in crash(name, Path(place) / name, args.points)]
    print(*problems, sep="\n", file=sys.stderr) if problems else None
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
