# SPDX-License-Identifier: MIT
"""The paper's findings in miniature, on digits: tables, charts and pictures.

What every table needs, once (an hour or less; --mnist DIR has the IDX files, else they are downloaded):
    python assets/findings.py digits out/real.npz                 the last 10,000 digits of MNIST's training set
    python assets/findings.py digits out/train.npz --part first   10,000 others
    python assets/findings.py classifier                          train the classifier of digits
    python fmd.py --rollout 10000 --seed 1 --out out/teacher      the teacher's samples, of other noises

Tables and charts. `--weights published`, or a file, adds FID; it takes 60 ms an image on a CPU:
    python assets/findings.py quality out/28/samples.npz          any files of samples, a row each
    python assets/findings.py speed                               one evaluation against many
    python assets/findings.py objectives                          prediction alone, correction alone, both
    python assets/findings.py settings                            the settings of the paper's Table 1
    python assets/findings.py error                               the error along the path
    python assets/findings.py mismatch                            why no data? (its docstring has the mathematics)

Pictures:
    python assets/findings.py strip                               digits by 2 to 64 evaluations, and by one
    python assets/findings.py run                                 the student after 0, 100, 500, all steps
    python assets/findings.py figure                              the two objectives on 2-D points

Charts are drawn if --pictures names a folder, and need matplotlib, as does `figure`. Students, samples
and the moments of their features are kept (--out): a repeated command computes only what is missing.
"""

import argparse
import contextlib
import shutil
import signal
import sys
from functools import cache, partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import make_grid
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import fid, fmd, sit  # noqa: E401, E402
from train_teacher import load_mnist  # noqa: E402

SHAPE, NULL = (1, 28, 28), 10
TEACHER = sit.load(HERE / "teacher-mnist.pt")[0]
RED, BLUE, GREEN = "#c0392b", "#2c5aa0", "#2e8b57"

# Name of a row, the paper's FID with a SiT-B/2, flags of fmd.py. The rest is the preset of 28.
SETTINGS = [("prediction alone, k = 0", "11.91", "--correction 0 --k 0"),
            ("prediction alone, k = 0.5", "11.71", "--correction 0 --k 0.5"),
            ("prediction alone, k = 1", "12.40", "--correction 0"),
            ("correction alone, k = 1", "loses modes", "--correction 1"),
            ("both, k = 0", "43.53", "--k 0"),
            ("both, k = 0.5", "10.58", "--k 0.5"),
            ("both, k = 1", "5.58", ""),
            ("r seldom above 0.6", "91.8 (cut at 0.6)", "--r-location -1.2 --r-scale 0.5"),
            ("r about uniform", "6.02 (uniform)", "--r-location 0 --r-scale 1.7"),
            ("correction guided up to r = 0.6", "5.72", "--cut 0.6"),
            ("correction guided up to r = 1", "8.65", "--cut 1"),
            ("α = 0.3", "robust", "--alpha 0.3"),
            ("α = 3", "robust", "--alpha 3"),
            ("both, k = 1, by jvp", "", "--derivative jvp")]


# ---- Digits and their classifier ----
def digits(args):
    """Write real digits as fmd.py writes samples: arr_0 uint8 (N, 28, 28, 1), arr_1 labels (N,)."""
    x, y = load_mnist(args.mnist)
    part = slice(args.count) if args.part == "first" else slice(-args.count, None)
    images = fmd.to_uint8(x[part])
    args.files[0].parent.mkdir(parents=True, exist_ok=True)
    sit.write(args.files[0], partial(np.savez, arr_0=images.numpy(), arr_1=y[part].numpy()))
    print(f"{args.files[0]}: {len(images)} digits")


def network():
    """(B, 1, 28, 28) -> (B, 10) logits; all but the last layer give 128 features."""
    return nn.Sequential(nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10))


