"""Comparisons on tiny budgets, and their page."""

import json
import re

import pytest

from torchnewton.train import compare as module
from torchnewton.train.compare import HEADERS, compare, rows
from torchnewton.train.errors import UsageError
from torchnewton.train.page import FILES, write_page
from torchnewton.train.runs import Settings


@pytest.fixture(scope="module")
def comparison():
    settings = Settings(data="sine", seconds=0.03)
    seen = []
    result = compare(settings, ["newton", "sgd"], 2, 0.9, "torchnewton compare", lambda *event: seen.append(event))
    assert [fraction for _, fraction in seen] == [i / 8 for i in range(9)]
    return result


def test_first_order_methods_run_over_their_rates(comparison):
    newton, sgd = comparison.entries
    assert (len(newton.search), len(newton.results), newton.lr, newton.search_seconds) == (1, 2, None, 0)
    assert (len(sgd.search), len(sgd.results), len(sgd.all_results)) == (5, 2, 6)
    assert sgd.lr == max(sgd.search, key=module.Result.score).settings.lr
    assert [r.settings.seed for r in sgd.results] == [0, 1]
    assert sgd.search_seconds >= 4 * 0.03
    assert all(r.last.cpu_seconds >= 0.03 for r in sgd.all_results)


def test_all_start_from_the_same_parameters(comparison):
    starts = {r.history[0].test_loss for e in comparison.entries for r in e.all_results if r.settings.seed == 0}
    assert len(starts) == 1


def test_the_table(comparison):
    table = list(rows(comparison))
    assert [row[0] for row in table] == ["newton", "sgd"]
    assert all(len(row) == len(HEADERS) for row in table)
    assert "±" in table[0][2]
    assert table[0][4].endswith((" s", "of 2"))


def test_a_rate_at_the_edge_of_its_grid_is_marked(comparison):
    sgd = comparison.entries[1]
    assert sgd.is_at_edge == (sgd.lr in (0.003, 0.3))
    assert ("edge" in list(rows(comparison))[1][1]) == sgd.is_at_edge


def test_the_page_needs_nothing_from_outside(comparison, tmp_path):
    write_page(comparison, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == set(FILES)
    html = (tmp_path / "compare.html").read_text()
    assert "http" not in html
    assert "<script" not in html
    assert not re.search(r"(src|href)=\"(?!#)", html)
    assert html.count("<svg") == 3
    assert "torchnewton compare" in html
    assert len(re.findall(r"<td>(?:finished|diverged)</td>", html)) == 8


def test_the_json_holds_all_raw_curves(comparison, tmp_path):
    write_page(comparison, tmp_path)
    raw = json.loads((tmp_path / "compare.json").read_text())
    runs = [run for method in raw["methods"] for run in method["runs"]]
    assert (len(runs), sum(run["chosen"] for run in runs)) == (8, 4)
    assert all(run["curve"][0]["step"] == 0 for run in runs)
    assert raw["about"]["parameters"] == 901


def test_text_in_the_page_is_escaped(comparison, tmp_path):
    from dataclasses import replace

    write_page(replace(comparison, command="<b>"), tmp_path)
    assert "&lt;b&gt;" in (tmp_path / "compare.html").read_text()


@pytest.mark.parametrize(
    ("methods", "seeds", "target", "match"),
    [
        (["newton", "x"], 1, None, "Unknown method 'x'"),
        ([], 1, None, "one or more methods"),
        (["sgd", "sgd"], 1, None, "each once"),
        (["sgd"], 0, None, "--seeds is 0"),
        (["sgd"], 1, -1.0, "--target"),
        (["sgd"], 1, 97.5, "between 0 and 1"),
    ],
)
def test_wrong_arguments_are_one_sentence(methods, seeds, target, match):
    with pytest.raises(UsageError, match=match):
        compare(Settings(seconds=0.01), methods, seeds, target, "")
