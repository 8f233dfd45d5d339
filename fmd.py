# SPDX-License-Identifier: MIT
"""FMD: data-free flow-map distillation, a minimal FreeFlow (arXiv 2511.19428).

A pretrained flow model (the teacher) makes a sample by integrating its velocity from noise to data,
in tens to hundreds of network evaluations. A flow map (the student) jumps along the path in one.
This file distils one into the other without data: training states come from the prior, where all
paths start, or are the student's own predictions. *Prediction* makes the student's path follow the
teacher's velocity. Its errors add up along the path. *Correction* makes the velocity of the
student's noised samples match the teacher's.

Time: t = 1 IS NOISE, t = 0 IS DATA. Velocities point from noise to data.

  z          a sample of the prior, standard normal (B, ...); a path starts there
  y, ∅       its class label (B,); the null label, which stands for "any class"
  γ, gamma   guidance strength (B,); 1 is no guidance
  δ, delta   duration (B,), from t = 1 to t = 1 - δ
  u(x, t)    the teacher: velocity at x, guided by γ
  F(z, δ)    the student: average velocity over the first δ of the path from z
  f(z, δ)    flow_map, z + δ F(z, δ): the path after δ. f(z, 1) is a sample
  x_r        (1 - r) x + r n, a sample x under fresh noise n; r (B,)
  g(x_r, r)  the online network, trained beside the student: the velocity of its x_r

u, F and g depend on y and γ as well. F_value, F_p, F_c are values of F; F_dot is ∂F/∂δ. A name that
ends in _p belongs to rows of prediction (the paper's index G), in _c to rows of correction (its N).
[ours] marks a choice that the paper does not make. Sections 1 to 5 are the method. Sections 6 to 10
are settings, processes, files and sampling.

Launch:
  python fmd.py                                            distil the bundled teacher of MNIST's
                                                           digits (7 to 12 minutes), or resume
  torchrun --nproc_per_node=8 fmd.py --res 256             ImageNet, from the released SiT-XL/2
  python fmd.py --sample 100 --guidance 1.5 --labels 0-9   one-step samples of the student
  python fmd.py --rollout 100 --solver heun                many-step samples of the teacher
"""

import argparse
import atexit
import datetime
import json
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace


def interrupted(number, frame):
    print("fmd.py: interrupted", file=sys.stderr)
    sys.exit(130)


if __name__ == "__main__":  # before torch is imported, which takes seconds
    signal.signal(signal.SIGINT, interrupted)
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # no notice of DDP about find_unused_parameters

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.utils import clip_grad_norm_
from torchvision.utils import save_image
from tqdm import tqdm

import sit

# RANK numbers this process among all, LOCAL_RANK among those of its machine. WORLD counts all.
RANK, LOCAL_RANK, WORLD = 0, 0, 1
if dist.is_torchelastic_launched():  # by torchrun
    RANK, LOCAL_RANK = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    WORLD = int(os.environ["WORLD_SIZE"])
GPU = torch.cuda.is_available()


# ---- 1. The prior: every random number of a step ----
def prior(count, shape, classes, gamma_range=(1, 2), r_logit=(0.8, 1), source=None, device="cpu"):
    """Draws for `count` rows -> a namespace of tensors. z, n (B, *shape) ~ N(0, I), y (B,) in
    [0, classes), delta (B,) ~ U(0, 1), gamma (B,) ~ U(low, high), r (B,) ~ LogitNormal(location,
    scale). Prediction uses delta, correction n and r. source: a torch.Generator of the device."""
    on = dict(generator=source, device=device)
    low, high = gamma_range
    location, scale = r_logit
    return SimpleNamespace(
        z=torch.randn(count, *shape, **on),
        n=torch.randn(count, *shape, **on),
        y=torch.randint(classes, (count,), **on),
        delta=torch.rand(count, **on),
        gamma=low + (high - low) * torch.rand(count, **on),
        r=torch.sigmoid(location + scale * torch.randn(count, **on)))


