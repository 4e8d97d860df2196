"""Images: MNIST, Fashion-MNIST, parts of CIFAR-10, the digits of scikit-learn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.suite import rivals
from benchmarks.suite.methods import usual
from benchmarks.suite.networks import Network, cnn_4layers, named, pixel_entropy, sigmoid, small_cnn, squared_error
from benchmarks.suite.problems import Supervised
from benchmarks.suite.task import Task
from benchmarks.suite.tasks import data as sets
from torchnewton.train import data
from torchnewton.train.data import Dataset

C = 0.01  # the constant of Newton-CG's objective, whose weight decay is 1 / (C · samples)
SMALL_SGD = (0.001, 0.003, 0.01, 0.03, 0.1)
CNN = (
    "CNN_4layers, pixels divided by 255 less their means; ‖z − y‖² for y one-hot. Newton-CG minimizes the published "
    "objective, with weight decay 1/(0.01·samples), the others without."
)


def _mnist(folder: Path) -> Dataset:
    return data.load("mnist", folder)


def _cnn(found: Dataset) -> Supervised:
    return Supervised(sets.centred(found), cnn_4layers, squared_error)


def _test_on(name: str, network: Network, test: int) -> Callable[[Path], Supervised]:
    return lambda folder: Supervised(sets.first(data.load(name, folder), None, test), network)


IMAGES = (
    Task(
        "mnist-mlp",
        "MNIST divided by 255, 784-20-20-20-10 with sigmoids, weights from N(0, 1), cross entropy.",
        "test accuracy",
        targets=(0.94,),
        published="SGN with 5 CG iterations 94.08 % in 443 s, SGD 93.94 % in 415 s (GTX TITAN X)",
        seconds=4,
        search_seconds=2,
        search_limit=4,
        limit=12,
        samples=60_000,
        problem=_test_on("mnist", named("sigmoid-mlp:20-20-20"), 10_000),
        entries=usual("classification", 60_000, cg_iterations=5, sgn_seconds=100, sgd_rates=(0.03, 0.1, 0.3, 1.0, 3.0)),
    ),
    Task(
        "fashion-lenet",
        "Fashion-MNIST, every image with mean 0 and deviation 1, a LeNet of 44,426 parameters, cross entropy; tested "
        "on 2,000 of the test images.",
        "test accuracy",
        targets=(0.87,),
        published="SGN 88.89 % in 270 s, SGD 89.08 % in 325 s (GTX TITAN X)",
        seconds=6,
        search_seconds=2,
        search_limit=6,
        limit=16,
        samples=60_000,
        problem=lambda folder: Supervised(
            sets.standardized_images(sets.first(data.load("fashion-mnist", folder), None, 2000)), named("lenet")
        ),
        entries=usual("classification", 60_000, lbfgs_batches=(1000,), convolutional=True),
    ),
    Task(
        "cnn-mnist",
        f"The first 2,000 images of MNIST, tested on the next 1,000. {CNN}",
        "test accuracy",
        targets=(0.975,),
        published="none for this part; the target is asked for",
        seconds=8,
        search_seconds=3,
        search_limit=8,
        limit=20,
        samples=2000,
        sensitivity=8,
        problem=lambda folder: _cnn(sets.held_out(_mnist(folder), 2000, 1000)),
        entries=usual(
            "classification",
            2000,
            sgd_rates=SMALL_SGD,
            first_order_batch=32,
            lbfgs_iterations=4,
            weight_decay=1 / (C * 2000),
            newton_cg_seconds=120,  # about 45 steps
            convolutional=True,
        ),
    ),
    Task(
        "cnn-cifar",
        f"3,500 of the first 4,000 training images of CIFAR-10, tested on the other 500. {CNN}",
        "test accuracy",
        targets=(0.45,),
        published="on all of CIFAR-10, 78.33 % for Newton-CG after 100 steps and about 76 % for SGD; not comparable",
        seconds=8,
        search_seconds=3,
        search_limit=8,
        limit=14,
        samples=3500,
        problem=lambda folder: _cnn(data.load("cifar10-npz", folder)),
        entries=usual(
            "classification",
            3500,
            sgd_rates=SMALL_SGD,
            first_order_batch=32,
            lbfgs_iterations=4,
            weight_decay=1 / (C * 3500),
            convolutional=True,
        ),
    ),
    Task(
        "mnist-cnn-1026",
        "MNIST divided by 255, a convolutional network of 1,026 parameters with ELU, cross entropy; the example of "
        "torch-levenberg-marquardt.",
        "test accuracy",
        targets=(0.95, 0.9759),
        published="Levenberg-Marquardt 97.59 % in 22.1 s, Adam 97.32 % in 125.3 s; that is the target",
        seconds=6,
        search_seconds=2,
        search_limit=7,
        limit=45,
        samples=60_000,
        problem=_test_on("mnist", small_cnn, 10_000),
        entries=usual(
            "classification",
            60_000,
            convolutional=True,
            newton_batch=1000,
            levenberg=rivals.levenberg_marquardt(
                5000, "CrossEntropyLoss", learning_rate=0.05, solver="qr", max_batch_size=200
            ),
        ),
    ),
    Task(
        "autoencoder",
        "784-250-30-250-784 with sigmoids on 10,000 images of MNIST, tested on 2,000 others; cross entropy of the "
        "pixels, summed over an image.",
        "test cross entropy",
        targets=(90.0,),
        published="none for this network; on a deeper one K-FAC needs 3.8 times less time than SGD with momentum",
        seconds=6,
        search_seconds=2,
        search_limit=6,
        limit=16,
        samples=10_000,
        problem=lambda folder: Supervised(
            sets.pictures(sets.first(_mnist(folder), 10_000, 2000)),
            sigmoid(250, 30, 250),
            pixel_entropy,
            test_loss=True,
        ),
        entries=usual("classification", 10_000, sgd_rates=SMALL_SGD, lbfgs_batches=(None, 2000)),
    ),
    Task(
        "digits",
        "The digits of scikit-learn, 1,437 training and 360 test images of 8×8 pixels; the small convolutional "
        "network that `torchnewton train` trains when it is given no argument, cross entropy.",
        "test accuracy",
        targets=(0.975,),
        published="none; the target is asked for",
        seconds=3,
        search_seconds=1,
        search_limit=3,
        limit=10,
        samples=1437,
        problem=_test_on("digits", named("cnn"), 360),
        entries=usual("classification", 1437),
    ),
)
