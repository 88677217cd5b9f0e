import json

from flipproof.runlog import Metrics, peak_memory_gib


def test_metrics_go_on_after_the_step_they_resume_from(tmp_path):
    metrics = Metrics(tmp_path, 0)
    for step in (1, 2, 3):
        metrics.write(step=step)
    with metrics.path.open("a") as file:
        file.write('{"step": 4')
    Metrics(tmp_path, 2).write(step=3, again=True)
    assert [json.loads(line) for line in metrics.path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "again": True},
    ]


def test_peak_memory_counts_what_is_allocated():
    before = peak_memory_gib()
    block = bytearray(400 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_memory_gib() - before > 0.2 or before > 1.0
