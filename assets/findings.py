# SPDX-License-Identifier: MIT
"""The paper's findings in miniature, on the bundled teacher: the README's tables of them, and its charts.

    python assets/findings.py objectives  prediction alone, correction alone, both: 900 steps, 3 seeds
    python assets/findings.py settings    k, p(r), the cut, α, jvp: 13 rows of 300 steps, 3 seeds
    python assets/findings.py error       assets/error.png: error along the path, with and without correction
    python assets/findings.py speed       assets/speed.png: images/s and quality, one step against many
    python assets/findings.py guidance    γ as a knob when sampling
    python assets/findings.py search      noises ranked by one step: how well, and what the best one gains
    python assets/findings.py figure      assets/objectives.png: the two objectives on 2-D points

No data here either: the measure of quality is made of the teacher itself (see `features`).
"""

import argparse
import contextlib
import io
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import fid                                                                          # noqa: E402
import fmd                                                                          # noqa: E402
import sit                                                                          # noqa: E402

TEACHER = sit.load(HERE / "teacher-mnist.pt")[0].eval()
CPU, SHAPE, LABELS = torch.device("cpu"), (1, 28, 28), range(10)
BASE = "--res 28 --device cpu --k 1"                      # the paper's: 75/25, α = 1, r about 0.8, cut 0.7
OBJECTIVES = [("prediction alone", "12.40", "--correction 0"),
              ("correction alone", "loses modes", "--correction 1"),
              ("both", "5.58", "")]
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
            ("both, k = 1, by jvp", "", "--derivative jvp")]


# -----------------------------------------------------------------------------------------------------------
# Measures
# -----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def features(x, r=0.3):
    """Images (N, 1, 28, 28) -> (N, 128): what the teacher's last block but one says, averaged over tokens,
    when it sees the image noised to r and no label."""
    rows, hook = [], TEACHER.blocks[-2].register_forward_hook(lambda net, args, out: rows.append(out.mean(1)))
    n = torch.randn(x.shape, generator=fmd.generator("features"))
    for part in fmd.interpolate(x, n, torch.full((len(x),), r)).split(250):
        TEACHER(part, torch.full((len(part),), 1 - r), torch.full((len(part),), 10))       # SiT's clock; ∅
    hook.remove()
    return torch.cat(rows)


def moments(h):
    m = fid.Moments(h.shape[1])
    m.add(h.numpy())
    return m.mean_cov()


def spread(h, y):
    """Mean squared distance of the features to the mean of their class."""
    return sum((h[y == c] - h[y == c].mean(0)).square().sum(1).mean().item() for c in LABELS) / len(LABELS)


def draw(make, count, seed):
    """-> z, y, x, ms an image."""
    return fmd.timed(make, count, seed, SHAPE, LABELS, CPU)


def by_teacher(steps, gamma=1.5, solver="heun"):
    return fmd.many_steps(TEACHER, "sit", gamma, steps, solver)


def distance(h, h_true):
    """Fréchet distance of features, in per cent of the variance of the second ones."""
    mean, cov = moments(h_true)
    return 100 * fid.frechet_distance(*moments(h), mean, cov) / np.trace(cov)


def quality(x, y, h_true, y_true):
    """Samples against the teacher's, which came from other noises -> distance; spread within the classes over
    the teacher's, and recall, the share of the teacher's samples that lie among these: two signs of lost
    modes."""
    h = features(x)
    return distance(h, h_true), spread(h, y) / spread(h_true, y_true), fid.precision_recall(h, h_true)[1]


# -----------------------------------------------------------------------------------------------------------
# Charts
# -----------------------------------------------------------------------------------------------------------

COLOURS = ["#c0392b", "#2c5aa0", "#2e8b57", "#8e6c1f"]


