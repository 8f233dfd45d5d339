# SPDX-License-Identifier: MIT
"""FMD: data-free flow-map distillation, a minimal implementation of FreeFlow (Tong et al., arXiv 2511.19428).

A pretrained flow model (the teacher) makes a sample by integrating its velocity from noise to data: tens to hundreds
of network evaluations. A flow map (the student) jumps along the same path in one evaluation. We distil one into the
other without any data: every training state is either drawn from the prior or predicted by the student itself, so the
student is only ever asked about states that its teacher really visits. Two signals do it. *Prediction*: the student's
path must move with the teacher's velocity. *Correction*: where the student's samples, noised again, flow differently
from the teacher's distribution, push them back.

Time: t = 1 IS NOISE, t = 0 IS DATA. Velocities point in the generating direction, from noise to data.

  symbol      in the code        meaning                                                              shape, range
  z           z                  prior sample, standard normal                                        (B, ...)
  y, ∅        y, null            class label, null label                                              (B,)
  γ           gamma              guidance strength: 1 is none                                         (B,)
  t           t                  time                                                                 (B,) in [0, 1]
  δ           delta              integration duration, from the prior at t = 1 to t = 1 - δ           (B,) in [0, 1]
  u(x, t)     u, teacher         teacher's velocity, dx/d(1-t); E[x0 - n | x_t] on the linear path    like x
  F(z, δ)     F, student         student: average velocity over the first δ of the path               like z
  f(z, δ)     flow_map(F, z, δ)  z + δ F(z, δ): where the path is after δ; f(z, 1) is the sample      like z
  v_G         in prediction      ∂f/∂δ = F + δ ∂F/∂δ: velocity at which the student generates         like z
  I_r(x, n)   interpolate        (1 - r) x + r n: a sample x, noised to time r                        like x
  v_N(x, r)   g, online          velocity of the flow that noises the student's own samples           like x
  sg          .detach()          stop-gradient: this side is a target, not a thing to move

Launch:
  python fmd.py                                                 distil the bundled teacher (28x28 digits), on a laptop
  python fmd.py                                                 again: resumes where the run stopped
  torchrun --nproc_per_node=8 fmd.py --batch 512                many GPUs (or processes: gloo on a CPU)
  python fmd.py --sample 100 --guidance 1.5 --labels 0-9        one-step samples
  python fmd.py --rollout 100 --solver heun                     the teacher's, many steps
  python fmd.py --dry-run                                       settings, sizes and files, without running
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass
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


# ---------------------------------------------------------------------------------------------------------------------
# 1. Settings. [paper]: from the paper. [ours]: our choice, with its reason in the README. "free" settings may differ
#    from those of the run that is resumed; the others are part of the mathematics.
# ---------------------------------------------------------------------------------------------------------------------

def setting(default, meaning, free=False):
    return dataclasses.field(default=default, metadata={"meaning": meaning, "free": free})


@dataclass(frozen=True)
class Settings:
    res: int = setting(28, "preset, by the side of the images in pixels: 28 [bundled teacher, MNIST]")
    teacher: str = setting("assets/teacher-mnist.pt", "teacher's weights, a file (SiT layout)")
    out: str = setting("", "output folder; default out/RES", free=True)
    steps: int = setting(1500, "optimiser steps", free=True)
    batch: int = setting(64, "global batch, samples per step over all processes")
    correction: float = setting(0.25, "share of the batch for correction, the rest for prediction; 0 or 1: one alone [paper]")
    k: float = setting(1.0, "weight 1/(|Δ|²/d + ε)^k of a sample's residual Δ [paper: 1]")
    alpha: float = setting(1.0, "strength α of correction against prediction [paper: 1, robust from 0.3 to 3]")
    gamma: tuple = setting((1.0, 2.0), "range of guidance γ ~ U(low, high) the student is trained for [ours]")
    interval: tuple = setting((0.0, 1.0), "times t in which the teacher is guided")
    cut: float = setting(0.7, "correction: teacher guided for r up to this only [paper: 0.7]")
    r_location: float = setting(0.8, "correction: r ~ LogitNormal(location, scale) [paper: 0.8]")
    r_scale: float = setting(1.0, "correction: scale of that distribution [ours]")
    derivative: str = setting("jvp", "∂F/∂δ: jvp (forward mode, exact) or fd (backward difference, a third of the cost)")
    lr: float = setting(3e-4, "peak learning rate of the student, AdamW [ours]")
    online_lr: float = setting(3e-4, "peak learning rate of the online network g [ours]")
    warmup: int = setting(20, "steps of linear warm-up [ours]")
    decay_from: float = setting(0.5, "fraction of the steps after which the rate falls linearly to 0 [ours]")
    clip: float = setting(1.0, "gradient norm above which a gradient is scaled down [ours]")
    ema: float = setting(0.995, "decay per step of the student's moving average, which is what is saved [ours]")
    seed: int = setting(0, "every random draw is keyed by (seed, step, purpose)")
    eval_samples: int = setting(256, "noises on which student and teacher are compared", free=True)
    log_every: int = setting(25, "steps between lines of metrics.jsonl", free=True)
    eval_every: int = setting(500, "steps between evaluations (and at the end)", free=True)
    ckpt_every: int = setting(500, "steps between checkpoints (and at the end)", free=True)
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu", free=True)

    def __post_init__(self):
        def need(ok, name, fix):
            if not ok:
                value = getattr(self, name)
                value = " ".join(map(str, value)) if isinstance(value, tuple) else value
                raise ValueError(f"--{name.replace('_', '-')} {value}: {fix}")

        need(self.res in PRESETS, "res", f"choose from {sorted(PRESETS)}")
        for name in ("steps", "batch", "log_every", "eval_every", "ckpt_every"):
            need(getattr(self, name) >= 1, name, "must be at least 1")
        need(self.eval_samples >= 2, "eval_samples", "must be at least 2: a covariance needs two")
        need(0 <= self.correction <= 1, "correction", "must be in [0, 1]")
        need(math.isclose(self.batch * self.correction, self.corrected, abs_tol=1e-6), "batch",
             f"times --correction {self.correction} is not a whole number: choose a multiple of "
             f"{next((m for m in range(1, 101) if (m * self.correction) % 1 < 1e-9), 100)}")
        need(self.k >= 0, "k", "must be 0 or more")
        need(self.alpha > 0, "alpha", "must be positive; to switch correction off use --correction 0")
        need(0 <= self.gamma[0] <= self.gamma[1] < math.inf, "gamma", "give a range as LOW HIGH, 0 <= LOW <= HIGH")
        need(0 <= self.interval[0] <= self.interval[1] <= 1, "interval", "give times as LOW HIGH, 0 <= LOW <= HIGH <= 1")
        need(0 <= self.cut <= 1, "cut", "must be a time in [0, 1]")
        need(math.isfinite(self.r_location), "r_location", "must be finite")
        need(0 < self.r_scale < math.inf, "r_scale", "must be positive")
        need(self.derivative in ("jvp", "fd"), "derivative", "choose jvp or fd")
        for name in ("lr", "online_lr", "clip"):
            need(0 < getattr(self, name) < math.inf, name, "must be positive")
        need(self.warmup >= 0, "warmup", "must be 0 or more")
        need(0 <= self.decay_from <= 1, "decay_from", "must be in [0, 1]")
        need(0 <= self.ema < 1, "ema", "must be in [0, 1)")
        need(self.seed >= 0, "seed", "must be 0 or more")
        need(self.device.split(":")[0] in ("cpu", "cuda"), "device", "choose cpu or cuda")
        need(self.device == "cpu" or torch.cuda.is_available(), "device", "torch sees no GPU here: use --device cpu")

    @property
    def corrected(self):
        """Samples of the global batch that go to the correction objective."""
        return round(self.batch * self.correction)

    @property
    def folder(self):
        return Path(self.out or f"out/{self.res}")


PRESETS = {28: {}}              # what differs from the defaults above, by resolution


# ---------------------------------------------------------------------------------------------------------------------
# 2. The prior. All randomness of a step is drawn on the CPU for the whole global batch from generators keyed by what
#    it is for, and sliced per process: the same numbers on any device and world size, and after a resume.
# ---------------------------------------------------------------------------------------------------------------------

def generator(*key):
    """A torch.Generator for a key such as (seed, step, "noise"): equal keys, equal draws; no state to save."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def prior(shape, null, s, step, part, rank=0, world=1):
    """One step's draws for this process -> dict of CPU tensors. part is "prediction" or "correction".

    z (b, *shape) noise; y (b,) labels, the null class included as often as any other; gamma (b,) guidance. Then delta
    (b,) ~ U(0, 1) for prediction; n (b, *shape) fresh noise and r (b,) ~ LogitNormal for correction, where δ = 1."""
    size = s.corrected if part == "correction" else s.batch - s.corrected
    draw = {name: generator(s.seed, step, part, name) for name in ("z", "y", "gamma", "delta", "n", "r")}
    low, high = s.gamma
    out = {"z": torch.randn(size, *shape, generator=draw["z"]),
           "y": torch.randint(null, (size,), generator=draw["y"]),
           "gamma": low + (high - low) * torch.rand(size, generator=draw["gamma"])}
    if part == "prediction":
        out["delta"] = torch.rand(size, generator=draw["delta"])
    else:
        out["n"] = torch.randn(size, *shape, generator=draw["n"])
        out["r"] = torch.sigmoid(s.r_location + s.r_scale * torch.randn(size, generator=draw["r"]))
    return {name: value[rank * size // world:(rank + 1) * size // world] for name, value in out.items()}


# ---------------------------------------------------------------------------------------------------------------------
# 3. The teacher: a guided velocity and its rollout
# ---------------------------------------------------------------------------------------------------------------------

def expand(t, x):
    """(B,) -> (B, 1, ..., 1), to multiply x (B, ...)."""
    return t.view(-1, *[1] * (x.ndim - 1))


def guidance_within(gamma, t, low, high):
    """γ where low <= t <= high, else 1, which is no guidance. All (B,)."""
    return torch.where((low <= t) & (t <= high), gamma, torch.ones_like(gamma))


def guided(velocity, x, t, y, gamma, null):
    """Classifier-free guidance: u(x|∅) + γ (u(x|y) - u(x|∅)), both halves in one call of velocity(x, t, y).

    x (B, ...), t, y, gamma (B,), null an int -> (B, ...). On every channel (the DiT code guides only three)."""
    halves = velocity(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, null)]))  # (2B, ...)
    u_y, u_null = halves.chunk(2)                                                # 2 x (B, ...)
    return u_null + expand(gamma, x) * (u_y - u_null)


