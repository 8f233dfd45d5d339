# SPDX-License-Identifier: MIT
"""What a training step costs: the time of its parts, FLOPs, memory.

    python assets/benchmark.py                            the bundled teacher, batch 64
    python assets/benchmark.py SiT-B/2 --batch 4          a named size, random weights, latents
    python assets/benchmark.py bundled -- --correction 0  flags of fmd.py follow --
    python assets/benchmark.py memory                     on a GPU, without a GPU

The parts are calls of fmd.py's functions, one after another, as its loop makes them. Each round also takes
one forward pass of the student on the whole batch, without gradient: the unit of the column `forwards`. A
machine that slows down slows both. Times are medians over the rounds. Utilisation (MFU) needs --peak, the
device's TFLOP/s.
"""

import argparse
import re
import sys
import tempfile
import time
import weakref
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import fmd, sit  # noqa: E401, E402

JVP_PASSES = 2                  # of a JVP: values, and their derivatives (sit.Linear)
WARMUP = 2                      # rounds that do not count


def forward_flops(config):
    """FLOPs of a sample's forward pass, T tokens of width D: a block takes 24 T D² (qkv 6, proj 2,
    MLP 16), 4 T² D (attention) and 12 D² (adaLN)."""
    D, T = config["width"], config["shape"][1] * config["shape"][2] // config["patch"] ** 2
    return config["depth"] * (24 * T * D ** 2 + 4 * T ** 2 * D + 12 * D ** 2)


def step_flops(config, share):
    """FLOPs of a sample in a step, by forward passes: student 3 (the backward pass is two), guided
    teacher 2, derivative JVP_PASSES on prediction's share, g 3 on correction's share. Recomputation is
    not counted."""
    return (5 + JVP_PASSES * (1 - share) + 3 * share) * forward_flops(config)


