"""Tables of numbers from the UCI repository and StatLib."""

from __future__ import annotations

from pathlib import Path

from benchmarks.suite import rivals
from benchmarks.suite.methods import usual
from benchmarks.suite.networks import dense
from benchmarks.suite.problems import Supervised
from benchmarks.suite.task import Task
from benchmarks.suite.tasks import data as sets


def _task(name: str, file: str, what: str, samples: int, target: float, limit: float) -> Task:
    def problem(folder: Path) -> Supervised:
        return Supervised(sets.file("table", folder / "regression" / file), dense(50, 50))

    return Task(
        name,
        f"{what}, {samples:,} training samples, a tenth of the rows for the test; all columns with mean 0 and "
        "deviation 1; two hidden layers of 50 ReLU, squared error.",
        "test MSE",
        targets=(target,),
        published="none for this network and split",
        seconds=limit / 4,
        search_seconds=limit / 8,
        search_limit=limit / 3,
        limit=limit,
        samples=samples,
        problem=problem,
        entries=usual("regression", samples, levenberg=rivals.levenberg_marquardt(250)),
    )


REGRESSION = (
    _task("energy", "energy.txt", "Heating load of buildings, 8 inputs", 691, 1.2e-3, 10),
    _task("concrete", "concrete.txt", "Strength of concrete, 8 inputs", 927, 0.03, 10),
    _task("kin8nm", "kin8nm.txt", "A robot arm, 8 inputs", 7373, 0.065, 12),
    _task("power-plant", "power-plant.txt", "Output of a power plant, 4 inputs", 8611, 0.05, 12),
    _task("california", "cal_housing.data.gz", "California housing, 8 inputs", 18576, 0.2, 15),
)
