# SPDX-License-Identifier: MIT
"""FMD: data-free flow-map distillation, a minimal implementation of FreeFlow (arXiv 2511.19428).

A pretrained flow model (the teacher) makes a sample by integrating its velocity from noise to data,
in tens to hundreds of network evaluations. A flow map (the student) jumps along the same path in one.
This file distils one into the other without data: training states come from the prior, where all
paths start, or are the student's own predictions. *Prediction* makes the student's path follow the
teacher's velocity. *Correction* matches the velocity of the student's noised samples to the teacher's.

Time: t = 1 IS NOISE, t = 0 IS DATA. Velocities point in the generating direction, from noise to data.

  symbol     in the code         meaning                                             shape, range
  z          z                   prior sample, standard normal                       (B, ...)
  y, ∅       y, null             class label, null label                             (B,)
  γ          gamma; gw           guidance strength, 1 is none; its embedder          (B,)
  t          t                   time                                                (B,), 0 to 1
  δ          delta; dt           duration, from t = 1 to 1 - δ; its embedder         (B,), 0 to 1
  u(x, t)    u                   the teacher's velocity, dx/dδ along its path        like x
  F(z, δ)    F; F_z, F_p, F_c    the student: average velocity over the first δ of
                                 the path from z. F is the function, F_z a value     like z
  ∂F/∂δ      dF                  its derivative in δ at fixed z                      like z
  f(z, δ)    flow_map(F_z, z, δ) z + δ F(z, δ), the path after δ; f(z, 1) is a sample like z
  v_G        v_G                 ∂f/∂δ = F + δ ∂F/∂δ, the generating velocity        like z
  n, r       n, r                fresh noise; the time of a noised sample            like x; (B,)
  x_r        x_r                 I_r(x, n) = (1 - r) x + r n                         like x
  v_N        v_N                 E[x - n | x_r], the noising velocity of samples x   like x
  g(x_r, r)  g, "online"         network that learns v_N while the student changes   like x
  Δ_G, Δ_N   residual_G, _N      student minus teacher: v_G - u, v_N - u             like x
  w, λ       weighted, lam       weight of a sample; of correction                   (B,); ()

Launch:
  python fmd.py                                            distil the bundled teacher, or resume
  torchrun --nproc_per_node=8 fmd.py --res 256             ImageNet, from the released SiT-XL/2
  python fmd.py --sample 100 --guidance 1.5 --labels 0-9   one-step samples of the student
  python fmd.py --rollout 100 --solver heun                many-step samples of the teacher
"""

import argparse
import hashlib
import json
import os
import re
import signal
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.utils import clip_grad_norm_
from torchvision.utils import save_image
from tqdm import tqdm

import sit
from fid import LOCAL_RANK, RANK, WORLD, join, write

GPU = torch.cuda.is_available()
CHUNK = 128 if GPU else 64  # samples at a time


# ---- 1. Settings. [paper] marks the paper's values; the others, and the presets, are ours ----
# How the presets of --res differ from the defaults below.
PRESETS = {
    28: dict(teacher="assets/teacher-mnist.pt", steps=1750, batch=32, lr=7e-4,
             online_lr=1e-3, warmup=20, decay_from=0.3, ema=0.99, derivative="fd",
             optimizer="muon", alpha=0.5, r_location=0.4, cut=0.5, bf16=False, compile=False,
             eval_samples=256, log_every=25, eval_every=500, ckpt_every=500),
    256: dict(teacher="SiT-XL/2"), 512: dict(teacher="SiT-XL/2-512"),
}
# A run resumes only with the same values of these.
FIXED = """res teacher convention batch correction k alpha gamma interval cut r_location r_scale
derivative optimizer lr online_lr warmup decay_from ema seed bf16""".split()