def chart(path, lines, x_name, y_name, x_log=False, y_log=False, size=(760, 460)):
    """lines: {name: (xs, ys, lows, highs or None, labels of the points or None)} -> a PNG."""
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    left, top, right, bottom = 80, 24, size[0] - 24, size[1] - 60

    def scale(values, log, low, high):
        f, rounds = np.log10 if log else float, [m * 10.0 ** e for e in range(-6, 7) for m in (1, 2, 5)]
        a, b = f(min(values)) if log else 0.0, f(max(values))                     # a linear axis starts at 0
        a, b = a - (0.05 * (b - a) if log else 0), b + 0.08 * (b - a)
        step = next(m for m in rounds if (b - a) / m <= 6)
        marks = [m for m in rounds if a <= f(m) <= b] if log else [i * step for i in range(int(b / step) + 1)]
        return (lambda v: low + (f(v) - a) / (b - a) * (high - low)), marks

    X, x_marks = scale([v for line in lines.values() for v in line[0]], x_log, left, right)
    heights = [v for line in lines.values() for part in line[1:4] if part for v in part]
    Y, y_marks = scale(heights, y_log, bottom, top)
    for v in x_marks:
        pen.line([X(v), top, X(v), bottom], fill="#e6e6e6")
        pen.text((X(v), bottom + 6), f"{v:g}", fill="black", font=small, anchor="ma")
    for v in y_marks:
        pen.line([left, Y(v), right, Y(v)], fill="#e6e6e6")
        pen.text((left - 6, Y(v)), f"{v:g}", fill="black", font=small, anchor="rm")
    pen.rectangle([left, top, right, bottom], outline="black")
    pen.text(((left + right) / 2, size[1] - 26), x_name, fill="black", font=font, anchor="ma")
    pen.text((left + 4, 4), y_name, fill="black", font=font)
    for (name, (xs, ys, lows, highs, labels)), colour in zip(lines.items(), COLOURS):
        if lows:
            band = [(X(a), Y(b)) for a, b in zip(xs + xs[::-1], lows + highs[::-1])]
            shade = Image.new("RGBA", size)
            ImageDraw.Draw(shade).polygon(band, fill=colour + "40")
            image.paste(shade, mask=shade)
        points = [(X(a), Y(b)) for a, b in zip(xs, ys)]
        pen.line(points, fill=colour, width=2)
        for (a, b), label in zip(points, labels or [""] * len(points)):
            pen.ellipse([a - 3, b - 3, a + 3, b + 3], fill=colour)
            pen.text((a + 6, b - 16), label, fill=colour, font=small)
    for i, (name, colour) in enumerate(zip(lines, COLOURS)):
        pen.line([right - 230, top + 18 + 20 * i, right - 200, top + 18 + 20 * i], fill=colour, width=3)
        pen.text((right - 192, top + 18 + 20 * i), name, fill="black", font=small, anchor="lm")
    fid.write(path, lambda f: image.save(f, "PNG"))
    print(f"wrote {path}")


# -----------------------------------------------------------------------------------------------------------
# The findings
# -----------------------------------------------------------------------------------------------------------

def students(args, steps, flags):
    """One student a seed, trained by a plain command where it is not there yet -> their networks."""
    for seed in range(args.seeds):
        name = flags.replace("--", "").replace(" ", "-") or "base"
        out = args.out / f"{name}-{steps}x{args.batch}-{seed}"
        command = (f"{BASE} --steps {steps} --batch {args.batch} --eval-samples 2 --seed {seed} "
                   f"--out {out} {flags}")
        if not (out / "student.pt").exists():
            print(f"python fmd.py {command}", file=sys.stderr, flush=True)
            with contextlib.redirect_stdout(io.StringIO()):
                code = fmd.main(command.split())
            if code or not (out / "student.pt").exists():                          # stopped by a signal
                raise SystemExit(code or 1)
        yield sit.load(out / "student.pt")[0]


def table(args, rows, steps):
    """Train the students of each row, measure them, and print mean ± standard deviation over the seeds."""
    _, y_true, x_true, _ = draw(by_teacher(16), args.samples, "truth")
    _, y, phi, _ = draw(by_teacher(16), args.samples, "paired")
    h_true = features(x_true)
    print(f"{steps} steps, batch {args.batch}, {args.seeds} seeds, {args.samples} samples\n\n"
          "| settings | distance, % | spread | recall | endpoint error | the paper's FID |\n"
          "|---|---|---|---|---|---|")
    for name, paper, flags in [("the teacher, other noises", "", None), *rows]:
        found = []
        for net in [None] if flags is None else students(args, steps, flags):
            x = draw(fmd.one_step(net, "sit", 1.5), args.samples, "paired")[2] if net else phi
            error = ((x - phi).flatten(1).norm(dim=1) / phi.flatten(1).norm(dim=1)).mean().item()
            found.append((*quality(x, y, h_true, y_true), error))
        found = np.array(found)                                                          # (seeds, 4)
        both = (found.mean(0), found.std(0, ddof=1)) if len(found) > 1 else (found[0],)
        cells = [" ± ".join(f"{v:.{digits}f}" for v in column)
                 for column, digits in zip(zip(*both), (1, 2, 2, 3))]
        print(f"| {name}{f' (`{flags}`)' if flags else ''} | {' | '.join(cells)} | {paper} |", flush=True)