def shard(draws, rank, world):
    """One process's rows. All draw the whole batch, so no draw depends on their number."""
    mine = slice(rank * len(draws.z) // world, (rank + 1) * len(draws.z) // world)
    # Copies: torch.compile cannot trace a JVP in a slice of a larger tensor.
    return SimpleNamespace(**{name: value[mine].clone() for name, value in vars(draws).items()})


# ---- 2. The teacher: a guided velocity and its rollout ----
def expand(t, x):
    """(B,) -> (B, 1, ..., 1), to multiply x (B, ...)."""
    return t.view(-1, *[1] * (x.ndim - 1))


def guided(net, x, t, y, gamma, null, interval=(0.0, 1.0)):
    """Classifier-free guidance u(x|∅) + γ (u(x|y) - u(x|∅)), by one call of net(x, t, y).
    x (B, ...); t, y (B,); gamma (B,) or a number; null, the index of ∅ -> like x. γ is 1, no
    guidance, for t outside the interval. All channels are guided (the DiT code guides three)."""
    low, high = interval
    gamma = torch.where((low <= t) & (t <= high), gamma, 1.0)
    labels = torch.cat([y, torch.full_like(y, null)])
    u_y, u_null = net(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2)  # of (2B, ...)
    return u_null + expand(gamma, x) * (u_y - u_null)


@torch.no_grad()
def rollout(u, z, steps, solver="heun"):
    """Integrate dx/dδ = u(x, 1 - δ) from z at δ = 0 to δ = 1 on a uniform grid -> like z (B, ...).
    u(x, t) takes x (B, ...) and t (B,). Euler calls it once a step, Heun twice, except in the last
    step (as EDM, arXiv 2206.00364, Algorithm 1): at t = 0, where the second call would be, x holds
    no noise for u to remove, and what u does there leaves specks. Raises ValueError."""
    if solver not in ("euler", "heun"):
        raise ValueError(f"solver {solver}: must be euler or heun")
    x = z
    for i in range(steps):
        v = u(x, x.new_full((len(x),), 1 - i / steps))
        if solver == "heun" and i + 1 < steps:
            v_next = u(x + v / steps, x.new_full((len(x),), 1 - (i + 1) / steps))
            v = (v + v_next) / 2
        x = x + v / steps
    return x


# ---- 3. The student: a flow map and its derivative ----
def average_velocity(student, z, delta, y, gamma):
    """F(z, δ). student(x, t, y, delta, gamma) is the teacher's network with two more inputs: its t
    stays at 1, δ and γ have embedders of their own. z (B, ...); delta, y, gamma (B,) -> like z."""
    return student(z, torch.ones_like(delta), y, delta=delta, gamma=gamma)


def flow_map(F_value, z, delta):
    """f(z, δ) = z + δ F(z, δ); at δ = 1 a sample. F_value = F(z, δ) and z (B, ...), delta (B,)."""
    return z + expand(delta, z) * F_value


@torch.no_grad()
def duration_derivative(F, z, delta, F_value=None, method="jvp", h=5e-3):
    """∂F/∂δ at fixed z, without gradient. z (B, ...), delta (B,) -> like z.
    jvp: exact, by forward mode with tangent 1 on δ. Fused attention has no forward derivative, so
    this call takes the plain kernel.
    fd: backward difference with an error of O(h), in float32: the rounding of bfloat16 or TF32,
    divided by h, would drown it. F_value = F(z, δ), if given, saves it a call.
    If you copy this: the network in F is bare, not in DDP's wrapper; it has no dropout, because two
    calls must agree; its time embedding is smooth in δ, so not rounded to integers. For fd, switch
    autocast and TF32 off (here `parse` and `main` see to it)."""
    if method == "fd":
        F_value = F(z, delta) if F_value is None else F_value
        # Where δ < h this calls F at a negative δ. The error is small: ∂F/∂δ is multiplied by δ.
        return (F_value - F(z, delta - h)) / h
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(lambda d: F(z, d), (delta,), (torch.ones_like(delta),))[1]


# ---- 4. The objectives: residuals, a velocity of the student minus the teacher's ----
@torch.no_grad()
def prediction(F_value, F_dot, u, z, delta):
    """Prediction (paper, Eq. 7 to 9) -> its residual, like z; the paper's Δ_G:
        v - u(f(z, δ), 1 - δ), with v = ∂f/∂δ = F + δ ∂F/∂δ, the velocity of the student's path.
    A perfect student has δ F(z, δ) = ∫ u along the path. The derivative of both sides in δ is
    v = u. The teacher's path is not known, so u is taken at the *student's* own state. The target
    of F is F minus the residual: u - δ ∂F/∂δ. No gradient passes through it, as in MeanFlow (arXiv
    2505.13447).
    F_value = F(z, δ), F_dot = ∂F/∂δ, z (B, ...); delta (B,); u(x, t).
    If you copy this: u has t = 1 at noise and points to data. With a wrong clock or sign the
    residual still shrinks, and the samples are garbage."""
    v_path = F_value + expand(delta, z) * F_dot
    return v_path - u(flow_map(F_value, z, delta), 1 - delta)


def correction(F_value, u, g, z, n, r):
    """Correction (paper, Eq. 10 and 11) -> its residual, like z, the paper's Δ_N; the loss of g.
        x = f(z, 1)               a sample of the student
        x_r = (1 - r) x + r n     the sample under noise
        v = E[x - n | x_r]        the velocity of the student's noised samples
        v - u(x_r, r)             the residual
    The expectation v has no formula. So g is trained to estimate it, by flow matching: the loss of
    g is |g(x_r, r) - (x - n)|².
    Why it works, with s the score of noised samples:
        x - n = (x_r - n) / (1 - r)  and  E[n | x_r] = -r s(x_r), so
        residual = r / (1 - r) (s_student - s_teacher) at x_r;
        (1 - r) (s_student - s_teacher) is the gradient in x of KL(student, teacher) under noise r,
    as in DMD (arXiv 2311.18828). The factors depend on r alone: they weight the noise levels. As
    x = z + F(z, 1), a step of F against the residual moves x against it. (With guidance, γ other
    than 1, u has no exact score.)
    F_value = F(z, 1), z, n (B, ...); r (B,); u(x, t), g(x, t).
    If you copy this: g starts from the teacher's weights, and this loss alone trains it."""
    x = flow_map(F_value, z, torch.ones_like(r)).detach()  # g's loss moves g alone
    x_r = (1 - expand(r, x)) * x + expand(r, x) * n
    v_online = g(x_r, r)  # its gradient trains g, its value gives the residual
    online_loss = mean_square(v_online - (x - n))
    with torch.no_grad():
        residual = v_online - u(x_r, r)
    return residual, online_loss


def mean_square(x):
    """The mean of the squares. An empty x gives 0, not nan."""
    return x.square().sum() / max(x.numel(), 1)


def weighted(residual, k=1.0, eps=1e-3):
    """w Δ of a residual Δ (B, ...), with w = 1 / (|Δ|²/d + ε)^k for a sample of d numbers (paper,
    Table 1; ε [ours]). So |w Δ| is about |Δ|^(1 - 2k). k = 0: large residuals pull most; k = 0.5:
    all pull equally; k = 1, the paper's best: small residuals pull most, down to |Δ|²/d = ε."""
    size = residual.flatten(1).square().mean(1)  # (B,)
    return residual / expand((size + eps) ** k, residual)


def balance(weighted_p, weighted_c, alpha=1.0, mean=torch.mean):
    """λ = α min(10, mean|w Δ_p| / (mean|w Δ_c| + 1e-6)). With α = 1 a row of correction pulls as
    hard as one of prediction, on average. The paper writes |Δ|, and does not say if w comes first;
    that it does is [ours], like the cap. λ is α if a part is empty. weighted_p (P, ...), weighted_c
    (C, ...). `mean` maps norms of rows (B,) to a number: with several processes, to the mean over
    all, or each has a λ of its own."""
    if not len(weighted_p) or not len(weighted_c):
        return weighted_p.new_full((), alpha)
    norm_p = mean(weighted_p.flatten(1).norm(dim=1))
    norm_c = mean(weighted_c.flatten(1).norm(dim=1))
    # The cap: g starts as the teacher. So if no row is guided (γ = 1, or all r above the cut), Δ_c
    # is rounding error at the first step. This must not be scaled up to the size of Δ_p.
    return alpha * (norm_p / (norm_c + 1e-6)).clamp(max=10)


def student_loss(F_p, residual_p, F_c, residual_c, k=1.0, alpha=1.0, mean=torch.mean):
    """The student's loss -> loss, λ. We choose the gradient, and then write a loss that has it:
        loss = (Σ F_p · w Δ_p + λ Σ F_c · w Δ_c) / M, with Δ, w, λ constant, M elements in all.
    The gradient is w Δ_p / M in F_p and λ w Δ_c / M in F_c: descent moves F against the residual.
    MeanFlow writes Σ |F - sg(F - w Δ)|² / 2M, where sg stops the gradient: the same gradient.
    The value of the loss means nothing, and is not logged.
    F_p, residual_p (P, ...); F_c, residual_c (C, ...); k, alpha, mean as above."""
    weighted_p = weighted(residual_p, k).detach()
    weighted_c = weighted(residual_c, k).detach()
    lam = balance(weighted_p, weighted_c, alpha, mean)
    total = (F_p * weighted_p).sum() + (F_c * lam * weighted_c).sum()
    return total / (F_p.numel() + F_c.numel()), lam


# ---- 5. The training loop ----
def train(s):
    """Distil. s: the settings of section 6. Writes student.pt, ckpt.pt, metrics.jsonl and pairs.png
    to s.folder. The same command, repeated, goes on from ckpt.pt. On a CPU, with the same number of
    processes, the weights are then bit for bit those of a run that never stopped. With another
    number, or on a GPU, the draws are the same, but sums are rounded in another way.
    Each of WORLD processes runs this function on its rows of the batch. Only process 0 prints and
    writes. The functions that it calls and you have not met are in sections 7 to 9."""
    device = join(s.device)

    # ---- Networks. Student, online network and the student's average start as the teacher.
    teacher, _, decoder = load(s.teacher, s.res, s.convention, s.vae, device)
    shape, classes = teacher.config["shape"], teacher.config["classes"]
    null = classes  # ∅ comes after the last class
    torch.manual_seed(s.seed)  # for the embedders of δ and γ; their last layers are zero
    student = start_from(teacher, delta=True, gamma=True)  # F(z, δ) starts as u(z, 1) at γ = 1
    online = start_from(teacher, gamma=True)  # g(x_r, r); it sees γ [ours]
    ema = start_from(student).requires_grad_(False)

    # ---- One optimiser; each step sets its two rates. Optimiser, rates, clipping, EMA are [ours].
    groups = [{"params": student.parameters()}, {"params": online.parameters()}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0, fused=True)

    # ---- Resume. A checkpoint has the parts, and the settings that it was made with.
    parts = {"student": student, "online": online, "ema": ema, "optimizer": optimizer}
    settings = {name: getattr(s, name) for name in FIXED + FREE}
    settings["teacher's checksum"] = sit.checksum(teacher)
    log = open_log(s.folder)
    first = resume(s.folder, log, parts, settings)
    print(f"{vars(s)}\nfrom step {first}")

    # ---- Evaluation: fixed noises, γ in the middle of its range, the teacher's samples φ.
    gamma_eval = sum(s.gamma) / 2
    if RANK == 0:
        z_eval = noises(s.seed, range(s.eval_samples), shape).to(device)
        y_eval = torch.arange(s.eval_samples, device=device) % classes
        phi = many_steps(teacher, z_eval, y_eval, gamma_eval, null, 16, interval=s.interval)
    stopped = stop_event()

    # ---- What the loop uses: networks as they are trained, the derivative, autocast, draws.
    student.checkpointing = online.checkpointing = s.checkpointing  # of activations
    derivative = duration_derivative
    if s.compile:
        derivative = compile_derivative_and_blocks(teacher, student, online)
    # With --bf16 networks compute in bfloat16. They return float32, so the objectives are in it.
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=s.bf16)
    ddp_student, ddp_online = distribute(student, device), distribute(online, device)

    rows_p, rows_c = s.batch - s.rows_c, s.rows_c  # of prediction and of correction

    # Each draw has a seed of its own, made of --seed and the step. So a checkpoint needs no states
    # of generators, and the draws do not depend on the number of processes.
    def draw(rows, key):
        source = generator(device, s.seed, key)
        r_logit = s.r_location, s.r_scale
        return shard(prior(rows, shape, classes, s.gamma, r_logit, source, device), RANK, WORLD)

    totals, logged, timer = 0, first, time.perf_counter()  # since the last line of the log
    bar = dict(initial=first, total=s.steps, file=sys.stdout, disable=None)
    for step in tqdm(range(first, s.steps), **bar):
        # ---- Prediction, on its rows p. F_p has a gradient. The derivative needs none, so it is a
        # pass of its own, by the bare student: a JVP cannot pass through DDP's wrapper.
        p = draw(rows_p, 2 * step)
        def student_p(z, delta): return average_velocity(student, z, delta, p.y, p.gamma)
        def teacher_p(x, t): return guided(teacher, x, t, p.y, p.gamma, null, s.interval)
        with autocast:
            F_p = average_velocity(ddp_student, p.z, p.delta, p.y, p.gamma)
            F_dot = derivative(student_p, p.z, p.delta, F_p.detach(), method=s.derivative)
            residual_p = prediction(F_p, F_dot, teacher_p, p.z, p.delta)

        # ---- Correction, on its rows c, where δ = 1. Its teacher is guided up to r = cut only:
        # guidance at higher noise worsens the paper's FID.
        c = draw(rows_c, 2 * step + 1)
        one = torch.ones_like(c.r)
        def teacher_c(x, t): return guided(teacher, x, t, c.y, c.gamma, null, (0.0, s.cut))
        def online_c(x, t): return ddp_online(x, t, c.y, gamma=c.gamma)
        with autocast:
            F_c = average_velocity(ddp_student, c.z, one, c.y, c.gamma)
            residual_c, online_loss = correction(F_c, teacher_c, online_c, c.z, c.n, c.r)

        # ---- Loss. F_p, F_c and online_loss have gradients; the residuals are constants.
        loss, lam = student_loss(F_p, residual_p, F_c, residual_c, s.k, s.alpha, mean_of_all)

        # ---- Backward.
        (loss + online_loss).backward()  # they share no parameters
        student_norm = clip_grad_norm_(student.parameters(), 1)
        online_norm = clip_grad_norm_(online.parameters(), 1)

        # ---- Update.
        scale = learning_rate(step, s.steps, s.warmup, s.decay_from)
        for group, peak in zip(optimizer.param_groups, (s.lr, s.online_lr)):
            group["lr"] = peak * scale
        optimizer.step()
        optimizer.zero_grad()
        decay = min(s.ema, (1 + step) / (10 + step))  # the average forgets its start
        for average, weight in zip(ema.parameters(), student.parameters()):
            average.lerp_(weight.detach(), 1 - decay)

        # ---- Log. The terms are summed without waiting for the GPU.
        terms = {"prediction": mean_square(residual_p), "correction": mean_square(residual_c),
                 "online": online_loss.detach(), "lambda": lam,
                 "student_norm": student_norm, "online_norm": online_norm}
        totals = totals + torch.stack([*terms.values()])
        done = step + 1
        # All processes have to stop at the same step, so they vote.
        stopping = any_process(stopped.is_set() or orphaned())
        saving = stopping or done == s.steps or done % s.save_every == 0
        if saving or done % s.log_every == 0:
            check_finite(totals, done)
            means = [mean_of_all(total / (done - logged)).item() for total in totals]
            line = dict(zip(terms, means))
            line |= {"step": done, "lr": s.lr * scale,
                     "images_per_s": s.batch * (done - logged) / (time.perf_counter() - timer),
                     "gpu_gb": torch.cuda.max_memory_allocated() / 1e9}
            if saving and RANK == 0:
                x = one_step(ema, z_eval, y_eval, gamma_eval)
                line["endpoint_error"] = endpoint_error(x, phi).mean().item()
                save_pairs(s.folder / "pairs.png", phi, x, decoder)
            write_line(log, line)
            # ---- Save.
            if saving:
                save(s.folder, parts, settings, done, log)
            totals, logged, timer = 0, done, time.perf_counter()
        if stopping:
            print(f"saved after step {done}; repeat the command to go on")
            return
    print(f"next: python fmd.py --res {s.res} --sample 100 --out {shlex.quote(str(s.folder))}")


