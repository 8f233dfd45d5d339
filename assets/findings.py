# SPDX-License-Identifier: MIT
"""The paper's findings in miniature, on the bundled teacher: tables and charts.

    python assets/findings.py objectives  prediction alone, correction alone, both
    python assets/findings.py settings    k, p(r), the cut, α, jvp: 15 rows
    python assets/findings.py error       error.png: error along the path, by both and prediction
    python assets/findings.py speed       speed.png: images/s and quality, one step against many
    python assets/findings.py guidance    γ as a knob when sampling
    python assets/findings.py search      noises ranked by one step: how well, and what it gains
    python assets/findings.py figure      objectives.png: the two objectives on 2-D points
    python assets/findings.py example     points.png: fmd.py's functions with a teacher of your own

The charts need matplotlib, which requirements.txt does not list. The first three train students by
commands of fmd.py and keep them in --out. Without data, the teacher itself judges (`features`).
"""

import argparse
import contextlib
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import Linear, SiLU

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import fid, fmd, sit  # noqa: E401, E402

SHAPE, LABELS, NULL = (1, 28, 28), range(10), 10
TEACHER = sit.load(HERE / "teacher-mnist.pt")[0]
STUDENT = sit.load(HERE / "student-mnist.pt")[0]
teacher = partial(fmd.velocity_of, TEACHER)
RED, BLUE, GREEN = "#c0392b", "#2c5aa0", "#2e8b57"

# Rows: name, the paper's FID, flags of fmd.py beside those of `students`. "preset": that of 28.
SETTINGS = [("prediction alone, k = 0", "11.91", "--correction 0 --k 0"),
            ("prediction alone, k = 0.5", "11.71", "--correction 0 --k 0.5"),
            ("prediction alone, k = 1", "12.40", "--correction 0"),
            ("correction alone, k = 1", "loses modes", "--correction 1"),
            ("both, k = 0", "43.53", "--k 0"),
            ("both, k = 0.5", "10.58", "--k 0.5"),
            ("**both, k = 1**", "5.58", ""),
            ("r seldom above 0.6", "91.8 (cut at 0.6)", "--r-location -1.2 --r-scale 0.5"),
            ("r about uniform", "6.02 (uniform)", "--r-location 0 --r-scale 1.7"),
            ("correction guided to r = 1", "8.65", "--cut 1"),
            ("α = 0.3", "robust", "--alpha 0.3"),
            ("α = 3", "robust", "--alpha 3"),
            ("both, k = 1, by jvp", "", "--derivative jvp"),
            ("prediction alone, preset", "", "--correction 0 --lr 7e-4 --ema 0.99"),
            ("both, preset", "", "--alpha 0.5 --r-location 0.4 --cut 0.5 --lr 7e-4 --ema 0.99")]


# ---- Samples ----
def noises(seed, names):
    """(len(names), 1, 28, 28). Names 0 to count - 1 give the noises of fmd.generate."""
    sources = [fmd.generator("cpu", seed, "sample", name) for name in names]
    return torch.stack([torch.randn(SHAPE, generator=source) for source in sources])


def by_student(net, gamma=1.5):
    """-> sampler(z, y): one evaluation."""
    return partial(fmd.one_step, partial(fmd.velocity_of, net), gamma=gamma)


def by_teacher(steps, gamma=1.5, solver="heun"):
    """-> sampler(z, y): a rollout, without the evaluations for guidance at γ = 1."""
    if gamma == 1:
        return lambda z, y: fmd.rollout(partial(teacher, y=y), z, steps, solver)
    return partial(fmd.many_steps, teacher, gamma=gamma, null=NULL, steps=steps, solver=solver)


def draw(sampler, count, seed):
    """Samples of the noises of a seed, labels in turn -> x (count, 1, 28, 28), y (count,)."""
    run = argparse.Namespace(shape=SHAPE, device="cpu", seed=seed)
    x = torch.cat(list(fmd.generate(run, run, sampler, count, LABELS)))
    return x[:count], torch.arange(count) % 10


