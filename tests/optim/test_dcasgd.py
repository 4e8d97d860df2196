"""DC-ASGD: the update by hand, its limits bit for bit, and a server whose workers die and come late."""

from __future__ import annotations

import copy
import json
import math
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from methods import differences, make_batch, make_model, snapshot, train
from reference import assert_close
from server_process import batch_of
from server_process import make_model as make_served
from torch import nn

import torchnewton as tn

PROCESS = Path(__file__).with_name("server_process.py")


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_without_delay_it_is_sgd_bit_for_bit(momentum, weight_decay, adaptive):
    settings = {"lr": 0.1, "momentum": momentum, "weight_decay": weight_decay}
    ends, losses = [], []
    for make in (lambda p: tn.DCASGD(p, adaptive=adaptive, **settings), lambda p: torch.optim.SGD(p, **settings)):
        model = make_model()
        torch.manual_seed(3)
        optimizer = make(model.parameters())
        losses.append([optimizer.step(closure_of(model, step)).item() for step in range(10)])
        ends.append(snapshot(model))
    assert losses[0] == losses[1]
    assert differences(*ends) == []


def closure_of(model, step):
    x, y = make_batch(step)

    def closure():
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("adaptive", [False, True])
def test_without_compensation_it_is_asynchronous_sgd_bit_for_bit(adaptive):
    """SGD on gradients at the parameters of `delay` updates before."""
    ours, theirs = make_model().eval(), make_model().eval()
    optimizer = tn.DCASGD(ours.parameters(), lr=0.1, momentum=0.5, compensation=0.0, adaptive=adaptive, delay=3)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.5)
    past = []
    for step in range(12):
        optimizer.step(closure_of(ours, step))
        now = [p.detach().clone() for p in theirs.parameters()]
        past.append(now)
        old = past[max(0, step - 3)]
        stale = make_model().eval()
        stale.load_state_dict(theirs.state_dict())
        with torch.no_grad():
            for p, value in zip(stale.parameters(), old, strict=True):
                p.copy_(value)
        closure_of(stale, step)()
        for p, q in zip(theirs.parameters(), stale.parameters(), strict=True):
            p.grad = q.grad
        sgd.step()
    assert differences(snapshot(ours), snapshot(theirs)) == []


@pytest.mark.parametrize("adaptive", [False, True])
def test_update_by_hand(adaptive):
    """Two workers on f = ½hθ², three turns, in scalars."""
    h, lr, strength, mu, w = 2.0, 0.1, 0.5, 0.9, 1.5
    backups, squares = [w, w], [0.0, 0.0]
    for turn in range(5):
        m = turn % 2
        g = h * backups[m]
        squares[m] = mu * squares[m] + (1 - mu) * g * g
        factor = strength / math.sqrt(squares[m] + 1e-7) if adaptive else strength
        w -= lr * (g + factor * g * g * (w - backups[m]))
        backups[m] = w
    theta = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    optimizer = tn.DCASGD([theta], lr=lr, compensation=strength, adaptive=adaptive, decay=mu, delay=1)

    def closure():
        theta.grad = None
        loss = 0.5 * h * theta**2
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    assert_close(theta.detach(), torch.tensor(w, dtype=torch.float64), 1e-13)


def test_correction_is_first_order_where_the_hessian_is_the_squared_gradient():
    """For f = −log θ, f'' = f'²: with λ = 1 the corrected gradient errs by the square of the distance."""
    errors = []
    for distance in (0.1, 0.05):
        g, w = torch.tensor([-1.0], dtype=torch.float64), 1 + distance
        group = {"compensation": 1.0, "adaptive": False}
        found, _ = tn.optim.dcasgd.compensated(g, torch.tensor([distance], dtype=torch.float64), None, group)
        errors.append(abs(found.item() + 1 / w))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_continues_bit_for_bit():
    def make(model):
        return tn.DCASGD(model.parameters(), lr=0.05, adaptive=True, momentum=0.5, delay=2)

    model = make_model()
    optimizer = make(model)
    train(model, optimizer, 0, 4)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    random = torch.get_rng_state()
    losses = train(model, optimizer, 4, 10)
    again = make_model()
    again.load_state_dict(saved[0])
    resumed = make(again)
    resumed.load_state_dict(saved[1])
    torch.set_rng_state(random)
    assert train(again, resumed, 4, 10) == losses
    assert differences(snapshot(again), snapshot(model)) == []