# The method ends here. The rest is settings, processes, files and sampling.


# ---- 6. Settings ----
# The defaults in `parse` are those of --res 256. "[paper: 1]" marks the paper's values; the rest is
# ours. --res 28, which is the default, and --res 512 replace some of them as follows. --help shows
# the defaults in force.
PRESETS = {
    28: dict(teacher="assets/teacher-mnist.pt", steps=1750, batch=32, lr=1e-3, online_lr=1e-3,
             alpha=0.3, r_location=0.4, cut=1.0,  # nearer to the teacher: assets/RESULTS.md
             derivative="fd",  # a step takes a fifth less than by jvp
             warmup=20, decay_from=0.3, ema=0.99, bf16=False, compile=False,
             eval_samples=256, log_every=25, save_every=500),
    256: {},
    512: dict(teacher="SiT-XL/2-512", checkpointing=True),
}
# A run is resumed only with the same values of FIXED. Those of FREE may change; another seed, as
# other draws, is a way on after a gradient that is not finite.
FIXED = ["res", "convention", "batch", "correction", "k", "alpha", "gamma", "interval", "cut",
         "r_location", "r_scale", "derivative", "warmup", "decay_from", "ema", "bf16"]
FREE = ["steps", "lr", "online_lr", "seed"]


def within(kind, low, high=1e9):
    """A type of argparse: an int or a float, from low to high."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} must be from {low:g} to {high:g}")
        return value
    number.__name__ = kind.__name__  # argparse names it in its messages
    return number


def parse(argv):
    """The command line -> a namespace of settings. Bad input exits with one line and code 2."""
    def error(text):  # all processes read the same flags: one of them complains
        parser.exit(2, f"fmd.py: {text}\n" if RANK == 0 else None)

    # --res is read before the rest: it chooses the defaults of the other flags.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--res", type=int, default=28)
    parser = argparse.ArgumentParser("fmd.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    early.error = parser.error = error
    preset = PRESETS.get(early.parse_known_args(argv)[0].res, {})

    def add(flag, default, meaning, **more):
        text = meaning if default is None else f"{meaning} (%(default)s)"
        parser.add_argument(flag, default=default, help=text, **more)

    count, amount, share = within(int, 1), within(float, 0), within(float, 0, 1)
    switch = argparse.BooleanOptionalAction
    add("--res", 28, "28: pixels of any size; 256, 512: latents", type=int, choices=PRESETS)
    add("--teacher", "SiT-XL/2", "file, name in sit.RELEASED or URL")
    add("--vae", "sd-vae-ft-ema", "decoder of the latents: file, name or URL")
    add("--convention", None, "a file's clock and sign, if not found", choices=("sit", "repa"))
    add("--out", None, "folder (default: out/RES)")
    add("--device", "cuda" if GPU else "cpu", "cuda: one GPU a process", choices=("cuda", "cpu"))
    # Method.
    add("--steps", 100_000, "optimiser steps [paper: 100,000]", type=count)
    add("--batch", 256, "samples a step, of all processes [paper: 256]", type=count)
    add("--correction", 0.25, "correction's share of the batch [paper: 0.25]", type=share)
    add("--k", 1.0, "exponent of the weights [paper: 1]", type=amount)
    add("--alpha", 1.0, "strength of correction [paper: 1]", type=amount)
    add("--gamma", [1.0, 2.0], "range of γ in training", type=amount, nargs=2)
    add("--interval", [0.0, 1.0], "t at which prediction, rollouts are guided", type=share, nargs=2)
    add("--cut", 0.7, "correction is guided up to this r [paper: 0.7]", type=share)
    add("--r-location", 0.8, "mean of the logit of r [paper: 0.8]", type=within(float, -1e9))
    add("--r-scale", 1.0, "standard deviation of the logit of r", type=amount)
    add("--derivative", "jvp", "∂F/∂δ: exact, or a finite difference", choices=("jvp", "fd"))
    # Optimisation.
    add("--lr", 1e-4, "peak rate of the student", type=amount)
    add("--online-lr", 1e-4, "peak rate of g", type=amount)
    add("--warmup", 1000, "steps up to the peak", type=within(int, 0))
    add("--decay-from", 1.0, "share of the steps before the fall to 0; 1: none", type=share)
    add("--ema", 0.9999, "decay of the student's average", type=share)
    add("--seed", 0, "of every draw", type=within(int, 0, 2**63 - 1))
    add("--bf16", GPU, "in training, networks compute in bfloat16", action=switch)
    add("--compile", GPU, "torch.compile the blocks and the derivative", action=switch)
    add("--checkpointing", False, "recompute activations, to save memory", action=switch)
    # Housekeeping.
    add("--log-every", 50, "steps between lines of the log", type=count)
    add("--save-every", 5000, "steps between checkpoints and endpoint errors", type=count)
    add("--eval-samples", 64, "noises of an endpoint error", type=count)
    # Sampling, in place of training.
    add("--sample", None, "N samples of the student", type=count)
    add("--rollout", None, "N samples of the teacher", type=count)
    add("--ckpt", None, "the student (default: OUT/student.pt, at 28 the bundled one)")
    add("--guidance", 1.5, "γ of the samples", type=amount)
    add("--labels", "balanced", "balanced, one label (7) or a range (0-9)")
    add("--solver", "heun", "solver of the rollout", choices=("heun", "euler"))
    add("--rollout-steps", 32, "steps of the rollout", type=count)

    parser.set_defaults(**preset)
    s = parser.parse_args(argv)
    s.folder = Path(s.out or f"out/{s.res}")

    for name, (low, high) in {"gamma": s.gamma, "interval": s.interval}.items():
        if low > high:
            error(f"--{name} {low} {high}: the lower end comes first")
    if s.sample and s.rollout:
        error(f"--rollout {s.rollout}: not together with --sample")
    if s.derivative == "fd" and s.bf16:
        error("--derivative fd: too coarse in bfloat16; give --no-bf16 or --derivative jvp")
    rank, world = os.environ.get("RANK") or "0", os.environ.get("WORLD_SIZE") or "1"
    if (rank, world) != ("0", "1") and not dist.is_torchelastic_launched():
        error(f"RANK={rank} WORLD_SIZE={world} are set, but not by torchrun: unset them")
    s.rows_c = round(s.batch * s.correction)
    divisor = math.gcd(s.rows_c, s.batch - s.rows_c)
    if divisor % WORLD and not (s.sample or s.rollout):
        fits = [n for n in range(1, divisor + 1) if divisor % n == 0]
        error(f"--batch {s.batch}: {WORLD} processes cannot share {s.batch - s.rows_c} rows of "
              f"prediction and {s.rows_c} of correction; {fits} can")
    return s


# ---- 7. Processes, draws and rates ----
def join(kind):
    """Join torchrun's processes. kind is "cpu", or "cuda": a GPU each. -> this one's device."""
    device = torch.device(kind, LOCAL_RANK if kind == "cuda" else None)
    if kind == "cuda":
        if LOCAL_RANK >= torch.cuda.device_count():
            raise ValueError(f"--device cuda: no GPU {LOCAL_RANK} here; use cpu")
        torch.cuda.set_device(device)
    if WORLD > 1:  # the timeout is long: all wait while process 0 evaluates, samples or saves
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
        if kind == "cpu":  # else gloo may abort at exit
            atexit.register(dist.destroy_process_group)
    return device


def distribute(net, device):
    """The network in DDP's wrapper, which averages the gradients of the processes. All have equally
    many rows, so this is the gradient of the whole batch. The wrapper may be called several times
    before `backward`: a gradient is averaged once, when all calls have added to it."""
    if WORLD == 1:
        return net
    # DDP regroups its buckets after the first step. The order of sums changes, and a resumed run
    # would differ in its last bits. find_unused_parameters prevents the regrouping. On a GPU sums
    # have no fixed order anyway.
    fixed_order = device.type == "cpu"
    return DDP(net, find_unused_parameters=fixed_order, gradient_as_bucket_view=True)


def compile_derivative_and_blocks(*nets):
    """Compile the networks' blocks, one by one: DDP and checkpointing stay outside of the graphs.
    -> a compiled duration_derivative. It gets a new F in each step, but of the same code, so it is
    traced once."""
    print("compiling")
    for net in nets:
        for block in net.blocks:
            block.compile(dynamic=False)
    return torch.compile(duration_derivative, dynamic=False)


def stop_event():
    """-> an Event. SIGTERM and Ctrl-C set it, for the loop to finish its step and save."""
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    return stopped


PARENT = os.getppid()


def orphaned():
    """Whether the torchrun that started this process was killed. Then it should end as well."""
    return WORLD > 1 and os.getppid() != PARENT


def mean_of_all(values):
    """The mean over the values of all processes, of which each holds the same number."""
    mean = values.detach().float().mean()
    if WORLD > 1:
        dist.all_reduce(mean)
    return mean / WORLD


def any_process(flag):
    """Whether the flag is true in any process. Waits for the processes, but not for a GPU."""
    return mean_of_all(torch.tensor(float(flag))).item() > 0


def barrier():
    """Wait until all processes are here."""
    any_process(False)


def generator(device, seed, key):
    """A torch.Generator for draw number `key` of a run. On a CPU torch keeps 32 bits of a seed. So
    the key is added, not hashed: no two draws of a run share a seed."""
    start = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return torch.Generator(device).manual_seed(start + key)


def noises(seed, numbers, shape):
    """-> (len(numbers), *shape). Noise i depends on the seed and i alone."""
    draws = [np.random.default_rng((seed, i)).standard_normal(shape, np.float32) for i in numbers]
    return torch.from_numpy(np.array(draws, np.float32).reshape(-1, *shape))


def learning_rate(step, steps, warmup, decay_from):
    """The share of the peak rate: a linear rise over `warmup` steps, 1, then a linear fall to 0."""
    fall = (steps - step) / max(1.0, steps * (1 - decay_from))
    return min((step + 1) / (warmup + 1), 1.0, fall)


# ---- 8. Networks, log and checkpoints ----
def load(source, res, convention, vae, device, student=False):
    """-> a frozen teacher or student, what else its file holds, the decoder of its latents or None.
    Whatever clock and sign the file has, the network's t is 1 at noise and its velocity points from
    noise to data. Raises ValueError."""
    def local_file(source):  # one process of a machine downloads, the others wait
        if LOCAL_RANK == 0:
            sit.fetch(source)
        barrier()
        return sit.fetch(source)

    net, info = sit.load(local_file(source), convention=convention)
    shape, classes = net.config["shape"], net.config["classes"]
    if net.config["delta"] != student or net.config["gamma"] != student:
        raise ValueError(f"{source}: not a {'student' if student else 'teacher'}")
    latents = res > 28  # --res 28 stands for pixels of any size
    if latents:
        fits = shape == [4, res // 8, res // 8]
    else:
        fits = shape[0] != 4
    if not fits:
        raise ValueError(f"{source}: made for {shape}, not for --res {res}")
    print(f"{source}: convention {net.config['convention']} ({info['why']}), labels 0 to "
          f"{classes - 1}, ∅ is {classes}")
    decoder = sit.load_decoder(local_file(vae)).to(device) if latents else None
    return net.to(device), info, decoder


def start_from(net, **inputs):
    """A copy of the network with added inputs, whose embedders give 0 at first."""
    config = net.config | inputs
    new = sit.SiT(**config)
    weights = new.state_dict() | net.state_dict()  # the new embedders keep theirs
    new.load_state_dict(weights)
    return new.to(net.pos_embed.device)


def check_finite(totals, step):
    """Raises ValueError if a term of the log is not finite: so nothing such is saved."""
    if not totals.isfinite().all():
        raise ValueError(f"step {step}: a loss or gradient is not finite; the last checkpoint "
                         "stands. Repeat the command with another --seed, for other draws, or a "
                         "lower --lr")


def write_line(log, line):
    """One line of the log, on the screen and in the file that process 0 holds."""
    if RANK == 0:
        text = json.dumps({name: round(value, 8) for name, value in line.items()})
        tqdm.write(text)
        print(text, file=log, flush=True)


def save(folder, parts, settings, step, log):
    """student.pt, in the names of the released files; and ckpt.pt, which has the rest as well. Each
    is written to a temporary file and then renamed."""
    if RANK > 0:
        return
    ema = parts["ema"]
    about = {"config": ema.config, "gamma": settings["gamma"]}
    student = {"ema": sit.released_names(ema.state_dict())} | about
    states = {name: part.state_dict() for name, part in parts.items()}
    run = {"settings": settings, "step": step, "log_size": log.tell()}
    sit.write(folder / "student.pt", partial(torch.save, student))
    sit.write(folder / "ckpt.pt", partial(torch.save, about | states | run))


def open_log(folder):
    """-> the folder's log, for process 0. Raises ValueError if another run is at work there."""
    folder.mkdir(parents=True, exist_ok=True)
    if RANK > 0:
        return None
    log = open(folder / "metrics.jsonl", "a")
    try:
        import fcntl
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a lock that ends with the process
    except ImportError:
        pass  # Windows has no such lock
    except BlockingIOError:
        raise ValueError(f"--out {folder}: another run is at work there") from None
    return log


