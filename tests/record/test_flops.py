"""Operations of a forward pass beside torch's own count."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode
from zoo import integers, uniform

import torchnewton as tn

X, IMAGES = uniform(8, 10, 16).double(), uniform(3, 32, 9, 9).double()  # mkldnn's LSTM in float32 is not counted


class Calls(nn.Module):
    """Two weights of inputs × outputs in a function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.w, self.v = function, nn.Parameter(uniform(16, 32)), nn.Parameter(uniform(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w, self.v)


class Packed(nn.LSTM):
    """On sequences of different lengths."""

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.tensor([10, 9, 9, 7, 5, 4, 2, 1])
        return super().forward(pack_padded_sequence(x, lengths, batch_first=True))[0].data


class Attention(nn.MultiheadAttention):
    """Of the first half of the steps to all."""

    def forward(self, x: Tensor) -> Tensor:
        key = x[..., : self.kdim]
        return super().forward(x[:, :5], key, key, need_weights=False)[0]


CASES = {
    "linear": (lambda: nn.Linear(16, 32), X),
    "grouped": (lambda: nn.Conv2d(32, 8, 3, groups=2), IMAGES),
    "transposed": (lambda: nn.ConvTranspose2d(32, 3, 4, stride=4), IMAGES),
    "transposed-grouped": (lambda: nn.ConvTranspose2d(32, 6, 3, groups=2), IMAGES),
    "lstm": (lambda: nn.LSTM(16, 32, 2, batch_first=True, bidirectional=True), X),
    "lstm-projected": (lambda: nn.LSTM(16, 32, proj_size=8), X),
    "packed": (lambda: Packed(16, 32, batch_first=True), X),
    "gru": (lambda: nn.GRU(16, 32), X),
    "rnn": (lambda: nn.RNN(16, 32), X),
    "gru-cell": (lambda: nn.GRUCell(16, 32), X[0]),
    "attention": (lambda: Attention(16, 4, batch_first=True), X),
    "attention-widths": (lambda: Attention(16, 4, batch_first=True, kdim=8, vdim=8), X),
    "transformer": (lambda: nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0), X),
    "embedding": (lambda: nn.Embedding(50, 64), integers(50, 8, 10)),
    "weight-norm": (lambda: parametrizations.weight_norm(nn.Linear(16, 32, bias=False)), X),
    "matmul": (lambda: Calls(lambda x, w, v: x @ w @ v), X),
    "transposed-matmul": (lambda: Calls(lambda x, w, v: (v.T @ (w.T @ x.mT)).mT), X),
    "addmm": (lambda: Calls(lambda x, w, v: torch.addmm(torch.zeros(32).to(x), x.view(-1, 16), w) @ v), X),
    "einsum": (lambda: Calls(lambda x, w, v: torch.einsum("...i,io->...o", x, w) @ v), X),
    "einsum-implicit": (lambda: Calls(lambda x, w, v: torch.einsum("ij,jk", x[0], w) @ v), X),
    "products-of-weights": (lambda: Calls(lambda x, w, v: x @ (w @ v)), X),
    "added": (lambda: Calls(lambda x, w, v: (x + w[:, 0]).mean()), X),
}


@pytest.mark.parametrize("name", CASES)
def test_operations_of_a_forward_pass(name):
    torch.manual_seed(0)
    make, x = CASES[name]
    model = make().double()

    def output() -> Tensor:
        found = model(x)
        return found if isinstance(found, Tensor) else found[0]

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output()
    tape = tn.record(lambda: F.mse_loss(z := output(), torch.zeros_like(z)), list(model.parameters()))
    assert tape.forward_flops == pytest.approx(counter.get_total_flops(), rel=0.02)
