"""Ways to put a loss together: outputs, losses and backward calls, derivatives inside, real models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import torchnewton as tn
from zoo.problem import Problem, integers, problem, uniform

Build = Callable[[torch.dtype], Problem]
CLOSURES: dict[str, Build] = {}


def closure(build: Build) -> Build:
    """Add a problem under its name."""
    CLOSURES[build.__name__.replace("_", "-")] = build
    return build


@dataclass(frozen=True)
class Data:
    """An MLP with two heads on one batch: what most of the closures below need."""

    body: nn.Module
    heads: nn.ModuleList
    x: Tensor
    y: Tensor
    t: Tensor

    @property
    def params(self) -> list[Tensor]:
        """The parameters of all modules."""
        return [*self.body.parameters(), *self.heads.parameters()]


def _data(dtype: torch.dtype) -> Data:
    torch.manual_seed(1)
    body = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).to(dtype)
    heads = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 2)]).to(dtype)
    return Data(body, heads, uniform(5, 3).to(dtype), integers(3, 5), uniform(5, 2, seed=5).to(dtype))


@closure
def two_losses(dtype: torch.dtype) -> Problem:
    d = _data(dtype)

    def outputs() -> list[Tensor]:
        h = d.body(d.x)
        return [head(h) for head in d.heads]

    return problem(
        d.params,
        outputs,
        lambda a, b: 0.7 * F.cross_entropy(a, d.y) + 0.3 * F.mse_loss(b, d.t, reduction="sum"),
    )


@closure
def two_losses_of_one_output(dtype: torch.dtype) -> Problem:
    d = _data(dtype)
    return problem(
        [*d.body.parameters(), *d.heads[0].parameters()],
        lambda: [d.heads[0](d.body(d.x))],
        lambda z: F.cross_entropy(z, d.y) + 0.1 * F.huber_loss(z, torch.zeros_like(z), delta=0.3),
    )


@closure
def loss_on_a_hidden_layer(dtype: torch.dtype) -> Problem:
    """One output feeds the other."""
    d = _data(dtype)

    def outputs() -> list[Tensor]:
        b = d.heads[1](d.body(d.x))
        return [b, d.heads[0](torch.cat([b, b.sin()], dim=1))]

    return problem(d.params, outputs, lambda b, a: F.mse_loss(b, d.t) + F.cross_entropy(a, d.y))


@closure
def different_batches(dtype: torch.dtype) -> Problem:
    """Two losses on 5 and on 2 samples, as labelled and unlabelled data have."""
    d = _data(dtype)
    return problem(
        d.params,
        lambda: [d.heads[0](d.body(d.x)), d.heads[1](d.body(d.x[:2] ** 2))],
        lambda a, b: F.cross_entropy(a, d.y) + F.mse_loss(b, d.t[:2]),
    )


@closure
def loss_between_two_heads(dtype: torch.dtype) -> Problem:
    """Both arguments of the loss depend on the parameters."""
    d = _data(dtype)
    return problem(
        d.params,
        lambda: [d.heads[0](d.body(d.x))[:, :2], d.heads[1](d.body(d.x))],
        lambda a, b: F.mse_loss(a, b),
    )


@closure
def loop_of_losses(dtype: torch.dtype) -> Problem:
    d = _data(dtype)

    def loss(*z: Tensor) -> Tensor:
        return torch.stack([F.cross_entropy(a, d.y[i : i + 1]) for i, a in enumerate(z)]).mean()

    params = [*d.body.parameters(), *d.heads[0].parameters()]
    return problem(params, lambda: [d.heads[0](d.body(d.x[i : i + 1])) for i in range(5)], loss)


@closure
def root_of_a_loss(dtype: torch.dtype) -> Problem:
    """∂f/∂ℓ depends on ℓ: f = √ℓ."""
    d = _data(dtype)

    def outputs() -> list[Tensor]:
        return [d.heads[1](d.body(d.x))]

    def closure() -> Tensor:
        return F.mse_loss(*outputs(), d.t).sqrt()

    value = float(closure().detach())
    return problem(d.params, outputs, lambda z: 0.5 * F.mse_loss(z, d.t) / value + 0.5 * value, closure)


@closure
def logged_loss(dtype: torch.dtype) -> Problem:
    """Losses that are computed and not returned do not count."""
    d = _data(dtype)

    def closure() -> Tensor:
        z = d.heads[0](d.body(d.x))
        with torch.no_grad():
            F.mse_loss(z, torch.zeros_like(z))
        F.huber_loss(z, torch.zeros_like(z))
        return F.cross_entropy(z, d.y) + F.cross_entropy(z.detach(), d.y)

    return problem(
        d.params,
        lambda: [d.heads[0](d.body(d.x))],
        lambda z: F.cross_entropy(z, d.y) + F.cross_entropy(z.detach(), d.y),
        closure,
    )


@closure
def outputs_in_a_dictionary(dtype: torch.dtype) -> Problem:
    """The model computes its loss and returns it beside other things, which the closure passes on."""
    d = _data(dtype)

    def model(x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = d.heads[0](d.body(x))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    return problem(
        d.params,
        lambda: [d.heads[0](d.body(d.x))],
        lambda z: F.cross_entropy(z, d.y),
        lambda: model(d.x, d.y)["loss"],
    )


@closure
def custom_loss(dtype: torch.dtype) -> Problem:
    d = _data(dtype)

    def log_cosh(z: Tensor) -> Tensor:
        return torch.log(torch.cosh(z - d.t)).mean()

    return problem(
        d.params,
        lambda: [d.heads[1](d.body(d.x))],
        log_cosh,
        lambda: log_cosh(tn.outputs(d.heads[1](d.body(d.x)))),
    )


@closure
def custom_loss_that_mixes_samples(dtype: torch.dtype) -> Problem:
    """A contrastive loss: B is not block diagonal over the samples."""
    d = _data(dtype)

    def loss(z: Tensor) -> Tensor:
        return torch.logsumexp((z[:, None] - z[None]).square().sum(-1).flatten(), 0)

    return problem(d.params, lambda: [d.heads[1](d.body(d.x))], loss, lambda: loss(tn.outputs(d.heads[1](d.body(d.x)))))


@closure
def torch_loss_behind_outputs(dtype: torch.dtype) -> Problem:
    """Marked outputs win over the loss that follows them."""
    d = _data(dtype)

    def loss(z: Tensor) -> Tensor:
        return F.mse_loss(z.exp(), -d.t.abs())

    return problem(d.params, lambda: [d.heads[1](d.body(d.x))], loss, lambda: loss(tn.outputs(d.heads[1](d.body(d.x)))))


@closure
def two_marked_outputs(dtype: torch.dtype) -> Problem:
    """A joint loss of two marked outputs: B has blocks off its diagonal."""
    d = _data(dtype)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return torch.logsumexp(torch.cat([a, b], dim=1), dim=1).sum()

    def outputs() -> list[Tensor]:
        h = d.body(d.x)
        return [head(h) for head in d.heads]

    return problem(d.params, outputs, loss, lambda: loss(*(tn.outputs(z) for z in outputs())))


@closure
def marked_and_torch_loss(dtype: torch.dtype) -> Problem:
    """The outputs of torch losses come first, marked ones last."""
    d = _data(dtype)

    def outputs() -> list[Tensor]:
        h = d.body(d.x)
        return [d.heads[1](h), d.heads[0](h)]

    def loss(b: Tensor, a: Tensor) -> Tensor:
        return torch.logsumexp(a, 1).sum() + F.mse_loss(b, d.t)

    def closure() -> Tensor:
        b, a = outputs()
        return loss(b, tn.outputs(a))

    return problem(d.params, outputs, loss, closure)


@closure
def physics_informed(dtype: torch.dtype) -> Problem:
    """u″ = −sin x inside, u = 0 on the boundary: second derivatives of the network in its input."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)
    points = uniform(6, 1, low=0.0, high=3.0).to(dtype)
    boundary = torch.tensor([[0.0], [3.0]], dtype=dtype)

    def outputs() -> list[Tensor]:
        x = points.clone().requires_grad_()
        u = net(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (ddu,) = torch.autograd.grad(du, x, torch.ones_like(du), create_graph=True)
        return [ddu + torch.sin(x), net(boundary)]

    return problem(
        net,
        outputs,
        lambda inside, edge: (
            F.mse_loss(inside, torch.zeros_like(inside)) + 10 * F.mse_loss(edge, torch.zeros_like(edge))
        ),
    )


@closure
def energy_and_forces(dtype: torch.dtype) -> Problem:
    """Forces are the input gradient of a sum over the atoms: an interatomic potential."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(2, 4), nn.SiLU(), nn.Linear(4, 1)).to(dtype)
    positions, forces, energies = (
        uniform(3, 2, 2).to(dtype),
        uniform(3, 2, 2, seed=5).to(dtype),
        uniform(3).to(dtype),
    )

    def outputs() -> list[Tensor]:
        r = positions.clone().requires_grad_()
        energy = net(r).sum((1, 2))
        (slope,) = torch.autograd.grad(energy.sum(), r, create_graph=True)
        return [energy, -slope]

    return problem(net, outputs, lambda e, f: F.mse_loss(e, energies) + 5 * F.mse_loss(f, forces))


@closure
def accumulated(dtype: torch.dtype) -> Problem:
    """Two micro-batches, each with its own backward call; the closure returns their detached sum."""
    d = _data(dtype)
    batches = [slice(0, 3), slice(3, 5)]
    params = [*d.body.parameters(), *d.heads[0].parameters()]

    def closure() -> Tensor:
        total = torch.zeros((), dtype=dtype)
        for p in params:
            p.grad = None
        for b in batches:
            loss = F.cross_entropy(d.heads[0](d.body(d.x[b])), d.y[b]) * 0.5
            loss.backward()
            total += loss.detach()
        return total

    return problem(
        params,
        lambda: [d.heads[0](d.body(d.x[b])) for b in batches],
        lambda *z: sum(0.5 * F.cross_entropy(a, d.y[b]) for a, b in zip(z, batches, strict=True)),
        closure,
    )


@closure
def frozen_and_unused(dtype: torch.dtype) -> Problem:
    """Every parameter is handed over, the first layer is frozen and one head is unused."""
    d = _data(dtype)
    for p in d.body.parameters():
        p.requires_grad_(False)
    return problem(d.params, lambda: [d.heads[0](d.body(d.x))], lambda z: F.cross_entropy(z, d.y))


@closure
def some_parameters(dtype: torch.dtype) -> Problem:
    """Another optimizer owns the other parameters, which stay in the graph."""
    d = _data(dtype)
    return problem([d.body[0].weight], lambda: [d.heads[0](d.body(d.x))], lambda z: F.cross_entropy(z, d.y))


@closure
def reversed_parameters(dtype: torch.dtype) -> Problem:
    """The order of the parameters is the caller's."""
    d = _data(dtype)
    return problem(d.params[::-1], lambda: [d.heads[1](d.body(d.x))], lambda z: F.mse_loss(z, d.t))


@closure
def scalar_output(dtype: torch.dtype) -> Problem:
    """z without a sample dimension."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)
    x = uniform(5, 3).to(dtype)
    return problem(net, lambda: [net(x).mean()], lambda z: F.mse_loss(z, torch.ones_like(z)))


@closure
def parameter_as_output(dtype: torch.dtype) -> Problem:
    """z is an expression of a parameter: no layer, no batch."""
    theta = torch.tensor([0.3, -0.7], dtype=dtype, requires_grad=True)
    return problem(
        [theta],
        lambda: [torch.stack([10 * (theta[1] - theta[0] ** 2), 1 - theta[0]])],
        lambda z: F.mse_loss(z, torch.zeros_like(z), reduction="sum"),
    )


@closure
def variance_beside_the_mean(dtype: torch.dtype) -> Problem:
    """A variance that is data, of another shape than the mean."""
    d = _data(dtype)
    variance = uniform(5, 1, low=0.5, high=2.0).to(dtype)
    return problem(d.params, lambda: [d.heads[1](d.body(d.x))], lambda z: F.gaussian_nll_loss(z, d.t, variance))


@closure
def poisson_of_rates(dtype: torch.dtype) -> Problem:
    d = _data(dtype)
    return problem(
        d.params,
        lambda: [F.softplus(d.heads[1](d.body(d.x)))],
        lambda z: F.poisson_nll_loss(z, d.t.abs(), log_input=False),
    )


@closure
def probabilities_without_sigmoid(dtype: torch.dtype) -> Problem:
    """binary_cross_entropy of a probability that no sigmoid made splits at the probability."""
    d = _data(dtype)
    return problem(
        d.params,
        lambda: [0.5 + 0.4 * torch.sin(d.heads[1](d.body(d.x)))],
        lambda z: F.binary_cross_entropy(z, d.t.abs()),
    )


@closure
def distillation(dtype: torch.dtype) -> Problem:
    """Two losses of the same logits: kl_div behind a tempered log_softmax, and cross entropy."""
    d = _data(dtype)
    teacher = uniform(5, 3, seed=9).to(dtype).softmax(1)
    params = [*d.body.parameters(), *d.heads[0].parameters()]

    def outputs() -> list[Tensor]:
        z = d.heads[0](d.body(d.x))
        return [z / 2, z]

    def closure() -> Tensor:
        z = d.heads[0](d.body(d.x))
        return F.kl_div(F.log_softmax(z / 2, 1), teacher, reduction="batchmean") + 0.5 * F.cross_entropy(z, d.y)

    return problem(
        params,
        outputs,
        lambda a, z: F.kl_div(a.log_softmax(1), teacher, reduction="batchmean") + 0.5 * F.cross_entropy(z, d.y),
        closure,
    )


@closure
def losses_added_in_place(dtype: torch.dtype) -> Problem:
    d = _data(dtype)

    def added() -> Tensor:
        z = d.heads[0](d.body(d.x))
        loss = F.cross_entropy(z, d.y)
        loss += 0.1 * F.mse_loss(z, torch.zeros_like(z))
        loss /= 2
        return loss

    return problem(
        d.params,
        lambda: [d.heads[0](d.body(d.x))],
        lambda z: 0.5 * F.cross_entropy(z, d.y) + 0.05 * F.mse_loss(z, torch.zeros_like(z)),
        added,
    )


@closure
def outputs_changed_in_place_after_the_loss(dtype: torch.dtype) -> Problem:
    d = _data(dtype)

    def changed() -> Tensor:
        z = d.heads[0](d.body(d.x))
        loss = F.cross_entropy(z, d.y)
        z -= 1.0
        return loss

    return problem(d.params, lambda: [d.heads[0](d.body(d.x))], lambda z: F.cross_entropy(z, d.y), changed)


@closure
def loss_function_as_a_layer(dtype: torch.dtype) -> Problem:
    """Distances to prototypes, computed by a loss function, are the logits of the loss."""
    d = _data(dtype)
    prototypes = uniform(3, 2, seed=6).to(dtype)

    def outputs() -> list[Tensor]:
        h = d.heads[1](d.body(d.x))
        return [-F.mse_loss(h[:, None].expand(5, 3, 2), prototypes.expand(5, 3, 2), reduction="none").sum(-1)]

    return problem(d.params, outputs, lambda z: F.cross_entropy(z, d.y))


@closure
def focal(dtype: torch.dtype) -> Problem:
    """f = Σ φ(ℓᵢ): the weights are φ′(ℓᵢ)."""
    d = _data(dtype)

    def modulated(losses: Tensor) -> Tensor:
        return ((1 - torch.exp(-losses)) ** 2 * losses).mean()

    def losses(z: Tensor) -> Tensor:
        return F.cross_entropy(z, d.y, reduction="none")

    def outputs() -> list[Tensor]:
        return [d.heads[0](d.body(d.x))]

    now = losses(*outputs()).detach().requires_grad_()
    value = modulated(now)
    (weights,) = torch.autograd.grad(value, now)
    offset = value.detach() - weights @ now.detach()

    def loss(z: Tensor) -> Tensor:
        return weights @ losses(z) + offset

    return problem(d.params, outputs, loss, lambda: modulated(losses(*outputs())))


@closure
def contrastive(dtype: torch.dtype) -> Problem:
    """CLIP: every sample against every other, a learned temperature, one matrix of logits read both ways."""
    d = _data(dtype)
    other, scale = nn.Linear(2, 3).to(dtype), nn.Parameter(torch.tensor(0.3, dtype=dtype))
    labels = torch.arange(5)

    def logits() -> Tensor:
        images, texts = F.normalize(d.heads[0](d.body(d.x)), dim=1), F.normalize(other(d.t), dim=1)
        return images @ texts.T * scale.exp()

    def outputs() -> list[Tensor]:
        z = logits()
        return [z, z.T]

    return problem(
        [*d.body.parameters(), *d.heads[0].parameters(), *other.parameters(), scale],
        outputs,
        lambda a, b: (F.cross_entropy(a, labels) + F.cross_entropy(b, labels)) / 2,
    )


@closure
def penalty_by_a_torch_loss(dtype: torch.dtype) -> Problem:
    """Parameters are outputs themselves."""
    d = _data(dtype)
    params = [*d.body.parameters(), *d.heads[0].parameters()]
    return problem(
        params,
        lambda: [d.heads[0](d.body(d.x)), *params],
        lambda z, *p: F.cross_entropy(z, d.y) + sum(F.mse_loss(q, torch.zeros_like(q)) for q in p),
    )


@closure
def two_backward_calls_on_one_graph(dtype: torch.dtype) -> Problem:
    d = _data(dtype)

    def outputs() -> list[Tensor]:
        z = d.heads[0](d.body(d.x))
        return [z, z]

    def losses(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return F.cross_entropy(a, d.y), F.mse_loss(b, torch.zeros_like(b))

    def twice() -> Tensor:
        first, second = losses(*outputs())
        first.backward(retain_graph=True)
        second.backward()
        return (first + second).detach()

    return problem(d.params, outputs, lambda a, b: sum(losses(a, b)), twice)


@closure
def transposed_parameters(dtype: torch.dtype) -> Problem:
    """Parameters that are not contiguous."""
    w, v = (nn.Parameter(uniform(3, 4, seed=s).to(dtype).T) for s in (4, 5))
    x, y = uniform(5, 3).to(dtype), integers(3, 5)
    return problem([w, v], lambda: [torch.tanh(x @ w.T) @ v], lambda z: F.cross_entropy(z, y))


def _gpt2(own_loss: bool, dtype: torch.dtype) -> Problem:
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=7, n_positions=6, n_embd=4, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).to(dtype)
    tokens = integers(7, 2, 5)
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100).flatten()

    def logits() -> list[Tensor]:
        z = model(input_ids=tokens).logits.flatten(0, 1)
        return [z.float() if own_loss else z]

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, targets)

    if own_loss:
        return problem(model, logits, loss, lambda: model(input_ids=tokens, labels=tokens).loss, rtol=1e-5)
    return problem(model, logits, loss)


@closure
def hugging_face_gpt2(dtype: torch.dtype) -> Problem:
    return _gpt2(False, dtype)


@closure
def hugging_face_gpt2_own_loss(dtype: torch.dtype) -> Problem:
    """The class computes its loss in float32 whatever its weights are."""
    return _gpt2(True, dtype)


@closure
def hugging_face_bert(dtype: torch.dtype) -> Problem:
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=7,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=5,
        max_position_embeddings=6,
        num_labels=3,
    )
    model = transformers.BertForSequenceClassification(config).to(dtype)
    batch = {
        "input_ids": integers(7, 3, 5),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]),
    }
    y = torch.tensor([0, 2, 1])
    return problem(
        model,
        lambda: [model(**batch).logits],
        lambda z: F.cross_entropy(z, y),
        lambda: model(**batch, labels=y)["loss"],
    )
