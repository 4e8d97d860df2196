"""What `torchnewton spectrum` prints and writes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torchnewton.analysis.spectral import FLAT
from torchnewton.analysis.spectral import FLAT_NAME as NAME
from torchnewton.curvature import Estimate
from torchnewton.train.checkpoint import to_json, write_atomically, write_text
from torchnewton.train.display import number
from torchnewton.train.spectrum import EndPoint, Question, groups
from torchnewton.train.spectrum_figure import draw

_KINDS = {"hessian": "Hessian", "gauss-newton": "Gauss-Newton matrix"}
HEADERS = ("run", "seed", "loss", "‖g‖", "largest λ", "smallest λ", "trace", f"|λ|<{NAME}, %", f"λ<−{NAME}, %")


def rows(points: Sequence[EndPoint]) -> Iterator[tuple[str, ...]]:
    """The table under `HEADERS`: a row a run, and the mean of the seeds of each method."""
    for label, group in groups(points).items():
        for p in group:
            yield (
                label,
                str(p.settings.seed),
                number(p.loss),
                number(p.gradient_norm, 2),
                number(p.largest),
                number(p.smallest),
                _with_error(p.spectrum.trace),
                _percent(p.flat),
                _percent(p.negative),
            )
        if len(group) > 1:
            yield (
                label,
                "mean",
                number(statistics.fmean(p.loss for p in group)),
                number(statistics.fmean(p.gradient_norm for p in group), 2),
                _with_error(_over(p.largest for p in group)),
                _with_error(_over(p.smallest for p in group)),
                _with_error(_over(p.spectrum.trace.value for p in group)),
                _percent(_over(p.flat.value for p in group)),
                _percent(_over(p.negative.value for p in group)),
            )


def _over(values: Iterable[float]) -> Estimate[float]:
    """Mean and standard deviation."""
    found = list(values)
    return Estimate(statistics.fmean(found), statistics.stdev(found))


def _with_error(x: Estimate[float]) -> str:
    """A value up to the digit of its error.

    >>> _with_error(Estimate(26.7361, 0.1234)), _with_error(Estimate(2.5, 0.0))
    ('26.7±0.1', '2.5')
    """
    if not 0 < x.standard_error < math.inf:
        return number(x.value)
    digits = -math.floor(math.log10(x.standard_error))
    if not 0 <= digits <= 4:
        return f"{x.value:.3g}±{x.standard_error:.0e}"
    return f"{x.value:.{digits}f}±{x.standard_error:.{digits}f}"


def _percent(x: Estimate[float]) -> str:
    return f"{100 * x.value:.1f}" + (f"±{100 * x.standard_error:.1f}" if x.standard_error else "")


def how(points: Sequence[EndPoint], question: Question) -> list[str]:
    """How the numbers came about, in lines."""
    used = {(p.samples, int(p.about["training samples"])) for p in points}
    data = " or ".join(f"all {n:,}" if n == all_ else f"{n:,} of {all_:,} (--samples)" for n, all_ in sorted(used))
    precision = "float64" if question.double else "float32"
    lines = [f"{_KINDS[question.curvature]} of the loss over {data} training samples, in evaluation mode, {precision}"]
    if all(p.spectrum.is_exact for p in points):
        lines.append("All eigenvalues of the dense matrix")
    else:
        lines.append(
            f"{question.probes} probes of {question.iterations} Lanczos iterations (--probes, --iterations); "
            "± is the standard error over the probes"
        )
        half = [p.spectrum.halved().share(below=FLAT).value - p.flat.value for p in points]
        most = max(p.spectrum.share_bounds(-FLAT, FLAT)[1] for p in points)
        lines.append(
            f"With half of the iterations the share |λ| < {NAME} changes by {100 * min(half):+.1f} to "
            f"{100 * max(half):+.1f} points; more would make it {100 * most:.0f} % at most"
        )
    if any(len(group) > 1 for group in groups(points).values()):
        lines.append("In the rows of means, ± is the standard deviation over the seeds")
    return lines


def title(points: Sequence[EndPoint], question: Question) -> str:
    """What is seen, in one line."""
    what = {f"{p.settings.model} on {p.setting('data')} ({p.spectrum.size:,} parameters)" for p in points}
    return f"Spectrum of the {_KINDS[question.curvature]}" + (f": {what.pop()}" if len(what) == 1 else "")


def raw(points: Sequence[EndPoint], question: Question, command: str) -> dict[str, Any]:
    """Everything that was found, for `spectrum.json`."""
    return {"command": command, "question": asdict(question), "flat": FLAT, "runs": [_raw(p) for p in points]}


def _raw(p: EndPoint) -> dict[str, Any]:
    found, half = p.spectrum, p.spectrum.halved()
    bounds = found.share_bounds(-FLAT, FLAT)
    density = found.density(linear_width=FLAT)
    return {
        "folder": str(p.folder),
        "settings": asdict(p.settings),
        "about": p.about,
        "step": p.step,
        "samples": p.samples,
        "loss": p.loss,
        "gradient_norm": p.gradient_norm,
        "size": found.size,
        "is_exact": found.is_exact,
        "num_products": found.num_products,
        "cpu_seconds": p.cpu_seconds,
        "largest": {"values": found.largest.values.tolist(), "bounds": found.largest.bounds.tolist()},
        "smallest": {"values": found.smallest.values.tolist(), "bounds": found.smallest.bounds.tolist()},
        "trace": asdict(found.trace),
        "flat_share": {**asdict(p.flat), "halved": half.share(below=FLAT).value, "bounds": bounds},
        "negative_share": asdict(p.negative),
        "known": found.known.tolist(),
        "probes": [dict(zip(("nodes", "weights"), (x.tolist() for x in q.rule), strict=True)) for q in found.probes],
        "density": {
            "unit": "share of eigenvalues a decade of the axis asinh(λ / linear_width) / ln 10",
            "linear_width": FLAT,
            **{name: getattr(density, name).tolist() for name in ("grid", "value", "standard_error")},
        },
    }


def write(points: Sequence[EndPoint], question: Question, command: str, folder: Path) -> None:
    """Writes `spectrum.json`, `spectrum.png` and `spectrum.svg`, each of them whole or not at all."""
    write_text(folder / "spectrum.json", to_json(raw(points, question, command), indent=1) + "\n")
    for form in ("png", "svg"):
        write_atomically(folder / f"spectrum.{form}", partial(draw, title(points, question), groups(points), form))