def classifier(args):
    """Train on five sixths of the digits, 50,000, and print the accuracy on the others."""
    x, y = load_mnist(args.mnist)
    held, steps = len(x) // 6, args.steps or 1200
    torch.manual_seed(0)
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for step in tqdm(range(steps)):
        i = torch.randint(len(x) - held, (128,))
        optimizer.param_groups[0]["lr"] = 1e-3 * fmd.learning_rate(step, steps, 20, 0.5)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[i]), y[i]).backward()
        optimizer.step()
    args.classifier.parent.mkdir(parents=True, exist_ok=True)
    sit.write(args.classifier, partial(torch.save, net.state_dict()))
    with torch.no_grad():
        right = [net(a).argmax(1) == b for a, b in zip(x[-held:].split(500), y[-held:].split(500))]
    print(f"{args.classifier}: {torch.cat(right).float().mean():.2%} of {held} other digits are right")


# ---- Measures of a file of samples ----
def images(path):
    """-> (N, 28, 28, 1) uint8, labels (N,)."""
    with np.load(path) as file:
        return torch.from_numpy(file["arr_0"]), torch.from_numpy(file["arr_1"])


@cache
def load_classifier(path):
    net = network()
    net.load_state_dict(sit.read_file(path))
    return net.requires_grad_(False)


@cache
def load_inception(weights):
    return fid.load_inception(None if weights == "published" else weights)[0]


def classified(path, weights):
    """-> mean and covariance of the classifier's features, its labels (N,)."""
    net, moments, labels = load_classifier(weights), fid.Moments(128), []
    for x in images(path)[0].split(500):
        features = net[:-1](x.permute(0, 3, 1, 2) / 127.5 - 1)
        moments.add(features)
        labels.append(net[-1](features).argmax(1))
    return moments.mean_cov(), torch.cat(labels)


def inception_moments(path, weights):
    """-> mean and covariance of Inception's features; kept beside the file until it changes."""
    kept = path.with_suffix(f".{Path(weights).stem}.npz")
    if not kept.exists() or kept.stat().st_mtime < path.stat().st_mtime:
        net, moments = load_inception(weights), fid.Moments(fid.POOL)
        for x in tqdm(images(path)[0].split(16), f"Inception, {path}"):
            moments.add(fid.features(net, x.expand(-1, -1, -1, 3))[0])
        mu, sigma = moments.mean_cov()
        sit.write(kept, partial(np.savez, mu=mu, sigma=sigma))
    with np.load(kept) as file:
        return file["mu"], file["sigma"]


def measure(path, args):
    """A file of samples -> {column: number}. Corners are the four of 4 x 4 pixels: black, in MNIST."""
    (x, y), row = images(path), {}
    references = {"teacher": args.teacher, "real digits": args.real}
    if args.weights:
        for name, other in references.items():
            pair = [inception_moments(file, args.weights) for file in (path, other)]
            row[f"FID to {name}"] = fid.frechet_distance(*pair[0], *pair[1])
    moments, labels = classified(path, args.classifier)
    for name, other in references.items():
        row[f"classifier's distance to {name}"] = fid.frechet_distance(
            *moments, *classified(other, args.classifier)[0])
    corners = x[:, [0, 1, 2, 3, -4, -3, -2, -1]][:, :, [0, 1, 2, 3, -4, -3, -2, -1]]
    row["agreement, %"] = 100 * (labels == y).double().mean().item()
    row["black corners, %"] = 100 * (corners == 0).double().mean().item()
    return row


def print_row(name, rows, *more):
    """Mean ± standard deviation of rows {column: number}, one a seed."""
    cells = []
    for column in rows[0]:
        values = np.array([row[column] for row in rows])
        figures = 3 if "error" in column else 1
        deviation = f" ± {values.std(ddof=1):.{figures}f}" if len(values) > 1 else ""
        cells.append(f"{values.mean():.{figures}f}{deviation}")
    print("|", " | ".join([name, *cells, *more]), "|", flush=True)


def print_head(first, row, *more):
    columns = [first, *row, *more]
    print("|", " | ".join(columns), "|\n" + "|---" * len(columns) + "|")


def quality(args):
    """A row for each file of samples."""
    for number, path in enumerate(args.files):
        row = measure(path, args)
        if number == 0:
            print_head("samples", row)
        print_row(str(path), [row])


