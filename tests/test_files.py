import json
import math
import os
import stat
import threading
import time

import pytest

from flipproof import files
from flipproof.errors import ConfigError
from flipproof.files import (
    check_writable,
    claimed,
    discard,
    is_temporary,
    put_in_place,
    temporary_name,
    write_atomically,
    write_json,
)


def test_json_has_no_infinities(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1.0, math.inf], "b": (math.nan, {"c": -math.inf})})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1.0, None], "b": [None, {"c": None}]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_two_writers_of_one_file_never_harm_each_other(tmp_path):
    path, texts, failed = tmp_path / "a.json", ["a" * 100_000, "b" * 200_000], []

    def write(text):
        try:
            for _ in range(50):
                write_atomically(path, text)
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            assert path.read_text() in texts
    assert not failed
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_temporary_name_is_new_at_every_call(tmp_path):
    assert temporary_name(tmp_path / "a") != temporary_name(tmp_path / "a")


def test_what_cannot_be_written_leaves_the_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, "before")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_has_the_permissions_that_the_user_gives_to_new_files(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a.txt", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


def test_what_can_be_written_is_let_through_and_not_made(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "new", tmp_path / "new/deep/er", tmp_path / "file"):
        check_writable(path, "--to")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("below", ["file/out", "file/out/deeper", "link/out"])
def test_a_path_below_a_file_is_refused_by_name(tmp_path, below):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=rf"--to = .*{below}.*(file|link) is not a directory"):
        check_writable(tmp_path / below, "--to")


def test_a_name_that_is_too_long_is_refused(tmp_path):
    for path in (tmp_path / ("x" * 300), tmp_path / "new" / ("ü" * 200)):
        with pytest.raises(ConfigError, match=r"at most 255 bytes|File name too long"):
            check_writable(path, "logging.run_dir")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ConfigError, match="cannot be written"):
            check_writable(tmp_path / "new", "--to")
    finally:
        tmp_path.chmod(0o700)


def test_a_directory_loses_its_name_before_its_files(tmp_path, monkeypatch):
    (tmp_path / "step-2").mkdir()
    monkeypatch.setattr(files.shutil, "rmtree", lambda path: (_ for _ in ()).throw(OSError("power cut")))
    with pytest.raises(OSError, match="power cut"):
        discard(tmp_path / "step-2")
    assert not (tmp_path / "step-2").exists()
    discard(tmp_path / "step-2")


def left(path, age_s=120, **more):
    """What a process that was killed some time ago left of a file or directory."""
    temporary = temporary_name(path)
    if more.get("directory"):
        temporary.mkdir()
        (temporary / "half").write_text("x")
    else:
        temporary.write_text("half")
    os.utime(temporary, (time.time() - age_s,) * 2)
    return temporary


def test_what_the_dead_left_is_cleared_and_nothing_else(tmp_path):
    path, precious = tmp_path / "a.json", tmp_path / "precious"
    precious.write_text("x")
    os.utime(precious, (time.time() - 120,) * 2)
    dead = [left(path), left(path, directory=True)]
    kept = [left(tmp_path / "b.json"), left(path, age_s=1), tmp_path / ".a.json.old", tmp_path / ".a.json.0123.tmp"]
    for file in kept[2:]:
        file.write_text("the user's")
        os.utime(file, (time.time() - 120,) * 2)
    link = temporary_name(path)
    link.symlink_to(precious)
    alive = left(path)
    with claimed(alive):
        write_atomically(path, "{}")
        assert alive.exists()
    assert not any(each.exists() for each in dead)
    assert all(each.exists() for each in (*kept, link, precious))
    write_atomically(path, "{}")  # the claim has ended
    assert not alive.exists()


def test_a_temporary_name_is_never_too_long(tmp_path):
    for name in ("n" * 255, "\N{PILE OF POO}" * 63):
        write_atomically(tmp_path / name, "x")
        assert is_temporary(temporary_name(tmp_path / name).name, name)


def test_a_directory_that_is_not_to_be_replaced_stays(tmp_path):
    for name in ("new", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("x")
    with pytest.raises(OSError, match="not empty"):
        put_in_place(tmp_path / "new", tmp_path / "final", replace=False)
    assert (tmp_path / "final" / "final").exists()


def test_a_directory_takes_the_place_of_another(tmp_path):
    for name in ("new", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("x")
    put_in_place(tmp_path / "new", tmp_path / "final")
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")] == ["final", "final/new"]
