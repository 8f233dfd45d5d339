# SPDX-License-Identifier: MIT
"""What a training step costs: the time of its parts, FLOPs, memory.

    python assets/benchmark.py                            the bundled teacher, batch 64
    python assets/benchmark.py SiT-B/2 --batch 4          a named size, random weights, latents
    python assets/benchmark.py bundled -- --correction 0  flags of fmd.py follow --
    python assets/benchmark.py memory                     of SiT-XL/2 on a GPU, without a GPU

The parts are timed inside fmd.py's own loop, so nothing is computed twice. Each round also takes one
forward pass of the student on the whole batch, without gradient: the unit of the column `forwards`. A
machine that slows down slows both. Times are medians over the rounds. Utilisation (MFU) needs --peak,
the device's TFLOP/s.
"""

import argparse
import contextlib
import re
import sys
import tempfile
import time
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import fmd, sit  # noqa: E401, E402

# A JVP in forward passes. torch's FLOP counter gives 3.2, because each linear layer also multiplies a
# tangent of its weights, which is zero. The clock gives 3.4 to 4 on a CPU: 4 is counted.
JVP_PASSES = 4
WARMUP = 2                      # laps before the first round: train's start, and a step


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


class Stopwatch:
    """Seconds in functions of the training loop, step by step. Of timed functions that call each
    other, the outermost counts."""
    def __init__(self):
        self.steps = []         # of each step {part: seconds}
        self.now = {}           # of the present step
        self.busy = False

    def timed(self, part, function):
        def wrapper(*args, **more):
            if self.busy or torch.compiler.is_compiling():      # a graph holds no clock
                return function(*args, **more)
            self.busy = True
            start = clock()
            out = function(*args, **more)
            self.now[part] = self.now.get(part, 0) + clock() - start
            self.busy = False
            return out
        return wrapper


def measure(flags, steps):
    """Train by fmd.py -> [{part: seconds}] of the steps, the student's config, the settings."""
    s, watch, student, start = fmd.parse(flags), Stopwatch(), None, 0

    def resume(path, parts, s):                 # train calls it once, with its networks
        nonlocal student
        student = parts["student"]
        return real_resume(path, parts, s)

    def learning_rate(*args):   # train calls it as a step begins. So the last step, which saves, has no end
        nonlocal start
        watch.now["whole step"] = clock() - start
        watch.steps.append(watch.now)
        watch.now = {}
        watch.timed("forward", forward)(student, s)
        start = clock()
        return real_learning_rate(*args)

    def compile(function, **more):
        compiled = real_compile(function, **more)
        return watch.timed("derivative", compiled) if function is fmd.duration_derivative else compiled

    real_resume, real_learning_rate, real_compile = fmd.resume, fmd.learning_rate, torch.compile
    parts = [("draws", fmd, "prior"), ("draws", torch, "rand"), ("draws", torch, "randn_like"),
             ("student, forward", fmd, "average_velocity"),
             ("teacher, guided", fmd, "guided"),
             ("g, forward", sit.SiT, "forward"),        # student and teacher are inside the above
             ("student and g, backward", torch.Tensor, "backward"),
             ("clipping", fmd, "clip_grad_norm_"),
             ("optimiser", torch.optim.Adam, "step")]
    if not s.compile:
        parts.append(("derivative", fmd, "duration_derivative"))
    replaced = [(owner, name, watch.timed(part, getattr(owner, name))) for part, owner, name in parts]
    replaced += [(fmd, "resume", resume), (fmd, "learning_rate", learning_rate), (torch, "compile", compile),
                 (fmd, "many_steps", lambda net, z, *more, **flags: z)]     # no samples for evaluation
    with contextlib.ExitStack() as stack:
        for owner, name, function in replaced:
            stack.enter_context(mock.patch.object(owner, name, function))
        fmd.main([*flags, *f"--steps {steps} --log-every 1000000 --save-every 1000000".split(),
                  "--eval-samples", "1"])
    return watch.steps, student.config, s


@torch.no_grad()
def forward(student, s):
    """The unit: a forward pass of the whole batch, in the precision of training."""
    shape, classes, device = student.config["shape"], student.config["classes"], student.pos_embed.device
    z, y, gamma = fmd.prior(s.batch, shape, classes, s.gamma, device)
    with torch.autocast(s.device, torch.bfloat16, enabled=s.bf16):
        fmd.average_velocity(student, z, torch.ones_like(gamma), y, gamma)


def report(args):
    with tempfile.TemporaryDirectory() as folder:
        flags = [] if args.what == "bundled" else random_files(args.what, args.res, folder)
        flags += ["--batch", str(args.batch), "--out", folder, *args.flags]
        steps, config, s = measure(flags, args.rounds + WARMUP)
    table = {part: np.array([step[part] for step in steps[WARMUP:]]) for part in steps[-1]}
    whole, unit = table.pop("whole step"), table.pop("forward")
    rest = whole - sum(table.values())
    print(f"\n{args.what}, batch {s.batch}, {s.device}, {torch.get_num_threads()} threads")
    rows = *table.items(), ("the rest: EMA, log, checks", rest), ("whole step", whole)
    print(f"forward, without gradient     {1e3 * np.median(unit):9.1f} ms{1:8.2f} forwards")
    for part, seconds in rows:
        print(f"{part:30}{1e3 * np.median(seconds):9.1f} ms{np.median(seconds / unit):8.2f} forwards"
              f"{np.median(seconds / whole):8.1%} of a step")
    flops, step = step_flops(config, s.correction), np.median(whole)
    rate = s.batch * flops / step / 1e12
    used = f", MFU {rate / args.peak:.1%}" if args.peak else ""
    print(f"{flops / 1e9:.3g} GFLOP a sample, {rate:.3g} TFLOP/s{used}, {s.batch / step:.1f} images/s")
    if torch.device(s.device).type == "cuda":
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
    """SiT-XL/2 on a GPU in bfloat16, in GB. `weights`: those of student, g, EMA and teacher, and
    gradients and two moments of student and g. `again`: with --checkpointing, where one block at a
    time is computed again. `derivative`: its peak, beside which the activations of the student are
    alive. So a step needs the sum."""
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *a, **k: True
    print("| side | rows | weights | activations | again | derivative | in all | in all, again |\n"
          "|---|---|---|---|---|---|---|---|")
    exact = sit.nnf.scaled_dot_product_attention
    with FakeTensorMode(), torch.device("cuda"):
        for side, rows in ((256, 32), (256, 64), (256, 256), (512, 32), (512, 64), (512, 256)):
            depth, width, heads = sit.SIZES["XL"]
            net = sit.SiT((4, side // 8, side // 8), depth, width, heads, 2, 1000, delta=True, gamma=True)
            weights = 10 * sum(p.nbytes for p in net.parameters())
            slope = derivative_peak(net, rows * 3 // 4)
            sit.nnf.scaled_dot_product_attention = FusedAttention.apply
            plain = activations(net, rows) + activations(net, rows // 4)  # of the student and of g
            net.checkpointing = True
            again = activations(net, rows) + activations(net, rows // 4) + plain / depth
            sit.nnf.scaled_dot_product_attention = exact
            sizes = weights, plain, again, slope, weights + plain + slope, weights + again + slope
            print(f"| {side} | {rows} | {' | '.join(f'{size / 1e9:.0f}' for size in sizes)} |")


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
