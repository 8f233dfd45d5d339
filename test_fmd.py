# SPDX-License-Identifier: MIT
"""Tests of fmd.py, sit.py and fid.py: closed forms, not snapshots. No GPU, no network, no clock."""

import argparse
import copy
import http.client
import json
import math
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import fid
import fmd
import sit

HERE = Path(__file__).resolve().parent
torch.set_num_threads(2)


# -----------------------------------------------------------------------------------------------------------
# Ground truth: Gaussian data N(m, s² I). Everything about its flow is explicit (method: x_t is Gaussian at
# every t).
# -----------------------------------------------------------------------------------------------------------

M, S = torch.tensor([1.5, -0.5]), 0.4


def gaussian_velocity(x, t, m=M, s=S):
    """E[x0 - n | x_t = x] for x0 ~ N(m, s²), n ~ N(0, 1), x_t = (1-t) x0 + t n."""
    t = t.view(-1, 1)
    variance = (1 - t) ** 2 * s**2 + t**2
    centred = x - (1 - t) * m
    return m + ((1 - t) * s**2 - t) / variance * centred


def gaussian_map(z, delta, m=M, s=S):
    """Where the path from z at t = 1 is after duration δ: it keeps its place among the standard
    deviations."""
    t = 1 - delta.view(-1, 1)
    return (1 - t) * m + ((1 - t) ** 2 * s**2 + t**2).sqrt() * z


def gaussian_average(z, delta):
    return (gaussian_map(z, delta) - z) / delta.view(-1, 1)


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    z, n = torch.randn(64, 2, generator=g), torch.randn(64, 2, generator=g)
    delta = 0.05 + 0.9 * torch.rand(64, generator=g)
    return z.double(), delta.double(), n.double(), torch.rand(64, generator=g).double()


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_rollout_converges_at_its_order(batch, solver, order):
    z, one = batch[0], torch.ones(64).double()
    errors = [
        (fmd.rollout(gaussian_velocity, z, k, solver) - gaussian_map(z, one)).norm().item()
        for k in (40, 80, 160)
    ]
    for coarse, fine in zip(errors, errors[1:]):
        assert abs(math.log2(coarse / fine) - order) < 0.25, errors
    path = fmd.rollout(gaussian_velocity, z, 40, solver, path=True)
    assert path.shape == (41, 64, 2) and torch.equal(path[0], z)
    assert (path[20] - gaussian_map(z, one / 2)).abs().max() < 0.1


@pytest.mark.parametrize("method, tolerance", [("jvp", 1e-9), ("fd", 3e-2)])
def test_exact_flow_map_has_no_prediction_residual(batch, method, tolerance):
    z, delta, _, _ = batch

    def derivative(*a):
        return fmd.duration_derivative(*a, method=method)

    average, residual = fmd.prediction(gaussian_average, gaussian_velocity, z, delta, derivative)
    assert residual.abs().max() < tolerance
    assert torch.allclose(z + delta[:, None] * average, gaussian_map(z, delta))
    # and a wrong sign of the teacher, a missing derivative or a wrong map do leave one
    assert (
        fmd.prediction(gaussian_average, lambda x, t: -gaussian_velocity(x, t), z, delta)[1].abs().mean()
        > 0.5
    )
    assert (
        fmd.prediction(gaussian_average, lambda x, t: gaussian_velocity(x, 1 - t), z, delta)[1].abs().mean()
        > 0.2
    )
    assert (
        fmd.prediction(gaussian_average, gaussian_velocity, z, delta, lambda *a: 0)[1].abs().mean() > 0.05
    )


def test_duration_derivative_is_partial(batch):
    z, delta, _, _ = batch

    def F(z, d):
        return torch.sin(d)[:, None] * z**2

    exact = torch.cos(delta)[:, None] * z**2  # a total derivative would add 2 sin(δ) z dz/dδ
    assert torch.allclose(fmd.duration_derivative(F, z, delta, F(z, delta)), exact)
    assert torch.allclose(fmd.duration_derivative(F, z, delta, F(z, delta), "fd"), exact, atol=3e-2)
    assert torch.equal(fmd.flow_map(F, z, delta), z + delta[:, None] * F(z, delta))


def test_correction_residual_is_the_difference_of_velocities(batch):
    z, _, n, r = batch
    m, s = torch.tensor([0.3, 0.3]).double(), 0.8  # a student that makes N(m, s²) instead

    def F(z, delta):
        return m + (s - 1) * z

    def v_N(x, t):
        return gaussian_velocity(x, t, m, s)

    average, residual, _ = fmd.correction(F, gaussian_velocity, v_N, z, n, r)
    x_r = (1 - r[:, None]) * (m + s * z) + r[:, None] * n
    assert torch.allclose(residual, v_N(x_r, r) - gaussian_velocity(x_r, r)) and torch.equal(
        average, F(z, r)
    )
    average, residual, _ = fmd.correction(gaussian_average, gaussian_velocity, gaussian_velocity, z, n, r)
    assert residual.abs().max() == 0  # the teacher's own distribution needs no correction


def test_correction_alone_finds_the_gaussian():
    """Descending <F, sg(Δ_N)> with the exact v_N moves a student N(a, b²) to the data's N(m, s²): a wrong
    sign flees."""
    a, b = torch.zeros(2, requires_grad=True), torch.ones(1, requires_grad=True)
    opt = torch.optim.Adam([a, b], 0.02)
    for step in range(400):
        g = torch.Generator().manual_seed(step)
        z, n, r = (
            torch.randn(256, 2, generator=g),
            torch.randn(256, 2, generator=g),
            torch.rand(256, generator=g),
        )

        def v_N(x, t):
            return gaussian_velocity(x, t, a.detach(), b.item())

        average, residual, _ = fmd.correction(lambda z, d: a + (b - 1) * z, gaussian_velocity, v_N, z, n, r)
        loss, lam = fmd.student_loss(average, residual[:0], residual)
        assert lam == 1
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert (a.detach() - M).abs().max() < 0.05 and abs(b.item() - S) < 0.05


def test_online_optimum_is_the_closed_form_noising_velocity():
    g = torch.Generator().manual_seed(0)
    z, n, r = (
        torch.randn(200_000, 2, generator=g),
        torch.randn(200_000, 2, generator=g),
        torch.rand(200_000, generator=g),
    )
    w = torch.zeros(2, requires_grad=True)

    def g_psi(x, t):  # the closed form, with room to be wrong
        return gaussian_velocity(x, t) * (1 + w[0]) + w[1]

    average, _, loss = fmd.correction(gaussian_average, gaussian_velocity, g_psi, z, n, r)
    loss.backward()
    assert w.grad.abs().max() < 0.03, w.grad  # a stationary point, to Monte Carlo error
    assert not average.requires_grad
    wrong = torch.autograd.grad(((1.2 * gaussian_velocity(n, r) * (1 + w[0]) + w[1] - 1) ** 2).mean(), w)[0]
    assert wrong.abs().max() > 0.3  # which elsewhere is far from zero


def test_weights_and_lambda_by_hand():
    G = torch.tensor([[3.0, 4.0], [0.0, 2.0]])  # |Δ|²/d: 12.5 and 2
    N = torch.tensor([[1.0, 1.0]])  # 1
    for k in (0.0, 0.5, 1.0):
        w = [1 / (v + 1e-3) ** k for v in (12.5, 2.0, 1.0)]
        assert torch.allclose(fmd.weighted(G, k), torch.tensor([[3 * w[0], 4 * w[0]], [0, 2 * w[1]]]))
        lam = 0.5 * ((5 * w[0] + 2 * w[1]) / 2) / (math.sqrt(2) * w[2] + 1e-6)
        average = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], requires_grad=True)
        loss, got = fmd.student_loss(average, G, N, k, alpha=0.5)
        assert got.item() == pytest.approx(lam, rel=1e-5)
        loss.backward()
        want = torch.tensor([[3 * w[0], 4 * w[0]], [0, 2 * w[1]], [lam * w[2], lam * w[2]]]) / 6
        assert torch.allclose(average.grad, want)
        assert fmd.student_loss(average[:2], G, N[:0], k, alpha=0.5)[1] == 0.5


