"""Damages each file that runs, sweeps, profiles, exports and caches leave, and opens it again.

    python tests/damages.py                      # every file of every kind
    python tests/damages.py adapter "flip log"   # some kinds

A file is emptied, cut to half and by its last byte, and has a bit flipped at several places, one damage at a time; in
JSON each number, string or list is changed into something of another kind as well, with the hash taken out. Whoever
opens it then must either refuse with exit code 2, naming the file, or give the same result as from the whole one. What
comes out is a table of kinds and damages, and a list of what was neither.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import lm_eval.tasks
import torch
from crash_points import left, prepare

import flipproof.cli.main
from flipproof.measure import tasks
from flipproof.records import HASH

TASK = """
task: toy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
metadata: {{version: 1.0}}
"""


@dataclass(frozen=True)
class Kind:
    """Files that one command leaves and others open."""

    made_by: tuple[str, ...]
    """Commands, in the directory where all happens."""
    files: str
    """A glob."""
    opened_by: tuple[str, ...]


TRAIN = "train --config run.toml"
ON = "train --config run.toml --resume auto --training.steps 6"
SWEEP = "sweep --config run.toml --p 1e-3,1e-2 --sites w --seeds 2 --to sweep"
EVAL = "eval base --config run.toml"
TASKS = f"{EVAL} --tasks toy --include-path tasks --cache answers"
PROFILE = "profile base --config run.toml"
EXPORT = "export run --to exported"
PAGE = "report {} --to page/report.html"
KINDS = {
    "config of a run": Kind((TRAIN,), "run/config.toml", (ON, EXPORT, PAGE.format("run"))),
    "record of a run": Kind((TRAIN,), "run/run.json", (ON,)),
    "metrics": Kind((TRAIN,), "run/metrics.jsonl", (ON, PAGE.format("run"))),
    "results": Kind((TRAIN,), "run/results.json", (ON, PAGE.format("run"))),
    "checkpoint": Kind((TRAIN,), "run/checkpoints/step-4/*", (ON, EXPORT)),
    "adapter": Kind((TRAIN,), "run/adapter/*", (f"{EVAL} --adapter run/adapter --to out",)),
    "config of a sweep": Kind((SWEEP,), "sweep/sweep.toml", (SWEEP,)),
    "head of a sweep": Kind((SWEEP,), "sweep/sweep.json", (SWEEP, PAGE.format("sweep"))),
    "points of a sweep": Kind((SWEEP,), "sweep/points/*.json", (SWEEP, PAGE.format("sweep"))),
    "profile": Kind(
        ("profile base --config run.toml --to profile",), "profile/profile.json", (PAGE.format("profile"),)
    ),
    "generated text": Kind(
        ("generate base --config run.toml --prompt a --max_new_tokens 8 --to text",),
        "text/generate.json",
        (PAGE.format("text"),),
    ),
    "exported model": Kind((TRAIN, EXPORT), "exported/*", ("eval exported --config run.toml --to out",)),
    "flip log": Kind((f"{EVAL} --flip-log log.jsonl",), "log.jsonl", (f"{EVAL} --replay log.jsonl --to out",)),
    "flip log, compressed": Kind(
        (f"{EVAL} --flip-log log.jsonl.gz",), "log.jsonl.gz", (f"{EVAL} --replay log.jsonl.gz --to out",)
    ),
    "packed text": Kind((EVAL,), "cache/flipproof/*.npy", (f"{EVAL} --to out",)),
    "kept answers": Kind((TASKS,), "answers/*.json", (f"{TASKS} --to out",)),
}


# -- damages -----------------------------------------------------------------------------------------------------------


def damages(data: bytes, flips: int) -> Iterator[tuple[str, bytes]]:
    """(kind of damage, what is left of the file)."""
    yield "emptied", b""
    yield "cut", data[: len(data) // 2]
    yield "cut", data[:-1]
    for i in range(flips):
        at, bit = i * (len(data) - 1) // max(1, flips - 1), 1 << (i * 3) % 8
        yield "bit flipped", data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]


def odd_values(data: bytes, each: int) -> Iterator[tuple[str, bytes]]:
    """Valid JSON, or lines of it, with something of another kind in a place, and without a hash."""
    text = data.decode()
    try:
        documents, separator = [json.loads(text)], ""
    except ValueError:
        documents, separator = [json.loads(line) for line in text.splitlines()], "\n"
    odd = itertools.cycle([None, True, "x", -1, math.inf, [], {}, 10**400, [[]], 0.5])
    for number, document in enumerate(documents[:2]):
        document.pop(HASH, None)
        for path in [*_places(document)][::each]:
            changed = json.loads(json.dumps(document))
            holder = changed
            for key in path[:-1]:
                holder = holder[key]
            holder[path[-1]] = next(odd)
            lines = [changed if i == number else other for i, other in enumerate(documents)]
            yield "odd value", (separator.join(json.dumps(line) for line in lines) + separator).encode()
    yield "odd value", b"[" * 100_000
    yield "odd value", b"[]\n"


def _places(value: object, path: tuple = ()) -> Iterator[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from _places(item, (*path, key))


# -- opening -----------------------------------------------------------------------------------------------------------


def call(command: str, directory: Path) -> tuple[int | None, str]:
    """(exit code, all that was said); no code where there was a traceback."""
    said = io.StringIO()
    with contextlib.chdir(directory), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            return flipproof.cli.main.main(command.split()), said.getvalue()
        except SystemExit as error:
            return int(error.code or 0), said.getvalue()
        except BaseException:
            return None, said.getvalue() + traceback.format_exc()


def result(command: str, directory: Path) -> dict[str, object]:
    """What a command wrote."""
    kept = {
        "train": ("run/adapter", "run/metrics", "run/results", "run/run.json"),
        "sweep": ("sweep",),
        "report": ("page",),
        "export": ("exported",),
        "eval": ("out",),
    }[command.split()[0]]
    # a file may end without a line break
    found: dict[str, object] = {name: data.rstrip(b"\n") for name, data in left(directory, kept).items()}
    if command.startswith("report"):
        found |= {path.name: path.read_bytes() for path in directory.glob("page/*.html")}
    return found


def try_damages(name: str, place: Path, flips: int, each: int) -> tuple[Counter, list[str]]:
    """(how often each damage ended how, what was neither refused by name nor without effect)."""
    kind, directory, whole = KINDS[name], place / "now", place / "whole"
    directory.mkdir(parents=True)
    # with more steps, another schedule would make the steps before a damaged checkpoint other ones
    prepare(directory, root=".", save_freq=2, lr_scheduler="constant")
    (directory / "tasks").mkdir()
    (directory / "tasks/toy.jsonl").write_text('{"text": "the cat sat"}\n{"text": "on a mat"}\n')
    (directory / "tasks/toy.yaml").write_text(TASK.format(data=directory / "tasks/toy.jsonl"))
    import datasets

    datasets.config.HF_DATASETS_CACHE = directory / "cache"
    for command in kind.made_by:
        code, said = call(command, directory)
        assert code == 0, said
    shutil.copytree(directory, whole)
    files = [path.relative_to(directory) for path in sorted(directory.glob(kind.files)) if path.is_file()]
    assert files, f"{name}: nothing was left"
    counts, problems = Counter(), []
    for command in kind.opened_by:
        expected = outcome(command, directory, whole, None, b"")
        assert expected[0] == 0, f"{command}: {expected}"
        for file in files:
            data = (whole / file).read_bytes()
            odd = odd_values(data, each) if file.suffix in (".json", ".jsonl") else ()
            for damage, changed in itertools.chain(damages(data, flips), odd):
                code, found, said = outcome(command, directory, whole, file, changed)
                refused = code == 2 and file.name in said
                same = code == 0 and found == expected[1]
                told = code == 0 and _named(file, found) > _named(file, expected[1])  # a page says what is missing
                how = "refused" if refused else "same" if same else "said" if told else None
                if damage == "odd value" and how is None and code in (0, 2):
                    how = "taken"  # for what somebody wrote by hand: no traceback is all that is asked
                counts[damage, how or "WRONG"] += 1
                if how is None:
                    lines = said.strip().splitlines()
                    problems.append(f"{name}: {file}, {damage}, {command.split()[0]}: {code}, {lines[-1:]}")
    return counts, problems


def _named(file: Path, found: dict[str, object]) -> int:
    """How often the page of a report names a file."""
    return str(found.get("report.html", "")).count(file.name)


def outcome(
    command: str, directory: Path, whole: Path, file: Path | None, data: bytes
) -> tuple[int | None, dict[str, object], str]:
    """(exit code, result, what was said) of a command where one file holds other data."""
    shutil.rmtree(directory)
    shutil.copytree(whole, directory)
    if file is not None:
        (directory / file).write_bytes(data)
    code, said = call(command, directory)
    return code, result(command, directory) if code == 0 else {}, said


def only_our_tasks(set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """To look through lm-eval's thousands of tasks takes seconds each time, and so does to list all that is
    installed."""
    set_attribute(lm_eval.evaluator, "add_env_info", lambda *_: None)
    set_attribute(tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))


def table(counts: dict[str, Counter]) -> str:
    """Kinds x damages in Markdown."""
    columns = ("bit flipped", "cut", "emptied", "odd value")
    rows = [["", *columns], ["---"] * 5]
    for name, found in counts.items():
        cells = []
        for damage in columns:
            each = {how: n for (what, how), n in found.items() if what == damage}
            cells.append(", ".join(f"{n} {how}" for how, n in sorted(each.items())) or "-")
        rows.append([name, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=[*KINDS], metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--flips", type=int, default=8, help="bits flipped in each file, one at a time")
    parser.add_argument("--each", type=int, default=1, help="change every value of a JSON file, every second, ...")
    args = parser.parse_args()
    torch.set_num_threads(1)
    only_our_tasks()
    counts, problems = {}, []
    with tempfile.TemporaryDirectory() as place:
        for number, name in enumerate(args.kinds):
            counts[name], found = try_damages(name, Path(place) / str(number), args.flips, args.each)
            problems += found
            print(name, dict(counts[name]), file=sys.stderr, flush=True)
    print(table(counts))
    print(*problems, sep="\n") if problems else None
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
