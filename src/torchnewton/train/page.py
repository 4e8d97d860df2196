"""The files of a comparison: `compare.json`, `compare.html` and `compare.png`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2

from torchnewton.train.checkpoint import to_json, write_atomically, write_text
from torchnewton.train.compare import HEADERS, Comparison, Entry, Result, rows
from torchnewton.train.display import metric, number
from torchnewton.train.figures import COLOURS, Curves, comparison_png, panel_svg, panels

FILES = ("compare.json", "compare.html", "compare.png")


def write_page(comparison: Comparison, folder: Path) -> None:
    """Writes the three files into `folder`."""
    curves = [Curves(e.method, [r.history for r in e.results]) for e in comparison.entries]
    name, floor = comparison.data.metric, 0.5 / len(comparison.data.y_test)
    write_text(folder / "compare.json", to_json(_raw(comparison), indent=1) + "\n")
    figures = [panel_svg(panel, curves, floor) for panel in panels(name)]
    write_text(folder / "compare.html", _html(comparison, figures))
    write_atomically(folder / "compare.png", lambda p: comparison_png(title(comparison), name, curves, floor, p))


def title(comparison: Comparison) -> str:
    """What was compared, in one line."""
    settings = comparison.settings
    return f"{comparison.data.name}, {settings.model}: {settings.seconds:g} CPU seconds a run"


def _raw(comparison: Comparison) -> dict[str, Any]:
    return {
        "command": comparison.command,
        "about": comparison.about,
        "metric": comparison.data.metric,
        "target": comparison.target,
        "seeds": comparison.seeds,
        "methods": [
            {
                "method": entry.method,
                "lr": entry.lr,
                "search_seconds": entry.search_seconds,
                "runs": [
                    {
                        "chosen": result in entry.results,
                        "status": result.status,
                        "settings": asdict(result.settings),
                        "curve": [asdict(record) for record in result.history],
                    }
                    for result in entry.all_results
                ],
            }
            for entry in comparison.entries
        ],
    }


def _html(comparison: Comparison, figures: list[str]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("torchnewton.train"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    settings = comparison.settings
    about = {
        "command": comparison.command,
        "data": comparison.data.name,
        "model": settings.model,
        "budget": f"{settings.seconds:g} CPU seconds a run",
        "seeds": ", ".join(str(settings.seed + i) for i in range(comparison.seeds)),
        "batch sizes": ", ".join(f"{e.method} {e.results[0].settings.batch_size}" for e in comparison.entries),
        "threads": settings.threads,
        "device": settings.device,
        **comparison.about,
    }
    details = [_detail(comparison, entry, result) for entry in comparison.entries for result in entry.all_results]
    return environment.get_template("compare.html").render(
        title=title(comparison),
        comparison=comparison,
        colours=COLOURS,
        figures=figures,
        headers=HEADERS,
        rows=list(rows(comparison)),
        about=about,
        details=details,
    )


def _detail(comparison: Comparison, entry: Entry, result: Result) -> tuple[str, ...]:
    """One run as a row of the page's last table."""
    name, last = comparison.data.metric, result.last
    return (
        entry.method,
        number(result.settings.lr),
        str(result.settings.seed),
        "yes" if result in entry.results else "no",
        metric(last.metric, name),
        metric(result.best(), name),
        number(last.train_loss),
        f"{last.step:,}",
        f"{last.data_passes:,.1f}",
        f"{last.cpu_seconds:.2f}",
        result.status,
    )
