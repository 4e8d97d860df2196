"""What the ranks do for `test_partition`: layers and features cut over a mesh, the same samples on all ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from data_parallel_cases import closure_of, make_batch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import torchnewton as tn
from torchnewton import vectors

STEPS = 10
CG = tn.CG(rtol=1e-2, max_iterations=6)
METHODS: dict[str, Callable[..., tn.Newton]] = {
    "newton": partial(
        tn.Newton, solver=CG, damping=tn.LevenbergMarquardt(initial=0.1, minimum=0.03), weight_decay=1e-3
    ),
    "sgn": partial(tn.SGN, damping=0.1, min_damping=3e-2, max_iterations=3, momentum=0.3),
    "newton-krylov": tn.NewtonKrylov,
    "hessian-free": partial(tn.HessianFree, damping=10.0),
}
MESHES = {2: [(2, 1), (1, 2)], 4: [(2, 2)]}


def make_model() -> nn.Module:
    """Sizes that two ranks do not divide."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6, bias=False), nn.Sigmoid(), nn.Linear(6, 3)
    ).double()


class Residual(nn.Module):
    """Layers outside of a Sequential, one of them used twice, between modules that need whole vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + torch.tanh(self.twice(x))
        x = F.layer_norm(x + torch.tanh(self.twice(x)), (4,))
        return self.last(x)


def make_residual() -> nn.Module:
    torch.manual_seed(3)
    return Residual().double()


def whole(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.full_tensor().reshape(-1) if isinstance(t, DTensor) else t.reshape(-1) for t in tensors])


def train(make: Callable[..., tn.Newton], model: nn.Module, steps: int = STEPS, features: Any = None) -> Any:
    """Parameters, (loss, iterations) of every step, and what was exchanged."""
    optimizer = make(model.parameters())
    found, spent = [], []
    for step in range(steps):
        x, y = make_batch(step)
        optimizer.step(closure_of(model, x if features is None else x[:, features], y))
        report = optimizer.report
        found.append((report.loss, report.inner_iterations))
        spent.append((report.bytes_communicated, report.messages))
    return whole([p.detach() for p in model.parameters()]), found, spent


def on_methods(rank: int, size: int) -> Any:
    found = {}
    for shape in MESHES[size]:
        mesh = init_device_mesh("cpu", shape)
        for name, make in METHODS.items():
            model = tn.partition(make_model(), mesh)
            found[shape, name] = train(make, model)
    return found


def on_blocks(rank: int, size: int) -> Any:
    """Names, local shapes, coordinates."""
    found = {}
    for shape in MESHES[size]:
        mesh = init_device_mesh("cpu", shape)
        model = tn.partition(make_model(), mesh)
        parts = {name: tuple(p.to_local().shape) for name, p in model.named_parameters()}
        equal = bool(torch.equal(whole(list(model.parameters())), whole(list(make_model().parameters()))))
        found[shape] = (parts, tuple(mesh.get_coordinate()), equal, repr(model[0]))
    return found


def on_features(rank: int, size: int) -> Any:
    """Every rank gives its own features only."""
    model = tn.partition(make_model(), init_device_mesh("cpu", MESHES[size][0]))
    return train(METHODS["newton"], model, 2, features=model[0].features)


def on_other_modules(rank: int, size: int) -> Any:
    model = tn.partition(make_residual(), init_device_mesh("cpu", MESHES[size][0]))
    return train(METHODS["newton"], model, 2)


def products(model: nn.Module) -> list[Tensor]:
    """Products with the Gauss-Newton matrix and the Hessian, of a loss with derivatives by the input inside."""
    params, (x, y) = list(model.parameters()), make_batch()

    def closure() -> Tensor:
        inputs = x.clone().requires_grad_()
        z = model(inputs)
        (slope,) = torch.autograd.grad(z[:, 0].sum(), inputs, create_graph=True)
        return F.cross_entropy(z, y) + F.mse_loss(slope, torch.ones_like(slope))

    tape = tn.record(closure, params)
    v = [g.detach().sin() for g in tape.gradient]
    found = [tape.gradient, tn.GaussNewton(tape) @ v, tn.Hessian(tape) @ v]
    return [whole(t) for t in found]


def on_products(rank: int, size: int) -> Any:
    return products(tn.partition(make_model(), init_device_mesh("cpu", MESHES[size][0])))


def on_numbers(rank: int, size: int) -> Any:
    """Inner products and the like inside a step and outside."""
    model = tn.partition(make_model(), init_device_mesh("cpu", MESHES[size][0]))
    x = [p.detach() for p in model.parameters()]
    y = [p.cos() for p in x]
    plain = [torch.arange(3.0, dtype=torch.float64)]
    bad = [p.clone() for p in x]
    if rank == size - 1:
        bad[0].to_local()[-1:, -1:] = torch.inf

    def numbers() -> list[float]:
        mixed = [*x, *plain]
        return [vectors.dot(mixed, [*y, *plain]), vectors.max_abs(mixed), vectors.is_finite(mixed)]

    outside = numbers(), vectors.is_finite(bad)
    share = model[0].axes
    share.spent()
    with share.agreeing():
        inside = numbers(), vectors.is_finite(bad)
    return outside, inside, share.spent()


def on_copies(rank: int, size: int) -> Any:
    """A copied model, and one whose last part is empty on some rank."""
    mesh = init_device_mesh("cpu", MESHES[size][0])
    model = copy.deepcopy(tn.partition(make_model().float(), mesh)).double()
    torch.manual_seed(1)
    narrow = tn.partition(nn.Sequential(nn.Linear(5, 1), nn.Tanh(), nn.Linear(1, 3)).double(), mesh)
    return train(METHODS["newton"], model, 2), train(METHODS["newton"], narrow, 2)


def on_own_blocks(rank: int, size: int) -> Any:
    """Every rank solves for what it holds."""
    found = {}
    for combine in (False, True):
        model = tn.partition(make_model(), init_device_mesh("cpu", MESHES[size][0]))
        how = {"rtol": 1e-12, "weight_decay": 1e-3, "combine": combine}
        optimizer = tn.DistributedNewton(model.parameters(), **how)
        for step in range(4):
            optimizer.step(closure_of(model, *make_batch(step)))
        found[combine] = whole([p.detach() for p in model.parameters()]), optimizer.report.solver
    return found


def make_variant(name: str) -> nn.Module:
    """Models of which a rank has no output of the last layer, or that are not trained as a whole."""
    torch.manual_seed(4)
    last = 1 if name == "one output" else 3
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, last)).double()
    frozen = {"frozen weight": ["2.weight"], "biases": ["0.weight", "2.weight", "4.weight"]}
    for key, p in model.named_parameters():
        p.requires_grad_(key not in frozen.get(name, []))
    return model


def loss_of_variant(name: str, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    z = model(x)
    if name == "one output":
        return F.binary_cross_entropy_with_logits(z, (y > 0).double()[:, None])
    if name == "one number":
        return F.binary_cross_entropy_with_logits(z[:, 0], (y > 0).double())
    return F.cross_entropy(z, y)


VARIANTS = ("one output", "one number", "frozen weight", "biases")


def on_variants(rank: int, size: int) -> Any:
    found = {}
    for shape in MESHES[size]:
        for name in VARIANTS:
            model = tn.partition(make_variant(name), init_device_mesh("cpu", shape))
            optimizer = tn.DistributedNewton(model.parameters(), rtol=1e-12)
            for step in range(2):
                optimizer.step(partial(loss_of_variant, name, model, *make_batch(step)))
            found[shape, name] = whole([p.detach() for p in model.parameters()])
    return found


def on_mixed_samples(rank: int, size: int) -> list[str]:
    """Blocks are for networks that treat samples independently."""
    model = tn.partition(make_model(), init_device_mesh("cpu", MESHES[size][0]))
    x, y = make_batch()

    def closure() -> Tensor:
        z = model(x)
        return F.cross_entropy(z - z.square().mean(0), y)

    optimizer = tn.DistributedNewton(model.parameters())
    hessian = tn.DistributedNewton(model.parameters())
    hessian.curvature = tn.Hessian
    return [message_of(lambda: optimizer.step(closure)), message_of(lambda: hessian.step(closure))]


def on_part_of_the_processes(rank: int, size: int) -> Any:
    """Two models beside each other, each on its own mesh of half of the ranks."""
    mesh = init_device_mesh("cpu", (2, size // 2, 1), mesh_dim_names=("models", "rows", "columns"))["rows", "columns"]
    model = tn.partition(make_model(), mesh)
    found = train(METHODS["newton"], model, 2)
    optimizer = tn.DistributedNewton(model.parameters())
    return found, message_of(lambda: optimizer.step(closure_of(model, *make_batch())))


def message_of(run: Callable[[], Any]) -> str:
    try:
        run()
    except ValueError as error:
        return str(error)
    return ""


def on_misuse(rank: int, size: int) -> list[str]:
    mesh, line = init_device_mesh("cpu", MESHES[size][0]), init_device_mesh("cpu", (size,))
    tied = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    tied[2].weight = tied[0].weight
    hooked = make_model()
    hooked[0].register_forward_hook(lambda module, args, output: None)
    cut = tn.partition(make_model(), mesh)
    return [
        message_of(lambda: tn.partition(make_model(), line)),
        message_of(lambda: tn.partition(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)), mesh)),
        message_of(lambda: tn.partition(tied, mesh)),
        message_of(lambda: tn.partition(cut, mesh)),
        message_of(lambda: tn.partition(nn.Tanh(), mesh)),
        message_of(lambda: tn.partition(hooked, mesh)),
        message_of(lambda: tn.Newton(cut.parameters(), solver=tn.Direct()).step(closure_of(cut, *make_batch()))),
        message_of(lambda: cut(torch.zeros(2, 4, dtype=torch.float64))),
    ]
