# SPDX-License-Identifier: MIT
"""FMD: data-free flow-map distillation, a minimal implementation of FreeFlow (Tong et al., arXiv 2511.19428).

A pretrained flow model (the teacher) makes a sample by integrating its velocity from noise to data: tens to
hundreds of network evaluations. A flow map (the student) jumps along the same path in one. We distil one into
the other without data: every training state is drawn from the prior, where all paths start, or predicted from
there by the student itself, so no dataset can ask the teacher about states it never visits. Two signals do
it. *Prediction*: the student's path must move with the teacher's velocity. *Correction*: where the student's
samples, noised again, flow differently from the teacher's distribution, push them back.

Time: t = 1 IS NOISE, t = 0 IS DATA. Velocities point in the generating direction, from noise to data.

  symbol     in the code        meaning                                                           shape, range
  z          z                  prior sample, standard normal                                     (B, ...)
  y, ∅       y, null            class label, null label                                           (B,)
  γ          gamma              guidance strength; 1 is none                                      (B,)
  t          t                  time                                                              (B,), 0..1
  δ          delta              integration duration, from the prior at t = 1 to t = 1 - δ        (B,), 0..1
  u(x, t)    u                  teacher's velocity dx/d(1-t); E[x0 - n | x_t] on the linear path  like x
  F(z, δ)    F                  student: average velocity over the first δ of the path            like z
  f(z, δ)    flow_map(F, z, δ)  z + δ F(z, δ): where the path is after δ; f(z, 1) is the sample   like z
  v_G        v_G                ∂f/∂δ = F + δ ∂F/∂δ: velocity the student generates at            like z
  I_r(x, n)  interpolate        (1 - r) x + r n: a sample x noised to time r with fresh noise n   like x
  v_N(x, r)  v_N, g             velocity of the flow that noises the student's own samples        like x
  Δ          residual           student's velocity minus the teacher's: v_G - u or v_N - u        like x
  sg         .detach()          stop-gradient: Δ is a target; the loss moves F, not what F is compared with

Launch:
  python fmd.py                                              distil the bundled teacher (MNIST) on a laptop
  python fmd.py                                              again: resumes where that run stopped
  torchrun --nproc_per_node=8 fmd.py --batch 512             many GPUs (or processes: gloo on a CPU)
  python fmd.py --sample 100 --guidance 1.5 --labels 0-9     one-step samples
  python fmd.py --rollout 100 --solver heun                  the teacher's, in many steps
  python fmd.py --dry-run                                    settings, sizes and files, without running
"""

import argparse
import copy
import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import sit
from fid import Moments, frechet_distance

HERE = Path(__file__).resolve().parent


# -----------------------------------------------------------------------------------------------------------
# 1. Settings. [paper]: the paper's. [ours]: our choice, see the README. A free setting may change when a run
#    is resumed; the others are part of the mathematics.
# -----------------------------------------------------------------------------------------------------------

def setting(default, meaning, free=False):
    return dataclasses.field(default=default, metadata={"meaning": meaning, "free": free})


