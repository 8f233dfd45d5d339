# SPDX-License-Identifier: MIT
"""FMD: data-free flow-map distillation, a minimal FreeFlow (arXiv 2511.19428).

A pretrained flow model, the teacher, makes a sample by integrating its velocity u from noise to
data, in tens to hundreds of network evaluations. A flow map, the student, jumps there in one. This
file distils the first into the second without data: training needs only noise, where all paths
start, and what the student itself predicts.

TIME: t = 1 IS NOISE, t = 0 IS DATA. VELOCITIES POINT FROM NOISE TO DATA.

A step of training, in formulas:

  z ~ N(0, I),  δ ~ U(0, 1)               noise, where a path starts; a duration along the path
  x_δ = z + δ F(z, δ)                     the student's state after δ; F is its average velocity
  Δ_p = F + δ ∂F/∂δ - u(x_δ, 1 - δ)       prediction: the student's velocity minus the teacher's

  x = z + F(z, 1)                         a sample of the student, from another z
  x_r = (1 - r) x + r n,  n ~ N(0, I)     the sample under fresh noise, of a random level r
  Δ_c = g(x_r, r) - u(x_r, r)             correction: velocity of the student's noised samples,
                                          learned by g, minus the teacher's

  F moves against w Δ_p and λ Δ_c         w = 1 / |Δ_p|², so small Δ_p pull harder than large ones;
                                          λ = mean|Δ_p| / mean|Δ_c| (student_loss adds ε, k and α)
  g(x_r, r) moves towards x - n           so g, a third network, learns E[x - n | x_r]

Prediction makes the student's path follow the teacher's, but small errors add up along the path.
Correction compares where paths end, as a distribution. F, u and g also take a class label y and a
guidance strength γ: the student learns the guided velocity, and samples with one evaluation.

If you know MeanFlow: here the start z of a path is fixed. So ∂F/∂δ is a partial derivative, without
a term (v·∇)F.

  python fmd.py                                            distil the bundled teacher of MNIST's
                                                           digits, in minutes; or resume
  torchrun --nproc_per_node=8 fmd.py --res 256             ImageNet, from the released SiT-XL/2
  python fmd.py --sample 100 --guidance 1.5 --labels 7     one-step samples of the student
  python fmd.py --rollout 100 --solver heun                many-step samples of the teacher

Sections 1 to 5 are the method. [ours] marks a choice that the paper does not make.
"""

import argparse
import datetime
import json
import os
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.utils import clip_grad_norm_
from torchvision.utils import save_image
from tqdm import tqdm

import sit

# As torchrun and other launchers set them. A process alone is process 0, whatever RANK says.
WORLD = int(os.environ.get("WORLD_SIZE") or 1)
RANK = int(os.environ.get("RANK") or 0) if WORLD > 1 else 0
LOCAL_RANK = int(os.environ.get("LOCAL_RANK") or 0) if WORLD > 1 else 0


# ---- 1. The prior ----
def prior(count, shape, classes, gamma_range=(1.0, 2.0), device="cpu"):
    """Starts of paths -> z (count, *shape) ~ N(0, I); y (count,), labels below `classes`; gamma
    (count,) ~ U(gamma_range), so that guidance is a knob when the student samples."""
    low, high = gamma_range
    z = torch.randn(count, *shape, device=device)
    y = torch.randint(classes, (count,), device=device)
    gamma = low + (high - low) * torch.rand(count, device=device)
    return z, y, gamma


# ---- 2. The teacher: a guided velocity and its rollout ----
def expand(t, x):
    """(B,) -> (B, 1, ..., 1), to multiply x (B, ...)."""
    return t.view(-1, *[1] * (x.ndim - 1))


def like(v, x):
    """A velocity v at x. Raises ValueError if its shape is not x's: broadcasting would hide it."""
    if v.shape != x.shape:
        raise ValueError(f"a velocity of shape {tuple(v.shape)} at x of shape {tuple(x.shape)}")
    return v