def settings(parser):
    """All flags: name, default at 256 and 512, meaning."""
    def add(flag, default, meaning, kind=None, **more):
        kind, meaning = kind or type(default), meaning + " (%(default)s)" * (default != "")
        parser.add_argument(flag, type=kind, default=default, help=meaning, **more)
    add("--res", 28, "image side; sets other defaults", choices=PRESETS)
    add("--teacher", "", "file, name in sit.RELEASED or URL")
    add("--vae", "sd-vae-ft-ema", "decoder, likewise")
    add("--convention", "auto", "the teacher's clock and sign", choices=("auto", "sit", "repa"))
    add("--out", "", "folder; default: out/RES")
    add("--steps", 100_000, "optimiser steps [paper]")
    add("--batch", 256, "samples a step [paper]")
    add("--correction", 0.25, "share of the batch [paper]")
    add("--k", 1.0, "exponent of weights [paper]")
    add("--alpha", 1.0, "strength of correction [paper]")
    add("--gamma", [1.0, 2.0], "γ in training", float, nargs=2)
    add("--interval", [0.0, 1.0], "guided t, except in correction", float, nargs=2)
    add("--cut", 0.7, "largest guided r in correction [paper]")
    add("--r-location", 0.8, "location of r's logit [paper]")
    add("--r-scale", 1.0, "scale of r's logit")
    add("--derivative", "jvp", "∂F/∂δ", choices=("jvp", "fd"))
    add("--optimizer", "adamw", "the student's", choices=("adamw", "muon"))
    add("--lr", 1e-4, "student's peak rate")
    add("--online-lr", 1e-4, "peak rate of g")
    add("--warmup", 1000, "steps of warm-up")
    add("--decay-from", 1.0, "share of steps before decay")
    add("--ema", 0.9999, "decay of the average")
    add("--seed", 0, "of every draw")
    add("--eval-samples", 64, "noises of endpoint errors")
    add("--log-every", 50, "steps between log lines")
    add("--eval-every", 5000, "steps between evaluations")
    add("--ckpt-every", 5000, "steps between saves")
    add("--device", "cuda" if GPU else "cpu", "cpu, cuda or cuda:N")
    switch = partial(parser.add_argument, action=argparse.BooleanOptionalAction)
    switch("--bf16", default=GPU, help="networks compute in bfloat16")
    switch("--compile", default=GPU, help="torch.compile blocks, derivative")
    switch("--checkpointing", help="recompute activations; default: by memory")
    add("--sample", 0, "N samples of the student")
    add("--rollout", 0, "N samples of the teacher")
    add("--ckpt", "", "student; default: OUT/student.pt")
    add("--guidance", 1.5, "γ of the samples")
    add("--labels", "balanced", "balanced, 7 or 0-9")
    add("--solver", "heun", "solver of the rollout", choices=("heun", "euler"))
    add("--rollout-steps", 32, "steps of the rollout")


