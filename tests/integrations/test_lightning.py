"""Newton in a Lightning module with automatic optimization: `configure_optimizers` returns it."""

from __future__ import annotations

import lightning
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torchnewton as tn

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


class Classifier(lightning.LightningModule):
    def __init__(self, make_optimizer):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
        self.make_optimizer = make_optimizer
        self.epoch_losses = []

    def training_step(self, batch, index):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


def trainer(**arguments):
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


@pytest.mark.parametrize("method", [tn.Newton, tn.SGN])
def test_automatic_optimization(method):
    y = torch.randint(3, (64,))
    data = TensorDataset(torch.randn(64, 4) + 4 * F.one_hot(y, 4), y)
    model = Classifier(method)

    def loss():
        with torch.no_grad():
            return float(F.cross_entropy(model.net(data.tensors[0]), y))

    before = loss()
    batches_seen = int(model.net[1].num_batches_tracked)
    fit = trainer(max_epochs=6)
    fit.fit(model, DataLoader(data, batch_size=32))
    assert fit.global_step == 12
    assert model.net[1].num_batches_tracked == batches_seen + 12
    assert loss() < 0.5 * before
    assert fit.optimizers[0].report.accepted


def test_fast_dev_run():
    model = Classifier(tn.Newton)
    start = model.net[0].weight.detach().clone()
    trainer(fast_dev_run=True).fit(
        model, DataLoader(TensorDataset(torch.randn(8, 4), torch.randint(3, (8,))), batch_size=8)
    )
    assert not torch.equal(model.net[0].weight, start)