def students(args, steps, flags):
    """Train one student a seed, or go on with its run. Yields their networks."""
    for seed in range(args.seeds):
        name = flags.replace("--", "").replace(" ", "-") or "base"
        folder = args.out / f"{name}-{args.optimizer}-{steps}x{args.batch}-{seed}"
        command = ("--device cpu --eval-samples 2 --alpha 1 --r-location 0.8 --cut 0.7 --lr 1e-3 "
                   f"--ema 0.995 --optimizer {args.optimizer} --steps {steps} --seed {seed} "
                   f"--batch {args.batch} --out {folder} {flags}")
        with contextlib.redirect_stdout(sys.stderr):
            code = fmd.main(command.split())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # fmd.py leaves its own handlers
        if code or sit.read_file(folder / "ckpt.pt")["step"] < steps:  # refused, or stopped
            raise SystemExit(code or 1)
        yield sit.load(folder / "student.pt")[0]


# ---- Measures ----
@torch.no_grad()
def features(x, r=0.3):
    """Images (N, 1, 28, 28) -> (N, 128): the output of the teacher's last block but one, averaged
    over the tokens, for the images noised to r and the null label."""
    n, count = torch.randn(x.shape, generator=fmd.generator("cpu", "features")), len(x)
    rows = []
    hook = TEACHER.blocks[-2].register_forward_hook(lambda net, args, out: rows.append(out.mean(1)))
    teacher((1 - r) * x + r * n, torch.full((count,), r), torch.full((count,), NULL))
    hook.remove()
    return rows[0]


def distance(h, h_true):
    """Fréchet distance of features (N, 128), in per cent of the variance of the second ones."""
    a, b = h.double().numpy(), h_true.double().numpy()
    scale = 100 / np.trace(np.cov(b.T))
    return scale * fid.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))


def spread(h, y):
    """Mean squared distance of features (N, 128) to the mean of their class y (N,)."""
    classes = [h[y == label] for label in LABELS]
    return np.mean([(rows - rows.mean(0)).square().sum(1).mean().item() for rows in classes])


def relative_error(x, phi):
    """The mean of |x - φ| / |φ|. x, phi (N, 1, 28, 28)."""
    return ((x - phi).flatten(1).norm(dim=1) / phi.flatten(1).norm(dim=1)).mean().item()


@torch.no_grad()
def label_score(x, y):
    """How much the label helps the teacher, noising x to r = 0.4 and 0.7, to predict x - n: its own
    classifier (arXiv 2303.16203), for 4 evaluations. x (N, ...), y (N,) -> (N,), high is good."""
    score = 0
    for r in (0.4, 0.7):
        n, t = noises("score", [r]), torch.full(y.shape, r)  # the same n for all: scores compare
        x_r = (1 - r) * x + r * n
        u_y, u_null = teacher(x_r, t, y), teacher(x_r, t, torch.full_like(y, NULL))
        gain = (u_null - (x - n)).square() - (u_y - (x - n)).square()
        score = score + gain.flatten(1).mean(1) / 2
    return score


# ---- Tables ----
def table(args, rows, steps):
    """Train the students of each row, measure them, print mean ± standard deviation over the seeds.
    The spread within classes and recall, over the teacher's samples, fall with lost modes."""
    rows = [row for row in rows if any(words in row[0] for words in args.only)]
    steps = args.steps or steps
    x_true, y = draw(by_teacher(16), args.samples, "truth")
    h_true, phi = features(x_true), draw(by_teacher(16), args.samples, "paired")[0]
    print(f"{args.optimizer}, {steps} steps of {args.batch}, {args.seeds} seeds\n\n"
          "| settings | distance, % | spread | recall | endpoint error | the paper's FID |\n"
          "|---|---|---|---|---|---|")
    for name, paper, flags in [("the teacher, other noises", "", None), *rows]:
        found = []
        for net in [None] if flags is None else students(args, steps, flags):
            x = draw(by_student(net), args.samples, "paired")[0] if net else phi
            h = features(x)
            found.append((distance(h, h_true), spread(h, y) / spread(h_true, y),
                          fid.precision_recall(h, h_true)[1], relative_error(x, phi)))
        cells = []
        for values, digits in zip(np.array(found).T, (1, 2, 2, 3)):  # values: (seeds,)
            deviation = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.{digits}f}{deviation}")
        name += f" (`{flags}`)" if flags else ""
        print(f"| {name} | {' | '.join(cells)} | {paper} |", flush=True)


