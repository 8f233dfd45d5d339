# SPDX-License-Identifier: MIT
"""FMD: data-free flow-map distillation, a minimal implementation of FreeFlow (Tong et al., arXiv 2511.19428).

A pretrained flow model (the teacher) makes a sample by integrating its velocity from noise to data: tens to
hundreds of network evaluations. A flow map (the student) jumps along the same path in one. We distil one into
the other without data: every training state is drawn from the prior, where all paths start, or predicted from
there by the student itself. (A dataset may hold states that the teacher's own paths never pass through.) Two
signals do it. *Prediction*: the student's path must move with the teacher's velocity. *Correction*: where the
student's samples, noised again, flow differently from the teacher's distribution, push them back.

Time: t = 1 IS NOISE, t = 0 IS DATA. Velocities point in the generating direction, from noise to data.

  symbol     in the code        meaning                                                         shape, range
  z          z                  prior sample, standard normal                                   (B, ...)
  y, ∅       y, null            class label, null label                                         (B,)
  γ          gamma; gw          guidance strength, 1 is none; released name of its embedder     (B,)
  t          t                  time                                                            (B,), 0..1
  δ          delta; dt          duration, from the prior at t = 1 to t = 1 - δ; its embedder    (B,), 0..1
  u(x, t)    u                  teacher's velocity dx/d(1-t)                                    like x
  F(z, δ)    F                  student: average velocity over the first δ of the path          like z
  f(z, δ)    flow_map(F, z, δ)  z + δ F(z, δ), the path after δ; the sample is x = f(z, 1)      like z
  v_G        v_G                F + δ ∂F/∂δ: the student generates at this velocity             like z
  n, r       n, r               fresh noise; the time to which a sample is noised with it       like z; (B,)
  I_r(x, n)  interpolate        x_r = (1 - r) x + r n; with the teacher's x, u = E[x - n | x_r] like x
  v_N(x, r)  v_N                with the student's x, E[x - n | x_r]: the velocity of these     like x
  g(x, r)    g, "online"        network that learns v_N, as the student changes (paper: g_ψ)    like x
  Δ          residual           student's velocity minus the teacher's: v_G - u or v_N - u      like x
  w, λ       weighted, lam      weight of a sample; of correction against prediction            (B,); number
  sg         .detach()          stop-gradient: Δ is held constant, the loss moves F alone

Launch:
  python fmd.py                                              distil the bundled teacher (MNIST) on a laptop
  python fmd.py                                              again: resumes where that run stopped
  torchrun --nproc_per_node=8 fmd.py --res 256               ImageNet, from the released SiT-XL/2
  python fmd.py --sample 100 --guidance 1.5 --labels 0-9     one-step samples
  python fmd.py --rollout 100 --solver heun                  the teacher's, in many steps
  python fmd.py --rollout 100 --search 8                     each from the best of 8 noises
  torchrun --nproc_per_node=8 fmd.py --res 256 --sample 50000 --eval REF.npz      and their FID
  python fmd.py --dry-run                                    settings, sizes and files, without running
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import functools
import hashlib
import json
import math
import os
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from PIL import Image, ImageDraw
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import fid
import sit
from fid import Moments, frechet_distance, processes, write

HERE = Path(__file__).resolve().parent


# -----------------------------------------------------------------------------------------------------------
# 1. Settings. [paper]: the paper's. [ours]: our choice, see the README. A free setting may differ when a run
#    is resumed; for the teacher, however it is named, stands a digest of what it computes (`fingerprint`).
# -----------------------------------------------------------------------------------------------------------

def setting(default, meaning, free=False):
    return dataclasses.field(default=default, metadata={"meaning": meaning, "free": free})


GPU = torch.cuda.is_available()


@dataclasses.dataclass(frozen=True)
class Settings:
    res: int = setting(28, "preset, by image side: 28 (MNIST, bundled teacher), 256 or 512 (ImageNet)")
    teacher: str = setting("assets/teacher-mnist.pt", "a file, released name (sit.RELEASED), URL or random")
    model: str = setting("SiT-T/4", "size and patch of --teacher random", free=True)
    convention: str = setting("auto", "clock and sign of the file: auto, sit or repa", free=True)
    vae: str = setting("sd-vae-ft-ema", "latents' decoder: a file, released name, URL or random", free=True)
    out: str = setting("", "output folder; empty: out/RES", free=True)
    steps: int = setting(100_000, "optimiser steps; the learning rate's schedule spans them", free=True)
    batch: int = setting(256, "samples per step, over all processes [paper]")
    micro_batch: int = setting(0, "samples a process takes at once, to save memory; 0: all", free=True)
    correction: float = setting(0.25, "share of the batch for correction; 0, 1: one objective alone [paper]")
    k: float = setting(1.0, "exponent of the weight 1/(|Δ|²/d + ε)^k of a sample [paper: 1]")
    alpha: float = setting(1.0, "strength α of correction against prediction [paper: 1; 0.3 to 3 work]")
    gamma: tuple = setting((1.0, 2.0), "guidance γ ~ U(LOW, HIGH) the student is trained for [ours]")
    interval: tuple = setting((0.0, 1.0), "times t between which the teacher is guided (in correction: cut)")
    cut: float = setting(0.7, "in correction the teacher is guided for r up to this [paper]")
    r_location: float = setting(0.8, "correction's r ~ LogitNormal: location [paper]")
    r_scale: float = setting(1.0, "and scale [ours]")
    derivative: str = setting("jvp", "∂F/∂δ by jvp (forward mode) or fd (finite difference)")
    lr: float = setting(1e-4, "peak learning rate of the student, AdamW [ours]")
    online_lr: float = setting(1e-4, "peak learning rate of g [ours]")
    warmup: int = setting(1000, "steps of linear warm-up [ours]")
    decay_from: float = setting(1.0, "fraction of the steps after which the rates fall linearly to 0 [ours]")
    clip: float = setting(1.0, "gradient norm above which a network's gradient is scaled down [ours]")
    ema: float = setting(0.9999, "decay per step of the averaged student, the one that is used [ours]")
    seed: int = setting(0, "every random draw is keyed by (seed, step, purpose)")
    bf16: bool = setting(GPU, "networks compute in bfloat16; weights, losses, differences in float32")
    compile: bool = setting(GPU, "torch.compile all but the derivative", free=True)
    checkpointing: bool = setting(False, "recompute activations going back, to save memory", free=True)
    eval_samples: int = setting(64, "noises on which student and teacher are compared", free=True)
    log_every: int = setting(50, "steps between lines of metrics.jsonl", free=True)
    eval_every: int = setting(5000, "steps between evaluations; the last step has one too", free=True)
    ckpt_every: int = setting(1000, "steps between checkpoints; the last step has one too", free=True)
    device: str = setting("cuda" if GPU else "cpu", "cpu, cuda or cuda:N", free=True)

    def __post_init__(self):
        check(self)                                             # section 9: refuses what cannot be meant

    @property
    def corrected(self):
        """Samples of the global batch that go to correction."""
        return round(self.batch * self.correction)

    @property
    def folder(self):
        return Path(self.out or f"out/{self.res}")


def plain(value):
    """A setting as it is typed."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# What differs from the defaults above, by resolution [ours]. At 28, in float32 on a CPU, a finite difference
# agrees with the JVP at a quarter of its time; for the rest see the README, "Results".
PRESETS = {
    28: {"derivative": "fd", "k": 0.5, "batch": 64, "lr": 1e-3, "online_lr": 1e-3, "warmup": 20,
         "decay_from": 0.3, "ema": 0.995, "steps": 900, "bf16": False, "compile": False, "eval_samples": 256,
         "log_every": 25, "eval_every": 500, "ckpt_every": 500},
    256: {"teacher": "SiT-XL/2", "model": "SiT-XL/2"},
    512: {"teacher": "SiT-XL/2-512", "model": "SiT-XL/2", "checkpointing": True},
}


# -----------------------------------------------------------------------------------------------------------
# 2. The prior. A step's random numbers are drawn on the CPU for the whole global batch, from generators keyed
#    by what they are for, and sliced per process: the same on any device, any world size, after any resume.
# -----------------------------------------------------------------------------------------------------------