@torch.no_grad()
def rollout(u, z, steps, solver="heun", path=False):
    """Integrate dx/d(1-t) = u(x, t) from t = 1 to t = 0 on a uniform grid. Euler: 1 evaluation a step, Heun: 2.

    u(x, t) with x (B, ...), t (B,) -> (B, ...). -> end point (B, ...), or the path (steps + 1, B, ...)."""
    if solver not in ("heun", "euler"):
        raise ValueError(f"solver {solver!r}: choose heun or euler")
    x, xs = z, [z]
    for i in range(steps):
        t, s = (x.new_full((len(x),), 1 - j / steps) for j in (i, i + 1))        # from t on to s < t
        v = u(x, t)
        if solver == "heun":
            v = (v + u(x + v / steps, s)) / 2
        x = x + v / steps
        xs.append(x)
    return torch.stack(xs) if path else x


# ---------------------------------------------------------------------------------------------------------------------
# 4. The student: a flow map, and the velocity at which it generates
# ---------------------------------------------------------------------------------------------------------------------

def flow_map(F, z, delta):
    """f(z, δ) = z + δ F(z, δ) (paper, Eq. 5). With δ = 1 this is the sampler: one evaluation of the student."""
    return z + expand(delta, z) * F(z, delta)


@torch.no_grad()
def duration_derivative(F, z, delta, value, method="jvp", h=5e-3):
    """∂F/∂δ at fixed z: a partial derivative, the tangent is 1 on δ and nothing on z. value is F(z, δ). -> like z.

    jvp: forward mode, exact; attention needs its plain kernel, the fused ones have no forward derivative. fd:
    backward difference, a single evaluation since F(z, δ) is at hand; error O(h). It wants float32: bfloat16 rounds
    by 4e-3, as much as the step h itself."""
    if method == "fd":
        return (value - F(z, delta - h)) / h
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(lambda d: F(z, d), (delta,), (torch.ones_like(delta),))[1]


