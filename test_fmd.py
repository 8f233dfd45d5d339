# SPDX-License-Identifier: MIT
"""Tests of fmd.py, sit.py and fid.py: closed forms, not snapshots. No GPU, no network, no clock."""

import argparse
import copy
import json
import math
import os
import pickle
import re
import resource
import shlex
import signal
import subprocess
import sys
import urllib.error
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import fid
import fmd
import sit

HERE = Path(__file__).resolve().parent
torch.set_num_threads(2)

def torchrun(count, *args, script=HERE / "fmd.py", cwd=None):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}"]
    command += ["--master_port=29617", str(script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, cwd=cwd)

# ---- The method against Gaussian data N(m, s² I), whose flow is explicit -----------------------------

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
    g = torch.Generator().manual_seed(0)
    z, n = torch.randn(64, 2, generator=g), torch.randn(64, 2, generator=g)
    delta, r = 0.05 + 0.9 * torch.rand(64, generator=g), torch.rand(64, generator=g)
    return z.double(), delta.double(), n.double(), r.double()

def predict(F, u, z, delta, method="jvp"):
    """F(z, δ) and Δ_G, as train computes them."""
    F_z = F(z, delta)
    return F_z, fmd.prediction(F_z, fmd.duration_derivative(F, z, delta, F_z, method), u, z, delta)

def correct(F, u, g, z, n, r):
    """F(z, 1), Δ_N and the loss of g, as train computes them."""
    F_z = F(z, torch.ones_like(r))
    return F_z, *fmd.correction(F_z, u, g, z, n, r)

@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_rollout_converges_at_its_order(batch, solver, order):
    z, end = batch[0], gaussian_map(batch[0], torch.ones(64).double())
    errors = [(fmd.rollout(gaussian_velocity, z, k, solver) - end).norm().item() for k in (40, 80, 160)]
    for coarse, fine in zip(errors, errors[1:]):
        assert abs(math.log2(coarse / fine) - order) < 0.25, errors

@pytest.mark.parametrize("method, tolerance", [("jvp", 1e-9), ("fd", 3e-2)])
def test_exact_flow_map_has_no_prediction_residual(batch, method, tolerance):
    z, delta, _, _ = batch
    average, residual = predict(gaussian_average, gaussian_velocity, z, delta, method)
    assert residual.abs().max() < tolerance and not residual.requires_grad
    assert torch.allclose(z + delta[:, None] * average, gaussian_map(z, delta))
    # and a wrong sign of the teacher, a wrong clock or a missing derivative do leave one
    wrong = (lambda x, t: -gaussian_velocity(x, t), 0.5), (lambda x, t: gaussian_velocity(x, 1 - t), 0.2)
    for u, least in wrong:
        assert predict(gaussian_average, u, z, delta)[1].abs().mean() > least
    assert fmd.prediction(average, 0 * average, gaussian_velocity, z, delta).abs().mean() > 0.05

def test_duration_derivative_is_partial(batch):
    z, delta, _, _ = batch

    def F(z, d):
        return torch.sin(d)[:, None] * z ** 2

    exact = torch.cos(delta)[:, None] * z ** 2              # a total derivative would add 2 sin(δ) z dz/dδ
    assert torch.allclose(fmd.duration_derivative(F, z, delta), exact)
    for F_z in (None, F(z, delta)):
        assert torch.allclose(fmd.duration_derivative(F, z, delta, F_z, "fd"), exact, atol=3e-2)
    assert torch.equal(fmd.flow_map(F(z, delta), z, delta), z + delta[:, None] * F(z, delta))

def test_correction_residual_is_the_difference_of_velocities(batch):
    z, _, n, r = batch
    m, s = torch.tensor([0.3, 0.3]).double(), 0.8           # a student that makes N(m, s²) instead
    v_N = partial(gaussian_velocity, m=m, s=s)
    _, residual, _ = correct(lambda z, delta: m + (s - 1) * z, gaussian_velocity, v_N, z, n, r)
    x_r = (1 - r[:, None]) * (m + s * z) + r[:, None] * n
    assert torch.allclose(residual, v_N(x_r, r) - gaussian_velocity(x_r, r))
    _, residual, _ = correct(gaussian_average, gaussian_velocity, gaussian_velocity, z, n, r)
    assert residual.abs().max() == 0            # the teacher's own distribution needs no correction

def test_correction_alone_finds_the_gaussian():
    """Descending <F, sg(Δ_N)> with the exact v_N moves a student N(a, b²) to the data's N(m, s²)."""
    a, b = torch.zeros(2, requires_grad=True), torch.ones(1, requires_grad=True)
    opt = torch.optim.Adam([a, b], 0.02)
    for step in range(400):
        g = torch.Generator().manual_seed(step)
        z, n = torch.randn(256, 2, generator=g), torch.randn(256, 2, generator=g)
        v_N = partial(gaussian_velocity, m=a.detach(), s=b.item())
        average, residual, _ = correct(lambda z, d: a + (b - 1) * z, gaussian_velocity, v_N, z, n,
                                       torch.rand(256, generator=g))
        loss, lam = fmd.student_loss(average[:0], residual[:0], average, residual)
        assert lam == 1
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert (a.detach() - M).abs().max() < 0.05 and abs(b.item() - S) < 0.05

def test_online_optimum_is_the_closed_form_noising_velocity():
    g = torch.Generator().manual_seed(0)
    z, n = torch.randn(200_000, 2, generator=g), torch.randn(200_000, 2, generator=g)
    w = torch.zeros(2, requires_grad=True)

    def g_psi(x, t):                                        # the closed form, with room to be wrong
        return gaussian_velocity(x, t) * (1 + w[0]) + w[1]

    r = torch.rand(200_000, generator=g)
    _, residual, loss = correct(gaussian_average, gaussian_velocity, g_psi, z, n, r)
    loss.backward()
    assert w.grad.abs().max() < 0.03, w.grad                # a stationary point, to Monte Carlo error
    assert not residual.requires_grad
    wrong = torch.autograd.grad(((1.2 * gaussian_velocity(n, r) * (1 + w[0]) + w[1] - 1) ** 2).mean(), w)[0]
    assert wrong.abs().max() > 0.3                          # which elsewhere is far from zero

def test_weights_and_lambda_by_hand():
    G, N = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0]])       # |Δ|²/d: 12.5, 2; 1
    for k in (0.0, 0.5, 1.0):
        w = [1 / (v + 1e-3) ** k for v in (12.5, 2.0, 1.0)]
        assert torch.allclose(fmd.weighted(G, k), torch.tensor([[3 * w[0], 4 * w[0]], [0, 2 * w[1]]]))
        lam = 0.5 * ((5 * w[0] + 2 * w[1]) / 2) / (math.sqrt(2) * w[2] + 1e-6)
        average = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], requires_grad=True)
        loss, got = fmd.student_loss(average[:2], G, average[2:], N, k, alpha=0.5)
        assert got.item() == pytest.approx(lam, rel=1e-5)
        loss.backward()
        want = torch.tensor([[3 * w[0], 4 * w[0]], [0, 2 * w[1]], [lam * w[2], lam * w[2]]]) / 6
        assert torch.allclose(average.grad, want)
        assert fmd.student_loss(average[:2], G, average[:0], N[:0], k, alpha=0.5)[1] == 0.5

class Toy(torch.nn.Sequential):
    """A small network on 2-D points: F(z, δ) or g(x, r)."""

    def __init__(self):
        torch.manual_seed(0)
        layers = torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU()
        super().__init__(*layers, torch.nn.Linear(64, 2))

    def forward(self, z, delta):
        return super().forward(torch.cat([z, delta[:, None]], dim=1))

def test_two_calls_of_the_student_have_the_gradient_of_one(batch):
    z, delta, n, r = (a.float() for a in batch)
    F, g, P = Toy(), Toy(), 40
    F_p, G = predict(F, gaussian_velocity, z[:P], delta[:P])
    F_c, N, online = correct(F, gaussian_velocity, g, z[P:], n[P:], r[P:])
    apart = torch.autograd.grad(fmd.student_loss(F_p, G, F_c, N)[0], list(F.parameters()))
    fused = F(z, torch.cat([delta[:P], torch.ones(64 - P)]))
    fused = torch.autograd.grad(fmd.student_loss(fused[:P], G, fused[P:], N)[0], list(F.parameters()))
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(apart, fused))
    assert not G.requires_grad and not N.requires_grad      # stop-gradients
    alone = torch.autograd.grad(online, list(F.parameters()), allow_unused=True)
    assert all(p is None for p in alone)                    # g's loss moves g, never the student

def test_training_from_the_prior_alone_reaches_the_closed_form_flow_map():
    F, g, steps = Toy(), Toy(), 1000
    opts = [torch.optim.Adam(net.parameters(), betas=(0.9, 0.99)) for net in (F, g)]
    for step in range(steps):
        p, c = (fmd.prior(count, (0, step, part), (2,), 1, (1, 1), (0.8, 1.0))
                for count, part in ((192, "prediction"), (64, "correction")))
        F_p, G = predict(F, gaussian_velocity, p.z, p.delta)
        F_c, N, online = correct(F, gaussian_velocity, g, c.z, c.n, c.r)
        (fmd.student_loss(F_p, G, F_c, N, k=0.0)[0] + online).backward()
        for opt in opts:
            opt.param_groups[0]["lr"] = 5e-3 * min(1, 2 * (1 - step / steps))
            opt.step()
            opt.zero_grad()
    z = torch.randn(2000, 2, generator=torch.Generator().manual_seed(99))
    for d in (0.3, 0.7, 1.0):
        delta = torch.full((2000,), d)
        error = (fmd.flow_map(F(z, delta), z, delta) - gaussian_map(z, delta)).norm(dim=1).mean()
        assert error < 0.04, (d, error)
    x = fmd.flow_map(F(z, torch.ones(2000)), z, torch.ones(2000))
    assert (x.mean(0) - M).abs().max() < 0.04 and (x.std(0) - S).abs().max() < 0.04

def test_guidance_and_interval():
    x, y = torch.randn(5, 3, 4, 4), torch.arange(5)
    t, gamma = torch.tensor([0.0, 0.3, 0.5, 0.7, 1.0]), torch.tensor([2.0, 2.0, 0.5, 1.0, 3.0])

    def velocity(x, t, y):
        return x * fmd.expand(1.0 + y, x) + fmd.expand(t, x)

    null = velocity(x, t, torch.full_like(y, 7))
    for interval, effective in (((0, 1), gamma), ((0.3, 0.5), torch.tensor([1, 2, 0.5, 1, 1]))):
        want = null + fmd.expand(effective, x) * (velocity(x, t, y) - null)     # on every channel
        assert torch.allclose(fmd.guided(velocity, x, t, y, gamma, 7, interval), want, atol=1e-5)

def test_draws_do_not_depend_on_the_world_size():
    draw = partial(fmd.prior, 32, shape=(1, 4, 4), classes=10, gamma=(1.0, 2.0), r=(0.8, 1.0))
    whole, names = draw((0, 3, "prediction")), ("z", "n", "y", "gamma", "delta", "r")
    for world in (2, 4, 8):
        parts = [draw((0, 3, "prediction"), rank=rank, world=world) for rank in range(world)]
        for name in names:
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    for key in ((0, 4, "prediction"), (0, 3, "correction"), (1, 3, "prediction")):
        assert not any(torch.equal(getattr(whole, name), getattr(draw(key), name)) for name in names)
    big = fmd.prior(40000, (0,), (1,), 10, (1.0, 3.0), (0.8, 1.0))
    logit = torch.logit(big.r.double())
    assert abs(logit.mean() - 0.8) < 0.05 and abs(logit.std() - 1) < 0.05
    assert big.gamma.min() >= 1 and big.gamma.max() <= 3 and abs(big.gamma.mean() - 2) < 0.03
    assert 0 <= big.delta.min() and big.delta.max() <= 1 and abs(big.delta.mean() - 0.5) < 0.01
    assert set(big.y.tolist()) == set(range(10)) and not torch.equal(big.z, big.n)