# ---- Students ----
def command(line):
    """Run fmd.py. It may not be refused, or stopped."""
    with contextlib.redirect_stdout(sys.stderr):
        code = fmd.main(["--device", "cpu", *line.split()])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # training leaves its own handlers
    if code:
        raise SystemExit(code)


def samples(args, path, weights, what):
    """Samples by a command of fmd.py, which names the file `path`. Kept until the weights change."""
    if not path.exists() or path.stat().st_mtime < weights.stat().st_mtime or len(images(path)[0]) != args.count:
        command(f"{what} --out {path.parent}")
    return path


def by_student(args, weights, folder):
    return samples(args, folder / "samples.npz", weights, f"--sample {args.count} --ckpt {weights}")


def by_teacher(args, solver, steps):
    path = args.out / f"teacher-{solver}-{steps}" / "rollout.npz"
    return samples(args, path, TEACHER_FILE,
                   f"--rollout {args.count} --solver {solver} --rollout-steps {steps}")


@cache
def reference(count):
    """Noises of seed 0, their labels and the teacher's samples φ. Each (count, ...)."""
    z, y = fmd.noises(0, range(count), SHAPE), torch.arange(count) % NULL
    return z, y, fmd.in_chunks(lambda z, y: fmd.many_steps(TEACHER, z, y, GAMMA, NULL, 32), z, y)


def measure_student(args, folder):
    """-> the row of the student in the folder. The endpoint error is the mean of |x - φ| / |φ|."""
    z, y, phi = reference(min(256, args.count))
    net = sit.load(folder / "student.pt")[0]
    x = fmd.in_chunks(lambda z, y: fmd.one_step(net, z, y, GAMMA), z, y)
    error = ((x - phi).flatten(1).norm(dim=1) / phi.flatten(1).norm(dim=1)).mean().item()
    return measure(by_student(args, folder / "student.pt", folder), args) | {"endpoint error": error}


def students(args, flags):
    """Train a student a seed by fmd.py, or go on with its run. Yields their folders."""
    name = flags.replace("--", "").replace(" ", "-") or "preset"
    for seed in range(args.seeds):
        folder = args.out / f"{name}-{args.steps}x{args.batch}-{seed}"
        command(f"--steps {args.steps} --batch {args.batch} --seed {seed} --eval-samples 2 --out {folder} {flags}")
        if sit.read_file(folder / "ckpt.pt")["step"] < args.steps:
            raise SystemExit(f"{folder}: stopped")
        yield folder


def table(args, rows, steps):
    """Train the students of each row, sample and measure them."""
    args.steps = args.steps or steps
    print(f"{args.steps} steps of {args.batch}, {args.seeds} seeds, {args.count} samples\n")
    for name, paper, flags in rows:
        if any(words in name for words in args.only):
            found = [measure_student(args, folder) for folder in students(args, flags)]
            print_row(args, f"{name} (`{flags}`)" if flags else name, found, {"paper's FID": paper})