# ---- 2. The prior: every random number of a step ----
def generator(device, *key):
    """A torch.Generator for a key such as (seed, step, "prediction"): equal keys, equal draws."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big"))


def prior(count, key, shape, classes, gamma, r, device="cpu", rank=0, world=1):
    """Draws for `count` rows of one step -> a namespace of tensors.
    z, n (b, *shape) ~ N(0, I), y (b,) in [0, classes), delta (b,) ~ U(0, 1), gamma (b,) ~ U(low,
    high), r (b,) ~ LogitNormal(location, scale). Prediction ignores n and r; correction, delta.
    Each process draws all rows and keeps b = count / world, so that `world` changes no draw."""
    source = generator(device, *key)
    normal = partial(torch.randn, generator=source, device=device)
    uniform = partial(torch.rand, generator=source, device=device)
    (low, high), (location, scale) = gamma, r
    draws = dict(z=normal(count, *shape), n=normal(count, *shape), delta=uniform(count),
                 y=torch.randint(classes, (count,), generator=source, device=device),
                 gamma=low + (high - low) * uniform(count),
                 r=torch.sigmoid(location + scale * normal(count)))
    mine = slice(rank * count // world, (rank + 1) * count // world)
    # Copies: torch.compile cannot trace a JVP in a slice of a larger tensor.
    return SimpleNamespace(**{k: v[mine].clone() for k, v in draws.items()})


# ---- 3. The teacher: a guided velocity and its rollout ----
def expand(t, x):
    """(B,) -> (B, 1, ..., 1), to multiply x (B, ...)."""
    return t.view(-1, *[1] * (x.ndim - 1))


def guided(velocity, x, t, y, gamma, null, interval=(0.0, 1.0)):
    """Classifier-free guidance u(x|∅) + γ (u(x|y) - u(x|∅)), by one call of velocity(x, t, y).
    x (B, ...); t, y (B,); gamma (B,) or a number; null an int -> (B, ...). For t outside the interval
    γ is 1, which is no guidance. All channels are guided (the DiT code guides three)."""
    low, high = interval
    gamma = torch.where((low <= t) & (t <= high), gamma, 1.0)
    labels = torch.cat([y, torch.full_like(y, null)])
    u_y, u_null = velocity(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2)  # of (2B, ...)
    return u_null + expand(gamma, x) * (u_y - u_null)


@torch.no_grad()
def rollout(u, z, steps, solver="heun"):
    """Integrate dx/dδ = u(x, 1 - δ) from z at δ = 0 to δ = 1 on a uniform grid -> like z (B, ...).
    Euler calls u(x, t), of x (B, ...) and t (B,), once a step, Heun twice."""
    x = z
    for i in range(steps):
        v = u(x, x.new_full((len(x),), 1 - i / steps))
        if solver == "heun":
            v_next = u(x + v / steps, x.new_full((len(x),), 1 - (i + 1) / steps))
            v = (v + v_next) / 2
        x = x + v / steps
    return x


# ---- 4. The student: a flow map and its derivative ----
def flow_map(F_z, z, delta):
    """f(z, δ) = z + δ F(z, δ); at δ = 1 a sample. F_z = F(z, δ) and z (B, ...), delta (B,)."""
    return z + expand(delta, z) * F_z


@torch.no_grad()
def duration_derivative(F, z, delta, F_z=None, method="jvp", h=5e-3):
    """∂F/∂δ at fixed z, without gradient. z (B, ...), delta (B,) -> like z.
    jvp: forward mode with tangent 1 on δ and 0 on z, exact. Fused attention has no forward
    derivative, so this call takes the plain kernel. fd: backward difference with an error of O(h).
    F_z = F(z, δ), if at hand, saves it an evaluation. fd needs float32: the rounding of bfloat16,
    divided by h, is as large as F. δ - h may be negative: near δ = 0 v_G hardly sees ∂F/∂δ."""
    if method == "fd":
        F_z = F(z, delta) if F_z is None else F_z
        return (F_z - F(z, delta - h)) / h
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(lambda d: F(z, d), (delta,), (torch.ones_like(delta),))[1]


# ---- 5. The objectives: residuals Δ, a velocity of the student minus the teacher's ----
@torch.no_grad()
def prediction(F_z, dF, u, z, delta):
    """Prediction (paper, Eq. 7 to 9): the residual Δ_G = v_G - u(f(z, δ), 1 - δ), like z.
    A perfect student has δ F(z, δ) = ∫ u along the path. The derivative of both sides in δ is
    F + δ ∂F/∂δ = u(f, 1 - δ): the teacher's velocity at the *student's* own state. F_z = F(z, δ)
    and dF = ∂F/∂δ are like z (B, ...), delta (B,); u(x, t) is the teacher."""
    v_G = F_z + expand(delta, z) * dF
    return v_G - u(flow_map(F_z, z, delta), 1 - delta)


def correction(F_z, u, g, z, n, r):
    """Correction (paper, Eq. 10 and 11): the residual Δ_N = v_N - u at noised samples, like z; and
    the loss of g. v_N cannot be computed: the network g(x_r, r) learns it by flow matching on the
    student's samples. Δ_N is r / (1 - r) times the student's score minus the teacher's, both at
    noise r: moving samples along -Δ_N lowers the KL divergence of the noised distributions (exactly
    so at γ = 1). F_z = F(z, 1), z, n (B, ...); r (B,); u(x, t)."""
    x = flow_map(F_z, z, torch.ones_like(r)).detach()  # the data of g
    x_r = (1 - expand(r, x)) * x + expand(r, x) * n
    v_N = g(x_r, r)
    online_loss = (v_N - (x - n)).square().mean()  # moves g alone
    return (v_N - u(x_r, r)).detach(), online_loss


def weighted(residual, k=1.0, eps=1e-3):
    """w Δ, with w = 1 / (|Δ|²/d + ε)^k for a sample of d numbers: a few large residuals do not
    outweigh the rest (paper, Table 1; ε is ours)."""
    size = residual.flatten(1).square().mean(1)  # (B,)
    return residual / expand((size + eps) ** k, residual)


def student_loss(F_p, residual_G, F_c, residual_N, k=1, alpha=1, mean=torch.mean, eps=1e-6):
    """-> loss, λ. The loss is one mean over both parts of the batch, F_p · sg(w Δ_G) of shape
    (P, ...) and F_c · sg(λ w Δ_N) of shape (C, ...). Its gradient in F is proportional to w Δ, so
    descent moves F against its residual. λ = α E|w Δ_G| / (E|w Δ_N| + ε), or α if a part is empty:
    at α = 1 both mean norms are equal [paper; after w: ours]. Give a `mean` over all processes."""
    G = weighted(residual_G, k).detach()  # sg
    N = weighted(residual_N, k).detach()
    lam = G.new_full((), alpha)
    if len(G) and len(N):
        lam = alpha * mean(G.flatten(1).norm(dim=1)) / (mean(N.flatten(1).norm(dim=1)) + eps)
    total = (F_p * G).sum() + (F_c * lam * N).sum()
    return total / (F_p.numel() + F_c.numel()), lam


# ---- 6. Networks as velocities ----
# What a network's time and output mean: its clock as a function of t, and the sign that turns its
# output into a velocity towards data. Student and g inherit the teacher's convention.
CONVENTIONS = {"sit": (lambda t: 1 - t, 1), "repa": (lambda t: t, -1)}


def velocity_of(net, x, t, y, convention="sit", bf16=False, **embeddings):
    """A network's velocity in our time and direction. With bf16 only the network is in bfloat16."""
    clock, sign = CONVENTIONS[convention]
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        out = net(x, clock(t), y, **embeddings)
    return sign * out.to(x.dtype)


