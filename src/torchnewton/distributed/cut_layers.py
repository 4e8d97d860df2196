"""The distributed Newton paper's partition: every linear layer's weight in blocks over a 2-D mesh."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from torchnewton.distributed.axes import Axes, Call, cut, joined, noted, spread, summed

ELEMENTWISE = (
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Tanh,
    nn.Sigmoid,
    nn.LogSigmoid,
    nn.Softplus,
    nn.Softsign,
    nn.Hardtanh,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Tanhshrink,
    nn.Softshrink,
    nn.Hardshrink,
    nn.Threshold,
)


class CutLinear(nn.Module):
    """y = xWᵀ + b, of which rank (i, j) of a mesh holds W[Tʲ, Sⁱ] and b[Tʲ]: S the inputs, T the outputs, cut in parts.

    i is the coordinate along the axis `across`, over which the products W[Tʲ, Sⁱ]xⁱ are summed; j that along the other
    one, over which the outputs are cut. `takes_parts` and `gives_parts` say whether xⁱ and yʲ are what the layer takes
    and gives, or the whole of them. A layer that takes the whole x also takes xⁱ = x[..., layer.features].

    Shapes: x (…, inputs) → y (…, outputs), or parts of them in the last dimension.
    Cost: a part of the layer's products, 1 / ranks; one sum of yʲ forward and one of xⁱ backward, and one message that
    joins the yʲ where they are to be whole.
    Errors: `ValueError` for an x of another length.
    """

    def __init__(self, linear: nn.Linear, axes: Axes, across: int, takes_parts: bool, gives_parts: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.axes, self.across = axes, across
        self.takes_parts, self.gives_parts = takes_parts, gives_parts
        self.weight = _distributed(linear.weight, axes, {across: Shard(1), 1 - across: Shard(0)})
        self.bias = None if linear.bias is None else _distributed(linear.bias, axes, {1 - across: Shard(0)})
        self.train(linear.training)

    @property
    def features(self) -> slice:
        """The inputs Sⁱ that this rank works with."""
        return self.axes.axes[self.across].part(self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Product, sum along one axis; whatever is whole is joined along the other."""
        for p in self.parameters():  # of copies and conversions, too; see `record_share`
            p.share = self.axes  # type: ignore[attr-defined]
        inner, outer = self.axes.axes[self.across], self.axes.axes[1 - self.across]
        x = spread(self._part(x), outer)
        y = summed(F.linear(x, _local(self.weight)), inner)
        if self.bias is not None:
            y = y + _local(self.bias)
        y = noted(y, Call(self.weight, self.bias, x.detach()))
        if not self.gives_parts:
            y = joined(y, outer, self.out_features)
        return y

    def _part(self, x: Tensor) -> Tensor:
        start, stop = self.features.start, self.features.stop
        if x.shape[-1] == self.in_features and not self.takes_parts:
            return cut(x, self.axes.axes[self.across])
        if x.shape[-1] != stop - start:
            whole = "" if self.takes_parts else f"all {self.in_features} features, or "
            raise ValueError(
                f"a layer that tn.partition has cut: its input has {x.shape[-1]} features; give it {whole}this rank's "
                f"{stop - start}, x[..., {start}:{stop}]."
            )
        return x

    def extra_repr(self) -> str:
        """The layer and its block."""
        block = tuple(_local(self.weight).shape)
        return f"in_features={self.in_features}, out_features={self.out_features}, block={block}"


