"""Runs each verb where the disk takes no more, cannot be written, or may not be looked into.

    python tests/disk_errors.py                # every verb
    python tests/disk_errors.py sweep export   # some
    mount -t tmpfs -o size=64m none /mnt/small && python tests/disk_errors.py --on /mnt/small

"Full" is a limit on how large a file may grow, at several sizes: what is written first still fits, what comes later
does not. With ``--on`` a small file system, that is filled but for so much. "Read-only" and "no permission" are modes
of directories and files; who runs this as root loses root's power over them for it. Each command must then end with
exit code 2 and one line that names a path and the reason. What was there before stays as it was, and when the disk is
well again the same command ends as if nothing had been.
"""

import argparse
import ctypes
import os
import re
import resource
import shutil
import stat
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from crash_points import files, forked, left, prepare


@dataclass(frozen=True)
class Verb:
    """A command that writes, in the directory where all happens."""

    command: str
    before: tuple[str, ...] = ()
    reads: tuple[str, ...] = ("run.toml", "base/config.json", "base/model.safetensors", "text.txt")
    """What it cannot do without."""


TRAIN = "train --config run.toml"
EVAL = "eval base --config run.toml"
VERBS = {
    "train": Verb(f"{TRAIN} --resume auto"),
    "train, resumed": Verb(
        f"{TRAIN} --resume auto --training.steps 6",
        (TRAIN,),
        ("run.toml", "run/config.toml", "run/run.json", "run/checkpoints/step-4/manifest.json",
         "run/checkpoints/step-4/.metadata", "run/checkpoints/step-4/__0_0.distcp"),
    ),
    "eval": Verb(f"{EVAL} --to out"),
    "eval of an adapter": Verb(
        f"{EVAL} --adapter run/adapter --to out",
        (TRAIN,),
        ("run/adapter/adapter_config.json", "run/adapter/adapter_model.safetensors", "run/adapter/B2SUMS"),
    ),
    "flip log": Verb(f"{EVAL} --flip-log out/log.jsonl"),
    "flip log, compressed": Verb(f"{EVAL} --flip-log out/log.jsonl.gz"),
    "replay": Verb(f"{EVAL} --replay log.jsonl --to out", (f"{EVAL} --flip-log log.jsonl",), ("log.jsonl",)),
    "generate": Verb(
        "generate base --config run.toml --prompt a --max_new_tokens 8 --to out",
        reads=("run.toml", "base/config.json", "base/model.safetensors"),
    ),
    "profile": Verb("profile base --config run.toml --to out"),
    "sweep": Verb("sweep --config run.toml --p 1e-3,1e-2 --sites w --seeds 2 --to out"),
    "report": Verb("report run --to out/report.html", (TRAIN,), ("run/results.json", "run/metrics.jsonl")),
    "export": Verb("export run --to out/exported", (TRAIN,), ("run/config.toml", "run/checkpoints/step-4/.metadata")),
    "export of the adapter": Verb("export run --format adapter --to out/exported", (TRAIN,), ()),
}  # fmt: skip
FULL = (0, 100, 1000, 8_000, 30_000)
"""Bytes that a file may have, or that are left."""


# -- what is wrong with the disk ---------------------------------------------------------------------------------------


def full(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def fill(disk: Path, but: int) -> None:
    """Fill the file system of a directory, until ``but`` bytes are left, and pages of what is begun."""
    with (disk / "fill").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(2**16)) == 2**16:
            pass
    os.truncate(disk / "fill", max(0, (disk / "fill").stat().st_size - but))


def without_power() -> None:
    """Give up root's power over modes, in this process: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, 1 and 2."""
    if os.geteuid() == 0:
        header = struct.pack("Ii", 0x20080522, 0)
        held = ctypes.create_string_buffer(24)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.capget(header, held) == 0, os.strerror(ctypes.get_errno())
        words = [word & ~0b110 if i < 3 else word for i, word in enumerate(struct.unpack("6I", held.raw))]
        assert libc.capset(header, struct.pack("6I", *words)) == 0, os.strerror(ctypes.get_errno())


def set_modes(place: Path, forbidden: int) -> None:
    """Take permissions from a directory and all in it, or from a file."""
    for path in sorted([place, *place.rglob("*")], reverse=True):
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~forbidden)


# -- trying ------------------------------------------------------------------------------------------------------------


_SAYS = re.compile(
    r"(/|run|out|base|cache|text\.txt|log\.jsonl|run\.toml).*"
    r"(File too large|No space left|Permission denied|Read-only|cannot be (written|read)|is not a directory)"
)


