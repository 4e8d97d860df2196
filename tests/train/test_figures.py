"""Pictures of what is hardly there: lone points, nothing at all, long names."""

import math

import pytest
from matplotlib.figure import Figure

from torchnewton.train import plan_report
from torchnewton.train.figures import Curves, comparison_png, panel_svg, panels, plot_run, wrapped
from torchnewton.train.loop import Record
from torchnewton.train.plan import Row


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: figures.append(figure))
    return figures


def record(step, loss, accuracy=None):
    return Record(step, step, step, step, loss, loss, accuracy, step, step)


def markers(figure):
    return [[line.get_marker() for line in axes.lines] for axes in figure.axes]


def test_a_lone_point_has_a_mark(drawn, tmp_path):
    plot_run([record(0, 1.0), record(1, math.nan)], "mse", tmp_path)
    assert markers(drawn[0]) == [["o", "o"], ["o"]]
    plot_run([record(0, 1.0), record(1, 0.5)], "mse", tmp_path)
    assert markers(drawn[1]) == [["None", "None"], ["None"]]
    comparison_png("", "mse", [Curves("sgd", [[record(0, 1.0), record(1, 0.5)]])], 0.1, tmp_path)
    assert markers(drawn[2]) == [["o", "o"]] * 3


@pytest.mark.parametrize("loss", [0.0, math.nan, math.inf])
def test_where_nothing_can_be_drawn_the_picture_says_so(loss, drawn, tmp_path):
    history = [record(k, loss) for k in range(3)]
    plot_run(history, "mse", tmp_path)
    comparison_png("", "mse", [Curves("sgd", [history])], 0.1, tmp_path)
    for figure in drawn:
        assert all(axes.texts[0].get_text() == "no finite positive values" for axes in figure.axes)


def test_a_page_says_so_too():
    history = [record(k, math.nan, 0.1) for k in range(3)]
    assert all("no finite" in panel_svg(panel, [Curves("sgd", [history])], 0.1) for panel in panels("accuracy"))


def test_a_plan_has_its_ranks_as_ticks(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_report, "write_atomically", lambda path, write: write(path))
    found = [Row(mode, n, 1, 1, 1.0, 1.0) for mode in ("exact", "quorum") for n in (1, 3, 100)]
    plan_report.draw_plan(found, "a $ title", tmp_path / "plan.svg")
    assert [label.get_text() for label in drawn[0].axes[0].get_xticklabels()] == ["1", "3", "100"]


def test_titles_are_as_wide_as_their_picture():
    assert max(map(len, wrapped("word " * 40, 6.4).split("\n"))) <= 58