@dataclasses.dataclass(frozen=True)
class Settings:
    res: int = setting(28, "preset, by image side in pixels: 28 (MNIST, bundled teacher)")
    teacher: str = setting("assets/teacher-mnist.pt", "teacher's weights, a file in SiT's layout")
    out: str = setting("", "output folder; empty: out/RES", free=True)
    steps: int = setting(100_000, "optimiser steps; the learning rate's schedule spans them", free=True)
    batch: int = setting(64, "samples per step, over all processes")
    correction: float = setting(0.25, "share of the batch for correction; 0, 1: one objective alone [paper]")
    k: float = setting(1.0, "exponent of the weight 1/(|Δ|²/d + ε)^k of a sample [paper: 1]")
    alpha: float = setting(1.0, "strength α of correction against prediction [paper: 1; 0.3 to 3 work]")
    gamma: tuple = setting((1.0, 2.0), "guidance γ ~ U(LOW, HIGH) the student is trained for [ours]")
    interval: tuple = setting((0.0, 1.0), "times t between which the teacher is guided")
    cut: float = setting(0.7, "in correction the teacher is guided for r up to this [paper]")
    r_location: float = setting(0.8, "correction's r ~ LogitNormal: location [paper]")
    r_scale: float = setting(1.0, "and scale [ours]")
    derivative: str = setting("jvp", "∂F/∂δ by jvp (forward mode) or fd (finite difference)")
    lr: float = setting(3e-4, "peak learning rate of the student, AdamW [ours]")
    online_lr: float = setting(3e-4, "peak learning rate of g [ours]")
    warmup: int = setting(20, "steps of linear warm-up [ours]")
    decay_from: float = setting(0.5, "fraction of the steps after which the rates fall linearly to 0 [ours]")
    clip: float = setting(1.0, "gradient norm above which a network's gradient is scaled down [ours]")
    ema: float = setting(0.995, "decay per step of the averaged student, the one that is used [ours]")
    seed: int = setting(0, "every random draw is keyed by (seed, step, purpose)")
    eval_samples: int = setting(256, "noises on which student and teacher are compared", free=True)
    log_every: int = setting(25, "steps between lines of metrics.jsonl", free=True)
    eval_every: int = setting(500, "steps between evaluations; the last step has one too", free=True)
    ckpt_every: int = setting(500, "steps between checkpoints; the last step has one too", free=True)
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda or cuda:N", free=True)

    def __post_init__(self):
        share = next((m for m in range(1, 101) if round(m * self.correction, 9) % 1 == 0), 100)
        whole = math.isclose(self.batch * self.correction, self.corrected, abs_tol=1e-6)
        counts = ("steps", "batch", "log_every", "eval_every", "ckpt_every")
        rates = ("lr", "online_lr", "clip")
        rules = [("res", self.res in PRESETS, f"choose from {sorted(PRESETS)} (ImageNet is not built yet)"),
                 *((name, getattr(self, name) >= 1, "must be at least 1") for name in counts),
                 *((name, 0 < getattr(self, name) < math.inf, "must be positive") for name in rates),
                 *((name, getattr(self, name) >= 0, "must be 0 or more") for name in ("k", "warmup", "seed")),
                 ("eval_samples", self.eval_samples >= 2, "must be at least 2: a covariance needs two"),
                 ("correction", 0 <= self.correction <= 1, "must be in [0, 1]"),
                 ("batch", whole,
                   f"times --correction {self.correction} must be whole: try a multiple of {share}"),
                 ("alpha", 0 < self.alpha < math.inf, "must be positive; no correction is --correction 0"),
                 ("gamma", 0 <= self.gamma[0] <= self.gamma[1] < math.inf, "must be LOW HIGH from 0 up"),
                 ("interval", 0 <= self.interval[0] <= self.interval[1] <= 1, "must be LOW HIGH in 0 to 1"),
                 ("cut", 0 <= self.cut <= 1, "must be a time in [0, 1]"),
                 ("r_location", math.isfinite(self.r_location), "must be finite"),
                 ("r_scale", 0 < self.r_scale < math.inf, "must be positive"),
                 ("derivative", self.derivative in ("jvp", "fd"), "choose jvp or fd"),
                 ("decay_from", 0 <= self.decay_from <= 1, "must be in [0, 1]"),
                 ("ema", 0 <= self.ema < 1, "must be in [0, 1)"),
                 ("device", self.device == "cpu" or self.device.startswith("cuda"), "choose cpu or cuda"),
                 ("device", self.device == "cpu" or torch.cuda.is_available(), "no GPU here: use cpu")]
        for name, fine, fix in rules:
            if not fine:
                raise ValueError(f"--{name.replace('_', '-')} {plain(getattr(self, name))}: {fix}")

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
# agrees with the JVP at a quarter of its time; for the rest see the README, "Tried".
PRESETS = {28: {"derivative": "fd", "k": 0.5, "lr": 1e-3, "online_lr": 1e-3, "decay_from": 0.3, "steps": 900}}


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
        t, s = (x.new_full((len(x),), 1 - j / steps) for j in (i, i + 1))             # from t on to s < t
        v = u(x, t)
        if solver == "heun":
            v = (v + u(x + v / steps, s)) / 2
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
def duration_derivative(F, z, delta, value, method="jvp", h=5e-3):
    """∂F/∂δ at fixed z, partial: the tangent is 1 on δ, 0 on z. value is F(z, δ). -> like z.

    jvp: forward mode, exact; the fused attention kernels have no forward derivative, so it takes the plain
    one. fd: backward difference, one evaluation, since F(z, δ) is at hand; error O(h). It wants float32:
    bfloat16 rounds by 4e-3, as much as the step h itself. (For δ < h it looks past 0, where δ ∂F/∂δ is
    ~0.)"""
    if method == "fd":
        return (value - F(z, delta - h)) / h
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(lambda d: F(z, d), (delta,), (torch.ones_like(delta),))[1]


# -----------------------------------------------------------------------------------------------------------
# 5. The objectives. Each gives a residual Δ, a velocity of the student minus the teacher's, and the student
#    moves F against it: its loss has the gradient of <F, sg(w Δ)>.
# -----------------------------------------------------------------------------------------------------------

def interpolate(x, n, r):
    """I_r(x, n) = (1 - r) x + r n: the sample x noised to time r. x, n (B, ...), r (B,)."""
    return (1 - expand(r, x)) * x + expand(r, x) * n