def guided(net, x, t, y, gamma, null, interval=(0.0, 1.0)):
    """Classifier-free guidance u(x|∅) + γ (u(x|y) - u(x|∅)), by one call of net(x, t, y).
    x (B, ...); t, y (B,); gamma (B,) or a number; null, the index of the label ∅ -> like x.
    γ is 1, no guidance, for t outside the interval. All channels are guided (DiT's code: three)."""
    low, high = interval
    gamma = torch.where((low <= t) & (t <= high), gamma, 1.0)
    labels = torch.cat([y, torch.full_like(y, null)])
    u_y, u_null = net(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2)  # of (2B, ...)
    return u_null + expand(gamma, x) * (u_y - u_null)


@torch.no_grad()
def rollout(u, z, steps, solver="heun"):
    """Integrate dx/dδ = u(x, 1 - δ) from z at δ = 0 to δ = 1 on a uniform grid -> like z (B, ...).
    u(x, t) takes x (B, ...) and t (B,). Euler calls it once a step, Heun twice. Heun's last step is
    Euler's, as in EDM (arXiv 2206.00364, Algorithm 1), but not as usual in flow matching: at t = 0
    x holds no noise to remove, and a trained u leaves specks on it. Raises ValueError."""
    if solver not in ("euler", "heun"):
        raise ValueError(f"solver {solver}: must be euler or heun")
    x = z
    for i in range(steps):
        t, t_next = x.new_full((len(x),), 1 - i / steps), x.new_full((len(x),), 1 - (i + 1) / steps)
        v = like(u(x, t), x)
        if solver == "heun" and i + 1 < steps:
            v = (v + u(x + v / steps, t_next)) / 2
        x = x + v / steps
    return x


# ---- 3. The student: a flow map and its derivative ----
def average_velocity(student, z, delta, y, gamma):
    """F(z, δ) for z (B, ...); delta, y, gamma (B,) -> like z. student(x, t, y, delta, gamma) is the
    teacher's network with two more inputs, δ and γ. Its t stays at 1, where every path starts."""
    return student(z, torch.ones_like(delta), y, delta=delta, gamma=gamma)


def flow_map(F_value, z, delta):
    """f(z, δ) = z + δ F(z, δ), where the path is after δ; at δ = 1 a sample.
    F_value = F(z, δ), z (B, ...); delta (B,) -> like z."""
    return z + expand(delta, z) * like(F_value, z)