class Toy(torch.nn.Module):
    """A small student on 2-D points: F(z, δ)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(3, 64),
            torch.nn.SiLU(),
            torch.nn.Linear(64, 64),
            torch.nn.SiLU(),
            torch.nn.Linear(64, 2),
        )

    def forward(self, z, delta):
        return self.net(torch.cat([z, delta[:, None]], dim=1))


def test_fused_step_equals_the_objectives_apart(batch):
    z, delta, n, r = (a.float() for a in batch)
    F, g = Toy(), Toy()
    P = 40
    average, G, N, online = fmd.both(F, gaussian_velocity, g, z, delta[:P], n[P:], r[P:])
    average_G, G2 = fmd.prediction(F, gaussian_velocity, z[:P], delta[:P])
    average_N, N2, online2 = fmd.correction(F, gaussian_velocity, g, z[P:], n[P:], r[P:])
    for a, b in ((average, torch.cat([average_G, average_N])), (G, G2), (N, N2), (online, online2)):
        assert torch.allclose(a, b, atol=1e-6)
    for a, b in ((average, torch.cat([average_G, average_N])),):
        grads = [
            torch.autograd.grad(fmd.student_loss(x, G, N)[0], list(F.parameters()), retain_graph=True)
            for x in (a, b)
        ]
        assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(*grads))
    assert not G.requires_grad and not N.requires_grad  # stop-gradients
    for loss in (online, online2):  # g's loss moves g, never the student
        assert all(p is None for p in torch.autograd.grad(loss, list(F.parameters()), allow_unused=True))


def test_training_from_the_prior_alone_reaches_the_closed_form_flow_map():
    F, g = Toy(), Toy()
    opts = [torch.optim.Adam(net.parameters(), betas=(0.9, 0.99)) for net in (F, g)]
    steps = 1000
    for step in range(steps):
        for opt in opts:
            opt.param_groups[0]["lr"] = 5e-3 * min(1, 2 * (1 - step / steps))
        gen = torch.Generator().manual_seed(step)
        z, n = torch.randn(256, 2, generator=gen), torch.randn(64, 2, generator=gen)
        delta, r = torch.rand(192, generator=gen), torch.sigmoid(0.8 + torch.randn(64, generator=gen))
        average, G, N, online = fmd.both(F, gaussian_velocity, g, z, delta, n, r)
        for opt, loss in zip(opts, (fmd.student_loss(average, G, N, k=0.0)[0], online)):
            opt.zero_grad()
            loss.backward()
            opt.step()
    z = torch.randn(2000, 2, generator=torch.Generator().manual_seed(99))
    for d in (0.3, 0.7, 1.0):
        delta = torch.full((2000,), d)
        error = (fmd.flow_map(F, z, delta) - gaussian_map(z, delta)).norm(dim=1).mean()
        assert error < 0.04, (d, error)
    x = fmd.flow_map(F, z, torch.ones(2000))
    assert (x.mean(0) - M).abs().max() < 0.04 and (x.std(0) - S).abs().max() < 0.04


def test_guidance_and_interval():
    x, y = torch.randn(5, 3, 4, 4), torch.arange(5)
    t, gamma = torch.tensor([0.0, 0.3, 0.5, 0.7, 1.0]), torch.tensor([2.0, 2.0, 0.5, 1.0, 3.0])

    def velocity(x, t, y):
        return x * fmd.expand(1.0 + y, x) + fmd.expand(t, x)

    got = fmd.guided(velocity, x, t, y, gamma, null=7)
    null = velocity(x, t, torch.full_like(y, 7))
    assert torch.allclose(got, null + fmd.expand(gamma, x) * (velocity(x, t, y) - null))  # on every channel
    assert torch.allclose(got[3], velocity(x, t, y)[3], atol=1e-5)  # γ = 1 is no guidance
    assert fmd.guidance_within(gamma, t, 0.3, 0.5).tolist() == [1, 2, 0.5, 1, 1]


def test_draws_do_not_depend_on_the_world_size():
    s = fmd.Settings(batch=32)
    for part in ("prediction", "correction"):
        whole = fmd.prior((1, 4, 4), 10, s, 3, part)
        for world in (2, 4, 8):
            parts = [fmd.prior((1, 4, 4), 10, s, 3, part, rank, world) for rank in range(world)]
            assert all(torch.equal(whole[k], torch.cat([p[k] for p in parts])) for k in whole)
        other = fmd.prior((1, 4, 4), 10, s, 4, part)
        assert not any(torch.equal(whole[k], other[k]) for k in whole)
    big = fmd.prior((1,), 10, fmd.Settings(batch=40000, gamma=(1.0, 3.0)), 0, "correction")
    logit = torch.logit(big["r"].double())
    assert abs(logit.mean() - 0.8) < 0.05 and abs(logit.std() - 1) < 0.05
    assert big["gamma"].min() >= 1 and big["gamma"].max() <= 3 and abs(big["gamma"].mean() - 2) < 0.03
    assert set(big["y"].tolist()) == set(range(10))
    assert not torch.equal(big["z"], big["n"])


# -----------------------------------------------------------------------------------------------------------
# sit.py
# -----------------------------------------------------------------------------------------------------------


def tiny(**extra):
    """A small SiT with every weight random, so that no path through it is zero."""
    torch.manual_seed(0)
    net = sit.SiT(**{**dict(shape=(2, 8, 8), depth=2, width=32, heads=4, patch=2, classes=5), **extra})
    for p in net.parameters():
        p.data.add_(0.2 * torch.randn_like(p)) if p.requires_grad else None
    return net


def test_shapes_in_the_comments_of_forward():
    net = tiny(dt=True, gw=True, learn_sigma=True)
    B, C, H, W, T, D, p = 3, 2, 8, 8, 16, 32, 2
    seen = {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, tuple(o.shape)))
    out = net(
        torch.randn(B, C, H, W),
        torch.rand(B),
        torch.zeros(B, dtype=torch.long),
        torch.rand(B),
        torch.rand(B),
    )
    for name in ("t_embedder", "y_embedder", "dt_embedder", "gw_embedder"):
        assert seen[name] == (B, D)
    for name in ("x_embedder", "blocks.0", "blocks.1", "blocks.0.attn", "blocks.1.mlp"):
        assert seen[name] == (B, T, D)
    assert seen["blocks.0.adaLN_modulation"] == (B, 6 * D) and seen["final_layer.adaLN_modulation"] == (
        B,
        2 * D,
    )
    assert seen["final_layer"] == (B, T, p * p * 2 * C)
    assert net.unpatchify(torch.randn(B, T, p * p * 2 * C)).shape == (B, 2 * C, H, W)
    assert out.shape == (B, C, H, W)


def test_attention_equals_torch_multihead_attention():
    attention = tiny().blocks[0].attn
    oracle = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    oracle.in_proj_weight.data, oracle.in_proj_bias.data = (
        attention.qkv.weight.data,
        attention.qkv.bias.data,
    )
    oracle.out_proj.weight.data, oracle.out_proj.bias.data = (
        attention.proj.weight.data,
        attention.proj.bias.data,
    )
    x = torch.randn(3, 16, 32)
    assert (attention(x) - oracle(x, x, x)[0]).abs().max() < 1e-5


def test_forward_against_a_second_writing():
    """The whole network from its state dict alone, token by token, in plain functions."""
    net = tiny(dt=True, gw=True)
    w, D, heads, p = net.state_dict(), 32, 4, 2
    x, t, y, dt, gw = (
        torch.randn(2, 2, 8, 8),
        torch.rand(2),
        torch.tensor([1, 5]),
        torch.rand(2),
        1 + torch.rand(2),
    )

    def linear(h, name):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def embed(value, name):
        args = torch.stack([value * math.exp(-math.log(10000) * i / 128) for i in range(128)], dim=1)
        return linear(
            nnf.silu(linear(torch.cat([args.cos(), args.sin()], 1), f"{name}.mlp.0")), f"{name}.mlp.2"
        )

    def norm(h):
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    c = sum(embed(v, f"{k}_embedder") for v, k in ((t, "t"), (dt, "dt"), (gw, "gw")))
    c = c + w["y_embedder.embedding_table.weight"][y]
    kernel = w["x_embedder.proj.weight"].reshape(D, -1)
    h = (
        torch.stack(
            [
                torch.stack(
                    [
                        kernel @ x[b, :, i : i + p, j : j + p].reshape(-1)
                        for i in range(0, 8, p)
                        for j in range(0, 8, p)
                    ]
                )
                for b in range(2)
            ]
        )
        + w["x_embedder.proj.bias"]
    )
    position = torch.zeros(16, D)
    for token in range(16):
        for axis, place in enumerate((token % 4, token // 4)):  # the column in the first half: "w first"
            for i in range(D // 4):
                angle = place / 10000 ** (i / (D // 4))
                position[token, axis * D // 2 + i] = math.sin(angle)
                position[token, axis * D // 2 + D // 4 + i] = math.cos(angle)
    assert torch.allclose(w["pos_embed"][0], position, atol=1e-6)
    h = h + position
    for b in range(2):
        a = linear(nnf.silu(c), f"blocks.{b}.adaLN_modulation.1")[:, None].split(D, dim=-1)
        q, k, v = linear(norm(h) * (1 + a[1]) + a[0], f"blocks.{b}.attn.qkv").split(D, dim=-1)
        heads_out = []
        for i in range(heads):
            part = slice(i * D // heads, (i + 1) * D // heads)
            score = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(D // heads)
            heads_out.append(score.softmax(-1) @ v[..., part])
        h = h + a[2] * linear(torch.cat(heads_out, -1), f"blocks.{b}.attn.proj")
        hidden = linear(norm(h) * (1 + a[4]) + a[3], f"blocks.{b}.mlp.fc1")
        hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        h = h + a[5] * linear(hidden, f"blocks.{b}.mlp.fc2")
    shift, scale = linear(nnf.silu(c), "final_layer.adaLN_modulation.1")[:, None].split(D, dim=-1)
    h = linear(norm(h) * (1 + scale) + shift, "final_layer.linear")
    want = torch.zeros(2, 2, 8, 8)
    for token in range(16):
        i, j = p * (token // 4), p * (token % 4)
        want[:, :, i : i + p, j : j + p] = h[:, token].reshape(2, p, p, 2).permute(0, 3, 1, 2)
    assert (net(x, t, y, dt, gw) - want).abs().max() < 2e-5 * want.abs().max()


def test_jvp_of_the_network_equals_finite_difference():
    net = tiny(dt=True, gw=True).double()
    z, y = torch.randn(4, 2, 8, 8).double(), torch.arange(4)
    F = fmd.student_of(fmd.velocity_of(net, "sit"), y, torch.ones(4).double())
    delta = torch.tensor([0.1, 0.4, 0.7, 1.0]).double()
    exact = fmd.duration_derivative(F, z, delta, None)
    with torch.no_grad():
        central = (F(z, delta + 3e-3) - F(z, delta - 3e-3)) / 6e-3
        coarse = fmd.duration_derivative(F, z, delta, F(z, delta), "fd", 1e-3)
    assert exact.abs().max() > 1e-2 and not exact.requires_grad
    assert (exact - central).abs().max() < 2e-3 * exact.abs().max()
    assert (exact - coarse).abs().max() < 2e-2 * exact.abs().max()


@pytest.mark.parametrize(
    "size, patch, millions", [("S", 2, 33), ("B", 4, 131), ("L", 2, 458), ("XL", 2, 675)]
)
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


@pytest.mark.parametrize("extra", [{}, dict(learn_sigma=True), dict(dt=True, gw=True), dict(gw=True)])
def test_a_network_from_its_weights_alone(extra, tmp_path):
    net = tiny(**extra)
    inputs = torch.randn(2, 2, 8, 8), torch.rand(2), torch.tensor([0, 5]), torch.rand(2), torch.rand(2)
    released = sit.released_names(net.state_dict())
    assert any(".projs." in k for k in released) == ("dt" in extra)
    for state in (net.state_dict(), released, {**released, "projectors.0.weight": torch.zeros(3)}):
        again = sit.from_state_dict(state, heads=4)
        assert again.config == net.config and torch.equal(again(*inputs), net(*inputs))
    torch.save(released, tmp_path / "raw.pt")
    with pytest.raises(ValueError, match="raw.pt: cannot tell the heads"):
        sit.load(tmp_path / "raw.pt")
    torch.save(
        {"ema": {**released, "projectors.0.weight": torch.zeros(3)}, "config": net.config},
        tmp_path / "ema.pt",
    )
    again, info = sit.load(tmp_path / "ema.pt")
    assert torch.equal(again(*inputs), net(*inputs)) and info["convention"] == "repa"


def test_embedders_start_silent_and_students_start_as_their_teacher():
    teacher = tiny(learn_sigma=True)
    student = fmd.relative(teacher, dt=True, gw=True)
    z, y, o = torch.randn(3, 2, 8, 8), torch.tensor([0, 1, 5]), torch.ones(3)
    u = fmd.velocity_of(teacher, "sit")(z, o, y)
    parts = fmd.build(teacher, fmd.Settings())
    assert all(
        torch.equal(v, parts["ema"].state_dict()[k]) for k, v in parts["student"].state_dict().items()
    )
    student, online = (fmd.velocity_of(n, "sit") for n in (student, fmd.relative(teacher, gw=True)))
    assert torch.allclose(fmd.student_of(student, y, 1.7 * o)(z, 0.3 * o), u, atol=1e-6)
    assert torch.allclose(fmd.online_of(online, y, o)(z, o), u, atol=1e-6)


def test_conventions_agree():
    """The same flow written down both ways, SiT's and REPA's, is the same velocity."""

    def sit_net(x, s, y):  # s = 1 - t, output x0 - n
        return gaussian_velocity(x, 1 - s)

    def repa_net(x, t, y):  # t, output n - x0
        return -gaussian_velocity(x, t)

    x, t = torch.randn(6, 2), torch.rand(6)
    for net, convention in ((sit_net, "sit"), (repa_net, "repa")):
        assert torch.equal(fmd.velocity_of(net, convention)(x, t, None), gaussian_velocity(x, t))


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_hostile_and_damaged_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = tiny().state_dict()
    cases = {
        "bomb": {"ema": Bomb()},
        "list": [1],
        "missing": {k: v for k, v in good.items() if "fc1" not in k},
        "extra": {**good, "more": torch.zeros(1)},
        "shape": {**good, "final_layer.linear.bias": torch.zeros(3)},
        "nan": {**good, "t_embedder.mlp.0.bias": torch.full((32,), math.nan)},
        "empty": {},
        "int": {**good, "t_embedder.mlp.0.bias": torch.zeros(32, dtype=torch.long)},
        "infinite": {**good, "t_embedder.mlp.0.bias": torch.tensor([-math.inf, *31 * [0.0]])},
        "words": {**good, "x_embedder.proj.weight": "none"},
        "nothing": {**good, "y_embedder.embedding_table.weight": torch.zeros(0, 32)},
    }
    for name, content in cases.items():
        torch.save(
            {"ema": content, "config": {"heads": 4}} if name not in ("list", "bomb") else content,
            f"{name}.pt",
        )
    Path("text.pt").write_text("hello")
    whole = Path("extra.pt").read_bytes()
    Path("cut.pt").write_bytes(whole[: len(whole) // 2])
    Path("pickle.pt").write_bytes(pickle.dumps(Bomb()))
    for name in [*cases, "text", "cut", "pickle", "nowhere"]:
        with pytest.raises(ValueError, match=f"{name}.pt: ") as e:
            sit.load(f"{name}.pt")
        assert "\n" not in str(e.value)
    assert not Path("exploded").exists()
    with pytest.raises(ValueError, match="not a SiT"):
        sit.from_state_dict(cases["words"], heads=4)


def test_a_mapped_file_is_shared_but_never_written(tmp_path):
    """Weights come mapped from the file (SiT's train.py adds its flags); training moves them in memory."""
    net, path = tiny(learn_sigma=True), tmp_path / "train.pt"
    torch.save({"ema": net.state_dict(), "args": argparse.Namespace(model="SiT-XL/2")}, path)
    before = path.read_bytes()
    again, info = sit.load(path, heads=4)
    assert info == {"convention": "sit", "args": argparse.Namespace(model="SiT-XL/2")}
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in net.parameters()]
    with torch.no_grad():
        for p in again.parameters():
            p.add_(1)
    assert path.read_bytes() == before and torch.equal(again.pos_embed, net.pos_embed + 1)


def test_student_has_the_keys_and_shapes_of_the_released_file():
    """XL/2 at 512, key by key. The released FreeFlow_512.pt has 2,717,071,257 bytes: these weights, 4 bytes
    each, and 93 kB of names."""
    depth, D, heads = sit.SIZES["XL"]
    with torch.device("meta"):
        ours = sit.SiT((4, 64, 64), depth, D, heads, 2, 1000, dt=True, gw=True).state_dict()
    table = {"pos_embed": (1, 1024, D), "y_embedder.embedding_table.weight": (1001, D)}

    def add(name, *shape):
        table[f"{name}.weight"], table[f"{name}.bias"] = shape, shape[:1]

    add("x_embedder.proj", D, 4, 2, 2)
    for e in ("t", "dt", "gw"):
        add(f"{e}_embedder.projs.0", D, 256)
        add(f"{e}_embedder.projs.2", D, D)
    for i in range(depth):
        add(f"blocks.{i}.attn.qkv", 3 * D, D)
        add(f"blocks.{i}.attn.proj", D, D)
        add(f"blocks.{i}.mlp.fc1", 4 * D, D)
        add(f"blocks.{i}.mlp.fc2", D, 4 * D)
        add(f"blocks.{i}.adaLN_modulation.1", 6 * D, D)
    add("final_layer.linear", 16, D)
    add("final_layer.adaLN_modulation.1", 2 * D, D)
    released = sit.released_names(ours)
    assert {k: tuple(v.shape) for k, v in released.items()} == table
    assert sum(v.numel() for v in released.values()) == 679_244_560
    back = sit.rename(released, sit.NAMES)
    assert list(back) == list(ours) and all(back[k] is ours[k] for k in ours)


WIDTHS = (64, 32, 64)  # a narrowing level, a widening one, and one group of one channel


def small_decoder():
    torch.manual_seed(0)
    net = sit.Decoder(WIDTHS)
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return net


def test_decoder_against_a_second_writing():
    """The whole decoder from its state dict alone, in plain functions of float64."""
    net = small_decoder().double()
    w = net.state_dict()
    z = 0.2 * torch.randn(2, 4, 3, 5).double()  # not square: rows and columns differ

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
        h = norm(x, f"{name}.group_norm").flatten(2)  # (B, C, HW)
        q, k, v, out = (
            (w[f"{name}.{m}.weight"], w[f"{name}.{m}.bias"][:, None])
            for m in ("to_q", "to_k", "to_v", "to_out.0")
        )
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
    want = conv(silu(norm(h, "decoder.conv_norm_out")), "decoder.conv_out")
    got = net(z)
    assert got.shape == (2, 3, 12, 20) and want.abs().max() > 0.1
    assert (got - want).abs().max() < 1e-10 * want.abs().max()