# ---------------------------------------------------------------------------------------------------------------------
# 5. The two objectives. Each compares a velocity of the student's with the teacher's and calls the difference Δ; the
#    loss is built so that its gradient is that of <F, sg(w Δ)>: move F against the difference.
# ---------------------------------------------------------------------------------------------------------------------

def interpolate(x, n, r):
    """I_r(x, n) = (1 - r) x + r n: sample x noised to time r."""
    return (1 - expand(r, x)) * x + expand(r, x) * n


def prediction(F, u, z, delta, derivative=duration_derivative):
    """Prediction objective (paper, Eq. 7 to 9) -> F(z, δ), with gradient, and the residual Δ_G = v_G - u(f(z, δ), 1 - δ).

    Differentiating δ F(z, δ) = ∫ u along the path in δ gives F + δ ∂F/∂δ = u(f, 1 - δ): the student must generate at
    the velocity the teacher has where the *student* is. F(z, δ), u(x, t) callables; z (B, ...), delta (B,)."""
    average = F(z, delta)                                                        # (B, ...)
    with torch.no_grad():                                                        # sg: the rest is the target
        f = z + expand(delta, z) * average                                       # f(z, δ)
        v_G = average + expand(delta, z) * derivative(F, z, delta, average)         # ∂f/∂δ
        return average, v_G - u(f, 1 - delta)


def correction(F, u, g, z, n, r):
    """Correction objective (paper, Eq. 10 and 11) -> F(z, 1), with gradient, the residual Δ_N = v_N - u at the noised
    sample, and the loss that trains g.

    Δ_N is the direction in which the KL divergence of the student's from the teacher's distribution, both noised to
    time r, falls. Its v_N has no formula: g(x, r) learns it online, by flow matching on the student's own samples,
    and one evaluation of g serves as v_N and for that loss. z (B, ...), fresh noise n (B, ...), r (B,)."""
    average = F(z, torch.ones_like(r))                                           # (B, ...)
    x = (z + average).detach()                                                   # f(z, 1): data, as far as g knows
    x_r = interpolate(x, n, r)                                                   # (B, ...)
    v_N = g(x_r, r)                                                              # (B, ...) with gradient, for g only
    online_loss = (v_N - (x - n)).square().mean()
    with torch.no_grad():
        return average, v_N - u(x_r, r), online_loss


def both(F, u, g, z, delta, n, r, derivative=duration_derivative):
    """The two objectives on one batch, with one evaluation each of student, teacher and g: the first len(delta) rows
    of z are for prediction, the other len(r) for correction. -> F (B, ...), Δ_G, Δ_N, the loss of g."""
    P = len(delta)
    average = F(z, torch.cat([delta, torch.ones_like(r)]))                       # (B, ...)
    f = z.detach() + expand(torch.cat([delta, torch.ones_like(r)]), z) * average.detach()
    x_r = interpolate(f[P:], n, r)                                               # (B - P, ...)
    v_N = g(x_r, r)
    online_loss = (v_N - (f[P:] - n)).square().mean()
    with torch.no_grad():
        velocity = u(torch.cat([f[:P], x_r]), torch.cat([1 - delta, r]))         # (B, ...)
        v_G = average[:P] + expand(delta, f) * derivative(F, z[:P], delta, average[:P])
        return average, v_G - velocity[:P], v_N - velocity[P:], online_loss