def test_learning_rate():
    rates = [fmd.learning_rate(step, 100, 9, 0.5) for step in (0, 4, 9, 50, 75, 99)]
    assert rates == pytest.approx([0.1, 0.5, 1, 1, 0.5, 0.02])

# ---- sit.py ------------------------------------------------------------------------------------------

def tiny(**extra):
    """A small SiT with every weight random, so that no path through it is zero."""
    torch.manual_seed(0)
    net = sit.SiT(**{**dict(shape=(2, 8, 8), depth=2, width=32, heads=4, patch=2, classes=5), **extra})
    for p in net.parameters():
        p.data.add_(0.2 * torch.randn_like(p)) if p.requires_grad else None
    return net

STUDENT = dict(dt=True, gw=True)

def test_forward_against_a_second_writing():
    """The whole network from its state dict alone, token by token, in plain functions."""
    net, D, heads, p = tiny(**STUDENT), 32, 4, 2
    w, y = net.state_dict(), torch.tensor([1, 5])
    x, t, dt, gw = torch.randn(2, 2, 8, 8), torch.rand(2), torch.rand(2), 1 + torch.rand(2)

    def linear(h, name):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def embed(value, name):
        args = torch.stack([value * math.exp(-math.log(10000) * i / 128) for i in range(128)], dim=1)
        hidden = linear(torch.cat([args.cos(), args.sin()], 1), f"{name}.mlp.0")
        return linear(nnf.silu(hidden), f"{name}.mlp.2")

    def norm(h):
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    c = sum(embed(v, f"{k}_embedder") for v, k in ((t, "t"), (dt, "dt"), (gw, "gw")))
    c = c + w["y_embedder.embedding_table.weight"][y]
    corners, kernel = [(i, j) for i in range(0, 8, p) for j in range(0, 8, p)], w["x_embedder.proj.weight"]
    patches = [torch.stack([kernel.flatten(1) @ image[:, i:i + p, j:j + p].flatten() for i, j in corners])
               for image in x]
    position = torch.zeros(16, D)
    for token in range(16):
        for axis, place in enumerate((token % 4, token // 4)):      # the column in the first half: "w first"
            for i in range(D // 4):
                angle = place / 10000 ** (i / (D // 4))
                position[token, axis * D // 2 + i] = math.sin(angle)
                position[token, axis * D // 2 + D // 4 + i] = math.cos(angle)
    assert torch.allclose(w["pos_embed"][0], position, atol=1e-6)
    h = torch.stack(patches) + w["x_embedder.proj.bias"] + position
    for b in range(2):
        a = linear(nnf.silu(c), f"blocks.{b}.adaLN_modulation.1")[:, None].split(D, dim=-1)
        q, k, v = linear(norm(h) * (1 + a[1]) + a[0], f"blocks.{b}.attn.qkv").split(D, dim=-1)
        outs = []
        for part in (slice(i * D // heads, (i + 1) * D // heads) for i in range(heads)):
            score = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(D // heads)
            outs.append(score.softmax(-1) @ v[..., part])
        h = h + a[2] * linear(torch.cat(outs, -1), f"blocks.{b}.attn.proj")
        hidden = linear(norm(h) * (1 + a[4]) + a[3], f"blocks.{b}.mlp.fc1")
        hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden ** 3)))
        h = h + a[5] * linear(hidden, f"blocks.{b}.mlp.fc2")
    shift, scale = linear(nnf.silu(c), "final_layer.adaLN_modulation.1")[:, None].split(D, dim=-1)
    h = linear(norm(h) * (1 + scale) + shift, "final_layer.linear")
    want = torch.zeros(2, 2, 8, 8)
    for token, (i, j) in enumerate(corners):
        want[:, :, i:i + p, j:j + p] = h[:, token].reshape(2, p, p, 2).permute(0, 3, 1, 2)
    assert (net(x, t, y, dt, gw) - want).abs().max() < 2e-5 * want.abs().max()

def test_jvp_of_the_network_equals_finite_difference():
    net, z, y = tiny(**STUDENT).double(), torch.randn(4, 2, 8, 8).double(), torch.arange(4)
    F = partial(fmd.average_velocity, partial(fmd.velocity_of, net), y=y, gamma=torch.ones(4).double())
    delta = torch.tensor([0.1, 0.4, 0.7, 1.0]).double()
    exact = fmd.duration_derivative(F, z, delta)
    with torch.no_grad():
        central = (F(z, delta + 3e-3) - F(z, delta - 3e-3)) / 6e-3
    backward = fmd.duration_derivative(F, z, delta, F(z, delta), "fd", 1e-3)
    assert exact.abs().max() > 1e-2 and not exact.requires_grad and not backward.requires_grad
    assert (exact - central).abs().max() < 2e-3 * exact.abs().max()
    assert (exact - backward).abs().max() < 2e-2 * exact.abs().max()

@pytest.mark.parametrize("size, patch, millions",
                         [("S", 2, 33), ("B", 4, 131), ("L", 2, 458), ("XL", 2, 675)])
def test_named_sizes_have_the_published_parameter_counts(size, patch, millions):
    depth, width, heads = sit.SIZES[size]
    with torch.device("meta"):
        net = sit.SiT((4, 32, 32), depth, width, heads, patch, 1000, learn_sigma=True)
    assert abs(sum(p.numel() for p in net.parameters()) / 1e6 - millions) < 1.2
    keys = net.state_dict()
    assert keys["y_embedder.embedding_table.weight"].shape == (1001, width)
    assert keys["pos_embed"].shape == (1, (32 // patch) ** 2, width)
    assert keys["final_layer.linear.weight"].shape == (patch * patch * 8, width)
    assert keys[f"blocks.{depth - 1}.attn.qkv.weight"].shape == (3 * width, width)

@pytest.mark.parametrize("extra", [{}, dict(learn_sigma=True), STUDENT, dict(gw=True)])
def test_a_network_from_its_weights_alone(extra, tmp_path):
    net = tiny(**extra)
    inputs = torch.randn(2, 2, 8, 8), torch.rand(2), torch.tensor([0, 5]), torch.rand(2), torch.rand(2)
    released, projectors = sit.released_names(net.state_dict()), {"projectors.0.weight": torch.zeros(3)}
    for state in (net.state_dict(), released, {**released, **projectors}):
        again = sit.from_state_dict(state, heads=4)
        assert again.config == net.config and torch.equal(again(*inputs), net(*inputs))
    torch.save(released, tmp_path / "raw.pt")
    with pytest.raises(ValueError, match="raw.pt: .*cannot tell the number of heads"):
        sit.load(tmp_path / "raw.pt")
    # the convention: of the file itself, else of REPA's projectors or the name, as in FreeFlow's sampler
    for name, more, convention in (
            ("a", {}, "sit"), ("FreeFlow_REPA", {}, "repa"), ("b", projectors, "repa"),
            ("c", {"convention": "repa"}, "repa"), ("repa", {"convention": "sit"}, "sit"),
            ("train", {"args": argparse.Namespace(model="SiT-XL/2")}, "sit")):
        entry = {"ema": {**released, **projectors}} if more is projectors else {"ema": released, **more}
        torch.save({**entry, "config": net.config}, tmp_path / f"{name}.pt")
        again, info = sit.load(tmp_path / f"{name}.pt")
        assert torch.equal(again(*inputs), net(*inputs)) and info["convention"] == convention, name

@pytest.mark.parametrize("learn_sigma", [True, False])
def test_students_start_as_their_teacher_and_keep_its_read_out(learn_sigma):
    teacher = tiny(learn_sigma=learn_sigma)
    z, y, one = torch.randn(3, 2, 8, 8), torch.tensor([0, 1, 5]), torch.ones(3)
    u = fmd.velocity_of(teacher, z, one, y)
    student, online = fmd.start_from(teacher, **STUDENT), fmd.start_from(teacher, gw=True)
    got = fmd.average_velocity(partial(fmd.velocity_of, student), z, 0.3 * one, y, 1.7 * one)
    assert torch.equal(got, u) and torch.equal(fmd.velocity_of(online, z, one, y, gw=one), u)
    assert student.config["learn_sigma"] == learn_sigma
    assert len(student.state_dict()["final_layer.linear.weight"]) == 4 * 2 * (1 + learn_sigma)

def test_conventions_agree():
    """The same flow written down both ways, SiT's and REPA's, is the same velocity."""
    x, t = torch.randn(6, 2), torch.rand(6)
    nets = {"sit": lambda x, s, y: gaussian_velocity(x, 1 - s),
            "repa": lambda x, t, y: -gaussian_velocity(x, t)}
    for convention, net in nets.items():
        got = fmd.velocity_of(net, x, t, None, convention)
        assert torch.equal(got, gaussian_velocity(x, t))

class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)

def test_hostile_and_damaged_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good, bias = tiny().state_dict(), "t_embedder.mlp.0.bias"
    states = {"missing": {k: v for k, v in good.items() if "fc1" not in k},
              "extra": {**good, "more": torch.zeros(1)},
              "infinite": {**good, bias: torch.full((32,), -math.inf)},
              "shape": {**good, "final_layer.linear.bias": torch.zeros(3)}, "empty": {},
              "nan": {**good, bias: torch.full((32,), math.nan)},
              "words": {**good, "x_embedder.proj.weight": "none"}, "number": 3,
              "nothing": {**good, "y_embedder.embedding_table.weight": torch.zeros(0, 32)}}
    for name, state in states.items():
        torch.save({"ema": state, "config": {"heads": 4}}, f"{name}.pt")
    torch.save([1], "list.pt")
    torch.save({"ema": Bomb()}, "bomb.pt")
    torch.save({"ema": good, "config": {"heads": "four"}}, "heads.pt")
    torch.save({"ema": good, "config": {"heads": 4}}, "whole.pt")
    whole = bytearray(Path("whole.pt").read_bytes())
    Path("cut.pt").write_bytes(whole[:len(whole) // 2])
    whole[len(whole) // 2] ^= 4                             # one bit of a weight
    Path("flipped.pt").write_bytes(whole)
    Path("text.pt").write_text("hello")
    Path("pickle.pt").write_bytes(pickle.dumps(Bomb()))
    for name in [*states, "list", "bomb", "heads", "cut", "flipped", "text", "pickle", "nowhere"]:
        with pytest.raises(ValueError, match=f"{name}.pt: ") as e:
            sit.load(f"{name}.pt")
        assert "\n" not in str(e.value)
    assert not Path("exploded").exists() and sit.load("whole.pt")

def layer(table, name, *shape):
    table[f"{name}.weight"], table[f"{name}.bias"] = shape, shape[:1]

def test_student_has_the_keys_and_shapes_of_the_released_file():
    """XL/2 at 512, key by key. The released FreeFlow_512.pt has 2,717,071,257 bytes: these weights, 4 bytes
    each, and 93 kB of names."""
    depth, D, heads = sit.SIZES["XL"]
    with torch.device("meta"):
        ours = sit.SiT((4, 64, 64), depth, D, heads, 2, 1000, **STUDENT).state_dict()
    table = {"pos_embed": (1, 1024, D), "y_embedder.embedding_table.weight": (1001, D)}
    layer(table, "x_embedder.proj", D, 4, 2, 2)
    for e in ("t", "dt", "gw"):
        layer(table, f"{e}_embedder.projs.0", D, 256)
        layer(table, f"{e}_embedder.projs.2", D, D)
    for i in range(depth):
        for name, rows, columns in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1),
                                    ("mlp.fc2", 1, 4), ("adaLN_modulation.1", 6, 1)):
            layer(table, f"blocks.{i}.{name}", rows * D, columns * D)
    layer(table, "final_layer.linear", 16, D)
    layer(table, "final_layer.adaLN_modulation.1", 2 * D, D)
    released = sit.released_names(ours)
    assert {k: tuple(v.shape) for k, v in released.items()} == table
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
    net = small_decoder().double()
    w, z = net.state_dict(), 0.2 * torch.randn(2, 4, 3, 5).double()     # not square: rows and columns differ

    def conv(x, name):
        kernel = w[f"{name}.weight"]
        B, C, H, W = x.shape
        columns = nnf.unfold(x, kernel.shape[-1], padding=kernel.shape[-1] // 2)
        return (kernel.flatten(1) @ columns + w[f"{name}.bias"][:, None]).view(B, -1, H, W)

    def norm(x, name):
        groups = x.view(len(x), 32, -1)
        scaled = groups - groups.mean(-1, keepdim=True)
        scaled = scaled / (scaled.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled.view_as(x) * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    def silu(x):
        return x / (1 + torch.exp(-x))

    def resnet(x, name):
        h = conv(silu(norm(x, f"{name}.norm1")), f"{name}.conv1")
        h = conv(silu(norm(h, f"{name}.norm2")), f"{name}.conv2")
        return h + (conv(x, f"{name}.conv_shortcut") if f"{name}.conv_shortcut.bias" in w else x)

    def attention(x, name):
        h = norm(x, f"{name}.group_norm").flatten(2)        # (B, C, HW)
        q, k, v, out = ((w[f"{name}.{m}.weight"], w[f"{name}.{m}.bias"][:, None])
                        for m in ("to_q", "to_k", "to_v", "to_out.0"))
        score = (q[0] @ h + q[1]).transpose(1, 2) @ (k[0] @ h + k[1]) / math.sqrt(x.shape[1])
        h = (v[0] @ h + v[1]) @ score.softmax(-1).transpose(1, 2)
        return x + (out[0] @ h + out[1]).view_as(x)

    h = conv(conv(z / 0.18215, "post_quant_conv"), "decoder.conv_in")
    h = resnet(h, "decoder.mid_block.resnets.0")
    h = attention(h, "decoder.mid_block.attentions.0")
    h = resnet(h, "decoder.mid_block.resnets.1")
    for i in range(3):
        for j in range(3):
            h = resnet(h, f"decoder.up_blocks.{i}.resnets.{j}")
        if i < 2:
            h = h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            h = conv(h, f"decoder.up_blocks.{i}.upsamplers.0.conv")
    want, got = conv(silu(norm(h, "decoder.conv_norm_out")), "decoder.conv_out"), net(z)
    assert got.shape == (2, 3, 12, 20) and want.abs().max() > 0.1
    assert (got - want).abs().max() < 1e-10 * want.abs().max()

def test_decoder_has_the_keys_and_shapes_of_the_released_file():
    table = {}

    def resnet(name, inputs, outputs):
        layer(table, f"{name}.norm1", inputs)
        layer(table, f"{name}.conv1", outputs, inputs, 3, 3)
        layer(table, f"{name}.norm2", outputs)
        layer(table, f"{name}.conv2", outputs, outputs, 3, 3)
        if inputs != outputs:
            layer(table, f"{name}.conv_shortcut", outputs, inputs, 1, 1)

    layer(table, "post_quant_conv", 4, 4, 1, 1)
    layer(table, "decoder.conv_in", 512, 4, 3, 3)
    for j in range(2):
        resnet(f"decoder.mid_block.resnets.{j}", 512, 512)
    layer(table, "decoder.mid_block.attentions.0.group_norm", 512)
    for m in ("to_q", "to_k", "to_v", "to_out.0"):
        layer(table, f"decoder.mid_block.attentions.0.{m}", 512, 512)
    for i, (before, width) in enumerate([(512, 512), (512, 512), (512, 256), (256, 128)]):
        for j in range(3):
            resnet(f"decoder.up_blocks.{i}.resnets.{j}", before if j == 0 else width, width)
        if i < 3:
            layer(table, f"decoder.up_blocks.{i}.upsamplers.0.conv", width, width, 3, 3)
    layer(table, "decoder.conv_norm_out", 128)
    layer(table, "decoder.conv_out", 3, 128, 3, 3)
    with torch.device("meta"):
        net = sit.Decoder()
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == table
    assert sum(p.numel() for p in net.parameters()) == 49_490_199       # diffusers' count

def test_decoder_files_old_and_new(tmp_path):
    net, path, z = small_decoder(), tmp_path / "vae.bin", torch.randn(1, 4, 4, 4)
    state, attention = net.state_dict(), "decoder.mid_block.attentions.0."
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = sit.rename(state, {f"{attention}{new}.": f"{attention}{name}." for new, name in older.items()})
    convs = {k: v[..., None, None] if attention in k and v.ndim == 2 else v for k, v in old.items()}
    extra = {"encoder.conv_in.weight": torch.zeros(3), "quant_conv.bias": torch.zeros(8)}
    assert len(set(old) - set(state)) == 8
    for content in (state, old, convs, {**state, **extra}):
        for zipped in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            assert torch.equal(sit.load_decoder(path, WIDTHS)(z), net(z))
    key = "decoder.up_blocks.1.resnets.2.conv1.weight"
    refused = {"Missing key.*decoder.conv_in.bias": {k: v for k, v in state.items() if "conv_in.b" not in k},
               "Unexpected key.*encoders.x": {**state, "encoders.x": torch.zeros(1)},
               f"size mismatch for {key}": {**state, key: torch.zeros(1, 1)},
               f"{key} is not finite": {**state, key: state[key] * math.inf}, "'list' object": [state]}
    for message, content in refused.items():
        torch.save(content, path)
        with pytest.raises(ValueError, match=message) as e:
            sit.load_decoder(path, WIDTHS)
        assert str(e.value).startswith(f"{path}: ") and "\n" not in str(e.value)

def test_fetch(tmp_path, monkeypatch):
    """A path as it is, a URL once, a released name under its own name. No network: file:// URLs."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    cache = tmp_path / "hub" / "checkpoints"
    for folder in "ab":
        (tmp_path / folder).mkdir()
        torch.save({folder: torch.ones(3)}, tmp_path / folder / "last.pt")
    urls = [(tmp_path / folder / "last.pt").as_uri() for folder in "ab"]
    assert sit.fetch(tmp_path / "a" / "last.pt") == tmp_path / "a" / "last.pt" and not cache.exists()
    first, second = (sit.fetch(url) for url in urls)
    assert first != second and list(torch.load(first)) == ["a"] and list(torch.load(second)) == ["b"]
    assert first.parent == cache and first.name.endswith("-last.pt") and len(list(cache.iterdir())) == 2
    calls = []

    def offline(url, path):
        calls.append((url, path))
        raise urllib.error.URLError("Name or service\nnot known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    assert sit.fetch(urls[0]) == first and not calls
    for name, url in sit.RELEASED.items():
        with pytest.raises(ValueError, match=re.escape(f"{name}: cannot download {url} (")) as e:
            sit.fetch(name)
        assert calls[-1][0] == url and str(e.value).endswith(f"); put the file at {calls[-1][1]}")
        assert "\n" not in str(e.value)
    assert len({path for _, path in calls}) == len(sit.RELEASED)
    torch.save({"c": torch.ones(3)}, cache / "SiT-XL-2-REPA.pt")        # put there by hand
    assert sit.fetch("SiT-XL/2-REPA") == cache / "SiT-XL-2-REPA.pt"
    with pytest.raises(ValueError, match="SiT-M/2: no such file, nor a released one"):
        sit.fetch("SiT-M/2")

# ---- fid.py ------------------------------------------------------------------------------------------

def test_moments_equal_numpys_mean_and_covariance():
    rows = np.random.default_rng(0).normal(1000, 2, (500, 7)).astype(np.float32)   # float32 sums lose digits
    moments = fid.Moments(7)
    for part in (*rows[:9, None], *np.array_split(rows[9:], 9)):  # single rows, then many at a time
        moments.add(torch.from_numpy(part))
    (mu, sigma), rows = moments.mean_cov(), rows.astype(np.float64)
    assert np.allclose(mu, rows.mean(0)) and np.allclose(sigma, np.cov(rows, rowvar=False), rtol=1e-8)
    with pytest.raises(ValueError, match="at least 2"):
        fid.Moments(7).mean_cov()

def test_frechet_distance_closed_forms():
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    a, b = rng.uniform(0.1, 3, 6), rng.uniform(0.1, 3, 6)
    mu = np.array([0.5] * 5 + [0])
    for singular in (0, 3, 5, 6):                                # commuting covariances, of every rank
        b[:singular] = 0
        want = 5 * 0.25 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
        one, two = (np.zeros(6), q @ np.diag(a) @ q.T), (mu, q @ np.diag(b) @ q.T)
        assert fid.frechet_distance(*one, *two) == pytest.approx(want, rel=1e-12)
        assert fid.frechet_distance(*two, *one) == pytest.approx(want, rel=1e-12)
    u, v = rng.normal(size=(2, 6))                               # rank one: tr (u u' v v')^1/2 = |u'v|
    want = u @ u + v @ v - 2 * abs(u @ v)
    assert fid.frechet_distance(mu, np.outer(u, u), mu, np.outer(v, v)) == pytest.approx(want, rel=1e-10)
    few = np.cov(rng.normal(size=(4, 6)), rowvar=False)          # fewer rows than dimensions
    assert abs(fid.frechet_distance(mu, few, mu, few)) < 1e-10
    almost, upper, nan = np.diag([1, 1, 1, 1, 1, -1e-3]), np.triu(np.ones((6, 6))), np.full((6, 6), np.nan)
    for bad, why in ((np.eye(5), "shapes"), (upper, "symmetric"), (almost, "negative"), (nan, "not finite")):
        with pytest.raises(ValueError, match=why):
            fid.frechet_distance(mu, np.eye(6), mu, bad)

@pytest.mark.parametrize("spectrum", [np.geomspace(1e-6, 1, 60), np.repeat([1e-13, 1], 30)])
def test_frechet_distance_keeps_its_digits_at_small_eigenvalues(spectrum):
    rng = np.random.default_rng(1)
    q = np.linalg.qr(rng.normal(size=(60, 60)))[0]
    a, b = spectrum, rng.permutation(spectrum)
    one, two, zero = q @ np.diag(a) @ q.T, q @ np.diag(b) @ q.T, np.zeros(60)
    want = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert fid.frechet_distance(zero, one, zero, two) == pytest.approx(want, rel=1e-9)
    assert abs(fid.frechet_distance(zero, one, zero, one)) < 1e-9

def tf_resize(image, size=299):
    """TensorFlow 1's ResizeBilinear in float32 scalars: (H, W) -> some rows (and columns), values there."""
    f, (H, W) = np.float32, image.shape
    at = sorted({*range(0, size, 23), *range(5), *range(size - 5, size)})
    out = np.empty((len(at), len(at)), f)
    for i, y in enumerate(at):
        for j, x in enumerate(at):
            v, u = f(y) * f(H / size), f(x) * f(W / size)
            y0, x0 = int(np.floor(v)), int(np.floor(u))
            y1, x1, dy, dx = min(y0 + 1, H - 1), min(x0 + 1, W - 1), v - f(y0), u - f(x0)
            top = f(image[y0, x0]) + (f(image[y0, x1]) - f(image[y0, x0])) * dx
            bottom = f(image[y1, x0]) + (f(image[y1, x1]) - f(image[y1, x0])) * dx
            out[i, j] = top + (bottom - top) * dy
    return at, out

@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (7, 5), (32, 64), (256, 256), (299, 299), (512, 301)])
def test_resize_is_tensorflows_to_the_bit(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    at, want = tf_resize(image)
    got = fid.resize(torch.from_numpy(image)[None, :, :, None])
    assert got.shape == (1, 299, 299, 1) and got.dtype == torch.float32
    assert np.array_equal(got[0, :, :, 0].numpy()[np.ix_(at, at)], want)

UNITS = {                                                         # of the blocks of Inception-v3
    "A": "1x1 5x5_1 5x5_2 3x3dbl_1 3x3dbl_2 3x3dbl_3 _pool",
    "B": "3x3 3x3dbl_1 3x3dbl_2 3x3dbl_3",
    "C": "1x1 7x7_1 7x7_2 7x7_3 7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5 _pool",
    "D": "3x3_1 3x3_2 7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4",
    "E": "1x1 3x3_1 3x3_2a 3x3_2b 3x3dbl_1 3x3dbl_2 3x3dbl_3a 3x3dbl_3b _pool",
}
BLOCKS = dict(zip("5b 5c 5d 6a 6b 6c 6d 6e 7a 7b 7c".split(), "AAABCCCCDEE"))

def test_inception_has_the_keys_of_the_published_file():
    net = fid.inception()
    state = net.state_dict()
    values = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    units = [f"Conv2d_{name}" for name in ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")]
    units += [f"Mixed_{block}.branch{unit}" for block, kind in BLOCKS.items() for unit in UNITS[kind].split()]
    want = [f"{unit}.{value}" for unit in units for value in values] + ["fc.weight", "fc.bias"]
    got = {name: value for name, value in state.items() if "num_batches" not in name}
    assert set(got) == set(want) and len(want) == 472 and len(state) == 566
    assert sum(value.numel() for value in got.values()) == 23_885_392
    assert sum(value.numel() for value in net.parameters()) == 23_850_960
    assert got["fc.weight"].shape == (1008, 2048) and got["Mixed_5b.branch_pool.conv.weight"].shape[0] == 32
    assert [got[f"Mixed_6{i}.branch7x7_1.conv.weight"].shape[0] for i in "bcde"] == [128, 160, 160, 192]

@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights with batch norms other than the identity, as a file -> path, state dict."""
    state, g = fid.inception().state_dict(), torch.Generator().manual_seed(1)
    for name in [name for name in state if "num_batches" in name]:
        del state[name]                                           # as in the published file
    for name, value in state.items():
        if ".bn." in name or name == "fc.bias":
            value.uniform_(0.5, 1.5, generator=g)
        if name.endswith(("bn.bias", "running_mean")):
            value -= 1
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(state, path)
    return path, state

def pool_by_shifts(x, how):
    """3x3 pooling, stride 1, over the pixels that exist: shifts of an array padded with NaN."""
    _, _, h, w = x.shape
    padded = np.pad(x.double().numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=np.nan)
    return how(np.stack([padded[:, :, i : i + h, j : j + w] for i in range(3) for j in range(3)]), axis=0)

def test_features_against_the_unfolded_network_and_its_pools(inception_file):
    path, state = inception_file
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), dtype=np.uint8))
    net, name = fid.load_inception(path)
    assert name == str(path)
    plain, seen = fid.inception(), {}
    plain.load_state_dict(state, strict=False)
    for name, unit in plain.named_modules():
        if re.fullmatch(r"Mixed_..|.*branch_pool", name):         # what a block and its pool branch see
            unit.register_forward_pre_hook(lambda m, x, name=name: seen.update({name: x[0].clone()}))
        if name == "Mixed_6d.branch1x1":
            unit.register_forward_hook(lambda m, x, y: seen.update(conv=y.clone()))
    with torch.no_grad():
        x = (fid.resize(images).permute(0, 3, 1, 2).contiguous() - 128) * 0.0078125
        stem = "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 maxpool1 Conv2d_3b_1x1 Conv2d_4a_3x3 maxpool2"
        for stage in stem.split() + [f"Mixed_{block}" for block in BLOCKS]:
            x = plain.get_submodule(stage)(x)
    want, (pool, spatial) = x.mean((2, 3)), fid.features(net, images)
    scale = want.abs().max()
    assert pool.shape == (2, 2048) and scale > 0.1 and (pool - want).abs().max() < 1e-5 * scale
    for block in set(BLOCKS) - {"6a", "7a"}:
        want = pool_by_shifts(seen[f"Mixed_{block}"], np.nanmax if block == "7c" else np.nanmean)
        assert np.allclose(seen[f"Mixed_{block}.branch_pool"], want, rtol=1e-4, atol=1e-5), block
    conv = seen["conv"]                                           # channel last, the first seven
    assert spatial.shape == (2, 2023) and conv.shape == (2, 192, 17, 17)
    for y, x, c in ((0, 0, 0), (0, 0, 6), (0, 1, 0), (1, 0, 0), (16, 16, 6), (3, 11, 2)):
        assert torch.allclose(spatial[:, (y * 17 + x) * 7 + c], conv[:, c, y, x], rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):             # a caller's autocast changes nothing
        assert torch.equal(fid.features(net, images)[0], pool)

def test_weights_are_checked(inception_file, tmp_path, monkeypatch):
    path, state = inception_file
    cache = tmp_path / "hub/checkpoints" / fid.URL.rsplit("/", 1)[1]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(url, dst, hash_prefix):
        assert (url, dst, hash_prefix) == (fid.URL, str(cache), fid.SHA256)
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ValueError, match="no route to host") as e:
        fid.load_inception()
    assert fid.URL in str(e.value) and str(cache) in str(e.value)
    torch.save({**fid.inception().state_dict(), **state}, cache)  # with num_batches_tracked
    with pytest.raises(ValueError, match="its SHA-256 is not"):
        fid.load_inception()
    (net, _), (again, name) = fid.load_inception(path), fid.load_inception(cache)
    bias, again = net.Mixed_7c.branch1x1.conv.bias, again.Mixed_7c.branch1x1.conv.bias
    assert name == str(cache) and torch.equal(bias, again)
    monkeypatch.setattr(fid, "SHA256", fid.hashlib.sha256(cache.read_bytes()).hexdigest())
    assert fid.load_inception()[1] == fid.load_inception(cache)[1] == "published"

    less = {name: value for name, value in state.items() if name != "Mixed_7a.branch3x3_1.bn.bias"}
    torch.save(less, tmp_path / "less.pth")
    torch.save({**state, "AuxLogits.fc.bias": torch.zeros(3)}, tmp_path / "more.pth")
    hostile = type("Hostile", (), {"__reduce__": lambda self: (os.mkdir, (str(tmp_path / "harm"),))})
    torch.save(hostile(), tmp_path / "code.pth")
    (tmp_path / "text.pth").write_text("hello")
    for name in ("less", "more", "code", "text", "gone"):
        with pytest.raises(ValueError, match=f"{name}.pth: cannot be read") as e:
            fid.load_inception(tmp_path / f"{name}.pth")
        assert "\n" not in str(e.value) and not (tmp_path / "harm").exists()

def test_inception_score_by_hand_and_its_order():
    same = torch.randn(1, 12).expand(50, 12)
    assert fid.inception_score(same) == pytest.approx(1, abs=1e-12)
    sure = 1000.0 * torch.eye(12)[torch.arange(60) % 12]          # certain, balanced; some p are 0
    assert fid.inception_score(sure) == pytest.approx(12, rel=1e-12)
    by_class = sure[torch.argsort(torch.arange(60) % 12, stable=True)]
    assert fid.inception_score(by_class, split=5) == pytest.approx(1, rel=1e-12)
    assert fid.inception_score(sure, split=12) == pytest.approx(12, rel=1e-12)
    # splits of 5,000; a short last one counts as much as the others
    logits = 3 * torch.randn(5007, 5, generator=torch.Generator().manual_seed(0))
    p = torch.softmax(logits.double(), 1).numpy()
    divergences = [(q * np.log(q / q.mean(0))).sum(1).mean() for q in (p[:5000], p[5000:])]
    assert fid.inception_score(logits) == pytest.approx(np.exp(divergences).mean(), rel=1e-10)

def test_precision_recall_by_brute_force_with_ties():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 7, (60, 2)), rng.integers(3, 9, (45, 2))   # on a grid many distances tie

    def distances(point, points):
        return ((point - points) ** 2).sum(1)

    def share(points, centres):
        radii = np.array([np.sort(distances(c, centres))[3] for c in centres])   # entry 0 is the centre
        return np.mean([(distances(point, centres) <= radii).any() for point in points])

    want = share(a, b), share(b, a)
    assert len({0, 1, *want}) == 4
    ta, tb = torch.from_numpy(a).float(), torch.from_numpy(b).float()
    assert fid.precision_recall(ta, tb) == want
    assert fid.share_inside(ta, tb, 3, rows=7) == want[0]         # in blocks of rows
    assert fid.precision_recall(ta, ta) == (1, 1) and fid.precision_recall(ta, ta + 100) == (0, 0)

@pytest.fixture
def small(tmp_path, monkeypatch):
    """12 images as folder and array.npz in the working directory, others in other.npz; a small network.
    The network has .fc, .truth (features of the images) and .sizes (of the batches that it saw)."""
    monkeypatch.chdir(tmp_path)
    arrays = np.random.default_rng(0).integers(0, 256, (12, 6, 5, 3), dtype=np.uint8)
    Path("folder/deep/er").mkdir(parents=True)
    for i, array in enumerate(arrays):
        folder = "folder/deep/er" if i > 8 else "folder"
        Image.fromarray(array).save(f"{folder}/{i:02}.{('png', 'PNG', 'bmp')[i % 3]}")
    Path("folder/notes.txt").touch()
    np.savez("array.npz", arr_0=arrays)
    np.savez("other.npz", arr_0=255 - arrays[::-1] // 2)
    monkeypatch.setattr(fid, "POOL", 6)
    monkeypatch.setattr(fid, "KEYS", {"fid": ("mu", "sigma", 6), "sfid": ("mu_s", "sigma_s", 4)})
    net, g = torch.nn.Module(), torch.Generator().manual_seed(0)
    net.fc, net.sizes = torch.nn.Linear(6, 9), []
    net.fc.weight.data = torch.randn(9, 6, generator=g)
    weight = torch.randn(6, 300, generator=g) / 20

    def features(net, images):
        net.sizes.append(len(images))
        x = fid.resize(images, 10).flatten(1)
        return torch.sin(x @ weight.T / 50), torch.cos(x @ weight[:4].T / 50)

    monkeypatch.setattr(fid, "features", features)
    monkeypatch.setattr(fid, "load_inception", lambda weights, device: (net, weights or "published"))
    net.truth = features(net, torch.from_numpy(arrays))
    net.sizes.clear()
    return net

def test_evaluate_is_its_parts(small):
    got = fid.evaluate("array.npz", "other.npz", batch=5)
    assert set(small.sizes) == {5}                                # the last batch is filled up
    other = fid.features(small, torch.from_numpy(np.load("other.npz")["arr_0"]))
    for metric, x, y in zip(("fid", "sfid"), small.truth, other):
        one, two = [(z.double().numpy().mean(0), np.cov(z.double().numpy(), rowvar=False)) for z in (x, y)]
        assert got[metric] == pytest.approx(fid.frechet_distance(*one, *two), rel=1e-6)
    logits = small.truth[0] @ small.fc.weight.T                   # without the bias
    assert got["is"] == pytest.approx(fid.inception_score(logits), rel=1e-6)
    assert (got["precision"], got["recall"]) == fid.precision_recall(small.truth[0], other[0])
    assert (got["samples"], got["images"], got["weights"]) == ("array.npz", 12, "published")

def test_every_input_reads_the_same(small):
    arrays = np.load("array.npz")["arr_0"]
    np.savez_compressed("packed.npz", arr_0=arrays, arr_1=np.arange(12))
    for path in ("folder", "packed.npz"):
        got = fid.evaluate(path, "array.npz", batch=5)
        assert abs(got["fid"]) < 1e-9 and abs(got["sfid"]) < 1e-9 and got["precision"] == 1, path
    batches = list(fid.array_batches("packed.npz", 5))
    assert [len(batch) for batch in batches] == [5, 5, 2]
    for read in (torch.cat(batches), fid.decode(fid.image_files("folder"))):
        assert torch.equal(read, torch.from_numpy(arrays))

def test_grey_palette_alpha_and_mixed_sizes(small):
    rng = np.random.default_rng(1)
    grey = rng.integers(0, 256, (4, 6, 5), dtype=np.uint8)
    rgb = rng.integers(0, 256, (7, 3, 3), dtype=np.uint8)
    np.savez("grey.npz", arr_0=grey[..., None])
    Path("odd").mkdir()
    for i, array in enumerate(grey):
        Image.fromarray(array).save(f"odd/{i}.png")
    want = torch.from_numpy(grey)[..., None].expand(4, 6, 5, 3)
    assert torch.equal(next(fid.array_batches("grey.npz", 4)), want)
    assert torch.equal(fid.decode(fid.image_files("odd")), want)
    Image.fromarray(np.dstack([rgb, np.zeros((7, 3), np.uint8)])).save("odd/4.png")   # transparent
    Image.fromarray(grey[0]).convert("P").save("odd/5.png")
    got = fid.decode(fid.image_files("odd"))
    assert torch.equal(got[4], fid.resize(torch.from_numpy(rgb)[None])[0])
    assert torch.equal(got[5], fid.resize(want[:1])[0]) and torch.equal(got[:4], fid.resize(want))

def test_statistics_instead_of_images(small, monkeypatch):
    assert fid.main(["other.npz", "--save-stats", "stats.npz"]) == 0
    whole = fid.evaluate("array.npz", "other.npz")
    got = fid.evaluate("array.npz", "stats.npz")                  # every metric that the two allow
    assert {"fid", "sfid", "is"} <= set(got) and "precision" not in got
    for metric in ("fid", "sfid", "is"):
        assert got[metric] == pytest.approx(whole[metric], rel=1e-12)
    # an ADM reference batch: its images are read for precision and recall alone
    other, stats = np.load("other.npz")["arr_0"], np.load("stats.npz")
    np.savez("adm.npz", arr_0=other // 2, **stats, mu_clip=np.zeros(3))
    read, array_batches = [], fid.array_batches
    monkeypatch.setattr(fid, "array_batches", lambda path, *a: read.append(path) or array_batches(path, *a))
    got = fid.evaluate("array.npz", "adm.npz", ["fid", "sfid", "is"])
    assert read == ["array.npz"] and got["fid"] == pytest.approx(whole["fid"], rel=1e-12)
    fid.evaluate("array.npz", "adm.npz", ["pr"])
    assert read == ["array.npz"] * 2 + ["adm.npz"]

def test_report_and_notes(small, capsys):
    assert fid.main(["folder", "other.npz", "--json", "--weights", "random"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert "MEANINGLESS" in err and "few images (12, 12)" in err and len(report["notes"]) == 2
    assert fid.main(["folder", "other.npz", "--metrics", "fid,pr"]) == 0
    out, err = capsys.readouterr()
    lines = [[name, f"{report[name]:.5f}"] for name in ("fid", "precision", "recall")]
    assert [line.split() for line in out.splitlines()] == lines and "MEANINGLESS" not in err
    # 10,000 images of two classes, one after the other and in turn, against an ADM batch
    grey, stats = np.repeat(np.array([0, 120], np.uint8), 5000), dict(mu=np.zeros(6), sigma=np.eye(6))
    np.savez("adm.npz", arr_0=np.zeros((3000, 1, 1, 3), np.uint8), **stats)
    for array, is_sorted in ((grey, True), (grey.reshape(2, 5000).T.ravel(), False)):
        np.savez("many.npz", arr_0=array[:, None, None, None])
        notes = "\n".join(fid.evaluate("many.npz", "adm.npz", ["is"], batch=1000)["notes"])
        assert ("sorted by class" in notes) == is_sorted
        assert "few" not in notes and "many.npz: 10000 images; published numbers" in notes

def test_saved_statistics_are_whole_or_not_there(small, tmp_path, monkeypatch):
    fid.evaluate("array.npz", save_stats="stats.npz")
    stats, before = Path("stats.npz").read_bytes(), sorted(tmp_path.rglob("*"))

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    assert fid.main(["array.npz", "--save-stats", "stats.npz"]) == 2
    assert Path("stats.npz").read_bytes() == stats and sorted(tmp_path.rglob("*")) == before

BAD_INPUT = [
    ("gone other.npz", "gone: cannot be read .FileNotFoundError"),
    ("empty other.npz", "empty: 0 images; need 2"),
    ("corrupt other.npz", "fid.py: corrupt/0.png: cannot be read .*image"),
    ("deep16 other.npz", "deep16/0.png: .*more than 8 bits"),
    ("cut.npz other.npz", "cut.npz: cannot be read"),
    ("rotten.npz other.npz", "rotten.npz: cannot be read .*CRC"),
    ("array.npz keys.npz", "keys.npz: 0 images; need 2 images .arr_0. or statistics"),
    ("nchw.npz other.npz", r"nchw.npz: .*arr_0 is \(4, 3, 8, 8\); need N x H x W x 3"),
    ("columns.npz other.npz", "columns.npz: .*in row order"),
    ("floats.npz other.npz", "floats.npz: .*arr_0 is float32; need uint8"),
    ("array.npz dims.npz", r"dims.npz: .*mu \(5,\), sigma \(5, 5\); need 6"),
    ("array.npz skew.npz", "skew.npz: .*covariance is not symmetric"),
    ("array.npz stats.npz --metrics sfid", "--metrics sfid: these inputs allow .'fid', 'is'."),
    ("array.npz other.npz --metrics kid", "--metrics kid: these inputs allow .'fid', 'sfid', 'is', 'pr'."),
    ("array.npz --metrics fid", "--metrics fid: these inputs allow .'is'."),
    ("array.npz", "nothing to compute"),
    ("few.npz other.npz --metrics pr", "need more than 3 images"),
    ("array.npz other.npz --batch -1", "--batch -1: must be at least 1"),
    ("array.npz other.npz --device tpu", "--device tpu: must be cpu, cuda or cuda:N"),
    ("array.npz other.npz --save-stats no/x.npz", "--save-stats no/x.npz: its folder does not exist"),
    ("stats.npz other.npz --save-stats x.npz", "--save-stats x.npz: stats.npz has no images"),
    ("array.npz other.npz --metric fid", "unrecognized arguments: --metric"),
]

@pytest.mark.parametrize("args, message", BAD_INPUT, ids=[args for args, _ in BAD_INPUT])
def test_bad_input_to_fid_gets_one_line_and_exit_code_2(small, capsys, args, message):
    arrays, eye = np.load("array.npz")["arr_0"], np.eye(6)
    np.savez("keys.npz", latents=arrays)
    np.savez("nchw.npz", arr_0=np.zeros((4, 3, 8, 8), np.uint8))
    np.savez("columns.npz", arr_0=np.asfortranarray(arrays))
    np.savez("few.npz", arr_0=arrays[:3])
    np.savez("floats.npz", arr_0=(arrays / 255).astype(np.float32))
    np.savez("dims.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez("stats.npz", mu=np.zeros(6), sigma=eye)
    np.savez("skew.npz", mu=np.zeros(6), sigma=eye + np.eye(6, k=1))
    data = Path("array.npz").read_bytes()
    Path("cut.npz").write_bytes(data[: len(data) // 2])
    Path("rotten.npz").write_bytes(data[:600] + bytes([data[600] ^ 1]) + data[601:])   # a bit of a pixel
    for name in ("empty", "corrupt", "deep16"):
        Path(name).mkdir()
    for i in (0, 1):
        Path(f"corrupt/{i}.png").write_bytes(Path("folder/00.png").read_bytes()[:60])
        Image.fromarray(np.zeros((5, 5), np.uint16)).save(f"deep16/{i}.png")
    before = sorted(Path().rglob("*"))
    try:
        code = fid.main(args.split())
    except SystemExit as e:
        code = e.code
    out, error = capsys.readouterr()
    assert code == 2 and re.search(message, error), error
    assert error.count("\n") == 1 and "Traceback" not in error and out == ""
    assert sorted(Path().rglob("*")) == before

def test_two_processes_of_fid_equal_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(11):                                           # batches of 3, 3, 3 and 2; sizes differ
        image = Image.fromarray(rng.integers(0, 256, (48 if i % 5 == 0 else 32, 32, 3), dtype=np.uint8))
        for folder in ("a", "bad"):
            Path(folder).mkdir(exist_ok=True)
            image.save(f"{folder}/{i:02}.png")
    np.savez("b.npz", arr_0=rng.integers(0, 256, (7, 16, 16, 3), dtype=np.uint8))
    Path("bad/05.png").write_bytes(b"hello")                      # in the first batch of process 1
    args = "b.npz --weights random --batch 3 --device cpu --json --metrics fid,is,pr".split()
    torch.set_num_threads(1)                                      # as torchrun: rounding depends on it
    assert fid.main(["a", *args, "--save-stats", "one.npz"]) == 0
    torch.set_num_threads(2)
    two = torchrun(2, "a", *args, "--save-stats", "two.npz", script=HERE / "fid.py", cwd=tmp_path)
    assert two.returncode == 0, two.stderr[-2000:]
    one, two = json.loads(capsys.readouterr().out), json.loads(two.stdout)
    for metric in ("fid", "is", "precision", "recall"):
        assert one[metric] == pytest.approx(two[metric], rel=1e-9), metric
    one, two = np.load("one.npz"), np.load("two.npz")
    for key in ("mu", "sigma", "mu_s", "sigma_s"):
        assert np.abs(one[key] - two[key]).max() <= 1e-9 * np.abs(one[key]).max(), key
    bad = torchrun(2, "bad", *args, script=HERE / "fid.py", cwd=tmp_path)
    assert bad.returncode and bad.stderr.count("fid.py: bad/05.png: cannot be read") == 1

# ---- The command line, in miniature: a tiny random teacher, a handful of steps -----------------------

def save_net(path, net, **info):
    torch.save({"ema": net.state_dict(), "config": net.config, **info}, path)

def small_teacher():
    net = tiny(shape=(1, 8, 8), classes=10)
    for p in net.parameters():
        p.data.mul_(0.5) if p.requires_grad else None       # tame: a random velocity must not explode
    save_net("teacher.pt", net, convention="sit")

@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with teacher.pt; the signal handlers of a training are undone."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.chdir(tmp_path)
    small_teacher()
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)

SMALL = "--teacher teacher.pt --batch 8 --eval-samples 12 --log-every 1 --device cpu".split()
FROM_TEACHER = ["--teacher", "teacher.pt", "--device", "cpu"]

def run(*args):
    return fmd.main([str(a) for a in args])

def sample_noise(count):
    sources = [fmd.generator("cpu", 0, "sample", i) for i in range(count)]
    return torch.stack([torch.randn(1, 8, 8, generator=source) for source in sources])

def logged(path, name="step"):
    return [json.loads(line)[name] for line in Path(path).read_text().splitlines()]

def states(path):
    """Every tensor of a checkpoint by a name, the optimisers' moments as well."""
    ckpt = torch.load(path, weights_only=True)
    moments = {f"optimizers.{i}.{j}.{k}": v for i, state in enumerate(ckpt["optimizers"])
               for j, values in state.items() for k, v in values.items()}
    return {f"{net}.{k}": v for net in ("student", "ema", "online") for k, v in ckpt[net].items()} | moments

def same(a, b):
    a, b = states(a), states(b)
    return a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)

def apart(a, b, networks=("student", "ema", "online")):
    """Relative distance of two checkpoints' networks, each as one vector. (Key biases have no gradient except
    rounding, which Adam scales to whole steps: tensor by tensor the comparison would be of noise.)"""
    a, b, out = states(a), states(b), []
    for net in networks:
        x, y = (torch.cat([v.flatten() for k, v in c.items() if k.startswith(f"{net}.")]) for c in (a, b))
        out.append(((x - y).norm() / x.norm()).item())
    return max(out)

def test_main_job_writes_what_it_promises(work, capsys):
    assert run(*SMALL, "--steps", 4, "--eval-every", 2, "--out", "o") == 0
    assert "next: python fmd.py" in capsys.readouterr().out
    names = ["ckpt.pt", "metrics.jsonl", "samples.png", "student.pt"]
    assert sorted(p.name for p in Path("o").iterdir()) == names
    lines = [json.loads(line) for line in Path("o/metrics.jsonl").read_text().splitlines()]
    terms = {"prediction", "correction", "online", "lambda", "student_norm", "images_per_s", "lr"}
    assert logged("o/metrics.jsonl") == [1, 2, 3, 4] and all(terms <= set(line) for line in lines)
    assert ["endpoint_error" in line for line in lines] == [False, True] * 2
    net, info = sit.load("o/student.pt")
    assert info == {"config": net.config, "convention": "sit", "gamma": [1.0, 2.0]} and net.config["dt"]
    again, more = sit.load("o/ckpt.pt")                     # the same facts: it can be sampled as well
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())
    assert info.items() <= more.items()
    moved = "blocks.0.mlp.fc1.weight"
    assert not torch.equal(net.state_dict()[moved], torch.load("teacher.pt")["ema"][moved])
    teacher, z = sit.load("teacher.pt")[0], sample_noise(12)
    y = torch.arange(12) % 10                               # the endpoint error by hand
    with torch.no_grad():
        phi = fmd.many_steps(partial(fmd.velocity_of, teacher), z, y, 1.5, 10, 16)
        x = z + net(z, torch.zeros(12), y, torch.ones(12), torch.full((12,), 1.5))
    error = ((x - phi).flatten(1).norm(dim=1) / phi.flatten(1).norm(dim=1)).mean().item()
    assert lines[-1]["endpoint_error"] == pytest.approx(error, rel=1e-4)

@pytest.mark.parametrize("extra", [
    ["--correction", 0], ["--correction", 1], ["--derivative", "jvp"], ["--k", 0], ["--alpha", 3, "--cut", 1],
    ["--gamma", 1, 1], ["--interval", 0.2, 0.8],
    ["--optimizer", "adamw", "--ema", 0, "--warmup", 0, "--decay-from", 1]], ids=str)
def test_every_setting_trains(work, extra):
    assert run(*SMALL, "--steps", 2, *extra) == 0
    lines = [json.loads(line) for line in Path("out/28/metrics.jsonl").read_text().splitlines()]
    off = {"prediction": ["--correction", 1], "correction": ["--correction", 0]}
    for term, without in off.items():
        assert (lines[-1][term] == 0) == (extra == without)

def test_optimizers_share_out_the_weights():
    net = tiny(**STUDENT)
    trained = {p for p in net.parameters() if p.requires_grad}
    (adamw, rate), = fmd.make_optimizers(net, 0.1, "adamw")
    assert set(adamw.param_groups[0]["params"]) == trained and rate == 0.1
    groups = [optimizer.param_groups[0]["params"] for optimizer, _ in fmd.make_optimizers(net, 0.1, "muon")]
    assert sum(map(len, groups)) == len(trained) and set(groups[0]) | set(groups[1]) == trained
    assert set(groups[1]) == {p for p in net.blocks.parameters() if p.ndim == 2}

def test_resume_refuses_other_mathematics_and_fewer_steps(work, capsys):
    assert run(*SMALL, "--steps", 2, "--out", "o") == 0
    assert run(*SMALL, "--steps", 2, "--out", "o") == 0     # a finished run, typed again
    before = Path("o/ckpt.pt").read_bytes()
    capsys.readouterr()
    for change in (["--steps", 2, "--alpha", 2], ["--steps", 1]):
        assert run(*SMALL, *change, "--out", "o") == 2
        error = capsys.readouterr().err
        assert "--out o: a run of 2 steps with {" in error and error.count("\n") == 1
        assert ("{'alpha': 1.0}" in error) == ("--alpha" in change)
    assert Path("o/ckpt.pt").read_bytes() == before

def test_nothing_that_is_not_finite_is_saved(work, capsys, monkeypatch):
    assert run(*SMALL, "--steps", 1, "--out", "o") == 0
    before, real = {p: p.read_bytes() for p in Path("o").iterdir()}, fmd.prediction
    monkeypatch.setattr(fmd, "prediction", lambda F_z, dF, u, z, delta: real(F_z, dF * math.inf, u, z, delta))
    capsys.readouterr()
    for every in (1, 3):                                    # seen at a line of the log, and at the last save
        assert run(*SMALL, "--steps", 4, "--log-every", every, "--ckpt-every", 1, "--out", "o") == 2
        error = capsys.readouterr().err
        assert "gradient not finite; nothing is saved" in error and error.count("\n") == 1
        assert {p: p.read_bytes() for p in Path("o").iterdir()} == before

def test_sampling_commands(work, capsys):
    student = tiny(shape=(1, 8, 8), classes=10, **STUDENT)
    save_net("student.pt", student, convention="sit", gamma=[1.0, 2.0])
    sample = [*FROM_TEACHER, "--ckpt", "student.pt", "--sample"]
    assert run(*sample, 70, "--out", "s") == 0
    assert "s/samples.npz: 70 samples" in capsys.readouterr().out
    many = np.load("s/samples.npz")
    assert many["arr_0"].shape == (70, 8, 8, 1) and many["arr_0"].dtype == np.uint8
    assert many["arr_1"].tolist() == [i % 10 for i in range(70)]
    assert Image.open("s/samples.png").size == (102, 72)
    assert run(*sample, 3, "--out", "few") == 0
    few = np.load("few/samples.npz")["arr_0"]
    assert np.array_equal(few, many["arr_0"][:3])           # sample i depends on the seed and i alone
    assert run(*sample, 3, "--out", "few", "--seed", 1, "--labels", "3-4") == 0
    other = np.load("few/samples.npz")
    assert not np.array_equal(other["arr_0"], few) and other["arr_1"].tolist() == [3, 4, 3]
    for solver in ("euler", "heun"):
        assert run(*FROM_TEACHER, "--rollout", 4, "--rollout-steps", 3, "--labels", 7, "--out", "r",
                   "--solver", solver) == 0
        assert np.load("r/rollout.npz")["arr_1"].tolist() == [7] * 4 and Path("r/rollout.png").exists()

def test_rollout_command_is_the_rollout(work):
    assert run(*FROM_TEACHER, "--rollout", 2, "--rollout-steps", 5, "--guidance", 2, "--out", "r") == 0
    net, y, x = sit.load("teacher.pt")[0], torch.tensor([0, 1]), sample_noise(2)

    def u(x, s):                                            # Heun by hand, in SiT's own time s = 1 - t
        s = torch.full((2,), s)
        null = net(x, s, torch.full_like(y, 10))
        return null + 2 * (net(x, s, y) - null)

    with torch.no_grad():
        for i in range(5):
            a = u(x, i / 5)
            x = x + (a + u(x + a / 5, (i + 1) / 5)) / 10
    want = (127.5 * x + 128).clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(np.load("r/rollout.npz")["arr_0"] - want).max() < 1.01

def test_student_samples_by_the_authors_rule(work):
    """x0 = z + u at the prior's end of the clock, dt = 1, gw = γ, from the released names."""
    assert run(*SMALL, "--steps", 2, "--out", "o") == 0
    raw = torch.load("o/student.pt", weights_only=True)["ema"]
    assert "dt_embedder.projs.0.weight" in raw and not [k for k in raw if ".mlp." in k and "embedder" in k]
    net = sit.from_state_dict(raw, heads=4)
    z, y, one = torch.randn(64, 1, 8, 8), torch.arange(64) % 10, torch.ones(64)
    with torch.no_grad():
        theirs = z + net(z, 0 * one, y, one, 1.5 * one)
    assert torch.equal(theirs, fmd.one_step(partial(fmd.velocity_of, net), z, y, 1.5))

BAD = [
    (["--res", 27], "argument --res: invalid choice: 27"),
    (["--batch", 0], "--batch 0: must be from 1"),
    (["--log-every", 0], "--log-every 0: must be from 1"),
    (["--correction", "nan"], "--correction nan: must be from 0 to 1"),
    (["--cut", 1.5], "--cut 1.5: must be from 0 to 1"),
    (["--lr", -1], "--lr -1.0: must be from 0"),
    (["--k", "inf"], "--k inf: must be from 0"),
    (["--gamma", 2, 1], r"--gamma \[2.0, 1.0\]: must be from 0 to .*, in order"),
    (["--gamma", 1], "argument --gamma: expected 2 arguments"),
    (["--interval", 0.5, 2], r"--interval \[0.5, 2.0\]: must be from 0 to 1"),
    (["--derivative", "exact"], "argument --derivative: invalid choice: 'exact'"),
    (["--seed", 1.5], "argument --seed: invalid int value: '1.5'"),
    (["--lable", 1], "unrecognized arguments: --lable"),
    (["--device", "tpu"], "--device tpu: must be cpu, cuda or cuda:N"),
    (["--device", "cuda:99"], "--device cuda:99: no such GPU"),
    (["--teacher", "none.pt"], "none.pt: no such file, nor a released one"),
    (["--teacher", "text.pt"], "text.pt: not a checkpoint"),
    (["--teacher", "flipped.pt"], "flipped.pt: not a checkpoint.*checksum"),
    (["--teacher", "odd.pt"], "odd.pt: convention is none of"),
    (["--teacher", "latent.pt"], r"latent.pt: made for \[4, 8, 8\], not for --res 28"),
    (["--teacher", "student.pt"], "student.pt: not a teacher"),
    (["--sample", 1, "--ckpt", "teacher.pt"], "teacher.pt: not a student"),
    (["--sample", 1, "--ckpt", "cut.pt"], "cut.pt: not a checkpoint"),
    (["--sample", -1], "--sample -1: must be from 0"),
    (["--rollout", 1, "--sample", 1], "--rollout 1: not together with --sample"),
    (["--rollout", 1, "--labels", "5-3"], "--labels 5-3: give"),
    (["--rollout", 1, "--labels", "x"], "--labels x: give"),
    (["--rollout", 1, "--labels", 10], "--labels 10: give .* below 10"),
    (["--res", 256, "--sample", 1], "out/256/student.pt: no such file"),
    (["--res", 256, "--teacher", "latent32.pt", "--vae", "text.pt"], "text.pt: not a checkpoint"),
    (["--out", "text.pt/x"], "text.pt/x"),
]

@pytest.mark.parametrize("args, message", BAD, ids=[" ".join(map(str, a)) for a, _ in BAD])
def test_bad_input_gets_one_line_and_exit_code_2(work, capsys, args, message):
    Path("text.pt").write_text("hello")
    save_net("odd.pt", tiny(shape=(1, 8, 8)), convention="edm")
    save_net("latent.pt", tiny(shape=(4, 8, 8)))
    save_net("latent32.pt", tiny(shape=(4, 32, 32), patch=8))
    save_net("student.pt", tiny(shape=(1, 8, 8), classes=10, **STUDENT))
    whole = bytearray(Path("teacher.pt").read_bytes())
    Path("cut.pt").write_bytes(whole[:3000])
    whole[len(whole) // 2] ^= 1
    Path("flipped.pt").write_bytes(whole)
    before = sorted(Path().rglob("*"))
    try:
        code = run("--teacher", "teacher.pt", *args)
    except SystemExit as e:
        code = e.code
    error = capsys.readouterr().err
    assert code == 2 and re.search(message, error), error
    assert error.count("\n") == 1 and "Traceback" not in error
    assert sorted(Path().rglob("*")) == before

# ---- A run that survives: signals, kills, damage, other world sizes ----------------------------------

@pytest.mark.parametrize("world", [2, 4])
def test_world_size_does_not_matter(work, world):
    args = [*SMALL, "--steps", 20, "--batch", 16, "--optimizer", "adamw"]
    assert run(*args, "--out", "one") == 0
    half = torchrun(world, *args, "--steps", 10, "--decay-from", 0.3, "--out", "half")
    assert half.returncode == 0 and logged("half/metrics.jsonl") == list(range(1, 11)), half.stderr[-2000:]
    done = torchrun(world, *args, "--out", "many")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("next: python") == 1           # one process speaks
    assert apart("one/ckpt.pt", "many/ckpt.pt") < 1e-5 < 1e-3 < apart("one/ckpt.pt", "half/ckpt.pt")
    for x, y in zip(*(map(json.loads, open(f"{name}/metrics.jsonl")) for name in ("one", "many"))):
        for k in ("prediction", "correction", "lambda", "online", "student_norm", "online_norm"):
            assert x[k] == pytest.approx(y[k], rel=2e-3, abs=5e-6), (x["step"], k)
    assert run(*args, "--steps", 24, "--out", "many") == 0  # saved by many processes, carried on by one
    assert logged("many/metrics.jsonl") == list(range(1, 25))

def test_recomputation_changes_nothing(work):
    args = [*SMALL, "--steps", 5, "--batch", 16, "--derivative", "jvp", "--optimizer", "adamw"]
    for name, extra in (("plain", []), ("again", ["--checkpointing"]), ("other", ["--alpha", 2])):
        assert run(*args, "--out", name, *extra) == 0
    assert apart("plain/ckpt.pt", "again/ckpt.pt") < 1e-5
    assert apart("plain/ckpt.pt", "other/ckpt.pt", ["student"]) > 1e-5

def test_one_killed_process_ends_the_others(work):
    Path("driver.py").write_text("import os, signal, sys, fmd\n"
                                 "def kill(*a, real=fmd.learning_rate):\n"
                                 "    if a[0] == 2 and fmd.RANK == 1:\n"
                                 "        os.kill(os.getpid(), signal.SIGKILL)\n"
                                 "    return real(*a)\n"
                                 "fmd.learning_rate = kill\n"
                                 "sys.exit(fmd.main(sys.argv[1:]))\n")
    done = torchrun(2, *SMALL, "--steps", 4, "--ckpt-every", 1, "--out", "o", script="driver.py")
    assert done.returncode != 0 and torch.load("o/ckpt.pt", weights_only=True)["step"] <= 2

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(work, monkeypatch, capsys, number):
    args = [*SMALL, "--steps", 4, "--ckpt-every", 4]
    assert run(*args, "--out", "whole") == 0
    real = fmd.learning_rate

    def interrupted(step, *a):
        if step == 1:
            for _ in range(2):                              # Slurm and torchrun each send one
                os.kill(os.getpid(), number)
        return real(step, *a)

    monkeypatch.setattr(fmd, "learning_rate", interrupted)
    assert run(*args, "--out", "cut") == 0
    assert "saved after step 2" in capsys.readouterr().out
    assert torch.load("cut/ckpt.pt", weights_only=True)["step"] == 2
    assert logged("cut/metrics.jsonl") == [1, 2] and sit.load("cut/student.pt")     # it can be sampled
    monkeypatch.setattr(fmd, "learning_rate", real)
    assert run(*args, "--out", "cut") == 0
    assert same("whole/ckpt.pt", "cut/ckpt.pt") and logged("cut/metrics.jsonl") == [1, 2, 3, 4]

# A run that counts its steps, and the places in its writes where a kill could hurt, and dies at one of them
KILLED = """
import io, os, signal, sys
import torch
import fmd
left = int(sys.argv[1])
def tick():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
def around(real):
    def call(*a, **k):
        tick()
        result = real(*a, **k)
        tick()
        return result
    return call
def save(state, f, real=torch.save):
    data = io.BytesIO()
    real(state, data)
    half = len(data.getvalue()) // 2
    f.write(data.getvalue()[:half])
    f.flush()
    tick()
    f.write(data.getvalue()[half:])
torch.save, os.fsync, os.replace = save, around(os.fsync), around(os.replace)
fmd.learning_rate, fmd.log = around(fmd.learning_rate), around(fmd.log)
sys.exit(fmd.main(sys.argv[2:]))
"""

def kill_and_rerun(instants):
    """Runs killed at the given events, then run again to the end -> how many equal the uninterrupted one."""
    Path("killed.py").write_text(KILLED)
    env, equal = {**os.environ, "PYTHONPATH": str(HERE)}, 0

    def go(instant, out):
        args = [instant, *SMALL, "--steps", 5, "--ckpt-every", 2, "--out", out]
        command = [sys.executable, "killed.py", *map(str, args)]
        return subprocess.run(command, env=env, capture_output=True).returncode

    assert go(0, "whole") == 0
    for instant in instants:
        out = f"killed-{instant}"
        assert go(instant, out) == -signal.SIGKILL and go(0, out) == 0
        whole = logged(f"{out}/metrics.jsonl") == [1, 2, 3, 4, 5] and not list(Path(out).glob(".*"))
        equal += whole and same("whole/ckpt.pt", f"{out}/ckpt.pt")
    return equal

def test_killed_at_any_instant_and_rerun_equals_uninterrupted(work):
    assert kill_and_rerun([7, 22, 38]) == 3                 # in step 1, inside the first save, in step 4

def test_damaged_checkpoints_are_refused_or_load_right(work, capsys):
    assert run(*SMALL, "--steps", 1, "--out", "o") == 0
    good, right, rng = Path("o/ckpt.pt").read_bytes(), states("o/ckpt.pt"), np.random.default_rng(0)
    names, refused = torch.load("o/ckpt.pt", weights_only=True), 0
    s = fmd.parse([*SMALL, "--steps", "1", "--out", "o"])
    net = fmd.start_from(sit.load("teacher.pt")[0], **STUDENT)
    g = fmd.start_from(sit.load("teacher.pt")[0], gw=True)
    for i in range(150):
        nets = SimpleNamespace(net=net, g=g, ema=copy.deepcopy(net), step=0)
        nets.optimizers = fmd.make_optimizers(net, 0, "muon") + fmd.make_optimizers(g, 0, "muon")
        data = bytearray(good)
        if i % 3 == 0:                                      # flip bytes
            for at in rng.integers(len(data), size=rng.integers(1, 4)):
                data[at] ^= int(rng.integers(1, 256))
        elif i % 3 == 1:                                    # cut
            data = data[:rng.integers(len(good))]
        Path("o/ckpt.pt").write_bytes(data)
        if i % 3 == 2:                                      # rename or drop a weight, or another shape
            ckpt = copy.deepcopy(names)
            place = ckpt[str(rng.choice(["student", "ema", "online"]))]
            key = str(rng.choice(list(place)))
            value = place.pop(key)
            place |= [{}, {key + "x": value}, {key: value.reshape(1, -1, 1)}][rng.integers(3)]
            torch.save(ckpt, "o/ckpt.pt")
        try:
            fmd.resume(nets, s)
        except ValueError as e:
            assert "o/ckpt.pt: not " in str(e) and "\n" not in str(e)
            refused += 1
        else:
            assert all(torch.equal(v, right[f"student.{k}"]) for k, v in net.state_dict().items())
    assert refused > 140
    Path("o/ckpt.pt").write_bytes(good[:-100])              # and by the command
    assert run(*SMALL, "--steps", 2, "--out", "o") == 2 and capsys.readouterr().err.count("\n") == 1

def test_a_full_disk_leaves_the_last_checkpoint(work, capsys):
    assert run(*SMALL, "--steps", 2, "--out", "o") == 0
    before, limits = Path("o/ckpt.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))    # no file grows larger
        assert run(*SMALL, "--steps", 4, "--out", "o") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot write o/ckpt.pt" in error, error
    assert Path("o/ckpt.pt").read_bytes() == before and not list(Path("o").glob(".*"))
    assert run(*SMALL, "--steps", 4, "--out", "o") == 0 and logged("o/metrics.jsonl") == [1, 2, 3, 4]

def test_a_torn_log_is_cut_to_the_checkpoint(work):
    assert run(*SMALL, "--steps", 3, "--out", "o") == 0
    with open("o/metrics.jsonl", "ab") as f:
        f.write(b'{"step": 4, "pred\n' + b"\0" * 40 + b"\xff\n" + b'{"step": 4}\n{"step": 2')
    assert run(*SMALL, "--steps", 4, "--out", "o") == 0
    assert logged("o/metrics.jsonl") == [1, 2, 3, 4] and len(logged("o/metrics.jsonl", "lr")) == 4

def test_many_processes_sample_what_one_does(work):
    common = [*FROM_TEACHER, "--rollout", 150, "--rollout-steps", 2]
    assert run(*common, "--out", "one") == 0
    done = torchrun(2, *common, "--out", "two")
    assert done.returncode == 0, done.stderr[-2000:]
    a, b = (np.load(f"{name}/rollout.npz") for name in ("one", "two"))
    assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1       # other thread counts
    assert np.array_equal(a["arr_1"], b["arr_1"]) and len(b["arr_0"]) == 150

@pytest.mark.parametrize("extra", [[], ["--bf16"]], ids=str)
def test_imagenet_in_miniature(work, monkeypatch, extra):
    monkeypatch.setattr(sit.load_decoder, "__defaults__", ((32, 32, 32, 32),))
    monkeypatch.setattr(fmd, "CHUNK", 4)
    save_net("xl.pt", tiny(shape=(4, 32, 32), patch=8, classes=1000, learn_sigma=True))
    torch.save(small_decoder((32, 32, 32, 32)).state_dict(), "vae.pt")
    big = "--res 256 --teacher xl.pt --vae vae.pt --device cpu --eval-samples 2 --out big".split()
    assert run(*big, "--steps", 2, "--batch", 8, "--log-every", 1, *extra) == 0
    assert len(logged("big/metrics.jsonl")) == 2 and Image.open("big/samples.png").size[1] > 256
    assert run(*big, "--sample", 6) == 0
    many = np.load("big/samples.npz")
    assert many["arr_0"].shape == (6, 256, 256, 3) and many["arr_1"].tolist() == list(range(6))
    assert sit.load("big/student.pt")[0].config["learn_sigma"]
    assert not any(p.requires_grad for p in sit.load_decoder("vae.pt").parameters())    # no graph of pixels

# ---- The CUDA path, without a GPU --------------------------------------------------------------------

class StepDone(Exception):
    pass

FAKE = FakeTensorMode()     # one for all: its tensors do not mix with those of another

@pytest.fixture
def fake_cuda(monkeypatch):
    """train(s) for one step on fake tensors of device cuda, without files; the backward pass, for which torch
    needs a GPU, only gives each weight a gradient of zeros."""
    nets, real = [], {name: getattr(fmd, name) for name in ("start_from", "learning_rate")}

    def load(run, s, source):
        run.shape, run.classes, run.convention, run.decoder = (4, 32, 32), 1000, "sit", None
        return sit.SiT((4, 32, 32), 2, 64, 4, 2, 1000, learn_sigma=True).requires_grad_(False)

    def start_from(teacher, **embedders):
        nets.append(real["start_from"](teacher, **embedders))
        return nets[-1]

    def backward(loss):
        assert loss.device.type == "cuda" and loss.dtype == torch.float32
        for p in (p for net in nets for p in net.parameters() if p.requires_grad):
            p.grad = torch.zeros_like(p)

    def learning_rate(step, *a):
        if step == 1:
            raise StepDone
        return real["learning_rate"](step, *a)

    patches = dict(load=load, start_from=start_from, learning_rate=learning_rate, generator=lambda *a: None,
                   any_process=lambda flag=False: False, join=lambda device: torch.device("cuda:0"),
                   **dict.fromkeys(("resume", "evaluate"), lambda *a: None))
    for name, patch in patches.items():
        monkeypatch.setattr(fmd, name, patch)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)

    def train(*args):
        s = fmd.parse(["--res", "256", "--steps", "9", "--batch", "8", "--no-compile", *args])
        with FAKE, torch.device("cuda"), pytest.raises(StepDone):
            fmd.train(s)
        return nets
    return train

@pytest.mark.parametrize("args", [
    "--bf16 --derivative jvp --checkpointing", "--bf16 --derivative fd", "--no-bf16",
    "--bf16 --optimizer muon", "--no-bf16 --derivative fd --batch 256"])
def test_a_step_on_cuda_does_not_wait_for_the_host(work, fake_cuda, args):
    """A tensor left on the CPU, a clash of types, a copy from the host or an .item() raises."""
    nets = fake_cuda(*args.split())
    assert [net.checkpointing for net in nets[:2]] == ["--checkpointing" in args or "--batch 256" in args] * 2

@pytest.mark.parametrize("plant, fault", [
    (lambda x: x * x.sum().item(), "local_scalar_dense"),
    (lambda x: x + torch.zeros(1, 4, 1, 1, device="cpu"), "cuda:0 and cpu")])
def test_a_step_on_cuda_that_waits_is_found(work, fake_cuda, monkeypatch, plant, fault):
    real = fmd.weighted
    monkeypatch.setattr(fmd, "weighted", lambda residual, k: plant(real(residual, k)))
    with pytest.raises(Exception, match=fault):
        fake_cuda("--bf16")

def test_sampling_on_cuda_does_not_wait_for_the_host(monkeypatch):
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    with FAKE, torch.device("cuda"):
        net, decoder = sit.SiT((4, 32, 32), 2, 64, 4, 2, 1000, **STUDENT), sit.Decoder((32, 32))
        teacher = sit.SiT((4, 32, 32), 2, 64, 4, 2, 1000)
        z, y = torch.randn(4, 4, 32, 32), torch.zeros(4, dtype=torch.long)
        assert decoder(fmd.one_step(partial(fmd.velocity_of, net), z, y, 1.5)).device.type == "cuda"
        x = fmd.many_steps(partial(fmd.velocity_of, teacher), z, y, 1.5, 1000, 2)
        assert x.device.type == "cuda" and x.dtype == torch.float32

@pytest.mark.parametrize("extra", [[], ["--checkpointing"], ["--bf16"]], ids=str)
def test_compiled_step_is_static_and_equal(work, monkeypatch, extra):
    """Blocks and derivative as static graphs: student and teacher at 2 batch sizes each, g, the derivative.
    No graph more after the first step, no break, and in float32 the same training."""
    from torch._dynamo.utils import counters
    args = [*SMALL, "--steps", 20, "--derivative", "jvp", "--optimizer", "adamw", *extra]
    assert run(*args, "--out", "eager") == 0
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    graphs, real = [], fmd.learning_rate
    def learning_rate(*a):
        graphs.append(counters["stats"]["unique_graphs"])
        return real(*a)

    monkeypatch.setattr(fmd, "learning_rate", learning_rate)
    assert run(*args, "--compile", "--out", "compiled") == 0
    assert graphs[0] == graphs[-1] <= 6 and not counters["graph_break"], (graphs, counters["graph_break"])
    assert extra == ["--bf16"] or apart("eager/ckpt.pt", "compiled/ckpt.pt") < 1e-5

def test_compiled_processes_equal_an_eager_one(work):
    """DDP, recomputation and static graphs together: as many graphs after 20 steps as after one."""
    Path("driver.py").write_text("import sys, torch, fmd\n"
                                 "from functools import partial\n"
                                 "from torch._dynamo.utils import counters\n"
                                 "def count(*a, real=fmd.learning_rate):\n"
                                 "    print('graphs', counters['stats']['unique_graphs'])\n"
                                 "    return real(*a)\n"
                                 "fmd.learning_rate = count\n"
                                 "torch.compile = partial(torch.compile, backend='aot_eager')\n"
                                 "code = fmd.main(sys.argv[1:])\n"
                                 "sys.exit(code or bool(counters['graph_break']))\n")
    args = [*SMALL, "--steps", 20, "--batch", 16, "--derivative", "jvp", "--optimizer", "adamw"]
    args.append("--checkpointing")
    assert run(*args, "--out", "eager") == 0
    done = torchrun(2, *args, "--compile", "--out", "compiled", script="driver.py")
    assert done.returncode == 0, done.stderr[-2000:]
    graphs = re.findall("graphs (\\d+)", done.stdout)
    assert len(graphs) == 20 and len(set(graphs)) == 1 and int(graphs[0]) <= 6, graphs
    assert apart("eager/ckpt.pt", "compiled/ckpt.pt") < 1e-5

def test_a_full_gpu_gets_one_line_that_names_the_flag(work, monkeypatch, capsys):
    def train(s):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(fmd, "train", train)
    assert run(*SMALL) == 2
    assert capsys.readouterr().err == "fmd.py: GPU memory is full: lower --batch\n"

def test_bfloat16_keeps_the_direction_of_the_gradients(work, monkeypatch):
    """Cosine of w Δ_G and w Δ_N, bf16 against float32; student and g of a short training."""
    monkeypatch.setattr(fmd, "CHUNK", 1)
    assert run("--steps", 20, "--batch", 16, "--eval-samples", 1, "--device", "cpu", "--out", "o") == 0
    teacher, ckpt = sit.load(HERE / "assets/teacher-mnist.pt")[0], torch.load("o/ckpt.pt", weights_only=True)
    student, online = fmd.start_from(teacher, **STUDENT), fmd.start_from(teacher, gw=True)
    student.load_state_dict(ckpt["student"])
    online.load_state_dict(ckpt["online"])
    p = fmd.prior(24, (0,), (1, 28, 28), 10, (1.0, 2.0), (0.8, 1.0))

    @torch.no_grad()
    def residuals(r, bf16):
        u, F_of, g = (partial(fmd.velocity_of, net, bf16=bf16) for net in (teacher, student, online))
        F = partial(fmd.average_velocity, F_of, y=p.y, gamma=p.gamma)
        u = partial(fmd.guided, u, y=p.y, gamma=p.gamma, null=10)
        F_z, dF = F(p.z, r), fmd.duration_derivative(F, p.z, r)
        G = fmd.prediction(F_z, dF, u, p.z, r)
        N, _ = fmd.correction(F(p.z, torch.ones_like(r)), u, partial(g, y=p.y, gw=p.gamma), p.z, p.n, r)
        return [fmd.weighted(residual).flatten() for residual in (G, N)]

    for r in (0.1, 0.3, 0.5, 0.7, 0.9):
        r = torch.full((24,), r)
        for exact, rounded in zip(residuals(r, False), residuals(r, True)):
            assert torch.cosine_similarity(exact, rounded, dim=0) > 0.95

# ---- What is shipped ---------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["teacher", "student"])
def test_shipped_weights_make_digits(name):
    """White strokes on black. A wrong sign makes something else."""
    path = HERE / f"assets/{name}-mnist.pt"
    net, info = sit.load(path)
    assert path.stat().st_size < 16e6 and info["convention"] == "sit"
    z, y, velocity = torch.randn(20, 1, 28, 28), torch.arange(20) % 10, partial(fmd.velocity_of, net)
    x = fmd.one_step(velocity, z, y, 1.5) if name == "student" else fmd.many_steps(velocity, z, y, 1.5, 10, 8)
    black, white = (x < -0.8).float().mean().item(), (x > 0.5).float().mean().item()
    assert 0.6 < black < 0.9 and 0.05 < white < 0.25, (black, white)
    assert x[:, :, 10:18, 10:18].mean() > x[:, :, :4].mean() + 0.3

def test_findings_in_miniature(tmp_path, monkeypatch, capsys):
    """Every table of assets/findings.py comes out, on students of two steps; its charts need matplotlib."""
    monkeypatch.syspath_prepend(HERE / "assets")
    import findings

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(findings, "SETTINGS", findings.SETTINGS[-1:])
    small = "--steps 2 --batch 8 --seeds 1 --samples 12 --images 4 --tries 2 --out o --pictures .".split()
    for what, rows in (("objectives", 6), ("settings", 4), ("guidance", 7), ("search", 6)):
        findings.main([what, *small])
        out = capsys.readouterr().out
        assert out.count("\n|") + out.startswith("|") == rows and "nan" not in out, what

def readme_and_results():
    return (HERE / "README.md").read_text() + (HERE / "assets/RESULTS.md").read_text()

def test_the_readmes_unet_example(tmp_path, monkeypatch):
    """The README's loop distils a tiny UNet with the opposite clock; the block runs as it stands."""
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)[1]

    class UNet(torch.nn.Module):
        """model(x, t, y), t = 0 noise, t = 1 data, output x0 - n."""

        def __init__(self):
            super().__init__()
            self.time, self.label = torch.nn.Linear(1, 16), torch.nn.Embedding(4, 16)
            self.down, self.up = torch.nn.Conv2d(1, 16, 3, 2, 1), torch.nn.ConvTranspose2d(32, 1, 4, 2, 1)
            self.middle, self.skip = torch.nn.Conv2d(16, 16, 3, 1, 1), torch.nn.SiLU()

        def forward(self, x, t, y):
            c = self.time(t[:, None]) + self.label(y)
            h = self.down(x) + c[:, :, None, None]
            return self.up(torch.cat([h, self.middle(self.skip(h))], 1))

    torch.manual_seed(0)
    names = {"teacher": UNet(), "C": 1, "H": 8, "W": 8, "classes": 3, "steps": 2, "batch": 8}
    exec(code, names)
    assert names["loss"].isfinite() and names["x"].shape == (8, 1, 8, 8)

def test_readme_commands_parse_and_links_exist():
    text = readme_and_results()
    commands = re.findall(r"(?<![\w/.])(fmd|fid|assets/\w+)\.py +([^`\n#|&]*)", text)
    assert len(commands) > 20
    for program, args in commands:
        args = shlex.split(args)
        if program == "fmd" and args != ["--help"]:
            fmd.parse(args)
        elif program == "fid" and args != ["..."]:
            fid.parse(args)
        elif program.startswith("assets"):
            source = (HERE / f"{program}.py").read_text()
            words = [a for a in args if re.match("--|[a-z]+$", a)]
            assert all(f'"{a}"' in source or f"def {a}(" in source for a in words), args
    for link in re.findall(r"assets/[\w.-]+", text):
        assert (HERE / link).exists(), link
    assert "python -m pytest -q test_fmd.py" in text
    assert "pip install -r requirements.txt pytest && python -m pytest -q test_fmd.py" in text
    assert "python -m pytest -q test_fmd.py" in (HERE / ".ci/run").read_text()
