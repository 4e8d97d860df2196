"""What the graph alone tells of the samples: it must never be wrong, and it must tell of plain perceptrons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchnewton as tn
from torchnewton.curvature.layer_jacobian import factors
from torchnewton.curvature.layer_jacobian.apart import rows_stay_apart
from torchnewton.record.graph import edge_of, grad

N = 5
W, V, b, X = (
    torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
    for i, shape in enumerate([(N, N), (3, N), (N,), (N, N)])
)
W.requires_grad_(), V.requires_grad_(), b.requires_grad_()

SURE: dict[str, Callable[[], Tensor]] = {
    "one layer": lambda: F.linear(X, W, b),
    "without bias": lambda: F.linear(X, W),
    "two layers": lambda: F.linear(F.relu(F.linear(X, W, b)), V),
    "smooth": lambda: F.linear(F.gelu(F.silu(torch.tanh(F.linear(X, W, b)))), V).sigmoid(),
    "constant weight": lambda: F.linear(F.elu(F.linear(X, W, b)), X),
}
UNSURE: dict[str, Callable[[], Tensor]] = {
    "samples in the weight": lambda: F.linear(F.linear(X, W), F.linear(X, W)),
    "samples in the weight alone": lambda: F.linear(X, torch.tanh(F.linear(X, W))),
    "samples in the bias": lambda: F.linear(F.linear(X, W), W, F.linear(X, W)[0]),
    "rows mixed from the left": lambda: X @ F.linear(X, W),
    "a parameter as input": lambda: W @ X,
    "transposed": lambda: F.linear(F.linear(X, W).T, W),
    "centred": lambda: (h := F.linear(X, W)) - h.mean(0),
    "normalized": lambda: F.batch_norm(F.linear(X, W), None, None, training=True),
    "turned": lambda: F.linear(F.linear(X, W).roll(1, 0), W),
    "in place": lambda: F.linear(X, W).index_add_(0, torch.tensor([1]), F.linear(X, W)[:1]),
}


@pytest.mark.parametrize("name", SURE)
def test_the_graph_tells(name: str) -> None:
    assert rows_stay_apart([edge_of(SURE[name]())])


@pytest.mark.parametrize("name", UNSURE)
def test_the_graph_does_not_tell(name: str) -> None:
    assert not rows_stay_apart([edge_of(UNSURE[name]())])


@pytest.mark.parametrize("in_front", [None, nn.BatchNorm1d(4)])
def test_the_random_cotangents_are_spared(in_front: nn.Module | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One backward pass for each output and, where the graph does not tell, one more."""
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4), *([] if in_front is None else [in_front]), nn.Tanh(), nn.Linear(4, 2)]
    model, x = nn.Sequential(*layers).double(), X[:, :3]
    passes = []

    def counted(*args: Any) -> list[Tensor | None]:
        passes.append(args)
        return grad(*args)

    monkeypatch.setattr(factors, "grad", counted)
    params = [p for layer in (model[0], model[-1]) for p in layer.parameters()]
    J = tn.LayerJacobian(tn.record(lambda: F.mse_loss(model(x), X[:, :2]), params))
    assert J.factors.covered == ({0, 1, 2, 3} if in_front is None else {2, 3})
    assert len(passes) == (2 if in_front is None else 3)
