# SPDX-License-Identifier: MIT
"""fmd.py's functions with a teacher of your own: 2-D points, without labels. Needs matplotlib.

    python assets/points.py example     points.png: one step of the student against the teacher's paths
    python assets/points.py figure      objectives.png: the two objectives as arrows
"""

import argparse
import sys
from pathlib import Path

import torch
from torch.nn import Linear, SiLU

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import fmd  # noqa: E402
from train_teacher import expanded  # noqa: E402

RED, BLUE = "#c0392b", "#2c5aa0"


def jump(F, z, delta):
    return fmd.flow_map(F(z, delta), z, delta)


def chart(width, height, columns=1):  # inches
    from matplotlib.figure import Figure  # draws with Agg
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
        F_p, F_c = F(z, delta), F(z_c, torch.ones(64))
        F_dot = fmd.duration_derivative(F, z, delta)
        residual_p = fmd.prediction(F_p, F_dot, blobs, z, delta)
        residual_c, online_loss = fmd.correction(F_c, blobs, g, z_c, n, r)
        # With k = 1 the median distance of `example` is 0.22, with 0.5 it is 0.05.
        loss, _ = fmd.student_loss(F_p, residual_p, F_c, residual_c, k=0.5)
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, 2 - 2 * step / steps)
        optimizer.zero_grad()
        (loss + online_loss).backward()
        optimizer.step()
    return F.requires_grad_(False), g.requires_grad_(False)


def example(args):
    F, _ = distil_blobs(args.steps)
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
    f, F_dot = jump(F, z, delta), fmd.duration_derivative(F, z, delta)
    u = blobs(f, 1 - delta)
    v = u + fmd.prediction(F(z, delta), F_dot, blobs, z, delta)
    arrows(left, f, v, u, "$v$", "$u(f, 1 - δ)$", (-14, 0), (-40, 0))
    label(left, z, "$z$, noise: $t = 1$", (0, 14))
    label(left, f, "$f(z, δ)$", (-28, 0), RED)
    label(left, path[-1:], "teacher's sample, $t = 0$", (25, -16), BLUE)
    label(left, curve[-1:], "student's, $f(z, 1)$", (-54, -14), RED)
    left.set_title("prediction: $Δ_p = v - u$ (black), after duration δ")

    n, r = torch.tensor([[1.6, 1.9]]), torch.tensor([0.4])
    x = samples[(samples - CENTRES[0]).norm(dim=1).argmin()][None]
    x_r = (1 - r) * x + r * n
    right.plot(*torch.cat([x, n]).T, color="#888888")
    arrows(right, x_r, g(x_r, r), blobs(x_r, r), "$g(x_r, r)$", "$u(x_r, r)$", (38, 2), (32, -6))
    label(right, x, "$x = f(z, 1)$", (-38, 0), RED)
    label(right, n, "$n$, fresh noise", (0, 14))
    label(right, x_r, "$x_r$", (-16, 0))
    right.set_title("correction: $Δ_c = g - u$ (black), at a noised sample")
    picture.savefig(args.pictures / "objectives.png")


def main(argv=None):
    findings = {"example": example, "figure": figure}
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=findings)
    parser.add_argument("--steps", type=int, default=2000, help="of the example's student")
    parser.add_argument("--pictures", type=expanded, default=HERE, help="folder of the picture")
    args = parser.parse_args(argv)
    args.pictures.mkdir(parents=True, exist_ok=True)
    findings[args.what](args)


if __name__ == "__main__":
    main()