def average_velocity(velocity, z, delta, y, gamma):
    """F(z, δ): the student's t stays at the prior; δ and γ have embedders of their own."""
    return velocity(z, torch.ones_like(delta), y, dt=delta, gw=gamma)


# ---- 7. The training loop ----
def mean_of_all(values):
    """The mean over the values of all processes, of which each holds the same number."""
    mean = values.detach().float().mean().double()  # float64 sums steps exactly
    if WORLD > 1:
        dist.all_reduce(mean)
    return (mean / WORLD).float()


def any_process(flag=False):
    """Whether the flag is true in any process. They wait for each other, but not for a GPU."""
    return mean_of_all(torch.tensor(float(bool(flag)))).item() > 0


def learning_rate(step, steps, warmup, decay_from):
    """Factor on the peak rates: linear warm-up, then constant, then a linear fall to zero."""
    fall = (steps - step) / max(1.0, steps * (1 - decay_from))
    return min((step + 1) / (warmup + 1), 1.0, fall)


def train(s):
    """Distil. Writes student.pt, ckpt.pt, metrics.jsonl and pairs.png to s.folder."""
    run = setup(s)
    student, teacher = run.student, partial(guided, run.teacher, null=run.classes)
    draw = partial(prior, shape=run.shape, classes=run.classes, gamma=s.gamma,
                   r=(s.r_location, s.r_scale), device=run.device, rank=RANK, world=WORLD)
    signals = []
    for number in (signal.SIGTERM, signal.SIGINT):  # after the step
        signal.signal(number, lambda number, frame: signals.append(number))
    for step in tqdm(range(run.step, s.steps), file=sys.stdout, disable=None):
        # The prior: p are the rows for prediction, c those for correction, where δ = 1.
        p = draw(s.batch - s.correction_rows, key=(s.seed, step, "prediction"))
        c = draw(s.correction_rows, key=(s.seed, step, "correction"))

        # The student's average velocity, with gradient.
        F_p = average_velocity(student, p.z, p.delta, p.y, p.gamma)
        F_c = average_velocity(student, c.z, torch.ones_like(c.r), c.y, c.gamma)

        # Its derivative in δ, without gradient and DDP. fd reuses F_p, unless that is bfloat16.
        F = partial(average_velocity, run.unwrapped, y=p.y, gamma=p.gamma)
        dF = run.derivative(F, p.z, p.delta, None if s.bf16 else F_p.detach(), s.derivative)

        # Teacher and g. Correction is guided where r <= cut. g sees γ, like the student [ours].
        u_p = partial(teacher, y=p.y, gamma=p.gamma, interval=s.interval)
        u_c = partial(teacher, y=c.y, gamma=c.gamma, interval=(0.0, s.cut))
        g = partial(run.online, y=c.y, gw=c.gamma)

        residual_G = prediction(F_p, dF, u_p, p.z, p.delta)
        residual_N, online_loss = correction(F_c, u_c, g, c.z, c.n, c.r)
        loss, lam = student_loss(F_p, residual_G, F_c, residual_N, s.k, s.alpha, mean_of_all)
        (loss + online_loss).backward()  # disjoint parameters

        norms = [clip_grad_norm_(net.parameters(), 1) for net in (run.net, run.g)]
        run.bad |= ~torch.stack(norms).isfinite().all()  # no GPU wait
        rate = learning_rate(step, s.steps, s.warmup, s.decay_from)
        for optimizer in run.optimizers:
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * rate
            optimizer.step()
            optimizer.zero_grad()
        decay = min(s.ema, (1 + step) / (10 + step))  # the average forgets its start
        for average, weight in zip(run.ema.parameters(), run.net.parameters()):
            average.lerp_(weight.detach(), 1 - decay)

        run.step, last = step + 1, step + 1 == s.steps
        stopped = any_process(signals)
        logged = last or run.step % s.log_every == 0 or run.step % s.eval_every == 0
        saved = last or stopped or run.step % s.ckpt_every == 0
        if (logged or saved) and run.bad:
            raise ValueError(f"step {run.step}: gradient not finite; nothing is saved")
        if logged:
            log(run, s, residual_G, residual_N, online_loss, lam, norms)
        if saved and RANK == 0:
            save(run, s)
        if stopped:
            return print(f"saved after step {run.step}; rerun to go on")
    print(f"next: python fmd.py --res {s.res} --sample 100 --out {s.folder}")


