# SPDX-License-Identifier: MIT
"""FMD: data-free flow-map distillation, a minimal FreeFlow (arXiv 2511.19428).

A pretrained flow model, the teacher, makes a sample by integrating its velocity u from noise to
data, in tens to hundreds of network evaluations. A flow map, the student, jumps there in one. This
file distils the first into the second without data: training needs only noise, where all paths
start, and what the student itself predicts. So far it has run on CPUs with digits, not on a GPU.

TIME: t = 1 IS NOISE, t = 0 IS DATA. VELOCITIES POINT FROM NOISE TO DATA.

A step of training, in formulas:

  z ~ N(0, I),  δ ~ U(0, 1)               noise, where a path starts; a duration along the path
  x_δ = z + δ F(z, δ)                     the student's state after δ; F is its average velocity
  Δ_p = F + δ ∂F/∂δ - u(x_δ, 1 - δ)       prediction: the student's velocity minus the teacher's

  x = z + F(z, 1)                         a sample of the student, from another z
  x_r = (1 - r) x + r n,  n ~ N(0, I)     the sample under fresh noise, of a random level r
  Δ_c = g(x_r, r) - u(x_r, r)             correction: velocity of the student's noised samples,
                                          learned by g, minus the teacher's

  F(z, δ) moves against w Δ_p             w = 1 / (|Δ_p|² + ε)^k, a number for each sample
  F(z, 1) moves against λ Δ_c             λ = α mean|Δ_p| / (mean|Δ_c| + ε), a number for a batch
  g(x_r, r) moves towards x - n           so g, a third network, learns E[x - n | x_r]

|Δ| is the root mean square of one sample's numbers. Prediction makes the student's path follow the
teacher's, but small errors add up along the path. Correction compares where paths end, as a
distribution. F, u and g also take a class label y and a guidance strength γ: the student learns the
guided velocity, and samples with one evaluation. (In Δ_c, u is guided for r up to --cut only.)

With the paper's k = 1 a sample of prediction pulls at F with about 1 / |Δ_p|, so samples that F
cannot fit yet do not drown correction. A sample of correction pulls, on average, with α |Δ_p|. At
|Δ_p| = 0.3 and α = 1 these are 3.3 and 0.3. The log has the second over the first as `pull`: it
falls as prediction converges.

If you know MeanFlow: the start z of a path is fixed here, so ∂F/∂δ needs no term (v·∇)F.

  python fmd.py                                            distil the bundled teacher of MNIST's
                                                           digits, in minutes; or resume
  torchrun --nproc_per_node=8 fmd.py --res 256             ImageNet, from the released SiT-XL/2
  python fmd.py --sample 100 --guidance 1.5 --labels 7     one-step samples of the student
  python fmd.py --rollout 100 --solver heun                many-step samples of the teacher

Sections 1 to 5 are the method. [P] marks what is the paper's, [ours] what is not.
"""

import argparse
import datetime
import json
import os
import sys
import time
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

# As torchrun and other launchers set them. A single process is process 0, whatever RANK says.
WORLD = int(os.environ.get("WORLD_SIZE") or 1)
RANK = int(os.environ.get("RANK") or 0) if WORLD > 1 else 0
LOCAL_RANK = int(os.environ.get("LOCAL_RANK") or 0) if WORLD > 1 else 0


# ---- 1. The prior ----
def prior(rows, shape, classes, gamma_range=(1.0, 2.0), device="cpu"):
    """Starts of paths -> z (rows, *shape) ~ N(0, I); y (rows,), labels below `classes`; gamma
    (rows,) ~ U(gamma_range), so that guidance is a knob when the student samples."""
    low, high = gamma_range
    z = torch.randn(rows, *shape, device=device)
    y = torch.randint(classes, (rows,), device=device)
    gamma = low + (high - low) * torch.rand(rows, device=device)
    return z, y, gamma


# ---- 2. The teacher: a guided velocity and its rollout ----
def expand(t, x):
    """(B,) -> (B, 1, ..., 1), to multiply x (B, ...)."""
    return t.view(-1, *[1] * (x.ndim - 1))


def same_shape(v, x):
    """v, a velocity at x. Raises ValueError if its shape is not x's: broadcasting would hide it."""
    if v.shape != x.shape:
        raise ValueError(f"a velocity of shape {tuple(v.shape)} at x of shape {tuple(x.shape)}")
    return v