def generator(*key):
    """A torch.Generator for a key such as (seed, step, "z"): equal keys, equal draws, nothing to save."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def prior(shape, classes, s, step, part, rank=0, world=1):
    """One step's draws for this process -> dict of CPU tensors. part is "prediction" or "correction".

    Both: z (b, *shape) noise, y (b,) labels in [0, classes), gamma (b,). Prediction: delta (b,) ~ U(0, 1).
    Correction, where δ = 1: n (b, *shape) fresh noise and r (b,) ~ LogitNormal(s.r_location, s.r_scale)."""
    size = s.corrected if part == "correction" else s.batch - s.corrected

    def draw(kind, name, *shape, **extra):
        return kind(size=(size, *shape), generator=generator(s.seed, step, part, name), **extra)

    out = {"z": draw(torch.randn, "z", *shape), "y": draw(torch.randint, "y", low=0, high=classes),
           "gamma": s.gamma[0] + (s.gamma[1] - s.gamma[0]) * draw(torch.rand, "gamma")}
    if part == "prediction":
        out["delta"] = draw(torch.rand, "delta")
    else:
        out["n"] = draw(torch.randn, "n", *shape)
        out["r"] = torch.sigmoid(s.r_location + s.r_scale * draw(torch.randn, "r"))
    return {name: value[rank * size // world:(rank + 1) * size // world] for name, value in out.items()}


# -----------------------------------------------------------------------------------------------------------
# 3. The teacher: a guided velocity and its rollout
# -----------------------------------------------------------------------------------------------------------

def expand(t, x):
    """(B,) -> (B, 1, ..., 1), to multiply x (B, ...)."""
    return t.view(-1, *[1] * (x.ndim - 1))


def guidance_within(gamma, t, low, high):
    """γ where low <= t <= high, else 1, which is no guidance. gamma, t (B,) -> (B,)."""
    return torch.where((low <= t) & (t <= high), gamma, torch.ones_like(gamma))


def guided(velocity, x, t, y, gamma, null):
    """Classifier-free guidance u(x|∅) + γ (u(x|y) - u(x|∅)), in one call of velocity(x, t, y).

    x (B, ...); t, y, gamma (B,); null an int -> (B, ...). On all channels (DiT's code: only three)."""
    nulls = torch.full_like(y, null)
    halves = velocity(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, nulls]))    # (2B, ...)
    u_y, u_null = halves.chunk(2)                                                     # 2 x (B, ...)
    return u_null + expand(gamma, x) * (u_y - u_null)


@torch.no_grad()
def rollout(u, z, steps, solver="heun", path=False):
    """Integrate dx/d(1-t) = u(x, t) from t = 1 to t = 0 on a uniform grid: Euler calls u once a step, Heun
    twice. u(x, t) takes x (B, ...), t (B,). -> the end point (B, ...), or with path=True (steps + 1, B,
    ...)."""
    if solver not in ("heun", "euler"):
        raise ValueError(f"solver {solver!r}: choose heun or euler")
    x, xs = z, [z]
    for i in range(steps):
        t, t_next = (x.new_full((len(x),), 1 - j / steps) for j in (i, i + 1))        # t_next < t: to data
        v = u(x, t)
        if solver == "heun":
            v = (v + u(x + v / steps, t_next)) / 2
        x = x + v / steps
        xs.append(x)
    return torch.stack(xs) if path else x


# -----------------------------------------------------------------------------------------------------------
# 4. The student: a flow map, and the velocity at which it generates
# -----------------------------------------------------------------------------------------------------------

def flow_map(F, z, delta):
    """f(z, δ) = z + δ F(z, δ). At δ = 1 this is the sampler: one evaluation. z (B, ...), delta (B,)."""
    return z + expand(delta, z) * F(z, delta)


@torch.no_grad()
def duration_derivative(F, z, delta, value=None, method="jvp", h=5e-3):
    """∂F/∂δ at fixed z, partial: the tangent is 1 on δ, 0 on z. value: F(z, δ), if at hand. -> like z.

    jvp: forward mode, exact; the fused attention kernels have no forward derivative, so it takes the plain
    one. fd: backward difference, one evaluation where F(z, δ) is at hand; error O(h). Both its ends want
    float32: in bfloat16 F's rounding, 4e-3 of it, over h would be as large as F. (For δ < h it looks past 0,
    where the derivative's factor δ is ~0.)"""
    if method == "fd":
        value = F(z, delta) if value is None else value
        return (value - F(z, delta - h)) / h
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(lambda d: F(z, d), (delta,), (torch.ones_like(delta),))[1]


# -----------------------------------------------------------------------------------------------------------
# 5. The objectives. Each gives a residual Δ, a velocity of the student minus the teacher's. The loss
#    <F, sg(w Δ)> has the gradient w Δ in F: descent moves F against it, as |F - sg(F - w Δ)|²/2 would.
# -----------------------------------------------------------------------------------------------------------

def interpolate(x, n, r):
    """I_r(x, n) = (1 - r) x + r n: the sample x noised to time r. x, n (B, ...), r (B,)."""
    return (1 - expand(r, x)) * x + expand(r, x) * n


def prediction(F, u, z, delta, derivative=duration_derivative):
    """Prediction (paper, Eq. 7 to 9) -> F(z, δ), with gradient, and Δ_G = v_G - u(f(z, δ), 1 - δ).

    A perfect student has δ F(z, δ) = ∫ u along the path. Take the derivative in δ:
    F + δ ∂F/∂δ = u(f, 1 - δ). The student's velocity is the teacher's, at the *student's* own point.
    z (B, ...), delta (B,)."""
    average = F(z, delta)                                                             # (B, ...)
    with torch.no_grad():                                                             # sg: Δ is constant
        f = z + expand(delta, z) * average
        v_G = average + expand(delta, z) * derivative(F, z, delta, average)
        return average, v_G - u(f, 1 - delta)


def correction(F, u, g, z, n, r):
    """Correction (paper, Eq. 10 and 11) -> F(z, 1), with gradient, Δ_N = v_N - u at noised samples, and g's
    loss.

    Δ_N is r / (1 - r) times the student's score minus the teacher's, both noised to time r: moving samples
    along -Δ_N lowers the KL divergence of the student's distribution from the teacher's (exact at γ = 1: a
    guided score is not that of a noised distribution). v_N has no formula: g(x, r) learns it online, by flow
    matching on the student's own samples, and one call of g serves as v_N, detached, and for that loss. z and
    fresh noise n (B, ...), r (B,)."""
    average = F(z, torch.ones_like(r))                                                # (B, ...)
    x = (z + average).detach()                                                        # f(z, 1): g's data
    x_r = interpolate(x, n, r)                                                        # (B, ...)
    v_N = g(x_r, r)                                                                   # (B, ...)
    online_loss = (v_N - (x - n)).square().mean()                                     # moves g only
    with torch.no_grad():                                                             # sg
        return average, v_N - u(x_r, r), online_loss


def both(F, u, g, z, delta, n, r, derivative=duration_derivative):
    """The two objectives on one batch with one call each of student, teacher and g, but for the derivative's:
    the first len(delta) rows of z are for prediction, the other len(r) for correction. The derivative asks F
    for the first alone. -> F (B, ...), Δ_G, Δ_N, loss of g."""
    P, durations = len(delta), torch.cat([delta, torch.ones_like(r)])
    average = F(z, durations)                                                         # (B, ...)
    f = z + expand(durations, z) * average.detach()                                   # (B, ...)
    x_r = interpolate(f[P:], n, r)                                                    # (B - P, ...)
    v_N = g(x_r, r)
    online_loss = (v_N - (f[P:] - n)).square().mean()
    with torch.no_grad():
        velocity = u(torch.cat([f[:P], x_r]), torch.cat([1 - delta, r]))              # (B, ...)
        v_G = average[:P] + expand(delta, f) * derivative(F, z[:P], delta, average[:P])
        return average, v_G - velocity[:P], v_N - velocity[P:], online_loss


def weighted(residual, k=1.0, eps=1e-3):
    """w Δ with w = 1 / (|Δ|²/d + ε)^k for each sample of d dimensions: a few large residuals must not
    drown the rest. The paper's Table 1 finds k decisive once correction joins in. ε is ours."""
    size = residual.flatten(1).square().mean(1)                                       # (B,)  |Δ|²/d
    return residual / expand((size + eps) ** k, residual)                             # (B, ...)