def weighted(residual, k=1.0, eps=1e-3):
    """w Δ with w = 1 / (|Δ|²/d + ε)^k per sample, d its number of dimensions. At k = 1 a sample counts for about
    1/|Δ|, so the few worst do not drown the rest; the paper's Table 1 finds it decisive once correction joins in."""
    size = residual.flatten(1).square().mean(1)                                  # (B,)  |Δ|²/d
    return residual / expand((size + eps) ** k, residual)                        # (B, ...)


def student_loss(average, residual_G, residual_N, k=1.0, alpha=1.0, mean=torch.mean, eps=1e-6):
    """A loss whose gradient is that of <F, sg(w Δ)>, prediction's rows first, correction's times λ below them; and λ.

    λ = α E|w Δ_G| / (E|w Δ_N| + ε) gives the two equal force at α = 1 [paper; after the weights: ours]. `mean` must
    average over all processes, else λ depends on their number. With one objective alone (no rows) λ = α."""
    G, N = weighted(residual_G, k), weighted(residual_N, k)
    lam = average.new_tensor(alpha)
    if len(G) and len(N):
        lam = alpha * mean(G.flatten(1).norm(dim=1)) / (mean(N.flatten(1).norm(dim=1)) + eps)
    direction = torch.cat([G, lam * N]).detach()                                 # sg: a target, (B, ...)
    return (average * direction).mean(), lam


# ---------------------------------------------------------------------------------------------------------------------
# 6. From networks to the callables above
# ---------------------------------------------------------------------------------------------------------------------

# What a network's time input and output mean: its time as a function of ours, and the sign that makes its output a
# velocity in the generating direction. The student and g inherit their teacher's convention.
CONVENTIONS = {"sit": (lambda t: 1 - t, 1), "repa": (lambda t: t, -1)}


def velocity_of(net, convention):
    """A network -> velocity(x, t, y, **embeddings) in our time and direction."""
    clock, sign = CONVENTIONS[convention]
    return lambda x, t, y, **embeddings: sign * net(x, clock(t), y, **embeddings)


def teacher_of(net, convention, y, gamma, null, interval=(0, 1)):
    """-> u(x, t), guided by γ inside the interval. Not differentiated, ever."""
    velocity = velocity_of(net, convention)
    return torch.no_grad()(lambda x, t: guided(velocity, x, t, y, guidance_within(gamma, t, *interval), null))


def student_of(net, convention, y, gamma):
    """-> F(z, δ). The network's time input stays at the prior; δ and γ come in through their own embedders."""
    velocity = velocity_of(net, convention)
    return lambda z, delta: velocity(z, torch.ones_like(delta), y, dt=delta, gw=gamma)


def online_of(net, convention, y, gamma):
    """-> g(x, r). Conditioned on y and γ like the student, whose distribution depends on both [ours]."""
    velocity = velocity_of(net, convention)
    return lambda x, r: velocity(x, r, y, gw=gamma)


def training_losses(teacher, student, online, bare, convention, s, draws, mean=torch.mean):
    """One step's losses: of the student, of g, and what to log. draws: (prediction's, correction's) from prior().
    bare: the student without its DDP wrapper, for the derivative, which needs no gradient."""
    pred, corr = draws
    P, C, null = len(pred["y"]), len(corr["y"]), teacher.config["classes"]
    z, y, gamma = (torch.cat([pred[name], corr[name]]) for name in ("z", "y", "gamma"))
    # Guidance ends at the teacher's interval in prediction and at the cut in correction: γ = 1 says "none".
    inside = torch.cat([guidance_within(pred["gamma"], 1 - pred["delta"], *s.interval),
                        guidance_within(corr["gamma"], corr["r"], 0.0, s.cut)])
    F, u = student_of(student, convention, y, gamma), teacher_of(teacher, convention, y, inside, null)
    F_pred = student_of(bare, convention, y[:P], gamma[:P])

    def derivative(_, *at):
        return duration_derivative(F_pred, *at, method=s.derivative)

    g = online_of(online, convention, corr["y"], corr["gamma"])
    if not C:
        average, residual_G = prediction(F, u, z, pred["delta"], derivative)
        residual_N, online_loss = residual_G[:0], None
    elif not P:
        average, residual_N, online_loss = correction(F, u, g, z, corr["n"], corr["r"])
        residual_G = residual_N[:0]
    else:
        average, residual_G, residual_N, online_loss = both(F, u, g, z, pred["delta"], corr["n"], corr["r"], derivative)
    loss, lam = student_loss(average, residual_G, residual_N, s.k, s.alpha, mean)
    terms = {"prediction": mean(residual_G.square().flatten(1).mean(1))} if P else {}
    if C:
        terms |= {"correction": mean(residual_N.square().flatten(1).mean(1)),
                  "online": mean(online_loss.detach()[None]), "lambda": lam}
    return loss, online_loss, terms


def learning_rate(step, s):
    """Factor of the peak rate: linear warm-up, constant, linear to zero from s.decay_from of the steps on."""
    left = (s.steps - step) / max(1.0, s.steps * (1 - s.decay_from))
    return min(1.0, (step + 1) / (s.warmup + 1), left)