def guidance(args):
    print("| γ | the teacher's spread | its label score | student's spread | its label score | "
          "distance to the teacher at that γ, % |\n|---|---|---|---|---|---|")
    for gamma in (1.0, 1.25, 1.5, 1.75, 2.0):
        x_true, y = draw(by_teacher(16, gamma), args.samples, "truth")
        x, _ = draw(by_student(STUDENT, gamma), args.samples, "student")
        h_true, h = features(x_true), features(x)
        unit = spread(h_true, y) if gamma == 1 else unit
        print(f"| {gamma} | {spread(h_true, y) / unit:.2f} | {label_score(x_true, y).mean():.4f} | "
              f"{spread(h, y) / unit:.2f} | {label_score(x, y).mean():.4f} | "
              f"{distance(h, h_true):.2f} |", flush=True)


def search(args):
    y, tries = torch.arange(args.images) % 10, args.tries
    zs = [noises("search", [f"{i}/{j}" for i in range(args.images)]) for j in range(tries)]
    def scores(sampler, zs=zs):  # (images, len(zs))
        return torch.stack([label_score(sampler(z, y), y) for z in zs], 1)
    def best_of(scores):  # each image's noise with the highest score, by its rollout's score
        return slow.gather(1, scores.argmax(1, keepdim=True))
    quick, slow = scores(by_student(STUDENT, 1.0)), scores(by_teacher(16, 1.0))
    ranks = [values.argsort(1).argsort(1).numpy() for values in (quick, slow)]
    rho = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(*ranks)])
    print(f"{args.images} images of {tries} noises, γ = 1; a score takes 4 evaluations\n"
          f"rank correlation of one step with 16 Heun steps, mean over the images: {rho:.3f}\n\n"
          "| noise | rollout | NFE an image | mean label score |\n|---|---|---|---|")
    for name, steps, nfe, values in (
            ("the first", 16, 32, slow[:, 0]),
            ("the first", 32, 64, scores(by_teacher(32, 1.0), zs[:1])),
            (f"best of {tries} by one step", 16, 32 + 5 * tries, best_of(quick)),
            (f"best of {tries} by rollouts", 16, 36 * tries, best_of(slow))):
        print(f"| {name} | Heun {steps} | {nfe} | {values.mean():.4f} |")


# ---- Charts ----
def jump(F, z, delta):
    return fmd.flow_map(F(z, delta), z, delta)


def chart(width, height, columns=1):  # inches
    from matplotlib.figure import Figure  # draws with Agg; the tables need no matplotlib
    figure = Figure((width, height), dpi=110, layout="constrained")
    return figure, figure.subplots(1, columns)


def states(u, z, steps):
    """All states of a Heun rollout, from z to the sample -> (steps + 1, *z.shape)."""
    calls = []
    def recorded(x, t):
        calls.append(x)
        return u(x, t)
    end = fmd.rollout(recorded, z, steps)
    return torch.stack([*calls[::2], end])  # every second call of Heun starts a step


def error(args):
    count = min(64, args.samples)
    z, y, gamma = noises("error", range(count)), torch.arange(count) % 10, torch.full((count,), 1.5)
    path = states(partial(fmd.guided, teacher, y=y, gamma=gamma, null=NULL), z, 64)
    picture, axes = chart(7, 4.2)
    deltas = torch.arange(1, 17) / 16
    for name, flags, colour in (("prediction alone", "--correction 0", BLUE), ("both", "", RED)):
        curves = []
        for net in students(args, args.steps or 900, flags):
            F = partial(fmd.average_velocity, partial(fmd.velocity_of, net), y=y, gamma=gamma)
            maps = [jump(F, z, delta.expand(count)) for delta in deltas]
            curves.append([relative_error(f, x) for f, x in zip(maps, path[4::4])])
        curves = np.array(curves)  # (seeds, 16)
        axes.plot(deltas, curves.mean(0), "o-", color=colour, markersize=4, label=name)
        axes.fill_between(deltas, curves.min(0), curves.max(0), color=colour, alpha=0.25)
        print(name, " ".join(f"{value:.3f}" for value in curves.mean(0)))
    axes.set(xlim=(0, 1.02), ylim=(0, None), xlabel="duration δ", ylabel="relative error",
             title=f"The student's map against 64 Heun steps; band: {args.seeds} seeds")
    axes.legend(loc="upper left")
    picture.savefig(args.pictures / "error.png")