def objectives(args):
    table(args, OBJECTIVES, args.steps or 900)


def settings(args):
    rows = [row for row in SETTINGS if any(part in row[0] for part in args.only)]
    table(args, rows, args.steps or 300)


def error(args):
    count = min(64, args.samples)
    z, y = fmd.noise("error", range(count), SHAPE), torch.arange(count) % 10
    gamma, deltas = torch.full((count,), 1.5), [i / 16 for i in range(1, 17)]
    u = fmd.teacher_of(fmd.velocity_of(TEACHER, "sit"), 10, y, gamma)
    path, lines = fmd.rollout(u, z, 64, path=True)[4::4], {}                      # (16, count, 1, 28, 28)
    for name, flags in (("prediction alone", "--correction 0"), ("both", "")):
        curves = []
        for net in students(args, args.steps or 900, flags):
            F = torch.no_grad()(fmd.student_of(fmd.velocity_of(net, "sit"), y, gamma))
            maps = torch.stack([fmd.flow_map(F, z, torch.full_like(gamma, d)) for d in deltas])
            curves.append(((maps - path).flatten(2).norm(dim=2) / path.flatten(2).norm(dim=2)).mean(1))
        curves = torch.stack(curves)                                              # (seeds, 16)
        mean, low, high = (a.tolist() for a in (curves.mean(0), curves.amin(0), curves.amax(0)))
        lines[name] = (deltas, mean, low, high, None)
        print(name, " ".join(f"{v:.3f}" for v in lines[name][1]))
    chart(args.pictures / "error.png", lines, "duration (1: the sample)",
          f"relative error of the student's map against 64 Heun steps; band: {args.seeds} seeds")


def speed(args):
    _, y_true, x_true, _ = draw(by_teacher(32), args.samples, "truth")
    h_true, student, lines = features(x_true), sit.load(HERE / "student-mnist.pt")[0], {}
    print("| | steps | NFE | images/s | distance, % |\n|---|---|---|---|---|")
    for name in ("student", "teacher, Heun", "teacher, Euler"):
        rates, distances, nfes = [], [], []
        for steps in (1,) if name == "student" else (2, 4, 8, 16, 32):
            solver = "euler" if "Euler" in name else "heun"
            make = fmd.one_step(student, "sit", 1.5) if steps == 1 else by_teacher(steps, solver=solver)
            nfe = 1 if steps == 1 else fmd.evaluations(steps, solver, 1.5)
            draw(make, 1, "warm")
            _, _, x, ms = draw(make, args.samples, "speed")
            rates.append(1e3 / ms)
            distances.append(distance(features(x), h_true))
            nfes.append(str(nfe))
            print(f"| {name} | {steps} | {nfe} | {rates[-1]:.1f} | {distances[-1]:.2f} |", flush=True)
        lines[name] = (rates, distances, None, None, nfes)
    chart(args.pictures / "speed.png", lines, "images/s, log", "distance to the teacher's samples, %, log; "
          "at the points: network evaluations an image", True, True)


def guidance(args):
    student = sit.load(HERE / "student-mnist.pt")[0]
    score, base = fmd.label_score(fmd.velocity_of(TEACHER, "sit"), 10), None
    print("| γ | the teacher's spread | its label score | student's spread | its label score | distance to "
          "the teacher at that γ, % |\n|---|---|---|---|---|---|")
    for gamma in (1.0, 1.25, 1.5, 1.75, 2.0):
        _, y, x_true, _ = draw(by_teacher(16, gamma), args.samples, "truth")
        x = draw(fmd.one_step(student, "sit", gamma), args.samples, "student")[2]
        h_true, h = features(x_true), features(x)
        base = base or spread(h_true, y)                                                    # at γ = 1
        d = distance(h, h_true)
        cells = [f"{spread(a, y) / base:.2f} | {score(b, y).mean():.4f}"
                 for a, b in ((h_true, x_true), (h, x))]
        print(f"| {gamma} | {' | '.join(cells)} | {d:.2f} |", flush=True)