def prediction(F, u, z, delta, derivative=duration_derivative):
    """Prediction (paper, Eq. 7 to 9) -> F(z, δ), with gradient, and Δ_G = v_G - u(f(z, δ), 1 - δ).

    A perfect student has δ F(z, δ) = ∫ u along the path; differentiated, F + δ ∂F/∂δ = u(f, 1 - δ):
    it generates at the velocity the teacher has where the *student* is. z (B, ...), delta (B,)."""
    average = F(z, delta)                                                             # (B, ...)
    with torch.no_grad():                                                             # sg: all else is target
        f = z + expand(delta, z) * average
        v_G = average + expand(delta, z) * derivative(F, z, delta, average)
        return average, v_G - u(f, 1 - delta)


def correction(F, u, g, z, n, r):
    """Correction (paper, Eq. 10 and 11) -> F(z, 1), with gradient, Δ_N = v_N - u at noised samples, and g's
    loss.

    Moving samples along -Δ_N lowers the KL divergence of the student's distribution from the teacher's, both
    noised to time r. v_N has no formula: g(x, r) learns it online, by flow matching on the student's own
    samples, and one call of g serves as v_N, detached, and for that loss. z and fresh noise n (B, ...), r
    (B,)."""
    average = F(z, torch.ones_like(r))                                                # (B, ...)
    x = (z + average).detach()                                                        # f(z, 1): g's data
    x_r = interpolate(x, n, r)                                                        # (B, ...)
    v_N = g(x_r, r)                                                                   # (B, ...)
    online_loss = (v_N - (x - n)).square().mean()                                     # moves g only
    with torch.no_grad():                                                             # sg
        return average, v_N - u(x_r, r), online_loss


def both(F, u, g, z, delta, n, r, derivative=duration_derivative):
    """The two objectives on one batch with one call each of student, teacher and g: the first len(delta) rows
    of z are for prediction, the other len(r) for correction. -> F (B, ...), Δ_G, Δ_N, loss of g."""
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
    """A loss with the gradient of <F, sg(w Δ_G)> over prediction's rows and <F, sg(λ w Δ_N)> over
    correction's, which come second; and λ.

    λ = α E|w Δ_G| / (E|w Δ_N| + ε) makes the mean norms equal at α = 1 [paper; after w: ours].
    `mean` must average over all processes, else λ depends on their number. One objective alone: λ = α."""
    G, N = weighted(residual_G, k), weighted(residual_N, k)
    lam = average.new_tensor(alpha)
    if len(G) and len(N):
        lam = alpha * mean(G.flatten(1).norm(dim=1)) / (mean(N.flatten(1).norm(dim=1)) + eps)
    direction = torch.cat([G, lam * N]).detach()                                      # sg, (B, ...)
    return (average * direction).mean(), lam


# -----------------------------------------------------------------------------------------------------------
# 6. From networks to the callables above, and one training step
# -----------------------------------------------------------------------------------------------------------

# What a network's time input and its output mean: its time as a function of ours, and the sign that makes the
# output a velocity in the generating direction. Student and g inherit their teacher's convention.
CONVENTIONS = {"sit": (lambda t: 1 - t, 1), "repa": (lambda t: t, -1)}


def velocity_of(net, convention):
    """A network -> velocity(x, t, y, **embeddings) in our time and direction."""
    clock, sign = CONVENTIONS[convention]
    return lambda x, t, y, **embeddings: sign * net(x, clock(t), y, **embeddings)


def teacher_of(net, convention, y, gamma, interval=(0, 1)):
    """-> u(x, t), guided by γ inside the interval, never differentiated."""
    velocity, null = velocity_of(net, convention), net.config["classes"]
    return torch.no_grad()(lambda x, t: guided(velocity, x, t, y, guidance_within(gamma, t, *interval), null))


def student_of(net, convention, y, gamma):
    """-> F(z, δ). The network's time stays at the prior; δ and γ have embedders of their own."""
    velocity = velocity_of(net, convention)
    return lambda z, delta: velocity(z, torch.ones_like(delta), y, dt=delta, gw=gamma)


def online_of(net, convention, y, gamma):
    """-> g(x, r), conditioned on y and γ as the student is, whose distribution depends on both [ours]."""
    velocity = velocity_of(net, convention)
    return lambda x, r: velocity(x, r, y, gw=gamma)


