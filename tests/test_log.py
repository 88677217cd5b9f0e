import re

import pytest
from tqdm import tqdm

from flipproof.errors import ConfigError
from flipproof.log import RunLog, logger, set_up_logging


@pytest.fixture(autouse=True)
def _as_before():
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = before


def said(path):
    """The lines of a log, whose times are left out."""
    text = path.read_text()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in text.splitlines() if line)
    return [line[20:] for line in text.splitlines()]


def test_lines_have_the_time_of_day(capsys):
    set_up_logging()
    logger.info("one")
    assert re.fullmatch(r"\d\d:\d\d:\d\d one\n", capsys.readouterr().err)


def test_what_is_said_before_a_run_begins_is_in_its_log_once_it_does(tmp_path):
    set_up_logging()
    with RunLog(tmp_path / "run.log") as log:
        logger.info("one")
        assert not (tmp_path / "run.log").exists()
        log.begin()
        assert said(tmp_path / "run.log") == ["one"]
        logger.warning("two %d", 2)
        assert said(tmp_path / "run.log") == ["one", "two 2"]
    logger.info("three")
    assert said(tmp_path / "run.log") == ["one", "two 2"]
    with RunLog(tmp_path / "run.log") as log:
        log.begin()
        logger.info("four")
    assert said(tmp_path / "run.log") == ["one", "two 2", "", "four"]


def fails(path, begins, error):
    with RunLog(path) as log:
        logger.info("one")
        if begins:
            log.begin()
        raise error


def test_a_start_that_comes_to_nothing_leaves_no_log(tmp_path):
    set_up_logging()
    with pytest.raises(ConfigError):
        fails(tmp_path / "run.log", False, ConfigError(["no model"]))
    assert not (tmp_path / "run.log").exists()


def test_the_error_that_ends_a_run_comes_last(tmp_path):
    set_up_logging()
    with pytest.raises(RuntimeError):
        fails(tmp_path / "run.log", True, RuntimeError("power cut"))
    assert said(tmp_path / "run.log") == ["one", "RuntimeError: power cut"]


def test_a_disk_that_takes_no_more_is_told_once_and_costs_the_log_alone(tmp_path, capsys):
    set_up_logging()
    (tmp_path / "run.log").mkdir()
    with RunLog(tmp_path / "run.log") as log:
        log.begin()
        logger.info("one")
        logger.info("two")
    err = capsys.readouterr().err.splitlines()
    assert [line[9:] for line in err] == [
        f"{tmp_path / 'run.log'}: Is a directory; this run is no longer logged there",
        "one",
        "two",
    ]


def test_a_bar_is_neither_in_the_log_nor_torn_by_a_line(tmp_path, capsys):
    """The line begins where the bar began, which comes again below it."""
    set_up_logging()
    with RunLog(tmp_path / "run.log") as log:
        log.begin()
        with tqdm(total=2, ascii=True, ncols=40) as bar:
            bar.update()
            logger.info("one")
    assert said(tmp_path / "run.log") == ["one"]
    assert re.search(r"\r *\r\d\d:\d\d:\d\d one\n\r", capsys.readouterr().err)


def test_letters_that_no_file_may_hold_are_escaped(tmp_path):
    set_up_logging()
    with RunLog(tmp_path / "run.log") as log:
        log.begin()
        logger.info("a\udcff")
    assert said(tmp_path / "run.log") == ["a\\udcff"]