# ---- Time ----
def random_files(name, side, folder):
    """Write a teacher of a named size with random weights, and a decoder -> flags of fmd.py."""
    depth, width, heads = sit.SIZES[name.split("-")[1].split("/")[0]]
    net = sit.SiT((4, side // 8, side // 8), depth, width, heads, int(name.split("/")[1]), 1000)
    for weight in net.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    torch.save({"ema": net.state_dict(), "config": net.config}, f"{folder}/teacher.pt")
    torch.save(sit.Decoder().state_dict(), f"{folder}/vae.pt")
    return ["--res", str(side), "--teacher", f"{folder}/teacher.pt", "--vae", f"{folder}/vae.pt"]


def clock():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(s, rounds):
    """-> {part: seconds of each round} of a step with the settings s, and the student's config."""
    seconds = defaultdict(list)

    def timed(part, function, *args):
        start = clock()
        with torch.autocast(s.device, torch.bfloat16, enabled=s.bf16):
            out = function(*args)
        seconds[part].append(clock() - start)
        return out
    device = fmd.join(s.device)
    teacher, _ = fmd.load(s.teacher, s.res, device)
    shape, classes = teacher.config["shape"], teacher.config["classes"]
    student = sit.start_from(teacher, delta=True, gamma=True)
    online, ema = sit.start_from(teacher, gamma=True), sit.start_from(student).requires_grad_(False)
    weights = [*student.parameters(), *online.parameters()]
    optimizer = torch.optim.Adam(weights, s.lr, (0.9, 0.99), fused=True)
    ddp_student, ddp_online, derivative = fmd.prepare(s, teacher, student, online)
    rows = [s.rows_p, s.rows_c]
    for _ in range(WARMUP + rounds):
        z, y, gamma = fmd.prior(s.batch, shape, classes, s.gamma, device)
        (z_p, z_c), (y_p, y_c), (gamma_p, gamma_c) = (a.split(rows) for a in (z, y, gamma))
        delta, r, n = torch.rand_like(gamma_p), torch.rand_like(gamma_c), torch.randn_like(z_c)
        deltas = torch.cat([delta, torch.ones_like(r)])
        with torch.no_grad():
            timed("forward, without gradient", fmd.average_velocity, student, z, deltas, y, gamma)

        def F(z, delta): return fmd.average_velocity(student, z, delta, y_p, gamma_p)
        def u_p(x, t): return fmd.guided(teacher, x, t, y_p, gamma_p, classes)
        def u_c(x, t): return fmd.guided(teacher, x, t, y_c, gamma_c, classes)
        def g(x, t): return ddp_online(x, t, y_c, gamma=gamma_c)
        start = clock()
        F_all = timed("student, forward", fmd.average_velocity, ddp_student, z, deltas, y, gamma)
        F_p, F_c = F_all.split(rows)
        F_dot = timed("derivative", derivative, F, z_p, delta)
        residual_p = timed("prediction: teacher", fmd.prediction, F_p, F_dot, u_p, z_p, delta)
        residual_c, loss = timed("correction: teacher and g", fmd.correction, F_c, u_c, g, z_c, n, r)
        loss = loss + fmd.student_loss(F_p, residual_p, F_c, residual_c, s.k, s.alpha)[0]
        timed("student and g, backward", loss.backward)
        timed("clipping", fmd.clip_grad_norm_, weights, 1)
        timed("optimiser", optimizer.step)
        optimizer.zero_grad()
        current = [weight.detach() for weight in student.parameters()]
        timed("average", torch._foreach_lerp_, [*ema.parameters()], current, 0.1)
        seconds["whole step"].append(clock() - start)
    return {part: np.array(times[WARMUP:]) for part, times in seconds.items()}, student.config


def report(args):
    with tempfile.TemporaryDirectory() as folder:
        flags = [] if args.what == "bundled" else random_files(args.what, args.res, folder)
        s = fmd.parse([*flags, "--batch", str(args.batch), *args.flags])
        table, config = measure(s, args.rounds)
    unit, whole = table["forward, without gradient"], table["whole step"]
    print(f"\n{args.what}, batch {s.batch}, {s.device}, {torch.get_num_threads()} threads")
    for part, seconds in table.items():
        share = "" if seconds is unit else f"{np.median(seconds / whole):8.1%} of a step"
        print(f"{part:30}{1e3 * np.median(seconds):9.1f} ms{np.median(seconds / unit):8.2f} forwards{share}")
    flops, step = step_flops(config, s.correction), np.median(whole)
    rate = s.batch * flops / step / 1e12
    used = f", MFU {rate / args.peak:.1%}" if args.peak else ""
    print(f"{flops / 1e9:.3g} GFLOP a sample, {rate:.3g} TFLOP/s{used}, {s.batch / step:.1f} images/s")
    if s.device == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


# ---- Memory ----
class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made since it began: `live` now, `peak` at most."""
    live = peak = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and not hasattr(storage, "counted"):
                storage.counted = True
                self.change(storage.nbytes())
                weakref.finalize(storage, self.change, -storage.nbytes())
        return out

    def change(self, size):
        self.live += size
        self.peak = max(self.peak, self.live)


class FusedAttention(torch.autograd.Function):
    """Keeps for the backward pass what a fused kernel keeps. It computes nothing."""
    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:3], device=q.device))
        return out


def draws(net, rows):
    """z, delta, y, gamma for an average velocity."""
    ones = torch.ones(rows)
    return torch.randn(rows, *net.config["shape"]), ones, torch.zeros(rows, dtype=torch.long), ones


def activations(net, rows):
    """Bytes that a forward pass of `rows` samples keeps for the backward pass."""
    inputs = draws(net, rows)
    with LiveBytes() as count, torch.autocast("cuda", torch.bfloat16):
        F = fmd.average_velocity(net, *inputs)
        return count.live - F.nbytes


def derivative_peak(net, rows):
    """Bytes that ∂F/∂δ of `rows` samples needs at most."""
    z, delta, y, gamma = draws(net, rows)

    def F(z, delta):
        return fmd.average_velocity(net, z, delta, y, gamma)
    with LiveBytes() as count, torch.autocast("cuda", torch.bfloat16):
        fmd.duration_derivative(F, z, delta)
        return count.peak


def memory(args):
    """SiTs on a GPU in bfloat16, in GB. `weights`: those of student, g, EMA and teacher, and
    gradients and two moments of student and g. `again`: with --checkpointing, where one block at a
    time is computed again. `derivative`: its peak, beside which the activations of the student are
    alive. So a step needs the sum."""
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *a, **k: True
    print("| | rows | weights | activations | again | derivative | in all | in all, again |\n"
          "|---|---|---|---|---|---|---|---|")
    exact = sit.nnf.scaled_dot_product_attention
    with FakeTensorMode(), torch.device("cuda"):
        for size, side, rows in (("XL", 256, 32), ("XL", 256, 256), ("XL", 512, 32), ("XL", 512, 256),
                                 ("B", 256, 32), ("B", 256, 256)):
            depth, width, heads = sit.SIZES[size]
            net = sit.SiT((4, side // 8, side // 8), depth, width, heads, 2, 1000, delta=True, gamma=True)
            weights = 10 * sum(p.nbytes for p in net.parameters())
            slope = derivative_peak(net, rows * 3 // 4)
            sit.nnf.scaled_dot_product_attention = FusedAttention.apply
            plain = activations(net, rows) + activations(net, rows // 4)  # of the student and of g
            net.checkpointing = True
            again = activations(net, rows) + activations(net, rows // 4) + plain / depth
            sit.nnf.scaled_dot_product_attention = exact
            sizes = weights, plain, again, slope, weights + plain + slope, weights + again + slope
            print(f"| {size}/2 at {side} | {rows} | {' | '.join(f'{part / 1e9:.0f}' for part in sizes)} |")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="?", default="bundled", help="bundled, a size such as SiT-B/2, or memory")
    add("--res", type=int, default=256, choices=(256, 512), help="of a named size")
    add("--batch", type=int, default=64)
    add("--rounds", type=int, default=15)
    add("--peak", type=float, help="TFLOP/s of the device (H100, bfloat16: 989)")
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    args.flags = argv[split + 1:]
    if not re.fullmatch(r"bundled|memory|SiT-(S|B|L|XL)/[248]", args.what):
        parser.error(f"{args.what}: must be bundled, memory or a size such as SiT-B/2")
    memory(args) if args.what == "memory" else report(args)


if __name__ == "__main__":
    main()