def guided(net, x, t, y, gamma, null, interval=(0.0, 1.0)):
    """Classifier-free guidance u(x|∅) + γ (u(x|y) - u(x|∅)), by one call of net(x, t, y).
    x (B, ...); t, y (B,); gamma (B,) or a number; null, the index of the label ∅ -> like x.
    γ is 1, no guidance, for t outside the interval. All channels are guided."""
    low, high = interval
    gamma = torch.where((low <= t) & (t <= high), gamma, 1.0)
    labels = torch.cat([y, torch.full_like(y, null)])
    u_y, u_null = net(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2)  # from (2B, ...)
    return u_null + expand(gamma, x) * (u_y - u_null)


@torch.no_grad()
def rollout(u, z, steps, solver="heun"):
    """Integrate dx/dδ = u(x, 1 - δ) from z at δ = 0 to δ = 1 on a uniform grid -> like z (B, ...).
    u(x, t) takes x (B, ...) and t (B,). Euler calls it once a step, Heun twice. But Heun's last
    step is Euler's, as in EDM (arXiv 2206.00364, Algorithm 1), because a second call would be at
    t = 0, where x holds no noise, and a trained u leaves specks. Raises ValueError."""
    if solver not in ("euler", "heun"):
        raise ValueError(f"solver {solver}: must be euler or heun")
    x = z
    for i in range(steps):
        t, t_next = (x.new_full((len(x),), 1 - j / steps) for j in (i, i + 1))
        v = same_shape(u(x, t), x)
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
    return z + expand(delta, z) * same_shape(F_value, z)


@torch.no_grad()
def duration_derivative(F, z, delta):
    """∂F/∂δ at fixed z, without gradient, for z (B, ...), delta (B,) -> like z. It is a
    Jacobian-vector product with tangent 1 on δ, in forward mode: no step size to choose.
    Fused attention has no forward derivative, so this call takes the plain kernel.
    If you copy this, the network in F
    - is the bare one: DDP's wrapper would prepare a backward pass that never comes. Under FSDP the
      weights must be gathered for this call;
    - has no dropout, neither of activations nor of conditions;
    - has no kernel without a forward derivative, and checkpoints no activations in this call;
    - embeds δ as it is. Rounded it has no derivative, and times 1,000 it has a huge one."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(lambda d: F(z, d), (delta,), (torch.ones_like(delta),))[1]


# ---- 4. The objectives ----
@torch.no_grad()
def prediction(F_value, F_dot, u, z, delta):
    """Prediction (paper, Eq. 7 to 9) -> its residual, like z, which the paper calls Δ_G:
        Δ_p = v - u(f(z, δ), 1 - δ),  with v = ∂f/∂δ = F + δ ∂F/∂δ.
    f starts at z. If Δ_p is 0 at all δ, then ∂f/∂δ = u(f, 1 - δ): f is the teacher's path.
    u is taken at the *student's* state, so neither the teacher's path nor data are needed.
    F_value = F(z, δ), F_dot = ∂F/∂δ, z (B, ...); delta (B,); u(x, t). Raises ValueError.
    If you copy this: u has t = 1 at noise and points to data. With a wrong clock or sign the
    residual still shrinks, and the samples are garbage."""
    x_delta = flow_map(F_value, z, delta)
    v = F_value + expand(delta, z) * F_dot
    return v - same_shape(u(x_delta, 1 - delta), z)


def correction(F_value, u, g, z, n, r):
    """Correction (paper, Eq. 10 and 11) -> its residual, like z, the paper's Δ_N; the loss of g.
        x = f(z, 1)                        a sample of the student
        x_r = (1 - r) x + r n              the sample under noise
        Δ_c = E[x - n | x_r] - u(x_r, r)   velocity of the student's noised samples minus teacher's
    The expectation has no formula. g learns it by flow matching, with loss |g(x_r, r) - (x - n)|².
    Why it works, with the score the gradient of the log density of noised samples:
        x - n = (x_r - n) / (1 - r)  and  E[n | x_r] = -r score(x_r), so
        Δ_c = r / (1 - r) (student's score - teacher's score) at x_r.
    The mean over n of (1 - r) (student's score - teacher's score) is the gradient, with respect to
    a sample x, of KL(student, teacher) under noise r, as in DMD (arXiv 2311.18828). The factors
    r / (1 - r) and 1 - r depend on r alone, so they only weight the noise levels. And
    x = z + F(z, 1), so a step of F against Δ_c moves x against it. (A guided u is not exactly the
    velocity of a distribution.)
    F_value = F(z, 1), z, n (B, ...); r (B,); u(x, t), g(x, t). Raises ValueError.
    If you copy this: g starts from the teacher's weights, and this loss alone trains it."""
    x = flow_map(F_value, z, torch.ones_like(r)).detach()  # g's loss moves g alone
    x_r = (1 - expand(r, x)) * x + expand(r, x) * n
    v = same_shape(g(x_r, r), x)
    with torch.no_grad():
        residual = v - same_shape(u(x_r, r), x)
    return residual, mean_square(v - (x - n))