def test_failed_turn_leaves_everything_and_names_the_worker():
    model = make_model()
    optimizer = tn.DCASGD(model.parameters(), delay=2, momentum=0.9)
    train(model, optimizer, 0, 4)
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict()["state"])
    good = closure_of(model, 4)

    def bad():
        good()
        next(model.parameters()).grad[0] = math.inf
        return torch.tensor(1.0)

    optimizer.step(bad)
    assert optimizer.report.status == "rejected: the gradient is not finite (worker 1)"
    assert differences(snapshot(model), before) == []
    now = optimizer.state_dict()["state"]
    assert now[0]["turn"] == state[0]["turn"]
    for i in now:
        assert torch.equal(now[i]["momentum"], state[i]["momentum"])
    optimizer.step(good)
    assert optimizer.report.accepted


def test_a_compensation_that_overflows_leaves_everything():
    """g is finite, g⊙g⊙(w − w_bak) is not."""
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    optimizer = tn.DCASGD(params, lr=0.1, compensation=1.0, momentum=0.9)
    optimizer.send("a")
    assert optimizer.receive("b", [torch.ones(3), torch.ones(2)]) == ""
    before, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
    message = optimizer.receive("a", [torch.ones(3), torch.full((2,), 1e30)])
    assert message == "the compensated gradient is not finite"
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    assert str(optimizer.state_dict()) == str(state)


def test_without_delay_changed_parameters_are_those_of_the_next_step():
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    optimizers = tn.DCASGD(params[:1], lr=0.1), torch.optim.SGD(params[1:], lr=0.1)
    for _ in range(2):
        for p, optimizer in zip(params, optimizers, strict=True):

            def closure(p=p):
                p.grad = None
                loss = p.pow(4).sum()
                loss.backward()
                return loss

            optimizer.step(closure)
            with torch.no_grad():
                p.mul_(0.5)
    assert torch.equal(*params)


def test_groups_frozen_and_unused_parameters():
    a, b, frozen, unused = (nn.Parameter(torch.full((2,), v)) for v in (1.0, 2.0, 3.0, 4.0))
    frozen.requires_grad_(False)
    optimizer = tn.DCASGD([{"params": [a, frozen, unused]}], weight_decay=0.1, delay=1)
    optimizer.add_param_group({"params": [b], "lr": 0.0})

    def closure():
        optimizer.zero_grad()
        loss = (a * b).sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert a[0].item() < 1.0
    assert [p.tolist() for p in (b, frozen, unused)] == [[2.0] * 2, [3.0] * 2, [4.0] * 2]


def test_misuse_is_named():
    model = make_model()
    for argument, value in (("lr", math.nan), ("decay", 1.0), ("delay", -1), ("compensation", -0.1)):
        with pytest.raises(ValueError, match=f"DCASGD: {argument}={value}"):
            tn.DCASGD(model.parameters(), **{argument: value})
    optimizer = tn.DCASGD(model.parameters())
    with pytest.raises(ValueError, match="closure=None"):
        optimizer.step()
    x, y = make_batch(0)
    with pytest.raises(ValueError, match="backward"):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    with pytest.raises(ValueError, match="worker w1 sent the shapes"):
        optimizer.receive("w1", [torch.zeros(2)])
    for address in ("localhost:1", "tcp://localhost", "file://"):
        with pytest.raises(ValueError, match="tcp://host:port"):
            tn.ParameterServer(optimizer, address)


class Direct:
    """A connection within the process."""

    def __init__(self, server, name):
        self.server, self.name = server, name

    def pull(self):
        return self.server.send(self.name)

    def push(self, gradient, failure=""):
        return self.server.receive(self.name, gradient, failure)