@torch.no_grad()
def duration_derivative(F, z, delta):
    """∂F/∂δ at fixed z, without gradient, for z (B, ...), delta (B,) -> like z. It is a
    Jacobian-vector product with tangent 1 on δ, in forward mode: no step size to choose.
    Fused attention has no forward derivative, so this call takes the plain kernel.
    If you copy this: the network in F is the bare one, not DDP's wrapper. It has no dropout. Its
    embedding of δ is smooth, not rounded to integers."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(lambda d: F(z, d), (delta,), (torch.ones_like(delta),))[1]


# ---- 4. The objectives ----
@torch.no_grad()
def prediction(F_value, F_dot, u, z, delta):
    """Prediction (paper, Eq. 7 to 9) -> its residual, like z; the paper's Δ_G:
        Δ_p = v - u(f(z, δ), 1 - δ),  with v = ∂f/∂δ = F + δ ∂F/∂δ.
    f starts at z. If Δ_p is 0 at all δ, then ∂f/∂δ = u(f, 1 - δ): f is the teacher's path.
    u is taken at the *student's* state, so neither the teacher's path nor data are needed.
    F_value = F(z, δ), F_dot = ∂F/∂δ, z (B, ...); delta (B,); u(x, t). Raises ValueError.
    If you copy this: u has t = 1 at noise and points to data. With a wrong clock or sign the
    residual still shrinks, and the samples are garbage."""
    x_delta = flow_map(F_value, z, delta)
    v = F_value + expand(delta, z) * F_dot
    return v - like(u(x_delta, 1 - delta), z)


def correction(F_value, u, g, z, n, r):
    """Correction (paper, Eq. 10 and 11) -> its residual, like z (the paper's Δ_N); the loss of g.
        x = f(z, 1)                        a sample of the student
        x_r = (1 - r) x + r n              the sample under noise
        Δ_c = E[x - n | x_r] - u(x_r, r)   velocity of the student's noised samples minus teacher's
    The expectation has no formula. g learns it by flow matching, with loss |g(x_r, r) - (x - n)|².
    Why it works, with the score the gradient of the log density of noised samples:
        x - n = (x_r - n) / (1 - r)  and  E[n | x_r] = -r score(x_r), so
        Δ_c = r / (1 - r) (student's score - teacher's score) at x_r.
    The mean over n of (1 - r) (student's score - teacher's score) is the gradient, with respect to
    x, of KL(student, teacher) under noise r, as in DMD (arXiv 2311.18828). Both factors depend on
    r alone: they weight the noise levels. And x = z + F(z, 1), so a step of F against Δ_c moves x
    against it. (A guided u is not exactly the velocity of a distribution.)
    F_value = F(z, 1), z, n (B, ...); r (B,); u(x, t), g(x, t). Raises ValueError.
    If you copy this: g starts from the teacher's weights, and this loss alone trains it."""
    x = flow_map(F_value, z, torch.ones_like(r)).detach()  # g's loss moves g alone
    x_r = (1 - expand(r, x)) * x + expand(r, x) * n
    v = like(g(x_r, r), x)
    with torch.no_grad():
        residual = v - like(u(x_r, r), x)
    return residual, mean_square(v - (x - n))


def mean_square(x):
    """The mean of the squares. An empty x gives 0, not nan."""
    return x.square().sum() / max(x.numel(), 1)


def student_loss(F_p, residual_p, F_c, residual_c, k=1.0, alpha=1.0, eps=1e-3):
    """The student's loss -> loss, λ. It is made to have the gradient w Δ_p / M in F_p and λ Δ_c / M
    in F_c, so that descent moves F against both residuals. Its value means nothing.
        loss = (Σ F_p · w Δ_p + λ Σ F_c · Δ_c) / M   Δ, w, λ constant; M numbers in all
        w = 1 / (|Δ_p|² + ε)^k                       one for each row (paper, Table 1)
        λ = α mean|Δ_p| / (mean|Δ_c| + ε)            one for each process
    |Δ| is the root mean square of a row's numbers. MeanFlow (arXiv 2505.13447) writes the loss as
    sg(w) |F - sg(F - Δ)|², where sg stops the gradient: the same gradient, up to a constant.
    w is for prediction alone. With the paper's k = 1 a row pulls with |Δ_p| / (|Δ_p|² + ε): the
    smaller the residual, the harder, down to |Δ_p| = √ε. Correction has no w: its rows keep the
    weights of their noise levels, and pull with λ |Δ_c|, on average α mean|Δ_p|. That is about
    α |Δ_p|² times a row of prediction, so correction fades as prediction converges.
    ε is [ours]. In w it bounds the pull of small residuals. In λ it keeps rounding small: at the
    first step g is the teacher, so Δ_c without guidance is rounding error alone.
    F_p, residual_p (P, ...); F_c, residual_c (C, ...). If P or C is 0, λ is α."""
    residual_p, residual_c = residual_p.detach(), residual_c.detach()
    size_p = residual_p.flatten(1).square().mean(1)  # |Δ_p|², (P,)
    size_c = residual_c.flatten(1).square().mean(1)  # |Δ_c|², (C,)
    w = expand((size_p + eps) ** -k, F_p)
    lam = alpha * size_p.sqrt().mean() / (size_c.sqrt().mean() + eps)
    if not len(size_p) or not len(size_c):
        lam = size_p.new_full((), alpha)
    total = (F_p * w * residual_p).sum() + lam * (F_c * residual_c).sum()
    return total / (F_p.numel() + F_c.numel()), lam


# ---- 5. The training loop ----
def train(s):
    """Distil. s: the settings of section 6. Writes student.pt, ckpt.pt, metrics.jsonl and pairs.png
    to s.out. The same command, repeated, goes on from ckpt.pt. Each of WORLD processes runs this
    function on its share of the batch; process 0 prints and writes."""
    device = join(s.device)
    teacher, _, decoder = load(s.teacher, s.res, s.convention, s.vae, device)
    shape, classes = teacher.config["shape"], teacher.config["classes"]
    null = classes  # ∅ comes after the last class

    # ---- Networks. All start as the teacher; the new embedders of δ and γ give 0 at first. So F
    # ignores δ and γ: it is the unguided u(z, 1). And g is the unguided teacher: at first Δ_c is
    # u(γ = 1) - u(γ), pure guidance, and holds nothing about the student. That g takes γ is [ours].
    torch.manual_seed(s.seed)
    student = start_from(teacher, delta=True, gamma=True)
    online = start_from(teacher, gamma=True)  # g
    ema = start_from(student).requires_grad_(False)  # the student's average, which samples

    # ---- Optimiser, rates, clipping and average are [ours].
    weights = [*student.parameters(), *online.parameters()]
    optimizer = torch.optim.Adam(weights, betas=(0.9, 0.99), fused=True)
    parts = {"student": student, "online": online, "ema": ema, "optimizer": optimizer}
    s.out.mkdir(parents=True, exist_ok=True)
    first = resume(s.out / "ckpt.pt", parts, s)

    # ---- Evaluation: φ, the teacher's samples of fixed noises, by 16 Heun steps, at a middle γ.
    gamma_eval = sum(s.gamma) / 2
    z_eval = noises(s.seed, range(s.eval_samples), shape).to(device)
    y_eval = torch.arange(s.eval_samples, device=device) % classes
    phi = many_steps(teacher, z_eval, y_eval, gamma_eval, null, interval=s.interval)

    # ---- How the networks run. With --bf16 they compute in bfloat16 and return float32.
    student.checkpointing = online.checkpointing = s.checkpointing  # of activations
    derivative = duration_derivative
    if s.compile:  # block by block: DDP and checkpointing stay outside of the graphs
        for block in (*teacher.blocks, *student.blocks, *online.blocks):
            block.compile(dynamic=False)
        derivative = torch.compile(duration_derivative, dynamic=False)
    ddp_student, ddp_online = (DDP(net) if WORLD > 1 else net for net in (student, online))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=s.bf16)
    rows_p, rows_c = s.rows_p // WORLD, s.rows_c // WORLD

    totals, logged, clock = 0, first, time.perf_counter()
    for step in tqdm(range(first, s.steps), initial=first, total=s.steps, disable=RANK > 0 or None):
        torch.manual_seed(step_seed(s.seed, step, RANK))  # so a checkpoint needs no generator
        rate = s.lr * learning_rate(step, s.steps, s.warmup, s.decay_from)
        optimizer.param_groups[0]["lr"] = rate  # set anew, so a resumed run may change --lr

        # ---- Prediction. F_p has a gradient. ∂F/∂δ needs none: a pass of its own, by the bare
        # student. It comes second: autocast casts each weight once for both passes, and weights cast
        # without gradient would get none from F_p.
        z_p, y_p, gamma_p = prior(rows_p, shape, classes, s.gamma, device)
        delta = torch.rand(rows_p, device=device)
        def F(z, delta): return average_velocity(student, z, delta, y_p, gamma_p)
        def u_p(x, t): return guided(teacher, x, t, y_p, gamma_p, null, s.interval)
        with autocast:
            F_p = average_velocity(ddp_student, z_p, delta, y_p, gamma_p)
            F_dot = derivative(F, z_p, delta)
            residual_p = prediction(F_p, F_dot, u_p, z_p, delta)

        # ---- Correction, at δ = 1. At r above the cut its teacher is unguided, while prediction's
        # is guided in the whole interval. The paper's FID for cut 0.6, 0.7 and 1: 5.72, 5.63, 8.65.
        z_c, y_c, gamma_c = prior(rows_c, shape, classes, s.gamma, device)
        n, logit = torch.randn_like(z_c), torch.randn(rows_c, device=device)
        r = torch.sigmoid(s.r_location + s.r_scale * logit)  # LogitNormal, mostly high noise
        low, high = s.interval[0], min(s.interval[1], s.cut)
        def u_c(x, t): return guided(teacher, x, t, y_c, gamma_c, null, (low, high))
        def g(x, t): return ddp_online(x, t, y_c, gamma=gamma_c)
        with autocast:
            F_c = average_velocity(ddp_student, z_c, torch.ones_like(r), y_c, gamma_c)
            residual_c, online_loss = correction(F_c, u_c, g, z_c, n, r)

        # ---- Update.
        loss, lam = student_loss(F_p, residual_p, F_c, residual_c, s.k, s.alpha)
        (loss + online_loss).backward()  # they share no weights
        student_norm = clip_grad_norm_(student.parameters(), 1)
        online_norm = clip_grad_norm_(online.parameters(), 1)
        optimizer.step()
        optimizer.zero_grad()
        # The average spans the last ninth of the steps so far, at most 1 / (1 - ema) of them: with
        # 0.9999, from step 90,000 on.
        decay = min(s.ema, (1 + step) / (10 + step))
        for average, weight in zip(ema.parameters(), student.parameters()):
            average.lerp_(weight.detach(), 1 - decay)

        # ---- Log the means since the last line. Summing waits for no GPU.
        terms = {"prediction": mean_square(residual_p), "correction": mean_square(residual_c),
                 "online": online_loss.detach(), "lambda": lam,
                 "student_norm": student_norm, "online_norm": online_norm}
        totals = totals + torch.stack([*terms.values()])
        done = step + 1
        saving = done % s.save_every == 0 or done == s.steps
        if saving or done % s.log_every == 0:
            means = mean_of_processes(totals / (done - logged)).tolist()
            speed = s.batch * (done - logged) / (time.perf_counter() - clock)
            line = {"step": done, **dict(zip(terms, means)), "lr": rate, "images_per_s": speed}
            if not np.isfinite(means).all():  # in all processes, and before anything is saved
                sys.exit(f"fmd.py: step {done}: a loss or gradient is not finite; "
                         "repeat the command with a lower --lr or another --seed")
            if saving and RANK == 0:
                x = one_step(ema, z_eval, y_eval, gamma_eval)
                line["endpoint_error"] = endpoint_error(x, phi).mean().item()
                save(s.out, parts, s, done)
                pairs = torch.stack([phi, x], 1)[:50].flatten(0, 1)  # side by side
                save_grid(s.out / "pairs.png", to_uint8(pairs, decoder))
            if RANK == 0:
                text = json.dumps({name: round(value, 8) for name, value in line.items()})
                say(text)
                with open(s.out / "metrics.jsonl", "a") as log:
                    print(text, file=log)
            totals, logged, clock = 0, done, time.perf_counter()
    say(f"next: python fmd.py --res {s.res} --sample 100 --out {s.out}")