def student_loss(average, residual_G, residual_N, k=1.0, alpha=1.0, mean=torch.mean, eps=1e-6):
    """The mean of F · sg(w Δ_G) over prediction's rows and F · sg(λ w Δ_N) over correction's, which come
    second; and λ.

    λ = α E|w Δ_G| / (E|w Δ_N| + ε) makes the mean norms equal at α = 1 [paper; after w: ours].
    `mean` must average over all processes, else λ depends on their number. One objective alone: λ = α."""
    G, N = weighted(residual_G, k), weighted(residual_N, k)
    lam = average.new_tensor(alpha)
    if len(G) and len(N):
        lam = alpha * mean(G.flatten(1).norm(dim=1)) / (mean(N.flatten(1).norm(dim=1)) + eps)
    direction = torch.cat([G, lam * N]).detach()                                      # sg, (B, ...)
    return (average * direction).mean(), lam         # its gradient in F: direction / (number of elements)


# -----------------------------------------------------------------------------------------------------------
# 6. From networks to the callables above, and one training step
# -----------------------------------------------------------------------------------------------------------

# What a network's time input and its output mean: its time as a function of ours, and the sign that makes the
# output a velocity in the generating direction. Student and g inherit their teacher's convention.
CONVENTIONS = {"sit": (lambda t: 1 - t, 1), "repa": (lambda t: t, -1)}


def velocity_of(net, convention, bf16=False):
    """A network -> velocity(x, t, y, **embeddings) in our time and direction, as precise as x. With bf16 the
    network computes in bfloat16; its weights, and all that is done with the velocity, stay in float32."""
    clock, sign = CONVENTIONS[convention]

    def velocity(x, t, y, **embeddings):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            out = net(x, clock(t), y, **embeddings)
        return sign * out.to(x.dtype)

    return velocity


def teacher_of(velocity, null, y, gamma, interval=(0, 1)):
    """-> u(x, t), guided by γ inside the interval, never differentiated."""
    return torch.no_grad()(lambda x, t: guided(velocity, x, t, y, guidance_within(gamma, t, *interval), null))


def student_of(velocity, y, gamma):
    """-> F(z, δ). The network's time stays at the prior; δ and γ have embedders of their own: dt, gw."""
    return lambda z, delta: velocity(z, torch.ones_like(delta), y, dt=delta, gw=gamma)


def online_of(velocity, y, gamma):
    """-> g(x, r), conditioned on y and γ as the student is, whose distribution depends on both [ours]."""
    return lambda x, r: velocity(x, r, y, gw=gamma)


def objectives(v, null, s, pred, corr):
    """The objectives on draws of the prior for each -> F (B, ...), Δ_G, Δ_N and g's loss (0 without it).

    v: velocity_of the "teacher", the "student", "online", and "bare": the student again, for the derivative,
    neither wrapped nor compiled, and in float32 where it is a difference."""
    P, C = len(pred["y"]), len(corr["y"])
    z, y, gamma = (torch.cat([pred[name], corr[name]]) for name in ("z", "y", "gamma"))
    # F and g see γ itself; the teacher's ends with its interval in prediction, with the cut in correction
    teacher_gamma = torch.cat([guidance_within(pred["gamma"], 1 - pred["delta"], *s.interval),
                               guidance_within(corr["gamma"], corr["r"], 0.0, s.cut)])
    F, u = student_of(v["student"], y, gamma), teacher_of(v["teacher"], null, y, teacher_gamma)
    g = online_of(v["online"], corr["y"], corr["gamma"])
    F_pred = student_of(v["bare"], pred["y"], pred["gamma"])

    def derivative(_, z, delta, value):
        # a difference needs both its ends in float32: F(z, δ) is at hand only where that was not bfloat16
        value = None if s.bf16 else value
        return duration_derivative(F_pred, z, delta, value, s.derivative)

    if not C:
        average, residual_G = prediction(F, u, z, pred["delta"], derivative)
        return average, residual_G, residual_G[:0], residual_G.new_zeros(())
    if not P:
        average, residual_N, online_loss = correction(F, u, g, z, corr["n"], corr["r"])
        return average, residual_N[:0], residual_N, online_loss
    return both(F, u, g, z, pred["delta"], corr["n"], corr["r"], derivative)


def batch_losses(v, null, s, pred, corr, mean=torch.mean):
    """Both losses on draws of the prior, and their gradients -> what to log. v, null: see objectives."""
    average, G, N, online_loss = objectives(v, null, s, pred, corr)
    if len(N):
        online_loss.backward()
    loss, lam = student_loss(average, G, N, s.k, s.alpha, mean)
    loss.backward()
    return to_log(G, N, online_loss, lam, mean)


def to_log(G, N, online_loss, lam, mean):
    """Mean squares of the residuals per dimension, g's loss, λ; and "local", which tells in which process
    something was not finite."""
    terms = {"prediction": mean(G.flatten(1).square().mean(1))} if len(G) else {}
    if len(N):
        terms |= {"correction": mean(N.flatten(1).square().mean(1)), "online": mean(online_loss),
                  "lambda": lam}
    return {**terms, "local": (G.sum() + N.sum() + online_loss.sum()).detach()}


def learning_rate(step, s):
    """Factor on the peak rate: linear warm-up, constant, then linearly to zero from s.decay_from on."""
    return min((step + 1) / (s.warmup + 1), 1.0, (s.steps - step) / max(1.0, s.steps * (1 - s.decay_from)))


def training_step(v, null, parts, s, step, draws, halted, mean=torch.mean, losses=batch_losses):
    """Losses, gradients, optimisers, EMA: one step on parts (see build) -> what to log, tensors.

    draws: those for prediction and for correction. halted, a float tensor of no dimensions on the device,
    becomes 1 when a term is not finite; from then on no optimiser moves a weight, and nobody has waited for
    the device to know it. losses: batch_losses, or with --micro-batch losses_in_pieces."""
    terms = losses(v, null, s, *draws, mean)
    for name in ("student", "online") if "online" in terms else ("student",):
        terms[f"{name}_grad_norm"] = torch.nn.utils.clip_grad_norm_(parts[name].parameters(), s.clip)
    finite = torch.stack(list(terms.values())).isfinite().all()
    halted.copy_(torch.maximum(halted, 1 - finite.float()))
    for name, lr in (("student", s.lr), ("online", s.online_lr)):
        optimiser = parts[f"{name}_opt"]
        optimiser.param_groups[0]["lr"] = lr * learning_rate(step, s)
        optimiser.found_inf = halted        # what torch's GradScaler sets: the fused AdamW then does nothing
        optimiser.step()
        optimiser.zero_grad()
    # a short memory at first: the decay rises as 1 - 9/(10 + step), up to s.ema
    new, smooth = ([p.detach() for p in parts[name].parameters()] for name in ("student", "ema"))
    torch._foreach_lerp_(smooth, new, 1 - min(s.ema, (1 + step) / (10 + step)))
    return terms


# -----------------------------------------------------------------------------------------------------------
# 7. Training. From here on it is plumbing: processes, files, pictures, the command line.
# -----------------------------------------------------------------------------------------------------------

def join(s):
    """Join the processes torchrun started, if any, and set up the device -> rank, world size, device."""
    local, world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(f"cuda:{local}" if s.device == "cuda" else s.device)
    if world > 1 and ":" in s.device:
        raise ValueError(f"--device {s.device}: {world} processes need a GPU each: use --device cuda")
    if s.device == "cuda" and local >= torch.cuda.device_count():
        raise ValueError(f"--device cuda: {torch.cuda.device_count()} here: --nproc_per_node at most that")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # tensor cores for float32 too; a finite difference would drown in their rounding
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = s.derivative != "fd"
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return *processes(), device


def mean_of_all(values):
    """The mean over the values of all processes, which hold the same number each."""
    value = values.detach().float().mean()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value / processes()[1]


def anywhere(flag):
    """Whether the flag is up in any process. Told on the CPU, so that a GPU's queue is not waited for."""
    up = torch.tensor(float(flag))
    if dist.is_initialized():
        dist.all_reduce(up)
    return up.item() > 0


def wait():
    """For all processes to come here."""
    anywhere(False)