# ---------------------------------------------------------------------------------------------------------------------
# 7. Training. From here on it is plumbing: processes, files, pictures, the command line.
# ---------------------------------------------------------------------------------------------------------------------

def join(s):
    """Join the processes torchrun started, if it did -> rank, world size, device, mean over all processes."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    for name, size in (("prediction", s.batch - s.corrected), ("correction", s.corrected)):
        if size % world:
            raise ValueError(f"--batch {s.batch}: its {size} samples for {name} do not divide by {world} processes")
    device = torch.device(f"cuda:{local}" if s.device == "cuda" else s.device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def mean(values):
        value = values.float().mean()
        if world > 1:
            dist.all_reduce(value)
        return value / world

    return rank, world, device, mean


def load_net(path, flag, device, student=False):
    """-> a network of sit.py, frozen, and its file's info. Raises ValueError naming flag, file and fix."""
    path = path if Path(path).exists() else HERE / path          # bundled files, whatever the working directory
    try:
        net, info = sit.load(path)
    except ValueError as e:
        raise ValueError(f"{flag} {e}") from None
    if info["convention"] not in CONVENTIONS:
        raise ValueError(f"{flag} {path}: convention {info['convention']!r} is none of {sorted(CONVENTIONS)}")
    if (net.config["dt"] and net.config["gw"]) != student:
        raise ValueError(f"{flag} {path}: holds a {'teacher' if student else 'student'}, not a "
                         f"{'student (it has no δ and γ embedders)' if student else 'teacher'}")
    return net.to(device).eval().requires_grad_(False), info


def relative(net, **extra):
    """A network shaped like `net` with embedders added; starts from net's weights (the new embedders add zero)."""
    other = sit.SiT(**{**net.config, "learn_sigma": False, **extra}).to(next(net.parameters()).device)
    weights = {k: v for k, v in net.state_dict().items()}
    if net.config["learn_sigma"]:                                # keep the velocity's half of the read-out
        p, (channels, *_) = net.config["patch"], net.config["shape"]
        keep = torch.arange(2 * channels * p * p).view(p * p, 2 * channels)[:, :channels].reshape(-1)
        weights |= {f"final_layer.linear.{k}": weights[f"final_layer.linear.{k}"][keep] for k in ("weight", "bias")}
    other.load_state_dict({**other.state_dict(), **weights})
    return other


def write(path, save):
    """Write a file whole or not at all: save(file object) into a temporary beside it, fsync, rename."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            save(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder):
    """Create the output folder, or raise ValueError naming it and the fix."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / ".writable", lambda f: None)
        (folder / ".writable").unlink()
    except OSError as e:
        raise ValueError(f"--out {folder}: cannot write there ({e.strerror}); name another folder") from None