def mean_square(x):
    """The mean of the squares. An empty x gives 0, not nan."""
    return x.square().sum() / max(x.numel(), 1)


def student_loss(F_p, residual_p, F_c, residual_c, k=1.0, alpha=1.0, eps=1e-3):
    """The student's loss -> loss; λ; pull. The loss is made to have the gradient w Δ_p / M in F_p
    and λ Δ_c / M in F_c, so that descent moves F against both residuals. Its value means nothing.
        loss = (Σ F_p · w Δ_p + λ Σ F_c · Δ_c) / M   Δ, w, λ constant; M numbers in all
        w = 1 / (|Δ_p|² + ε)^k                       one for each row [P]
        λ = α mean|Δ_p| / (mean|Δ_c| + ε)            one for each process's batch [P]
        pull = λ mean|Δ_c| / mean(w |Δ_p|)           for the log [ours]
    |Δ| is the root mean square of a row's numbers. MeanFlow (arXiv 2505.13447) writes the loss as
    sg(w) |F - sg(F - Δ)|², where sg stops the gradient: the same gradient, up to a constant.
    ε is [ours]. In w it bounds the pull of residuals below √ε. In λ it keeps rounding small: at the
    first step g is the teacher, so where the teacher is unguided, Δ_c is rounding error alone.
    If you copy this: with few rows a process, average both means of λ over the processes.
    F_p, residual_p (P, ...); F_c, residual_c (C, ...). If P or C is 0, λ is α and pull is 0."""
    residual_p, residual_c = residual_p.detach(), residual_c.detach()
    size_p = residual_p.flatten(1).square().mean(1).sqrt()  # |Δ_p|, (P,)
    size_c = residual_c.flatten(1).square().mean(1).sqrt()  # |Δ_c|, (C,)
    w = (size_p.square() + eps) ** -k
    lam, pull = size_p.new_full((), alpha), size_p.new_zeros(())
    if len(size_p) and len(size_c):
        lam = alpha * size_p.mean() / (size_c.mean() + eps)
        pull = lam * size_c.mean() / (w * size_p).mean()
    total = (F_p * expand(w, F_p) * residual_p).sum() + lam * (F_c * residual_c).sum()
    return total / (F_p.numel() + F_c.numel()), lam, pull