# ---- 6. Settings ----
def count(text, least=1):
    if int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is less than {least}")
    return int(text)


def natural(text):
    return count(text, least=0)


def share(text):
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return float(text)


path = os.path.expanduser  # --out=~/run: the shell leaves it as it is
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RES = 28, 256, 512  # 28: pixels, of any size; else latents of images of this side

# flag: kind, value at --res 28, 256, 512, meaning. [P]: the value at 256 and 512 is the paper's.
SETTINGS = {
    # Method. A run is resumed only with the same values and teacher (METHOD).
    "correction": (share, 0.25, 0.25, 0.25, "correction's share of the batch [P]"),
    "k": (float, 1.0, 1.0, 1.0, "exponent of w, the weights of prediction [P]"),
    "alpha": (float, 1.0, 1.0, 1.0, "strength of correction [P]"),
    "gamma": (float, [1.0, 2.0], [1.0, 2.0], [1.0, 2.0], "range of γ in training"),
    "interval": (share, [0.0, 1.0], [0.0, 1.0], [0.0, 1.0], "guided at these t (REPA: 0 0.7)"),
    "cut": (share, 0.7, 0.7, 0.7, "correction's teacher is guided up to this r [P]"),
    "r_location": (float, 0.8, 0.8, 0.8, "mean of the logit of r [P]"),
    "r_scale": (float, 1.0, 1.0, 1.0, "standard deviation of the logit of r"),
    # Optimisation.
    "steps": (count, 1100, 100_000, 100_000, "optimiser steps [P]"),
    "batch": (count, 32, 256, 256, "rows a step, of all processes [P]"),
    "lr": (share, 1e-3, 1e-4, 1e-4, "peak rate of student and g"),
    "warmup": (natural, 20, 1000, 1000, "steps up to the peak"),
    "decay_from": (share, 0.3, 1.0, 1.0, "share of the steps before the fall to 0; 1: no fall"),
    "ema": (share, 0.99, 0.9999, 0.9999, "decay of the student's average"),
    "seed": (natural, 0, 0, 0, "of every draw"),
    "bf16": (bool, False, True, True, "in training, networks compute in bfloat16"),
    "compile": (bool, False, True, True, "torch.compile blocks and derivative: minutes, once"),
    "checkpointing": (bool, False, False, True, "recompute activations, to save memory"),
    # Files, log.
    "teacher": (path, "assets/teacher-mnist.pt", "SiT-XL/2", "SiT-XL/2-512",
                "file, name in sit.RELEASED, or URL"),
    "vae": (path, None, "sd-vae-ft-ema", "sd-vae-ft-ema", "decoder of the latents"),
    "convention": (("sit", "repa"), None, None, None, "clock and sign of a file, if not found"),
    "out": (path, "out/28", "out/256", "out/512", "folder"),
    "device": (("cuda", "cpu"), DEVICE, DEVICE, DEVICE, "cuda: a GPU each"),
    "log_every": (count, 25, 50, 50, "steps between lines of the log"),
    "save_every": (count, 500, 2000, 2000, "steps between checkpoints and endpoint errors"),
    "eval_samples": (count, 256, 64, 64, "noises of an endpoint error"),
    # Sampling, in place of training.
    "sample": (count, None, None, None, "N samples of the student"),
    "rollout": (count, None, None, None, "N samples of the teacher"),
    "ckpt": (path, None, None, None, "the student, if not OUT/student.pt"),
    "guidance": (float, 1.5, 1.5, 1.5, "γ of the samples"),
    "solver": (("heun", "euler"), "heun", "heun", "heun", "of the rollout"),
    "rollout_steps": (count, 32, 32, 32, "steps of the rollout"),
}
METHOD = "teacher convention correction k alpha gamma interval cut r_location r_scale".split()