def train(s):
    """The whole run: distil, evaluate, write everything under s.folder. Resumes from s.folder/ckpt.pt."""
    rank, world, device, mean = join(s)
    teacher, info = load_net(s.teacher, "--teacher", device)
    convention, shape, classes = info["convention"], teacher.config["shape"], teacher.config["classes"]
    make_folder(s.folder)
    student, ema = (relative(teacher, dt=True, gw=True) for _ in range(2))
    online = relative(teacher, gw=True)
    ema.requires_grad_(False)
    pairs = ((student, s.lr), (online, s.online_lr))
    nets = {"student": student, "ema": ema, "online": online}
    opts = {name: torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=lr, betas=(0.9, 0.99),
                                    weight_decay=0.0, fused=True)
            for name, (net, lr) in zip(("student_opt", "online_opt"), pairs)}
    first = resume(s, nets | opts)
    wrap = torch.nn.parallel.DistributedDataParallel if world > 1 else lambda net: net
    student_ddp, online_ddp = wrap(student), wrap(online)        # gradients averaged over processes, once a step

    say = (lambda text: tqdm.write(text)) if rank == 0 else (lambda text: None)
    size = sum(p.numel() for p in student.parameters()) / 1e6
    say(f"teacher {s.teacher}: SiT {teacher.config['depth']} x {teacher.config['width']}, convention {convention}; "
        f"student {size:.2f} M parameters; {world} process(es) on {device.type}; steps {first} to {s.steps}")
    judge = evaluator(teacher, convention, s, device) if rank == 0 else None
    bar = tqdm(range(first, s.steps), initial=first, total=s.steps, disable=rank > 0 or not sys.stderr.isatty())
    clock, since = time.perf_counter(), first
    for step in bar:
        draws = [{name: value.to(device) for name, value in prior(shape, classes, s, step, part, rank, world).items()}
                 for part in ("prediction", "correction")]
        loss, online_loss, terms = training_losses(teacher, student_ddp, online_ddp, student, convention, s, draws, mean)
        loss.backward()
        terms["grad_norm"] = torch.nn.utils.clip_grad_norm_(student.parameters(), s.clip)
        if online_loss is not None:
            online_loss.backward()
            terms["online_grad_norm"] = torch.nn.utils.clip_grad_norm_(online.parameters(), s.clip)
        values = dict(zip(terms, torch.stack([v.detach() for v in terms.values()]).tolist()))
        for name, value in values.items():
            if not math.isfinite(value):                         # before the optimiser: the weights are still good
                raise FloatingPointError(f"{name} is {value} at step {step}: stopped before the optimiser step; "
                                         f"the last good checkpoint is in {s.folder}")
        for opt, (_, lr) in zip(opts.values(), pairs):
            opt.param_groups[0]["lr"] = lr * learning_rate(step, s)
            opt.step()
            opt.zero_grad()
        # the average of the first steps is that of all of them: 1 - 1/n until that exceeds s.ema
        torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in student.parameters()],
                             1 - min(s.ema, (1 + step) / (10 + step)))
        done = step + 1
        if rank == 0 and (done % s.log_every == 0 or done == s.steps):
            seconds = (time.perf_counter() - clock) / (done - since)
            line = {"step": done, **{k: round(v, 6) for k, v in values.items()}, "lr": s.lr * learning_rate(step, s),
                    "images_per_s": round(s.batch / seconds, 2)}
            if done % s.eval_every == 0 or done == s.steps:
                line |= judge(ema)
            with open(s.folder / "metrics.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")
            if not bar.disable:
                bar.set_postfix_str(f"prediction {values.get('prediction', 0):.3f}")
            if bar.disable or "endpoint_error" in line:
                eta = time.strftime("%H:%M:%S", time.gmtime(seconds * (s.steps - done)))
                say("  ".join(f"{k} {v:.4g}" for k, v in line.items()) + f"  left {eta}")
            clock, since = time.perf_counter(), done
        if rank == 0 and (done % s.ckpt_every == 0 or done == s.steps):
            state = {name: part.state_dict() for name, part in (nets | opts).items()}
            state |= {"step": done, "settings": dataclasses.asdict(s), "format": 1}
            write(s.folder / "ckpt.pt", lambda f: torch.save(state, f))
    if rank == 0:
        write(s.folder / "student.pt", lambda f: torch.save(
            {"ema": sit.released_names(ema.state_dict()), "config": ema.config, "convention": convention,
             "gamma": list(s.gamma), "step": s.steps}, f))
        report(teacher, ema, convention, s, judge)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def resume(s, parts):
    """Load s.folder/ckpt.pt into networks and optimisers, if it is there -> the step to go on from."""
    path = s.folder / "ckpt.pt"
    if not path.exists():
        (s.folder / "metrics.jsonl").unlink(missing_ok=True)
        return 0
    ckpt = sit.read_file(path)
    fields = {f.name for f in dataclasses.fields(s) if not f.metadata["free"]}
    try:
        old, new = ckpt["settings"], dataclasses.asdict(s)
        differ = [f"{name} {old.get(name)} there, {new[name]} here" for name in sorted(fields)
                  if old.get(name) != new[name]]
        if not differ:
            for name, part in parts.items():
                part.load_state_dict(ckpt[name])
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: not a checkpoint of this run ({str(e).splitlines()[0][:80]}); "
                         "name another --out") from None
    if differ:
        raise ValueError(f"--out {s.folder}: holds a run with other settings ({'; '.join(differ)}); name another --out")
    lines = (s.folder / "metrics.jsonl").read_text().splitlines() if (s.folder / "metrics.jsonl").exists() else []
    kept = [line for line in lines if json.loads(line)["step"] <= ckpt["step"]]
    write(s.folder / "metrics.jsonl", lambda f: f.write("".join(line + "\n" for line in kept).encode()))
    return ckpt["step"]


# ---------------------------------------------------------------------------------------------------------------------
# 8. Sampling and evaluation
# ---------------------------------------------------------------------------------------------------------------------

CHUNK = 64      # samples are always computed 64 at a time, so that sample i is the same to the bit however many follow


def noise(seed, indices, shape):
    """(len(indices), *shape): noise i depends on the seed and i alone."""
    return torch.stack([torch.randn(*shape, generator=generator(seed, "sample", i)) for i in indices])


def generate(make, count, seed, shape, labels, device, first=0):
    """make(z, y) -> x on samples first to first + count - 1, in chunks -> z, y, x on the CPU. Sample i has the noise of
    (seed, i) and label labels[i mod len(labels)]."""
    out = []
    for start in tqdm(range(first, first + count, CHUNK), desc="samples", leave=False, disable=not sys.stderr.isatty()):
        i = range(start, start + CHUNK)
        z, y = noise(seed, i, shape), torch.tensor([labels[j % len(labels)] for j in i])
        out.append((z, y, make(z.to(device), y.to(device)).float().cpu()))
    return [torch.cat(parts)[:count] for parts in zip(*out)]


def one_step(net, convention, gamma):
    """make(z, y) of the student: its flow map at δ = 1, one evaluation."""
    def make(z, y):
        ones = torch.ones(len(z), device=z.device)
        with torch.no_grad():
            return flow_map(student_of(net, convention, y, gamma * ones), z, ones)
    return make


def many_steps(net, convention, gamma, steps, solver, interval=(0, 1)):
    """make(z, y) of the teacher: a rollout. Without guidance there is no null half to compute."""
    def make(z, y):
        strength = torch.full((len(z),), float(gamma), device=z.device)
        u = teacher_of(net, convention, y, strength, net.config["classes"], interval)
        if gamma == 1:
            velocity = velocity_of(net, convention)
            return rollout(lambda x, t: velocity(x, t, y), z, steps, solver)
        return rollout(u, z, steps, solver)
    return make


def distance(a, b):
    """Frechet distance between two sets of images (N, ...), on raw pixels."""
    moments = []
    for images in (a, b):
        m = Moments(images[0].numel())
        m.add(images.flatten(1).numpy())
        moments += m.mean_cov()
    return frechet_distance(*moments)


