# SPDX-License-Identifier: MIT
"""What the two objectives compare, in one dimension: objectives.png. Needs matplotlib.

    python assets/points.py

The teacher is the exact velocity of data at two points, -2 and 2, each with a spread of 0.25. Student and g
are small networks, trained by fmd.py's functions and stopped early, so that there is something to see.
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

STUDENT, TEACHER = "#c0392b", "#2c5aa0"
MODES, VARIANCE = torch.tensor([[-2.0, 2.0]]), 0.25 ** 2


def u(x, t):
    """The exact velocity of a mixture of two Gaussians. x (B, 1), t (B,) -> (B, 1)."""
    t = t[:, None]
    away = x - (1 - t) * MODES                              # (B, 2)
    variance = (1 - t) ** 2 * VARIANCE + t ** 2             # (B, 1)
    share = (-away.square() / (2 * variance)).softmax(1)    # (B, 2)
    return (share * (MODES + ((1 - t) * VARIANCE - t) / variance * away)).sum(1, keepdim=True)


class MLP(torch.nn.Sequential):
    def __init__(self):
        super().__init__(Linear(2, 64), SiLU(), Linear(64, 64), SiLU(), Linear(64, 1))

    def forward(self, x, t):
        return super().forward(torch.cat([x, t[:, None]], 1))


def distil(steps):
    """-> F, g."""
    torch.manual_seed(0)
    F, g = MLP(), MLP()
    optimizer = torch.optim.Adam([*F.parameters(), *g.parameters()], 3e-3, (0.9, 0.99))
    for _ in range(steps):
        z, delta = torch.randn(192, 1), torch.rand(192)     # for prediction
        z_c, n, r = torch.randn(64, 1), torch.randn(64, 1), torch.sigmoid(0.8 + torch.randn(64))
        F_p, F_c = F(z, delta), F(z_c, torch.ones(64))
        residual_p = fmd.prediction(F_p, fmd.duration_derivative(F, z, delta), u, z, delta)
        residual_c, g_loss = fmd.correction(F_c, u, g, z_c, n, r)
        loss, *_ = fmd.student_loss(F_p, residual_p, F_c, residual_c, k=0.5)
        optimizer.zero_grad()
        (loss + g_loss).backward()
        optimizer.step()
    return F.requires_grad_(False), g.requires_grad_(False)


def state(F, z, delta):
    return fmd.flow_map(F(z, delta), z, delta)


def paths(z, steps=100):
    """The teacher's states at δ = 0, 1/steps, ... 1 -> (steps + 1, B)."""
    calls = []
    def recorded(x, t):
        calls.append(x)
        return u(x, t)
    end = fmd.rollout(recorded, z, steps)
    return torch.stack([*calls[::2], end])[..., 0]          # Heun calls twice a step


def left_panel(axes, F):
    """Prediction: slopes at one point of the student's curve."""
    grid = torch.linspace(0, 1, 101)
    axes.plot(grid, paths(torch.linspace(-2.2, 2.2, 23)[:, None]), color="#d0d0d0", linewidth=1)
    z, at = torch.tensor([[0.35]]), torch.tensor([0.5])
    curve = state(F, z.expand(101, 1), grid)[:, 0]
    axes.plot(grid, paths(z), color=TEACHER, linewidth=2)
    axes.plot(grid, curve, color=STUDENT, linewidth=2)
    x, F_dot = state(F, z, at), fmd.duration_derivative(F, z, at)
    slope_u = u(x, 1 - at)
    slope_v = slope_u + fmd.prediction(F(z, at), F_dot, u, z, at)
    long = 0.22                                             # how far the arrows go along δ
    for slope, colour, name, below in ((slope_v, STUDENT, "$v$", True), (slope_u, TEACHER, "$u$", False)):
        end = (at.item() + long, (x + long * slope).item())
        axes.annotate("", end, (at.item(), x.item()), arrowprops=dict(arrowstyle="-|>", color=colour, lw=2.5))
        axes.annotate(name, end, (4, -12 if below else 6), textcoords="offset points", color=colour,
                      fontsize=14)
    tips = [(at.item() + long, (x + long * slope).item()) for slope in (slope_u, slope_v)]
    axes.annotate("", tips[1], tips[0], arrowprops=dict(arrowstyle="<|-|>", color="black", lw=2))
    axes.annotate("$Δ_p$", ((tips[0][0]), (tips[0][1] + tips[1][1]) / 2), (8, -5), textcoords="offset points",
                  fontsize=14)
    axes.plot([0, at.item()], [z.item(), x.item()], "o", color="black", zorder=4)
    axes.annotate("$z$", (0, z.item()), (-16, -4), textcoords="offset points", fontsize=14)
    axes.annotate("$x_δ = z + δF(z, δ)$", (at.item(), x.item()), (-60, -26), textcoords="offset points",
                  color=STUDENT, fontsize=12)
    axes.annotate("student, one evaluation", (1, curve[-1].item()), (-4, -52), textcoords="offset points",
                  color=STUDENT, ha="right")
    axes.annotate("teacher, many steps", (1, paths(z)[-1].item()), (-4, 10), textcoords="offset points",
                  color=TEACHER, ha="right")
    axes.set(xlabel="δ:  noise (0)  →  data (1)", ylabel="x", ylim=(-2.9, 2.9), xlim=(-0.06, 1.02))
    axes.set_title("Prediction compares v and u,\nat the point that the student has reached")


def right_panel(axes, F, g, r=0.35):
    """Correction: densities of noised samples, and the difference of velocities."""
    z, n = torch.randn(2, 200_000, 1)
    one = torch.ones(len(z))
    mixed = MODES[0, torch.randint(2, (len(z),))][:, None] + VARIANCE ** 0.5 * torch.randn_like(z)
    bins = torch.linspace(-3, 3, 121)
    middle = (bins[1:] + bins[:-1]) / 2
    for samples, colour, name in ((mixed, TEACHER, "teacher's samples, noised"),
                                  (state(F, z, one), STUDENT, "student's samples, noised")):
        noised = (1 - r) * samples + r * n
        height = torch.histogram(noised[:, 0], bins, density=True).hist
        axes.plot(middle, height, color=colour, linewidth=2, label=name)
        axes.fill_between(middle, height, color=colour, alpha=0.12)
    x = torch.linspace(-2.1, 2.1, 11)[:, None]
    difference = g(x, torch.full((11,), r)) - u(x, torch.full((11,), r))
    zero = torch.zeros(11)
    axes.axhline(-0.06, color="#888888", linewidth=0.8)
    axes.quiver(x[:, 0], zero - 0.06, -difference[:, 0], zero, angles="xy", scale_units="xy", scale=9,
                width=0.006)
    axes.annotate("correction moves the samples along $-Δ_c = u - g$", (0, -0.06), (0, -18), textcoords="offset points",
                  ha="center")
    axes.set(xlabel=f"$x_r = (1 - r)x + rn$,  r = {r}", ylabel="density", yticks=[], ylim=(-0.16, 0.7))
    axes.legend(loc="upper center", ncols=2, frameon=False)
    axes.set_title("Correction compares g and u,\nthe velocities of noised samples of both")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="of student and g")
    parser.add_argument("--pictures", type=expanded, default=HERE, help="folder of the picture")
    args = parser.parse_args(argv)
    from matplotlib.figure import Figure  # draws with Agg
    figure = Figure((11, 4.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    F, g = distil(args.steps)
    left_panel(left, F)
    right_panel(right, F, g)
    args.pictures.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.pictures / "objectives.png")


if __name__ == "__main__":
    main()
