"""The tables of the products' benchmark in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.suite.tables import table

Results = Mapping[str, Any]
NONE = "–"

HEAD = """## Curvature and solvers

`make bench-products`. CPU time on one thread, medians of interleaved measurements (of two where one takes more than a
second, a single one above four); *gradients* are those of the same network and batch, measured in the same run;
curvlinops {curvlinops} on the same network and batch. In all measurements of time glibc keeps what is freed
(`mallopt`, for all contestants alike): otherwise fetching pages anew for every large tensor dominates the noise.
Single precision unless a table says otherwise, factorizations in double."""


def sections(results: Results) -> list[str]:
    """One section for each part that is there."""
    parts: dict[str, Callable[[Any], str]] = {
        "products": products,
        "directions": lambda rows: directions(rows, results["images"]),
        "choices": choices,
        "plane_steps": plane_steps,
        "preconditioners": preconditioners,
        "memory": memory,
    }
    found = [write(results[name]) for name, write in parts.items() if results.get(name)]
    return [HEAD.format(curvlinops=results["about"].get("curvlinops", "")), *found] if found else []


def products(rows: Sequence[Results]) -> str:
    header = ["network", "gradient, ms", "loss alone", "recording", "kept product", "explicit product"]
    header += ["curvlinops product", "set-up of the factors", "count: kept", "count: explicit"]
    body = []
    for row in rows:
        seconds, counts = row["seconds"], row["counts"]
        gradient = seconds["gradient"]
        setup = {}
        if "first explicit" in seconds:
            setup = {"setup": seconds["first explicit"] - seconds["record"] - seconds["explicit"]}
        shares = {name: t / gradient for name, t in {**seconds, **setup}.items()}
        names = ("evaluation", "record", "kept", "explicit", "curvlinops", "setup")
        cells = [_number(shares.get(name)) for name in names]
        body.append([row["network"], f"{1e3 * gradient:.3g}", *cells, *(_number(counts.get(k)) for k in COUNTS)])
    text = (
        "All but the first column in gradients. A recording is a gradient that keeps its graph. *Kept* is the product "
        "of `GaussNewton` by double backward on that graph, *explicit* the one by layer factors, where they fit into "
        "memory. The counts are those of the matrix products of linear and convolutional layers, from their shapes: "
        "three a layer for a gradient, four for a kept product, two for an explicit one; without a derivative in its "
        "input, the first layer needs one and two less. The sine network is too small for counts: calls are what "
        "costs."
    )
    return f"### Products\n\n{text}\n\n{table(header, body)}"


COUNTS = ("kept", "explicit")


def directions(rows: Sequence[Results], source: str) -> str:
    ways = [name for name in rows[0]["seconds"] if name != "gradient"]
    body = []
    for row in rows:
        gradient = row["seconds"]["gradient"]
        cells = [f"{row['seconds'][way] / gradient:.1f}{_iterations(way, row)}" for way in ways]
        residuals = " / ".join(f"{row['residuals'][way]:.0e}" for way in ways)
        body.append([row["network"], str(row["batch"]), f"{1e3 * gradient:.3g}", *cells, residuals])
    header = ["network", "batch", "gradient, ms", *ways, "relative residuals, in this order"]
    text = (
        "Gradients until (G + λI)d = −g is solved to a relative residual of 1e-3 at λ = 1e-3, recording and gradient "
        f"included, in brackets iterations; networks after 100 Adam steps on {source}. The residuals are those in "
        "double precision, by a kept product on a copy of the network."
    )
    return f"### Damped directions\n\n{text}\n\n{table(header, body)}"


def _iterations(way: str, row: Results) -> str:
    return "" if way == "dual" else f" ({row['iterations'][way]})"


WAYS = ("direct", "dual", "explicit CG", "kept CG")


def choices(rows: Sequence[Results]) -> str:
    body = []
    for row in rows:
        times = solve_seconds(row)
        cells = [f"{1e3 * times[way]:.3g}{_count(way, row)}" if way in times else NONE for way in WAYS]
        where = [row["network"], str(row["batch"]), str(row["classes"]), f"{row['damping']:.0e}"]
        body.append(
            [*where, *cells, f"{1e3 * times['Auto']:.3g}", row["chosen"].split(";")[0], f"{auto_ratio(row):.2f}"]
        )
    header = ["network", "batch", "outputs", "λ", *WAYS, "Auto", "chosen", "Auto / best"]
    text = (
        "CPU milliseconds of a solve to a relative residual of 1e-3 after a recording, in brackets iterations; "
        "networks after Adam steps on made-up data with classes, or values for one output; λ = 1e-6 in double "
        "precision. `Auto` has its default "
        "constants and decides before it knows the iterations. – is not possible within its limits of size and "
        "memory, or stated to take more than 30 times the operations of the cheapest, or more than 5e12."
    )
    return f"### The choice of `Auto`\n\n{text}\n\n{table(header, body)}"


def _count(way: str, row: Results) -> str:
    return f" ({row['iterations'][way]})" if "CG" in way else ""


def solve_seconds(row: Results) -> dict[str, float]:
    """CPU seconds of the solves alone."""
    record = row["seconds"]["record"]
    return {name: t - record for name, t in row["seconds"].items() if name != "record"}


def auto_ratio(row: Results) -> float:
    """Time of `Auto` over that of its best choice."""
    times = solve_seconds(row)
    return times["Auto"] / min(times[way] for way in WAYS if way in times)


CHECK = "check of the loss"
BY_HAND = "by hand"
BESIDE = ("gradient", CHECK, BY_HAND)  # not parts of a plane step
PLANE_LIMIT = 2.5  # gradients, asked for a full plane step


def step_cost(row: Results) -> float:
    """A plane step in gradients, without the check of the loss."""
    seconds = row["seconds"]
    return sum(t for name, t in seconds.items() if name not in BESIDE) / seconds["gradient"]


def step_by_hand(row: Results) -> float | None:
    """The same in bare calls of torch, with K-FAC's statistics and inverses as they are."""
    seconds = row["seconds"]
    if BY_HAND not in seconds:
        return None
    return float(sum(seconds[name] for name in (BY_HAND, "statistics", "inverses")) / seconds["gradient"])