def partition(model: nn.Module, mesh: DeviceMesh, *, timeout: float = 600.0) -> nn.Module:
    """Cut every linear layer of `model` in blocks over a 2-D mesh, one block on each rank; returns the model.

        mesh = init_device_mesh("cpu", (2, 2))
        model = tn.partition(nn.Sequential(nn.Linear(784, 1000), nn.Sigmoid(), nn.Linear(1000, 10)), mesh)
        optimizer = tn.Newton(model.parameters(), solver=tn.CG())

    The neurons of each layer are cut in parts, the inputs of the first one, too, and rank (i, j) holds the block
    W[Tʲ, Sⁱ] of outputs Tʲ and inputs Sⁱ. Where linear layers follow one another in an `nn.Sequential`, with
    elementwise activations between them and nothing else, parts are passed on: a layer sums over one axis of the mesh
    and the next one over the other, so that nothing is transposed. Elsewhere a layer takes and gives whole vectors.

    The closure stays what it is: all ranks give the same samples, and the model gives whole outputs. It takes the whole
    input, or only this rank's features of it: x[..., model[0].features], where the first module is a layer.
    The parameters become DTensors with the values that rank 0 has: make the optimizer afterwards. `Newton` and its
    named methods with CG, MINRES or BiCGSTAB make the steps of one process, with Krylov vectors that are cut likewise.

    Args:
        model: changed in place, but for an `nn.Linear` itself.
        mesh: a `DeviceMesh` with two dimensions, whose sizes need not divide anything; (n, 1) cuts every other layer by
            inputs and the rest by outputs.
        timeout: seconds after which an exchange fails with a `RankError` that names the missing ranks.

    Cost: 1 / ranks of the products and of the memory for parameters, their vectors and activations; messages: see
    `CutLinear`, and two for an inner product.
    Errors: `ValueError` for what cannot be cut, with what it is called in the model.
    Source: Wang et al., "Distributed Newton Methods for Deep Neural Networks", arXiv 1802.00130: the model and
    feature-wise partition (abstract); blocks over pairs of layers recalled. Deviations: the axes change their roles
    from layer to layer; curvature products come by double backward, with a message for each layer and direction.
    """
    if mesh.ndim != 2:
        raise ValueError(
            f"partition: mesh has {mesh.ndim} dimension(s), it needs two: init_device_mesh(device, (rows, columns))."
        )
    _check(model)
    axes = Axes(mesh, timeout)
    if isinstance(model, nn.Linear):
        return CutLinear(model, axes, 0, False, False)
    places = _places(model)
    for chain in _chains(model, places):
        for number, layer in enumerate(chain):
            new = CutLinear(layer, axes, number % 2, number > 0, number < len(chain) - 1)
            for name in places[layer]:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, new)
    return model


def _places(model: nn.Module) -> dict[nn.Linear, list[str]]:
    """All linear layers and what they are called; one that is used in two places has two names."""
    places: dict[nn.Linear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            places.setdefault(module, []).append(name)
    return places


def _check(model: nn.Module) -> None:
    """Raise `ValueError` for what cannot be cut."""
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (module._forward_hooks or module._forward_pre_hooks):
            raise ValueError(f"partition: {name} has hooks, which would see parts: register them after the partition.")
        for own, p in module.named_parameters(recurse=False):
            full = f"{name}.{own}".lstrip(".")
            if type(module) is not nn.Linear or own not in ("weight", "bias"):
                raise ValueError(
                    f"partition: {full} belongs to {type(module).__name__}, and only the parameters of nn.Linear can "
                    "be cut; build that part of linear layers, or use data parallelism (process_group=)."
                )
            if isinstance(p, DTensor):
                raise ValueError(f"partition: {full} is a DTensor already; give a model that has not been cut.")
            if id(p) in owners:
                raise ValueError(f"partition: {full} and {owners[id(p)]} are one parameter, which cannot be cut twice.")
            owners[id(p)] = full
    if not owners:
        raise ValueError("partition: the model has no nn.Linear layer that could be cut.")


def _chains(model: nn.Module, places: dict[nn.Linear, list[str]]) -> list[list[nn.Linear]]:
    """Layers between which nothing but elementwise functions is applied."""
    chains: list[list[nn.Linear]] = []
    for module in model.modules():
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            chains.append([])
            for part in module:
                if isinstance(part, nn.Linear) and len(places[part]) == 1:
                    chains[-1].append(part)
                elif type(part) not in ELEMENTWISE:
                    chains.append([])
    chained = {layer for chain in chains for layer in chain}
    return chains + [[layer] for layer in places if layer not in chained]


def _distributed(p: Tensor, axes: Axes, cuts: dict[int, Placement]) -> nn.Parameter:
    """As a DTensor."""
    found = distribute_tensor(p.detach(), axes.mesh, [cuts.get(dim, Replicate()) for dim in range(2)])
    return nn.Parameter(found, requires_grad=p.requires_grad)


def _local(p: Tensor) -> Tensor:
    """This rank's part."""
    assert isinstance(p, DTensor)  # for mypy
    return p.to_local()
