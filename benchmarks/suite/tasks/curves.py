"""Functions of one variable, and a differential equation."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from benchmarks.suite import rivals
from benchmarks.suite.methods import adam, adamw, first_order, lbfgs, muon, newton, newton_cg, sgd, sgn, usual
from benchmarks.suite.networks import dense, named
from benchmarks.suite.problems import Poisson, Supervised
from benchmarks.suite.task import Task
from benchmarks.suite.tasks import data as sets
from torchnewton.train import data

SIGMOID_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
SINE = "7,000 training and 3,000 test samples, 1-20-20-20-1 with sigmoids, weights from N(0, 1), squared error."


def _sine(frequency: int) -> Supervised:
    return Supervised(data.load(f"sine:{frequency}", Path()), named("sigmoid-mlp:20-20-20"))


CURVES = (
    Task(
        "sine-10",
        f"y = sin(10x) + 0.01·noise on [−1, 1], so that the noise floor is 1e-4: {SINE}",
        "test MSE",
        targets=(1.1e-4,),
        published="SGN with 20 CG iterations 1.04e-4 after 100 s, best SGD 0.146 (GTX TITAN X); the target is the "
        "noise floor and a tenth",
        seconds=4,
        search_seconds=2,
        search_limit=5,
        limit=12,
        samples=7000,
        sensitivity=6,
        problem=lambda folder: _sine(10),
        entries=usual(
            "regression",
            7000,
            cg_iterations=20,
            sgn_seconds=100,
            sgd_rates=SIGMOID_RATES,
            lbfgs_batches=(None, 1000),
            levenberg=rivals.levenberg_marquardt(1000),
        ),
    ),
    Task(
        "sine-100",
        f"y = sin(100x) + 0.01·noise on [−1, 1]: {SINE}",
        "test MSE",
        targets=(0.45, 0.35),
        published="SGN with 30 CG iterations 0.353, best SGD 0.50, after 100 s; that is the target",
        seconds=5,
        search_seconds=2,
        search_limit=6,
        limit=16,
        samples=7000,
        problem=lambda folder: _sine(100),
        entries=usual(
            "regression",
            7000,
            cg_iterations=30,
            sgn_seconds=100,
            sgd_rates=SIGMOID_RATES,
            lbfgs_batches=(None,),
            levenberg=rivals.levenberg_marquardt(1000),
        ),
    ),
    Task(
        "sinc",
        "y = sinc(10x) at 20,000 points of [−1, 1], 1-20-1 with tanh, 61 parameters, squared error on the training "
        "data; the example of torch-levenberg-marquardt.",
        "training MSE",
        targets=(1e-4, 3.3e-7),
        published="Levenberg-Marquardt 3.3e-7 in 16.6 s, Adam 4.1e-4 in 2,604.6 s; that is the target",
        seconds=3,
        search_seconds=1,
        search_limit=4,
        limit=12,
        samples=20_000,
        problem=lambda folder: Supervised(sets.sinc(), dense(20, activation=nn.Tanh)),
        entries=(
            newton(None),
            sgn(1000, 20),
            newton_cg(),
            lbfgs(None),
            *first_order(1000, SIGMOID_RATES, (1e-3, 3e-3, 1e-2, 3e-2, 0.1)),
            rivals.torchzero_newton_cg(1000),
            rivals.torchzero_levenberg(250),
            rivals.levenberg_marquardt(1000),
        ),
    ),
    Task(
        "poisson",
        "−Δu = f on the unit square with u = 0 on its boundary, solution sin(πx)·sin(πy), as a physics-informed "
        "network: 2-32-32-1 with tanh, float64, 900 points inside and 120 on the boundary, the mean squares of "
        "Δu + f and of u on the boundary added; relative L2 error on a 61×61 grid.",
        "relative error",
        targets=(1e-1, 1e-2, 1e-3),
        published="none; the strictest target is asked for",
        seconds=5,
        search_seconds=2,
        search_limit=5,
        limit=12,
        samples=1020,
        problem=lambda folder: Poisson(),
        entries=(
            newton(None),
            sgn(None, 20),
            lbfgs(None),
            sgd(None, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
            *(make(None, (1e-3, 3e-3, 1e-2, 3e-2, 0.1)) for make in (adam, adamw, muon)),
            rivals.torchzero_newton_cg(None),
        ),
    ),
)