def training_losses(teacher, student, online, bare, convention, s, draws, mean=torch.mean):
    """-> the student's loss, the loss of g (None without correction), and what to log.

    draws: what prior() gave for prediction and for correction. bare: the student without its DDP wrapper, for
    the derivative, which needs no gradient."""
    pred, corr = draws
    P, C = len(pred["y"]), len(corr["y"])
    z, y, gamma = (torch.cat([pred[name], corr[name]]) for name in ("z", "y", "gamma"))
    # guidance ends with the teacher's interval in prediction and with the cut in correction
    strength = torch.cat([guidance_within(pred["gamma"], 1 - pred["delta"], *s.interval),
                          guidance_within(corr["gamma"], corr["r"], 0.0, s.cut)])
    F, u = student_of(student, convention, y, gamma), teacher_of(teacher, convention, y, strength)
    g = online_of(online, convention, corr["y"], corr["gamma"])
    F_pred = student_of(bare, convention, pred["y"], pred["gamma"])

    def derivative(_, z, delta, value):
        return duration_derivative(F_pred, z, delta, value, s.derivative)

    if not C:
        average, residual_G = prediction(F, u, z, pred["delta"], derivative)
        residual_N, online_loss = residual_G[:0], None
    elif not P:
        average, residual_N, online_loss = correction(F, u, g, z, corr["n"], corr["r"])
        residual_G = residual_N[:0]
    else:
        average, residual_G, residual_N, online_loss = both(
            F, u, g, z, pred["delta"], corr["n"], corr["r"], derivative)
    loss, lam = student_loss(average, residual_G, residual_N, s.k, s.alpha, mean)
    terms = {"prediction": mean(residual_G.flatten(1).square().mean(1))} if P else {}
    if C:
        terms |= {"correction": mean(residual_N.flatten(1).square().mean(1)),
                  "online": mean(online_loss.detach()), "lambda": lam}
    return loss, online_loss, terms


def learning_rate(step, s):
    """Factor on the peak rate: linear warm-up, constant, then linearly to zero from s.decay_from on."""
    return min((step + 1) / (s.warmup + 1), 1.0, (s.steps - step) / max(1.0, s.steps * (1 - s.decay_from)))


def training_step(teacher, parts, wrapped, convention, s, step, draws, mean=torch.mean):
    """Losses, gradients, optimisers, average: one step on parts (see build) -> what to log, as floats.

    Raises FloatingPointError before a weight has changed if a term or a gradient is not finite."""
    bare = parts["student"]
    loss, online_loss, terms = training_losses(teacher, *wrapped, bare, convention, s, draws, mean)
    for name, value in (("student", loss), ("online", online_loss)):
        if value is not None:
            value.backward()
            terms[f"{name}_grad_norm"] = torch.nn.utils.clip_grad_norm_(parts[name].parameters(), s.clip)
    values = dict(zip(terms, torch.stack(list(terms.values())).tolist()))    # the one wait for the device
    for name, value in values.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"{name} is {value} at step {step + 1}: stopped before the optimiser; "
                                     f"checkpoints in {s.folder} are untouched")
    for name, lr in (("student", s.lr), ("online", s.online_lr)):
        parts[f"{name}_opt"].param_groups[0]["lr"] = lr * learning_rate(step, s)
        parts[f"{name}_opt"].step()
        parts[f"{name}_opt"].zero_grad()
    # a short memory at first: the decay rises as 1 - 9/(10 + step), up to s.ema
    weights, averages = ([p.detach() for p in parts[name].parameters()] for name in ("student", "ema"))
    torch._foreach_lerp_(averages, weights, 1 - min(s.ema, (1 + step) / (10 + step)))
    return values


# -----------------------------------------------------------------------------------------------------------
# 7. Training. From here on it is plumbing: processes, files, pictures, the command line.
# -----------------------------------------------------------------------------------------------------------

def join(s):
    """Join the processes torchrun started, if any -> rank, world size, device, mean over all processes."""
    rank, local, world = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    if s.corrected % world or (s.batch - s.corrected) % world:
        raise ValueError(f"--batch {s.batch}: its {s.batch - s.corrected} samples for prediction and "
                         f"{s.corrected} for correction must both divide by the {world} processes")
    device = torch.device(f"cuda:{local}" if s.device == "cuda" else s.device)
    if world > 1 and ":" in s.device:
        raise ValueError(f"--device {s.device}: {world} processes need a GPU each: use --device cuda")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def mean(values):
        value = values.float().mean()
        if world > 1:
            dist.all_reduce(value)
        return value / world

    return rank, world, device, mean


def load_net(path, flag, device, student=False):
    """-> a frozen network and its file's info. Raises ValueError naming flag, file and fault."""
    path = path if Path(path).exists() else HERE / path            # bundled files, from any working directory
    try:
        net, info = sit.load(path)
    except ValueError as e:
        raise ValueError(f"{flag} {e}") from None
    if info["convention"] not in CONVENTIONS:
        raise ValueError(f"{flag} {path}: convention {info['convention']!r} is none of {sorted(CONVENTIONS)}")
    if (net.config["dt"] and net.config["gw"]) != student:
        held = "teacher (no δ and γ embedders)" if student else "student (δ and γ embedders)"
        raise ValueError(f"{flag} {path}: holds a {held}, give a {'student' if student else 'teacher'}")
    return net.to(device).eval().requires_grad_(False), info