def speed(args):
    h_true = features(draw(by_teacher(32), args.samples, "truth")[0])
    computed = -(-args.samples // fmd.CHUNK) * fmd.CHUNK  # fmd.generate fills the last chunk
    picture, axes = chart(7, 4.6)
    print("| | steps | NFE | images/s | distance, % |\n|---|---|---|---|---|")
    draw(by_student(STUDENT), 1, "warm-up")
    for name, solver, calls, colour, shift in (  # calls a step: 2 for guidance, times 2 for Heun
            ("student", "", 1, RED, (6, -13)), ("teacher, Heun", "heun", 4, BLUE, (-18, 6)),
            ("teacher, Euler", "euler", 2, GREEN, (6, -13))):
        dots = []
        for steps in (2, 4, 8, 16, 32) if solver else (1,):
            sampler = by_teacher(steps, solver=solver) if solver else by_student(STUDENT)
            clock = time.perf_counter()
            x, _ = draw(sampler, args.samples, "speed")
            rate = computed / (time.perf_counter() - clock)
            dots.append((rate, distance(features(x), h_true)))
            print(f"| {name} | {steps} | {calls * steps} | {rate:.1f} | {dots[-1][1]:.2f} |")
            axes.annotate(calls * steps, dots[-1], shift, textcoords="offset points", color=colour)
        axes.loglog(*zip(*dots), "o-", color=colour, label=name)
    axes.margins(0.12)
    axes.set(xlabel="images per second", ylabel="distance to the teacher's samples, %",
             title="Quality against speed; at the points: network evaluations an image")
    axes.legend()
    picture.savefig(args.pictures / "speed.png")


# ---- 2-D points: a teacher in closed form ----
CENTRES = 2.0 * torch.tensor([[1.0, 0.0], [-0.5, 0.87], [-0.5, -0.87]])


def blobs(x, t):
    """The exact velocity u(x, t) of three blobs of width 0.3. x (B, 2), t (B,) -> (B, 2)."""
    t = t[:, None, None]
    away = x[:, None] - (1 - t) * CENTRES  # (B, 3, 2)
    variance = (1 - t) ** 2 * 0.09 + t ** 2  # (B, 1, 1)
    share = (-away.square().sum(2, keepdim=True) / (2 * variance)).softmax(1)  # (B, 3, 1)
    return (share * (CENTRES + ((1 - t) * 0.09 - t) / variance * away)).sum(1)


class MLP(torch.nn.Sequential):
    def forward(self, x, t):
        return super().forward(torch.cat([x, t[:, None]], 1))


def distil_blobs(steps):
    """-> F, g. The training loop for a teacher of your own, here without labels."""
    torch.manual_seed(0)
    F, g = (MLP(Linear(3, 128), SiLU(), Linear(128, 128), SiLU(), Linear(128, 2))
            for _ in range(2))
    optimizer = torch.optim.Adam([*F.parameters(), *g.parameters()], betas=(0.9, 0.99))
    for step in range(steps):
        z, delta = torch.randn(192, 2), torch.rand(192)  # for prediction
        z_c, n, r = torch.randn(64, 2), torch.randn(64, 2), torch.sigmoid(0.8 + torch.randn(64))
        F_z, F_c = F(z, delta), F(z_c, torch.ones(64))
        dF = fmd.duration_derivative(F, z, delta)
        residual_G = fmd.prediction(F_z, dF, blobs, z, delta)
        residual_N, online_loss = fmd.correction(F_c, blobs, g, z_c, n, r)
        loss, _ = fmd.student_loss(F_z, residual_G, F_c, residual_N, k=0.5)
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, 2 - 2 * step / steps)
        optimizer.zero_grad()
        (loss + online_loss).backward()
        optimizer.step()
    return F.requires_grad_(False), g.requires_grad_(False)


def example(args):
    F, _ = distil_blobs(args.steps or 2000)
    z = torch.randn(1000, 2)
    paths, x = states(blobs, z, 100), jump(F, z, torch.ones(1000))
    median = (x - paths[-1]).norm(dim=1).median().item()
    print(f"one step against 100 Heun steps: median distance {median:.3f}, blobs of width 0.3")
    picture, axes = chart(5.4, 5.4)
    axes.plot(*paths[:, :60].unbind(2), color="lightgrey", linewidth=1)
    axes.plot(*x.T, ".", color="crimson", markersize=5)
    axes.set(aspect="equal", xlim=(-3.4, 3.4), ylim=(-3.4, 3.4), xticks=[], yticks=[])
    picture.savefig(args.pictures / "points.png")