# ---- 5. The training loop ----
def train(s):
    """Distil. s: the settings of section 6. Writes the files of section 8 to s.out. The same
    command, repeated, goes on from ckpt.pt. Each of WORLD processes runs this function on its share
    of the batch; process 0 prints and writes.
    If you copy this: keep the weights in float32, or the average rounds away (bfloat16 is for
    autocast), and have no dropout in the three networks."""
    device = join(s.device)
    teacher, _ = load(s.teacher, s.res, device, s.convention)
    decoder = sit.load_decoder(fetch(s.vae)).to(device) if s.res > 28 else None
    shape, classes = teacher.config["shape"], teacher.config["classes"]
    null = classes  # ∅ comes after the last class

    # ---- Networks. All start as the teacher (or F as --init). New embedders, of δ and γ, give 0 at
    # first: F is the unguided u(z, 1) at every δ, and g the unguided u. So Δ_c is at first the
    # teacher's guidance alone, until g has learned the student. That g takes γ is [ours].
    torch.manual_seed(s.seed)
    start = load(s.init, s.res, device, student=True, teacher=teacher)[0] if s.init else teacher
    student = sit.start_from(start, delta=True, gamma=True)
    online = sit.start_from(teacher, gamma=True)  # g
    ema = sit.start_from(student).requires_grad_(False)  # the average, from which we sample
    optimizer = torch.optim.Adam([*student.parameters(), *online.parameters()], fused=True,
                                 betas=(0.9, 0.99))  # [ours], as are rates, clipping and average
    parts = {"student": student, "online": online, "ema": ema, "optimizer": optimizer}
    first = resume(s, parts)
    fixed = references(s, teacher) if RANK == 0 else None
    if RANK == 0:
        error = compare(s, ema, fixed, decoder)
        say(f"step {first}: endpoint error {error:.3f}. See {s.out / 'pairs.png'}: if the left of "
            "each pair, the teacher's sample, looks like noise, its clock or sign is wrong")
    ddp_student, ddp_online, derivative = prepare(s, teacher, student, online)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=s.bf16)
    rows = [s.rows_p // WORLD, s.rows_c // WORLD]  # of prediction, of correction

    totals, logged, clock = 0, first, time.perf_counter()
    for step in tqdm(range(first, s.steps), initial=first, total=s.steps, disable=RANK > 0 or None):
        torch.manual_seed(step_seed(s.seed, step, RANK))  # so a checkpoint needs no generator
        rate = s.lr * learning_rate(step, s.steps, s.warmup, s.decay_from)
        optimizer.param_groups[0]["lr"] = rate  # set anew, so a resumed run may change --lr

        # ---- The student, once for all rows. Prediction's have any δ, correction's have δ = 1.
        z, y, gamma = prior(sum(rows), shape, classes, s.gamma, device)
        (z_p, z_c), (y_p, y_c), (gamma_p, gamma_c) = (a.split(rows) for a in (z, y, gamma))
        delta_p, one = torch.rand_like(gamma_p), torch.ones_like(gamma_c)
        with autocast:
            F_all = average_velocity(ddp_student, z, torch.cat([delta_p, one]), y, gamma)
        F_p, F_c = F_all.split(rows)

        # ---- Prediction. ∂F/∂δ, without gradient, is a pass of its own, by the bare student.
        def F(z, delta): return average_velocity(student, z, delta, y_p, gamma_p)
        def u_p(x, t): return guided(teacher, x, t, y_p, gamma_p, null, s.interval)
        with autocast:
            F_dot = derivative(F, z_p, delta_p)
            residual_p = prediction(F_p, F_dot, u_p, z_p, delta_p)

        # ---- Correction. Its teacher is guided up to the noise level `cut` alone: that gave the
        # paper better samples, FID 5.63 with a cut at 0.7 and 8.65 without one.
        n = torch.randn_like(z_c)
        r = torch.sigmoid(s.r_location + s.r_scale * torch.randn_like(gamma_c))  # LogitNormal
        low, high = s.interval[0], min(s.interval[1], s.cut)
        def u_c(x, t): return guided(teacher, x, t, y_c, gamma_c, null, (low, high))
        def g(x, t): return ddp_online(x, t, y_c, gamma=gamma_c)
        with autocast:
            residual_c, online_loss = correction(F_c, u_c, g, z_c, n, r)

        # ---- Update.
        loss, lam, pull = student_loss(F_p, residual_p, F_c, residual_c, s.k, s.alpha)
        (loss + online_loss).backward()  # they share no weights
        student_norm = clip_grad_norm_(student.parameters(), 1)
        online_norm = clip_grad_norm_(online.parameters(), 1)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(s.ema, (1 + step) / (10 + step))  # at first, over the last ninth of the steps
        for average, weight in zip(ema.parameters(), student.parameters()):
            average.lerp_(weight.detach(), 1 - decay)

        # ---- Log the means since the last line. The sums stay on the GPU until then.
        terms = {"prediction": mean_square(residual_p), "correction": mean_square(residual_c),
                 "online": online_loss.detach(), "lambda": lam, "pull": pull,
                 "student_norm": student_norm, "online_norm": online_norm}
        totals = totals + torch.stack([*terms.values()])
        done = step + 1
        saving = done % s.save_every == 0 or done == s.steps
        if saving or done % s.log_every == 0:
            means = totals / (done - logged) / WORLD
            if WORLD > 1:
                dist.all_reduce(means)
            line = {"step": done, **dict(zip(terms, means.tolist())), "lr": rate}
            line["images_per_s"] = s.batch * (done - logged) / (time.perf_counter() - clock)
            totals, logged, clock = 0, done, time.perf_counter()  # a save counts in the next speed
            report(s, line, parts, fixed, decoder, saving)
    say(f"next: python fmd.py --res {s.res} --sample 100 --out {s.out}")


def step_seed(seed, step, rank):
    """A hash of seed and process, plus the step. Without it seed 1 would be seed 0, a step late.
    No two steps of a process share a seed, even in the 32 bits that torch's CPU generator keeps."""
    return int(np.random.SeedSequence((seed, rank)).generate_state(1)[0]) + step


def learning_rate(step, steps, warmup, decay_from):
    """The share of the peak rate: a linear rise over `warmup` steps, 1, then a linear fall to 0."""
    fall = (steps - step) / max(1.0, steps * (1 - decay_from))
    return min((step + 1) / (warmup + 1), 1.0, fall)


# ---- 6. Settings ----
# Defaults at 256 and 512 (latents), where they differ from parse's, which are for 28 (pixels). [P]:
# alpha, cut, batch, steps. With these alpha and cut correction does nothing on digits (RESULTS.md).
AT_256 = dict(alpha=1.0, cut=0.7, steps=100_000, batch=256, lr=1e-4, warmup=1000,
              decay_from=1.0, ema=0.9999, bf16=True, compile=True, teacher="SiT-XL/2",
              vae="sd-vae-ft-ema", out="out/256", log_every=50, save_every=10_000, eval_samples=64)
AT_512 = AT_256 | dict(checkpointing=True, teacher="SiT-XL/2-512", out="out/512", save_every=5000)
# A run is resumed only with the same values of these.
METHOD = "teacher convention init correction k alpha gamma interval cut r_location r_scale".split()


def parse(argv=None):
    """The command line -> a namespace of settings. Bad input exits with one line and code 2."""
    parser = argparse.ArgumentParser("fmd.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda text: parser.exit(2, f"fmd.py: {text}\n" if RANK == 0 else None)
    add, path, switch = parser.add_argument, os.path.expanduser, argparse.BooleanOptionalAction
    add("--res", type=int, default=28, choices=(28, 256, 512), help="28: pixels, else latents")
    # The method. [P]: the default is the paper's; the other defaults are [ours].
    add("--correction", type=float, default=0.25, help="correction's share of the batch [P]")
    add("--k", type=float, default=1.0, help="exponent of w, the weights of prediction [P]")
    add("--alpha", type=float, default=5.0, help="strength of correction")
    add("--gamma", type=float, default=[1.0, 2.0], nargs=2, help="range of γ in training")
    add("--interval", type=float, default=[0.0, 1.0], nargs=2, help="range of t that is guided")
    add("--cut", type=float, default=1.0, help="correction's teacher is guided up to this r")
    add("--r-location", type=float, default=0.8, help="mean of the logit of r [P]")
    add("--r-scale", type=float, default=1.0, help="standard deviation of the logit of r")
    # Optimisation.
    add("--steps", type=int, default=1100, help="optimiser steps")
    add("--batch", type=int, default=32, help="rows a step, of all processes")
    add("--lr", type=float, default=1e-3, help="peak rate of student and g")
    add("--warmup", type=int, default=20, help="steps up to the peak")
    add("--decay-from", type=float, default=0.3, help="share of steps before the fall; 1: none")
    add("--ema", type=float, default=0.99, help="decay of the student's average")
    add("--seed", type=int, default=0, help="of all random draws")
    add("--bf16", action=switch, default=False, help="in training, networks compute in bfloat16")
    add("--compile", action=switch, default=False, help="blocks and derivative: minutes, once")
    add("--checkpointing", action=switch, default=False, help="recompute activations: less memory")
    add("--device", choices=("cuda", "cpu"), help="cuda: a GPU for each process",
        default="cuda" if torch.cuda.is_available() else "cpu")
    # Files and the log.
    add("--teacher", type=path, default="assets/teacher-mnist.pt",
        help="file, URL or name in sit.RELEASED")
    add("--convention", choices=("sit", "repa"), help="its file's clock and sign, if not found")
    add("--init", type=path, help="start from this student, in place of the teacher")
    add("--vae", type=path, help="decoder of the latents")
    add("--out", type=path, default="out/28", help="folder")
    add("--log-every", type=int, default=25, help="steps between lines of the log")
    add("--save-every", type=int, default=500, help="steps between saves; each has its file")
    add("--eval-samples", type=int, default=256, help="noises of endpoint_error")
    # Sampling, in place of training.
    job = parser.add_mutually_exclusive_group()
    job.add_argument("--sample", type=int, metavar="N", help="samples of the student")
    job.add_argument("--rollout", type=int, metavar="N", help="samples of the teacher")
    add("--ckpt", type=path, help="student of --sample, if not OUT/student.pt")
    add("--guidance", type=float, default=1.5, help="γ of the samples")
    add("--labels", type=int, nargs="+", help="classes, in turn, if not all")
    add("--solver", choices=("heun", "euler"), default="heun", help="of --rollout")
    add("--rollout-steps", type=int, default=32, help="steps of --rollout")

    defaults = vars(parser.parse_args([]))  # those above
    parser.epilog = f"--res 28: {defaults}\n\n--res 256: {AT_256}\n\n--res 512: {AT_512}"
    res = parser.parse_known_args(argv)[0].res  # read first, because it sets other defaults
    parser.set_defaults(**{28: {}, 256: AT_256, 512: AT_512}[res])
    s = parser.parse_args(argv)
    s.out = Path(s.out)
    s.torch, s.processes = str(torch.__version__), WORLD  # so that resume can note a change
    check(s, parser.error)
    return s


def check(s, error):
    """Call error(text), which exits, if settings cannot work. Adds a batch's rows_p and rows_c."""
    counts = "steps batch log_every save_every eval_samples sample rollout rollout_steps"
    for names, low, high in ((counts, 1, np.inf), ("warmup seed", 0, np.inf),
                             ("correction cut interval lr decay_from ema", 0, 1)):
        for name in names.split():
            value = getattr(s, name)
            if value is not None and not all(low <= x <= high for x in np.ravel(value)):
                error(f"--{name.replace('_', '-')} {value}: give {low} to {high}")
    for name, (low, high) in (("gamma", s.gamma), ("interval", s.interval)):
        if low > high:
            error(f"--{name} {low} {high}: give the lower one first")
    gpus = torch.cuda.device_count()  # 1 if the launcher shows each process only its own
    if s.device == "cuda" and not (gpus == 1 or LOCAL_RANK < gpus):
        error(f"--device cuda: {gpus} GPUs here, none for process {LOCAL_RANK} of this machine; "
              "start fewer processes, or use --device cpu")
    s.rows_c = round(s.batch * s.correction)
    s.rows_p = s.batch - s.rows_c
    if s.sample or s.rollout:
        return
    if 0 < s.correction < 1 and 0 in (s.rows_p, s.rows_c):
        error(f"--correction {s.correction}: of --batch {s.batch} one objective gets no rows")
    if s.rows_p % WORLD or s.rows_c % WORLD:
        error(f"--batch {s.batch}: {WORLD} processes cannot share {s.rows_p} rows of prediction "
              f"and {s.rows_c} of correction; give multiples of {WORLD}")
    read = [Path(folder, source or "").resolve() for source in (s.teacher, s.vae, s.init)
            for folder in ("", Path(__file__).parent)]  # where sit.fetch looks
    for name in ("student.pt", "ckpt.pt", *(kept.name for kept in s.out.glob("student-*.pt"))):
        if (s.out / name).resolve() in read:
            error(f"--out {s.out}: {name} would be overwritten, and is read; give another")


# ---- 7. Processes and networks ----
def join(kind):
    """Join the other processes. kind: "cpu", or "cuda", a GPU each. -> this process's device."""
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device(kind, LOCAL_RANK if torch.cuda.device_count() > 1 else 0)
        torch.cuda.set_device(device)
    if WORLD > 1:
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        wait = datetime.timedelta(minutes=30)  # while process 0 evaluates and saves
        dist.init_process_group(backend, timeout=wait)
    return device


def say(text):
    """Print, once for all processes, and past the progress bar."""
    if RANK == 0:
        tqdm.write(text)


def fetch(source):
    """-> a local path. One process of a machine downloads, the others wait."""
    if LOCAL_RANK == 0:
        sit.fetch(source)
    if WORLD > 1:
        dist.barrier()
    return sit.fetch(source)  # from the disk by now


def load(source, res, device, convention=None, student=False, teacher=None):
    """-> a frozen teacher or student, called in fmd.py's clock and sign whatever its weights have;
    what else its file holds. teacher: must have its shape and classes. Raises sit.FileError."""
    net, info = sit.load(fetch(source), convention=convention)
    shape, classes, convention = (net.config[name] for name in ("shape", "classes", "convention"))
    if (net.config["delta"], net.config["gamma"]) != (student, student):
        raise sit.FileError(f"{source}: not a {'student' if student else 'teacher'}")
    if (res > 28 and shape != [4, res // 8, res // 8]) or (res == 28 and shape[0] == 4):
        raise sit.FileError(f"{source}: made for {shape}, not for --res {res}")
    if teacher and (shape, classes) != (teacher.config["shape"], teacher.config["classes"]):
        raise sit.FileError(f"{source}: shape {shape}, classes {classes}; not those of the teacher")
    say(f"{source}: convention {convention} ({info['why']}), labels 0 to {classes - 1}")
    return net.to(device), info


def prepare(s, teacher, student, online):
    """Apply --checkpointing and --compile -> student, g (in DDP, if many); duration_derivative."""
    student.checkpointing = online.checkpointing = s.checkpointing  # of activations
    derivative = duration_derivative
    if s.compile:  # block by block: DDP and checkpointing stay outside of the graphs
        torch._dynamo.config.optimize_ddp = False  # else DDP's buckets cut blocks into pieces
        for block in (*teacher.blocks, *student.blocks, *online.blocks):
            block.compile(dynamic=False)
        derivative = torch.compile(duration_derivative, dynamic=False, fullgraph=True)
    if WORLD > 1:
        student, online = (DDP(net, gradient_as_bucket_view=True) for net in (student, online))
    return student, online, derivative


# ---- 8. The files of a run ----
def resume(s, parts):
    """Load ckpt.pt into the parts -> its step, or 0 if there is none. Raises sit.FileError."""
    s.out.mkdir(parents=True, exist_ok=True)
    path = s.out / "ckpt.pt"
    if not path.exists():
        say(f"{path}: not there, so this run starts at step 0")
        return 0
    file = sit.read_file(path, mapped=True)
    with sit.usable(path, "a checkpoint of fmd.py"):
        step = file["step"]
        changed = {name: value for name, value in file["settings"].items()
                   if str(getattr(s, name, None)) != str(value)}
        refused = [f"{name} was {changed[name]}" for name in METHOD if name in changed]
        if refused:
            raise sit.FileError(f"{path}: {', '.join(refused)}; give that, or another --out")
        if step >= s.steps:
            raise sit.FileError(f"{path}: this run has all its {step} steps; give more --steps, "
                                "or another --out for another run")
        for name, part in parts.items():
            part.load_state_dict(file[name])
    for name, value in changed.items():
        say(f"note: {name} was {value}, and is {getattr(s, name, None)}")
    say(f"{path}: resumed at step {step}")
    return step


def report(s, line, parts, fixed, decoder, saving):
    """On process 0, write one line of the log and, if `saving`, a checkpoint and the endpoint
    error. A value that is not finite ends all processes, before anything is saved."""
    if not np.isfinite([*line.values()]).all():
        text = (f"fmd.py: step {line['step']}: a loss or gradient is not finite; "
                "repeat the command with a lower --lr or another --seed")
        sys.exit(text if RANK == 0 else 1)
    if RANK > 0:
        return
    if saving:
        save(s, parts, line["step"])
        line["endpoint_error"] = compare(s, parts["ema"], fixed, decoder)
    if s.device == "cuda":
        line["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    text = json.dumps({name: round(value, 8) for name, value in line.items()})
    say(text)
    with open(s.out / "metrics.jsonl", "a") as log:
        print(text, file=log)


def save(s, parts, step):
    """Write student.pt, the average under the released files' names of weights, and ckpt.pt."""
    ema = parts["ema"]
    about = {"config": ema.config, "gamma": s.gamma}  # in both, so --ckpt takes either
    student = {"ema": sit.released_names(ema.state_dict())} | about
    for name in (f"student-{step}.pt", "student.pt"):  # the first is not overwritten
        sit.write(s.out / name, partial(torch.save, student))
    states = {name: part.state_dict() for name, part in parts.items()}
    run = {"step": step, "settings": vars(s) | {"out": str(s.out)}}  # weights_only reads no Path
    sit.write(s.out / "ckpt.pt", partial(torch.save, about | states | run))


# ---- 9. Evaluation and sampling ----
def noises(seed, numbers, shape):
    """-> (len(numbers), *shape). Noise i depends on the seed and i alone."""
    draws = [np.random.default_rng((seed, i)).standard_normal(shape, np.float32) for i in numbers]
    return torch.from_numpy(np.array(draws, np.float32).reshape(-1, *shape))


@torch.no_grad()
def one_step(student, z, y, gamma):
    """The student's samples f(z, 1), one evaluation each. z (B, ...), y (B,), gamma a number."""
    one = torch.ones(len(z), device=z.device)
    return flow_map(average_velocity(student, z, one, y, gamma * one), z, one)


def many_steps(teacher, z, y, gamma, null, steps=32, solver="heun", interval=(0.0, 1.0)):
    """The teacher's samples, by a guided rollout. z (B, ...), y (B,), gamma a number."""
    def u(x, t): return guided(teacher, x, t, y, gamma, null, interval)
    return rollout(u, z, steps, solver)


def endpoint_error(x, phi):
    """|x - φ| / |φ| of each sample. x, phi (B, ...) -> (B,)."""
    return (x - phi).flatten(1).norm(dim=1) / phi.flatten(1).norm(dim=1)


def references(s, teacher):
    """-> z, y, γ, φ: fixed noises, all labels in turn, a middle γ, the teacher's samples."""
    z = noises(s.seed, range(s.eval_samples), teacher.config["shape"]).to(teacher.pos_embed.device)
    y = torch.arange(len(z), device=z.device) % teacher.config["classes"]
    gamma = sum(s.gamma) / 2
    phi = many_steps(teacher, z, y, gamma, teacher.config["classes"], 16, interval=s.interval)
    return z, y, gamma, phi


def compare(s, student, fixed, decoder):
    """-> the student's endpoint error. Draws pairs.png: φ and its samples, side by side."""
    z, y, gamma, phi = fixed
    x = one_step(student, z, y, gamma)
    pairs = torch.stack([phi, x], 1)[:50].flatten(0, 1)
    save_grid(s.out / "pairs.png", sit.to_uint8(pairs, decoder))
    return endpoint_error(x, phi).mean().item()


def save_grid(path, images):
    """(N, H, W, C) uint8 -> a PNG, ten in a row. Pictures are grey or RGB."""
    if images.shape[3] not in (1, 3):
        return say(f"note: {path} is left out: it would have {images.shape[3]} channels")
    images = images.permute(0, 3, 1, 2) / 255
    sit.write(path, partial(save_image, images, format="PNG", nrow=10, pad_value=1))


def sample(s, chunk=64):
    """--sample or --rollout: N samples to an npz, as ADM's evaluator reads it, and a grid of some.
    Noise i is the same whatever N and the number of processes. chunk: samples at a time."""
    device = join(s.device)
    total = s.sample or s.rollout
    file = s.out / ("samples.npz" if s.sample else "rollout.npz")
    source = (s.ckpt or s.out / "student.pt") if s.sample else s.teacher
    net, info = load(source, s.res, device, s.convention, student=bool(s.sample))
    decoder = sit.load_decoder(fetch(s.vae)).to(device) if s.res > 28 else None
    shape, classes = net.config["shape"], net.config["classes"]
    given = s.labels or range(classes)
    if not 0 <= min(given) <= max(given) < classes:
        sys.exit(f"fmd.py: --labels {given}: give some of 0 to {classes - 1}")
    labels = np.resize(given, total)  # in turn
    low, high = info.get("gamma", (s.guidance, s.guidance))
    if s.sample and not low <= s.guidance <= high:
        say(f"note: --guidance {s.guidance}: the student was trained with {low} to {high}")

    # ---- All processes write their rows into one file, and each holds one chunk in memory.
    pixels, clock = file.with_suffix(".pixels"), time.perf_counter()
    s.out.mkdir(parents=True, exist_ok=True)
    pixels.touch()  # unlike mode wb, keeps rows that others wrote
    mine = range(total)[RANK * total // WORLD:(RANK + 1) * total // WORLD]  # may be empty
    with open(pixels, "r+b") as writer:
        for start in tqdm(range(0, len(mine), chunk), disable=RANK > 0 or None):
            rows = mine[start:start + chunk]
            z = noises(s.seed, rows, shape).to(device)
            y = torch.tensor(labels[rows], device=device)
            x = (one_step(net, z, y, s.guidance) if s.sample else
                 many_steps(net, z, y, s.guidance, classes, s.rollout_steps, s.solver, s.interval))
            images = sit.to_uint8(x, decoder).numpy()
            writer.seek(rows.start * images[0].size)
            writer.write(images.tobytes())
    if WORLD > 1:
        dist.barrier()
    if RANK == 0:
        seconds = time.perf_counter() - clock
        size = (s.res, s.res, 3) if decoder else (*shape[1:], shape[0])
        images = np.memmap(pixels, np.uint8, "r", shape=(total, *size))
        sit.write(file, partial(np.savez, arr_0=images, arr_1=labels))
        save_grid(file.with_suffix(".png"), torch.tensor(images[:100]))
        pixels.unlink()
        say(f"{file}: {total} samples of {source}, {1e3 * seconds / total:.2f} ms each")


def main(argv=None):
    """The command line. Raises SystemExit for bad input, with a line that says why."""
    s = parse(argv)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as in the authors' sampler
    try:
        job = sample if s.sample or s.rollout else train
        job(s)
    except (sit.FileError, OSError) as e:
        sys.exit(f"fmd.py: {e}")
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