def relative(teacher, **embedders):
    """A network that starts as the teacher, with embedders added, which say nothing at first."""
    net = sit.SiT(**{**teacher.config, "learn_sigma": False, **embedders})
    weights = teacher.state_dict()
    if teacher.config["learn_sigma"]:                               # of the read-out keep the velocity's half
        pixels, channels = teacher.config["patch"] ** 2, teacher.config["shape"][0]
        keep = torch.arange(2 * channels * pixels).view(pixels, 2 * channels)[:, :channels].reshape(-1)
        weights |= {k: v[keep] for k, v in weights.items() if k.startswith("final_layer.linear.")}
    net.load_state_dict({**net.state_dict(), **weights})
    return net.to(teacher.pos_embed.device)


def build(teacher, s):
    """-> what trains, and what a checkpoint holds: student, its average ema, online network g, optimisers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(s.seed)                                   # the embedders' inner layers start random
        parts = {"student": relative(teacher, dt=True, gw=True), "online": relative(teacher, gw=True)}
    parts["ema"] = copy.deepcopy(parts["student"]).requires_grad_(False)
    for name, lr in (("student", s.lr), ("online", s.online_lr)):
        trained = [p for p in parts[name].parameters() if p.requires_grad]
        parts[f"{name}_opt"] = torch.optim.AdamW(trained, lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    return parts


def write(path, save):
    """A file whole or not at all: save(file object) into a temporary beside it, fsync, rename."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            save(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        write(probe, lambda f: None)
        probe.unlink()
    except OSError as e:
        raise ValueError(f"--out {folder}: cannot write there ({e.strerror}); name another folder") from None


def resume(s, parts):
    """Load s.folder/ckpt.pt into parts, if it is there -> the number of steps done."""
    path, log = s.folder / "ckpt.pt", s.folder / "metrics.jsonl"
    if not path.exists():
        log.unlink(missing_ok=True)
        return 0
    ckpt = sit.read_file(path)
    try:
        fixed = [f.name for f in dataclasses.fields(s) if not f.metadata["free"]]
        there, here = ckpt["settings"], dataclasses.asdict(s)
        differ = [f"{name} {plain(there[name])} there, {plain(here[name])} here" for name in fixed
                  if there[name] != here[name]]
        if not differ:
            for name, part in parts.items():
                part.load_state_dict(ckpt[name])
        done = int(ckpt["step"])
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as e:
        raise ValueError(f"--out {s.folder}: its ckpt.pt is not of this run ({type(e).__name__}: "
                         f"{str(e).splitlines()[0][:80]}); name another folder") from None
    if differ:
        raise ValueError(f"--out {s.folder}: holds a run with {'; '.join(differ)}; name another folder")
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done]
    write(log, lambda f: f.write("".join(kept).encode()))
    return done


def train(s):
    """The whole run: distil, evaluate, write everything under s.folder."""
    rank, world, device, mean = join(s)
    teacher, info = load_net(s.teacher, "--teacher", device)
    convention, shape, classes = info["convention"], teacher.config["shape"], teacher.config["classes"]
    make_folder(s.folder)
    parts = build(teacher, s)
    first = resume(s, parts)
    wrap = torch.nn.parallel.DistributedDataParallel if world > 1 else lambda net: net
    wrapped = wrap(parts["student"]), wrap(parts["online"])          # gradients averaged, once a step each
    say = tqdm.write if rank == 0 else lambda text: None
    size = sum(p.numel() for p in parts["student"].parameters()) / 1e6
    say(f"teacher {s.teacher} (convention {convention}), student of {size:.2f} M parameters, "
        f"{world} process(es) on {device.type}, steps {first} to {s.steps}")
    truth = reference(teacher, convention, s, device) if rank == 0 else None
    quiet = rank > 0 or not sys.stderr.isatty()                      # plain lines when piped
    bar = tqdm(range(first, s.steps), initial=first, total=s.steps, disable=quiet)
    clock, since = time.perf_counter(), first
    for step in bar:
        draws = [{name: value.to(device) for name, value in
                  prior(shape, classes, s, step, part, rank, world).items()}
                 for part in ("prediction", "correction")]
        values = training_step(teacher, parts, wrapped, convention, s, step, draws, mean)
        done = step + 1
        last = done == s.steps
        if rank == 0 and (done % s.log_every == 0 or done % s.eval_every == 0 or last):
            seconds = (time.perf_counter() - clock) / (done - since)
            line = {"step": done, **{k: round(v, 6) for k, v in values.items()},
                    "lr": s.lr * learning_rate(step, s), "images_per_s": round(s.batch / seconds, 2)}
            if done % s.eval_every == 0 or last:
                line |= compare(parts["ema"], convention, truth)[0]
            with open(s.folder / "metrics.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")
            left = f"{seconds * (s.steps - done) / 60:.0f} min"
            if quiet or "frechet" in line:
                say("  ".join(f"{k} {v:.4g}" for k, v in line.items()) + f"  left {left}")
            clock, since = time.perf_counter(), done
        if rank == 0 and (done % s.ckpt_every == 0 or last):
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"step": done, "settings": dataclasses.asdict(s), "format": 1}
            write(s.folder / "ckpt.pt", lambda f: torch.save(state, f))
    if rank == 0:
        ema = parts["ema"]
        write(s.folder / "student.pt", lambda f: torch.save(
            {"ema": sit.released_names(ema.state_dict()), "config": ema.config, "convention": convention,
             "gamma": list(s.gamma), "step": max(first, s.steps)}, f))
        report(teacher, ema, convention, s, truth)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