def step_count(row: Results) -> float | None:
    """What a plane step must cost in gradients: its operations, and its vectors at the speed of an inner product."""
    if "count" not in row:
        return None
    return float(row["count"]["operations"] + row["count"]["seconds"] / row["seconds"]["gradient"])


def newton_cost(row: Results) -> float:
    """The average step of `Newton()` in gradients, all that it does included."""
    seconds = row["newton"]["seconds"]
    return float(seconds["step"] / seconds["gradient"])


def plane_steps(rows: Sequence[Results]) -> str:
    parts = [name for name in rows[0]["seconds"] if name not in BESIDE]
    body = []
    for row in rows:
        gradient = row["seconds"]["gradient"]
        cells = [_number(row["seconds"][part] / gradient) for part in parts]
        cost, check = step_cost(row), row["seconds"][CHECK] / gradient
        where = [row["network"], str(row["batch"]), f"{1e3 * gradient:.3g}"]
        newton = [_number(newton_cost(row)), f"{row['newton']['gliding']:.0%}"] if "newton" in row else [NONE, NONE]
        operations = row["count"]["operations"] if "count" in row else None
        counts = [_number(operations), _number(step_count(row))]
        by_hand = _number(step_by_hand(row))
        body.append([*where, *cells, _number(cost), by_hand, *counts, _number(check), *newton])
    header = ["network", "batch", "gradient, ms", *parts, "full plane step", "the same by hand"]
    header += ["count: operations", "count: with vectors", CHECK]
    header += ["average step of Newton()", "of these gliding"]
    text = (
        "Mean of 80 steps, in gradients: K-FAC with statistics every 10 and inverses every 40 steps, the damped model "
        "minimized over the plane of the preconditioned gradient and the previous step, with `DifferenceJacobian`: one "
        "forward pass a direction. `Newton` also evaluates the loss at the new point, the column behind, which is not "
        "in the step. *By hand* is the same step in bare calls of torch, written for a cross entropy, without checks "
        "and without a tape (statistics and inverses as in the table). The counts are from the shapes of the layers: "
        "a gradient, two forward passes, the product with "
        "the Kronecker inverses, statistics and inverses by their shares, and then the vectors like the parameters "
        "that a step reads and writes, each in the time of reading it for an inner product. A forward pass is more "
        "than a third of a gradient, which takes no derivative in the first layer's input. What is beyond the counts "
        f"are calls, and products of small matrices. {_above(rows)}The last columns are "
        "`Newton(params)` over its first 400 steps in the plane regime, all included: most of its steps take the "
        "coefficients of the last full steps and evaluate no loss beside their gradient's."
    )
    return f"### Plane steps with K-FAC\n\n{text}\n\n{table(header, body)}"


def _above(rows: Sequence[Results]) -> str:
    """One sentence on the networks where bare torch is above what is asked; nothing without any."""
    found = {f"{row['network']}, batch {row['batch']}": step_by_hand(row) for row in rows}
    above = [f"{name}: {cost:.2f}" for name, cost in found.items() if cost is not None and cost > PLANE_LIMIT]
    if not above:
        return ""
    return f"By hand, too, a step is above the {PLANE_LIMIT} gradients that are asked for: {'; '.join(above)}. "


def preconditioners(cases: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    columns = [name for name in next(iter(next(iter(cases.values())).values())) if name != "alone"]
    body = [
        [case, name, f"{100 * row['alone']:.0f} %", *(f"{row[column]:.3g}" for column in columns)]
        for case, rows in cases.items()
        for name, row in rows.items()
    ]
    text = (
        "Iterations of CG at λ = 1e-3, batch 512, networks after 100 Adam steps on MNIST: until the quadratic model "
        "has fallen by a share of what it can, and until the residual is 1e-3 of the gradient. *Alone*: the share by "
        "which the preconditioned gradient lowers the model at its best length. The eigenvalues are the extreme ones "
        "of the preconditioned matrix that CG meets. On the autoencoder those of the output layer, I ⊗ R, come 784 "
        "times each: CG needs one iteration for all copies, while no Nyström sketch of fewer than 784 vectors holds "
        "even the largest. K-FAC takes them down, but is blind to what the layers do together: where they cancel, "
        "its preconditioned matrix has eigenvalues far below 1, which the last digits of the residual wait for."
    )
    return f"### Preconditioners\n\n{text}\n\n{table(['network', 'preconditioner', 'alone', *columns], body)}"


def memory(rows: Sequence[Results]) -> str:
    paths = list(dict.fromkeys(path for row in rows for path in row["bytes"]))
    body = []
    for row in rows:
        size = row["bytes"]
        cells = [f"{size[p] / 1e6:.0f} ({size[p] / size['gradient']:.1f})" if p in size else NONE for p in paths]
        body.append([row["network"], *cells])
    text = (
        "What a process grows by at its peak, MB, in brackets multiples of the gradient's; every path in a process of "
        "its own with the allocator as it is. Two products each."
    )
    return f"### Peak memory\n\n{text}\n\n{table(['network', *paths], body)}"


def _number(x: float | None) -> str:
    return NONE if x is None else f"{x:.2f}"