# ---- 8. Networks, log and checkpoints ----
def load(run, s, source, student=False):
    """-> a frozen teacher or student. Sets run.shape, classes, convention and decoder."""
    if LOCAL_RANK > 0:
        any_process()  # waits: one process of a machine downloads
    net, info = sit.load(sit.fetch(source))
    run.decoder = sit.load_decoder(sit.fetch(s.vae)).to(run.device) if s.res > 28 else None
    if LOCAL_RANK == 0:
        any_process()
    run.shape, run.classes = net.config["shape"], net.config["classes"]
    run.convention = info["convention"] if s.convention == "auto" else s.convention
    if (net.config["dt"], net.config["gw"]) != (student, student):
        raise ValueError(f"{source}: not a {'student' if student else 'teacher'}")
    if run.shape != [4, s.res // 8, s.res // 8] and (s.res > 28 or run.shape[0] == 4):
        raise ValueError(f"{source}: made for {run.shape}, not for --res {s.res}")
    return net.to(run.device)


def start_from(teacher, **embedders):
    """A network with the teacher's weights and added embedders, whose output starts at zero."""
    net = sit.SiT(**teacher.config | embedders)
    net.load_state_dict(net.state_dict() | teacher.state_dict())
    return net.to(teacher.pos_embed.device)


def make_optimizers(net, lr, kind):
    """-> [AdamW], or for "muon" [AdamW, Muon]: Muon updates the matrices in the blocks, at AdamW's
    size (kellerjordan.github.io/posts/muon). Ours; not for g: slower there, no better."""
    matrices = [p for p in net.blocks.parameters() if p.ndim == 2 and kind == "muon"]
    chosen = set(matrices)
    others = [p for p in net.parameters() if p.requires_grad and p not in chosen]
    adamw = torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=0, fused=True)
    if kind == "adamw":
        return [adamw]
    muon = torch.optim.Muon(matrices, lr, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]