def test_decoder_has_the_keys_and_shapes_of_the_released_file():
    table = {}

    def add(name, *shape):
        table[f"{name}.weight"], table[f"{name}.bias"] = shape, shape[:1]

    def resnet(name, inputs, outputs):
        add(f"{name}.norm1", inputs)
        add(f"{name}.conv1", outputs, inputs, 3, 3)
        add(f"{name}.norm2", outputs)
        add(f"{name}.conv2", outputs, outputs, 3, 3)
        if inputs != outputs:
            add(f"{name}.conv_shortcut", outputs, inputs, 1, 1)

    add("post_quant_conv", 4, 4, 1, 1)
    add("decoder.conv_in", 512, 4, 3, 3)
    for j in range(2):
        resnet(f"decoder.mid_block.resnets.{j}", 512, 512)
    add("decoder.mid_block.attentions.0.group_norm", 512)
    for m in ("to_q", "to_k", "to_v", "to_out.0"):
        add(f"decoder.mid_block.attentions.0.{m}", 512, 512)
    for i, (before, width) in enumerate([(512, 512), (512, 512), (512, 256), (256, 128)]):
        for j in range(3):
            resnet(f"decoder.up_blocks.{i}.resnets.{j}", before if j == 0 else width, width)
        if i < 3:
            add(f"decoder.up_blocks.{i}.upsamplers.0.conv", width, width, 3, 3)
    add("decoder.conv_norm_out", 128)
    add("decoder.conv_out", 3, 128, 3, 3)
    with torch.device("meta"):
        net = sit.Decoder()
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == table
    assert sum(p.numel() for p in net.parameters()) == 49_490_199  # diffusers' count


def test_decoder_files_old_and_new(tmp_path):
    net = small_decoder()
    path, state, z = tmp_path / "vae.bin", net.state_dict(), torch.randn(1, 4, 4, 4)
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = dict(state)
    for new, name in older.items():
        for kind in ("weight", "bias"):
            value = old.pop(f"decoder.mid_block.attentions.0.{new}.{kind}")
            old[f"decoder.mid_block.attentions.0.{name}.{kind}"] = value
    assert old.keys() != state.keys()
    convs = {k: v[..., None, None] if "attentions.0." in k and v.ndim == 2 else v for k, v in old.items()}
    extra = {"encoder.conv_in.weight": torch.zeros(3), "quant_conv.bias": torch.zeros(8)}
    for content in (state, old, convs, {**state, **extra}):
        for zipped in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            assert torch.equal(sit.load_decoder(path, WIDTHS)(z), net(z))
    key = "decoder.up_blocks.1.resnets.2.conv1.weight"
    refused = {
        r"missing \['decoder.conv_in.bias'\]": {k: v for k, v in state.items() if "conv_in.b" not in k},
        r"unexpected \['encoders.x'\]": {**state, "encoders.x": torch.zeros(1)},
        r"unexpected \['loss.scale'\]": {**state, "loss.scale": torch.zeros(1)},
        rf"shapes \['{key} \(1, 1\) for \(32, 32, 3, 3\)'\]": {**state, key: torch.zeros(1, 1)},
        rf"not floating point \['{key}'\]": {**state, key: state[key].long()},
        f"not finite: {key}": {**state, key: state[key] + torch.tensor([math.inf, 0, 0])},
        "'list' object has no attribute": [state],
        "has no attribute 'shape'": {**state, "decoder.mid_block.attentions.0.to_q.weight": "none"},
    }
    for message, content in refused.items():
        torch.save(content, path)
        with pytest.raises(ValueError, match=message) as e:
            sit.load_decoder(path, WIDTHS)
        assert str(e.value).startswith(f"{path}: ") and "\n" not in str(e.value)
    with pytest.raises(ValueError, match="vae.safetensors: safetensors files are not read"):
        sit.load_decoder(tmp_path / "vae.safetensors")