def test_worker_and_server_in_one_process_are_the_simulator(tmp_path):
    """Three workers in turn; then the server's checkpoint continues."""
    simulated = make_served()
    optimizer = tn.DCASGD(simulated.parameters(), lr=0.1, adaptive=True, momentum=0.5, delay=2)
    model = make_served()
    serving = tn.DCASGD(model.parameters(), lr=0.1, adaptive=True, momentum=0.5)
    path = tmp_path / "server.pt"
    server = tn.ParameterServer(serving, "file:///unused", checkpoint=path, checkpoint_every=6)
    workers = []
    for name in ("w0", "w1", "w2"):
        local = make_served()
        workers.append((local, tn.DCASGDWorker(local.parameters(), Direct(server, name))))
    for turn in range(9):
        if turn == 6:
            again = make_served()
            serving = tn.DCASGD(again.parameters(), lr=0.1, adaptive=True, momentum=0.5)
            server = tn.ParameterServer(serving, "file:///unused", checkpoint=path)
            assert server.num_updates == 6
            assert server.updates_of == {"w0": 2, "w1": 2, "w2": 2}
            for i, (_, worker) in enumerate(workers):
                worker.server = Direct(server, f"w{i}")
            model = again
        local, worker = workers[turn % 3]
        x, y = (t.double() if t.is_floating_point() else t for t in make_batch(turn))

        def closure_on(net, x=x, y=y):
            def closure():
                net.zero_grad()
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                return loss

            return closure

        worker.step(closure_on(local))
        optimizer.step(closure_on(simulated))
    assert differences(snapshot(model), snapshot(simulated)) == []


def test_model_of_other_shapes_is_refused():
    server = tn.ParameterServer(tn.DCASGD(make_served().parameters()), "file:///unused")
    with pytest.raises(ValueError, match="the same model"):
        tn.DCASGDWorker(nn.Linear(2, 2).double().parameters(), Direct(server, "w1"))


def start(folder, role, **task):
    path = folder / f"{role}-{task.get('name', '')}.task"
    path.write_text(json.dumps({"address": f"file://{folder}/rendezvous"} | task))
    command = [sys.executable, "-W", "error", str(PROCESS), role, str(path)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def finish(process, code=0):
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors


def test_workers_die_come_late_and_send_nan(tmp_path):
    """w1 dies after its third gradient, then w3 comes; w2's second is NaN; and what happened can be repeated here."""
    settings = {"lr": 0.1, "adaptive": True, "momentum": 0.5}
    server = start(tmp_path, "serve", updates=18, optimizer=settings, linger=1.0)
    steady = start(tmp_path, "work", name="w2", steps=11, nan_at=1, pause=0.02)
    late = start(tmp_path, "work", name="w3", steps=5, after="death")
    finish(start(tmp_path, "work", name="w1", steps=9, die_at=2), code=7)
    finish(late)
    finish(steady)
    finish(server)
    served = json.loads((tmp_path / "served.json").read_text())
    assert served["reached"]
    assert served["updates"] == {"w1": 3, "w2": 10, "w3": 5}
    assert served["dropped"] == {"w2": ["the loss is not finite"]}
    statuses = json.loads((tmp_path / "w2.json").read_text())
    assert [s for s in statuses if s] == ["rejected: the loss is not finite"]

    model = make_served()
    optimizer = tn.DCASGD(model.parameters(), **settings)
    steps, has = {"w1": 0, "w2": 0, "w3": 0}, {}
    for what, worker in served["log"]:
        if what == "send":
            has[worker] = optimizer.send(worker)
            continue
        if worker == "w2" and steps[worker] == 1:
            steps[worker] += 1  # the gradient that never arrived
        local = make_served()
        with torch.no_grad():
            for p, value in zip(local.parameters(), has[worker], strict=True):
                p.copy_(value)
        x, y = batch_of(worker, steps[worker])
        F.cross_entropy(local(x), y).backward()
        steps[worker] += 1
        optimizer.receive(worker, [p.grad for p in local.parameters()])
    assert [p.tolist() for p in model.parameters()] == served["params"]
    saved = torch.load(tmp_path / "server.pt")
    assert all(torch.equal(p, q) for p, q in zip(saved["params"], model.parameters(), strict=True))


def test_address_of_a_host(tmp_path):
    """One worker over tcp is SGD."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"tcp://localhost:{free.getsockname()[1]}"
    server = start(tmp_path, "serve", address=address, updates=3, optimizer={"lr": 0.1}, linger=0.3)
    finish(start(tmp_path, "work", address=address, name="w1", steps=3))
    finish(server)
    model = make_served()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        x, y = batch_of("w1", step)
        sgd.zero_grad()
        F.cross_entropy(model(x), y).backward()
        sgd.step()
    served = json.loads((tmp_path / "served.json").read_text())
    assert [p.tolist() for p in model.parameters()] == served["params"]