def setup(s):
    """-> what train reads: networks net, g, ema; velocities teacher, student, online, unwrapped."""
    if s.correction_rows % WORLD or s.batch % WORLD:
        raise ValueError(f"--batch {s.batch}: both parts must divide by {WORLD}")
    run = SimpleNamespace(device=join(s.device), step=0)
    teacher = load(run, s, s.teacher)
    torch.manual_seed(s.seed)  # the embedders' first layers are random
    run.net = start_from(teacher, dt=True, gw=True)
    run.g = start_from(teacher, gw=True)
    run.ema = start_from(run.net).requires_grad_(False)
    run.optimizers = make_optimizers(run.net, s.lr, s.optimizer)
    run.optimizers += make_optimizers(run.g, s.online_lr, "adamw")
    run.bad = torch.tensor(False, device=run.device)
    s.folder.mkdir(parents=True, exist_ok=True)
    resume(run, s)
    print(f"{vars(s)}\nconvention {run.convention}, from step {run.step}")

    if s.checkpointing is None:  # XL/2: 64 rows at 256 fit 80 GB
        tokens = s.batch // WORLD * teacher.pos_embed.shape[1]
        s.checkpointing = run.device.type == "cuda" and tokens > 64 * 256
    run.net.checkpointing = run.g.checkpointing = s.checkpointing
    run.derivative, nets = duration_derivative, (run.net, run.g)
    if s.compile:  # by block: DDP and checkpointing stay outside
        print("compiling")
        for net in (teacher, *nets):
            for block in net.blocks:
                block.compile(dynamic=False)
        run.derivative = torch.compile(duration_derivative, dynamic=False)
    if WORLD > 1:  # the flag keeps DDP from regrouping: exact resume on a CPU
        wrap = partial(DDP, find_unused_parameters=s.device == "cpu")
        nets = [wrap(net, gradient_as_bucket_view=True) for net in nets]
    exact = partial(velocity_of, convention=run.convention)  # never bfloat16
    velocity = partial(exact, bf16=s.bf16)
    run.teacher, run.student, run.online = (partial(velocity, x) for x in (teacher, *nets))
    run.unwrapped = partial(velocity if s.derivative == "jvp" else exact, run.net)
    run.one_step = partial(one_step, partial(exact, run.ema))
    if RANK == 0:
        u = partial(exact, teacher)
        run.phi = evaluate(run, s, partial(many_steps, u, null=run.classes, interval=s.interval))
    run.clock, run.clock_step = time.perf_counter(), run.step
    return run


def log(run, s, residual_G, residual_N, online_loss, lam, norms):
    """A line of metrics.jsonl; at an evaluation pairs.png and the endpoint error |x - φ| / |φ|,
    φ being the teacher's samples of the same noises. images_per_s includes saves, evaluations."""
    terms = {"prediction": residual_G.square(), "correction": residual_N.square(),
             "online": online_loss, "lambda": lam, "student_norm": norms[0],
             "online_norm": norms[1]}
    line = {k: mean_of_all(v).nan_to_num().item() for k, v in terms.items()}  # nan: no rows
    if RANK > 0:
        return
    now, images = time.perf_counter(), s.batch * (run.step - run.clock_step)
    seconds, run.clock, run.clock_step = now - run.clock, now, run.step
    line |= {"step": run.step, "images_per_s": images / seconds,
             "lr": run.optimizers[0].param_groups[0]["lr"],
             "gpu_gb": torch.cuda.max_memory_allocated() / 1e9}
    if run.step == s.steps or run.step % s.eval_every == 0:
        x, phi = evaluate(run, s, run.one_step), run.phi
        error = (x - phi).flatten(1).norm(dim=1) / phi.flatten(1).norm(dim=1)
        line["endpoint_error"] = error.mean().item()
        pairs = torch.stack([phi, x], 1)[:50].flatten(0, 1)
        save_grid(s.folder / "pairs.png", to_uint8(pairs, run.decoder))
    text = json.dumps({k: round(v, 8) for k, v in line.items()})
    tqdm.write(text)
    with open(s.folder / "metrics.jsonl", "a") as file:
        file.write(text + "\n")