def ranks(a):
    return a.argsort(-1).argsort(-1).numpy()


def search(args):
    student = sit.load(HERE / "student-mnist.pt")[0]
    score = fmd.label_score(fmd.velocity_of(TEACHER, "sit"), 10)
    y, N = torch.arange(args.images) % 10, args.tries
    zs = [fmd.noise("search", [f"{i}/{j}" for i in range(args.images)], SHAPE) for j in range(N)]

    def scores(make, zs=zs):                                                              # (images, len(zs))
        return torch.stack([torch.cat([score(make(a, b), b) for a, b in zip(z.split(64), y.split(64))])
                            for z in zs], 1)

    quick, slow = scores(fmd.one_step(student, "sit", 1.0)), scores(by_teacher(16, 1.0))
    finer = scores(by_teacher(32, 1.0), zs[:1])
    rho = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(ranks(quick), ranks(slow))])
    print(f"{args.images} images of {N} noises, γ = 1; a score takes 4 evaluations of the teacher\n"
          f"rank correlation of one step with 16 Heun steps, mean over the images: {rho:.3f}\n\n"
          "| noise | rollout | NFE an image | mean label score |\n|---|---|---|---|")
    for noise, steps, nfe, value in (
            ("the first", 16, 32, slow[:, 0]), ("the first", 32, 64, finer[:, 0]),
            (f"best of {N} by one step", 16, 32 + 5 * N, slow.gather(1, quick.argmax(1, keepdim=True))),
            (f"best of {N} by rollouts", 16, 36 * N, slow.amax(1))):
        print(f"| {noise} | Heun {steps} | {nfe} | {value.mean():.4f} |")


