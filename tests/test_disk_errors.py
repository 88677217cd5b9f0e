import disk_errors
import preloaded

VERBS = ("eval", "sweep", "export")


def test_a_disk_that_does_not_take_or_give_is_one_line_and_costs_nothing(tmp_path):
    """Three verbs, one size; ``disk_errors.py`` alone tries all. In a process of its own, which forks: this one has
    threads."""
    alone = {"CUDA_VISIBLE_DEVICES": ""}
    process = preloaded.start(disk_errors.main, [*VERBS, "--sizes", "100"], environment=alone, said=tmp_path / "said")
    process.join()
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 0, said[-3000:]
    assert said.count(" trials, 0 problems") == len(VERBS)