def save(run, s):
    """student.pt; and ckpt.pt, which has the rest of the run as well. By process 0."""
    file = dict(ema=sit.released_names(run.ema.state_dict()), config=run.ema.config,
                convention=run.convention, gamma=s.gamma)
    write(s.folder / "student.pt", partial(torch.save, file))
    file |= dict(student=run.net.state_dict(), online=run.g.state_dict(),
                 optimizers=[o.state_dict()["state"] for o in run.optimizers],
                 settings={name: getattr(s, name) for name in FIXED}, step=run.step,
                 log_size=(s.folder / "metrics.jsonl").stat().st_size)
    write(s.folder / "ckpt.pt", partial(torch.save, file))


def resume(run, s):
    """Load ckpt.pt, if there is one, and cut the log to its step. ValueError if it does not fit."""
    path, log_size = s.folder / "ckpt.pt", 0
    if path.exists():
        file = sit.read_file(path)
        try:
            differ = {k: v for k, v in file["settings"].items() if v != getattr(s, k)}
            run.step, log_size = file["step"], file["log_size"]
            if not differ:
                run.ema.load_state_dict(sit.our_names(file["ema"]))
                run.net.load_state_dict(file["student"])
                run.g.load_state_dict(file["online"])
                for o, state in zip(run.optimizers, file["optimizers"], strict=True):
                    o.load_state_dict({**o.state_dict(), "state": state})
        except Exception as e:  # whatever a file of another kind raises
            raise ValueError(f"{path}: not of this run ({sit.reason(e)})") from None
        if differ or run.step > s.steps:
            raise ValueError(f"--out {s.folder}: a run of {run.step} steps with {differ}; "
                             "give these, or another folder")
    if mean_of_all(torch.tensor(float(run.step))) != run.step:
        raise ValueError(f"--out {s.folder}: all processes must see it")
    if RANK == 0:
        with open(s.folder / "metrics.jsonl", "ab") as file:
            file.truncate(min(file.tell(), log_size))


# ---- 9. Sampling ----
@torch.no_grad()
def one_step(velocity, z, y, gamma):
    """The student's samples f(z, 1), one evaluation each. z (B, ...), y (B,), gamma a number."""
    ones = torch.ones(len(z), device=z.device)
    return flow_map(average_velocity(velocity, z, ones, y, gamma * ones), z, ones)


def many_steps(velocity, z, y, gamma, null, steps=16, solver="heun", interval=(0.0, 1.0)):
    """The teacher's samples, by a guided rollout. z (B, ...), y (B,), gamma a number."""
    u = partial(guided, velocity, y=y, gamma=gamma, null=null, interval=interval)
    return rollout(u, z, steps, solver)


def generate(run, s, sampler, count, labels, rank=0, world=1):
    """Yield sampler(z, y) by chunks, this process's share. Noise i depends on seed and i alone."""
    for first in range(rank * CHUNK, rank * CHUNK + count, world * CHUNK):
        mine = range(first, first + CHUNK)
        sources = [generator("cpu", s.seed, "sample", i) for i in mine]
        z = torch.stack([torch.randn(run.shape, generator=x) for x in sources])
        y = torch.tensor([labels[i % len(labels)] for i in mine])
        yield sampler(z.to(run.device), y.to(run.device))


def evaluate(run, s, sampler):
    """Samples of the first noises, at the middle of the student's range of γ, labels in turn."""
    sampler = partial(sampler, gamma=sum(s.gamma) / 2)
    chunks = generate(run, s, sampler, s.eval_samples, range(run.classes))
    return torch.cat(list(chunks))[:s.eval_samples]


