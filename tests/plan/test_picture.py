import pytest
from matplotlib.colors import to_hex
from planned import config_of

from flipproof.cli.main import main
from flipproof.plan.estimate import Request, make_plan
from flipproof.plan.memory import LEVELS
from flipproof.plan.picture import memory_bars

GIB = 2**30


@pytest.mark.parametrize(
    ("flavor", "gpus", "gpu", "said"),
    [
        ("8B", 1, "h100", "merged weights, all blocks"),
        ("70B", 2, "h200", "nothing, 9 blocks\nproducts, 71 blocks"),
    ],
)
def test_each_bar_is_its_parts_on_top_of_each_other_and_ends_where_what_is_needed_does(flavor, gpus, gpu, said):
    config = config_of(flavor, 2, gradient_accumulation_steps=4)
    plan = make_plan(config, Request(gpus, gpu=gpu))
    figure = memory_bars(plan)
    figure.draw_without_rendering()
    axis = figure.axes[0]
    memories = [*(plan.by_level[level] for level in LEVELS), plan.memory]
    for place, memory in enumerate(memories):
        boxes = [bars.patches[place] for bars in axis.containers]
        reached = 0.0
        for box in boxes:
            assert box.get_x() == pytest.approx(reached)
            reached += box.get_width()
        assert reached == pytest.approx(memory.needed / GIB)
        by_name = {bars.get_label(): bars.patches[place].get_width() for bars in axis.containers}
        assert by_name["activations"] == pytest.approx(memory.parts["activations"] / GIB)
        assert by_name["weights, adapters"] == pytest.approx((memory.parts["weights"] + memory.parts["adapters"]) / GIB)
        assert f"{memory.needed / GIB:.1f}" == axis.texts[place].get_text()
    assert [line.get_xdata()[0] for line in axis.get_lines()] == pytest.approx(
        [plan.gpu.memory, 0.94 * plan.gpu.memory]
    )
    assert axis.get_yticklabels()[-1].get_text() == f"this config:\n{said}"
    colours = [to_hex(bars.patches[0].get_facecolor()) for bars in axis.containers]
    assert len(set(colours)) == len(colours)
    inside = figure.get_window_extent()
    for text in (*axis.texts, *axis.get_yticklabels(), *figure.legends[0].get_texts()):
        box = text.get_window_extent()
        assert inside.x0 <= box.x0 < box.x1 <= inside.x1


def test_the_picture_of_a_plan_is_its_own_setting_s_memory_at_that_level():
    plan = make_plan(config_of("8B", 2, activation_checkpointing="selective"), Request(1))
    assert plan.by_level["products"] == plan.memory
    assert plan.by_level["nothing"].needed < plan.memory.needed < plan.by_level["everything"].needed


def test_a_png_is_written_once(tmp_path, capsys):
    to = tmp_path / "new" / "plan.png"
    command = ["plan", "--config", "clm-60m", "--gpus", "1", "--picture", str(to)]
    assert main(command) == 0
    assert "tokens/s" in capsys.readouterr().out
    written = to.read_bytes()
    assert written.startswith(b"\x89PNG\r\n\x1a\n")
    assert main(command) != 0
    assert f"{to} exists already; name another file with --picture" in capsys.readouterr().err
    assert to.read_bytes() == written


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--picture", "plan.svg"], "--picture plan.svg: a file that ends in .png is allowed"),
        (["--picture", "plan.png", "--recommend"], "--picture is of one way to run a training; leave out --recommend"),
        (["--picture", "there/plan.png"], "there is not a directory"),
    ],
)
def test_what_cannot_be_written_is_one_line_before_anything_is_planned(flags, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").touch()
    assert main(["plan", "--config", "8b", "--gpus", "1", *flags]) != 0
    printed = capsys.readouterr()
    assert said in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert not list(tmp_path.glob("*.png"))
