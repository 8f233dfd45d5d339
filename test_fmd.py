# SPDX-License-Identifier: MIT
"""Tests of fmd.py, sit.py and fid.py: closed forms, not snapshots. No GPU, no network, no clock."""

import argparse
import contextlib
import io
import json
import math
import os
import pickle
import re
import resource
import runpy
import shlex
import signal
import struct
import subprocess
import sys
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from PIL import Image
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fid
import fmd
import sit

HERE = Path(__file__).resolve().parent
torch.set_num_threads(2)

def start(count, *args, script=HERE / "fmd.py", code=0):
    """A script in `count` processes of torchrun, 0 for plain Python, up to its exit code."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(HERE)}
    many = f"-m torch.distributed.run --nproc_per_node={count} --master_port=29617".split()
    command = [sys.executable, *(many if count else []), script, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == code, done.stderr[-2000:]
    return done

def refused(capsys, main, args, message, changes=()):
    """main(args) says why in one line, exits with a code other than 0, and leaves every file as it was."""
    def files():
        return {p: p.is_file() and p.read_bytes() for p in Path().rglob("*") if str(p) not in changes}
    before = files()
    capsys.readouterr()
    try:
        code = main([str(a) for a in args])
    except SystemExit as e:
        code = e.code
    out, error = capsys.readouterr()
    if isinstance(code, str):                           # Python prints it and exits with 1
        code, error = 1, f"{error}{code}\n"
    assert code and re.search(message, error), error
    assert error.count("\n") == 1 and "Traceback" not in error and files() == before
    return out

def damage(path):
    """cut.* is half of a file, flipped.* the file with one bit wrong, of its arrays."""
    data = bytearray(Path(path).read_bytes())
    middle, suffix = len(data) // 2, Path(path).suffix
    Path(f"cut{suffix}").write_bytes(data[:middle])
    data[middle] ^= 4
    Path(f"flipped{suffix}").write_bytes(data)

class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)

# ---- The method against Gaussian data N(m, s² I), whose flow is explicit ---------------------------
M, S = torch.tensor([1.5, -0.5]), 0.4
def gaussian_velocity(x, t, m=M, s=S):
    """E[x0 - n | x_t = x] for x0 ~ N(m, s²), n ~ N(0, 1), x_t = (1-t) x0 + t n."""
    t = t.view(-1, 1)
    variance = (1 - t) ** 2 * s ** 2 + t ** 2
    return m + ((1 - t) * s ** 2 - t) / variance * (x - (1 - t) * m)

def gaussian_map(z, delta, m=M, s=S):
    """The path from z after duration δ: it keeps its place among the standard deviations."""
    t = 1 - delta.view(-1, 1)
    return (1 - t) * m + ((1 - t) ** 2 * s ** 2 + t ** 2).sqrt() * z

def gaussian_average(z, delta):
    return (gaussian_map(z, delta) - z) / delta.view(-1, 1)

@pytest.fixture
def batch():
    """z (64, 2), delta, n, r, in float64."""
    torch.manual_seed(0)
    (z, n), (delta, r) = torch.randn(2, 64, 2).double(), torch.rand(2, 64).double()
    return z, 0.05 + 0.9 * delta, n, r

def predict(F, u, z, delta):
    """F(z, δ) and Δ_p, as train computes them."""
    F_z = F(z, delta)
    return F_z, fmd.prediction(F_z, fmd.duration_derivative(F, z, delta), u, z, delta)

def correct(F, u, g, z, n, r):
    """F(z, 1), Δ_c and the loss of g, as train computes them."""
    F_z = F(z, torch.ones_like(r))
    return F_z, *fmd.correction(F_z, u, g, z, n, r)

@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_rollout_converges_at_its_order(batch, solver, order):
    z, end = batch[0], gaussian_map(batch[0], torch.ones(64).double())
    a, b, c = ((fmd.rollout(gaussian_velocity, z, k, solver) - end).norm() for k in (40, 80, 160))
    assert abs(torch.log2(a / b) - order) < 0.25 and abs(torch.log2(b / c) - order) < 0.25
    with pytest.raises(ValueError, match="solver Heun"):
        fmd.rollout(gaussian_velocity, z, 1, "Heun")

def test_exact_flow_map_has_no_prediction_residual(batch):
    z, delta, _, _ = batch
    average, residual = predict(gaussian_average, gaussian_velocity, z, delta)
    assert residual.abs().max() < 1e-9 and not residual.requires_grad
    assert torch.allclose(fmd.flow_map(average, z, delta), gaussian_map(z, delta))
    # and a wrong sign of the teacher, a wrong clock or a missing derivative do leave one
    for u, least in ((lambda x, t: -gaussian_velocity(x, t), 0.5),
                     (lambda x, t: gaussian_velocity(x, 1 - t), 0.2)):
        assert predict(gaussian_average, u, z, delta)[1].abs().mean() > least
    assert fmd.prediction(average, 0 * average, gaussian_velocity, z, delta).abs().mean() > 0.05

def test_duration_derivative_is_partial(batch):
    z, delta, _, _ = batch
    def F(z, d):
        return torch.sin(d)[:, None] * z ** 2
    exact = torch.cos(delta)[:, None] * z ** 2      # a total derivative would add 2 sin(δ) z dz/dδ
    assert torch.allclose(fmd.duration_derivative(F, z, delta), exact)

@pytest.mark.parametrize("shape", [(4,), (4, 2, 3), (4, 3, 3, 3), (2, 3)])
def test_velocities_of_another_shape_are_refused(shape):
    """They would broadcast to residuals of another shape, without an error."""
    z, t = torch.randn(4, 1, 3, 3) if len(shape) > 2 else torch.randn(4, 1), torch.rand(4)
    good, bad = torch.zeros_like(z), torch.zeros(shape)
    def ok(x, t): return 0 * x
    def wrong(x, t): return bad
    calls = [partial(fmd.flow_map, bad, z, t), partial(fmd.rollout, wrong, z, 2),
             partial(fmd.prediction, bad, good, ok, z, t), partial(fmd.prediction, good, good, wrong, z, t),
             partial(fmd.correction, bad, ok, ok, z, z, t),
             *(partial(fmd.correction, good, u, g, z, z, t) for u, g in ((wrong, ok), (ok, wrong)))]
    for call in calls:
        with pytest.raises(ValueError, match=rf"shape \{re.escape(str(shape))[1:]} at x of shape"):
            call()

def test_correction_residual_is_the_difference_of_velocities(batch):
    z, _, n, r = batch
    m, s = torch.tensor([0.3, 0.3]).double(), 0.8       # a student that makes N(m, s²) instead
    v_N = partial(gaussian_velocity, m=m, s=s)
    _, residual, _ = correct(lambda z, delta: m + (s - 1) * z, gaussian_velocity, v_N, z, n, r)
    x_r = (1 - r[:, None]) * (m + s * z) + r[:, None] * n
    assert torch.allclose(residual, v_N(x_r, r) - gaussian_velocity(x_r, r))
    _, residual, _ = correct(gaussian_average, gaussian_velocity, gaussian_velocity, z, n, r)
    assert residual.abs().max() == 0            # the teacher's own distribution needs no correction

def test_correction_alone_finds_the_gaussian():
    """Descent on <F, sg(Δ_c)> with the exact velocity moves a student N(a, b²) to the data's N(m, s²)."""
    a, b = torch.zeros(2, requires_grad=True), torch.ones(1, requires_grad=True)
    opt = torch.optim.Adam([a, b], 0.02)
    torch.manual_seed(0)
    for step in range(400):
        (z, n), r = torch.randn(2, 256, 2), torch.rand(256)
        v_N = partial(gaussian_velocity, m=a.detach(), s=b.item())
        F_c, N, _ = correct(lambda z, d: a + (b - 1) * z, gaussian_velocity, v_N, z, n, r)
        loss, lam, pull = fmd.student_loss(F_c[:0], N[:0], F_c, N)
        assert (lam, pull) == (1, 0)
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert (a.detach() - M).abs().max() < 0.05 and abs(b.item() - S) < 0.05

def test_online_optimum_is_the_closed_form_noising_velocity():
    torch.manual_seed(0)
    (z, n), r = torch.randn(2, 200_000, 2), torch.rand(200_000)
    w = torch.zeros(2, requires_grad=True)
    def g(x, t):                                        # the closed form, with room to be wrong
        return gaussian_velocity(x, t) * (1 + w[0]) + w[1]
    _, residual, loss = correct(gaussian_average, gaussian_velocity, g, z, n, r)
    grad, = torch.autograd.grad(loss, w)
    assert grad.abs().max() < 0.03 and not residual.requires_grad   # stationary, to Monte Carlo error
    wrong = ((1.2 * gaussian_velocity(n, r) * (1 + w[0]) + w[1] - 1) ** 2).mean()
    assert torch.autograd.grad(wrong, w)[0].abs().max() > 0.3       # elsewhere far from zero

def test_the_gradient_by_hand():
    """w on prediction alone, a row each; λ from the residuals themselves."""
    p, c = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[1.0, 7.0]])
    lam = 0.5 * (math.sqrt(12.5) + math.sqrt(2)) / 2 / (5 + 1e-3)       # of root mean squares
    for k in (0.0, 0.5, 1.0):
        w = [1 / (mean_square + 1e-3) ** k for mean_square in (12.5, 2.0)]
        F = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], requires_grad=True)
        loss, got, pull = fmd.student_loss(F[:2], p, F[2:], c, k, alpha=0.5)
        assert got.item() == pytest.approx(lam, rel=1e-5)
        pulls = w[0] * math.sqrt(12.5), w[1] * math.sqrt(2)
        assert pull.item() == pytest.approx(5 * lam / sum(pulls) * 2, rel=1e-5)
        grad, = torch.autograd.grad(loss, F)
        want = [[3 * w[0], 4 * w[0]], [0, 2 * w[1]], [lam, 7 * lam]]
        assert torch.allclose(grad, torch.tensor(want) / 6)
        assert fmd.student_loss(F[:2], p, F[:0], c[:0], k, alpha=0.5)[1:] == (0.5, 0)
        assert fmd.student_loss(F[:0], p[:0], F[:1], c, k, alpha=0.5)[1:] == (0.5, 0)

def test_training_from_the_prior_alone_reaches_the_closed_form_flow_map():
    torch.manual_seed(0)
    nets = [torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64),
                                torch.nn.SiLU(), torch.nn.Linear(64, 2)) for _ in range(2)]
    F, g = (lambda z, d, net=net: net(torch.cat([z, d[:, None]], dim=1)) for net in nets)
    weights, steps = list(nets[0].parameters()), 1000
    opt = torch.optim.Adam([*weights, *nets[1].parameters()], betas=(0.9, 0.99))
    for step in range(steps):
        torch.manual_seed(fmd.step_seed(0, step, 0))
        (z_p, _, _), (z_c, _, _) = fmd.prior(192, (2,), 1), fmd.prior(64, (2,), 1)
        F_p, G = predict(F, gaussian_velocity, z_p, torch.rand(192))
        F_c, N, online = correct(F, gaussian_velocity, g, z_c, torch.randn(64, 2), torch.rand(64))
        assert not G.requires_grad and not N.requires_grad      # and the loss of g moves g alone
        grads = torch.autograd.grad(online, weights, retain_graph=True, allow_unused=True)
        assert grads == (None,) * len(weights)
        (fmd.student_loss(F_p, G, F_c, N, k=0.0)[0] + online).backward()
        opt.param_groups[0]["lr"] = 5e-3 * min(1, 2 * (1 - step / steps))
        opt.step()
        opt.zero_grad()
    z = torch.randn(2000, 2, generator=torch.Generator().manual_seed(99))
    for d in (0.3, 0.7, 1.0):
        delta = torch.full((2000,), d)
        x = fmd.flow_map(F(z, delta), z, delta)
        assert (x - gaussian_map(z, delta)).norm(dim=1).mean() < 0.04, d
    assert (x.mean(0) - M).abs().max() < 0.04 and (x.std(0) - S).abs().max() < 0.04

def test_guidance_and_interval():
    x, y = torch.randn(5, 3, 4, 4), torch.arange(5)
    t, gamma = torch.tensor([0.0, 0.3, 0.5, 0.7, 1.0]), torch.tensor([2.0, 2.0, 0.5, 1.0, 3.0])
    def velocity(x, t, y):
        return x * fmd.expand(1.0 + y, x) + fmd.expand(t, x)
    null = velocity(x, t, torch.full_like(y, 7))
    for interval, effective in (((0, 1), gamma), ((0.3, 0.5), torch.tensor([1, 2, 0.5, 1, 1]))):
        want = null + fmd.expand(effective, x) * (velocity(x, t, y) - null)     # on every channel
        got = fmd.guided(velocity, x, t, y, gamma, 7, interval)
        assert torch.allclose(got, want, atol=1e-5)

def test_draws():
    z, y, gamma = fmd.prior(40000, (1,), 10, (1, 3))
    assert gamma.min() >= 1 and gamma.max() <= 3 and abs(gamma.mean() - 2) < 0.03
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03 and set(y.tolist()) == set(range(10))
    assert torch.equal(fmd.prior(5, (2,), 3, (1.5, 1.5))[2], torch.full((5,), 1.5))

def test_no_two_draws_share_their_noise():
    """torch's CPU generators keep 32 bits of a seed: hashes of 200,000 steps would meet about 5 times. Seed 1
    at step i must not be seed 0 at step i + 1."""
    seeds = {fmd.step_seed(0, step, 0) % 2 ** 32 for step in range(200_000)}
    assert len(seeds) == 200_000
    starts = [fmd.step_seed(seed, 0, rank) for seed in (0, 1, 2, 3, 2 ** 40) for rank in range(8)]
    ends = sorted((start % 2 ** 32, (start + 100_000) % 2 ** 32) for start in starts)
    assert all(low < high for low, high in ends) and all(a[1] < b[0] for a, b in zip(ends, ends[1:]))
    firsts = fmd.noises(1, range(50_000), (2,)).numpy()         # the seed 1 had one pair of equals
    assert len(np.unique(firsts, axis=0)) == 50_000
    assert torch.equal(fmd.noises(1, [7, 9], (3, 2))[1], fmd.noises(1, [9], (3, 2))[0])

def test_learning_rate():
    rates = [fmd.learning_rate(step, 100, 9, 0.5) for step in (0, 4, 9, 50, 75, 99)]
    assert rates == pytest.approx([0.1, 0.5, 1, 1, 0.5, 0.02])

# ---- sit.py ----------------------------------------------------------------------------------------
STUDENT = dict(delta=True, gamma=True)
def tiny(**extra):
    """A small SiT with every weight random, so that no path through it is zero."""
    torch.manual_seed(0)
    net = sit.SiT(**dict(shape=(2, 8, 8), depth=2, width=32, heads=4, patch=2, classes=5) | extra)
    for p in net.parameters():
        p.data.add_(0.2 * torch.randn_like(p)) if p.requires_grad else None
    return net