def to_uint8(x, decoder=None):
    """Pixels in [-1, 1], or latents (N, C, H, W) -> (N, H, W, C) uint8, rounded like DiT's."""
    if decoder is not None:
        x = torch.cat([decoder(part) for part in x.split(8)])
    return (127.5 * x + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().cpu()


def save_grid(path, images):
    """(N, H, W, C) uint8 -> a PNG, ten in a row."""
    images = images.permute(0, 3, 1, 2) / 255
    write(path, partial(save_image, images, format="PNG", nrow=10, pad_value=1))


def sample(s):
    """--sample or --rollout: N samples to an npz, as ADM's evaluator reads it, and a grid."""
    run, count = SimpleNamespace(device=join(s.device)), s.sample or s.rollout
    if s.sample:
        source, path = s.ckpt or s.folder / "student.pt", s.folder / "samples.npz"
        if s.res == 28 and not (s.ckpt or s.out or source.exists()):
            source = "assets/student-mnist.pt"
        net, sampler = load(run, s, source, student=True), one_step
    else:
        source, path = s.teacher, s.folder / "rollout.npz"
        net = load(run, s, source)
        sampler = partial(many_steps, null=run.classes, steps=s.rollout_steps,
                          solver=s.solver, interval=s.interval)
    velocity = partial(velocity_of, net, convention=run.convention)
    sampler = partial(sampler, velocity, gamma=s.guidance)
    text = s.labels.replace("balanced", f"0-{run.classes - 1}")
    ends = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    labels = range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else ()
    if not labels or labels[-1] >= run.classes:
        raise ValueError(f"--labels {s.labels}: give N or LOW-HIGH below {run.classes}")
    s.folder.mkdir(parents=True, exist_ok=True)
    clock, images = time.perf_counter(), None
    chunks = generate(run, s, sampler, count, labels, RANK, WORLD)
    progress = tqdm(range(0, count, WORLD * CHUNK), file=sys.stdout, disable=None)
    for first, x in zip(progress, chunks):
        rows = [to_uint8(x, run.decoder)]
        if WORLD > 1:
            x, rows = rows[0], [torch.empty_like(rows[0]) for _ in range(WORLD)]
            dist.gather(x, rows if RANK == 0 else None)
        if RANK == 0:  # filled in place
            rows = torch.cat(rows)[:count - first]
            images = images if first else rows.new_empty((count, *rows.shape[1:]))
            images[first:first + len(rows)] = rows
    if RANK == 0:
        seconds, y = time.perf_counter() - clock, np.resize(labels, count)
        write(path, partial(np.savez, arr_0=images.numpy(), arr_1=y))
        save_grid(path.with_suffix(".png"), images[:100])
        print(f"{path}: {count} samples of {source}, {1e3 * seconds / count:.2f} ms each")


# ---- 10. The command line ----
def parse(argv):
    """The command line -> a namespace of settings. Bad input exits with one line and code 2."""
    parser = argparse.ArgumentParser("fmd.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"fmd.py: {message}\n")
    settings(parser)
    no_help = [x for x in argv if x not in ("-h", "--help")]
    parser.set_defaults(**PRESETS[parser.parse_args(no_help).res])
    s = parser.parse_args(argv)

    def limit(low, high, names):
        for name in names.split():
            value = getattr(s, name)
            if not (np.diff([low, *np.ravel(value), high]) >= 0).all():
                flag = f"--{name.replace('_', '-')} {value}"
                parser.error(f"{flag}: must be from {low} to {high}, in order")

    limit(1, 1e9, "steps batch eval_samples log_every eval_every ckpt_every rollout_steps")
    limit(0, 1e9, "k alpha gamma r_scale lr online_lr warmup seed guidance sample rollout")
    limit(0, 1, "correction cut interval decay_from ema")
    if s.sample and s.rollout:
        parser.error(f"--rollout {s.rollout}: not together with --sample")
    s.folder = Path(s.out or f"out/{s.res}")
    s.correction_rows = round(s.batch * s.correction)  # of a batch
    return s


def main(argv):
    s = parse(argv)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # process 0 speaks for all
    tf32 = s.derivative == "jvp"  # a finite difference drowns in its rounding
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        sample(s) if s.sample or s.rollout else train(s)
    except torch.OutOfMemoryError:
        print("fmd.py: GPU memory is full: lower --batch (samples: CHUNK)", file=sys.stderr)
        return 2
    except (ValueError, OSError) as e:
        print(f"fmd.py: {e}", file=sys.stderr)
        return 2
    any_process()  # process 0 may be busy still
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
