import crash_points
import preloaded


def test_commands_killed_at_some_points_end_as_those_never_killed(tmp_path):
    """The first event, the last and one between; ``crash_points.py`` alone tries all. In a process of its own, which
    forks: this one has threads."""
    alone = {"CUDA_VISIBLE_DEVICES": ""}
    process = preloaded.start(crash_points.main, ["--points", "3"], environment=alone, said=tmp_path / "said")
    process.join()
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 0, said[-3000:]
    assert said.count("3 of ") == 7
