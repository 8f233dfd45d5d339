# SPDX-License-Identifier: MIT
"""A teacher of your own: any flow-matching network, here a small one with another clock and sign.

    python assets/own_teacher.py                     with labels, guided at γ = 1.5
    python assets/own_teacher.py --no-labels         an unconditional teacher

Copy this file and replace what it marks as YOURS, nearly all of it in one part. The rest is fmd.py's method
with a plain loop around it: γ is fixed, gradients are not clipped, the rate is constant, a run cannot be
resumed. It writes to out/own: check.png, the teacher's samples, before anything is trained; student.pt;
pairs.png, teacher beside student.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch
import torch.nn as nn
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fmd import (correction, duration_derivative, endpoint_error, guided, prediction,  # noqa: E402
                 rollout, student_loss)

# ---- YOURS, down to load_teacher: shape and labels, γ, the network, its clock and sign, its weights ----
SHAPE, CLASSES, GAMMA = (1, 16, 16), 2, 1.5
NULL = CLASSES          # the label of "any class", for guidance
TIME, WIDTH = "time", 512       # the module of Net that embeds time, and the width of its output


class Net(nn.Module):
    """net(x, s, y): s is 0 at noise and 1 at data, and the output points from data to noise."""
    def __init__(self):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.label = nn.Embedding(CLASSES + 1, WIDTH)
        self.first, self.out = nn.Linear(256, WIDTH), nn.Linear(WIDTH, 256)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x, s, y=None):
        c = self.time(s[:, None])                               # (B, WIDTH)
        if y is not None:
            c = c + self.label(y)
        h = self.first(x.flatten(1))
        for layer in self.layers:
            h = h + layer(nn.functional.silu(h + c))
        return self.out(h).view(x.shape)


def velocity(net, x, t, y):
    """The one place for clock and sign: t is 1 at noise, and the velocity points to data."""
    return -net(x, 1 - t, y)


def load_teacher(steps, labels):
    """Build the network and load its weights. Here it learns squares (0) and crosses (1)."""
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for step in range(steps):
        y, corner = torch.randint(CLASSES, (64,)), torch.randint(2, 8, (64, 2))
        row, col = ((torch.arange(16) - at[:, None]).abs().sub(3).le(0) for at in (corner + 3).T)
        thin_row, thin_col = ((torch.arange(16) == at[:, None]) for at in (corner + 3).T)
        square = row[:, :, None] & col[:, None]
        cross = square & (thin_row[:, :, None] | thin_col[:, None])
        data = torch.where(y.view(-1, 1, 1).bool(), cross, square).float()[:, None] * 2 - 1
        n, s = torch.randn_like(data), torch.rand(64)
        x = torch.lerp(n, data, s.view(-1, 1, 1, 1))
        y = torch.where(torch.rand(64) < 0.1, NULL, y) if labels else None
        loss = (net(x, s, y) - (n - data)).square().mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    return net


# ---- The student: the same network, with the duration δ added to its embedding of time ----
class TimeAndDuration(nn.Module):
    def __init__(self, time, width):
        super().__init__()
        self.time, self.delta = time, None
        self.embed = nn.Sequential(nn.Linear(1, 64), nn.SiLU(), nn.Linear(64, width, bias=False))
        nn.init.zeros_(self.embed[2].weight)        # so the student starts as the teacher

    def forward(self, s):
        return self.time(s) + self.embed(self.delta[:, None])


def average_velocity(net, z, delta, y):
    getattr(net, TIME).delta = delta
    return velocity(net, z, torch.ones_like(delta), y)      # the clock stays at noise


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--teacher-steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=Path("out/own"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    with torch.device(args.device):             # of all that is made below
        return distil(args)


def distil(args):
    torch.manual_seed(0)
    teacher = load_teacher(args.teacher_steps, args.labels).eval().requires_grad_(False)   # eval: no dropout

    def labels(rows):       # YOURS, if your network takes other conditions
        return torch.randint(CLASSES, (rows,)) if args.labels else None

    def u(x, t, y, cut=1.0):
        if y is None:           # nothing to guide by
            return velocity(teacher, x, t, None)
        return guided(lambda *a: velocity(teacher, *a), x, t, y, GAMMA, NULL, (0, cut))

    z_check = torch.randn(32, *SHAPE)
    y_check = torch.arange(32) % CLASSES if args.labels else None
    phi = rollout(lambda x, t: u(x, t, y_check), z_check, 32)
    save_image(phi, args.out / "check.png", normalize=True, value_range=(-1, 1))    # look at it

    student, g = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(2))
    setattr(student, TIME, TimeAndDuration(getattr(student, TIME), WIDTH))
    ema = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.Adam([*student.parameters(), *g.parameters()], 1e-3, (0.9, 0.99))
    for step in range(args.steps):
        # Prediction has 48 rows, correction 16, as in the paper: 75 % and 25 %.
        z, y, delta = torch.randn(48, *SHAPE), labels(48), torch.rand(48)
        F_p = average_velocity(student, z, delta, y)
        F_dot = duration_derivative(lambda z, d: average_velocity(student, z, d, y), z, delta)
        residual_p = prediction(F_p, F_dot, lambda x, t: u(x, t, y), z, delta)

        z, y, n = torch.randn(16, *SHAPE), labels(16), torch.randn(16, *SHAPE)
        r = torch.sigmoid(0.8 + torch.randn(16))
        F_c = average_velocity(student, z, torch.ones(16), y)
        residual_c, g_loss = correction(F_c, lambda x, t: u(x, t, y, 0.7),     # unguided at r above 0.7
                                        lambda x, t: velocity(g, x, t, y), z, n, r)

        # α = 1 is the paper's. Where `pull` stays below 0.1, correction does little: raise alpha.
        loss, _, pull = student_loss(F_p, residual_p, F_c, residual_c, k=1.0, alpha=1.0)
        optimizer.zero_grad(), (loss + g_loss).backward(), optimizer.step()
        for average, weight in zip(ema.parameters(), student.parameters()):
            average.lerp_(weight.detach(), 0.01)
        if step % 100 == 0:
            x = z_check + average_velocity(ema, z_check, torch.ones(32), y_check)
            error = endpoint_error(x, phi).mean()
            print(f"step {step}: residual {residual_p.square().mean():.3f}, pull {pull:.2f}, "
                  f"endpoint error {error:.3f}")
    torch.save(ema.state_dict(), args.out / "student.pt")
    x = z_check + average_velocity(ema, z_check, torch.ones(32), y_check)      # one evaluation a sample
    pairs = torch.stack([phi, x], 1).flatten(0, 1)
    save_image(pairs, args.out / "pairs.png", normalize=True, value_range=(-1, 1))
    print(f"teacher beside student: {args.out / 'pairs.png'}")
    return teacher, student, ema


if __name__ == "__main__":
    main()