def evaluator(teacher, convention, s, device, steps=16):
    """Roll the teacher out once on fixed noises -> judge(student), which compares the student on the same noises:
    endpoint_error = mean |f(z, 1) - φ(z)| / |φ(z)|, φ(z) the teacher's end point, and frechet, the pixel Frechet
    distance to the teacher's samples. Guidance is the middle of the trained range."""
    shape, labels, gamma = teacher.config["shape"], range(teacher.config["classes"]), sum(s.gamma) / 2
    clock = time.perf_counter()
    z, y, phi = generate(many_steps(teacher, convention, gamma, steps, "heun", s.interval), s.eval_samples, s.seed,
                         shape, labels, device)
    teacher_ms = (time.perf_counter() - clock) / s.eval_samples * 1e3

    def judge(net):
        clock = time.perf_counter()
        x = generate(one_step(net, convention, gamma), s.eval_samples, s.seed, shape, labels, device)[2]
        ms = (time.perf_counter() - clock) / s.eval_samples * 1e3
        error = ((x - phi).flatten(1).norm(dim=1) / phi.flatten(1).norm(dim=1)).mean().item()
        judge.student, judge.ms = x, ms
        return {"endpoint_error": round(error, 5), "frechet": round(distance(x, phi), 4)}

    judge.z, judge.y, judge.phi, judge.gamma, judge.steps, judge.teacher_ms = z, y, phi, gamma, steps, teacher_ms
    return judge