# ---- Charts ----
def chart(args, name, draw, **labels):
    """Draw on axes and save NAME.png, if --pictures names a folder."""
    if args.pictures:
        from matplotlib.figure import Figure  # draws with Agg
        figure = Figure((7.5, 4.6), dpi=110, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set(**labels)
        axes.legend()
        figure.savefig(args.pictures / f"{name}.png")


def speed(args):
    """One evaluation against many. With guidance a step of Euler takes 2 network evaluations, one of Heun
    4, the last 2."""
    rows = [measure(by_student(args, STUDENT_FILE, args.out / "bundled"), args)]
    print_row(args, "student, 1 evaluation", rows)
    column = list(rows[0])[0]
    curves = {"student": ([1], [rows[0][column]])}
    for solver in ("euler", "heun"):
        evaluations, values = curves[f"teacher, {solver.capitalize()}"] = [], []
        for steps in (2, 4, 8, 16, 32):
            evaluations.append(2 * steps if solver == "euler" else 4 * steps - 2)
            row = measure(by_teacher(args, solver, steps), args)
            values.append(row[column])
            print_row(args, f"teacher, {steps} steps of {solver}, {evaluations[-1]} evaluations", [row])

    def draw(axes):
        for (name, points), colour in zip(curves.items(), (RED, GREEN, BLUE)):
            axes.loglog(*points, "o-", color=colour, label=name)
            for x, y in zip(*points):
                axes.annotate(x, (x, y), (0, 7), textcoords="offset points", ha="center", color=colour)
    chart(args, "speed", draw, xlabel="network evaluations a sample", ylabel=column,
          title="One evaluation against many (the last point of Heun: other noises alone)")


# ---- Why no data? ----
def mismatch(args):
    """The teacher-data mismatch in miniature. All students have the same teacher u, at γ = 1.5, the same
    network, number of steps, batch and weights. They differ in the states at which they are trained, and
    in the equation that they are trained to obey.

    F(x, t, δ) is the average velocity over the next δ of the teacher's path that passes x at time t:
        δ F(x, t, δ) = the integral of u(x_τ, τ) over τ from t - δ to t,   x_t = x,   dx_τ/dτ = -u.
    The derivative of both sides gives an equation without an integral, in one of two ways.

    The end moves (`end_moves`, FreeFlow's prediction). x and t are fixed and δ grows, so τ begins earlier:
        F + δ ∂F/∂δ = u at the end, which is the student's own state x + δ F at time t - δ.
    The start moves (`start_moves`, as in MeanFlow, arXiv 2505.13447). The end t - δ is fixed and x moves
    back along the path, towards noise: dt = dδ, dx = -u dδ. The right-hand side grows by u(x, t) dδ:
        F + δ (∂F/∂δ + ∂F/∂t - ∂F/∂x u) = u(x, t).
    Both are the derivative of F along a line, so `fmd.duration_derivative` computes both.

    The second holds at any x. But a student only obeys it where it is trained. A map from the prior
    (t = 1) is tied to δ = 0 through the states of the teacher's path in between. If the training states,
    noised data, lie elsewhere, F is not right there, and the error travels to t = 1. The first, started
    at the prior, needs no state in between but the student's own.

    Rows. From the prior: all states are z, at t = 1. At data: three quarters of the batch are
    (1 - t) x + t n with t ~ U(0, 1); the last quarter is z, at t = 1, so that the map from the prior is
    trained too. Controls: states on the teacher's own paths, in place of data (no mismatch, same equation);
    and the first equation at the same data (same mismatch, other equation)."""
    args.steps = args.steps or 900
    print(f"{args.steps} steps of {args.batch}, {args.seeds} seeds, {args.count} samples\n")
    x, y = load_mnist(args.mnist)
    few = y < 5
    sources = {"the teacher's\nown paths": on_paths(min(1000, args.count)),
               "its training\ndigits": noised(x, y),
               "moved by up\nto 4 pixels": noised(x, y, 4),
               "moved by up\nto 8 pixels": noised(x, y, 8),
               "without the\ndigits 5 to 9": noised(x[few], y[few])}
    rows = {"from the prior": [distilled(args, end_moves, "prior", None)] * len(sources)}
    print_row(args, "the end moves, from the prior", rows["from the prior"][0])
    for name, equation in (("the start moves, at data", start_moves), ("the end moves, at data", end_moves)):
        rows[name] = []
        for source in sources:
            rows[name].append(distilled(args, equation, source.replace("\n", " "), sources[source]))
            print_row(args, f"{name}: {source}".replace("\n", " "), rows[name][-1])
    column = list(rows["from the prior"][0][0])[0]

    def draw(axes):
        for (name, points), colour in zip(rows.items(), (RED, BLUE, GREEN)):
            values = np.array([[row[column] for row in seeds] for seeds in points])  # (sources, seeds)
            axes.semilogy(list(sources), values.mean(1), "o-", color=colour, label=name)
            axes.fill_between(range(len(sources)), values.min(1), values.max(1), color=colour, alpha=0.25)
    chart(args, "mismatch", draw, xlabel="states of training", ylabel=column,
          title=f"The same teacher, distilled at data that fit it less and less; band: {args.seeds} seeds")


@torch.no_grad()
def end_moves(F, F_x, u, x, t, delta):
    """F + δ ∂F/∂δ - u(x + δ F, t - δ). At t = 1 it is fmd.prediction; else its clock starts at t."""
    F_dot = fmd.duration_derivative(lambda x, d: F(x, t, d), x, delta, F_x, "fd")
    return fmd.prediction(F_x, F_dot, lambda x, s: u(x, s - (1 - t)), x, delta)


@torch.no_grad()
def start_moves(F, F_x, u, x, t, delta):
    """F + δ (∂F/∂δ + ∂F/∂t - ∂F/∂x u) - u(x, t): the derivative along a line through x, t and δ."""
    u_x = u(x, t)

    def F_on_line(x, d):
        return F(x - fmd.expand(d - delta, x) * u_x, t + d - delta, d)
    F_dot = fmd.duration_derivative(F_on_line, x, delta, F_x, "fd")
    return F_x + fmd.expand(delta, x) * F_dot - u_x


def noised(x, y, moved=0):
    """-> source(count) of noised digits (1 - t) x + t n, their t and labels. The digits are moved by up to
    `moved` pixels in both directions."""
    padded = nn.functional.pad(x, [moved] * 4, value=-1)

    def source(count):
        rows, corners, t = torch.randint(len(x), (count,)), torch.randint(2 * moved + 1, (count, 2)), torch.rand(count)
        data = torch.stack([padded[i, :, a:a + 28, b:b + 28] for i, (a, b) in zip(rows, corners)])
        noise = fmd.expand(t, data)
        return (1 - noise) * data + noise * torch.randn_like(data), t, y[rows]
    return source


def on_paths(count, steps=16):
    """-> source(count) of states on `count` paths of the teacher, their t and labels."""
    y = torch.arange(count) % NULL
    states = []

    def u(x, t):
        states.append(x)
        return fmd.guided(TEACHER, x, t, y, GAMMA, NULL)
    fmd.rollout(u, fmd.noises(2, range(count), SHAPE), steps)
    starts = torch.stack(states[::2])  # Heun calls u twice a step: (steps, count, 1, 28, 28)

    def source(rows):
        i, step = torch.randint(count, (rows,)), torch.randint(steps, (rows,))
        return starts[step, i], 1 - step / steps, y[i]
    return source


def distilled(args, equation, name, source):
    """-> the rows of students, one a seed, that learned the equation at these states."""
    rows = []
    for seed in range(args.seeds):
        folder = args.out / "-".join([equation.__name__, *re.findall(r"\w+", name), f"{args.steps}x{args.batch}", str(seed)])
        if not (folder / "student.pt").exists():
            distil(args, equation, source, seed, folder)
        rows.append(measure_student(args, folder))
    return rows


def distil(args, equation, source, seed, folder):
    """Train a student with the rates and the average of fmd.py's preset of 28 -> student.pt."""
    torch.manual_seed(seed)
    net = fmd.start_from(TEACHER, delta=True, gamma=True)
    ema = fmd.start_from(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.99), weight_decay=0)
    for step in tqdm(range(args.steps)):
        p = fmd.prior(args.batch, SHAPE, NULL, (GAMMA, GAMMA))
        x, t, y = p.z, torch.ones(args.batch), p.y
        if source:
            rows = args.batch * 3 // 4
            x[:rows], t[:rows], y[:rows] = source(rows)
        delta = t * p.delta  # U(0, t)

        def F(x, t, delta): return net(x, t, y, delta, p.gamma)
        def u(x, t): return fmd.guided(TEACHER, x, t, y, p.gamma, NULL)
        F_x = F(x, t, delta)
        residual = equation(F, F_x.detach(), u, x, t, delta)
        optimizer.param_groups[0]["lr"] = 1e-3 * fmd.learning_rate(step, args.steps, 20, 0.3)
        optimizer.zero_grad()
        (F_x * fmd.weighted(residual)).mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1)
        optimizer.step()
        decay = min(0.99, (1 + step) / (10 + step))
        for average, weight in zip(ema.parameters(), net.parameters()):
            average.lerp_(weight.detach(), 1 - decay)
    folder.mkdir(parents=True, exist_ok=True)
    file = {"ema": sit.released_names(ema.state_dict()), "config": ema.config, "gamma": [GAMMA, GAMMA]}
    sit.write(folder / "student.pt", partial(torch.save, file))