def resume(folder, log, parts, settings):
    """Load ckpt.pt, if there is one, into the parts, and cut the log to its step -> the step, or 0
    and an empty log. Raises ValueError if the checkpoint is of another run."""
    path = folder / "ckpt.pt"
    step, log_size, changed = 0, 0, {}
    if path.exists():
        file = sit.read_file(path)
        try:
            step, log_size, old = file["step"], file["log_size"], file["settings"]
            changed = {name: value for name, value in old.items() if value != settings[name]}
            other_run = {name: changed[name] for name in changed if name not in FREE}
            if not other_run:
                for name, part in parts.items():
                    part.load_state_dict(file[name])
        except Exception as e:  # whatever a file of another kind raises
            raise ValueError(f"{path}: not a checkpoint of fmd.py ({sit.reason(e)})") from None
        if other_run:
            raise ValueError(f"{path}: not of this run: it has {other_run}; give these, or another "
                             "--out")
        if step > settings["steps"]:
            raise ValueError(f"{path}: it has {step} steps already; give more, or another --out")
    if changed:
        print(f"note: up to step {step} this run had {changed}; the rate may jump here")
    steps = [step] * WORLD
    if WORLD > 1:
        dist.all_gather_object(steps, step)
    if len(set(steps)) > 1:
        raise ValueError(f"--out {folder}: processes read checkpoints of steps {steps}; all must "
                         "see one folder")
    if log:
        log.truncate(min(log.tell(), log_size))
    return step