def to_uint8(x):
    """(N, C, H, W) in [-1, 1] -> (N, H, W, C) uint8, by the rule of DiT, SiT and FreeFlow."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def picture(rows, names, header=(), zoom=2):
    """rows: uint8 arrays (n, H, W, C) -> PIL image, a line of tiles per row with its name at the left."""
    side, left, top = rows[0].shape[1] * zoom, 8 + 7 * max(map(len, names)), 18 if header else 0
    image = Image.new("RGB", (left + len(rows[0]) * (side + 2), top + len(rows) * (side + 2)), "white")
    pen = ImageDraw.Draw(image)
    for j, text in enumerate(header):
        pen.text((left + j * (side + 2) + 4, 3), text, fill="black")
    for i, (row, name) in enumerate(zip(rows, names)):
        pen.text((4, top + i * (side + 2) + side // 2 - 6), name, fill="black")
        for j, tile in enumerate(row):
            tile = Image.fromarray(tile.squeeze(-1) if tile.shape[-1] == 1 else tile).resize((side, side), Image.NEAREST)
            image.paste(tile, (left + j * (side + 2), top + i * (side + 2)))
    return image


def report(teacher, ema, convention, s, judge):
    """samples.png, path.png, the closing table and what to do next."""
    final = judge(ema)
    phi, x = to_uint8(judge.phi), to_uint8(judge.student)
    rows = [r for i in range(0, min(20, len(x)), 10) for r in (phi[i:i + 10], x[i:i + 10])]
    names = [f"teacher, {judge.steps} Heun steps", "student, 1 step"] * (len(rows) // 2)
    write(s.folder / "samples.png", lambda f: picture(rows, names).save(f, "PNG"))

    device = next(ema.parameters()).device
    few = min(3, len(x))
    z, y = judge.z[:few].to(device), judge.y[:few].to(device)
    gamma = torch.full((few,), judge.gamma, device=device)
    u = teacher_of(teacher, convention, y, gamma, teacher.config["classes"], s.interval)
    F = student_of(ema, convention, y, gamma)
    deltas = [i / 8 for i in range(9)]
    truth = rollout(u, z, 16, "heun", path=True)[::2]                                        # (9, few, C, H, W)
    with torch.no_grad():
        guess = torch.stack([flow_map(F, z, torch.full((few,), d, device=device)) for d in deltas])
    rows = [to_uint8(path[:, i].cpu()) for i in range(few) for path in (truth, guess)]
    names = ["teacher's path", "student's flow map"] * few
    write(s.folder / "path.png", lambda f: picture(rows, names, [f"δ = {d}" for d in deltas]).save(f, "PNG"))

    nfe = 4 * judge.steps                    # Heun evaluates twice a step, guidance doubles it
    print(f"\n{'':24}{'NFE':>6}{'ms/image':>10}{'endpoint error':>16}{'Frechet':>9}   "
          f"({len(x)} samples, γ = {judge.gamma:g})")
    print(f"{f'teacher, Heun {judge.steps}':24}{nfe:6d}{judge.teacher_ms:10.2f}{0:16.4f}{0:9.2f}")
    print(f"{'student, one step':24}{1:6d}{judge.ms:10.2f}{final['endpoint_error']:16.4f}{final['frechet']:9.2f}")
    print(f"\nIn {s.folder}: student.pt  ckpt.pt  metrics.jsonl  samples.png  path.png")
    print(f"Next: python fmd.py --sample 100 --guidance 1.5 --ckpt {s.folder / 'student.pt'}")


def parse_labels(text, classes):
    """"balanced" (all classes in turn), "7" or "0-9" -> list of labels. Raises ValueError naming the flag."""
    try:
        low, high = (0, classes - 1) if text == "balanced" else (int(text.split("-")[0]), int(text.split("-")[-1]))
    except ValueError:
        low, high = 1, 0
    if not 0 <= low <= high < classes:
        raise ValueError(f"--labels {text}: give 'balanced', one label or LOW-HIGH, within 0 to {classes - 1}")
    return list(range(low, high + 1))


def sample(s, args):
    """--sample and --rollout: N samples to samples.npz (ADM layout) and a grid, of the student or of the teacher."""
    device = torch.device(s.device)
    count = args.sample or args.rollout
    if args.sample:
        made = s.folder / "student.pt"
        path = args.ckpt or (made if made.exists() else "assets/student-mnist.pt")
        net, info = load_net(path, "--ckpt", device, student=True)
        low, high = info.get("gamma", (args.guidance, args.guidance))
        if not low <= args.guidance <= high:
            print(f"note: --guidance {args.guidance} is outside the range {low} to {high} this student was trained for")
        make, name, nfe = one_step(net, info["convention"], args.guidance), "samples", 1
    else:
        path = args.ckpt or s.teacher
        net, info = load_net(path, "--ckpt" if args.ckpt else "--teacher", device)
        make = many_steps(net, info["convention"], args.guidance, args.rollout_steps, args.solver, s.interval)
        name = "rollout"
        nfe = args.rollout_steps * (1 + (args.solver == "heun")) * (1 + (args.guidance != 1))
    labels = parse_labels(args.labels, net.config["classes"])
    make_folder(s.folder)
    clock = time.perf_counter()
    _, y, x = generate(make, count, s.seed, net.config["shape"], labels, device)
    ms = (time.perf_counter() - clock) / count * 1e3
    x = to_uint8(x)
    write(s.folder / f"{name}.npz", lambda f: np.savez(f, arr_0=x, arr_1=y.numpy()))
    rows = [x[i:i + 10] for i in range(0, min(100, count), 10)]
    grid = picture(rows, [""] * len(rows))
    write(s.folder / f"{name}-grid.png", lambda f: grid.save(f, "PNG"))
    print(f"{count} samples of {path}, {nfe} NFE, {ms:.2f} ms each: {s.folder}/{name}.npz, {s.folder}/{name}-grid.png")


# ---------------------------------------------------------------------------------------------------------------------
# 9. The command line: a flag for every setting, and what else to do with a model than train it
# ---------------------------------------------------------------------------------------------------------------------

def parse(argv):
    parser = argparse.ArgumentParser(prog="fmd.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     epilog=__doc__[__doc__.index("Launch:"):],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"fmd.py: {message}\n")
    group = parser.add_argument_group("settings")
    for f in dataclasses.fields(Settings):
        shown = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        kind = dict(nargs=2, type=float, metavar=("LOW", "HIGH")) if isinstance(f.default, tuple) else dict(type=f.type)
        group.add_argument(f"--{f.name.replace('_', '-')}", default=argparse.SUPPRESS, **kind,
                           help=f"{f.metadata['meaning']} (default: {shown})")
    group = parser.add_argument_group("instead of training")
    group.add_argument("--sample", type=int, metavar="N", help="N one-step samples of the student")
    group.add_argument("--rollout", type=int, metavar="N", help="N many-step samples of the teacher")
    group.add_argument("--dry-run", action="store_true", help="print settings, sizes and files to be written")
    group.add_argument("--ckpt", metavar="F", help="weights for these (default: OUT/student.pt, else the bundled one)")
    group.add_argument("--guidance", type=float, default=1.5, metavar="γ", help="guidance (default: 1.5)")
    group.add_argument("--labels", default="balanced", help="balanced, one label or LOW-HIGH (default: balanced)")
    group.add_argument("--solver", default="heun", help="of --rollout: heun or euler (default: heun)")
    group.add_argument("--rollout-steps", type=int, default=32, metavar="K", help="of --rollout (default: 32)")
    args = parser.parse_args(argv)
    given = {f.name: vars(args)[f.name] for f in dataclasses.fields(Settings) if f.name in vars(args)}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    s = Settings(**{**PRESETS.get(given.get("res", 28), {}), **given})
    for name in ("sample", "rollout", "rollout_steps"):
        if vars(args)[name] is not None and vars(args)[name] < 1:
            raise ValueError(f"--{name.replace('_', '-')} {vars(args)[name]}: must be at least 1")
    if args.sample and args.rollout:
        raise ValueError(f"--rollout {args.rollout}: give --sample or --rollout, not both")
    if args.solver not in ("heun", "euler"):
        raise ValueError(f"--solver {args.solver}: choose heun or euler")
    if not (args.guidance >= 0 and math.isfinite(args.guidance)):
        raise ValueError(f"--guidance {args.guidance}: must be 0 or more")
    return s, args


def dry_run(s):
    """Print what a run would do, and check that it could: settings, networks, files."""
    net, info = load_net(s.teacher, "--teacher", "cpu")
    for f in dataclasses.fields(s):
        value = getattr(s, f.name)
        print(f"{f.name:14} {' '.join(map(str, value)) if isinstance(value, tuple) else value!s:26} {f.metadata['meaning']}")
    for name, other in (("teacher", net), ("student", relative(net, dt=True, gw=True)), ("online g", relative(net, gw=True))):
        print(f"{name:14} {sum(p.numel() for p in other.parameters()) / 1e6:.2f} M parameters")
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
