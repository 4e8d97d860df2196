"""What is asked of products and solvers, each criterion as a sentence with the measured number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import directions
from benchmarks.cases import CNN, MLP, TRANSFORMER
from benchmarks.product_tables import PLANE_LIMIT, auto_ratio, newton_cost, step_by_hand, step_cost
from benchmarks.suite.criteria import Verdict

Results = Mapping[str, Any]

MAX_GRADIENTS = {
    (directions.MLP, 64): 8,
    (directions.MLP, 128): 12,
    (directions.MLP, 256): 25,
    (directions.CNN, 64): 25,
}


def product_verdicts(results: Results) -> list[Verdict]:
    """Every criterion whose measurements are there."""
    checks: dict[str, list[Callable[[Any], Verdict]]] = {
        "products": [_explicit, _kept, _faster],
        "directions": [_directions],
        "choices": [_auto],
        "plane_steps": [_plane, _newton],
    }
    found = [check(results[part]) for part, parts in checks.items() if part in results for check in parts]
    return found + _preconditioners(results.get("preconditioners") or {})


def _cost(rows: Sequence[Results], network: str, way: str) -> float:
    row = next(row for row in rows if row["network"] == network)
    return float(row["seconds"][way] / row["seconds"]["gradient"])


def _explicit(rows: Sequence[Results]) -> Verdict:
    costs = {network: _cost(rows, network, "explicit") for network in (MLP, CNN)}
    each = "; ".join(f"{network}: {cost:.2f}" for network, cost in costs.items())
    return Verdict(max(costs.values()) <= 0.9, f"A product by layer factors, in gradients: {each}; asked: 0.9.")


def _kept(rows: Sequence[Results]) -> Verdict:
    costs = {network: _cost(rows, network, "kept") for network in (MLP, CNN, TRANSFORMER)}
    each = "; ".join(f"{network}: {cost:.2f}" for network, cost in costs.items())
    return Verdict(max(costs.values()) <= 1.5, f"A product by kept double backward, in gradients: {each}; asked: 1.5.")


def _faster(rows: Sequence[Results]) -> Verdict:
    ratios = {n: _cost(rows, n, "curvlinops") / _cost(rows, n, "explicit") for n in (MLP, CNN)}
    each = "; ".join(f"{network}: {ratio:.1f}" for network, ratio in ratios.items())
    sentence = f"Times that a product by layer factors is faster than one of curvlinops: {each}; asked: 2.5."
    return Verdict(min(ratios.values()) >= 2.5, sentence)


def _directions(rows: Sequence[Results]) -> Verdict:
    holds, parts = True, []
    for row in rows:
        limit = MAX_GRADIENTS[row["network"], row["batch"]]
        cost, residual = row["seconds"]["dual"] / row["seconds"]["gradient"], row["residuals"]["dual"]
        holds = holds and cost <= limit and residual <= directions.ACCURACY
        parts.append(f"{row['network']}, batch {row['batch']}: {cost:.1f} of at most {limit}")
    sentence = "An exact damped direction by the sample-space solve, in gradients, recording and gradient included: "
    return Verdict(holds, f"{sentence}{'; '.join(parts)}.")


def _auto(rows: Sequence[Results]) -> Verdict:
    worst = max(rows, key=auto_ratio)
    good = sum(auto_ratio(row) <= 1.3 for row in rows)
    where = f"{worst['network']}, batch {worst['batch']}, {worst['classes']} outputs"
    sentence = (
        f"Auto is within 1.3 times the best of its own choices in {good} of {len(rows)} rows; the worst is "
        f"{auto_ratio(worst):.2f} ({where}); asked: all."
    )
    return Verdict(good == len(rows), sentence)


def _plane(rows: Sequence[Results]) -> Verdict:
    costs = {f"{row['network']}, batch {row['batch']}": step_cost(row) for row in rows}
    by_hand = {f"{row['network']}, batch {row['batch']}": step_by_hand(row) for row in rows}
    bare = {name: "" if found is None else f", in bare torch {found:.2f}" for name, found in by_hand.items()}
    each = "; ".join(f"{name}: {cost:.2f}{bare[name]}" for name, cost in costs.items())
    sentence = f"A full plane step with K-FAC, in gradients, the check of the loss apart: {each}; asked: {PLANE_LIMIT}."
    return Verdict(max(costs.values()) <= PLANE_LIMIT, sentence)


def _newton(rows: Sequence[Results]) -> Verdict:
    costs = {f"{row['network']}, batch {row['batch']}": newton_cost(row) for row in rows if "newton" in row}
    each = "; ".join(f"{name}: {cost:.2f}" for name, cost in costs.items())
    sentence = f"The average step of Newton() in the plane regime, all included, in gradients: {each}; asked: 2.5."
    return Verdict(bool(costs) and max(costs.values()) <= 2.5, sentence)


def _preconditioners(cases: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[Verdict]:
    """One sentence for each rule by which CG stops."""
    verdicts = []
    for rule in [name for name in next(iter(cases.values()), {}).get("none", {}) if name.startswith("to ")]:
        parts, least = [], float("inf")
        for case, rows in cases.items():
            rivals = [name for name in rows if name.startswith(("K-FAC", "Nyström"))]
            best = min(rivals, key=lambda name: rows[name][rule])
            before, after = rows["none"][rule], rows[best][rule]
            least = min(least, before / max(after, 1))
            parts.append(f"{case}: {before:g} to {after:g} ({best})")
        sentence = f"K-FAC or Nyström cut the iterations of CG ({rule}): {'; '.join(parts)}; asked: threefold."
        verdicts.append(Verdict(least >= 3, sentence))
    return verdicts