def figure(args):
    """The two residuals on points, with a student and a g that have not finished learning."""
    F, g = distil_blobs(300)
    samples = jump(F, torch.randn(400, 2), torch.ones(400))
    teacher_samples = fmd.rollout(blobs, torch.randn(400, 2), 64)
    picture, (left, right) = chart(10, 4.95, columns=2)
    for axes, bottom in ((left, 0.5), (right, -0.3)):
        axes.plot(*teacher_samples.T, ".", color="#c8c8c8", markersize=4)
        axes.plot(*samples.T, ".", color="#e9b3ac", markersize=4)
        axes.set(aspect="equal", xticks=[], yticks=[], xlim=(0.7, 3.3), ylim=(bottom, bottom + 2.4))

    def label(axes, x, text, shift, colour="black", marker="o"):
        """A marker at x (1, 2) and a text, centred `shift` printer's points away from it."""
        axes.plot(*x.T, marker, color=colour)
        axes.annotate(text, x[0], shift, textcoords="offset points", color=colour, ha="center",
                      va="center", bbox=dict(color="white", pad=0.5), zorder=3)

    def arrows(axes, x, v, u, v_text, u_text, v_shift, u_shift):
        """The velocities of student and teacher at x, and from tip to tip their difference."""
        tails, vectors = torch.cat([x, x, x + u / 4]), torch.cat([v, u, v - u])
        axes.quiver(*tails.T, *vectors.T, color=[RED, BLUE, "black"], angles="xy",
                    scale_units="xy", scale=4, width=0.006, zorder=3)
        label(axes, x + v / 4, v_text, v_shift, RED, marker="")
        label(axes, x + u / 4, u_text, u_shift, BLUE, marker="")

    z, delta = torch.tensor([[2.2, 2.6]]), torch.tensor([0.5])
    path = states(blobs, z, 64)[:, 0]
    curve = jump(F, z.expand(65, 2), torch.linspace(0, 1, 65))
    left.plot(*path.T, BLUE, *curve.T, RED)
    f, dF = jump(F, z, delta), fmd.duration_derivative(F, z, delta)
    u = blobs(f, 1 - delta)
    v_G = u + fmd.prediction(F(z, delta), dF, blobs, z, delta)
    arrows(left, f, v_G, u, "$v_G$", "$u(f, 1 - δ)$", (-14, 0), (-40, 0))
    label(left, z, "$z$, noise: $t = 1$", (0, 14))
    label(left, f, "$f(z, δ)$", (-28, 0), RED)
    label(left, path[-1:], "teacher's sample, $t = 0$", (25, -16), BLUE)
    label(left, curve[-1:], "student's, $f(z, 1)$", (-54, -14), RED)
    left.set_title("prediction: $Δ_G = v_G - u$ (black), after duration δ")

    n, r = torch.tensor([[1.6, 1.9]]), torch.tensor([0.4])
    x = samples[(samples - CENTRES[0]).norm(dim=1).argmin()][None]
    x_r = (1 - r) * x + r * n
    right.plot(*torch.cat([x, n]).T, color="#888888")
    arrows(right, x_r, g(x_r, r), blobs(x_r, r), "$v_N$ of $g$", "$u(x_r, r)$", (38, 2), (32, -6))
    label(right, x, "$x = f(z, 1)$", (-38, 0), RED)
    label(right, n, "$n$, fresh noise", (0, 14))
    label(right, x_r, "$x_r$", (-16, 0))
    right.set_title("correction: $Δ_N = v_N - u$ (black), at a noised sample")
    picture.savefig(args.pictures / "objectives.png")


def main(argv=None):
    findings = {f.__name__: f for f in (error, speed, guidance, search, figure, example)}
    findings["objectives"] = partial(table, rows=[SETTINGS[i] for i in (2, 3, 6, 13, 14)], steps=900)
    findings["settings"] = partial(table, rows=SETTINGS, steps=300)
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=findings)
    add("--steps", type=int, help="of each student (900; settings 300; example 2000)")
    add("--batch", type=int, default=32)
    add("--optimizer", default="muon", choices=("muon", "adamw"))
    add("--seeds", type=int, default=3)
    add("--samples", type=int, default=1000)
    add("--images", type=int, default=100, help="of search")
    add("--tries", type=int, default=8, help="noises an image, of search")
    add("--only", nargs="+", default=[""], help="rows of a table with this in their names")
    add("--out", type=Path, default=Path("out/findings"), help="folder of the students")
    add("--pictures", type=Path, default=HERE, help="folder of the charts")
    args = parser.parse_args(argv)
    findings[args.what](args)


if __name__ == "__main__":
    main()