def one_line(code: int, said: str) -> list[str]:
    """What is wrong with how a command said that it failed."""
    complaints = [line for line in said.splitlines() if line.startswith("flipproof ") and ": error: " in line]
    problems = [] if code == 2 else [f"it ended with {code}"]
    problems += [] if complaints else [f"no line says why: {said.strip().splitlines()[-1:]}"]
    problems += ["there is a traceback"] if "Traceback" in said else []
    problems += [f"no path or no reason: {line}" for line in complaints if not _SAYS.search(line)]
    return problems


def try_verb(name: str, place: Path, sizes: Sequence[int], disk: Path | None = None) -> tuple[int, list[str]]:
    """(trials, what went wrong). ``disk``: the small one that ``place`` is on, to be filled."""
    verb, directory, before = VERBS[name], place / "now", place / "before"
    directory.mkdir(parents=True)
    prepare(directory, root=".", save_freq=2, lr_scheduler="constant")
    for command in verb.before:
        code, said = forked(command.split(), directory)
        assert code == 0, said
    shutil.copytree(directory, before)
    code, said = forked(verb.command.split(), directory)
    assert code == 0, said
    expected, trials, problems = left(directory), 0, []

    def restore() -> None:
        set_back(directory)
        shutil.rmtree(directory)
        shutil.copytree(before, directory)

    def trial(what: str, broken: Callable[[], None], in_child: Callable[[], None], must_fail: bool = True) -> None:
        nonlocal trials
        trials += 1
        restore()
        there = {path: path.read_bytes() for path in files(directory)}
        broken()
        code, said = forked(verb.command.split(), directory, in_child)
        set_back(directory)
        if disk:
            (disk / "fill").unlink(missing_ok=True)
        found = one_line(code, said) if code or must_fail else []
        changed = [path for path, data in there.items() if not path.exists() or path.read_bytes() != data]
        # what a resumed run decides is written over what was
        mine = (
            ("run.json", "config.toml", "results.json", "metrics.jsonl", "run.log") if name == "train, resumed" else ()
        )
        found += [f"{path} was changed" for path in changed if code and path.name not in mine]
        again, words = forked(verb.command.split(), directory)
        if code and again:
            found.append(f"when all was well again it ended with {again}: {words.strip().splitlines()[-1:]}")
        now = left(directory)
        found += [f"{file} is another" for file in expected if now.get(file) != expected[file]]
        found += [f"{file} should not be there" for file in now.keys() - expected.keys()]
        problems.extend(f"{name}, {what}: {problem}" for problem in found)

    for size in sizes:
        if disk:
            trial(f"full but for {size}", lambda size=size: fill(disk, size), lambda: None, must_fail=size == 0)
        else:
            trial(f"full at {size}", lambda: None, full(size), must_fail=size == 0)
    if disk:
        return trials, problems
    trial("read-only", lambda: set_modes(directory, 0o222), without_power)
    out = directory / ("run" if name.startswith("train") else "out")
    for mode, words in ((0o222, "read-only"), (0o777, "no permission")):

        def close_out(mode: int = mode) -> None:
            out.mkdir(exist_ok=True)
            out.chmod(0o777 & ~mode)

        trial(f"{words} where it writes", close_out, without_power)
    for file in verb.reads:
        trial(f"no permission for {file}", lambda file=file: (directory / file).chmod(0), without_power)
        parent = (directory / file).parent
        if parent != directory:
            trial(f"no permission for {parent.name}/", lambda parent=parent: parent.chmod(0), without_power)
    restore()
    return trials, problems


def set_back(directory: Path) -> None:
    """Permissions as they were."""
    directory.chmod(0o755)
    for path in sorted(directory.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verbs", nargs="*", default=[*VERBS], metavar="VERB", help=", ".join(VERBS))
    parser.add_argument("--sizes", type=int, nargs="+", default=FULL, help="bytes that a full disk still takes")
    parser.add_argument("--on", type=Path, metavar="DIRECTORY", help="of a small file system that may be filled")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    problems = []
    with tempfile.TemporaryDirectory(dir=args.on) as place:
        for number, name in enumerate(args.verbs):
            trials, found = try_verb(name, Path(place) / str(number), args.sizes, args.on)
            print(f"{name}: {trials} trials, {len(found)} problems", file=sys.stderr, flush=True)
            problems += found
    print(*problems, sep="\n", file=sys.stderr) if problems else None
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