def load_net(path, flag, s, device, student=False):
    """-> a frozen network and its file's info. path: a file, a released name, a URL, or "random". Raises
    ValueError naming flag, path and fault."""
    shape, classes = ((1, 28, 28), 10) if s.res == 28 else ((4, s.res // 8, s.res // 8), 1000)
    try:
        if str(path) == "random":
            size, patch = s.model.removeprefix("SiT-").split("/")
            torch.manual_seed(s.seed)
            net, info = sit.SiT(shape, *sit.SIZES[size], int(patch), classes, dt=student, gw=student), {}
            for p in net.parameters():                         # adaLN-Zero starts at 0, and would say 0
                p.data.add_(0.02 * torch.randn_like(p)) if p.requires_grad else None
        else:
            bundled = not Path(path).exists() and (HERE / path).exists()   # found from any working directory
            net, info = sit.load(HERE / path if bundled else sit.fetch(path))
    except ValueError as e:
        raise ValueError(f"{flag} {e}") from None
    told = {} if s.convention == "auto" else {"convention": s.convention}
    info = {"convention": "sit", "gamma": [0.0, math.inf], **info, **told}
    convention, known, works = info["convention"], info["gamma"], tuple(net.config["shape"])
    held, wanted = ("teacher (no", "student") if student else ("student (with", "teacher")
    rules = [(convention in list(CONVENTIONS), f"convention {convention!r} is none of {list(CONVENTIONS)}"),
             (works[0] != 4 if s.res == 28 else works == shape,
              f"works on {works}, which is not --res {s.res}: give its own --res"),
             ((net.config["dt"], net.config["gw"]) == (student, student),
              f"holds a {held} δ and γ embedders), give a {wanted}"),
             (isinstance(known, list) and [type(a) in (int, float) for a in known] == [True, True],
              f"gamma {known!r} is not a LOW HIGH")]
    for fine, fault in rules:
        if not fine:
            raise ValueError(f"{flag} {path}: {fault}")
    return net.to(device).eval().requires_grad_(False), info


def load_decoder(s, device):
    """The SD-VAE's decoder, on whose latents the networks of 256 and 512 work; None at 28."""
    if s.res == 28:
        return None
    torch.manual_seed(s.seed)
    try:
        net = sit.Decoder() if s.vae == "random" else sit.load_decoder(sit.fetch(s.vae))
    except ValueError as e:
        raise ValueError(f"--vae {e}") from None
    return net.to(device).eval().requires_grad_(False)


def first_of_machine(load):
    """load() in one process of each machine, then in its others: what it downloads is downloaded once."""
    others = os.environ.get("LOCAL_RANK", "0") != "0"
    if others:
        wait()
    try:
        return load()
    finally:
        if not others:                                       # also on failure: then the others fail alike
            wait()


def relative(teacher, **embedders):
    """A network that starts as the teacher, with embedders added, which say nothing at first."""
    net = sit.SiT(**{**teacher.config, "learn_sigma": False, **embedders})
    weights = teacher.state_dict()
    if teacher.config["learn_sigma"]:                               # of the read-out keep the velocity's half
        halves = (-1, 2, teacher.config["shape"][0])                # by pixel: velocity's channels, sigma's
        weights |= {k: v.unflatten(0, halves)[:, 0].flatten(0, 1) for k, v in weights.items()
                    if k.startswith("final_layer.linear.")}
    net.load_state_dict({**net.state_dict(), **weights})
    return net.to(teacher.pos_embed.device)


def build(teacher, s):
    """-> what trains, and what a checkpoint holds: student, its average ema, online network g, optimisers."""
    torch.manual_seed(s.seed)                                       # the embedders' inner layers start random
    parts = {"student": relative(teacher, dt=True, gw=True), "online": relative(teacher, gw=True)}
    parts["ema"] = copy.deepcopy(parts["student"]).requires_grad_(False)
    for name in ("student", "online"):                              # training_step sets their rates
        parts[name].checkpointing = s.checkpointing
        trained = [p for p in parts[name].parameters() if p.requires_grad]
        parts[f"{name}_opt"] = torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    return parts


def velocities(teacher, parts, convention, s):
    """-> v of objectives and training_step, and hold: the networks compiled, wrapped for DDP where asked."""
    compiled = torch.compile if s.compile else lambda net: net
    nets = {"teacher": compiled(teacher), "student": compiled(parts["student"]),
            "online": compiled(parts["online"]), "bare": parts["student"]}
    several = processes()[1] > 1
    if several:                                  # gradients averaged over processes, once a step and network
        for name in ("student", "online"):
            nets[name] = torch.nn.parallel.DistributedDataParallel(nets[name], gradient_as_bucket_view=True)
    # the derivative needs no gradient, hence no DDP; forward mode does not go through a compiled network
    bf16 = {name: s.bf16 and (name != "bare" or s.derivative == "jvp") for name in nets}
    return ({name: velocity_of(net, convention, bf16[name]) for name, net in nets.items()},
            lambda name, more: nets[name].no_sync() if several and more else contextlib.nullcontext())


def losses_in_pieces(v, null, s, pred, corr, mean, hold):
    """batch_losses, s.micro_batch rows at a time: the same gradient in less memory, for one more forward.

    λ needs the residuals of all rows, so they come first, without the student's graph; then the loss's
    gradient in F is known, average.grad, and goes back through the student piece by piece (gradient caching,
    arXiv 2101.06983). hold(name): a context in which DDP does not yet average that network's gradients."""
    count = (len(pred["y"]) + len(corr["y"])) // s.micro_batch
    pieces = [[{name: a.chunk(count)[i] for name, a in part.items()} for part in (pred, corr)]
              for i in range(count)]
    graphless, targets = {**v, "student": torch.no_grad()(v["student"])}, []
    for i, piece in enumerate(pieces):
        with hold("online", i + 1 < count):
            average, G, N, online_loss = objectives(graphless, null, s, *piece)
            if len(N):
                (online_loss / count).backward()
        targets.append((average.requires_grad_(), G, N, online_loss.detach()[None]))
    averages, *rest = zip(*targets)
    G, N, online_loss = map(torch.cat, rest)
    P = len(G) // count                                              # of a piece's rows, those of prediction
    average = torch.cat([a[:P] for a in averages] + [a[P:] for a in averages])        # (B, ...)
    loss, lam = student_loss(average, G, N, s.k, s.alpha, mean)
    loss.backward()
    for i, ((pred, corr), average) in enumerate(zip(pieces, averages)):
        z, y, gamma = (torch.cat([pred[name], corr[name]]) for name in ("z", "y", "gamma"))
        delta = torch.cat([pred["delta"], torch.ones_like(corr["gamma"])])
        with hold("student", i + 1 < count):
            student_of(v["student"], y, gamma)(z, delta).backward(average.grad)
    return to_log(G, N, online_loss, lam, mean)


def make_folder(folder, flag="--out"):
    """Create it and see that it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise ValueError(f"{flag} {folder}: cannot write there ({e.strerror}); name another folder") from None


def fingerprint(net, convention):
    """What tells one teacher from another, wherever its file lies: a digest of its weights and convention."""
    digest = hashlib.sha256(convention.encode())
    for name, value in sorted(net.state_dict().items()):
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_checkpoint(s, parts, done, teacher):
    """ckpt.pt, whole or not at all; the one before stays as ckpt.prev.pt."""
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"step": done, "settings": {**dataclasses.asdict(s), "teacher": teacher}, "format": 3}
    new, last = s.folder / "ckpt.new.pt", s.folder / "ckpt.pt"
    try:
        write(new, lambda f: torch.save(state, f))
        if last.exists():
            os.replace(last, s.folder / "ckpt.prev.pt")
        os.replace(new, last)
    except OSError as e:
        raise OSError(f"--out {s.folder}: ckpt.pt of step {done} cannot be saved ({e}); the last one is "
                      "untouched: make room and type the same command again") from None


def load_checkpoint(path, parts):
    """A checkpoint into parts -> its dict. Nothing in the file is taken on trust: names, shapes, types and
    finiteness are what parts has, or it is refused with a ValueError."""
    ckpt = sit.read_file(path)
    try:
        for name, part in parts.items():
            state, want = ckpt[name], part.state_dict()
            if name.endswith("_opt"):                    # moments by weight; none before the first gradient
                moments, params = state["state"], part.param_groups[0]["params"]
                state = {f"{i}.{k}": v for i, m in moments.items() for k, v in m.items()}
                like = {f"{i}.{k}": p if k != "step" else torch.zeros(()) for i, p in enumerate(params)
                        for k in ("step", "exp_avg", "exp_avg_sq")}
                sit.verify(like if state else {}, state)
                part.load_state_dict({**want, "state": moments})
            else:
                sit.verify(want, state)
                part.load_state_dict(state)
        if not (ckpt["format"] == 3 and isinstance(ckpt["step"], int) and ckpt["step"] >= 0):
            raise ValueError(f"format {ckpt['format']!r}, step {ckpt['step']!r}")
        return {**ckpt, "settings": dict(ckpt["settings"])}
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: not a checkpoint of this run ({sit.reason(e)})") from None


def resume(s, parts, teacher, say):
    """The newest checkpoint of s.folder that can be read, if there is any, into parts -> steps done. Raises
    ValueError where there are only others, or where the run there had other settings."""
    here, faults = {**dataclasses.asdict(s), "teacher": teacher}, []
    for path in filter(Path.exists, (s.folder / "ckpt.pt", s.folder / "ckpt.prev.pt")):
        try:
            ckpt = load_checkpoint(path, parts)
        except ValueError as e:
            faults.append(str(e))
            continue
        there, fixed = ckpt["settings"], [f.name for f in dataclasses.fields(s) if not f.metadata["free"]]
        differ = [f"{name} {plain(there.get(name))} there, {plain(here[name])} here"
                  for name in fixed if there.get(name) != here[name]]
        if differ:
            raise ValueError(f"--out {s.folder}: a run with {'; '.join(differ)}; type it as it was or name "
                             "another folder")
        if ckpt["step"] > s.steps:
            raise ValueError(f"--steps {s.steps}: the run in {s.folder} has done {ckpt['step']}; give more "
                             "or name another --out")
        if faults:                           # ckpt.pt: put aside, or the next save would keep it as prev
            say(f"{faults[0]}, now ckpt.damaged.pt; going on from {path}")
            if processes()[0] == 0:
                os.replace(s.folder / "ckpt.pt", s.folder / "ckpt.damaged.pt")
        return ckpt["step"]
    if faults:
        raise ValueError(f"--out {s.folder}: {'; '.join(faults)}; name another folder")
    return 0


def trim(log, done):
    """Of metrics.jsonl keep the whole lines up to a step."""
    lines = log.read_text(errors="replace").splitlines(keepends=True) if log.exists() else []
    steps = [re.fullmatch(r'\{"step": (\d+), .*\}\n', line) for line in lines]
    kept = [line for line, step in zip(lines, steps) if step and int(step[1]) <= done]
    write(log, lambda f: f.write("".join(kept).encode()))


def flops(config, s, rows):
    """Model FLOPs of a training step on that many samples, the number the utilisation (MFU) is made with.

    A forward of T tokens, width D: per block 24 T D² (qkv 6, proj 2, MLP 16) + 4 T² D (attention) + 12 D²
    (adaLN). The step takes, in forwards: student 3 (backward counts twice), teacher 2 (guidance), on
    prediction's share the derivative's 2 (1 for a difference in float32), on correction's share g's 3. What
    is computed again, by checkpointing or for micro-batches, does not count."""
    D, T = config["width"], config["shape"][1] * config["shape"][2] // config["patch"] ** 2
    forward = config["depth"] * (24 * T * D ** 2 + 4 * T ** 2 * D + 12 * D ** 2)
    share = s.corrected / s.batch
    derivative = 2 if s.derivative == "jvp" or s.bf16 else 1
    return rows * forward * (5 + (1 - share) * derivative + share * 3)


# dense bfloat16 FLOP/s by the name torch.cuda gives the device [NVIDIA's data sheets, SXM where there is one]
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


@contextlib.contextmanager
def heeded():
    """Signals to stop -> the list of those that came, to be heeded after the step. A second Ctrl-C acts at
    once."""
    came = []

    def heed(number, _):
        came.append(signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.SIG_DFL)     # not SIGTERM: Slurm sends one, torchrun another

    before = {number: signal.signal(number, heed) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def read_terms(pending, names, s, done):
    """Wait for the device: the terms of all steps since the last wait -> those of the last, numbers.
    FloatingPointError where one is not finite: which, at which step, where it began."""
    rank, world = processes()
    for at, (*values, local) in enumerate(torch.stack(pending).tolist(), start=done - len(pending) + 1):
        for name, value in zip(names, values):
            if not math.isfinite(value):
                began = [r for r in range(world) if anywhere(r == rank and not math.isfinite(local))]
                raise FloatingPointError(f"{name} is {value} at step {at} (rank {began or 'any'}): stopped "
                                         f"before the optimiser; checkpoints in {s.folder} are untouched")
    return values


def train(s):
    """The whole run: distil, evaluate, write everything under s.folder."""
    rank, world, device = join(s)
    if s.corrected % world or (s.batch - s.corrected) % world:
        raise ValueError(f"--batch {s.batch}: its {s.batch - s.corrected} samples for prediction and "
                         f"{s.corrected} for correction must both divide by the {world} processes")
    if s.micro_batch and (s.batch // world % s.micro_batch):
        raise ValueError(f"--micro-batch {s.micro_batch}: must divide a process's {s.batch // world} samples")
    (teacher, info), decoder = first_of_machine(lambda: (
        load_net(s.teacher, "--teacher", s, device), load_decoder(s, device)))
    convention, shape = info["convention"], teacher.config["shape"]
    classes = null = teacher.config["classes"]                       # labels are 0 to null - 1
    make_folder(s.folder)
    say = tqdm.write if rank == 0 else lambda text: None
    parts, identity = build(teacher, s), fingerprint(teacher, convention)
    first = resume(s, parts, identity, say)
    if anywhere(abs(mean_of_all(torch.tensor(first, device=device)).item() - first) > 0.4):
        raise ValueError(f"--out {s.folder}: processes see different checkpoints; name a folder all share")
    v, hold = velocities(teacher, parts, convention, s)
    losses = functools.partial(losses_in_pieces, hold=hold) if s.micro_batch else batch_losses
    log = s.folder / "metrics.jsonl"
    size = sum(p.numel() for p in parts["student"].parameters()) / 1e6
    say(f"teacher {s.teacher} (convention {convention}), student of {size:.2f} M parameters, "
        f"{world} process(es) on {device.type}, steps {first} to {s.steps}")
    if rank == 0:
        trim(log, first)
        truth = reference(teacher, convention, s, device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((f for name, f in PEAK.items() if name in card), None)

    quiet = rank > 0 or not sys.stderr.isatty()                      # plain lines when piped
    halted, pending = torch.zeros((), device=device), []
    clock, since, stop = time.perf_counter(), first, False
    with heeded() as signals:
        for step in tqdm(range(first, s.steps), initial=first, total=s.steps, disable=quiet):
            draws = [to_device(prior(shape, classes, s, step, part, rank, world), device)
                     for part in ("prediction", "correction")]
            terms = training_step(v, null, parts, s, step, draws, halted, mean_of_all, losses)
            local = terms.pop("local")
            pending.append(torch.stack([*terms.values(), local]))
            done, stop = step + 1, anywhere(signals != [])
            logged, evaluated, saved = (done == s.steps or done % n == 0
                                        for n in (s.log_every, s.eval_every, s.ckpt_every))
            if not (logged or evaluated or saved or stop or device.type == "cpu"):
                continue
            values = read_terms(pending, terms, s, done)
            pending.clear()
            if rank == 0 and (logged or evaluated):
                seconds = (time.perf_counter() - clock) / (done - since)
                line = {"step": done, **{k: round(value, 6) for k, value in zip(terms, values)},
                        "lr": s.lr * learning_rate(step, s), "images_per_s": round(s.batch / seconds, 2)}
                if peak:
                    line["mfu"] = round(flops(teacher.config, s, s.batch / world) / seconds / peak, 4)
                if card:
                    line["peak_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
                if evaluated:
                    line |= compare(parts["ema"], convention, truth)[0]
                with open(log, "a") as f:
                    f.write(json.dumps(line) + "\n")
                if quiet or evaluated:
                    left = datetime.timedelta(seconds=round(seconds * (s.steps - done)))
                    say("  ".join(f"{k} {value:.6g}" for k, value in line.items())
                        + f"  ms/step {1e3 * seconds:.0f}  left {left}")
            if rank == 0 and (saved or stop):
                save_checkpoint(s, parts, done, identity)
            if logged or evaluated or saved:
                clock, since = time.perf_counter(), done
            if stop:
                break
    if stop:
        say(f"stopped by {signals[0] if signals else 'a signal elsewhere'} after step {done}, saved; "
            "the same command goes on from there")
    elif rank == 0:
        export(s.folder / "student.pt", parts["ema"], {"convention": convention, "gamma": list(s.gamma)})
        report(teacher, parts["ema"], convention, s, truth, decoder)
    wait()                                                           # for process 0


def export(path, net, info=None):
    """A student in the released layout: the names of FreeFlow's files; with info, our own file's dict around
    it, which says the convention as well."""
    state = sit.released_names(net.state_dict())
    write(path, lambda f: torch.save({"ema": state, "config": net.config, **info} if info else state, f))


def to_device(draws, device):
    """CPU tensors to the device, without waiting for it."""
    return {name: (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)
            for name, value in draws.items()}


# -----------------------------------------------------------------------------------------------------------
# 8. Sampling, evaluation, pictures
# -----------------------------------------------------------------------------------------------------------

def chunk(shape):
    """Samples computed at a time by --sample and --rollout: sample i is the same to the bit, whatever N."""
    return 64 if math.prod(shape) <= 1024 else 16


def noise(seed, indices, shape):
    """(len(indices), *shape): noise i depends on the seed and i alone. An index may be any name."""
    return torch.stack([torch.randn(*shape, generator=generator(seed, "sample", i)) for i in indices])


def generate(make, count, seed, shape, labels, device, rank=0, world=1, size=None, pick=None):
    """Samples by make(z, y), labels in turn, a chunk at a time -> yields start, z, y, x. Each process makes
    every world-th chunk. pick(z, y, indices) may put other noises in the place of z."""
    size = size or chunk(shape)
    starts = range(rank * size, count, world * size)
    for start in tqdm(starts, desc="sampling", leave=False, disable=rank > 0 or not sys.stderr.isatty()):
        i = range(start, start + size)
        y = torch.tensor([labels[j % len(labels)] for j in i], device=device)
        z = noise(seed, i, shape).to(device)
        z = pick(z, y, i) if pick else z
        yield start, *(a[:count - start] for a in (z, y, make(z, y)))


def one_step(net, convention, gamma):
    """-> make(z, y) of a student: its flow map at δ = 1, one evaluation."""
    velocity = velocity_of(net, convention)

    def make(z, y):
        ones = torch.ones(len(z), device=z.device)
        return flow_map(student_of(velocity, y, gamma * ones), z, ones)
    return torch.no_grad()(make)


def many_steps(net, convention, gamma, steps, solver, interval=(0, 1), bf16=False):
    """-> make(z, y) of a teacher: a rollout. At γ = 1 the null half of guidance is not computed."""
    velocity, null = velocity_of(net, convention, bf16), net.config["classes"]

    def make(z, y):
        u = teacher_of(velocity, null, y, z.new_full((len(z),), gamma), interval)
        return rollout(u if gamma != 1 else lambda x, t: velocity(x, t, y), z, steps, solver)
    return make


def evaluations(steps, solver, gamma):
    """Network evaluations of a rollout: Heun takes two a step, guidance doubles them."""
    return steps * (1 + (solver == "heun")) * (1 + (gamma != 1))


def label_score(velocity, null, times=(0.4, 0.7)):
    """-> score(x, y), higher is better: how much better the teacher predicts x's noising velocity x - n when
    told the label than when not (its own classifier, arXiv 2303.16203). Costs 2 evaluations for each time."""
    def score(x, y):
        gain = 0
        for t in times:                                              # the same noise for all: scores compare
            r, n = x.new_full((len(x),), t), noise("score", [t], x.shape[1:]).to(x)
            x_r, nulls = interpolate(x, n, r), torch.full_like(y, null)
            velocities = velocity(torch.cat([x_r, x_r]), torch.cat([r, r]), torch.cat([y, nulls]))
            u_y, u_null = velocities.chunk(2)                        # 2 x (B, ...); both aim at x - n
            gain = gain + ((u_null - (x - n)) ** 2 - (u_y - (x - n)) ** 2).flatten(1).mean(1) / len(times)
        return gain
    return torch.no_grad()(score)


def best_of(tries, make, score, seed):
    """-> pick(z, y, indices) for generate: of z and tries - 1 more noises for each index, the one whose
    one-step sample make(z, y) has the highest score(x, y), (B,) [paper, Fig. 8]. ValueError for scores of
    another shape or not finite."""
    @torch.no_grad()
    def pick(z, y, indices):
        more = [noise(seed, [f"{i}/{j}" for i in indices], z.shape[1:]).to(z) for j in range(1, tries)]
        zs = torch.stack([z, *more])                                                  # (tries, B, ...)
        scores = torch.stack([score(make(z, y), y) for z in zs])                      # (tries, B)
        if scores.shape != zs.shape[:2] or not scores.isfinite().all():
            raise ValueError(f"--scorer: gave {tuple(scores.shape[1:])}, want ({len(z)},), all finite")
        return zs[scores.argmax(0), torch.arange(len(z), device=z.device)]
    return pick


def moments(x):
    """(N, C, H, W) -> mean and covariance, in float64, of the raw pixels; above 1,024 numbers a sample, where
    few samples say little, of 8 x 8 averages."""
    x = (x if x[0].numel() <= 1024 else nnf.adaptive_avg_pool2d(x, 8)).flatten(1)
    m = Moments(x.shape[1])
    m.add(x)
    return m.mean_cov()


def timed(make, count, seed, shape, labels, device):
    """-> z, y, x (count, ...) on the CPU, ms per sample."""
    clock, size = time.perf_counter(), min(count, chunk(shape))
    made = generate(make, count, seed, shape, labels, device, size=size)
    rows = [[a.cpu() for a in row] for _, *row in made]
    ms = 1e3 * (time.perf_counter() - clock) / (size * len(rows))
    return *map(torch.cat, zip(*rows)), ms


def reference(teacher, convention, s, device, steps=16):
    """The teacher's samples on fixed noises, at the middle of the student's range of guidance."""
    gamma = sum(s.gamma) / 2
    make = many_steps(teacher, convention, gamma, steps, "heun", s.interval, s.bf16)
    shape, labels = teacher.config["shape"], range(teacher.config["classes"])
    z, y, x, ms = timed(make, s.eval_samples, s.seed, shape, labels, device)
    return {"z": z, "y": y, "x": x, "moments": moments(x), "ms": ms,
            "gamma": gamma, "steps": steps, "seed": s.seed}


def compare(net, convention, truth):
    """A student on the reference's noises -> metrics, samples, ms per image. endpoint_error is the mean of
    |f(z, 1) - φ(z)| / |φ(z)|, φ(z) the teacher's; frechet the Frechet distance of pixels (see moments)."""
    phi, device = truth["x"], net.pos_embed.device
    make = one_step(net, convention, truth["gamma"])
    _, _, x, ms = timed(make, len(phi), truth["seed"], phi.shape[1:], truth["y"].tolist(), device)
    error = ((x - phi).flatten(1).norm(dim=1) / phi.flatten(1).norm(dim=1)).mean().item()
    frechet = frechet_distance(*moments(x), *truth["moments"])
    return {"endpoint_error": round(error, 5), "frechet": round(frechet, 4)}, x, ms


def decoded(x, decoder):
    """Latents through the decoder, eight at a time; without one, x itself."""
    if decoder is None:
        return x
    return torch.cat([decoder(part) for part in x.to(next(decoder.parameters()).device).split(8)])


def to_uint8(x, decoder=None):
    """(N, C, H, W) in [-1, 1], or latents -> (N, H, W, C) uint8, by the rule of DiT, SiT and FreeFlow."""
    x = decoded(x, decoder)
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def save_picture(path, rows, names, header=()):
    """Rows of uint8 tiles (n, H, W, C) -> a PNG, each row with its name at the left, header above."""
    zoom, left, top = 2 if rows[0].shape[1] <= 64 else 1, 8 + 7 * max(map(len, names)), 18 if header else 0
    side = rows[0].shape[1] * zoom + 2
    image = Image.new("RGB", (left + len(rows[0]) * side, top + len(rows) * side), "white")
    pen = ImageDraw.Draw(image)
    for j, text in enumerate(header, start=-1):                      # the first names the column of names
        pen.text((4 if j < 0 else left + j * side + 4, 3), text, fill="black")
    for i, (row, name) in enumerate(zip(rows, names)):
        pen.text((4, top + i * side + side // 2 - 6), name, fill="black")
        for j, tile in enumerate(row):
            tile = Image.fromarray(tile.squeeze(-1) if tile.shape[-1] == 1 else tile)
            image.paste(tile.resize((side - 2, side - 2), Image.NEAREST), (left + j * side, top + i * side))
    write(path, lambda f: image.save(f, "PNG"))


@torch.no_grad()
def report(teacher, ema, convention, s, truth, decoder):
    """samples.png, path.png, the closing table, and what to do next."""
    metrics, x, ms = compare(ema, convention, truth)
    rows = [to_uint8(a[i:i + 10], decoder) for i in range(0, min(20, len(x)), 10) for a in (truth["x"], x)]
    names = [f"teacher, {truth['steps']} Heun steps", "student, 1 step"] * 2
    save_picture(s.folder / "samples.png", rows, names)

    few, every = (3, 2) if decoder is None else (1, 4)               # decoding takes longer than the network
    z, y = (truth[name][:few].to(ema.pos_embed.device) for name in ("z", "y"))
    gamma, deltas = z.new_full((len(z),), truth["gamma"]), [i / 16 for i in range(0, 17, every)]
    u = teacher_of(velocity_of(teacher, convention), teacher.config["classes"], y, gamma, s.interval)
    F = student_of(velocity_of(ema, convention), y, gamma)
    paths = rollout(u, z, 16, path=True)[::every]                            # (len(deltas), few, C, H, W)
    maps = torch.stack([flow_map(F, z, torch.full_like(gamma, d)) for d in deltas])
    rows = [to_uint8(a[:, i], decoder) for i in range(len(z)) for a in (paths, maps)]
    names, header = ["teacher's path", "student's map"] * few, ["duration", *map(str, deltas)]
    save_picture(s.folder / "path.png", rows, names, header)

    print(f"\n{len(x)} samples, γ = {truth['gamma']:g}      NFE  ms/image  endpoint error  Frechet distance")
    name, nfe = f"teacher, Heun {truth['steps']}", evaluations(truth["steps"], "heun", truth["gamma"])
    print(f"{name:24}{nfe:5}{truth['ms']:10.2f}{0:16.4f}{0:18.2f}")
    print(f"{'student':24}{1:5}{ms:10.2f}{metrics['endpoint_error']:16.4f}{metrics['frechet']:18.2f}")
    print(f"\nIn {s.folder}: student.pt  ckpt.pt  metrics.jsonl  samples.png  path.png")
    print(f"Next: python fmd.py --res {s.res} --sample 100 --guidance {truth['gamma']:g} "
          f"--ckpt {s.folder / 'student.pt'}")


def student_path(s, args):
    """The student of --ckpt, else of the last run, else at 28 the bundled one."""
    made = s.folder / "student.pt"
    return args.ckpt or (made if made.exists() or s.res != 28 else "assets/student-mnist.pt")


def sample(s, args):
    """--sample and --rollout: N samples, of the student or of the teacher, to an ADM npz and a grid. They are
    collected in a file as large as they are, mapped into memory, which every process fills in places."""
    rank, world, device = join(s)
    count, name = args.sample or args.rollout, "samples" if args.sample else "rollout"
    path = student_path(s, args) if args.sample else s.teacher
    (net, info), decoder, guide = first_of_machine(lambda: (
        load_net(path, "--ckpt" if args.sample else "--teacher", s, device, student=bool(args.sample)),
        load_decoder(s, device),
        load_net(student_path(s, args), "--ckpt", s, device, student=True) if args.search else None))
    convention, shape, pick = info["convention"], net.config["shape"], None
    labels = parse_labels(args.labels, net.config["classes"])
    if args.eval:                                            # what it needs is missed now, not after hours
        try:
            fid.open_side(args.eval)
            fid.load_inception(args.inception)
        except ValueError as e:
            raise ValueError(str(e).replace("--weights", "--inception")) from None
    low, high = (guide[1] if guide else info)["gamma"]
    if rank == 0 and not low <= args.guidance <= high:
        print(f"note: --guidance {args.guidance} is outside the range {low} to {high} the student knows")
    if args.sample:
        make, nfe = one_step(net, convention, args.guidance), 1
    else:
        make = many_steps(net, convention, args.guidance, args.rollout_steps, args.solver, s.interval, s.bf16)
        nfe = evaluations(args.rollout_steps, args.solver, args.guidance)
    if args.search:
        pick, cost = searcher(s, args, net, convention, *guide, decoder)
        nfe += args.search * cost
    make_folder(s.folder)
    side, channels = (shape[1], shape[0]) if decoder is None else (8 * shape[1], 3)
    npz, raw = s.folder / f"{name}.npz", s.folder / f".{name}.npy.tmp"
    need = 2 * count * side * side * channels                            # the mapped file, then the npz
    if shutil.disk_usage(s.folder).free < need:
        raise ValueError(f"--out {s.folder}: needs {need / 2 ** 30:.1f} GiB for a while; name another folder")
    try:
        if rank == 0:
            np.lib.format.open_memmap(raw, "w+", np.uint8, (count, side, side, channels))
        wait()                                                               # for the file
        clock, x = time.perf_counter(), np.lib.format.open_memmap(raw, "r+")
        for start, _, _, made in generate(make, count, s.seed, shape, labels, device, rank, world, pick=pick):
            x[start:start + len(made)] = to_uint8(made, decoder)
        x.flush()
        wait()
        if rank == 0:
            ms = 1e3 * (time.perf_counter() - clock) / count
            y = np.array([labels[i % len(labels)] for i in range(count)])
            write(npz, lambda f: np.savez(f, arr_0=x, arr_1=y))              # streams x from the mapped file
            rows = [x[i:i + 10] for i in range(0, min(100, count), 10)]
            save_picture(s.folder / f"{name}-grid.png", rows, [""] * len(rows))
            spent = f" ({args.search * cost} to choose among {args.search} noises)" if args.search else ""
            print(f"{count} samples of {path}, {nfe} NFE{spent}, {ms:.2f} ms each")
            print(f"In {s.folder}: {npz.name}  {name}-grid.png")
    finally:
        if rank == 0:
            raw.unlink(missing_ok=True)
    wait()
    if args.eval:
        inception = ["--weights", args.inception] if args.inception else []
        return fid.main([str(npz), args.eval, "--device", s.device, *inception])
    return 0


def searcher(s, args, teacher, convention, student, info, decoder):
    """--search: -> best_of's pick, and the evaluations a noise costs (those of a --scorer are not known)."""
    if any(student.config[name] != teacher.config[name] for name in ("shape", "classes")):
        raise ValueError(f"--ckpt {student_path(s, args)}: not a student of --teacher {s.teacher}: give one")
    one = one_step(student, info["convention"], args.guidance)
    if not args.scorer:
        score = label_score(velocity_of(teacher, convention, s.bf16), teacher.config["classes"])
        return best_of(args.search, one, score, s.seed), 5
    try:
        score = runpy.run_path(args.scorer)["score"]
    except Exception as e:                                           # whatever the user's file may raise
        raise ValueError(f"--scorer {args.scorer}: no score(x, y) to be had ({sit.reason(e)})") from None
    return best_of(args.search, one, lambda x, y: score(decoded(x, decoder).clamp(-1, 1), y), s.seed), 1


def parse_labels(text, classes):
    """"balanced" (all classes in turn), "7" or "0-9" -> list of labels. Raises ValueError naming the flag."""
    ends = re.fullmatch(r"(\d+)(?:-(\d+))?", f"0-{classes - 1}" if text == "balanced" else text)
    low, high = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
    if not 0 <= low <= high < classes:
        raise ValueError(f"--labels {text}: give balanced, one label or LOW-HIGH, within 0 to {classes - 1}")
    return list(range(low, high + 1))


# -----------------------------------------------------------------------------------------------------------
# 9. The command line: a flag for each setting, and what to do instead of training
# -----------------------------------------------------------------------------------------------------------

def check(s):
    """Refuse settings that cannot be meant: ValueError with the flag, the value and the fix."""
    device = re.fullmatch(r"cpu|cuda(?::(\d+))?", s.device)
    there = s.device == "cpu" or (device and int(device[1] or 0) < torch.cuda.device_count())
    share_fits = 0 <= s.correction <= 1
    whole = (m for m in range(1, 10_000) if abs(m * s.correction - round(m * s.correction)) < 1e-6)
    multiple = next(whole, 10_000) if share_fits else 1
    divides = f"times --correction {s.correction} must be whole: try a multiple of {multiple}"
    counts = ("steps", "batch", "log_every", "eval_every", "ckpt_every")
    rates, sizes = ("lr", "online_lr", "clip", "r_scale"), ("k", "warmup", "seed", "micro_batch")
    shares = ("correction", "cut", "decay_from")
    rules = [("res", s.res in PRESETS, f"choose from {sorted(PRESETS)}"),
             *((name, getattr(s, name) >= 1, "must be at least 1") for name in counts),
             *((name, 0 < getattr(s, name) < math.inf, "must be positive and finite") for name in rates),
             *((name, 0 <= getattr(s, name) < math.inf, "must be 0 or more") for name in sizes),
             *((name, 0 <= getattr(s, name) <= 1, "must be in [0, 1]") for name in shares),
             ("model", bool(re.fullmatch(rf"SiT-({'|'.join(sit.SIZES)})/[248]", s.model)),
               f"give SiT-SIZE/PATCH, SIZE of {list(sit.SIZES)}, PATCH of 2, 4, 8"),
             ("model", s.res != 28 or s.model[-1] != "8", "28 is no multiple of 8: use a patch of 2 or 4"),
             ("convention", s.convention in ("auto", *CONVENTIONS), f"auto or of {list(CONVENTIONS)}"),
             ("micro_batch", s.micro_batch % multiple == 0, divides),
             ("eval_samples", s.eval_samples >= 2, "must be at least 2: a covariance needs two"),
             ("batch", s.batch % multiple == 0, divides),
             ("alpha", 0 < s.alpha < math.inf, "must be positive; no correction is --correction 0"),
             ("gamma", 0 <= s.gamma[0] <= s.gamma[1] < math.inf, "must be LOW HIGH from 0 up"),
             ("interval", 0 <= s.interval[0] <= s.interval[1] <= 1, "must be LOW HIGH in 0 to 1"),
             ("r_location", math.isfinite(s.r_location), "must be finite"),
             ("derivative", s.derivative in ("jvp", "fd"), "choose jvp or fd"),
             ("ema", 0 <= s.ema < 1, "must be in [0, 1)"),
             ("device", device, "choose cpu, cuda or cuda:N"),
             ("device", there, "no such GPU here: use cpu")]
    for name, fine, fix in rules:
        if not fine:
            raise ValueError(f"--{name.replace('_', '-')} {plain(getattr(s, name))}: {fix}")


def parse(argv):
    parser = argparse.ArgumentParser(prog="fmd.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     epilog=__doc__[__doc__.index("Launch:"):],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"fmd.py: {message}\n")
    group = parser.add_argument_group("settings")
    for f in dataclasses.fields(Settings):
        kind = {tuple: dict(nargs=2, type=float, metavar=("LOW", "HIGH")),
                bool: dict(action=argparse.BooleanOptionalAction)}.get(f.type, dict(type=f.type))
        shown = [plain(preset.get(f.name, f.default)) for preset in PRESETS.values()]
        shown = shown[0] if len(set(shown)) == 1 else " | ".join(shown)
        group.add_argument(f"--{f.name.replace('_', '-')}", default=argparse.SUPPRESS, **kind,
                           help=f"{f.metadata['meaning']} (default: {shown})".replace("%", "%%"))
    group = parser.add_argument_group("instead of training")
    group.add_argument("--sample", type=int, metavar="N", help="N one-step samples of the student")
    group.add_argument("--rollout", type=int, metavar="N", help="N many-step samples of the teacher")
    group.add_argument("--dry-run", action="store_true", help="print settings, sizes and files to be written")
    group.add_argument("--export", metavar="F", help="write the student to F in the released layout")
    group.add_argument("--ckpt", metavar="F", help="the student (OUT/student.pt; at 28 else the bundled one)")
    group.add_argument("--guidance", type=float, default=1.5, metavar="γ", help="of what is sampled (1.5)")
    group.add_argument("--labels", default="balanced", help="balanced (default), one label or LOW-HIGH")
    group.add_argument("--solver", default="heun", help="of --rollout: heun or euler (default: heun)")
    group.add_argument("--rollout-steps", type=int, default=32, metavar="K", help="of --rollout (32)")
    group.add_argument("--search", type=int, metavar="N", help="of --rollout: from the best of N noises")
    group.add_argument("--scorer", metavar="F", help="of --search: a Python file with score(x, y)")
    group.add_argument("--eval", metavar="REF", help="then FID, sFID, IS, P/R of the samples against REF")
    group.add_argument("--inception", metavar="F", help="of --eval: Inception's weights, or random")
    args = parser.parse_args(argv)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(args).items() if hasattr(Settings, k)}
    s = Settings(**{**PRESETS.get(given.get("res", 28), {}), **given})
    tasks = [name for name in ("sample", "rollout", "export", "dry_run") if vars(args)[name]]
    makes = {"sample", "rollout"}
    users = {"ckpt": {"sample", "export", "search"}, "guidance": makes, "labels": makes,
             "solver": {"rollout"}, "rollout_steps": {"rollout"}, "search": {"rollout"},
             "scorer": {"search"}, "eval": makes, "inception": {"eval"}}
    present = {name for name, value in vars(args).items() if value}
    rules = [*((name, vars(args)[name] is None or vars(args)[name] >= 1, "must be at least 1")
               for name in ("sample", "rollout", "rollout_steps", "search")),
             *((name, name == tasks[0], f"not both: --{tasks[0]} is given") for name in tasks),
             ("solver", args.solver in ("heun", "euler"), "choose heun or euler"),
             ("guidance", args.guidance >= 0 and math.isfinite(args.guidance), "must be 0 or more"),
             *((name, vars(args)[name] == parser.get_default(name) or users[name] & present,
                "goes with " + " or ".join(f"--{task}" for task in sorted(users[name]))) for name in users)]
    for name, fine, fix in rules:
        if not fine:
            raise ValueError(f"--{name.replace('_', '-')} {vars(args)[name]}: {fix}")
    return s, args


def dry_run(s):
    """--dry-run: what a run would use and write."""
    teacher, info = load_net(s.teacher, "--teacher", s, torch.device("cpu"))
    for f in dataclasses.fields(s):
        print(f"{f.name:14} {plain(getattr(s, f.name)):26} {f.metadata['meaning']}")
    parts = build(teacher, s)
    for name, net in (("teacher", teacher), ("student", parts["student"]), ("online g", parts["online"])):
        print(f"{name:14} {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters")
    print(f"{'convention':14} {info['convention']}")
    print(f"would write    {s.folder}/: student.pt  ckpt.pt  ckpt.prev.pt  metrics.jsonl  samples.png "
          " path.png")


def keep_freed_memory():
    """Let glibc keep freed blocks instead of handing them back to the system: a step on the CPU, which asks
    for the same blocks over and over, is faster so (README, "What a step costs"). Elsewhere, nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # M_MMAP_THRESHOLD is -3 (older versions take 32 MiB at most), M_TRIM_THRESHOLD -1
    if mallopt and (mallopt(-3, 2 ** 31 - 1) or mallopt(-3, 2 ** 25)):
        mallopt(-1, 2 ** 31 - 1)


def main(argv=None):
    code, args = 0, None
    try:
        s, args = parse(argv)
        keep_freed_memory()
        if args.dry_run:
            dry_run(s)
        elif args.export:
            net, _ = load_net(student_path(s, args), "--ckpt", s, torch.device("cpu"), student=True)
            make_folder(Path(args.export).parent, flag="--export")
            export(Path(args.export), net)
        elif args.sample or args.rollout:
            code = sample(s, args)
        else:
            train(s)
    except (ValueError, OSError, FloatingPointError) as e:
        if args or os.environ.get("RANK", "0") == "0":      # flags are refused alike by all, the rest is not
            print(f"fmd.py: {e}", file=sys.stderr)
        return 1 if isinstance(e, FloatingPointError) else 2        # and torchrun ends the others
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
