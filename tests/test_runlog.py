import json
import multiprocessing

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


def peak_before_and_after(nbytes):
    before = peak_memory_gib()
    block = bytearray(nbytes)
    block[::4096] = b"x" * len(block[::4096])
    return before, peak_memory_gib()


def test_peak_memory_counts_what_is_allocated():
    """In a fork, whose peak begins with what it has: that of this process depends on the tests before."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        before, after = pool.apply(peak_before_and_after, (400 * 2**20,))
    assert before > 0.05  # torch alone is more
    assert 390 / 2**10 < after - before < 500 / 2**10