# -----------------------------------------------------------------------------------------------------------
# 8. Sampling, evaluation, pictures
# -----------------------------------------------------------------------------------------------------------

CHUNK = 64    # samples are always computed 64 at a time: sample i is the same to the bit, however many follow


def noise(seed, indices, shape):
    """(len(indices), *shape): noise i depends on the seed and i alone."""
    return torch.stack([torch.randn(*shape, generator=generator(seed, "sample", i)) for i in indices])


def generate(make, count, seed, shape, labels, device):
    """Samples 0 to count - 1 by make(z, y) -> z, y, x on the CPU, ms per sample. Labels are taken in turn."""
    out, clock = [], time.perf_counter()
    for start in tqdm(range(0, count, CHUNK), desc="sampling", leave=False, disable=not sys.stderr.isatty()):
        i = range(start, start + CHUNK)
        z, y = noise(seed, i, shape), torch.tensor([labels[j % len(labels)] for j in i])
        out.append((z, y, make(z.to(device), y.to(device)).float().cpu()))
    ms = 1e3 * (time.perf_counter() - clock) / (CHUNK * len(out))
    return *(torch.cat(rows)[:count] for rows in zip(*out)), ms


def one_step(net, convention, gamma):
    """-> make(z, y) of a student: its flow map at δ = 1, one evaluation."""
    def make(z, y):
        ones = torch.ones(len(z), device=z.device)
        return flow_map(student_of(net, convention, y, gamma * ones), z, ones)
    return torch.no_grad()(make)


def many_steps(net, convention, gamma, steps, solver, interval=(0, 1)):
    """-> make(z, y) of a teacher: a rollout. At γ = 1 the null half of guidance is not computed."""
    def make(z, y):
        velocity = velocity_of(net, convention)
        u = teacher_of(net, convention, y, torch.full((len(z),), float(gamma), device=z.device), interval)
        return rollout(u if gamma != 1 else lambda x, t: velocity(x, t, y), z, steps, solver)
    return torch.no_grad()(make)


def evaluations(steps, solver, gamma):
    """Network evaluations of a rollout: Heun takes two a step, guidance doubles them."""
    return steps * (1 + (solver == "heun")) * (1 + (gamma != 1))


def moments(images):
    """(N, ...) -> mean and covariance of the raw pixels, in float64."""
    m = Moments(images[0].numel())
    m.add(images.flatten(1).numpy())
    return m.mean_cov()


def reference(teacher, convention, s, device, steps=16):
    """The teacher's samples on fixed noises, at the middle of the student's range of guidance."""
    gamma = sum(s.gamma) / 2
    make = many_steps(teacher, convention, gamma, steps, "heun", s.interval)
    shape, labels = teacher.config["shape"], range(teacher.config["classes"])
    z, y, x, ms = generate(make, s.eval_samples, s.seed, shape, labels, device)
    return {"z": z, "y": y, "x": x, "moments": moments(x), "ms": ms,
            "gamma": gamma, "steps": steps, "seed": s.seed}


def compare(net, convention, truth):
    """A student on the reference's noises -> metrics, samples, ms per image. endpoint_error is the mean of
    |f(z, 1) - φ(z)| / |φ(z)|, φ(z) the teacher's; frechet the Frechet distance of pixels."""
    phi, device = truth["x"], net.pos_embed.device
    make = one_step(net, convention, truth["gamma"])
    _, _, x, ms = generate(make, len(phi), truth["seed"], phi.shape[1:], truth["y"].tolist(), device)
    error = ((x - phi).flatten(1).norm(dim=1) / phi.flatten(1).norm(dim=1)).mean().item()
    frechet = frechet_distance(*moments(x), *truth["moments"])
    return {"endpoint_error": round(error, 5), "frechet": round(frechet, 4)}, x, ms