# ---- 9. Sampling ----
CHUNK = 128 if GPU else 64  # samples at a time


@torch.no_grad()
def one_step(student, z, y, gamma):
    """The student's samples f(z, 1), one evaluation each. z (B, ...), y (B,), gamma a number."""
    one = torch.ones(len(z), device=z.device)
    F_value = average_velocity(student, z, one, y, gamma * one)
    return flow_map(F_value, z, one)


def many_steps(teacher, z, y, gamma, null, steps=16, solver="heun", interval=(0.0, 1.0)):
    """The teacher's samples, by a guided rollout. z (B, ...), y (B,), gamma a number."""
    def u(x, t):
        return guided(teacher, x, t, y, gamma, null, interval)
    return rollout(u, z, steps, solver)


def endpoint_error(x, phi):
    """|x - φ| / |φ| of each sample. x, phi (B, ...) -> (B,)."""
    return (x - phi).flatten(1).norm(dim=1) / phi.flatten(1).norm(dim=1)


def to_uint8(x, decoder=None):
    """Pixels in [-1, 1], or latents (N, C, H, W) -> (N, H, W, C) uint8, rounded like DiT's."""
    if decoder is not None:
        x = torch.cat([decoder(part) for part in x.split(8)])
    return (127.5 * x + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().cpu()


def save_grid(path, images):
    """(N, H, W, C) uint8 -> a PNG, ten in a row."""
    images = images.permute(0, 3, 1, 2) / 255
    sit.write(path, partial(save_image, images, format="PNG", nrow=10, pad_value=1))


def label_range(text, classes):
    """The labels that --labels names: all for "balanced", else N or LOW-HIGH. Raises ValueError."""
    if text == "balanced":
        return range(classes)
    ends = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    labels = range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else ()
    if not labels or labels[-1] >= classes:
        raise ValueError(f"--labels {text}: give N or LOW-HIGH below {classes}")
    return labels


def gather(part):
    """The processes' tensors, in their order, as one; in process 0."""
    if WORLD == 1:
        return part
    parts = [None] * WORLD if RANK == 0 else None
    dist.gather_object(part, parts)
    return torch.cat(parts) if RANK == 0 else None


def save_pairs(path, phi, x, decoder):
    """The teacher's and the student's samples of the same noises, side by side, up to 50 pairs."""
    pairs = torch.stack([phi, x], 1)[:50].flatten(0, 1)
    save_grid(path, to_uint8(pairs, decoder))


def sample(s):
    """--sample or --rollout: N samples to an npz, as ADM's evaluator reads it, and a grid of some.
    Whatever N and the number of processes, noise i is the same, and sample i up to rounding."""
    device = join(s.device)
    count = s.sample or s.rollout
    if s.sample:
        source, path = s.ckpt or s.folder / "student.pt", s.folder / "samples.npz"
        if s.res == 28 and not (s.ckpt or s.out or source.exists()):  # nothing was trained yet
            source = "assets/student-mnist.pt"
    else:
        source, path = s.teacher, s.folder / "rollout.npz"
    net, info, decoder = load(source, s.res, s.convention, s.vae, device, student=bool(s.sample))
    shape, null = net.config["shape"], net.config["classes"]

    labels = label_range(s.labels, net.config["classes"])
    low, high = info.get("gamma", (0, math.inf))
    if s.sample and not low <= s.guidance <= high:
        print(f"note: --guidance {s.guidance}: the student was trained with {low} to {high}")

    def sampler(z, y):
        if s.sample:
            return one_step(net, z, y, s.guidance)
        return many_steps(net, z, y, s.guidance, null, s.rollout_steps, s.solver, s.interval)

    s.folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=s.folder).close()  # fails now if the folder cannot be written
    clock, images = time.perf_counter(), None
    for start in tqdm(range(0, count, WORLD * CHUNK), file=sys.stdout, disable=None):
        rows = range(start, min(start + WORLD * CHUNK, count))  # of all processes
        mine = rows[RANK * len(rows) // WORLD:(RANK + 1) * len(rows) // WORLD]
        y = torch.tensor([labels[i % len(labels)] for i in mine], dtype=torch.long)
        x = sampler(noises(s.seed, mine, shape).to(device), y.to(device))
        part = gather(to_uint8(x, decoder))
        if RANK == 0:
            if images is None:
                images = part.new_empty((count, *part.shape[1:]))
            images[start:start + len(rows)] = part
    if RANK == 0:
        seconds = time.perf_counter() - clock
        sit.write(path, partial(np.savez, arr_0=images.numpy(), arr_1=np.resize(labels, count)))
        save_grid(path.with_suffix(".png"), images[:100])
        print(f"{path}: {count} samples of {source}, {1e3 * seconds / count:.2f} ms each")


# ---- 10. The command line ----
def main(argv):
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # process 0 speaks for all
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed, as by >&-
        stream.reconfigure(errors="backslashreplace")  # a terminal may have no δ
    # Raised inside torch by the first JVP, and of no use to a reader of the log.
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*is deprecated")
    try:
        s = parse(argv)
        # TF32 has 10 bits: enough for all but a finite difference.
        tf32 = s.derivative == "jvp" or bool(s.sample or s.rollout)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        if s.sample or s.rollout:
            sample(s)
        else:
            train(s)
        barrier()  # process 0 may be busy still
        return 0
    except torch.OutOfMemoryError:
        print("fmd.py: GPU memory is full: give --checkpointing, a lower --batch or more "
              "processes (samples: a lower CHUNK)", file=sys.stderr)
    except (ValueError, OSError) as e:  # of any process: each may fail alone
        print(f"fmd.py: {e}", file=sys.stderr)
    except torch._dynamo.exc.BackendCompilerFailed as e:  # for example, there is no C++ compiler
        print(f"fmd.py: --compile: {sit.reason(e)}; use --no-compile", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