def figure(args):
    """The two residuals on 2-D points, with a student and a g that have not finished learning."""
    centres = 2 * torch.tensor([[1.0, 0.0], [-0.5, 0.87], [-0.5, -0.87]])

    def u(x, t):                                            # exact for three blobs of width 0.3
        t = t[:, None, None]
        away, var = x[:, None] - (1 - t) * centres, (1 - t) ** 2 * 0.09 + t ** 2
        near = (-away.square().sum(2, keepdim=True) / (2 * var)).softmax(1)
        return (near * (centres + ((1 - t) * 0.09 - t) / var * away)).sum(1)

    torch.manual_seed(0)
    nets = [torch.nn.Sequential(torch.nn.Linear(3, 128), torch.nn.SiLU(), torch.nn.Linear(128, 128),
                                torch.nn.SiLU(), torch.nn.Linear(128, 2)) for _ in range(2)]
    F, g = (lambda x, t, net=net: net(torch.cat([x, t[:, None]], 1)) for net in nets)
    opt = torch.optim.Adam([p for net in nets for p in net.parameters()], 2e-3)
    for _ in range(300):
        z, delta, n, r = torch.randn(256, 2), torch.rand(192), torch.randn(64, 2), torch.rand(64)
        average, G, N, online = fmd.both(F, u, g, z, delta, n, r)
        opt.zero_grad()
        (fmd.student_loss(average, G, N, k=0.5)[0] + online).backward()
        opt.step()

    W, H, font, small = 560, 420, ImageFont.load_default(15), ImageFont.load_default(14)
    red, blue, black, scale = COLOURS[0], COLOURS[1], "black", 0.35

    def place(p):
        return W / 2 + zoom * (p[0].item() - middle[0]), H / 2 + 15 - zoom * (p[1].item() - middle[1])

    def dot(p, colour, name="", size=5, shift=(9, -8)):
        x, y = place(p)
        pen.ellipse([x - size, y - size, x + size, y + size], fill=colour)
        pen.text((x + shift[0], y + shift[1]), name, fill=colour, font=small)

    def arrow(a, b, colour, name="", shift=(8, -8)):
        start, tip = torch.tensor(place(a)), torch.tensor(place(b))
        along = (tip - start) / (tip - start).norm()
        across = torch.stack([-along[1], along[0]])
        pen.line([*start.tolist(), *(tip - 9 * along).tolist()], fill=colour, width=3)
        corners = tip, tip - 12 * along + 5 * across, tip - 12 * along - 5 * across
        pen.polygon([tuple(corner.tolist()) for corner in corners], fill=colour)
        pen.text((tip[0].item() + shift[0], tip[1].item() + shift[1]), name, fill=colour, font=small)

    def three(p, v_student, v_teacher, names, shifts):
        arrow(p, p + scale * v_student, red, names[0], shifts[0])
        arrow(p, p + scale * v_teacher, blue, names[1], shifts[1])
        arrow(p + scale * v_teacher, p + scale * v_student, black)

    z, n, r = torch.tensor([[0.6, 2.2]]), torch.tensor([[1.6, 1.9]]), torch.tensor([0.4])
    deltas, delta = torch.linspace(0, 1, 65), torch.tensor([0.55])
    with torch.no_grad():
        true, panels = fmd.rollout(u, torch.randn(400, 2), 64), []
        samples = fmd.flow_map(F, torch.randn(400, 2), torch.ones(400))
        for zoom, middle, title in (
                (190, (-0.35, 1.75), "prediction: v_G - u (black), where the student is after duration d"),
                (150, (1.6, 0.75), "correction: v_N - u (black), at a noised sample of the student's")):
            panels.append(Image.new("RGB", (W, H), "white"))
            pen = ImageDraw.Draw(panels[-1])
            for points, colour in ((true, "#c8c8c8"), (samples, "#e9b3ac")):
                for p in points:
                    dot(p, colour, size=2)
            pen.rectangle([0, 0, W - 1, H - 1], outline="#c8c8c8")
            pen.text((12, 8), title, fill="black", font=font)
            if len(panels) == 1:
                path = fmd.rollout(u, z, 64, path=True)[:, 0]
                student = fmd.flow_map(F, z.expand(65, 2), deltas)
                for curve, colour in ((path, blue), (student, red)):
                    pen.line([place(p) for p in curve], fill=colour, width=2, joint="curve")
                average, residual = fmd.prediction(F, u, z, delta)
                f = z + delta * average
                true_u = u(f, 1 - delta)
                dot(z[0], black, "z, noise: t = 1")
                dot(path[-1], blue, "teacher's sample, t = 0", shift=(-60, -26))
                dot(student[-1], red, "student's, f(z, 1)", shift=(-122, -8))
                dot(f[0], red, "f(z, d)", shift=(6, -24))
                three(f[0], (residual + true_u)[0], true_u[0], ("v_G", "u(f, 1 - d)"), ((-10, 8), (-30, -24)))
            else:
                x = samples[(samples - centres[0]).norm(dim=1).argmin()][None]
                x_r = fmd.interpolate(x, n, r)
                pen.line([place(x[0]), place(n[0])], fill="#888888")
                dot(x[0], red, "x = f(z, 1)", shift=(-84, -8))
                dot(n[0], black, "n, fresh noise")
                dot(x_r[0], black, "x_r", shift=(-30, -8))
                three(x_r[0], g(x_r, r)[0], u(x_r, r)[0], ("v_N, from g", "u(x_r, r)"), ((8, -8), (8, 4)))
    image = Image.new("RGB", (2 * W, H))
    for i, panel in enumerate(panels):
        image.paste(panel, (i * W, 0))
    fid.write(args.pictures / "objectives.png", lambda f: image.save(f, "PNG"))
    print(f"wrote {args.pictures / 'objectives.png'}")


def main(argv=None):
    findings = {f.__name__: f for f in (objectives, settings, error, speed, guidance, search, figure)}
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=findings)
    parser.add_argument("--steps", type=int, help="of each student (900, settings: 300)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--images", type=int, default=100, help="of search")
    parser.add_argument("--tries", type=int, default=8, help="noises an image, of search")
    parser.add_argument("--only", nargs="+", default=[""], help="rows of settings with this in their names")
    parser.add_argument("--out", type=Path, default=Path("out/findings"), help="of students; kept")
    parser.add_argument("--pictures", type=Path, default=HERE)
    args = parser.parse_args(argv)
    fmd.keep_freed_memory()
    findings[args.what](args)


if __name__ == "__main__":
    main()