def to_uint8(x):
    """(N, C, H, W) in [-1, 1] -> (N, H, W, C) uint8, by the rule of DiT, SiT and FreeFlow."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def picture(rows, names, header=(), zoom=2):
    """Rows of uint8 tiles (n, H, W, C) -> a PIL image, each row with its name at the left, header above."""
    side, left, top = rows[0].shape[1] * zoom + 2, 8 + 7 * max(map(len, names)), 18 if header else 0
    image = Image.new("RGB", (left + len(rows[0]) * side, top + len(rows) * side), "white")
    pen = ImageDraw.Draw(image)
    for j, text in enumerate(header, start=-1):                      # the first names the column of names
        pen.text((4 if j < 0 else left + j * side + 4, 3), text, fill="black")
    for i, (row, name) in enumerate(zip(rows, names)):
        pen.text((4, top + i * side + side // 2 - 6), name, fill="black")
        for j, tile in enumerate(row):
            tile = Image.fromarray(tile.squeeze(-1) if tile.shape[-1] == 1 else tile)
            image.paste(tile.resize((side - 2, side - 2), Image.NEAREST), (left + j * side, top + i * side))
    return image


def report(teacher, ema, convention, s, truth):
    """samples.png, path.png, the closing table, and what to do next."""
    metrics, x, ms = compare(ema, convention, truth)
    pairs = [(to_uint8(truth["x"][i:i + 10]), to_uint8(x[i:i + 10])) for i in range(0, min(20, len(x)), 10)]
    names = [f"teacher, {truth['steps']} Heun steps", "student, 1 step"] * len(pairs)
    write(s.folder / "samples.png", lambda f: picture([r for p in pairs for r in p], names).save(f, "PNG"))

    device, few = ema.pos_embed.device, min(3, len(x))
    z, y = truth["z"][:few].to(device), truth["y"][:few].to(device)
    gamma, deltas = torch.full((few,), truth["gamma"], device=device), [i / 8 for i in range(9)]
    u, F = teacher_of(teacher, convention, y, gamma, s.interval), student_of(ema, convention, y, gamma)
    paths = rollout(u, z, 16, "heun", path=True)[::2]                                # (9, few, C, H, W)
    with torch.no_grad():
        maps = torch.stack([flow_map(F, z, torch.full_like(gamma, d)) for d in deltas])
    rows = [to_uint8(a[:, i]) for i in range(few) for a in (paths, maps)]
    image = picture(rows, ["teacher's path", "student's map"] * few, ["duration", *map(str, deltas)])
    write(s.folder / "path.png", lambda f: image.save(f, "PNG"))

    print(f"\n{len(x)} samples, γ = {truth['gamma']:g}      NFE  ms/image  endpoint error  Frechet distance")
    name, nfe = f"teacher, Heun {truth['steps']}", evaluations(truth["steps"], "heun", truth["gamma"])
    print(f"{name:24}{nfe:5}{truth['ms']:10.2f}{0:16.4f}{0:18.2f}")
    print(f"{'student':24}{1:5}{ms:10.2f}{metrics['endpoint_error']:16.4f}{metrics['frechet']:18.2f}")
    print(f"\nIn {s.folder}: student.pt  ckpt.pt  metrics.jsonl  samples.png  path.png")
    print(f"Next: python fmd.py --sample 100 --guidance 1.5 --ckpt {s.folder / 'student.pt'}")


def sample(s, args):
    """--sample and --rollout: N samples, of the student or of the teacher, to an ADM npz and a grid."""
    count, device = args.sample or args.rollout, torch.device(s.device)
    if args.sample:
        made = s.folder / "student.pt"
        path = args.ckpt or (made if made.exists() else "assets/student-mnist.pt")
        net, info = load_net(path, "--ckpt", device, student=True)
        low, high = info.get("gamma", (args.guidance, args.guidance))
        if not low <= args.guidance <= high:
            print(f"note: --guidance {args.guidance} is outside the range {low} to {high} this student knows")
        make, name, nfe = one_step(net, info["convention"], args.guidance), "samples", 1
    else:
        path = args.ckpt or s.teacher
        net, info = load_net(path, "--ckpt" if args.ckpt else "--teacher", device)
        make = many_steps(net, info["convention"], args.guidance, args.rollout_steps, args.solver, s.interval)
        name, nfe = "rollout", evaluations(args.rollout_steps, args.solver, args.guidance)
    labels = parse_labels(args.labels, net.config["classes"])
    make_folder(s.folder)
    _, y, x, ms = generate(make, count, s.seed, net.config["shape"], labels, device)
    x = to_uint8(x)
    rows = [x[i:i + 10] for i in range(0, min(100, count), 10)]
    write(s.folder / f"{name}.npz", lambda f: np.savez(f, arr_0=x, arr_1=y.numpy()))
    write(s.folder / f"{name}-grid.png", lambda f: picture(rows, [""] * len(rows)).save(f, "PNG"))
    print(f"{count} samples of {path}, {nfe} NFE, {ms:.2f} ms each")
    print(f"In {s.folder}: {name}.npz  {name}-grid.png")


def parse_labels(text, classes):
    """"balanced" (all classes in turn), "7" or "0-9" -> list of labels. Raises ValueError naming the flag."""
    try:
        ends = text.split("-")
        low, high = (0, classes - 1) if text == "balanced" else (int(ends[0]), int(ends[-1]))
    except ValueError:
        low, high = 1, 0
    if not 0 <= low <= high < classes:
        raise ValueError(f"--labels {text}: give balanced, one label or LOW-HIGH, within 0 to {classes - 1}")
    return list(range(low, high + 1))


# -----------------------------------------------------------------------------------------------------------
# 9. The command line: a flag for each setting, and what to do instead of training
# -----------------------------------------------------------------------------------------------------------

def parse(argv):
    parser = argparse.ArgumentParser(prog="fmd.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     epilog=__doc__[__doc__.index("Launch:"):],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"fmd.py: {message}\n")
    group = parser.add_argument_group("settings")
    for f in dataclasses.fields(Settings):
        kind = dict(nargs=2, type=float, metavar=("LOW", "HIGH")) if f.type is tuple else dict(type=f.type)
        shown = {res: plain(preset.get(f.name, f.default)) for res, preset in PRESETS.items()}
        group.add_argument(f"--{f.name.replace('_', '-')}", default=argparse.SUPPRESS, **kind,
                           help=f"{f.metadata['meaning']} (default: {shown[28]})".replace("%", "%%"))
    group = parser.add_argument_group("instead of training")
    group.add_argument("--sample", type=int, metavar="N", help="N one-step samples of the student")
    group.add_argument("--rollout", type=int, metavar="N", help="N many-step samples of the teacher")
    group.add_argument("--dry-run", action="store_true", help="print settings, sizes and files to be written")
    group.add_argument("--ckpt", metavar="F", help="their weights (default: OUT/student.pt, else bundled)")
    group.add_argument("--guidance", type=float, default=1.5, metavar="γ", help="of these two (1.5)")
    group.add_argument("--labels", default="balanced", help="balanced (default), one label or LOW-HIGH")
    group.add_argument("--solver", default="heun", help="of --rollout: heun or euler (default: heun)")
    group.add_argument("--rollout-steps", type=int, default=32, metavar="K", help="of --rollout (32)")
    args = parser.parse_args(argv)
    given = {f.name: vars(args)[f.name] for f in dataclasses.fields(Settings) if f.name in vars(args)}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    s = Settings(**{**PRESETS.get(given.get("res", 28), {}), **given})
    rules = [*((name, vars(args)[name] is None or vars(args)[name] >= 1, "must be at least 1")
               for name in ("sample", "rollout", "rollout_steps")),
             ("rollout", not (args.sample and args.rollout), "give --sample or --rollout, not both"),
             ("solver", args.solver in ("heun", "euler"), "choose heun or euler"),
             *((name, args.sample or args.rollout or vars(args)[name] == parser.get_default(name),
                "goes with --sample or --rollout") for name in ("ckpt", "guidance", "labels", "solver")),
             ("guidance", args.guidance >= 0 and math.isfinite(args.guidance), "must be 0 or more")]
    for name, fine, fix in rules:
        if not fine:
            raise ValueError(f"--{name.replace('_', '-')} {vars(args)[name]}: {fix}")
    return s, args


def dry_run(s):
    """--dry-run: what a run would use and write."""
    teacher, info = load_net(s.teacher, "--teacher", torch.device("cpu"))
    for f in dataclasses.fields(s):
        print(f"{f.name:14} {plain(getattr(s, f.name)):26} {f.metadata['meaning']}")
    parts = build(teacher, s)
    for name, net in (("teacher", teacher), ("student", parts["student"]), ("online g", parts["online"])):
        print(f"{name:14} {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters")
    print(f"{'convention':14} {info['convention']}")
    print(f"would write    {s.folder}/: student.pt  ckpt.pt  metrics.jsonl  samples.png  path.png")


def main(argv=None):
    try:
        s, args = parse(argv)
        if args.dry_run:
            dry_run(s)
        elif args.sample or args.rollout:
            sample(s, args)
        else:
            train(s)
    except (ValueError, OSError, FloatingPointError) as e:
        print(f"fmd.py: {e}", file=sys.stderr)
        return 1 if isinstance(e, FloatingPointError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