def test_fetch(tmp_path, monkeypatch):
    """A path as it is, a URL once, a released name by its own name; no network here but file:// URLs."""
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
        cut = http.client.IncompleteRead(b"")
        raise cut if url.endswith("dl=0") else urllib.error.URLError("Name or service\nnot known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    assert sit.fetch(urls[0]) == first and not calls
    for name, url in sit.RELEASED.items():
        with pytest.raises(ValueError, match=re.escape(f"{name}: cannot download {url} (")) as e:
            sit.fetch(name)
        assert calls[-1][0] == url and str(e.value).endswith(f"); put the file at {calls[-1][1]}")
        assert "\n" not in str(e.value)
    assert len({path for _, path in calls}) == len(sit.RELEASED)
    assert calls[list(sit.RELEASED).index("SiT-XL/2-REPA")][1] == str(cache / "SiT-XL-2-REPA.pt")
    torch.save({"c": torch.ones(3)}, cache / "SiT-XL-2-REPA.pt")  # put there by hand
    assert sit.fetch("SiT-XL/2-REPA") == cache / "SiT-XL-2-REPA.pt"

    def cut_short(url, path):
        Path(path).write_bytes(first.read_bytes()[:-40])

    monkeypatch.setattr(torch.hub, "download_url_to_file", cut_short)
    with pytest.raises(ValueError, match="SiT-S/2: .* cut short"):
        sit.fetch("SiT-S/2")
    assert not (cache / "SiT-S-2.pt").exists()
    with pytest.raises(ValueError, match="SiT-M/2: no such file, nor a released one .SiT-S/2, "):
        sit.fetch("SiT-M/2")


# -----------------------------------------------------------------------------------------------------------
# fid.py
# -----------------------------------------------------------------------------------------------------------


def test_moments_stream_to_numpys_mean_and_covariance():
    rows = np.random.default_rng(0).normal(3, 2, (500, 7))
    moments = fid.Moments(7)
    for part in np.array_split(rows, 9):
        moments.add(part)
    mu, sigma = moments.mean_cov()
    assert np.allclose(mu, rows.mean(0)) and np.allclose(sigma, np.cov(rows, rowvar=False))
    with pytest.raises(ValueError, match="at least 2"):
        fid.Moments(7).mean_cov()


def test_frechet_distance_closed_forms():
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    a, b = rng.uniform(0.1, 3, 6), rng.uniform(0.1, 3, 6)
    mu = np.array([0.5] * 5 + [0])
    for singular in (0, 3, 5, 6):  # commuting covariances, of every rank
        b[:singular] = 0
        want = 5 * 0.25 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
        pair = (np.zeros(6), q @ np.diag(a) @ q.T), (mu, q @ np.diag(b) @ q.T)
        assert fid.frechet_distance(*pair[0], *pair[1]) == pytest.approx(want, rel=1e-12)
        assert fid.frechet_distance(*pair[1], *pair[0]) == pytest.approx(want, rel=1e-12)
    u, v = rng.normal(size=(2, 6))  # rank one each: tr (u u' v v')^1/2 = |u'v|
    want = u @ u + v @ v - 2 * abs(u @ v)
    assert fid.frechet_distance(mu, np.outer(u, u), mu, np.outer(v, v)) == pytest.approx(want, rel=1e-10)
    few = np.cov(rng.normal(size=(4, 6)), rowvar=False)  # fewer rows than dimensions
    assert abs(fid.frechet_distance(mu, few, mu, few)) < 1e-10
    for bad, message in (
        (np.eye(5), "shapes"),
        (np.triu(np.ones((6, 6))), "symmetric"),
        (-np.eye(6), "negative"),
        (np.diag([1, 1, 1, 1, 1, -1e-3]), "negative"),
        (np.full((6, 6), np.nan), "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            fid.frechet_distance(mu, np.eye(6), mu, bad)


@pytest.mark.parametrize("spectrum", [np.geomspace(1e-6, 1, 60), np.repeat([1e-13, 1], 30)])
def test_frechet_distance_keeps_its_digits_at_small_eigenvalues(spectrum):
    rng = np.random.default_rng(1)
    q = np.linalg.qr(rng.normal(size=(60, 60)))[0]
    a, b = spectrum, rng.permutation(spectrum)
    s1, s2, zero = q @ np.diag(a) @ q.T, q @ np.diag(b) @ q.T, np.zeros(60)
    assert fid.frechet_distance(zero, s1, zero, s2) == pytest.approx(
        ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-9
    )
    assert abs(fid.frechet_distance(zero, s1, zero, s1)) < 1e-9


def test_moments_take_tensors_and_one_row_at_a_time():
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)) + 1000  # float32 sums would lose
    moments = fid.Moments(5)
    for row in rows:
        moments.add(row[None])
    assert np.allclose(moments.mean_cov()[1], np.cov(rows.double().numpy(), rowvar=False), rtol=1e-8)


def tf_resize(image, size=299):
    """TensorFlow 1's ResizeBilinear a pixel at a time, in float32 scalars. image (H, W) -> rows, columns
    visited, values."""
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


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (7, 5), (28, 28), (32, 64), (256, 256), (512, 301)])
def test_resize_is_tensorflows_to_the_bit(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    at, want = tf_resize(image)
    got = fid.resize(torch.from_numpy(image)[None, :, :, None])
    assert got.shape == (1, 299, 299, 1) and got.dtype == torch.float32
    assert np.array_equal(got[0, :, :, 0].numpy()[np.ix_(at, at)], want)


def test_resize_leaves_299_alone():
    image = torch.randint(0, 256, (2, 299, 299, 3), dtype=torch.uint8)
    assert torch.equal(fid.resize(image), image.float())


def inception_names():
    """Units in order, from the table of blocks."""
    a = [
        "branch1x1",
        "branch5x5_1",
        "branch5x5_2",
        *(f"branch3x3dbl_{i}" for i in (1, 2, 3)),
        "branch_pool",
    ]
    b = ["branch3x3", *(f"branch3x3dbl_{i}" for i in (1, 2, 3))]
    c = ["branch1x1", *(f"branch7x7_{i}" for i in (1, 2, 3)), *(f"branch7x7dbl_{i}" for i in range(1, 6))]
    d = ["branch3x3_1", "branch3x3_2", *(f"branch7x7x3_{i}" for i in range(1, 5))]
    e = ["branch1x1", *(f"branch3x3_{i}" for i in ("1", "2a", "2b"))]
    e += [*(f"branch3x3dbl_{i}" for i in ("1", "2", "3a", "3b")), "branch_pool"]
    c.append("branch_pool")
    names = [f"Conv2d_{n}" for n in ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")]
    blocks = dict(zip("5b 5c 5d 6a 6b 6c 6d 6e 7a 7b 7c".split(), (a, a, a, b, c, c, c, c, d, e, e)))
    return names + [f"Mixed_{block}.{unit}" for block, units in blocks.items() for unit in units]


def test_inception_has_the_published_files_keys():
    state = fid.inception().state_dict()
    parts = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    want = [f"{unit}.{part}" for unit in inception_names() for part in parts] + ["fc.weight", "fc.bias"]
    got = {k: v for k, v in state.items() if "num_batches" not in k}
    assert set(got) == set(want) and len(want) == 472 and len(state) == 566
    assert sum(v.numel() for v in got.values()) == 23_885_392
    assert sum(v.numel() for v in fid.inception().parameters()) == 23_850_960
    assert got["fc.weight"].shape == (1008, 2048) and got["Mixed_5b.branch_pool.conv.weight"].shape[0] == 32
    assert [got[f"Mixed_6{i}.branch7x7_1.conv.weight"].shape[0] for i in "bcde"] == [128, 160, 160, 192]


@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    """Random weights with batch norms that do something, as a file -> path, state dict."""
    state, g = fid.inception().state_dict(), torch.Generator().manual_seed(1)
    for name, value in state.items():
        if ".bn." in name and "num" not in name:
            draw = torch.rand(value.shape, generator=g)
            state[name] = draw - 0.5 if "bias" in name or "mean" in name else 0.5 + draw
        if name == "fc.bias":
            state[name] = 5 * torch.randn(value.shape, generator=g)
    state = {name: value for name, value in state.items() if "num_batches" not in name}
    path = tmp_path_factory.mktemp("weights") / "lively.pth"
    torch.save(state, path)
    return path, state


def pooled(x, how):
    """3x3 pooling, stride 1, over the pixels that exist: shifts of an array padded with NaN."""
    _, _, h, w = x.shape
    padded = np.pad(x.double().numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=np.nan)
    shifts = [padded[:, :, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return how(np.stack(shifts), axis=0)


def test_features_against_the_unfolded_network_and_its_pools(lively):
    path, state = lively
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)
    images = torch.from_numpy(images)
    net, told = fid.load_inception(path)
    assert told == str(path)
    seen = {}
    plain = fid.inception()
    assert plain.load_state_dict(state, strict=False).unexpected_keys == []
    for name, unit in plain.named_modules():
        if name.endswith("branch_pool"):
            unit.register_forward_pre_hook(lambda m, i, name=name: seen.update({name: i[0]}))
        if name.startswith("Mixed") and "." not in name:
            unit.register_forward_pre_hook(lambda m, i, name=name: seen.update({name: i[0].clone()}))
        if name == "Mixed_6d.branch1x1":
            unit.register_forward_hook(lambda m, i, o: seen.update(conv=o.clone()))
    with torch.no_grad():
        x = (fid.resize(images).permute(0, 3, 1, 2).contiguous() - 128) * 0.0078125
        stem = "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 maxpool1 Conv2d_3b_1x1 Conv2d_4a_3x3 maxpool2"
        for stage in stem.split() + [f"Mixed_{i}" for i in "5b 5c 5d 6a 6b 6c 6d 6e 7a 7b 7c".split()]:
            x = plain.get_submodule(stage)(x)
    pool, spatial = fid.features(net, images)
    scale = x.mean((2, 3)).abs().max()
    assert pool.shape == (2, 2048) and scale > 0.1
    assert (pool - x.mean((2, 3))).abs().max() < 1e-5 * scale
    for block in "5b 5c 5d 6b 6c 6d 6e 7b 7c".split():
        want = pooled(seen[f"Mixed_{block}"], np.nanmax if block == "7c" else np.nanmean)
        assert np.allclose(seen[f"Mixed_{block}.branch_pool"], want, rtol=1e-4, atol=1e-5), block
    conv = seen["conv"]  # (2, 192, 17, 17): channel last, the first seven
    assert spatial.shape == (2, 2023) and conv.shape == (2, 192, 17, 17)
    for y, x_, c in ((0, 0, 0), (0, 0, 6), (0, 1, 0), (1, 0, 0), (16, 16, 6), (3, 11, 2)):
        assert torch.allclose(spatial[:, (y * 17 + x_) * 7 + c], conv[:, c, y, x_], rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fid.features(net, images)[0], pool)  # a caller's autocast stays outside
    assert torch.allclose(fid.features(net, images[:1])[0], pool[:1], rtol=1e-5, atol=1e-6 * scale)


def test_weights_are_checked(lively, tmp_path, monkeypatch):
    path, state = lively
    net = fid.load_inception(path)[0]
    full = {**fid.inception().state_dict(), **state}  # with num_batches_tracked: 566 entries
    cache = tmp_path / "hub/checkpoints" / fid.URL.rsplit("/", 1)[1]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(url, dst, hash_prefix, **_):
        assert url == fid.URL and hash_prefix == fid.SHA256
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ValueError, match="no route") as e:
        fid.load_inception()
    assert all(text in str(e.value) for text in (fid.URL, fid.SHA256, str(cache)))
    torch.save(full, cache)
    with pytest.raises(ValueError, match="its SHA-256 is not"):
        fid.load_inception()
    again, told = fid.load_inception(cache)
    assert told == str(cache)
    assert torch.equal(again.Mixed_7c.branch1x1.conv.bias, net.Mixed_7c.branch1x1.conv.bias)
    monkeypatch.setattr(fid, "SHA256", fid.hashlib.sha256(cache.read_bytes()).hexdigest())
    assert fid.load_inception()[1] == "published"
    torch.save({**state, "AuxLogits.fc.bias": torch.zeros(3)}, tmp_path / "more.pth")
    torch.save(
        {k: v for k, v in state.items() if k != "Mixed_7a.branch3x3_1.bn.bias"}, tmp_path / "less.pth"
    )
    for name in ("more", "less"):
        with pytest.raises(ValueError, match=f"{name}.pth: not the weights of this network"):
            fid.load_inception(tmp_path / f"{name}.pth")


def test_inception_score_by_hand_and_its_order():
    same = torch.randn(1, 12).expand(50, 12)
    assert fid.inception_score(same) == pytest.approx(1, abs=1e-12)
    sure = 1000.0 * torch.eye(12)[torch.arange(60) % 12]  # certain, balanced, and no NaN where p is 0
    assert fid.inception_score(sure) == pytest.approx(12, rel=1e-12)
    by_class = sure[torch.argsort(torch.arange(60) % 12, stable=True)]
    assert fid.inception_score(by_class, split=5) == pytest.approx(1, rel=1e-12)
    assert fid.inception_score(sure, split=12) == pytest.approx(12, rel=1e-12)
    # splits of 5,000 unless told; a short last one counts as much as the others
    logits = 3 * torch.randn(5007, 5, generator=torch.Generator().manual_seed(0))
    p = torch.softmax(logits.double(), 1).numpy()
    parts = [(q * np.log(q / q.mean(0))).sum(1).mean() for q in (p[:5000], p[5000:])]
    assert fid.inception_score(logits) == pytest.approx(np.exp(parts).mean(), rel=1e-10)


@pytest.mark.parametrize("rows", [7, 1000])
def test_precision_recall_by_brute_force_with_ties(rows):
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 7, (60, 2)), rng.integers(3, 9, (45, 2))  # a grid: distances tie all the time

    def d(u, v):
        return ((u - v) ** 2).sum()

    def share(x, centres):
        radii = [
            sorted(d(c, other) for other in centres)[3] for c in centres
        ]  # index 0 is the centre itself
        return np.mean([any(d(u, c) <= r for c, r in zip(centres, radii)) for u in x])

    want = share(a, b), share(b, a)
    assert 0 < want[0] < want[1] < 1 or 0 < want[1] < want[0] < 1
    ta, tb = (torch.from_numpy(x).float() for x in (a, b))
    assert fid.precision_recall(ta, tb, rows=rows) == want
    assert fid.precision_recall(ta, tb, rows=rows, half=True) == want  # small integers are exact in float16
    assert fid.precision_recall(1000 * ta, 1000 * tb, rows=rows, half=True) == want  # overflows: float32
    assert fid.precision_recall(ta, ta) == (1, 1) and fid.precision_recall(ta, ta + 100) == (0, 0)
    with pytest.raises(ValueError, match="more than 3 images"):
        fid.precision_recall(ta[:3], tb)


def test_half_precision_is_half():
    x = 1 + torch.arange(8).float()[:, None] * 2e-4  # one and the same number in float16, almost
    y = x + 1.1e-3
    assert fid.precision_recall(y, x) != fid.precision_recall(y, x, half=True)


# The command, with an Inception of a few numbers: what is tested is all around it


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A folder, an .npz and statistics in the working directory; features that are sums of pixels."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    arrays = rng.integers(0, 256, (12, 6, 5, 3), dtype=np.uint8)
    for i, array in enumerate(arrays):
        path = Path("folder") / ("deep/er" if i > 8 else "") / f"{i:02}.{('png', 'PNG', 'bmp')[i % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    Path("folder/notes.txt").write_text("not an image")
    np.savez("array.npz", arr_0=arrays)
    np.savez("other.npz", arr_0=255 - arrays[::-1] // 2)
    monkeypatch.setattr(fid, "POOL", 6)
    monkeypatch.setattr(fid, "KEYS", {"fid": ("mu", "sigma", 6), "sfid": ("mu_s", "sigma_s", 4)})
    weight = torch.randn(6, 300, generator=torch.Generator().manual_seed(0)) / 20

    def features(net, images):
        x = fid.resize(images, 10).flatten(1)
        return torch.sin(x @ weight.T / 50), torch.cos(x @ weight[:4].T / 50)

    net = torch.nn.Module()
    net.fc = torch.nn.Linear(6, 9)
    net.fc.weight.data = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(fid, "features", features)
    monkeypatch.setattr(fid, "load_inception", lambda weights, device: (net, weights or "published"))
    net.folder = tmp_path
    net.truth = [f.double().numpy() for f in features(net, torch.from_numpy(arrays))]
    return net


def test_evaluate_is_its_parts(images):
    got = fid.evaluate("array.npz", "other.npz", batch=5)
    rows = images.truth[0]
    b = fid.features(None, torch.from_numpy(np.load("other.npz")["arr_0"]))
    for metric, x, y in (("fid", rows, b[0]), ("sfid", images.truth[1], b[1])):
        sides = [(z.mean(0), np.cov(z, rowvar=False)) for z in (x, y.double().numpy())]
        assert got[metric] == pytest.approx(fid.frechet_distance(*sides[0], *sides[1]), rel=1e-6)
    logits = torch.from_numpy(rows).float() @ images.fc.weight.T  # without the bias
    assert got["is"] == pytest.approx(fid.inception_score(logits), rel=1e-6)
    assert (got["precision"], got["recall"]) == fid.precision_recall(torch.from_numpy(rows).float(), b[0])
    assert got["samples"] == {"path": "array.npz", "count": 12, "source": "images read"}


def test_every_input_says_the_same(images):
    arrays = np.load("array.npz")["arr_0"]
    np.savez_compressed("packed.npz", arr_0=arrays, arr_1=np.arange(12))
    np.savez("floats.npz", arr_0=arrays.astype(np.float32) / 127.5 - 1)
    for path, span in (("folder", None), ("packed.npz", None), ("floats.npz", (-1, 1))):
        got = fid.evaluate(path, "array.npz", batch=5, span=span, workers=0)
        assert abs(got["fid"]) < 1e-9 and abs(got["sfid"]) < 1e-9 and got["precision"] == 1, path
        assert got["samples"]["count"] == 12
        side = fid.open_side(path, span)
        batches = list(side.batches(5, 0, 1, 0))
        assert [start for start, _ in batches] == [0, 5, 10]
        assert torch.equal(torch.cat([x for _, x in batches]), torch.from_numpy(arrays))
        shares = [list(side.batches(5, rank, 2, 0)) for rank in (0, 1)]  # of two processes
        assert [[start for start, _ in share] for share in shares] == [[0, 10], [5]]


def test_grey_palette_alpha_and_mixed_sizes(images):
    rng = np.random.default_rng(1)
    grey = rng.integers(0, 256, (4, 6, 5), dtype=np.uint8)
    np.savez("grey.npz", arr_0=grey[..., None])
    Path("odd").mkdir()
    for i, array in enumerate(grey):
        Image.fromarray(array).save(f"odd/{i}.png")
    want = torch.from_numpy(grey)[..., None].expand(4, 6, 5, 3)
    assert torch.equal(next(fid.open_side("grey.npz").batches(9, 0, 1, 0))[1], want)
    assert torch.equal(next(fid.open_side("odd").batches(9, 0, 1, 0))[1], want)
    rgb = rng.integers(0, 256, (7, 3, 3), dtype=np.uint8)
    Image.fromarray(np.dstack([rgb, np.zeros((7, 3), np.uint8)])).save("odd/4.png")  # transparent
    Image.fromarray(grey[0]).convert("P").save("odd/5.png")
    ((_, got),) = fid.open_side("odd").batches(9, 0, 1, 2)  # in worker processes
    assert torch.equal(got[4], fid.resize(torch.from_numpy(rgb)[None])[0])
    assert torch.equal(got[5], fid.resize(want[:1])[0]) and torch.equal(got[:4], fid.resize(want))


def test_statistics_instead_of_images(images, capsys, monkeypatch):
    assert fid.main(["other.npz", "--save-stats", "stats.npz"]) == 0
    whole = fid.evaluate("array.npz", "other.npz")
    got = fid.evaluate("array.npz", "stats.npz")  # all that the two allow
    assert got["reference"] == {"path": "stats.npz", "count": 12, "source": "statistics in the file"}
    assert {"fid", "sfid", "is"} <= set(got) and "precision" not in got
    for metric in ("fid", "sfid", "is"):
        assert got[metric] == pytest.approx(whole[metric], rel=1e-12)
    stats = dict(np.load("stats.npz"))
    np.savez("adm.npz", arr_0=np.load("other.npz")["arr_0"], **stats, mu_clip=np.zeros(3))
    calls, real = [], fid.array_batches
    monkeypatch.setattr(fid, "array_batches", lambda path, *a: calls.append(path.name) or real(path, *a))
    got = fid.evaluate(
        "array.npz", "adm.npz", ["fid", "sfid", "is"]
    )  # images of the reference are not read
    assert calls == ["array.npz"] and any("are of 50000" in note for note in got["notes"])
    got = fid.evaluate("array.npz", "adm.npz", ["pr"])
    assert calls == ["array.npz"] * 2 + ["adm.npz"]
    assert got["recall"] == whole["recall"] and got["reference"]["count"] == 12
    assert not any("50000" in note for note in fid.evaluate("array.npz", "stats.npz")["notes"])


def test_report_and_notes(images, capsys):
    assert fid.main(["folder", "other.npz", "--json", "--weights", "random", "--workers", "1"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["samples"] == {"path": "folder", "count": 12, "source": "images read"}
    assert "THE NUMBERS ARE MEANINGLESS" in err and "12 images are few" in err
    assert report["weights"] == "random"
    assert fid.main(["folder", "other.npz", "--metrics", "fid,pr"]) == 0
    out, err = capsys.readouterr()
    assert re.search(rf"fid +{report['fid']:.5f}\nprecision +{report['precision']:.5f}\nrecall", out)
    assert "folder: 12 images" in out and "MEANINGLESS" not in err
    many = np.repeat(np.array([0, 120], np.uint8), 5000)  # two classes, one after the other and in turn
    for array, sorted_ in ((many, True), (many.reshape(2, 5000).T.ravel(), False)):
        np.savez("many.npz", arr_0=array[:, None, None, None])
        notes = fid.evaluate("many.npz", metrics=["is"])["notes"]
        assert any("sorted by class" in note for note in notes) == sorted_
        assert not any("few" in note for note in notes)


def test_fid_write_keeps_the_old_file(tmp_path):
    def fail(f):
        f.write(b"half")
        raise OSError(28, "No space left on device")

    path = tmp_path / "a"
    fid.write(path, lambda f: f.write(b"whole"))
    with pytest.raises(OSError):
        fid.write(path, fail)
    assert path.read_bytes() == b"whole" and list(tmp_path.iterdir()) == [path]


BAD_FID = [
    (["gone", "other.npz"], "gone: no such folder or .npz"),
    (["empty", "other.npz"], "empty: no image"),
    (["one", "other.npz"], "one: 1 image.*at least 2"),
    (["corrupt", "other.npz"], "corrupt/1.png: not a readable image"),
    (["deep16", "other.npz"], "deep16/1.png: .*more than 8 bits"),
    (["cut.npz", "other.npz"], "cut.npz: not an .npz, or damaged"),
    (["rotten.npz", "other.npz"], "rotten.npz: not an .npz, or damaged .*CRC"),
    (["text.npz", "other.npz"], "text.npz: not an .npz"),
    (["array.npz", "keys.npz"], "keys.npz: holds latents; need arr_0"),
    (["object.npz", "other.npz"], "object.npz: arr_0 is object"),
    (["nchw.npz", "other.npz"], r"nchw.npz: arr_0 is \(4, 3, 8, 8\); need N x H x W x 3"),
    (["flat.npz", "other.npz"], "flat.npz: arr_0 is .4, 8, 8."),
    (["none.npz", "other.npz"], "none.npz: no image"),
    (["single.npz", "other.npz"], "single.npz: 1 image"),
    (["columns.npz", "other.npz"], "columns.npz: arr_0 is stored in column order"),
    (["floats.npz", "other.npz"], "floats.npz: arr_0 is float32; need uint8, or floats with --range"),
    (["floats.npz", "other.npz", "--range", "0", "0.5"], "floats.npz: .*outside --range 0 0.5"),
    (["nan.npz", "other.npz", "--range", "0", "1"], "nan.npz: arr_0 has NaN"),
    (["array.npz", "other.npz", "--range", "1", "0"], "--range 1.0 0.0: must be LOW HIGH"),
    (["array.npz", "dims.npz"], r"dims.npz: mu \(5,\), sigma \(5, 5\): need 6"),
    (["array.npz", "skew.npz"], "skew.npz: covariance is not symmetric"),
    (["array.npz", "negative.npz"], "negative.npz: covariance has a negative eigenvalue"),
    (["array.npz", "nanstats.npz"], "nanstats.npz: covariance is not symmetric, or not finite"),
    (
        ["array.npz", "stats.npz", "--metrics", "sfid"],
        "--metrics sfid: stats.npz has no mu_s and sigma_s",
    ),
    (["array.npz", "stats.npz", "--metrics", "fid,pr"], "--metrics pr: stats.npz has no images"),
    (["array.npz", "other.npz", "--metrics", "kid"], "--metrics kid: choose from fid,sfid,is,pr"),
    (["array.npz", "--metrics", "fid"], "--metrics fid: needs a REFERENCE"),
    (["array.npz"], "nothing to compute"),
    (["few.npz", "other.npz", "--metrics", "pr"], "need more than 3 images"),
    (["array.npz", "other.npz", "--batch", "0"], "--batch 0: must be at least 1"),
    (["array.npz", "other.npz", "--workers", "-1"], "--workers -1"),
    (["array.npz", "other.npz", "--device", "tpu"], "--device tpu: choose"),
    (["array.npz", "other.npz", "--device", "cuda:99"], "--device cuda:99: not here"),
    (["array.npz", "other.npz", "--device", "cuda:x"], "--device cuda:x: choose"),
    (["array.npz", "other.npz", "--save-stats", "no/x.npz"], "--save-stats no/x.npz: not a file in an"),
    (
        ["stats.npz", "other.npz", "--save-stats", "x.npz"],
        "--save-stats x.npz: stats.npz holds statistics",
    ),
    (["array.npz", "other.npz", "--metric", "fid"], "unrecognized arguments: --metric"),
    ([], "required: SAMPLES"),
    (["array.npz", "other.npz", "--weights", "gone.pth"], "--weights gone.pth: .*No such file"),
    (["array.npz", "other.npz", "--weights", "text.npz"], "--weights text.npz: not the weights of"),
]


@pytest.mark.parametrize("args, message", BAD_FID, ids=[" ".join(args) for args, _ in BAD_FID])
def test_bad_input_to_fid_gets_one_line_and_exit_code_2(images, capsys, monkeypatch, args, message):
    arrays, eye = np.load("array.npz")["arr_0"], np.eye(6)
    for name, values in {
        "keys": dict(latents=arrays),
        "object": dict(arr_0=np.array([[[[None]]]])),
        "nchw": dict(arr_0=np.zeros((4, 3, 8, 8), np.uint8)),
        "none": dict(arr_0=arrays[:0]),
        "flat": dict(arr_0=np.zeros((4, 8, 8), np.uint8)),
        "single": dict(arr_0=arrays[:1]),
        "columns": dict(arr_0=np.asfortranarray(arrays)),
        "few": dict(arr_0=arrays[:3]),
        "floats": dict(arr_0=(arrays / 255).astype(np.float32)),
        "cut": dict(arr_0=arrays),
        "rotten": dict(arr_0=arrays),
        "nan": dict(arr_0=np.full((4, 2, 2, 3), np.nan)),
        "dims": dict(mu=np.zeros(5), sigma=np.eye(5)),
        "stats": dict(mu=np.zeros(6), sigma=eye),
        "skew": dict(mu=np.zeros(6), sigma=eye + np.eye(6, k=1)),
        "negative": dict(mu=np.zeros(6), sigma=-eye),
        "nanstats": dict(mu=np.zeros(6), sigma=eye * np.nan),
    }.items():
        np.savez(f"{name}.npz", **values)
    data = bytearray(Path("cut.npz").read_bytes())
    Path("cut.npz").write_bytes(data[: len(data) // 2])
    data[600] ^= 1  # a bit of a pixel
    Path("rotten.npz").write_bytes(data)
    Path("text.npz").write_text("hello")
    for name, image in (("corrupt", None), ("deep16", Image.fromarray(np.zeros((5, 5), np.uint16)))):
        Path(name).mkdir()
        Image.fromarray(arrays[0]).save(f"{name}/0.png")
        image.save(f"{name}/1.png") if image else Path(f"{name}/1.png").write_bytes(
            Path(f"{name}/0.png").read_bytes()[:60]
        )
    Path("empty").mkdir()
    Path("one").mkdir()
    Image.fromarray(arrays[0]).save("one/0.png")
    if "--weights" in args:
        monkeypatch.undo()
        monkeypatch.chdir(images.folder)
    before = sorted(Path().rglob("*"))
    try:
        code = fid.main(args)
    except SystemExit as e:
        code = e.code
    out, error = capsys.readouterr()
    assert code == 2 and re.search(message, error), error
    assert error.count("\n") == 1 and "Traceback" not in error and out == ""
    assert sorted(Path().rglob("*")) == before


def test_fid_of_two_processes_equals_one(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for i in range(11):  # three batches of three and one of two; sizes differ
        side = (32, 48)[i % 5 == 0]
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, 32, 3), dtype=np.uint8)).save(
            tmp_path / f"a/{i:02}.png"
        )
    np.savez(tmp_path / "b.npz", arr_0=rng.integers(0, 256, (7, 16, 16, 3), dtype=np.uint8))
    (tmp_path / "bad").mkdir()
    for i in range(6):  # the last is met by the second process alone
        Image.new("RGB", (9, 9)).save(tmp_path / f"bad/{i}.png")
    (tmp_path / "bad/5.png").write_bytes(b"hello")
    args = ["b.npz", "--weights", "random", "--batch", "3", "--workers", "0", "--device", "cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}

    def torchrun(*args):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--master_port=29619",
        ]
        return subprocess.run(
            [*command, HERE / "fid.py", *args],
            capture_output=True,
            text=True,
            env=env,
            timeout=200,
            cwd=tmp_path,
        )

    monkeypatch.chdir(tmp_path)
    args += ["--metrics", "fid,is,pr"]
    torch.set_num_threads(1)  # as torchrun's: oneDNN rounds by the number of threads
    try:
        assert fid.main(["a", *args, "--json", "--save-stats", "one.npz"]) == 0
    finally:
        torch.set_num_threads(2)
    two = torchrun("a", *args, "--json", "--save-stats", "two.npz")
    assert two.returncode == 0, two.stderr[-2000:]
    one, two = json.loads(capsys.readouterr().out), json.loads(two.stdout)
    for metric in ("fid", "is", "precision", "recall"):
        assert one[metric] == pytest.approx(two[metric], rel=1e-9), metric
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert one["count"] == two["count"] == 11
    for key in ("mu", "sigma", "mu_s", "sigma_s"):
        assert np.abs(one[key] - two[key]).max() <= 1e-9 * np.abs(one[key]).max(), key
    bad = torchrun("bad", *args)
    assert bad.returncode and bad.stderr.count("fid.py: bad/5.png: not a readable image") == 1


# -----------------------------------------------------------------------------------------------------------
# The command line, in miniature: a tiny random teacher, a handful of steps
# -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_teacher()
    return tmp_path


def small_teacher():
    net = tiny(shape=(1, 8, 8), classes=10)
    for p in net.parameters():
        p.data.mul_(0.5) if p.requires_grad else None  # tame: a random velocity should not explode
    torch.save({"ema": net.state_dict(), "config": net.config, "convention": "sit"}, "teacher.pt")


SMALL = [
    "--teacher",
    "teacher.pt",
    "--batch",
    "8",
    "--eval-samples",
    "12",
    "--log-every",
    "1",
    "--device",
    "cpu",
]


def run(*args):
    return fmd.main([str(a) for a in args])


def weights(path):
    ckpt = torch.load(path, weights_only=True)
    return {f"{net}.{k}": v for net in ("student", "ema", "online") for k, v in ckpt[net].items()}


def test_main_job_writes_what_it_says(work, capsys):
    assert run(*SMALL, "--steps", 4, "--eval-every", 2, "--out", "o") == 0
    out = capsys.readouterr().out
    assert sorted(p.name for p in Path("o").iterdir()) == [
        "ckpt.pt",
        "metrics.jsonl",
        "path.png",
        "samples.png",
        "student.pt",
    ]
    for name in ("teacher, Heun 16", "student  ", "NFE", "endpoint error", "Next: python fmd.py"):
        assert name in out
    lines = [json.loads(line) for line in Path("o/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(
        {"prediction", "correction", "online", "lambda", "student_grad_norm", "images_per_s"} <= set(line)
        for line in lines
    )
    assert [("endpoint_error" in line, "frechet" in line) for line in lines] == [
        (False, False),
        (True, True),
    ] * 2
    assert Image.open("o/samples.png").size[1] == 4 * 18 and Image.open("o/path.png").size[1] == 18 + 6 * 18
    net, info = sit.load("o/student.pt")
    assert (
        info["convention"] == "sit"
        and info["gamma"] == [1.0, 2.0]
        and net.config["dt"]
        and net.config["gw"]
    )
    ema = {k[4:]: v for k, v in weights("o/ckpt.pt").items() if k.startswith("ema.")}
    assert all(torch.equal(v, ema[k]) for k, v in net.state_dict().items())
    assert not torch.equal(
        ema["blocks.0.mlp.fc1.weight"], torch.load("teacher.pt")["ema"]["blocks.0.mlp.fc1.weight"]
    )


@pytest.mark.parametrize(
    "extra",
    [
        ["--correction", 0],
        ["--correction", 1],
        ["--derivative", "jvp"],
        ["--derivative", "fd"],
        ["--k", 0],
        ["--alpha", 3],
        ["--cut", 1],
        ["--gamma", 1, 1],
        ["--interval", 0.2, 0.8],
        ["--ema", 0, "--warmup", 0, "--decay-from", 1, "--clip", 9],
    ],
)
def test_every_setting_trains(work, extra):
    assert run(*SMALL, "--steps", 2, *extra) == 0
    line = json.loads(Path("out/28/metrics.jsonl").read_text().splitlines()[-1])
    assert ("prediction" in line) == (extra != ["--correction", 1]) and ("correction" in line) == (
        extra != ["--correction", 0]
    )


def test_interrupted_and_resumed_equals_uninterrupted(work, monkeypatch):
    assert run(*SMALL, "--steps", 4, "--ckpt-every", 2, "--out", "whole") == 0
    real, calls = fmd.batch_losses, []

    def stop(*a):  # dies in step 4, after the checkpoint of step 2
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*a)

    monkeypatch.setattr(fmd, "batch_losses", stop)
    with pytest.raises(KeyboardInterrupt):
        run(*SMALL, "--steps", 4, "--ckpt-every", 2, "--out", "cut")
    monkeypatch.setattr(fmd, "batch_losses", real)
    assert run(*SMALL, "--steps", 4, "--ckpt-every", 2, "--out", "cut") == 0
    a, b = weights("whole/ckpt.pt"), weights("cut/ckpt.pt")
    assert all(torch.equal(a[k], b[k]) for k in a)
    steps = [json.loads(line)["step"] for line in Path("cut/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_resume_refuses_other_mathematics(work, capsys):
    assert run(*SMALL, "--steps", 1, "--out", "o") == 0
    before = Path("o/ckpt.pt").read_bytes()
    assert run(*SMALL, "--steps", 2, "--out", "o", "--alpha", 2, "--k", 0) == 2
    error = capsys.readouterr().err
    assert "alpha 1.0 there, 2.0 here" in error and "k 0.5 there, 0.0 here" in error and "--out" in error
    assert Path("o/ckpt.pt").read_bytes() == before


def test_non_finite_stops_before_the_optimiser(work, capsys, monkeypatch):
    assert run(*SMALL, "--steps", 1, "--ckpt-every", 1, "--out", "o") == 0
    before = Path("o/ckpt.pt").read_bytes()
    real = fmd.guided
    monkeypatch.setattr(fmd, "guided", lambda *a: real(*a) * math.nan)
    assert run(*SMALL, "--steps", 3, "--ckpt-every", 1, "--out", "o") == 1
    error = capsys.readouterr().err
    assert "prediction is nan at step 2" in error and error.count("\n") == 1
    assert Path("o/ckpt.pt").read_bytes() == before


def test_sampling_commands(work, capsys):
    assert run(*SMALL, "--steps", 1, "--out", "o") == 0
    capsys.readouterr()
    common = ["--teacher", "teacher.pt", "--device", "cpu"]
    assert run(*common, "--sample", 70, "--ckpt", "o/student.pt", "--out", "s") == 0
    assert "70 samples of o/student.pt, 1 NFE" in capsys.readouterr().out
    many = np.load("s/samples.npz")
    assert many["arr_0"].shape == (70, 8, 8, 1) and many["arr_0"].dtype == np.uint8
    assert many["arr_1"].tolist() == [i % 10 for i in range(70)]
    assert Image.open("s/samples-grid.png").size[0] > 160
    assert run(*common, "--sample", 3, "--ckpt", "o/student.pt", "--out", "few") == 0
    few = np.load("few/samples.npz")["arr_0"]
    assert np.array_equal(few, many["arr_0"][:3])  # sample i depends on the seed and i alone
    assert run(*common, "--sample", 3, "--ckpt", "o/student.pt", "--out", "few", "--seed", 1) == 0
    assert not np.array_equal(np.load("few/samples.npz")["arr_0"], few)
    capsys.readouterr()
    assert (
        run(
            *common,
            "--sample",
            3,
            "--ckpt",
            "o/student.pt",
            "--out",
            "few",
            "--guidance",
            5,
            "--labels",
            "3-4",
        )
        == 0
    )
    assert np.load("few/samples.npz")["arr_1"].tolist() == [3, 4, 3]
    assert "outside the range" in capsys.readouterr().out
    for extra, nfe in ((["--solver", "euler", "--guidance", 1], 3), (["--solver", "heun"], 12)):
        assert run(*common, "--rollout", 4, "--rollout-steps", 3, "--labels", 7, "--out", "r", *extra) == 0
        assert f"{nfe} NFE" in capsys.readouterr().out
        assert np.load("r/rollout.npz")["arr_1"].tolist() == [7] * 4
        assert Path("r/rollout-grid.png").exists()


def test_rollout_command_is_the_rollout(work):
    assert (
        run(
            "--teacher",
            "teacher.pt",
            "--device",
            "cpu",
            "--rollout",
            2,
            "--rollout-steps",
            5,
            "--guidance",
            2,
            "--out",
            "r",
        )
        == 0
    )
    net = sit.load("teacher.pt")[0]
    x, y = fmd.noise(0, range(2), (1, 8, 8)), torch.tensor([0, 1])
    with torch.no_grad():
        for i in range(5):  # Heun by hand, in SiT's own time s = 1 - t

            def u(x, s):
                s = torch.full((2,), s)
                null = net(x, s, torch.full_like(y, 10))
                return null + 2 * (net(x, s, y) - null)

            a = u(x, i / 5)
            x = x + (a + u(x + a / 5, (i + 1) / 5)) / 10
    want = (127.5 * x + 128).clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(np.load("r/rollout.npz")["arr_0"] - want).max() < 1.01


def test_label_score_by_hand():
    """Two labels, Gaussians about +1 and -1: explicit velocities, and the right label scores higher."""
    means = torch.tensor([1.0, -1.0, 0.0])  # of label 0, label 1, and without one

    def velocity(x, t, y):
        return gaussian_velocity(x, t, means[y][:, None], 0.3)

    x, y = torch.tensor([[1.1], [-0.9], [1.1], [0.0]]), torch.tensor([0, 1, 1, 0])
    want = torch.zeros(4)
    for r in (0.4, 0.7):
        n = fmd.noise("score", [r], (1,))
        x_r, t = (1 - r) * x + r * n, torch.full((4,), r)
        miss = [(velocity(x_r, t, label) - (x - n)).square()[:, 0] for label in (y, torch.full_like(y, 2))]
        want += (miss[1] - miss[0]) / 2
    got = fmd.label_score(velocity, 2)(x, y)
    assert torch.allclose(got, want, atol=1e-6)
    assert got[0] > 0.05 > -0.05 > got[2] and got[1] > 0.05


def test_best_of_takes_the_noise_whose_sample_scores_highest():
    def pick(tries, indices):
        z = fmd.noise(3, indices, (2,))
        best = fmd.best_of(tries, lambda z, y: 1 - 2 * z, lambda x, y: -(x - y[:, None]).square().sum(1), 3)
        return best(z, torch.tensor([i % 3 for i in indices]), indices)

    best = pick(6, range(5))
    for i in range(5):
        tried = [fmd.noise(3, [i], (2,))[0], *fmd.noise(3, [f"{i}/{j}" for j in range(1, 6)], (2,))]
        want = min(tried, key=lambda z: (1 - 2 * z - i % 3).square().sum())
        assert torch.equal(best[i], want)
    assert torch.equal(pick(6, [3]), best[3:4]), "depends on its neighbours"
    assert torch.equal(pick(1, range(5)), fmd.noise(3, range(5), (2,)))
    z, y = torch.randn(4, 2), torch.zeros(4)
    for score in (lambda x, y: x[:, :1], lambda x, y: x[:, 0] * math.nan):
        with pytest.raises(ValueError, match=r"want \(4,\), all finite"):
            fmd.best_of(2, lambda z, y: z, score, 0)(z, y, range(4))


def test_search_command(work, capsys):
    student = tiny(shape=(1, 8, 8), classes=10, dt=True, gw=True)
    torch.save({"ema": student.state_dict(), "config": student.config, "convention": "sit"}, "student.pt")
    common = ["--teacher", "teacher.pt", "--device", "cpu", "--rollout", 3, "--rollout-steps", 2]
    Path("bright.py").write_text("def score(x, y):\n    return x.flatten(1).mean(1)\n")
    assert run(*common, "--out", "plain") == 0
    capsys.readouterr()
    assert run(*common, "--out", "one", "--search", 1, "--ckpt", "student.pt") == 0
    assert f" {8 + 1 * 5} NFE" in capsys.readouterr().out
    assert (
        run(*common, "--out", "five", "--search", 6, "--ckpt", "student.pt", "--scorer", "bright.py") == 0
    )
    assert f" {8 + 6 * 1} NFE" in capsys.readouterr().out
    plain, one, five = (np.load(f"{name}/rollout.npz")["arr_0"] for name in ("plain", "one", "five"))
    assert np.array_equal(plain, one) and not np.array_equal(plain, five)
    teacher = sit.load("teacher.pt")[0]
    for i in range(3):
        tried = torch.cat(
            [fmd.noise(0, [i], (1, 8, 8)), fmd.noise(0, [f"{i}/{j}" for j in range(1, 6)], (1, 8, 8))]
        )
        x = fmd.one_step(student, "sit", 1.5)(tried, torch.full((6,), i))
        z = tried[x.clamp(-1, 1).flatten(1).mean(1).argmax()][None]
        want = fmd.to_uint8(fmd.many_steps(teacher, "sit", 1.5, 2, "heun")(z, torch.tensor([i])))[0]
        assert np.abs(want.astype(int) - five[i]).max() <= 1


def test_findings_in_miniature(tmp_path, monkeypatch, capsys):
    """Every table and chart of assets/findings.py comes out, on students of two steps."""
    monkeypatch.syspath_prepend(HERE / "assets")
    import findings

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(findings, "SETTINGS", findings.SETTINGS[-1:])
    real = findings.by_teacher
    monkeypatch.setattr(findings, "by_teacher", lambda steps, *a, **k: real(min(steps, 3), *a, **k))  # faster
    small = "--steps 2 --batch 8 --seeds 2 --samples 12 --images 4 --tries 2 --out o --pictures .".split()
    for what, rows in (
        ("error", 0),
        ("objectives", 6),
        ("settings", 4),
        ("speed", 13),
        ("guidance", 7),
        ("search", 6),
        ("figure", 0),
    ):
        findings.main([what, *small])
        out = capsys.readouterr().out
        assert out.count("\n|") + out.startswith("|") == rows and "nan" not in out, what
    assert sorted(p.name for p in Path("o").iterdir()) == [
        f"{name}-2x8-{seed}"
        for name in ("base", "correction-0", "correction-1", "derivative-jvp")
        for seed in (0, 1)
    ]
    for name in ("error", "speed", "objectives"):
        assert len(Image.open(f"{name}.png").getcolors(1 << 20)) > 5, "an empty picture"


def test_dry_run_writes_nothing(work, capsys):
    before = sorted(Path().rglob("*"))
    assert run(*SMALL, "--dry-run") == 0
    out = capsys.readouterr().out
    assert (
        "r_location" in out
        and "M parameters" in out
        and "out/28" in out
        and sorted(Path().rglob("*")) == before
    )


BAD = [
    (["--res", 27], "--res 27: choose from"),
    (["--batch", 10], "--batch 10: .*multiple of 4"),
    (["--steps", 0], "--steps 0: must be at least 1"),
    (["--gamma", 2, 1], "--gamma 2.0 1.0: must be LOW HIGH"),
    (["--interval", 0.5, 2], "--interval 0.5 2.0"),
    (["--cut", 1.5], "--cut 1.5: must be in"),
    (["--derivative", "exact"], "--derivative exact: choose jvp or fd"),
    (["--correction", 2], "--correction 2.0"),
    (["--alpha", 0], "--alpha 0.0: must be positive"),
    (["--lr", -1], "--lr -1.0"),
    (["--lr", "nan"], "--lr nan"),
    (["--ema", 1], "--ema 1.0"),
    (["--k", -1], "--k -1.0"),
    (["--seed", -1], "--seed -1"),
    (["--r-scale", 0], "--r-scale 0.0"),
    (["--device", "tpu"], "--device tpu"),
    (["--eval-samples", 1], "--eval-samples 1"),
    (["--log-every", 0], "--log-every 0"),
    (["--teacher", "none.pt"], "--teacher .*none.pt: no such file"),
    (["--teacher", "text.pt"], "--teacher .*text.pt: not a checkpoint"),
    (["--out", "text.pt/x"], "--out text.pt/x: cannot write there"),
    (["--lable", 1], "unrecognized arguments: --lable"),
    (["--batch", "many"], "argument --batch: invalid int value: 'many'"),
    (["--sample", 0], "--sample 0: must be at least 1"),
    (["--sample", 1, "--ckpt", "gone.pt"], "--ckpt .*gone.pt: no such file"),
    (["--sample", 1, "--ckpt", "teacher.pt"], "--ckpt teacher.pt: holds a teacher"),
    (["--rollout", 1, "--labels", 10], "--labels 10: .* within 0 to 9"),
    (["--rollout", 1, "--labels", "x"], "--labels x"),
    (["--rollout", 1, "--labels", "5-3"], "--labels 5-3"),
    (["--rollout", 1, "--solver", "rk4"], "--solver rk4: choose"),
    (["--rollout", 1, "--rollout-steps", 0], "--rollout-steps 0"),
    (["--rollout", 1, "--sample", 1], "not both"),
    (["--rollout", 1, "--search", 0], "--search 0: must be at least 1"),
    (["--sample", 1, "--search", 2], "--search 2: goes with --rollout"),
    (["--rollout", 1, "--scorer", "s.py"], "--scorer s.py: goes with --search"),
    (["--rollout", 1, "--ckpt", "student28.pt"], "--ckpt student28.pt: goes with"),
    (["--rollout", 1, "--search", 2, "--ckpt", "gone.pt"], "--ckpt gone.pt: no such file"),
    (["--rollout", 1, "--search", 2, "--ckpt", "other.pt"], "--ckpt other.pt: not a student of --teacher"),
    (
        ["--rollout", 1, "--search", 2, "--ckpt", "student28.pt", "--scorer", "text.pt"],
        r"--scorer text.pt: no score\(x, y\)",
    ),
    (["--rollout", 1, "--guidance", "nan"], "--guidance nan"),
    (["--guidance", 2], "--guidance 2.0: goes with --rollout or --sample"),
    (["--ckpt", "student.pt"], "--ckpt student.pt: goes with"),
    (["--teacher", "odd.pt"], "convention 'edm' is none of"),
    (["--teacher", "SiT-Z/2"], "--teacher SiT-Z/2: no such file, nor a released one"),
    (["--teacher", "random", "--model", "SiT-Q/2"], "--model SiT-Q/2: give SiT-SIZE/PATCH"),
    (["--convention", "edm"], "--convention edm: auto or of"),
    (["--correction", "nan"], "--correction nan: must be in"),
    (["--correction", "inf"], "--correction inf: must be in"),
    (["--gamma", "nan", 1], "--gamma nan 1.0: must be LOW HIGH"),
    (["--gamma", 1], "argument --gamma: expected 2 arguments"),
    (["--micro-batch", 3], "--micro-batch 3: .*multiple of 4"),
    (["--micro-batch", 12], "--micro-batch 12: must divide a process's 64"),
    (["--micro-batch", -4], "--micro-batch -4: must be 0 or more"),
    (["--decay-from", 2], "--decay-from 2.0: must be in"),
    (["--r-location", "inf"], "--r-location inf: must be finite"),
    (["--clip", 0], "--clip 0.0: must be positive"),
    (["--seed", 1.5], "argument --seed: invalid int value: '1.5'"),
    (["--device", "cuda:x"], "--device cuda:x"),
    (["--device", "cuda0"], "--device cuda0: choose"),
    (["--teacher", "random", "--model", "SiT-T/8"], "--model SiT-T/8: 28 is no multiple of 8"),
    (["--k", "inf"], "--k inf: must be"),
    (["--clip", "inf"], "--clip inf: must be positive and finite"),
    (["--teacher", "half.pt"], "--teacher half.pt: holds a student"),
    (["--teacher", "list.pt"], r"--teacher list.pt: convention \['sit'\] is none of"),
    (["--sample", 1, "--ckpt", "gamma.pt"], "--ckpt gamma.pt: gamma 'wide' is not a LOW HIGH"),
    (["--device", "cuda:99"], "--device cuda:99: no such GPU here"),
    (["--teacher", "latent.pt"], r"--teacher latent.pt: works on \(4, 8, 8\), which is not --res 28"),
    (["--res", 256, "--sample", 1, "--ckpt", "student28.pt", "--vae", "random"], "is not --res 256"),
    (["--rollout", 1, "--labels", "1-2-3"], "--labels 1-2-3"),
    (["--rollout", 1, "--inception", "f.pth"], "--inception f.pth: goes with --eval"),
    (["--rollout", 1, "--eval", "gone.npz"], "gone.npz: no such folder or .npz"),
    (
        ["--rollout", 1, "--eval", "ref.npz", "--inception", "text.pt"],
        "--inception text.pt: not the weights",
    ),
    (
        ["--res", 256, "--teacher", "random", "--model", "SiT-T/8", "--vae", "none.bin"],
        "--vae none.bin: no such",
    ),
    (
        ["--res", 256, "--teacher", "random", "--model", "SiT-T/8", "--vae", "text.pt"],
        "--vae text.pt: not a check",
    ),
    (["--sample", 1, "--res", 256, "--vae", "random"], "--ckpt out/256/student.pt: no such file"),
    (["--sample", 1, "--solver", "euler"], "--solver euler: goes with --rollout"),
    (["--sample", 1, "--export", "e.pt"], "--export e.pt: not both: --sample is given"),
    (["--export", "e.pt", "--ckpt", "gone.pt"], "--ckpt gone.pt: no such file"),
    (["--eval", "ref.npz"], "--eval ref.npz: goes with --rollout or --sample"),
    (["--inception", "f.pth"], "--inception f.pth: goes with"),
    (["--sample", 1, "--ckpt", "cut.pt"], "--ckpt cut.pt: not a checkpoint"),
]


@pytest.mark.parametrize("args, message", BAD, ids=[" ".join(map(str, a)) for a, _ in BAD])
def test_bad_input_gets_one_line_and_exit_code_2(work, capsys, args, message):
    Path("text.pt").write_text("hello")
    torch.save({**torch.load("teacher.pt"), "convention": "edm"}, "odd.pt")
    latent = tiny(shape=(4, 8, 8))
    torch.save({"ema": latent.state_dict(), "config": latent.config}, "latent.pt")
    student = tiny(shape=(1, 8, 8), classes=10, dt=True, gw=True)
    torch.save({"ema": student.state_dict(), "config": student.config}, "student28.pt")
    half = tiny(shape=(1, 8, 8), dt=True)
    torch.save({"ema": half.state_dict(), "config": half.config}, "half.pt")
    torch.save({**torch.load("teacher.pt"), "convention": ["sit"]}, "list.pt")
    torch.save({"ema": student.state_dict(), "config": student.config, "gamma": "wide"}, "gamma.pt")
    other = tiny(shape=(1, 16, 16), classes=10, dt=True, gw=True)
    torch.save({"ema": other.state_dict(), "config": other.config}, "other.pt")
    np.savez("ref.npz", arr_0=np.zeros((2, 8, 8, 1), np.uint8))
    Path("cut.pt").write_bytes(Path("teacher.pt").read_bytes()[:3000])
    before = sorted(Path().rglob("*"))
    try:
        code = run("--teacher", "teacher.pt", *args)
    except SystemExit as e:
        code = e.code
    error = capsys.readouterr().err
    assert code == 2 and re.search(message, error), error
    assert error.count("\n") == 1 and "Traceback" not in error
    assert sorted(Path().rglob("*")) == before


# -----------------------------------------------------------------------------------------------------------
# A run that survives: signals, kills, damage, other world sizes
# -----------------------------------------------------------------------------------------------------------


def torchrun(count, *args, script=HERE / "fmd.py", port=29617):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={count}",
        f"--master_port={port}",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(HERE)}
    return subprocess.run(
        [*command, script, *map(str, args)], capture_output=True, text=True, env=env, timeout=200
    )


def states(path):
    """Every tensor of a checkpoint by a name, the optimisers' moments as well."""
    ckpt = torch.load(path, weights_only=True)
    out = {f"{net}.{k}": v for net in ("student", "ema", "online") for k, v in ckpt[net].items()}
    return out | {
        f"{opt}.{i}.{k}": v
        for opt in ("student_opt", "online_opt")
        for i, moments in ckpt[opt]["state"].items()
        for k, v in moments.items()
    }


def same(a, b):
    a, b = states(a), states(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def distance(a, b, networks=("student", "ema", "online")):
    """Relative distance of two checkpoints' networks, each as one vector. (Key biases have no gradient but
    rounding, which Adam blows up to whole steps: tensor by tensor the comparison would be of noise.)"""
    a, b = states(a), states(b)
    out = []
    for net in networks:
        x, y = (torch.cat([v.flatten() for k, v in c.items() if k.startswith(f"{net}.")]) for c in (a, b))
        out.append(((x - y).norm() / x.norm()).item())
    return max(out)


def logged(path):
    return [json.loads(line)["step"] for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize("world", [2, 4])
def test_world_size_does_not_matter(work, world):
    args = [*SMALL, "--steps", 20, "--batch", 16, "--ckpt-every", 10]
    assert run(*args, "--out", "one") == 0
    done = torchrun(world, *args, "--out", "many", "--micro-batch", 4)
    assert done.returncode == 0, done.stderr[-2000:]
    assert distance("one/ckpt.pt", "many/ckpt.pt") < 1e-5
    assert distance("one/ckpt.pt", "one/ckpt.prev.pt") > 1e-3
    assert logged("one/metrics.jsonl") == logged("many/metrics.jsonl") == list(range(1, 21))
    for x, y in zip(*(map(json.loads, open(f"{name}/metrics.jsonl")) for name in ("one", "many"))):
        for k in ("prediction", "correction", "lambda", "online", "student_grad_norm", "online_grad_norm"):
            assert x[k] == pytest.approx(y[k], rel=2e-4, abs=2e-6), (x["step"], k)
    # saved by many processes, carried on by one
    os.replace("many/ckpt.prev.pt", "many/ckpt.pt")  # of step 10
    assert run(*args, "--out", "many") == 0
    assert distance("one/ckpt.pt", "many/ckpt.pt") < 1e-5
    assert logged("many/metrics.jsonl") == list(range(1, 21))


def test_pieces_and_recomputation_change_nothing(work):
    args = [*SMALL, "--steps", 5, "--batch", 16, "--warmup", 0, "--lr", 1e-4, "--online-lr", 1e-4]
    for name, extra in (
        ("plain", []),
        ("other", ["--alpha", 2]),
        ("pieces", ["--micro-batch", 4]),
        ("again", ["--checkpointing"]),
        ("jvp", ["--derivative", "jvp"]),
        ("jvp2", ["--derivative", "jvp", "--micro-batch", 8, "--checkpointing"]),
    ):
        assert run(*args, "--out", name, *extra) == 0
    for one, other in (("plain", "pieces"), ("plain", "again"), ("jvp", "jvp2")):
        assert distance(f"{one}/ckpt.pt", f"{other}/ckpt.pt") < 1e-5
    assert distance("plain/ckpt.pt", "other/ckpt.pt", ["student"]) > 1e-4
    for x, y in zip(*(map(json.loads, open(f"{name}/metrics.jsonl")) for name in ("plain", "pieces"))):
        assert all(x[k] == pytest.approx(y[k], rel=1e-3) for k in x if "norm" in k)  # Adam hides a factor


def test_one_killed_process_ends_the_others(work):
    Path("driver.py").write_text(
        "import os, signal, sys, fmd\n"
        "real = fmd.training_step\n"
        "def step(v, null, parts, s, step, *a):\n"
        "    if step == 2 and os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(v, null, parts, s, step, *a)\n"
        "fmd.training_step = step\n"
        "sys.exit(fmd.main(sys.argv[1:]))\n"
    )
    done = torchrun(
        2, *SMALL, "--steps", 4, "--ckpt-every", 1, "--out", "o", script="driver.py", port=29618
    )
    assert done.returncode != 0 and torch.load("o/ckpt.pt", weights_only=True)["step"] <= 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(work, monkeypatch, capsys, number):
    args = [*SMALL, "--steps", 4, "--ckpt-every", 4]
    assert run(*args, "--out", "whole") == 0
    real = fmd.training_step

    def step(v, null, parts, s, step, *a):
        if step == 1:
            for _ in range(1 + (number == signal.SIGTERM)):  # Slurm and torchrun each send one
                os.kill(os.getpid(), number)
        return real(v, null, parts, s, step, *a)

    monkeypatch.setattr(fmd, "training_step", step)
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    assert run(*args, "--out", "cut") == 0
    assert f"stopped by {number.name} after step 2" in capsys.readouterr().out
    assert torch.load("cut/ckpt.pt", weights_only=True)["step"] == 2
    assert logged("cut/metrics.jsonl") == [1, 2] and not Path("cut/student.pt").exists()
    assert handlers == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
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
fmd.training_step = around(fmd.training_step)
sys.exit(fmd.main(sys.argv[2:]))
"""


def kill_and_rerun(instants, quiet=True):
    """Runs killed at the given events, then run again to the end -> how many equal the uninterrupted one."""
    Path("killed.py").write_text(KILLED)
    env, equal = {**os.environ, "PYTHONPATH": str(HERE)}, 0

    def go(instant, out):
        args = [*SMALL, "--steps", 5, "--ckpt-every", 2, "--out", out]
        return subprocess.run(
            [sys.executable, "killed.py", *map(str, [instant, *args])], env=env, capture_output=True
        ).returncode

    assert go(0, "whole") == 0
    for instant in instants:
        out = f"killed-{instant}"
        assert go(instant, out) == -signal.SIGKILL
        again = go(0, out)
        good = again == 0 and same("whole/ckpt.pt", f"{out}/ckpt.pt")
        good = good and logged(f"{out}/metrics.jsonl") == [1, 2, 3, 4, 5] and not list(Path(out).glob(".*"))
        equal += good
        if not quiet:
            print(f"killed at event {instant:2}, then rerun: {'identical' if good else 'DIFFERENT'}")
    return equal


def test_killed_at_any_instant_and_rerun_equals_uninterrupted(work):
    # in step 3, after the first checkpoint; in the middle of the second one's bytes; between its two renames
    assert kill_and_rerun([20, 24, 30]) == 3


def test_damaged_checkpoints_are_refused_or_load_right(work, capsys):
    assert run(*SMALL, "--steps", 3, "--ckpt-every", 1, "--out", "o") == 0
    good, s = Path("o/ckpt.pt").read_bytes(), fmd.Settings(**{**fmd.PRESETS[28], "out": "o"})
    right, names = states("o/ckpt.pt"), torch.load("o/ckpt.pt", weights_only=True)
    parts, rng = fmd.build(sit.load("teacher.pt")[0], s), np.random.default_rng(0)
    refused = 0
    for i in range(500):
        if i % 3 == 0:  # flip bytes
            data = bytearray(good)
            for at in rng.integers(len(data), size=rng.integers(1, 4)):
                data[at] ^= int(rng.integers(1, 256))
            Path("bad.pt").write_bytes(data)
        elif i % 3 == 1:  # cut
            Path("bad.pt").write_bytes(good[: rng.integers(len(good))])
        else:  # rename, drop or poison a key
            ckpt = copy.deepcopy(names)
            place = ckpt[str(rng.choice(list(parts)))]
            place = (
                place if "state" not in place else place["state"][int(rng.integers(len(place["state"])))]
            )
            key = str(rng.choice([k for k in place if k != "pos_embed"]))
            value, how = place.pop(key), rng.integers(5)
            place |= [
                {},
                {key + "x": value},
                {key: value * math.nan},
                {key: value.double()},
                {key: value.reshape(1, -1)},
            ][how]
            torch.save(ckpt, "bad.pt")
        try:
            fmd.load_checkpoint(Path("bad.pt"), parts)
        except ValueError as e:
            assert "bad.pt: not a checkpoint" in str(e) and "\n" not in str(e)
            refused += 1
        else:
            loaded = {
                f"{n}.{k}": v
                for n in ("student", "ema", "online")
                for k, v in parts[n].state_dict().items()
            }
            assert all(torch.equal(v, right[k]) for k, v in loaded.items())
            for name in ("student_opt", "online_opt"):
                for j, moments in parts[name].state_dict()["state"].items():
                    assert all(torch.equal(v, right[f"{name}.{j}.{k}"]) for k, v in moments.items())
    assert refused > 450


def test_the_previous_checkpoint_stands_in_for_a_damaged_one(work, capsys):
    args = [*SMALL, "--steps", 4, "--ckpt-every", 2]
    assert run(*args, "--out", "o") == 0
    whole = Path("o/ckpt.pt").read_bytes()
    Path("whole.pt").write_bytes(whole)
    for damage in (whole[:-100], b"", whole[:5000] + b"?" + whole[5001:]):
        Path("o/ckpt.pt").write_bytes(damage)
        assert torch.load("o/ckpt.prev.pt", weights_only=True)["step"] == 2
        capsys.readouterr()
        assert run(*args, "--out", "o") == 0
        assert re.search(
            r"ckpt.pt: not a checkpoint .*; going on from o/ckpt.prev.pt", capsys.readouterr().out
        )
        assert same("whole.pt", "o/ckpt.pt") and logged("o/metrics.jsonl") == [1, 2, 3, 4]
        assert Path("o/ckpt.damaged.pt").read_bytes() == damage
    for name in ("ckpt.pt", "ckpt.prev.pt"):
        Path(f"o/{name}").write_bytes(b"damaged")
    assert run(*args, "--out", "o") == 2
    error = capsys.readouterr().err
    assert "ckpt.pt: not a checkpoint" in error and "ckpt.prev.pt: not" in error and error.count("\n") == 1


def test_a_full_disk_leaves_the_last_checkpoint(work, capsys):
    assert run(*SMALL, "--steps", 2, "--ckpt-every", 2, "--out", "o") == 0
    before, size = Path("o/ckpt.pt").read_bytes(), Path("o/ckpt.pt").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))  # no file grows larger
        assert run(*SMALL, "--steps", 4, "--ckpt-every", 1, "--out", "o") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "ckpt" in error and "untouched" in error, error
    assert Path("o/ckpt.pt").read_bytes() == before and not list(Path("o").glob("*.tmp"))
    assert run(*SMALL, "--steps", 4, "--ckpt-every", 1, "--out", "o") == 0
    assert logged("o/metrics.jsonl") == [1, 2, 3, 4]


def test_a_full_disk_is_told_before_sampling_and_at_export(work, capsys, monkeypatch):
    assert run(*SMALL, "--steps", 1, "--out", "o") == 0
    before = sorted(Path().rglob("*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        assert run("--export", "e.pt", "--ckpt", "o/student.pt") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "e.pt: cannot be written" in error
    free = 2 * 10 * 64  # of 11 digits of 8 x 8, twice
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: argparse.Namespace(free=free))
    assert run("--sample", 11, "--ckpt", "o/student.pt", "--device", "cpu", "--out", "o") == 2
    assert re.search(r"--out o: needs .* GiB", capsys.readouterr().err)
    assert sorted(Path().rglob("*")) == before
    assert run("--sample", 10, "--ckpt", "o/student.pt", "--device", "cpu", "--out", "o") == 0


def test_a_torn_log_is_mended(work):
    """The log is not synced at every line: after power is lost its end may be anything."""
    assert run(*SMALL, "--steps", 3, "--out", "o") == 0
    with open("o/metrics.jsonl", "ab") as f:
        f.write(b'{"step": 4, "pred\n' + b"\0" * 40 + b"\xff\n" + b'{"step": 4, "prediction": 1}\n{"step": 2')
    assert run(*SMALL, "--steps", 4, "--out", "o") == 0
    assert logged("o/metrics.jsonl") == [1, 2, 3, 4]
    assert all("lr" in json.loads(line) for line in open("o/metrics.jsonl"))


def test_fewer_steps_than_are_done_are_refused(work, capsys):
    assert run(*SMALL, "--steps", 3, "--out", "o") == 0
    assert run(*SMALL, "--steps", 3, "--out", "o") == 0  # a finished run, typed again
    student = Path("o/student.pt").read_bytes()
    capsys.readouterr()
    assert run(*SMALL, "--steps", 2, "--out", "o") == 2
    assert "--steps 2: the run in o has done 3" in capsys.readouterr().err
    assert Path("o/student.pt").read_bytes() == student


def test_another_teacher_is_refused_by_its_content(work, capsys):
    assert run(*SMALL, "--steps", 1, "--out", "o") == 0
    Path("elsewhere").mkdir()
    os.replace("teacher.pt", "elsewhere/moved.pt")
    assert run(*SMALL, "--teacher", "elsewhere/moved.pt", "--steps", 2, "--out", "o") == 0
    file = torch.load("elsewhere/moved.pt", weights_only=True)
    file["ema"]["final_layer.linear.bias"] += 1e-3
    torch.save(file, "teacher.pt")
    capsys.readouterr()
    assert run(*SMALL, "--steps", 3, "--out", "o") == 2
    assert re.search(r"a run with teacher \w+ there, \w+ here", capsys.readouterr().err)


def test_a_step_that_is_not_finite_moves_nothing_on_the_device_either(work):
    """Between two waits for the device nobody looks: the optimisers must hold still by themselves."""
    s = fmd.Settings(**{**fmd.PRESETS[28], "batch": 8})
    teacher = sit.load("teacher.pt")[0]
    parts = fmd.build(teacher, s)
    v, _ = fmd.velocities(teacher, parts, "sit", s)
    draws = [fmd.prior((1, 8, 8), 10, s, 0, part) for part in ("prediction", "correction")]
    halted = torch.zeros(())
    fmd.training_step(v, 10, parts, s, 0, draws, halted)
    before = copy.deepcopy({name: parts[name].state_dict() for name in ("student", "online")})
    assert halted == 0
    fmd.training_step(
        {**v, "teacher": lambda *a: v["teacher"](*a) * math.inf}, 10, parts, s, 1, draws, halted
    )
    assert halted == 1
    fmd.training_step(v, 10, parts, s, 2, draws, halted)  # finite again
    assert halted == 1
    for name, state in before.items():
        assert all(torch.equal(v, state[k]) for k, v in parts[name].state_dict().items())


# -----------------------------------------------------------------------------------------------------------
# ImageNet in miniature: latents, decoder, many labels, precision
# -----------------------------------------------------------------------------------------------------------

BIG = [
    "--res",
    256,
    "--teacher",
    "random",
    "--model",
    "SiT-T/8",
    "--vae",
    "random",
    "--device",
    "cpu",
    "--eval-samples",
    2,
    "--out",
    "big",
]


@pytest.fixture
def small_vae(monkeypatch):
    whole = sit.Decoder
    monkeypatch.setattr(sit, "Decoder", lambda: whole((32, 32, 32, 32)))


@pytest.mark.parametrize("extra", [[], ["--bf16"], ["--bf16", "--derivative", "fd", "--micro-batch", 4]])
def test_imagenet_in_miniature(work, small_vae, capsys, extra):
    assert run(*BIG, "--steps", 2, "--batch", 8, "--log-every", 1, *extra) == 0
    assert len(logged("big/metrics.jsonl")) == 2 and Image.open("big/samples.png").size[1] > 2 * 256
    assert run(*BIG, "--sample", 18, "--labels", "balanced") == 0
    many = np.load("big/samples.npz")
    assert many["arr_0"].shape == (18, 256, 256, 3) and many["arr_1"].tolist() == list(range(18))
    assert run(*BIG, "--sample", 3, "--labels", "0-2") == 0
    assert np.array_equal(np.load("big/samples.npz")["arr_0"], many["arr_0"][:3])
    assert sorted(p.name for p in Path("big").glob(".*")) == []
    if not extra:
        capsys.readouterr()
        common = [*BIG, "--labels", "0-2", "--inception", "random"]
        np.savez("many.npz", arr_0=many["arr_0"])
        assert run(*common, "--rollout", 6, "--rollout-steps", 1, "--eval", "many.npz") == 0
        said = capsys.readouterr()
        assert "MEANINGLESS" in said.err and re.search(r"^sfid +[0-9.]+$", said.out, re.M)
        assert run(*common, "--sample", 2, "--eval", "none.npz") == 2


def test_export_reads_back_to_the_bit_and_samples_alike(work):
    assert run(*SMALL, "--steps", 2, "--out", "o") == 0
    Path("file").write_text("")
    assert run("--export", "file/released.pt", "--ckpt", "o/student.pt") == 2
    assert run("--export", "released.pt", "--ckpt", "o/student.pt") == 0
    raw, net = torch.load("released.pt", weights_only=True), sit.load("o/student.pt")[0]
    torch.save({**torch.load("o/student.pt", weights_only=True), "gamma": [1, 2]}, "whole.pt")  # not floats
    assert run("--export", "again.pt", "--ckpt", "whole.pt") == 0
    assert "dt_embedder.projs.0.weight" in raw and "gw_embedder.projs.2.bias" in raw
    assert not [k for k in raw if ".mlp." in k and "embedder" in k]
    again = sit.from_state_dict(raw, heads=4)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())
    # the release's rule: x0 = z + u at the prior's end of its clock, dt = 1, gw = γ
    z, y, one = fmd.noise(0, range(64), (1, 8, 8)), torch.arange(64) % 10, torch.ones(64)
    with torch.no_grad():
        theirs = z + again(z, 0 * one, y, 1 * one, 1.5 * one)
    assert torch.equal(theirs, fmd.one_step(net, "sit", 1.5)(z, y))


def test_many_processes_sample_what_one_does(work):
    common = ["--teacher", "teacher.pt", "--device", "cpu", "--rollout", 150, "--rollout-steps", 2]
    assert run(*common, "--out", "one") == 0
    done = torchrun(2, *common, "--out", "two", port=29619)
    assert done.returncode == 0, done.stderr[-2000:]
    a, b = (np.load(f"{name}/rollout.npz") for name in ("one", "two"))
    assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1  # other thread counts
    assert np.array_equal(a["arr_1"], b["arr_1"]) and len(a["arr_0"]) == 150


def test_flops_count_what_a_forward_computes():
    with torch.device("meta"):
        net = sit.SiT((4, 32, 32), 12, 384, 6, 2, 1000)
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(3, 4, 32, 32), torch.empty(3), torch.empty(3, dtype=torch.long))
    s = fmd.Settings(res=256, correction=0.0, derivative="jvp")
    assert fmd.flops(net.config, s, 3) / 7 == pytest.approx(counter.get_total_flops(), rel=0.02)


# -----------------------------------------------------------------------------------------------------------
# What is shipped
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["teacher-mnist.pt", "student-mnist.pt"])
def test_shipped_weights_make_digits(name):
    """No data here to compare with; but digits are white strokes on black in any case, and a wrong sign is
    not."""
    path = HERE / "assets" / name
    net, info = sit.load(path)
    assert path.stat().st_size < 16e6 and info["convention"] == "sit"
    make = (
        fmd.one_step(net, "sit", 1.5) if "student" in name else fmd.many_steps(net, "sit", 1.5, 8, "heun")
    )
    x = fmd.timed(make, 20, 0, net.config["shape"], range(10), torch.device("cpu"))[2]
    black, white = (x < -0.8).float().mean().item(), (x > 0.5).float().mean().item()
    assert 0.6 < black < 0.9 and 0.05 < white < 0.25, (black, white)
    assert x[:, :, 10:18, 10:18].mean() > x[:, :, :4].mean() + 0.3


def test_the_readmes_own_teacher_example(tmp_path):
    code = re.search(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)[1]
    (tmp_path / "example.py").write_text("import torch; torch.manual_seed(0)\n" + code)
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"median distance ([0-9.]+)", done.stdout)[1]) < 0.15
    assert Image.open(tmp_path / "points.png").size == (600, 600)


def test_readme_explains_every_flag():
    text = (HERE / "README.md").read_text()
    flags = {f"--{f.name.replace('_', '-')}" for f in fmd.dataclasses.fields(fmd.Settings)}
    flags |= {
        "--sample",
        "--rollout",
        "--dry-run",
        "--ckpt",
        "--guidance",
        "--labels",
        "--solver",
        "--rollout-steps",
        "--export",
        "--eval",
        "--inception",
        "--search",
        "--scorer",
    }
    assert not [f for f in flags if not re.search(rf"{f}\b", text)]
    for link in re.findall(r"assets/[\w.-]+", text):
        assert (HERE / link).exists(), link
    assert (HERE / ".ci/run").read_text().count("pytest") and "python -m pytest" in text


def test_readme_commands_parse():
    """Each command of the README is one its program takes; what they do is tested above, in miniature."""
    text = (HERE / "README.md").read_text().replace("--res RES", "--res 28")
    commands = re.findall(r"(?<![\w/])(fmd|fid|assets/\w+)\.py +([^`\n#|]*)", text)
    assert len(commands) > 25
    for program, args in commands:
        args = shlex.split(args)
        if program == "fmd" and args != ["..."]:
            fmd.parse(args)
        elif program == "fid":
            fid.parse(args)
        elif program.startswith("assets"):
            source = (HERE / f"{program}.py").read_text()
            assert all(f'"{a}"' in source or f"def {a}(" in source for a in args if re.match("--|[a-z]+$", a))


# -----------------------------------------------------------------------------------------------------------
# python test_fmd.py: not a test, a benchmark. Times belong in a table, not in an assertion.
# -----------------------------------------------------------------------------------------------------------


def benchmark(model=None, device="cpu", batch=64, repeats=15):
    """The median time of each part of a training step over that of a forward without gradient on the same
    batch, taken in turn, so that a machine that slows down slows all of them. model None: the bundled
    teacher; else a random one of that size, such as SiT-B/2, on latents of 256."""
    s = fmd.Settings(
        **{
            **fmd.PRESETS[256 if model else 28],
            "device": device,
            "batch": batch,
            **({"teacher": "random", "model": model, "res": 256} if model else {}),
        }
    )
    device = torch.device(device)
    teacher, info = fmd.load_net(s.teacher, "--teacher", s, device)
    parts, null, shape = fmd.build(teacher, s), teacher.config["classes"], teacher.config["shape"]
    v, _ = fmd.velocities(teacher, parts, info["convention"], s)
    halted = torch.zeros((), device=device)
    draws = [
        fmd.to_device(fmd.prior(shape, null, s, 0, part), device) for part in ("prediction", "correction")
    ]
    pred, corr = draws
    z, y, gamma = (torch.cat([pred[name], corr[name]]) for name in ("z", "y", "gamma"))
    delta, value = torch.cat([pred["delta"], torch.ones_like(corr["gamma"])]), torch.zeros_like(pred["z"])
    F = fmd.student_of(v["student"], y, gamma)
    F_pred = fmd.student_of(v["bare"], pred["y"], pred["gamma"])
    u = fmd.teacher_of(v["teacher"], null, y, gamma)
    g = fmd.online_of(v["online"], corr["y"], corr["gamma"])
    runs = {
        "forward": torch.no_grad()(lambda: F(z, delta)),
        "student, forward and backward": lambda: F(z, delta).mean().backward(),
        "teacher, guided": lambda: u(z, delta),
        "derivative, jvp": lambda: fmd.duration_derivative(F_pred, pred["z"], pred["delta"], value, "jvp"),
        "derivative, fd": lambda: fmd.duration_derivative(F_pred, pred["z"], pred["delta"], value, "fd"),
        "g, forward and backward": lambda: g(corr["n"], corr["r"]).mean().backward(),
    }
    for method in ("jvp", "fd"):
        changed = fmd.dataclasses.replace(s, derivative=method)
        runs[f"whole training step, {method}"] = lambda changed=changed: fmd.training_step(
            v, null, parts, changed, 0, draws, halted
        )
    times = {name: [] for name in runs}
    for i in range(repeats + 2):  # two rounds of warm-up
        for name, call in runs.items():
            clock = time.perf_counter()
            call()
            torch.cuda.synchronize() if device.type == "cuda" else None
            times[name] += [time.perf_counter() - clock] if i >= 2 else []
    print(
        f"batch {s.batch}, {s.correction:.0%} correction, {device.type}, {torch.get_num_threads()} threads, "
        f"{'bfloat16' if s.bf16 else 'float32'}"
    )
    for name, seconds in times.items():
        ratio = np.median(np.array(seconds) / np.array(times["forward"]))
        print(f"{name:32}{1e3 * np.median(seconds):9.1f} ms{ratio:8.2f} forwards")
    nets = [teacher, parts["student"], parts["online"], parts["ema"]]
    held = sum(p.numel() for net in nets for p in net.parameters())
    held += 3 * sum(
        p.numel() for k in ("student", "online") for p in parts[k].parameters() if p.requires_grad
    )
    peak = (
        torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    print(
        f"a step takes {fmd.flops(teacher.config, s, 1) / 1e9:.3g} GFLOP a sample; weights, gradients and "
        f"moments {4 * held / 1e9:.3g} GB; peak of the whole process {peak / 1e9:.3g} GB"
    )


if __name__ == "__main__":
    # python test_fmd.py [MODEL [DEVICE [BATCH [REPEATS]]]]: the benchmark
    # python test_fmd.py kill N: kill -9 at N instants, each run again to the end
    if sys.argv[1:2] == ["kill"]:
        os.chdir(tempfile.mkdtemp())
        small_teacher()
        chosen = sorted(np.random.default_rng(0).choice(np.arange(1, 50), int(sys.argv[2]), replace=False))
        print(f"{kill_and_rerun(chosen, quiet=False)} of {len(chosen)} identical to the uninterrupted run")
    else:
        fmd.keep_freed_memory()
        benchmark(*sys.argv[1:3], *map(int, sys.argv[3:5]))