def parse(argv=None):
    """The command line -> a namespace of settings. Bad input exits with one line and code 2."""
    parser = argparse.ArgumentParser("fmd.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda text: parser.exit(2, f"fmd.py: {text}\n" if RANK == 0 else None)
    parser.add_argument("--res", type=int, default=28, choices=RES, help="28: pixels, else latents")
    parser.add_argument("--labels", type=int, nargs="+", help="of the samples, in turn (all)")
    for name, (kind, *values, meaning) in SETTINGS.items():
        defaults = values[:1] if values[0] == values[1] == values[2] else values
        flag, text = f"--{name.replace('_', '-')}", f"{meaning} ({', '.join(map(str, defaults))})"
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif isinstance(kind, tuple):
            parser.add_argument(flag, choices=kind, help=text)
        else:
            many = 2 if isinstance(values[0], list) else None
            parser.add_argument(flag, type=kind, nargs=many, help=text)
    s = parser.parse_args(argv)
    for name, (_, *values, _) in SETTINGS.items():
        if getattr(s, name) is None:
            setattr(s, name, values[RES.index(s.res)])
    s.out = Path(s.out)
    s.rows_c = round(s.batch * s.correction)
    s.rows_p = s.batch - s.rows_c
    if (s.rows_p % WORLD or s.rows_c % WORLD) and not (s.sample or s.rollout):
        parser.error(f"--batch {s.batch}: {WORLD} processes cannot share {s.rows_p} rows of "
                     f"prediction and {s.rows_c} of correction; give multiples of {WORLD}")
    for name, (low, high) in (("gamma", s.gamma), ("interval", s.interval)):
        if low > high:
            parser.error(f"--{name} {low} {high}: give the lower one first")
    if s.device == "cuda" and LOCAL_RANK >= torch.cuda.device_count():
        parser.error(f"--device cuda: no GPU {LOCAL_RANK} here; use cpu")
    for name in () if s.sample or s.rollout else ("student.pt", "ckpt.pt"):
        if (s.out / name).resolve() in (Path(s.teacher).resolve(), Path(s.vae or "").resolve()):
            parser.error(f"--out {s.out}: {name} would be overwritten, and is read; give another")
    return s


# ---- 7. Processes and files ----
def join(kind):
    """Join the other processes. kind: "cpu", or "cuda", a GPU each. -> this process's device."""
    device = torch.device(kind, LOCAL_RANK if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    if WORLD > 1:  # the timeout is long: all wait while process 0 evaluates and saves
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    return device


def say(text):
    """Print, once for all processes, and past the progress bar."""
    if RANK == 0:
        tqdm.write(text)


def mean_of_processes(values):
    if WORLD > 1:
        dist.all_reduce(values)
    return values / WORLD


def step_seed(seed, step, rank):
    """A hash of seed and process, plus the step. (torch's CPU generator keeps 32 bits of a seed. If
    the step were hashed too, some of 100,000 steps would share their draws.)"""
    return int(np.random.SeedSequence((seed, rank)).generate_state(1)[0]) + step


def noises(seed, numbers, shape):
    """-> (len(numbers), *shape). Noise i depends on the seed and i alone."""
    draws = [np.random.default_rng((seed, i)).standard_normal(shape, np.float32) for i in numbers]
    return torch.from_numpy(np.array(draws, np.float32).reshape(-1, *shape))


def learning_rate(step, steps, warmup, decay_from):
    """The share of the peak rate: a linear rise over `warmup` steps, 1, then a linear fall to 0."""
    fall = (steps - step) / max(1.0, steps * (1 - decay_from))
    return min((step + 1) / (warmup + 1), 1.0, fall)


def load(source, res, convention, vae, device, student=False):
    """-> a frozen teacher or student in the clock and sign of this file, whatever its own are; what
    else its file holds; the decoder of its latents or None. Raises sit.FileError."""
    if LOCAL_RANK > 0:  # one process of a machine downloads, the others wait
        dist.barrier()
    net, info = sit.load(sit.fetch(source), convention=convention)
    shape, classes, convention = (net.config[name] for name in ("shape", "classes", "convention"))
    if not net.config["delta"] == net.config["gamma"] == student:
        raise sit.FileError(f"{source}: not a {'student' if student else 'teacher'}")
    if (res > 28 and shape != [4, res // 8, res // 8]) or (res == 28 and shape[0] == 4):
        raise sit.FileError(f"{source}: made for {shape}, not for --res {res}")
    say(f"{source}: convention {convention} ({info['why']}), labels 0 to {classes - 1}")
    decoder = sit.load_decoder(sit.fetch(vae)).to(device) if res > 28 else None
    if WORLD > 1 and LOCAL_RANK == 0:
        dist.barrier()
    return net.to(device), info, decoder


def start_from(net, **inputs):
    """A copy of the network with added inputs, whose embedders give 0 at first."""
    new = sit.SiT(**net.config | inputs)
    new.load_state_dict(new.state_dict() | net.state_dict())  # the new embedders keep theirs
    return new.to(net.pos_embed.device)


def save(folder, parts, s, step):
    """Write student.pt, the average in the released names, and ckpt.pt, whole or not at all."""
    ema = parts["ema"]
    about = {"config": ema.config, "gamma": s.gamma}
    student = {"ema": sit.released_names(ema.state_dict())} | about
    states = {name: part.state_dict() for name, part in parts.items()}
    run = {"step": step, "settings": {name: getattr(s, name) for name in METHOD}}
    sit.write(folder / "student.pt", partial(torch.save, student))
    sit.write(folder / "ckpt.pt", partial(torch.save, about | states | run))


def resume(path, parts, s):
    """Load ckpt.pt into the parts -> its step, or 0 if there is none. Raises sit.FileError."""
    if not path.exists():
        say(f"{path}: not there, so this run starts at step 0")
        return 0
    file = sit.read_file(path)
    with sit.usable(path, "a checkpoint of fmd.py"):
        for name, value in file["settings"].items():
            if getattr(s, name) != value:
                raise sit.FileError(f"{path}: {name} was {value}; give that, or another --out")
        for name, part in parts.items():
            part.load_state_dict(file[name])
        say(f"{path}: resumed at step {file['step']}")
        return file["step"]


# ---- 8. Sampling ----
CHUNK = 64  # samples at a time


@torch.no_grad()
def one_step(student, z, y, gamma):
    """The student's samples f(z, 1), one evaluation each. z (B, ...), y (B,), gamma a number."""
    one = torch.ones(len(z), device=z.device)
    return flow_map(average_velocity(student, z, one, y, gamma * one), z, one)


def many_steps(teacher, z, y, gamma, null, steps=16, solver="heun", interval=(0.0, 1.0)):
    """The teacher's samples, by a guided rollout. z (B, ...), y (B,), gamma a number."""
    def u(x, t): return guided(teacher, x, t, y, gamma, null, interval)
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
    """(N, H, W, C) uint8 -> a PNG, ten in a row. Pictures are grey or RGB."""
    if images.shape[3] not in (1, 3):
        return say(f"note: {path} is left out: it would have {images.shape[3]} channels")
    images = images.permute(0, 3, 1, 2) / 255
    sit.write(path, partial(save_image, images, format="PNG", nrow=10, pad_value=1))


def sample(s):
    """--sample or --rollout: N samples to an npz, as ADM's evaluator reads it, and a grid of some.
    Noise i is the same whatever N and the number of processes."""
    device = join(s.device)
    total = s.sample or s.rollout
    file, source = s.out / "rollout.npz", s.teacher
    if s.sample:
        file, source = s.out / "samples.npz", s.ckpt or s.out / "student.pt"
    net, info, decoder = load(source, s.res, s.convention, s.vae, device, student=bool(s.sample))
    shape, classes = net.config["shape"], net.config["classes"]
    labels = s.labels or range(classes)
    if not 0 <= min(labels) <= max(labels) < classes:
        sys.exit(f"fmd.py: --labels {labels}: give some of 0 to {classes - 1}")
    low, high = info.get("gamma", (s.guidance, s.guidance))
    if s.sample and not low <= s.guidance <= high:
        say(f"note: --guidance {s.guidance}: the student was trained with {low} to {high}")
    s.out.mkdir(parents=True, exist_ok=True)

    clock, parts = time.perf_counter(), []
    mine = range(total)[RANK * total // WORLD:(RANK + 1) * total // WORLD]  # may be empty
    for start in tqdm(range(0, max(1, len(mine)), CHUNK), disable=RANK > 0 or None):
        rows = mine[start:start + CHUNK]
        z = noises(s.seed, rows, shape).to(device)
        y = torch.tensor([labels[i % len(labels)] for i in rows], dtype=torch.long, device=device)
        if s.sample:
            x = one_step(net, z, y, s.guidance)
        else:
            x = many_steps(net, z, y, s.guidance, classes, s.rollout_steps, s.solver, s.interval)
        parts.append(to_uint8(x, decoder))
    images = torch.cat(parts)
    if WORLD > 1:
        shares = [None] * WORLD if RANK == 0 else None
        dist.gather_object(images, shares)
        images = torch.cat(shares) if RANK == 0 else None
    if RANK == 0:
        seconds = time.perf_counter() - clock
        sit.write(file, partial(np.savez, arr_0=images.numpy(), arr_1=np.resize(labels, total)))
        save_grid(file.with_suffix(".png"), images[:100])
        say(f"{file}: {total} samples of {source}, {1e3 * seconds / total:.2f} ms each")


def main(argv=None):
    """The command line. Raises SystemExit for bad input, with a line that says why."""
    s = parse(argv)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as in the authors' sampler
    try:
        sample(s) if s.sample or s.rollout else train(s)
    except (sit.FileError, OSError) as e:
        sys.exit(f"fmd.py: {e}")
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may have no δ
        sys.stdout.reconfigure(errors="backslashreplace")
    # Raised inside torch by the first JVP, and of no use to a reader of the log.
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*is deprecated")
    main()