# ---- Pictures ----
def picture(path, rows):
    """{label: samples (10, 1, 28, 28)} -> a PNG, a row each, with the label to its left."""
    font, left, side = ImageFont.load_default(22), 330, 90
    canvas = Image.new("L", (left + 10 * side, len(rows) * side), 255)
    for i, (label, x) in enumerate(rows.items()):
        ImageDraw.Draw(canvas).text((left - 15, (i + 0.5) * side), label, 0, font, anchor="rm")
        for j, digit in enumerate(fmd.to_uint8(x)[..., 0].numpy()):
            canvas.paste(Image.fromarray(digit).resize((84, 84)), (left + j * side, i * side + 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    sit.write(path, partial(canvas.save, format="PNG"))
    print(path)


def strip(args):
    """The same ten noises by the teacher and by the student. With guidance, a step of Euler takes two
    network evaluations."""
    z, y = fmd.noises(0, range(10), SHAPE), torch.arange(10)
    rows = {}
    for steps in (1, 2, 4, 32):
        rows[f"teacher, {2 * steps} evaluations"] = fmd.many_steps(TEACHER, z, y, GAMMA, NULL, steps, "euler")
    rows["student, 1 evaluation"] = fmd.one_step(sit.load(STUDENT_FILE)[0], z, y, GAMMA)
    picture((args.pictures or args.out) / "strip.png", rows)


def run(args):
    """Train by fmd.py's preset and show the student on the way. Nothing else moves: the noises stay."""
    steps = args.steps or 1750
    folder = args.out / f"run-{steps}"
    shown = [step for step in (100, 500) if step < steps] + [steps]
    save = fmd.save

    def save_and_keep(s, parts, run, step, log):
        save(s, parts, run, step, log)
        if step in shown:
            shutil.copy(folder / "student.pt", folder / f"student-{step}.pt")
    with mock.patch.object(fmd, "save", save_and_keep):
        command(f"--steps {steps} --batch {args.batch} --eval-samples 2 --ckpt-every 100 --out {folder}")

    z, y, phi = reference(10)
    nets = {0: fmd.start_from(TEACHER, delta=True, gamma=True)}
    nets |= {step: sit.load(folder / f"student-{step}.pt")[0] for step in shown}
    rows = {f"student, {step} steps": fmd.one_step(net, z, y, GAMMA) for step, net in nets.items()}
    picture((args.pictures or args.out) / "run.png", rows | {"teacher, 126 evaluations": phi})


def main(argv=None):
    findings = {f.__name__: f for f in (digits, classifier, quality, speed, mismatch, strip, run)}
    findings["objectives"] = partial(table, rows=[SETTINGS[i] for i in (2, 3, 6)], steps=1750)
    findings["settings"] = partial(table, rows=SETTINGS, steps=900)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=findings)
    add("files", nargs="*", type=Path, help="of digits, quality")
    add("--mnist", metavar="DIR", help="folder with the IDX files (default: download)")
    add("--part", default="last", choices=("first", "last"), help="of MNIST's training digits")
    add("--count", type=int, default=10_000, help="digits, or samples of a row")
    add("--steps", type=int, help="of a training")
    add("--batch", type=int, default=32)
    add("--seeds", type=int, default=3)
    add("--only", nargs="+", default=[""], help="rows of objectives or settings with this in their names")
    add("--real", type=Path, default=Path("out/real.npz"))
    add("--teacher", type=Path, default=Path("out/teacher/rollout.npz"))
    add("--classifier", type=Path, default=Path("out/classifier.pt"))
    add("--weights", help="Inception's: a file, or `published`; without them FID is left out")
    add("--out", type=Path, default=Path("out/findings"), help="folder of students and samples")
    add("--pictures", type=Path, help="folder of charts and pictures")
    args = parser.parse_args(argv)
    findings[args.what](args)


if __name__ == "__main__":
    main()