@pytest.mark.parametrize("convention", ["sit", "repa"])
def test_forward_against_a_second_writing(convention):
    """The whole network from its state dict alone, token by token, in plain functions."""
    net, D, heads, p = tiny(**STUDENT, convention=convention), 32, 4, 2
    w, y = net.state_dict(), torch.tensor([1, 5])
    x, t, delta, gamma = torch.randn(2, 2, 8, 8), torch.rand(2), torch.rand(2), 1 + torch.rand(2)
    clock, sign = (1 - t, 1) if convention == "sit" else (t, -1)
    def linear(h, name):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    def embed(value, name):
        freqs = [math.exp(-math.log(10000) * i / 128) for i in range(128)]
        args = torch.stack([value * freq for freq in freqs], dim=1)
        hidden = linear(torch.cat([args.cos(), args.sin()], 1), f"{name}_embedder.mlp.0")
        return linear(nnf.silu(hidden), f"{name}_embedder.mlp.2")
    def norm(h):
        variance = h.var(-1, unbiased=False, keepdim=True)
        return (h - h.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt()
    c = w["y_embedder.embedding_table.weight"][y] + embed(clock, "t")
    c = c + embed(delta, "dt") + embed(gamma, "gw")
    corners = [(i, j) for i in range(0, 8, p) for j in range(0, 8, p)]
    patches = torch.stack([x[:, :, i:i + p, j:j + p].flatten(1) for i, j in corners], dim=1)
    position = torch.tensor([[wave(place / 10000 ** (i / 8)) for place in (token % 4, token // 4)
                              for wave in (math.sin, math.cos) for i in range(8)]
                             for token in range(16)])           # the column first: "w first"
    assert torch.allclose(w["pos_embed"][0], position, atol=1e-6)
    kernel, bias = w["x_embedder.proj.weight"].flatten(1), w["x_embedder.proj.bias"]
    h = patches @ kernel.T + bias + position
    for b in range(2):
        a = linear(nnf.silu(c), f"blocks.{b}.adaLN_modulation.1")[:, None].split(D, dim=-1)
        qkv = linear(norm(h) * (1 + a[1]) + a[0], f"blocks.{b}.attn.qkv").split(D // heads, dim=-1)
        outs = []
        for q, k, v in zip(qkv[:heads], qkv[heads:2 * heads], qkv[2 * heads:]):
            outs.append((q @ k.mT / math.sqrt(D // heads)).softmax(-1) @ v)
        h = h + a[2] * linear(torch.cat(outs, -1), f"blocks.{b}.attn.proj")
        hidden = linear(norm(h) * (1 + a[4]) + a[3], f"blocks.{b}.mlp.fc1")
        cube = hidden + 0.044715 * hidden ** 3
        hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * cube))
        h = h + a[5] * linear(hidden, f"blocks.{b}.mlp.fc2")
    shift, scale = linear(nnf.silu(c), "final_layer.adaLN_modulation.1")[:, None].split(D, dim=-1)
    h = linear(norm(h) * (1 + scale) + shift, "final_layer.linear")
    want = torch.zeros(2, 2, 8, 8)
    for token, (i, j) in enumerate(corners):
        want[:, :, i:i + p, j:j + p] = h[:, token].reshape(2, p, p, 2).permute(0, 3, 1, 2)
    assert (sign * net(x, t, y, delta, gamma) - want).abs().max() < 2e-5 * want.abs().max()

def test_jvp_of_the_network_equals_finite_difference():
    net = tiny(**STUDENT).double()
    z, y, gamma = torch.randn(4, 2, 8, 8).double(), torch.arange(4), torch.ones(4).double()
    F = partial(fmd.average_velocity, net, y=y, gamma=gamma)
    delta = torch.tensor([0.1, 0.4, 0.7, 1.0]).double()
    exact = fmd.duration_derivative(F, z, delta)
    with torch.no_grad():
        central = (F(z, delta + 3e-3) - F(z, delta - 3e-3)) / 6e-3
    assert exact.abs().max() > 1e-2 and not exact.requires_grad
    assert (exact - central).abs().max() < 2e-3 * exact.abs().max()

@pytest.mark.parametrize("rows", [(24,), (4, 7)])
def test_linear_differentiates_as_torchs_to_the_bit_with_two_products(rows, monkeypatch):
    """Eager and in one graph. torch's own takes three: one with the derivative of the weight, zero."""
    ours, plain = sit.Linear(16, 40), torch.nn.Linear(16, 40)
    plain.load_state_dict(ours.state_dict())
    x, x_dot = torch.randn(2, *rows, 16)
    def derivative(layer, x, x_dot):
        return torch.func.jvp(layer, (x,), (x_dot,))
    class Products(TorchDispatchMode):
        count = 0
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.count += op.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
            return op(*args, **(kwargs or {}))
    counts, values = {}, {}
    with torch.no_grad():
        for layer in (ours, plain):
            with Products() as products:
                values[layer] = derivative(layer, x, x_dot)
            counts[layer] = products.count
        graph = torch.compile(derivative, backend="aot_eager", fullgraph=True, dynamic=False)
        compiled = graph(ours, x, x_dot)
    assert counts == {ours: 2, plain: 3}
    for one, other, third in zip(values[ours], values[plain], compiled):
        assert torch.equal(one, other) and torch.equal(one, third) and other.abs().max() > 0.1
    assert torch.equal(ours(x), plain(x))

@pytest.mark.parametrize("size, patch, count", [("S", 2, 33), ("B", 4, 131), ("L", 2, 458), ("XL", 2, 675)])
def test_named_sizes_have_the_published_parameter_counts(size, patch, count):
    with torch.device("meta"):
        net = sit.SiT((4, 32, 32), *sit.SIZES[size], patch, 1000, learn_sigma=True)
    assert abs(sum(p.numel() for p in net.parameters()) / 1e6 - count) < 1.2

@pytest.mark.parametrize("extra", [{}, dict(learn_sigma=True), STUDENT, dict(gamma=True)])
def test_a_network_from_its_weights_alone(extra, tmp_path):
    net, one = tiny(**extra), torch.rand(2)
    inputs = torch.randn(2, 2, 8, 8), one, torch.tensor([0, 5]), 1 - one, one ** 2
    released = sit.released_names(net.state_dict())
    repa = {**released, "projectors.0.weight": torch.zeros(3)}
    for state in (net.state_dict(), released, repa):
        again = sit.from_state_dict(state, heads=4)
        assert again.config == net.config and torch.equal(again(*inputs), net(*inputs))
    # the convention: of the file itself, else of REPA's projectors or a word of the name
    old = {key: value for key, value in net.config.items() if key != "convention"}
    for name, state, more, convention in (
            ("a", released, {}, "sit"), ("FreeFlow_REPA", released, {}, "repa"),
            ("SiT_repa_last", released, {}, "repa"), ("student-REPA2", released, {}, "repa"),
            ("prepared", released, {}, "sit"), ("Repaired", released, {}, "sit"),
            ("reparam", released, {}, "sit"), ("b", repa, {}, "repa"),
            ("c", released, {"convention": "repa", "config": old}, "repa"),      # as older files have it
            ("d", released, {"config": net.config | {"convention": "repa"}}, "repa"),
            ("repa", repa, {"config": net.config}, "sit"),
            ("train", released, {"args": argparse.Namespace(model="SiT-XL/2", num_classes=5)}, "sit")):
        torch.save({"ema": state, "config": {"heads": 4}, **more}, tmp_path / f"{name}.pt")
        again, info = sit.load(tmp_path / f"{name}.pt")
        assert again.config == net.config | {"convention": convention}, name
        clock, sign = (inputs[1], 1) if convention == "sit" else (1 - inputs[1], -1)
        want = sign * net(inputs[0], clock, *inputs[2:])
        assert torch.allclose(again(*inputs), want, atol=1e-6) and len(info["why"]) > 5
    assert sit.load(tmp_path / "a.pt", convention="repa")[0].config["convention"] == "repa"

@pytest.mark.parametrize("wrap", [
    lambda state: {f"module.{k}": v for k, v in state.items()},
    lambda state: {"model": {f"_orig_mod.module.{k}": v for k, v in state.items()}, "step": 3},
    lambda state: {"state_dict": {f"net.{k}": v for k, v in state.items()}},
    lambda state: {re.sub(r"(blocks\.\d)", r"\1._orig_mod", k): v for k, v in state.items()},     # compiled
    lambda state: {"ema": {f"module.{k}": v.half() for k, v in state.items()}, "model": {"x": 1}}])
def test_weights_in_wrappers_load(wrap, tmp_path):
    """DDP, torch.compile, Lightning and others add prefixes; trainers keep weights under some name."""
    net = tiny()
    for p in net.parameters():
        p.data = p.data.half().float()
    torch.save(wrap(net.state_dict()), tmp_path / "wrapped.pt")
    again = sit.load(tmp_path / "wrapped.pt", heads=4)[0].state_dict()
    assert all(torch.equal(value, again[name]) for name, value in net.state_dict().items())

@pytest.mark.parametrize("learn_sigma", [True, False])
def test_students_start_as_their_teacher_and_keep_its_read_out(learn_sigma):
    teacher = tiny(learn_sigma=learn_sigma)
    z, y, one = torch.randn(3, 2, 8, 8), torch.tensor([0, 1, 5]), torch.ones(3)
    u = teacher(z, one, y)
    student, online = sit.start_from(teacher, **STUDENT), sit.start_from(teacher, gamma=True)
    assert torch.equal(fmd.average_velocity(student, z, 0.3 * one, y, 1.7 * one), u)
    assert torch.equal(online(z, one, y, gamma=one), u)
    assert student.config["learn_sigma"] == learn_sigma
    assert len(student.state_dict()["final_layer.linear.weight"]) == 4 * 2 * (1 + learn_sigma)

def test_hostile_and_damaged_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good, config = tiny().state_dict(), {"heads": 4}
    changes = {"extra": {"more": torch.zeros(1)}, "words": {"x_embedder.proj.weight": "none"},
               "infinite": {"t_embedder.mlp.0.bias": torch.full((32,), -math.inf)},
               "nan": {"t_embedder.mlp.0.bias": torch.full((32,), math.nan)},
               "shape": {"final_layer.linear.bias": torch.zeros(3)},
               "nothing": {"y_embedder.embedding_table.weight": torch.zeros(0, 32)},
               "two": {"ema.x_embedder.proj.weight": good["x_embedder.proj.weight"]}}
    files = {name: {"ema": {**good, **change}, "config": config} for name, change in changes.items()}
    less = {k: v for k, v in good.items() if "fc1" not in k}
    trained = {k: v for k, v in good.items() if k != "pos_embed"}
    states = {"missing": less, "trained": trained, "empty": {}, "number": 3, "bomb": Bomb(), "whole": good}
    for name, state in states.items():
        files[name] = {"ema": state, "config": config}
    files |= {"raw": good, "list": [1], "heads": {"ema": good, "config": {"heads": "four"}},
              "odd": {"ema": good, "config": {"heads": 4, "convention": "edm"}},
              "no-null": {"ema": good, "config": config, "args": argparse.Namespace(num_classes=6)},
              "no-null-2": {"ema": good, "config": config, "args": {"num_classes": 6}},
              "size": {"ema": good}, "minus": {"ema": good, "config": {"heads": -4}},
              "gvp": {"ema": good, "config": config, "args": {"path_type": "GVP"}},
              "score": {"ema": good, "config": config, "args": argparse.Namespace(prediction="score")}}
    for name, file in files.items():
        torch.save(file, f"{name}.pt")
    Path("page.pt").write_text("<!DOCTYPE html><html>Sign in")
    damage("whole.pt")
    Path("pickle.pt").write_bytes(pickle.dumps(Bomb()))
    assert sit.load("whole.pt")
    true = {"bomb": "a Python object, posix.system; save tensors alone",
            "page": "neither zip nor pickle; .*DOCTYPE",
            "nowhere": "no such file", "no-null-2": "no null class",
            "gvp": "--path-type GVP: only linear", "score": "--prediction score: only velocity",
            "size": 'depth 2 and width 32.*"config": .*"heads": N.*heads=N',
            "trained": "pos_embed is missing, the fixed table .*whole state dict",
            "missing": "4 keys are missing .*fc1", "extra": "1 unexpected .*more", "two": "2 do",
            "no-null": "no null class", "cut": "it ends early", "flipped": "a checksum is wrong",
            "empty": "should end in x_embedder.proj.weight, 0 do", "odd": "edm is neither sit nor repa"}
    for name in (*files.keys() - {"whole"}, "cut", "flipped", "pickle", "page", "nowhere"):
        with pytest.raises(sit.FileError, match=rf"\A{name}.pt: .*{true.get(name, '')}.*\Z"):  # in one line
            sit.load(f"{name}.pt")
    assert not Path("exploded").exists()
    for path, output in (("Linear", "velocity"), ("linear", "v")):      # as SiT's and REPA's files say it
        flags = {"path_type": path, "prediction": output}
        torch.save({"ema": good, "config": config, "args": flags}, "fine.pt")
        assert sit.load("fine.pt")[0].config["depth"] == 2

def test_a_file_may_be_overwritten_while_it_is_in_use(tmp_path):
    net, path = tiny(), tmp_path / "teacher.pt"
    save_net(path, net)
    used = sit.load(path)[0]
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(v, used.state_dict()[k]) for k, v in net.state_dict().items())

def test_a_mapped_file_is_read_without_its_checksums(tmp_path, monkeypatch):
    """For ckpt.pt of many GB, which each process of a machine reads."""
    monkeypatch.chdir(tmp_path)
    torch.save({"x": torch.ones(1_000_000)}, "whole.pt")
    damage("whole.pt")
    x = sit.read_file("flipped.pt", mapped=True)["x"]
    assert (x != 1).sum() == 1                          # what a checksum would find
    assert "/flipped.pt" in Path("/proc/self/maps").read_text()
    x += 1                                              # private to the process
    assert (sit.read_file("flipped.pt", mapped=True)["x"] != 1).sum() == 1
    with pytest.raises(sit.FileError, match="cut.pt: not a checkpoint .*it ends early"):
        sit.read_file("cut.pt", mapped=True)

def table(layers):
    """(name, *shape of the weight) of layers -> the shapes of weights and biases."""
    weights = {f"{name}.weight": tuple(shape) for name, *shape in layers}
    return weights | {f"{name}.bias": (shape[0],) for name, *shape in layers}

def test_student_has_the_keys_and_shapes_of_the_released_file():
    """XL/2 at 512. FreeFlow_512.pt has 2,717,071,257 bytes: 4 for each number, and 93 kB of names."""
    depth, D, heads = sit.SIZES["XL"]
    with torch.device("meta"):
        ours = sit.SiT((4, 64, 64), depth, D, heads, 2, 1000, **STUDENT).state_dict()
    maps = (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4),
            ("adaLN_modulation.1", 6, 1))
    layers = [(f"blocks.{i}.{name}", a * D, b * D) for i in range(depth) for name, a, b in maps]
    for e in ("t", "dt", "gw"):
        layers += [(f"{e}_embedder.projs.0", D, 256), (f"{e}_embedder.projs.2", D, D)]
    layers += [("x_embedder.proj", D, 4, 2, 2), ("final_layer.linear", 16, D),
               ("final_layer.adaLN_modulation.1", 2 * D, D)]
    want = {"pos_embed": (1, 1024, D), "y_embedder.embedding_table.weight": (1001, D)}
    released = sit.released_names(ours)
    assert {k: tuple(v.shape) for k, v in released.items()} == table(layers) | want
    assert sum(v.numel() for v in released.values()) == 679_244_560
    back = sit.our_names(released)
    assert list(back) == list(ours) and all(back[k] is ours[k] for k in ours)

WIDTHS = (64, 32, 64)       # a narrowing level, a widening one, and one group of one channel
def small_decoder(widths=WIDTHS):
    torch.manual_seed(0)
    net = sit.Decoder(widths)
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return net

def test_decoder_against_a_second_writing():
    """The whole decoder from its state dict alone, in plain functions of float64."""
    net, z = small_decoder().double(), 0.2 * torch.randn(2, 4, 3, 5).double()   # not square
    w, mid = net.state_dict(), "decoder.mid_block"
    def conv(x, name):
        kernel = w[f"{name}.weight"]
        B, C, H, W = x.shape
        columns = nnf.unfold(x, kernel.shape[-1], padding=kernel.shape[-1] // 2)
        return (kernel.flatten(1) @ columns + w[f"{name}.bias"][:, None]).view(B, -1, H, W)
    def norm(x, name):
        groups = x.view(len(x), 32, -1)
        scaled = groups - groups.mean(-1, keepdim=True)
        scaled = scaled / (scaled.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        weight, bias = (w[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
        return scaled.view_as(x) * weight + bias
    def resnet(x, name):
        h = conv(nnf.silu(norm(x, f"{name}.norm1")), f"{name}.conv1")
        h = conv(nnf.silu(norm(h, f"{name}.norm2")), f"{name}.conv2")
        return h + (conv(x, f"{name}.conv_shortcut") if f"{name}.conv_shortcut.bias" in w else x)
    def attention(x, name):
        h = norm(x, f"{name}.group_norm").flatten(2)        # (B, C, HW)
        q, k, v, out = ((w[f"{name}.{m}.weight"], w[f"{name}.{m}.bias"][:, None])
                        for m in ("to_q", "to_k", "to_v", "to_out.0"))
        score = (q[0] @ h + q[1]).transpose(1, 2) @ (k[0] @ h + k[1]) / math.sqrt(x.shape[1])
        h = (v[0] @ h + v[1]) @ score.softmax(-1).transpose(1, 2)
        return x + (out[0] @ h + out[1]).view_as(x)
    h = resnet(conv(conv(z / 0.18215, "post_quant_conv"), "decoder.conv_in"), f"{mid}.resnets.0")
    h = resnet(attention(h, f"{mid}.attentions.0"), f"{mid}.resnets.1")
    for i in range(3):
        for j in range(3):
            h = resnet(h, f"decoder.up_blocks.{i}.resnets.{j}")
        if i < 2:
            h = h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            h = conv(h, f"decoder.up_blocks.{i}.upsamplers.0.conv")
    want, got = conv(nnf.silu(norm(h, "decoder.conv_norm_out")), "decoder.conv_out"), net(z)
    assert got.shape == (2, 3, 12, 20) and want.abs().max() > 0.1
    assert (got - want).abs().max() < 1e-10 * want.abs().max()

def test_decoder_has_the_keys_and_shapes_of_the_released_file():
    mid = "decoder.mid_block"
    layers = [(f"{mid}.attentions.0.{m}", 512, 512) for m in ("to_q", "to_k", "to_v", "to_out.0")]
    layers += [("post_quant_conv", 4, 4, 1, 1), ("decoder.conv_in", 512, 4, 3, 3),
               (f"{mid}.attentions.0.group_norm", 512), ("decoder.conv_norm_out", 128),
               ("decoder.conv_out", 3, 128, 3, 3)]
    resnets = [(f"{mid}.resnets.0", 512, 512), (f"{mid}.resnets.1", 512, 512)]
    for i, (before, width) in enumerate([(512, 512), (512, 512), (512, 256), (256, 128)]):
        up = f"decoder.up_blocks.{i}"
        resnets += [(f"{up}.resnets.{j}", width if j else before, width) for j in range(3)]
        layers += [(f"{up}.upsamplers.0.conv", width, width, 3, 3)] if i < 3 else []
    for name, a, b in resnets:
        layers += [(f"{name}.norm1", a), (f"{name}.conv1", b, a, 3, 3), (f"{name}.norm2", b),
                   (f"{name}.conv2", b, b, 3, 3)]
        layers += [(f"{name}.conv_shortcut", b, a, 1, 1)] if a != b else []
    with torch.device("meta"):
        net = sit.Decoder()
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == table(layers)
    assert sum(p.numel() for p in net.parameters()) == 49_490_199       # diffusers' count

def test_decoder_files_old_and_new(tmp_path):
    net, path, z = small_decoder(), tmp_path / "vae.bin", torch.randn(1, 4, 4, 4)
    state, attention = net.state_dict(), "decoder.mid_block.attentions.0."
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = sit.rename(state, {f"{attention}{new}.": f"{attention}{name}." for new, name in older.items()})
    assert len(set(old) - set(state)) == 8
    convs = {k: v[..., None, None] if attention in k and v.ndim == 2 else v for k, v in old.items()}
    extra = {"encoder.conv_in.weight": torch.zeros(3), "quant_conv.bias": torch.zeros(8)}
    for content in (state, old, convs, {**state, **extra}):
        for zipped in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            assert torch.equal(sit.load_decoder(path, WIDTHS)(z), net(z))
    key, less = "decoder.up_blocks.1.resnets.2.conv1.weight", dict(state)
    del less["decoder.conv_in.bias"]
    bad = {"1 keys are missing.*decoder.conv_in.bias": less, "'list' object": [state],
           "1 unexpected.*encoders.x": {**state, "encoders.x": torch.zeros(1)},
           f"size mismatch for {key}": {**state, key: torch.zeros(1, 1)},
           f"{key} is not finite": {**state, key: state[key] * math.inf}}
    for message, content in bad.items():
        torch.save(content, path)
        with pytest.raises(sit.FileError, match=rf"\A{path}: .*{message}.*\Z"):
            sit.load_decoder(path, WIDTHS)

def test_fetch(tmp_path, monkeypatch):
    """A path as it is, a URL once, a released name under its own name. No network: file:// URLs."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    files, cache = [tmp_path / folder / "last.pt" for folder in "ab"], tmp_path / "hub/checkpoints"
    for file in files:
        file.parent.mkdir()
        torch.save({"from": file.parent.name}, file)
    assert sit.fetch(files[0]) == files[0] and not cache.exists()
    whole = files[0].read_bytes()
    for content in (whole[:len(whole) // 2], b"<!DOCTYPE html>"):       # ends early; another page
        files[0].write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot download file://.*put the file at {cache}/"):
            sit.fetch(files[0].as_uri())
        assert not list(cache.iterdir())                    # so the next call downloads again
    files[0].write_bytes(whole)
    first, second = (sit.fetch(file.as_uri()) for file in files)
    assert [sit.read_file(path)["from"] for path in (first, second)] == ["a", "b"]
    assert len(list(cache.iterdir())) == 2
    def offline(url, path):
        raise OSError("Name or service\nnot known")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    assert sit.fetch(files[0].as_uri()) == first and first.name.endswith("-last.pt")
    for name, url in sit.RELEASED.items():
        want = re.escape(f"{name}: cannot download {url} (OSError: Name or service not known); put ")
        with pytest.raises(ValueError, match=rf"\A{want}the file at {cache}/.*\.pt\Z") as e:
            sit.fetch(name)
        place = Path(str(e.value).split()[-1])          # for each name another one
        place.touch()
        assert sit.fetch(name) == place
    with pytest.raises(sit.FileError, match="SiT-M/2: no such file, nor a released one"):
        sit.fetch("SiT-M/2")

def test_two_downloads_of_one_file_at_a_time(tmp_path, monkeypatch):
    """Two machines with one home folder: the second begins and ends while the first is at work."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    torch.save({"x": 7}, tmp_path / "a.pt")
    url, places, real = (tmp_path / "a.pt").as_uri(), [], torch.hub.download_url_to_file
    def download(url, place):
        places.append(place)
        real(url, place)
        if len(places) == 1:
            sit.fetch(url)
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert sit.read_file(sit.fetch(url)) == {"x": 7} and len(set(places)) == 2
    assert len(list((tmp_path / "hub/checkpoints").iterdir())) == 1

# ---- fid.py ----------------------------------------------------------------------------------------
def moments_of(rows):
    rows = np.asarray(rows, np.float64)
    return rows.mean(0), np.cov(rows, rowvar=False)

def test_moments_equal_numpys_mean_and_covariance():
    rows = np.random.default_rng(0).normal(1000, 2, (500, 7)).astype(np.float32)  # sums lose digits
    moments = fid.Moments(7)
    for part in (*rows[:9, None], *np.array_split(rows[9:], 9)):    # single rows, then many at a time
        moments.add(torch.from_numpy(part))
    assert all(map(partial(np.allclose, rtol=1e-8), moments.mean_cov(), moments_of(rows)))
    with pytest.raises(ValueError, match="at least 2"):
        fid.Moments(7).mean_cov()

def test_frechet_distance_closed_forms():
    rng, distance = np.random.default_rng(0), fid.frechet_distance
    # commuting covariances: of every rank, and with small eigenvalues, where digits could be lost
    spectra = [(rng.uniform(0.1, 3, 6), np.r_[np.zeros(k), rng.uniform(0.1, 3, 6 - k)]) for k in (0, 3, 5, 6)]
    for a in (np.geomspace(1e-6, 1, 60), np.repeat([1e-13, 1], 30)):
        spectra.append((a, rng.permutation(a)))
    for a, b in spectra:
        q, mu = np.linalg.qr(rng.normal(size=(len(a), len(a))))[0], rng.normal(size=len(a)) / 9
        want, digits = mu @ mu + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), 1e-12 if len(a) == 6 else 1e-9
        one, two = (0 * mu, q @ np.diag(a) @ q.T), (mu, q @ np.diag(b) @ q.T)
        assert distance(*one, *two) == pytest.approx(want, rel=digits)
        assert distance(*two, *one) == pytest.approx(want, rel=digits)
        assert 0 <= distance(*one, *one) < 1e-9
    u, v = rng.normal(size=(2, 6))                      # rank one: tr (u u' v v')^1/2 = |u'v|
    mu, want = np.zeros(6), u @ u + v @ v - 2 * abs(u @ v)
    assert distance(mu, np.outer(u, u), mu, np.outer(v, v)) == pytest.approx(want, rel=1e-10)
    few = np.cov(rng.normal(size=(4, 6)), rowvar=False)         # fewer rows than dimensions
    assert abs(distance(mu, few, mu, few)) < 1e-10
    bad = {"shapes": (mu, np.eye(5)), "symmetric": (mu, np.triu(np.ones((6, 6)))),
           "mean .* finite": (mu / 0, few),
           "covariance is not finite": (mu, few * np.nan), "negative": (mu, np.diag([1, 1, 1, 1, 1, -1e-3]))}
    for why, one in bad.items():
        with pytest.raises(ValueError, match=why), np.errstate(invalid="ignore"):
            distance(mu, np.eye(6), *one)

@pytest.mark.parametrize("size", [0, 1, 30])            # black, and ever larger features
@pytest.mark.parametrize("count", [2, 3, 100, 3001])
def test_sets_without_spread_have_a_distance(count, size):
    """n copies of a and one of b = a + d have the mean a + d/(n+1) and the covariance dd'/(n+1)."""
    rng = np.random.default_rng(0)
    a, d = size * rng.random((2, 300), dtype=np.float32)
    spread = rng.normal(size=(400, 300)) + a
    def distance(rows, *mean_cov):
        moments = fid.Moments(300)
        for part in np.array_split(rows, -(-len(rows) // 16)):
            moments.add(part)
        return fid.frechet_distance(*moments.mean_cov(), *mean_cov)
    square, zero, copies = float(d @ d.astype(float)), np.zeros((300, 300)), np.tile(a, (count, 1))
    tolerance = dict(rel=1e-6, abs=1e-9 * size)
    assert distance(copies, a + d.astype(float), zero) == pytest.approx(square, **tolerance)
    assert distance(copies, a, zero) <= 1e-9 * size
    outlier = square / (count + 1) ** 2 + square / (count + 1)
    assert distance(np.vstack([copies, a + d]), a, zero) == pytest.approx(outlier, **tolerance)
    mu, sigma = moments_of(spread)
    want = ((a - mu) ** 2).sum() + np.trace(sigma)
    assert distance(copies, mu, sigma) == pytest.approx(want, rel=1e-6)

def tf_resize(image, size=299):
    """TensorFlow 1's ResizeBilinear in float32: (H, W) -> (size, size)."""
    f, axes = np.float32, []
    for length in image.shape:
        place = np.arange(size, dtype=f) * f(length / size)
        low = np.floor(place).astype(int)
        axes.append((low, np.minimum(low + 1, length - 1), place - low.astype(f)))
    (y0, y1, dy), (x0, x1, dx) = axes
    top, bottom = ((rows[:, x0] + (rows[:, x1] - rows[:, x0]) * dx)
                   for rows in (image.astype(f)[y0], image.astype(f)[y1]))
    return top + (bottom - top) * dy[:, None]

@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (7, 5), (32, 64), (256, 256), (299, 299), (512, 301)])
def test_resize_is_tensorflows_to_the_bit(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    got = fid.resize(torch.from_numpy(image)[None, :, :, None])
    assert got.shape == (1, 299, 299, 1) and got.dtype == torch.float32
    assert np.array_equal(got[0, :, :, 0], tf_resize(image))

UNITS = {                                               # of the blocks of Inception-v3
    "A": "1x1 5x5_1 5x5_2 3x3dbl_1 3x3dbl_2 3x3dbl_3 _pool", "B": "3x3 3x3dbl_1 3x3dbl_2 3x3dbl_3",
    "C": "1x1 7x7_1 7x7_2 7x7_3 7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5 _pool",
    "D": "3x3_1 3x3_2 7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4",
    "E": "1x1 3x3_1 3x3_2a 3x3_2b 3x3dbl_1 3x3dbl_2 3x3dbl_3a 3x3dbl_3b _pool"}
BLOCKS = dict(zip("5b 5c 5d 6a 6b 6c 6d 6e 7a 7b 7c".split(), "AAABCCCCDEE"))
def test_inception_has_the_keys_of_the_published_file():
    net = fid.inception()
    units = [f"Conv2d_{name}" for name in ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")]
    for block, kind in BLOCKS.items():
        units += [f"Mixed_{block}.branch{unit}" for unit in UNITS[kind].split()]
    values = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    want = {f"{unit}.{value}" for unit in units for value in values} | {"fc.weight", "fc.bias"}
    got = {k: v.shape for k, v in net.state_dict().items() if "num_batches" not in k}
    assert set(got) == want and len(want) == 472 and len(net.state_dict()) == 566
    assert sum(shape.numel() for shape in got.values()) == 23_885_392
    assert sum(value.numel() for value in net.parameters()) == 23_850_960
    assert got["fc.weight"] == (1008, 2048) and got["Mixed_5b.branch_pool.conv.weight"][0] == 32
    assert [got[f"Mixed_6{i}.branch7x7_1.conv.weight"][0] for i in "bcde"] == [128, 160, 160, 192]

@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights with batch norms other than the identity, as a file -> path, state dict."""
    state, g = fid.inception().state_dict(), torch.Generator().manual_seed(1)
    state = {k: v for k, v in state.items() if "num_batches" not in k}      # as in the published file
    for name, value in state.items():
        if ".bn." in name or name == "fc.bias":
            low = 0.5 - name.endswith(("bn.bias", "running_mean"))
            value.uniform_(low, low + 1, generator=g)
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(state, path)
    return path, state

def pool_by_shifts(x, how):
    """3x3 pooling, stride 1, over the pixels that exist: shifts of an array padded with NaN."""
    _, _, h, w = x.shape
    edge = (0, 0), (0, 0), (1, 1), (1, 1)
    padded = np.pad(x.double().numpy(), edge, constant_values=np.nan)
    return how([padded[:, :, i:i + h, j:j + w] for i in range(3) for j in range(3)], axis=0)

def test_features_against_the_unfolded_network_and_its_pools(inception_file):
    path, state = inception_file
    images = torch.randint(256, (2, 40, 50, 3), dtype=torch.uint8)
    (net, _), plain, seen = fid.load_inception(path), fid.inception(), {}
    plain.load_state_dict(state, strict=False)
    for name, unit in plain.named_modules():
        if re.fullmatch(r"Mixed_..|.*branch_pool", name):       # what a block and its pool see
            unit.register_forward_pre_hook(lambda m, x, k=name: seen.update({k: x[0].clone()}))
    plain.Mixed_6d.branch1x1.register_forward_hook(lambda m, x, y: seen.update(conv=y.clone()))
    with torch.no_grad():
        x = (fid.resize(images).permute(0, 3, 1, 2).contiguous() - 128) * 0.0078125
        stem = "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 maxpool1 Conv2d_3b_1x1 Conv2d_4a_3x3"
        for stage in (*stem.split(), "maxpool2", *(f"Mixed_{block}" for block in BLOCKS)):
            x = plain.get_submodule(stage)(x)
    want, (pool, spatial) = x.mean((2, 3)), fid.features(net, images)
    scale = want.abs().max()
    assert pool.shape == (2, 2048) and scale > 0.1 and (pool - want).abs().max() < 1e-5 * scale
    for block in set(BLOCKS) - {"6a", "7a"}:
        want = pool_by_shifts(seen[f"Mixed_{block}"], np.nanmax if block == "7c" else np.nanmean)
        assert np.allclose(seen[f"Mixed_{block}.branch_pool"], want, rtol=1e-4, atol=1e-5), block
    want = seen["conv"][:, :7].permute(0, 2, 3, 1).reshape(2, 2023)         # channel last
    assert (spatial - want).abs().max() < 2e-5 * want.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):   # a caller's autocast changes nothing
        assert torch.equal(fid.features(net, images)[0], pool)

def test_weights_are_checked(inception_file, tmp_path, monkeypatch):
    path, state = inception_file
    cache = tmp_path / "hub/checkpoints" / fid.URL.rsplit("/", 1)[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    def offline(url, dst, hash_prefix):
        assert (url, dst, hash_prefix) == (fid.URL, str(cache), fid.SHA256)
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ValueError, match=f"{fid.URL} .*{cache}.*no route to host"):
        fid.load_inception()
    monkeypatch.undo()                                  # a server that ends early, then a good one
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    whole = path.read_bytes()
    monkeypatch.setattr(fid, "SHA256", fid.hashlib.sha256(whole).hexdigest())
    monkeypatch.setattr(fid, "URL", (tmp_path / cache.name).as_uri())
    Path(cache.name).write_bytes(whole[:5000])
    with pytest.raises(ValueError, match="file:.* cannot be read .*invalid hash value"):
        fid.load_inception()
    assert list(cache.parent.iterdir()) == []
    Path(cache.name).write_bytes(whole)
    assert fid.load_inception()[1] == "published" and cache.read_bytes() == whole
    torch.save({**fid.inception().state_dict(), **state}, cache)    # with num_batches_tracked
    with pytest.raises(ValueError, match="its SHA-256 is not"):
        fid.load_inception()
    assert fid.load_inception(cache)[1] == str(cache)
    monkeypatch.setattr(fid, "SHA256", fid.hashlib.sha256(cache.read_bytes()).hexdigest())
    assert fid.load_inception()[1] == fid.load_inception(cache)[1] == "published"
    bias, other = "Mixed_7a.branch3x3_1.bn.bias", torch.zeros(3)
    kind = "not a whole state dict, as torch.save"
    files = {"less": ({k: v for k, v in state.items() if k != bias}, f"lacks .'{bias}'."),
             "more": ({**state, "AuxLogits.fc.bias": other}, "has .'AuxLogits.fc.bias'."),
             "code": (Bomb(), kind),
             "prefix": ({f"module.{k}": v for k, v in state.items()}, "lacks .'Conv2d.* has .'module.Conv2d"),
             "wrapped": ({"model": state}, "lacks .'Conv2d.* has .'model'."),
             "list": ([other], "class 'list'"),
             "shape": ({**state, "fc.bias": other}, r"size mismatch for fc.bias: .*\[3\]")}
    for name, (file, _) in files.items():
        torch.save(file, f"{name}.pth")
    np.savez(open("npz.pth", "wb"), other)
    Path("pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:6726825d\n")
    Path("cut.pth").write_bytes(whole[:len(whole) // 2])
    Path("empty.pth").touch()
    files |= {name: (None, kind) for name in ("npz", "pointer", "cut", "empty")}
    files["gone"] = None, "No such file"
    for name, (_, message) in files.items():
        with pytest.raises(ValueError, match=rf"\A{name}.pth: cannot be read.*{message}.*\Z"):
            fid.load_inception(f"{name}.pth")
    assert not Path("exploded").exists()

def test_inception_score_by_hand_and_its_order():
    same = torch.randn(1, 12).expand(50, 12)
    assert fid.inception_score(same) == pytest.approx(1, abs=1e-12)
    sure = 1000.0 * torch.eye(12).repeat(5, 1)          # certain, balanced; some p are 0
    assert fid.inception_score(sure) == pytest.approx(12, rel=1e-12)
    assert fid.inception_score(sure, split=12) == pytest.approx(12, rel=1e-12)
    by_class = 1000.0 * torch.eye(12).repeat_interleave(5, 0)
    assert fid.inception_score(by_class, split=5) == pytest.approx(1, rel=1e-12)
    # splits of 5,000; a short last one counts as much as the others
    logits = 3 * torch.randn(5007, 5, generator=torch.Generator().manual_seed(0))
    p = torch.softmax(logits.double(), 1).numpy()
    divergences = [(q * np.log(q / q.mean(0))).sum(1).mean() for q in (p[:5000], p[5000:])]
    assert fid.inception_score(logits) == pytest.approx(np.exp(divergences).mean(), rel=1e-10)

def test_precision_recall_by_brute_force_with_ties():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 7, (60, 2)), rng.integers(3, 9, (45, 2))     # many distances tie
    def distances(points, centres):
        return ((points[:, None] - centres) ** 2).sum(2)
    def share(points, centres):
        radii = np.sort(distances(centres, centres))[:, 3]      # entry 0 is the centre
        return (distances(points, centres) <= radii).any(1).mean()
    want = share(a, b), share(b, a)
    assert len({0, 1, *want}) == 4
    a, b = torch.from_numpy(a).float(), torch.from_numpy(b).float()
    assert fid.precision_recall(a, b) == want
    assert fid.share_inside(a, b, 3, rows=7) == want[0]         # in blocks of rows
    assert fid.precision_recall(a, a) == (1, 1) and fid.precision_recall(a, a + 100) == (0, 0)

@pytest.fixture
def small(tmp_path, monkeypatch):
    """12 images as folder and array.npz in the working directory, others in other.npz; a network
    with .fc, .truth (features of the images, then of the others) and .sizes (of its batches)."""
    monkeypatch.chdir(tmp_path)
    arrays = np.random.default_rng(0).integers(0, 256, (12, 6, 5, 3), dtype=np.uint8)
    Path("folder/deep/er").mkdir(parents=True)
    for i, array in enumerate(arrays):
        name = f"{'deep/er/' if i > 8 else ''}{i:02}.{('png', 'PNG', 'bmp')[i % 3]}"
        Image.fromarray(array).save(f"folder/{name}")
    Path("folder/notes.txt").touch()
    other = 255 - arrays[::-1] // 2
    np.savez("array.npz", arr_0=arrays)
    np.savez("other.npz", arr_0=other)
    monkeypatch.setattr(fid, "POOL", 6)
    monkeypatch.setattr(fid, "KEYS", {"fid": ("mu", "sigma", 6), "sfid": ("mu_s", "sigma_s", 4)})
    net, g = torch.nn.Module(), torch.Generator().manual_seed(0)
    net.fc, net.sizes = torch.nn.Linear(6, 9), []
    net.fc.weight.data = torch.randn(9, 6, generator=g)
    weight = torch.randn(6, 300, generator=g) / 1000
    def features(net, images):
        net.sizes.append(len(images))
        x = fid.resize(images, 10).flatten(1)
        return torch.sin(x @ weight.T), torch.cos(x @ weight[:4].T)
    monkeypatch.setattr(fid, "features", features)
    monkeypatch.setattr(fid, "load_inception", lambda path, device: (net, path or "published"))
    net.truth = [features(net, torch.from_numpy(images.copy())) for images in (arrays, other)]
    net.sizes.clear()
    return net

def test_evaluate_is_its_parts(small):
    got = fid.evaluate("array.npz", "other.npz", batch=5)
    assert set(small.sizes) == {5}                      # the last batch is filled up
    small.sizes.clear()
    assert fid.evaluate("folder", "other.npz", batch=700)["fid"] == pytest.approx(got["fid"], rel=1e-6)
    assert small.sizes == [12, 12]                      # and no batch beyond the images there are
    for metric, x, y in zip(("fid", "sfid"), *small.truth):
        want = fid.frechet_distance(*moments_of(x), *moments_of(y))
        assert got[metric] == pytest.approx(want, rel=1e-6)
    (x, _), (y, _) = small.truth                        # logits are without the bias
    assert got["is"] == pytest.approx(fid.inception_score(x @ small.fc.weight.T), rel=1e-6)
    assert (got["precision"], got["recall"]) == fid.precision_recall(x, y)
    assert (got["samples"], got["images"], got["weights"]) == ("array.npz", 12, "published")

def test_every_input_reads_the_same(small):
    arrays = np.load("array.npz")["arr_0"]
    np.savez_compressed("packed.npz", arr_0=arrays, arr_1=np.arange(12))
    for path in ("folder", "packed.npz"):
        got = fid.evaluate(path, "array.npz", batch=5)
        assert abs(got["fid"]) < 1e-9 and abs(got["sfid"]) < 1e-9 and got["precision"] == 1, path
    for version in ((1, 0), (2, 0), (3, 0)):            # every header that numpy writes
        with zipfile.ZipFile("version.npz", "w") as archive, archive.open("arr_0.npy", "w") as file:
            np.lib.format.write_array(file, arrays, version)
        assert abs(fid.evaluate("version.npz", "array.npz", ["fid"])["fid"]) < 1e-9, version
    batches = list(fid.array_batches("packed.npz", 5, 12))
    assert [len(batch) for batch in batches] == [5, 5, 2]
    for read in (torch.cat(batches), fid.decode(fid.image_files("folder")[0])):
        assert torch.equal(read, torch.from_numpy(arrays))
    # grey, as array and as files; then of other sizes as well, of a palette and with transparency
    grey = arrays[:4, ..., 0]
    np.savez("grey.npz", arr_0=grey[..., None])
    odd = Image.fromarray(np.dstack([arrays[5, :, :3], grey[0, :, :3] // 9]))
    files, pictures = [f"{i}.png" for i in range(6)], [Image.fromarray(array) for array in grey]
    for file, picture in zip(files, [*pictures, odd, pictures[0].convert("P")]):
        picture.save(file)
    want = torch.from_numpy(grey)[..., None].expand(4, 6, 5, 3)
    assert torch.equal(next(fid.array_batches("grey.npz", 4, 4)), want)
    assert torch.equal(fid.decode(files[:4]), want)
    parts = want, torch.from_numpy(arrays[5:6, :, :3]), want[:1]
    assert torch.equal(fid.decode(files), torch.cat([fid.resize(part) for part in parts]))

def png(bits, colour, values):
    """Values (h, w, channels) of 16 bits, or (h, w, 1) of 4 with even w, as a PNG."""
    rows = values.astype(">u2") if bits == 16 else (values[:, ::2] * 16 + values[:, 1::2]).astype(np.uint8)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    head = struct.pack(">2I5B", values.shape[1], len(values), bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(body)) + name + body + struct.pack(
        ">I", zlib.crc32(name + body)) for name, body in chunks)

def test_images_of_every_depth_are_right_or_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    deep = np.random.default_rng(0).integers(0, 65536, (4, 6, 4))
    kinds = (0, 1), (2, 3), (4, 2), (6, 4)              # of colour, with so many channels
    files = {f"{colour}.png": png(16, colour, deep[..., :n]) for colour, n in kinds}
    for mode, kind in (("I;16", "<u2"), ("I;16B", ">u2"), ("I", "<i4"), ("F", "<f4")):
        Image.frombytes(mode, (6, 4), deep[..., 0].astype(kind).tobytes()).save(f"{mode}.tif")
    Image.fromarray(deep.astype(np.uint8)[..., :3]).save("8.tif")
    tif = Path("8.tif").read_bytes()                    # the same with 16 bits, then in planes as well
    files["16.tif"] = tif.replace(struct.pack("<3H", 8, 8, 8), struct.pack("<3H", 16, 16, 16))
    planes = [struct.pack("<2HIH", 284, 3, 1, n) for n in (1, 2)]
    files["planes.tif"] = files["16.tif"].replace(*planes)
    assert len({tif, *files.values()}) == 7
    for name, data in files.items():
        Path(name).write_bytes(data)
    for name in (*files, "I;16.tif", "I;16B.tif", "I.tif", "F.tif"):
        with pytest.raises(ValueError, match=f"{name}: .*more than 8 bits a channel"):
            fid.decode([name])
    grey, ppm = deep[..., :1] % 16, (deep[..., :3] * 255 / 65535).round()
    Path("4.png").write_bytes(png(4, 0, grey))
    Path("16.ppm").write_bytes(b"P6 6 4 65535\n" + deep[..., :3].astype(">u2").tobytes())
    Image.fromarray(grey[..., 0] % 2 > 0).save("1.png")
    Image.fromarray(grey[..., 0] % 2 > 0).save("1.pbm")
    bits = grey % 2 * 255
    for name, want in {"4.png": grey * 17, "1.png": bits, "1.pbm": bits, "16.ppm": ppm}.items():
        assert np.array_equal(fid.decode([name])[0], np.broadcast_to(want, (4, 6, 3))), name

def test_folder_is_read_whole(small, tmp_path, capsys):
    """By links and not in circles, without hidden names; what is skipped is counted and named."""
    images = fid.image_files("folder")[0]
    for name in ("folder/.ipynb_checkpoints", "folder/d.png", "real/class"):
        Path(name).mkdir(parents=True)
    for source, copy in zip(images, ("folder/.ipynb_checkpoints/0.png", "folder/._0.png", "real/class/b.PNG",
                                     "folder/d.png/c.jfif")):
        Path(copy).write_bytes(Path(source).read_bytes())
    Path("folder/linked").symlink_to(tmp_path / "real")
    Path("real/class/circle").symlink_to(tmp_path / "folder")
    Path("real/again").symlink_to(tmp_path / "real/class")
    Path("folder/z.png").symlink_to("00.png")
    Path("folder/lost.png").symlink_to("nowhere.png")
    os.mkfifo("folder/pipe.png")
    for name in ("y.gif", "x.PSD"):
        Path(f"folder/deep/{name}").touch()
    want = [*images, "folder/d.png/c.jfif", "folder/linked/again/b.PNG", "folder/z.png"]
    assert fid.image_files("folder") == (sorted(want), "folder: skipped 5 files that are no images, such as "
                                         "folder/deep/x.PSD")
    assert fid.image_files(tmp_path / "real/class")[0] and fid.main(["folder", "array.npz"]) == 0
    assert capsys.readouterr().err.count("skipped 5 files") == 1
    with pytest.raises(OSError):
        fid.image_files("gone")

def test_inputs_that_change_while_they_are_measured(small, monkeypatch, capsys):
    """A folder is measured as it was listed; an array of another length is refused."""
    real, counts = fid.contents, []
    def grow(path):
        found = real(path)
        for i in range(5):
            Image.new("RGB", (5, 6)).save(f"folder/{len(counts)}-{i}.png")
        np.savez("grown.npz", arr_0=np.zeros((9 + len(counts), 6, 5, 3), np.uint8))
        counts.append(found[0])
        return found
    monkeypatch.setattr(fid, "contents", grow)
    got = fid.evaluate("folder", "array.npz", batch=5)
    assert got["images"] == counts[0] == 12 and abs(got["fid"]) < 1e-9 and got["precision"] == 1
    assert fid.main(["grown.npz", "array.npz"]) == 2    # it grew from 10 to 11, then to 12
    assert capsys.readouterr().err == ("fid.py: grown.npz: cannot be read (ValueError: "
                                       "arr_0 had 10 images and now has 12)\n")

def test_main_in_a_notebook(small, monkeypatch):
    """Output that cannot be reconfigured; streams, signals and torch.distributed are the host's."""
    def host():
        return sys.stdout, sys.stderr, [signal.getsignal(n) for n in signal.valid_signals()]
    for name, value in dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1").items():
        monkeypatch.setenv(name, value)                 # two processes say fid.py, one says torch
    for world, bad in ((1, False), (2, False), (2, True)):
        monkeypatch.setattr(fid, "WORLD", world)
        before = host()
        with contextlib.redirect_stdout(io.StringIO()) as out:
            inside = host()
            code = fid.main(["gone" if bad else "array.npz", "array.npz", "--device", "cpu"])
            assert host() == inside
        assert code == (2 if bad else 0) and ("fid        0.00000\n" in out.getvalue()) != bad
        assert host() == before and not torch.distributed.is_initialized()
    text = io.TextIOWrapper(io.BytesIO(), "ascii")      # can be, and is not
    with contextlib.redirect_stdout(text):
        assert fid.main(["array.npz", "array.npz", "--device", "cpu"]) == 0
    assert text.errors == "strict"
    torch.distributed.init_process_group("gloo")        # the host's own
    assert fid.main(["array.npz", "array.npz", "--device", "cpu"]) == 0
    assert torch.distributed.is_initialized()
    torch.distributed.destroy_process_group()

def test_every_path_may_begin_with_a_tilde(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = []
    monkeypatch.setattr(fid, "load_inception", lambda path, device: (small, seen.append(path) or path))
    assert fid.main(["~/folder", "~/other.npz", "--save-stats=~/x.npz", "--weights=~/w.pth", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [report["samples"], report["reference"], *seen] == [f"{tmp_path}/{name}" for name in
                                                               ("folder", "other.npz", "w.pth")]
    assert Path("x.npz").exists() and not Path("~").exists()

def test_decode_ahead_keeps_order_and_few_blocks(monkeypatch):
    begun, blocks = [], [[i] for i in range(50)]
    monkeypatch.setattr(fid, "decode", lambda block: begun.append(block) or block)
    for count in (0, 1, 3, 50):
        begun.clear()
        for done, block in enumerate(fid.decode_ahead(blocks[:count], 3)):
            assert block == [done] and len(begun) <= done + 1 + 3
        assert sorted(begun) == blocks[:count]

def test_statistics_instead_of_images(small, monkeypatch):
    assert fid.main(["other.npz", "--save-stats", "stats.npz"]) == 0
    whole, got = (fid.evaluate("array.npz", b) for b in ("other.npz", "stats.npz"))
    kept = {name: got[name] for name in ("fid", "sfid", "is")}      # every metric that the two allow
    assert kept == pytest.approx({name: whole[name] for name in kept}) and "precision" not in got
    # an ADM reference batch: its images are read for precision and recall alone
    read, real, stats = [], fid.array_batches, np.load("stats.npz")
    np.savez("adm.npz", arr_0=np.load("other.npz")["arr_0"] // 2, **stats, mu_clip=np.zeros(3))
    monkeypatch.setattr(fid, "array_batches", lambda path, *a: read.append(path) or real(path, *a))
    got = fid.evaluate("array.npz", "adm.npz", ["fid", "sfid", "is"])
    assert read == ["array.npz"] and got["fid"] == pytest.approx(whole["fid"], rel=1e-12)
    fid.evaluate("array.npz", "adm.npz", ["pr"])
    assert read == ["array.npz"] * 2 + ["adm.npz"]

def test_report_and_notes(small, capsys):
    assert fid.main(["folder", "other.npz", "--json", "--weights", "random"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert "MEANINGLESS" in err and "few images (12, 12)" in err and len(report["notes"]) == 3
    assert fid.main(["folder", "other.npz", "--metrics", "fid,pr"]) == 0
    out, err = capsys.readouterr()
    lines = [f"{name:10} {report[name]:.5f}" for name in ("fid", "precision", "recall")]
    assert out.splitlines() == lines and "MEANINGLESS" not in err
    assert fid.main(["folder", "array.npz", "--metrics", "sfid,fid"]) == 0
    assert capsys.readouterr().out.splitlines() == ["fid        0.00000", "sfid       0.00000"]
    # 10,000 images of two classes, one after the other and in turn, against an ADM batch
    pair, empty = np.array([0, 120], np.uint8), np.zeros((3000, 1, 1, 3), np.uint8)
    np.savez("adm.npz", arr_0=empty, mu=np.zeros(6), sigma=np.eye(6))
    for array, is_sorted in ((np.repeat(pair, 5000), True), (np.tile(pair, 5000), False)):
        np.savez("many.npz", arr_0=array[:, None, None, None])
        notes = "\n".join(fid.evaluate("many.npz", "adm.npz", ["is"], batch=1000)["notes"])
        assert ("sorted by class" in notes) == is_sorted and "few" not in notes
        assert "many.npz: 10000 images; published numbers" in notes

def test_saved_statistics_are_whole_or_not_there(small, monkeypatch, capsys):
    def fail(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    args = "array.npz --save-stats stats.npz".split()
    assert fid.main(args) == 0
    monkeypatch.setattr(np, "savez", fail)
    refused(capsys, fid.main, args, "No space left")

BAD_INPUT = [
    ("gone other.npz", "gone: cannot be read .FileNotFoundError"),
    ("empty other.npz", "empty: 0 images; need 2"),
    ("corrupt other.npz", "fid.py: corrupt/0.png: cannot be read .*image"),
    ("deep16 other.npz", "deep16/0.png: .*more than 8 bits"),
    ("cut.npz other.npz", "cut.npz: cannot be read"),
    ("flipped.npz other.npz", "flipped.npz: cannot be read .*CRC"),
    ("array.npz keys.npz", "keys.npz: 0 images; need 2 images .arr_0. or statistics"),
    ("nchw.npz other.npz", r"nchw.npz: .*arr_0 is uint8 \(4, 3, 8, 8\); need uint8 N x H x W x 3"),
    ("columns.npz other.npz", "columns.npz: .*in row order"),
    ("floats.npz other.npz", "floats.npz: .*arr_0 is float64 .*; need uint8"),
    ("array.npz dims.npz", r"dims.npz: .*mu \(5,\), sigma \(5, 5\); need 6"),
    ("array.npz skew.npz", "skew.npz: .*covariance is not symmetric"),
    ("array.npz stats.npz --metrics sfid", "--metrics sfid: these inputs allow .'fid', 'is'."),
    ("array.npz other.npz --metrics kid", "kid: these inputs allow .'fid', 'sfid', 'is', 'pr'."),
    ("array.npz", "nothing to compute"),
    ("few.npz other.npz --metrics pr", "need more than 3 images"),
    ("array.npz other.npz --batch -1", "--batch -1: must be at least 1"),
    ("array.npz other.npz --device tpu", "--device tpu: must be cpu, cuda or cuda:N"),
    ("array.npz other.npz --save-stats no/x.npz", "no/x.npz: not a file in a folder that can be written"),
    ("gone other.npz --save-stats folder/", "--save-stats folder/: not a file in a folder that"),
    ("gone other.npz --save-stats /proc/self/x", "--save-stats /proc/self/x: not a file in a folder that"),
    ("stats.npz other.npz --save-stats x.npz", "--save-stats x.npz: stats.npz has no images"),
    *((f"{args} --save-stats {file}", f"--save-stats {file}: would replace an input") for args, file in (
        ("array.npz", "./array.npz"), ("array.npz other.npz", "deep16/../other.npz"),
        ("array.npz", "/proc/self/cwd/array.npz"), ("link.npz", "array.npz"), ("array.npz", "link.npz"),
        ("array.npz --weights w.pth", "w.pth"), ("folder", "folder/deep/../00.png"),
        ("array.npz folder", "folder/01.PNG"), ("new.tmp", "new"))),
    ("array.npz other.npz --metric fid", "unrecognized arguments: --metric"),
]
@pytest.mark.parametrize("args, message", BAD_INPUT)
def test_bad_input_to_fid_gets_one_line_and_exit_code_2(small, capsys, args, message):
    arrays, eye = np.load("array.npz")["arr_0"], np.eye(6)
    files = dict(keys=dict(latents=arrays), nchw=dict(arr_0=np.zeros((4, 3, 8, 8), np.uint8)),
                 columns=dict(arr_0=np.asfortranarray(arrays)), floats=dict(arr_0=arrays / 255),
                 few=dict(arr_0=arrays[:3]), stats=dict(mu=np.zeros(6), sigma=eye),
                 dims=dict(mu=np.zeros(5), sigma=np.eye(5)),
                 skew=dict(mu=np.zeros(6), sigma=eye + np.eye(6, k=1)))
    for name, content in files.items():
        np.savez(f"{name}.npz", **content)
    damage("array.npz")
    Path("link.npz").symlink_to("array.npz")
    Path("new.tmp").write_bytes(Path("array.npz").read_bytes())     # written on the way to new
    for name in ("empty", "corrupt", "deep16"):
        Path(name).mkdir()
    for i in (0, 1):
        Path(f"corrupt/{i}.png").write_bytes(Path("folder/00.png").read_bytes()[:60])
        Image.fromarray(np.zeros((5, 5), np.uint16)).save(f"deep16/{i}.png")
    assert refused(capsys, fid.main, args.split(), message) == ""

def test_two_processes_of_fid_equal_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Path("a").mkdir()
    for i in range(11):                                 # batches of 3, 3, 3 and 2; sizes differ
        image = rng.integers(0, 256, (48 if i % 5 == 0 else 32, 32, 3), dtype=np.uint8)
        Image.fromarray(image).save(f"a/{i:02}.png")
    np.savez("b.npz", arr_0=rng.integers(0, 256, (7, 16, 16, 3), dtype=np.uint8))
    args = "a b.npz --weights random --batch 3 --device cpu --json --metrics fid,is,pr --save-stats".split()
    torch.set_num_threads(1)                            # as torchrun: rounding depends on it
    assert fid.main([*args, "one.npz"]) == 0
    torch.set_num_threads(2)
    late = "import fid; f = fid.image_files; fid.image_files = lambda p: (f(p)[0][fid.RANK:], f(p)[1]); "
    Path("late.py").write_text(f"{late}raise SystemExit(fid.main())")   # process 1 lists fewer images
    two = start(2, *args, "two.npz", script="late.py")
    one = json.loads(capsys.readouterr().out)
    two = json.loads(two.stdout[two.stdout.index("{"):])        # gloo of torch 2.10 prints a line before
    for metric in ("fid", "is", "precision", "recall"):
        assert one[metric] == pytest.approx(two[metric], rel=1e-9), metric
    one, two = np.load("one.npz"), np.load("two.npz")
    for key in ("mu", "sigma", "mu_s", "sigma_s"):
        assert np.abs(one[key] - two[key]).max() <= 1e-9 * np.abs(one[key]).max(), key
    Path("a/05.png").write_bytes(b"hello")              # in the first batch of process 1
    bad = start(2, *args, "bad.npz", script=HERE / "fid.py", code=1)
    assert bad.stderr.count("fid.py: a/05.png: cannot be read") == 1 and not Path("bad.npz").exists()

# ---- The command line, in miniature: a tiny random teacher, a handful of steps ---------------------
def save_net(path, net, **info):
    torch.save({"ema": net.state_dict(), "config": net.config, **info}, path)

@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with teacher.pt."""
    monkeypatch.chdir(tmp_path)
    net = tiny(shape=(1, 8, 8), classes=10)
    for p in net.parameters():
        p.data.mul_(0.5) if p.requires_grad else None   # tame: a random velocity must not explode
    save_net("teacher.pt", net)
    return tmp_path

SMALL = "--teacher teacher.pt --batch 8 --eval-samples 12 --log-every 1 --device cpu".split()
EXACT = [*SMALL, *"--steps 20 --batch 16".split()]
FROM_TEACHER = ["--teacher", "teacher.pt", "--device", "cpu"]

def run(*args):
    fmd.main([str(a) for a in args])

def sample_noise(count):
    draws = [np.random.default_rng([0, i]).standard_normal((1, 8, 8), np.float32) for i in range(count)]
    return torch.from_numpy(np.stack(draws))

def logged(folder, name="step"):
    return [json.loads(line)[name] for line in Path(folder, "metrics.jsonl").read_text().splitlines()]

def leaves(folder, *parts):
    """Every number of these parts of a checkpoint."""
    file = torch.load(Path(folder, "ckpt.pt"), weights_only=True)
    leaves = tree_leaves([file[part] for part in parts])
    return [torch.as_tensor(leaf) for leaf in leaves if leaf is not None]

def same(a, b):
    a, b = (leaves(f, "student", "ema", "online", "optimizer", "step") for f in (a, b))
    return len(a) == len(b) and all(map(torch.equal, a, b))

def apart(a, b):
    """The relative distance of two runs' networks, each as one vector. (Key biases have no gradient except
    rounding, which Adam scales to whole steps: by tensor the comparison would be of noise.)"""
    pairs = [[torch.cat([leaf.flatten() for leaf in leaves(folder, net)]) for folder in (a, b)]
             for net in ("student", "ema", "online")]
    return max(((x - y).norm() / x.norm()).item() for x, y in pairs)

def test_main_job_writes_what_it_promises_and_samples_by_the_authors_rule(work, capsys, monkeypatch):
    def rate(*a, real=fmd.learning_rate):
        assert Path("o/pairs.png").exists()             # before the first step
        return real(*a)
    monkeypatch.setattr(fmd, "learning_rate", rate)
    run(*SMALL, "--steps", 4, "--save-every", 3, "--out", "o")
    out = capsys.readouterr().out
    assert "next: python fmd.py" in out and out.index("See o/pairs.png") < out.index('{"step": 1')
    with pytest.raises(SystemExit):
        fmd.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "'steps': 1100, " in text.split("--res 28: ")[1]
    assert "'alpha': 1.0, 'cut': 0.7, 'steps': 100000, " in text.split("--res 256: ")[1]
    assert "'checkpointing': True" in text.split("--res 512: ")[1]
    small, middle, large = (fmd.parse(["--res", res]) for res in ("28", "256", "512"))
    assert [s.steps for s in (small, middle, large)] == [1100, 100_000, 100_000]
    assert [s.checkpointing for s in (small, middle, large)] == [False, False, True]
    assert [(s.alpha, s.cut) for s in (small, middle, large)] == [(5, 1), (1, 0.7), (1, 0.7)]
    assert [s.save_every for s in (small, middle, large)] == [500, 10_000, 5000]
    assert middle.teacher == "SiT-XL/2" and fmd.parse(["--teacher", "a", "--no-bf16"]).teacher == "a"
    assert sorted(os.listdir("o")) == ["ckpt.pt", "metrics.jsonl", "pairs.png", "student-3.pt",
                                       "student-4.pt", "student.pt"]
    for term in "prediction correction online lambda pull student_norm images_per_s lr".split():
        assert len(logged("o", term)) == 4
    lines = [json.loads(line) for line in open("o/metrics.jsonl")]
    assert ["endpoint_error" in line for line in lines] == [False, False, True, True]
    (third, _), (last, _) = sit.load("o/student-3.pt"), sit.load("o/student.pt")
    assert not torch.equal(third.final_layer.linear.weight, last.final_layer.linear.weight)
    (net, info), (again, more) = sit.load("o/student.pt"), sit.load("o/ckpt.pt")
    assert info == {"config": net.config, "gamma": [1.0, 2.0], "why": "stated in the file"}
    assert info.items() <= more.items()                 # so the checkpoint can be sampled as well
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())
    # the endpoint error by hand: x0 = z + u at the prior's end of the clock, δ = 1
    raw = torch.load("o/student.pt", weights_only=True)["ema"]
    assert "dt_embedder.projs.0.weight" in raw and not [k for k in raw if "embedder.mlp" in k]
    net, teacher = sit.from_state_dict(raw, heads=4), sit.load("teacher.pt")[0]
    z, y, one = sample_noise(12), torch.arange(12) % 10, torch.ones(12)
    phi = fmd.many_steps(teacher, z, y, 1.5, 10, 16)
    x = z + net(z, one, y, one, 1.5 * one)
    assert torch.equal(x, fmd.one_step(net, z, y, 1.5))
    error = ((x - phi).flatten(1).norm(dim=1) / phi.flatten(1).norm(dim=1)).mean().item()
    assert lines[-1]["endpoint_error"] == pytest.approx(error, rel=1e-4)

@pytest.mark.parametrize("extra", [
    "--correction 0", "--correction 1", "--k 0", "--alpha 3 --cut 1", "--gamma 1 1",
    "--interval 0.2 0.8", "--ema 0 --warmup 0 --decay-from 1", "--bf16", "--checkpointing"])
def test_every_setting_trains(work, extra):
    run(*SMALL, "--steps", 2, *extra.split())
    last = {term: logged("out/28", term)[-1] for term in
            ("prediction", "correction", "online", "lambda", "student_norm", "online_norm")}
    absent = {"--correction 0": {"correction", "online", "online_norm"}, "--correction 1": {"prediction"}}
    assert {term for term, value in last.items() if value == 0} == absent.get(extra, set())
    assert last["lambda"] == 5 or extra not in absent   # α, where a part is empty

def test_settings_reach_the_method(work, monkeypatch):
    """Each setting is seen where it belongs: in the draws, in the guidance of its part, in the loss. And
    of the student's one pass each objective has its rows, with its δ and z."""
    seen = {}
    def spy(name):
        def call(*a, real=getattr(fmd, name), **k):
            seen.setdefault(name, []).append(a)
            return real(*a, **k)
        monkeypatch.setattr(fmd, name, call)
    for name in ("prior", "average_velocity", "prediction", "correction", "guided", "student_loss"):
        spy(name)
    args = "--gamma 1.2 1.4 --cut 0.6 --r-location 2 --r-scale 1.5 --k 0.5 --alpha 2 --correction 0.5".split()
    for high in (0.9, 0.5):                             # correction is guided up to the lower of high and cut
        run(*SMALL, *args, "--steps", 1, "--batch", 4000, "--interval", 0.1, high, "--out", high)
        assert [a[6] for a in seen["guided"][-2:]] == [[0.1, high], (0.1, min(high, 0.6))]
    assert [(a[0], a[3]) for a in seen["prior"]] == [(4000, [1.2, 1.4])] * 2
    logit = torch.logit(seen["correction"][0][5].double())
    assert abs(logit.mean() - 2) < 0.15 and abs(logit.std() - 1.5) < 0.15
    assert seen["student_loss"][0][4:] == (0.5, 2.0)
    whole = next(a for a in seen["average_velocity"] if len(a[1]) == 4000)
    predicted, corrected = seen["prediction"][0], seen["correction"][0]
    z_p, z_c = whole[1].split(2000)
    delta_p, delta_c = whole[2].split(2000)
    assert torch.equal(predicted[3], z_p) and torch.equal(corrected[3], z_c)
    assert torch.equal(predicted[4], delta_p) and (delta_p < 1).all() and (delta_c == 1).all()
    assert torch.equal(predicted[0], seen["student_loss"][0][0])
    assert torch.equal(corrected[0], seen["student_loss"][0][2])
    assert not torch.equal(predicted[0], corrected[0])

def test_a_teacher_without_a_picture_trains_and_is_saved(work, capsys):
    save_net("pixels.pt", tiny(shape=(16, 8, 8), classes=10))
    run(*SMALL, "--steps", 2, "--teacher", "pixels.pt", "--out", "o")
    assert "pairs.png is left out: it would have 16 channels" in capsys.readouterr().out
    assert sorted(os.listdir("o")) == ["ckpt.pt", "metrics.jsonl", "student-2.pt", "student.pt"]
    run("--sample", 3, "--device", "cpu", "--out", "o")
    assert np.load("o/samples.npz")["arr_0"].shape == (3, 8, 8, 16)

def test_training_in_a_notebook(work):
    """Under another stdout, without a handler or a stream left behind."""
    def host():
        return sys.stdout, sys.stderr, [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    before = host()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run(*SMALL, "--steps", 1)
        assert sys.stdout is out and "endpoint_error" in out.getvalue()
    assert before == host()
    assert not torch.distributed.is_initialized()

def test_sampling_commands(work):
    student = tiny(shape=(1, 8, 8), classes=10, **STUDENT)
    save_net("student.pt", student, gamma=[1.0, 2.0])
    sample = [*FROM_TEACHER, "--ckpt", "student.pt", "--sample"]
    run(*sample, 150, "--out", "one")
    start(2, *sample, 150, "--out", "two")
    run(*sample, 3, "--out", "few")                    # sample i depends on the seed and i alone
    start(4, *sample, 3, "--out", "four")               # one process has no share
    run(*sample, 3, "--out", "other", "--seed", 1, "--labels", 3, 4)
    names = ("one", "two", "few", "other", "four")
    images, labels = zip(*(np.load(f"{name}/samples.npz").values() for name in names))
    assert images[0].shape == (150, 8, 8, 1) and images[0].dtype == np.uint8
    assert labels[0].tolist() == [i % 10 for i in range(150)] and labels[3].tolist() == [3, 4, 3]
    assert Image.open("one/samples.png").size == (102, 102)
    assert images[1].shape == images[0].shape and np.array_equal(labels[0], labels[1])
    assert np.abs(images[0].astype(int) - images[1]).max() <= 1     # other thread counts
    assert np.abs(images[0][:3].astype(int) - images[2]).max() <= 1
    assert np.abs(images[4].astype(int) - images[2]).max() <= 1
    assert not np.array_equal(images[2], images[3])

def test_sampling_killed_half_way_leaves_no_samples(work, monkeypatch):
    save_net("student.pt", tiny(shape=(1, 8, 8), classes=10, **STUDENT), gamma=[1.0, 2.0])
    monkeypatch.setattr(fmd.sample, "__defaults__", (4,))
    args, shapes = [*FROM_TEACHER, *"--ckpt student.pt --sample 12 --out o".split()], []
    def stop(x, decoder, real=sit.to_uint8):
        shapes.append(x.shape)
        return real(x) if len(shapes) < 3 else sys.exit("killed")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sit, "to_uint8", stop)
        run(*args)
    assert shapes == [(4, 1, 8, 8)] * 3                 # a chunk at a time
    assert not Path("o/samples.npz").exists() and not Path("o/samples.png").exists()
    run(*args, "--sample", 5)                           # fewer than the rows that were left behind
    five = np.load("o/samples.npz")["arr_0"]
    run(*args)
    assert sorted(os.listdir("o")) == ["samples.npz", "samples.png"]
    twelve = np.load("o/samples.npz")["arr_0"]
    assert len(np.unique(twelve.reshape(12, -1), axis=0)) == 12 and len(five) == 5
    assert np.abs(twelve[:5].astype(int) - five).max() <= 1

@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_rollout_command_is_the_rollout(work, solver):
    args = "--rollout 2 --rollout-steps 5 --guidance 2 --labels 7 --out r --solver".split()
    run(*FROM_TEACHER, *args, solver)
    net, y, x = sit.load("teacher.pt")[0], torch.tensor([7, 7]), sample_noise(2)
    def u(x, i):
        t = torch.full((2,), 1 - i / 5)
        null = net(x, t, torch.full_like(y, 10))
        return null + 2 * (net(x, t, y) - null)
    with torch.no_grad():
        for i in range(5):
            a = u(x, i)
            x = x + (a + (u(x + a / 5, i + 1) if solver == "heun" and i < 4 else a)) / 10
    want, got = (127.5 * x + 128).clamp(0, 255).permute(0, 2, 3, 1).numpy(), np.load("r/rollout.npz")
    assert np.abs(got["arr_0"] - want).max() < 1.01 and got["arr_1"].tolist() == [7, 7]
    assert Path("r/rollout.png").exists()

BAD = [
    ("--res 27", "argument --res: invalid choice: 27"),
    ("--res abc", "argument --res: invalid int value: 'abc'"),
    ("--batch 0", "--batch 0: give 1 to inf"),
    ("--steps -3", "--steps -3: give 1 to inf"),
    ("--correction nan", "--correction nan: give 0 to 1"),
    ("--interval 0.5 2", r"--interval \[0.5, 2.0\]: give 0 to 1"),
    ("--interval 0.7 0", "--interval 0.7 0.0: give the lower one first"),
    ("--gamma 2 1", "--gamma 2.0 1.0: give the lower one first"),
    ("--lr -1", "--lr -1.0: give 0 to 1"),
    ("--seed 1.5", "argument --seed: invalid int value"),
    ("--seed -1", "--seed -1: give 0 to inf"),
    ("--warmup -1", "--warmup -1: give 0 to inf"),
    ("--lable 1", "unrecognized arguments: --lable"),
    ("--sample 0", "--sample 0: give 1 to inf"),
    ("--sample 1 --rollout 1", "argument --rollout: not allowed with argument --sample"),
    ("--device tpu", "--device: invalid choice: 'tpu'"),
    pytest.param("--device cuda", "--device cuda: 0 GPUs here, .* --device cpu", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a GPU")),
    ("--teacher flipped.pt", "flipped.pt: not a checkpoint.*checksum"),
    ("--teacher latent.pt", r"latent.pt: made for \[4, 32, 32\], not for --res 28"),
    ("--teacher student.pt", "student.pt: not a teacher"),
    ("--teacher ckpt.pt --out .", "--out .: ckpt.pt would be overwritten, and is read; give another"),
    ("--teacher ./o/../student.pt --out .", "--out .: student.pt would be overwritten"),
    ("--correction 0.01", "--correction 0.01: of --batch 32 one objective gets no rows"),
    ("--correction 0.99", "--correction 0.99: of --batch 32 one objective gets no rows"),
    ("--sample 1 --ckpt teacher.pt", "teacher.pt: not a student"),
    ("--sample 1 --ckpt cut.pt", "cut.pt: not a checkpoint"),
    ("--sample 1 --ckpt ~/student.pt", "/home/nobody/student.pt: no such file"),
    ("--sample 1 --out typo", "typo/student.pt: no such file"),
    ("--sample 1 --out=~/run", "fmd.py: /home/nobody/run/student.pt: no such file"),
    ("--teacher ~/t.pt", "fmd.py: /home/nobody/t.pt: no such file"),
    ("--rollout 1 --labels 10", "--labels .10.: give some of 0 to 9"),
    ("--rollout 1 --labels 3 -1", "--labels"),
    ("--res 256 --sample 1", "out/256/student.pt: no such file"),
    # before the decoder
    ("--res 256 --vae text.pt", r"teacher.pt: made for \[1, 8, 8\], not for --res 256"),
    ("--res 256 --teacher latent.pt --vae nowhere.pt", "nowhere.pt: no such file"),
    ("--res 256 --teacher latent.pt --vae text.pt", "text.pt: not a checkpoint"),
    ("--out text.pt/x", "text.pt/x"),
    ("--rollout 1 --out text.pt", "text.pt"),
]
@pytest.mark.parametrize("args, message", BAD)
def test_bad_input_gets_one_line(work, monkeypatch, capsys, args, message):
    monkeypatch.setenv("HOME", "/home/nobody")
    Path("text.pt").write_text("hello")
    save_net("latent.pt", tiny(shape=(4, 32, 32), patch=8))
    save_net("student.pt", tiny(shape=(1, 8, 8), classes=10, **STUDENT))
    damage("teacher.pt")
    refused(capsys, fmd.main, ["--teacher", "teacher.pt", *args.split()], message)

def test_help_in_a_terminal_without_unicode():
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, HERE / "fid.py", "--help"], capture_output=True, env=env)
    assert (done.returncode, done.stderr) == (0, b"")

def test_a_batch_that_the_processes_cannot_share(work, monkeypatch, capsys):
    monkeypatch.setattr(fmd, "WORLD", 3)
    args = [*SMALL, "--batch", "24"]            # 18 + 6 rows
    assert fmd.parse(args).rows_c == 6
    message = "--batch 8: 3 processes cannot share 6 rows .* and 2 .*; give multiples of 3"
    refused(capsys, fmd.main, [*args, "--batch", "8"], message)
    monkeypatch.setattr(fmd, "RANK", 1)
    with pytest.raises(SystemExit) as e:
        fmd.parse([*args, "--batch", "8"])
    assert e.value.code == 2 and capsys.readouterr().err == ""       # one process complains

@pytest.mark.parametrize("script", ["fmd.py", "fid.py"])
def test_ranks_are_the_environments(monkeypatch, script):
    """A process alone is process 0."""
    for world, want in (("", (0, 0, 1)), ("1", (0, 0, 1)), ("4", (3, 2, 4))):
        for name, value in dict(WORLD_SIZE=world, RANK="3", LOCAL_RANK="2").items():
            monkeypatch.setenv(name, value)
        module = runpy.run_path(str(HERE / script))
        assert tuple(module[name] for name in ("RANK", "LOCAL_RANK", "WORLD")) == want

def test_notes(work, capsys):
    """What is unusual is said in one line: guidance beyond the training's, the convention and why, ∅."""
    save_net("student-REPA.pt", tiny(shape=(1, 8, 8), classes=10, **STUDENT), gamma=[1.0, 2.0])
    for guidance, notes in ((8, 1), (2, 0)):
        run(*FROM_TEACHER, "--ckpt", "student-REPA.pt", "--sample", 1, "--guidance", guidance)
        note = "note: --guidance 8.0: the student was trained with 1.0"
        assert capsys.readouterr().out.count(note) == notes
    file = torch.load("student-REPA.pt", weights_only=True)
    del file["config"]["convention"]
    torch.save(file, "student-REPA.pt")
    run(*FROM_TEACHER, "--ckpt", "student-REPA.pt", "--sample", 1)
    out = capsys.readouterr().out
    assert "convention repa (REPA is a word of the file's name), labels 0 to 9\n" in out

def test_a_student_to_start_from(work, capsys, monkeypatch):
    """--init: the same network in its own clock and sign, and with other settings; one line if it does
    not fit."""
    student = tiny(shape=(1, 8, 8), classes=10, depth=1, convention="repa", **STUDENT)
    save_net("first.pt", student, gamma=[1.0, 2.0])
    run(*SMALL, *"--init first.pt --steps 1 --lr 0 --alpha 5 --out o".split())
    again, _ = sit.load("o/student.pt")
    z, y, one = torch.randn(3, 1, 8, 8), torch.arange(3), torch.ones(3)
    assert torch.equal(fmd.average_velocity(again, z, 0.5 * one, y, one),
                       fmd.average_velocity(student, z, 0.5 * one, y, one))
    online = sit.from_state_dict(torch.load("o/ckpt.pt", weights_only=True)["online"], heads=4)
    assert torch.equal(online(z, one, y, gamma=one), sit.load("teacher.pt")[0](z, one, y))
    for name, extra in (("side", dict(shape=(1, 4, 4))), ("labels", dict(classes=3))):
        save_net(f"{name}.pt", tiny(**dict(shape=(1, 8, 8), classes=10) | extra, **STUDENT))
    no = partial(refused, capsys, fmd.main)
    no([*SMALL, "--init", "side.pt"], r"side.pt: shape \[1, 4, 4\], classes 10; not those of the teacher")
    no([*SMALL, "--init", "labels.pt"], r"labels.pt: shape \[1, 8, 8\], classes 3; not those of the teacher")
    no([*SMALL, "--init", "teacher.pt"], "teacher.pt: not a student")
    no([*SMALL, "--init", "o/student.pt", "--out", "o"], "student.pt would be overwritten, and is read")
    Path("o/student-7.pt").write_bytes(Path("o/student.pt").read_bytes())
    no([*SMALL, "--init", "o/student-7.pt", "--out", "o"], "student-7.pt would be overwritten, and is read")
    monkeypatch.setattr(fmd, "__file__", "o/fmd.py")        # a name is looked for beside fmd.py as well
    no([*SMALL, "--init", "student.pt", "--out", "o"], "student.pt would be overwritten, and is read")

def test_a_launcher_may_show_each_process_a_gpu_of_its_own(monkeypatch, capsys):
    """srun --gpus-per-task=1: process 3 of a machine sees one GPU, number 0. All wait for half an hour."""
    taken, groups = [], []
    monkeypatch.setattr(fmd, "LOCAL_RANK", 3)
    monkeypatch.setattr(fmd, "WORLD", 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: taken.append(device.index))
    monkeypatch.setattr(fmd.dist, "init_process_group", lambda *a, timeout: groups.append(timeout.seconds))
    for count, index in ((1, 0), (4, 3)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        assert fmd.parse(["--device", "cuda"]).device == "cuda" and fmd.join("cuda").index == index
    assert taken == [0, 3] and groups == [1800, 1800]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refused(capsys, fmd.main, ["--device", "cuda"], "2 GPUs here, none for process 3 .* start fewer")

def test_the_log_on_cuda_has_the_peak_memory(work, monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5e9)
    fmd.report(argparse.Namespace(device="cuda", out=work), {"step": 3}, {}, (), None, saving=False)
    assert logged(".", "memory_gb") == [5.0]

# ---- A run that survives: signals, kills, damage, other world sizes --------------------------------
def keep_gradients():
    """Every gradient of a training, before it is clipped, as a file of the process."""
    kept = []
    def keep(weights, limit, real=fmd.clip_grad_norm_):
        weights = list(weights)
        kept.append(torch.cat([w.grad.flatten() for w in weights if w.grad is not None]))
        torch.save(kept, f"{fmd.RANK}.kept")
        return real(weights, limit)
    fmd.clip_grad_norm_ = keep

def test_gradient_of_two_processes_is_the_mean_of_their_shares(work, monkeypatch):
    args = [*SMALL, "--steps", 1, "--out"]
    start(2, "keep_gradients()", *args, "two", "--batch", 16, script=__file__)
    two = [torch.load(f"{rank}.kept") for rank in (0, 1)]
    monkeypatch.setattr(fmd, "clip_grad_norm_", fmd.clip_grad_norm_)
    keep_gradients()
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(fmd, "RANK", rank)
        run(*args, f"share{rank}", "--batch", 8)
        shares.append(torch.load(f"{rank}.kept")[-2:])
    for net in (0, 1):                                  # the student's, then g's
        mean, scale = (shares[0][net] + shares[1][net]) / 2, shares[0][net].norm()
        assert (two[0][net] - mean).norm() < 1e-4 * scale and torch.equal(two[0][net], two[1][net])
        assert (shares[0][net] - shares[1][net]).norm() > 0.1 * scale

def test_several_processes_train_as_well_as_one(work):
    """Other draws, equally many rows: an equal endpoint error. And one process carries on what two began."""
    args = [*SMALL, *"--steps 60 --batch 32 --lr 3e-3 --log-every 60 --eval-samples 64 --out".split()]
    run(*args, "one")
    errors = {1: logged("one", "endpoint_error")[-1]}
    for world in (2, 4):
        done = start(world, *args, world)
        assert done.stdout.count("next: python") == 1   # one process speaks
        errors[world] = logged(f"{world}", "endpoint_error")[-1]
        for term in ("online", "student_norm"):         # means over the processes, not sums
            assert logged(f"{world}", term)[0] == pytest.approx(logged("one", term)[0], rel=0.4)
    net, y = sit.load("teacher.pt")[0], torch.arange(64) % 10
    z = fmd.noises(0, range(64), (1, 8, 8))
    phi = fmd.many_steps(net, z, y, 1.5, 10)
    untrained = z + net(z, torch.ones(64), y)
    before = fmd.endpoint_error(untrained, phi).mean().item()
    worst, best = max(errors.values()), min(errors.values())
    assert worst < 1.5 * best and worst < before / 4, (errors, before)
    run(*args, "2", "--steps", 64)
    assert logged("2")[-1] == 64

def die_at(instant):
    """The last process dies at the n-th place, in steps and writes, where a kill could hurt; 0: never."""
    events = iter(range(1, 1000))
    def before(real):
        def call(*a, **k):
            if fmd.RANK == fmd.WORLD - 1 and next(events) == instant:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*a, **k)
        return call
    torch.save, os.fsync, os.replace = map(before, (torch.save, os.fsync, os.replace))
    fmd.learning_rate, json.dumps = before(fmd.learning_rate), before(json.dumps)

def test_killed_at_any_instant_and_rerun_equals_uninterrupted(work):
    args = [*SMALL, "--steps", 5, "--save-every", 2, "--out"]
    start(0, "die_at(0)", *args, "whole", script=__file__)
    # while the first ckpt.pt is not yet whole; in step 3; as the first, in step 5 -> the step that is kept
    for instant, step in ((14, 0), (18, 2), (42, 4)):
        start(0, f"die_at({instant})", *args, instant, script=__file__, code=-signal.SIGKILL)
        kept = torch.load(f"{instant}/ckpt.pt", weights_only=True)["step"] if step else 0
        done = start(0, "die_at(0)", *args, instant, script=__file__)
        assert kept == step and (f"resumed at step {step}\n" if step else "starts at step 0\n") in done.stdout
        assert same("whole", f"{instant}") and logged(f"{instant}")[-1] == 5
        assert not list(Path(f"{instant}").glob(".*"))
    start(2, "die_at(3)", *args, "many", "--save-every", 1, script=__file__, code=1)    # ends the others
    assert torch.load("many/ckpt.pt", weights_only=True)["step"] <= 2

def test_what_a_run_refuses_leaves_the_last_checkpoint(work, capsys, monkeypatch):
    args = [*SMALL, "--save-every", 1, "--out", "o", "--steps"]
    run(*args, 2)
    no = partial(refused, capsys, fmd.main)
    no([*args, 2, "--seed", 1], "o/ckpt.pt: .* all its 2 steps; give more --steps, or another --out")
    save_net("b.pt", tiny(shape=(1, 8, 8), classes=10))
    for changed, was in (("--k 2", "k was 1.0"), ("--gamma 1 3", r"gamma was \[1.0, 2.0\]"),
                         ("--r-location 0", "r_location was 0.8"),
                         ("--teacher b.pt", "teacher was teacher.pt")):
        no([*args, 3, *changed.split()], f"o/ckpt.pt: {was}; give that, or another --out")
    file = torch.load("o/ckpt.pt", weights_only=True)
    file["online"].popitem()
    torch.save(file, "less.pt")
    Path("text.pt").write_text("hello")
    damage("o/ckpt.pt")
    os.replace("o/ckpt.pt", "kept.pt")
    for name, why in (("o/student.pt", "KeyError: 'step'"), ("less.pt", "RuntimeError"),
                      ("cut.pt", "it ends early"), ("text.pt", "neither zip nor pickle")):
        os.link(name, "o/ckpt.pt")                      # another or a damaged file under this name
        no([*args, 3], f"o/ckpt.pt: not a checkpoint.*{why}")
        os.remove("o/ckpt.pt")
    os.replace("kept.pt", "o/ckpt.pt")
    with monkeypatch.context() as patch:
        patch.setattr(fmd, "prediction", lambda F, *a: F * math.inf)
        for every in (1, 50):                           # seen at a line of the log, and at a save
            no([*args, 4, "--log-every", every], "step 3: a loss or gradient is not finite.*another --seed")
    limits, half = resource.getrlimit(resource.RLIMIT_FSIZE), Path("o/ckpt.pt").stat().st_size // 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (half, limits[1]))    # a full disk: no file grows larger
    try:
        no([*args, 4], "cannot write o/ckpt.pt", ["o/metrics.jsonl", "o/student.pt", "o/student-3.pt",
                                                "o/pairs.png"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr(torch, "__version__", "9.9")
    capsys.readouterr()
    run(*args, 4, "--seed", 1, "--lr", "1e-4", "--batch", 4)        # the rest may change, and is told
    notes = re.findall("note: (.*)\n", capsys.readouterr().out)
    was = {note.split(" was ")[0]: note.split(" was ")[1] for note in notes}
    assert was["seed"] == "0, and is 1" and was["lr"] == "0.001, and is 0.0001"
    assert was["torch"].endswith(", and is 9.9") and was["rows_p"] == "6, and is 3" and "processes" not in was
    assert logged("o") == [1, 2, 3, 4] and logged("o", "lr")[-1] < 1e-4

def test_a_rerun_without_its_checkpoint_says_so(work, capsys):
    args = [*SMALL, "--steps", 2, "--out", "o"]
    run(*args)
    assert "o/ckpt.pt: not there, so this run starts at step 0" in capsys.readouterr().out
    os.remove("o/ckpt.pt")
    run(*args)
    assert "o/ckpt.pt: not there, so this run starts at step 0" in capsys.readouterr().out
    assert logged("o") == [1, 2, 1, 2]                  # the log is appended, never cut

def test_the_log_holds_means_since_its_last_line(work):
    for every in (1, 4):
        run(*SMALL, "--steps", 8, "--log-every", every, "--out", f"every{every}")
    for name in ("prediction", "correction", "online", "lambda", "student_norm", "online_norm"):
        each, means = np.array(logged("every1", name)).reshape(2, 4), logged("every4", name)
        assert means == pytest.approx(each.mean(1).tolist(), rel=1e-4, abs=1e-7) and len(set(each[0])) > 1

def test_rounding_is_not_scaled_up(work):
    """At the first step g is the teacher. Where no row is guided Δ_c is rounding, and λ must leave it
    small: what it adds to the gradient is then far less than the rows of prediction."""
    run(*SMALL, "--steps", 1, "--gamma", 1, 1, "--out", "o")
    rounding, lam = logged("o", "correction")[0] ** 0.5, logged("o", "lambda")[0]
    assert rounding < 1e-4 and lam * rounding < 0.1 * logged("o", "prediction")[0] ** 0.5
    G, N = torch.randn(8, 100), 1e-6 * torch.randn(8, 100)
    F_p, F_c = torch.zeros(2, 8, 100, requires_grad=True).unbind(0)
    loss, lam, _ = fmd.student_loss(F_p, G, F_c, N)
    p, c = torch.autograd.grad(loss, (F_p, F_c))
    assert c.norm() < 0.05 * p.norm() and lam < 2000

@pytest.mark.parametrize("extra", [["--no-bf16"], []], ids=str)
def test_imagenet_in_miniature(work, monkeypatch, extra):
    monkeypatch.setattr(sit.load_decoder, "__defaults__", ((32,) * 4,))
    monkeypatch.setattr(fmd.sample, "__defaults__", (4,))
    save_net("xl.pt", tiny(shape=(4, 32, 32), patch=8, classes=1000, learn_sigma=True))
    torch.save(small_decoder((32,) * 4).state_dict(), "vae.pt")
    big = "--res 256 --teacher xl.pt --vae vae.pt --device cpu --eval-samples 2 --out big".split()
    run(*big, "--steps", 2, "--batch", 8, "--log-every", 1, "--no-compile", *extra)
    assert len(logged("big")) == 2 and Image.open("big/pairs.png").size[1] > 256
    run(*big, "--sample", 6)
    many = np.load("big/samples.npz")
    assert many["arr_0"].shape == (6, 256, 256, 3) and many["arr_1"].tolist() == list(range(6))
    assert sit.load("big/student.pt")[0].config["learn_sigma"]
    assert not any(p.requires_grad for p in sit.load_decoder("vae.pt").parameters())

# ---- The CUDA path, without a GPU ------------------------------------------------------------------
FAKE = FakeTensorMode()     # one for all: its tensors do not mix with those of another
@pytest.fixture
def fake_cuda(monkeypatch):
    """train(flags) takes one step on fake tensors of device cuda, without files -> student and g; the
    backward pass, for which torch needs a GPU, only gives each weight a gradient of zeros."""
    nets = []
    def load(source, res, device, convention):
        net = sit.SiT((4, 32, 32), 2, 64, 4, 2, 1000, learn_sigma=True)
        return net.requires_grad_(False), {}
    def start_from(teacher, real=sit.start_from, **inputs):
        nets.append(real(teacher, **inputs))
        return nets[-1]
    def backward(loss):
        assert loss.device.type == "cuda" and loss.dtype == torch.float32
        for p in (*nets[0].parameters(), *nets[1].parameters()):
            p.grad = torch.zeros_like(p) if p.requires_grad else None
    def rate(step, *a):                                 # a step is over when the next one begins
        if step == 1:
            raise StopIteration
        return 1.0
    monkeypatch.setattr(sit, "start_from", start_from)
    monkeypatch.setattr(sit, "load_decoder", lambda path: torch.nn.Identity())
    patches = dict(load=load, fetch=str, learning_rate=rate, RANK=1,            # it saves nothing
                   join=lambda device: torch.device("cuda:0"), resume=lambda *a: 0,
                   noises=lambda seed, numbers, shape: torch.randn(len(numbers), *shape))
    for name, patch in patches.items():
        monkeypatch.setattr(fmd, name, patch)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
    def train(flags):
        flags = f"--res 256 --steps 9 --batch 8 --log-every 2 --no-compile --device cpu {flags}"
        s = fmd.parse(flags.split())
        with FAKE, torch.device("cuda"), pytest.raises(StopIteration):
            fmd.train(s)
        return nets[:2]
    return train

@pytest.mark.parametrize("args", ["--bf16 --checkpointing", "--bf16", "--no-bf16"])
def test_a_step_on_cuda_does_not_wait_for_the_host(work, fake_cuda, args):
    """A tensor left on the CPU, a clash of types, a copy from the host or an .item() raises."""
    assert [net.checkpointing for net in fake_cuda(args)] == ["--checkpointing" in args] * 2

def test_sampling_on_cuda_does_not_wait_for_the_host(fake_cuda):
    with FAKE, torch.device("cuda"):
        sizes, decoder = ((4, 32, 32), 2, 64, 4, 2, 1000), sit.Decoder((32, 32))
        student, teacher = sit.SiT(*sizes, **STUDENT), sit.SiT(*sizes)
        z, y = torch.randn(4, 4, 32, 32), torch.zeros(4, dtype=torch.long)
        assert decoder(fmd.one_step(student, z, y, 1.5)).device.type == "cuda"
        x = fmd.many_steps(teacher, z, y, 1.5, 1000, 2)
        assert x.device.type == "cuda" and x.dtype == torch.float32

def print_graphs():
    """At the top of every step, the numbers of static graphs and of breaks; without a compiler."""
    def rate(*a, real=fmd.learning_rate):
        fmd.say(f"graphs {counters['stats']['unique_graphs']} {len(counters['graph_break'])}")
        return real(*a)
    fmd.learning_rate, torch.compile = rate, partial(torch.compile, backend="aot_eager")

@pytest.mark.parametrize("world, extra", [(1, "--compile --bf16"), (2, "--compile --checkpointing")])
def test_compiled_step_is_static_and_equal(work, world, extra):
    """Blocks and derivative as static graphs: student and teacher at 2 batch sizes each, g, the
    derivative. No graph more after the first step, no break, and in float32 the same training."""
    start(world, *EXACT, "--out", "plain")
    done = start(world, "print_graphs()", *EXACT, *extra.split(), "--out", "other", script=__file__)
    first, *graphs = re.findall(r"graphs (\d+) 0\n", done.stdout)
    assert len(graphs) == 19 and len(set(graphs)) == 1, done.stdout[-2000:]
    assert int(first) == 0 and 2 < int(graphs[0]) <= 6  # an eager derivative, or eager blocks, would be 1
    assert "bf16" in extra or apart("plain", "other") < 1e-5

def test_bfloat16_keeps_the_direction_of_the_gradients(work, monkeypatch):
    """Cosine of Δ_p and Δ_c, bf16 against float32; student and g of a short training."""
    run(*"--steps 20 --batch 16 --eval-samples 1 --device cpu --out o".split())
    teacher, file = sit.load(sit.fetch("assets/teacher-mnist.pt"))[0], torch.load("o/ckpt.pt")
    student, online = sit.from_state_dict(file["student"]), sit.from_state_dict(file["online"])
    (z, y, gamma), n = fmd.prior(24, (1, 28, 28), 10), torch.randn(24, 1, 28, 28)
    @torch.no_grad()
    def residuals(r, bf16):
        F = partial(fmd.average_velocity, student, y=y, gamma=gamma)
        u = partial(fmd.guided, teacher, y=y, gamma=gamma, null=10)
        F_dot = fmd.duration_derivative(F, z, r)        # bf16 is about the networks' values
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            p = fmd.prediction(F(z, r), F_dot, u, z, r)
            _, c, _ = correct(F, u, partial(online, y=y, gamma=gamma), z, n, r)
        return p.flatten(), c.flatten()
    for r in (0.1, 0.3, 0.5, 0.7, 0.9):
        r = torch.full((24,), r)
        for exact, rounded in zip(residuals(r, False), residuals(r, True)):
            assert torch.cosine_similarity(exact, rounded, dim=0) > 0.95

# ---- What is shipped -------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["teacher", "student"])
def test_shipped_weights_make_digits(name):
    """White strokes on black. A wrong sign makes something else."""
    path = HERE / f"assets/{name}-mnist.pt"
    net = sit.load(path)[0]
    assert path.stat().st_size < 16e6 and net.config["convention"] == "sit"
    sampler = fmd.one_step if name == "student" else partial(fmd.many_steps, null=10, steps=8)
    z, y = torch.randn(20, 1, 28, 28), torch.arange(20) % 10
    x = sampler(net, z, y, 1.5)
    black, white = (x < -0.8).float().mean().item(), (x > 0.5).float().mean().item()
    assert 0.6 < black < 0.9 and 0.05 < white < 0.25, (black, white)
    assert x[:, :, 10:18, 10:18].mean() > x[:, :, :4].mean() + 0.3

def test_findings_in_miniature(tmp_path, monkeypatch, capsys):
    """The measure of assets/findings.py and a table of it, on students of two steps, without FID."""
    monkeypatch.syspath_prepend(HERE / "assets")
    import findings
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(findings.network().state_dict(), "classifier.pt")
    for name in ("real", "teacher"):
        digits = np.random.default_rng(len(name)).integers(0, 256, (12, 28, 28, 1), dtype=np.uint8)
        np.savez(f"{name}.npz", arr_0=digits, arr_1=np.arange(12) % 10)
    files = "--real real.npz --teacher teacher.npz --classifier classifier.pt --out o".split()
    findings.main(["quality", "real.npz", *files])
    head, _, row = (line.split("|") for line in capsys.readouterr().out.strip().splitlines())
    row = dict(zip(map(str.strip, head), map(str.strip, row)))
    assert row["classifier's distance to real digits"] == "0.0" != row["classifier's distance to teacher"]
    findings.main([*"objectives --steps 2 --count 12 --seeds 1".split(), *files])
    head, _, *rows = (line.split(" | ") for line in capsys.readouterr().out.strip().splitlines())
    assert [row[0].split(" `")[0] for row in rows] == ["| prediction alone", "| correction alone", "| both"]
    assert head[-5:-1] == ["endpoint error", "residual at 0.8", "residual at 0.95", "pull"]
    assert all(re.fullmatch(r"\d+\.\d{3}", value) for row in rows for value in row[-5:-1])
    student = str(HERE / "assets/student-mnist.pt")
    findings.main(["forces", student, *"--steps 2 --batches 2".split(), *files])
    findings.main(["residuals", student, *"--steps 2".split(), *files])
    forces, _, row, residuals, _, other = capsys.readouterr().out.strip().splitlines()
    assert "cosine of the mean gradients | pull |" in forces and "residual of guidance at 0.9 |" in residuals
    assert all(-1 <= float(cell) < 9 for cell in (row + other).split("|")[2:8])
    F_p, F_c = torch.zeros(2, 3, 5, requires_grad=True)
    for k in (0, 0.5, 1):           # the other reading of λ: α is the pull at every k
        found = findings.equal_pulls(F_p, torch.randn(3, 5), F_c, 7 * torch.randn(3, 5), k, 0.3)
        assert found[2].item() == pytest.approx(0.3, rel=1e-3)
    findings.main(["speed", "--count", "12", *files])
    evaluations = re.findall(r"^\| (?:teacher|student).*?, (\d+) \|", capsys.readouterr().out, re.M)
    assert evaluations == ["1", "4", "8", "16", "32", "62"]

class Holder(torch.nn.Module):
    def __init__(self, units):
        super().__init__()
        self.units = torch.nn.ModuleList(units)

    def forward(self, x):
        return x + sum(p.sum() for p in self.state_dict().values())

class Unit(torch.nn.Module):
    """A convolution as the package has it, under names of its own."""
    def __init__(self, conv):
        super().__init__()
        for name in ("beta", "mean", "var"):
            self.register_buffer(name, torch.rand(len(conv.weight)) + 0.5)
        self.weight = conv.weight

def test_inceptions_weights_from_a_torchscript(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(HERE / "assets")
    import findings
    monkeypatch.chdir(tmp_path)
    units = [Unit(module.conv) for module in fid.inception().modules() if hasattr(module, "bn")]
    torch.jit.trace_module(Holder(units), {"forward": torch.zeros(1)}).save("theirs.pt")
    findings.main(["inception", "theirs.pt"])
    state = torch.load("out/inception.pth", weights_only=True)
    for key, want in (("Conv2d_1a_3x3", units[0]), ("Mixed_7c.branch_pool", units[-1])):
        for ours, theirs in (("conv.weight", "weight"), ("bn.bias", "beta"), ("bn.running_mean", "mean"),
                             ("bn.running_var", "var")):
            assert torch.equal(state[f"{key}.{ours}"], getattr(want, theirs))
    assert fid.load_inception("out/inception.pth")[1] == "out/inception.pth"

def test_both_equations_of_the_mismatch_hold_on_exact_paths(batch, monkeypatch):
    """The average velocity of paths of the Gaussian, from any state and time, has no residual."""
    monkeypatch.syspath_prepend(HERE / "assets")
    import findings
    (x, delta, _, r), spread = batch, lambda t: ((1 - t) ** 2 * S ** 2 + t ** 2).sqrt()
    t = 0.3 + 0.7 * r

    def average(x, t, delta):
        t, delta = t[:, None], delta[:, None]
        place, end = (x - (1 - t) * M) / spread(t), t - delta
        return ((1 - end) * M + spread(end) * place - x) / delta
    d = t * delta
    F = average(x, t, d)
    for equation in (findings.end_moves, findings.start_moves):
        assert equation(average, F, gaussian_velocity, x, t, d).abs().max() < 1e-9
        assert equation(average, F, lambda x, t: gaussian_velocity(x, 1 - t), x, t, d).abs().mean() > 0.2

def test_benchmark_in_miniature(work, monkeypatch, capsys):
    monkeypatch.syspath_prepend(HERE / "assets")
    import benchmark
    benchmark.main("--batch 4 --rounds 1 -- --device cpu".split())
    printed = capsys.readouterr().out
    shares = re.findall(r"^(whole step|optimiser|derivative) .* ([\d.]+)% of a step", printed, re.M)
    assert [name for name, _ in shares] == ["derivative", "optimiser", "whole step"]
    assert all((float(share) == 100) == (name == "whole step") for name, share in shares)

README = (HERE / "README.md").read_text()
@pytest.mark.parametrize("labels", ["--labels", "--no-labels"])
def test_a_teacher_of_ones_own(tmp_path, monkeypatch, capsys, labels):
    """The loop for a network of another clock and sign, with labels and without: its student starts as the
    teacher, both it and g learn, and what is saved and drawn is the average."""
    monkeypatch.syspath_prepend(HERE / "assets")
    import own_teacher as own
    torch.manual_seed(0)
    teacher, student, ema = own.main([labels, *"--teacher-steps 30 --steps 2 --out".split(), str(tmp_path)])
    z, t = torch.randn(4, *own.SHAPE), torch.rand(4)
    y = torch.tensor([0, 1, 0, 1]) if labels == "--labels" else None
    assert sorted(os.listdir(tmp_path)) == ["check.png", "pairs.png", "student.pt"]
    saved = torch.load(tmp_path / "student.pt", weights_only=True)
    assert all(torch.equal(value, saved[name]) for name, value in ema.state_dict().items())
    assert not torch.equal(student.out.weight, teacher.out.weight) and student.time.embed[2].weight.any()
    fresh = own.TimeAndDuration(teacher.time, own.WIDTH)
    teacher.time, at_noise = fresh, -teacher(z, torch.zeros(4), y)
    assert torch.allclose(own.average_velocity(teacher, z, t, y), at_noise)
    assert float(re.search(r"step 0: .* endpoint error ([\d.]+)", capsys.readouterr().out)[1]) < 1

def block(start):
    return re.search(rf"```python\n({start}.*?)```", README, re.S)[1]

def test_the_readmes_python_block(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("assets").symlink_to(HERE / "assets")
    names = {}
    exec(block("import torch, fmd, sit"), names)
    assert names["x"].shape == (16, 1, 28, 28) and Image.open("digits.png").size == (242, 62)

def test_readme_commands_parse_and_links_exist():
    commands = re.findall(r"(?<![\w/.])(fmd|fid|assets/\w+)\.py +([^`\n#|&]*)", README)
    assert len(commands) > 8 and "python -m pytest -q test_fmd.py" in README
    for program, args in ((program, shlex.split(args)) for program, args in commands):
        if program.startswith("assets"):
            source = (HERE / f"{program}.py").read_text()
            own = args[:[*args, "--"].index("--")]              # the rest are flags of fmd.py
            words = own[:1] + [a for a in own[1:] if a.startswith("--")]
            assert all(f'"{a}"' in source or f"def {a}(" in source for a in words), args
        elif args not in (["--help"], ["..."]):
            (fmd if program == "fmd" else fid).parse(args)
    for link in re.findall(r"assets/[\w.-]+", README):
        assert (HERE / link).exists(), link

if __name__ == "__main__":      # start(..., script=__file__): fmd.main with something planted
    torch.set_num_threads(1)
    eval(sys.argv[1])
    sys.exit(fmd.main(sys.argv[2:]))
