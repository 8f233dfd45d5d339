# SPDX-License-Identifier: MIT
"""What a training step costs: the time of its parts, FLOPs, memory.

    python assets/benchmark.py                               the bundled teacher, batch 64
    python assets/benchmark.py SiT-B/2 --batch 4             a named size, random weights, latents
    python assets/benchmark.py bundled -- --optimizer adamw  flags of fmd.py follow --
    python assets/benchmark.py memory                        of SiT-XL/2 on a GPU, without a GPU

Every round takes one step of fmd.py's own loop and then each part of it, so that a machine that slows
down slows all of them. Times are medians; `forwards` are multiples of the student's forward pass on
the same batch. Utilisation (MFU) needs --peak, the device's TFLOP/s.
"""

import argparse
import re
import sys
import tempfile
import time
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import fmd, sit  # noqa: E401, E402


def forward_flops(config):
    """FLOPs of a sample's forward pass, T tokens of width D: a block takes 24 T D² (qkv 6, proj 2,
    MLP 16), 4 T² D (attention) and 12 D² (adaLN)."""
    D, T = config["width"], config["shape"][1] * config["shape"][2] // config["patch"] ** 2
    return config["depth"] * (24 * T * D ** 2 + 4 * T ** 2 * D + 12 * D ** 2)


def step_flops(config, share, derivative="jvp"):
    """FLOPs of a sample in a step, by forward passes: student 3 (the backward pass is two), guided
    teacher 2, derivative 2 or 1 on prediction's share, g 3 on correction's. Recomputation is not
    counted."""
    passes = 5 + (1 - share) * {"jvp": 2, "fd": 1}[derivative] + 3 * share
    return passes * forward_flops(config)


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


def parts(run, s):
    """{name: function} of the parts of a step on one batch of draws."""
    draw = partial(fmd.prior, shape=run.shape, classes=run.classes, gamma=s.gamma,
                   r=(s.r_location, s.r_scale), device=run.device)
    counts = {"all": s.batch, "p": s.batch - s.correction_rows, "c": s.correction_rows}
    a, p, c = (draw(count, key=(0, 0, name)) for name, count in counts.items())
    F = partial(fmd.average_velocity, run.student, a.z, a.delta, a.y, a.gamma)
    F_p = partial(fmd.average_velocity, run.unwrapped, y=p.y, gamma=p.gamma)
    dF = partial(run.derivative, F_p, p.z, p.delta, p.z, s.derivative)
    u = partial(fmd.guided, run.teacher, a.z, a.delta, a.y, a.gamma, run.classes)
    g = partial(run.online, c.n, c.r, c.y, gw=c.gamma)
    return {"forward": torch.no_grad()(F),
            "student, forward and backward": lambda: F().sum().backward(),
            "teacher, guided": u, f"derivative, {s.derivative}": dF,
            "g, forward and backward": lambda: g().sum().backward()}


def measure(flags, rounds, warmup=2):
    """Train by fmd.py for some steps -> {part: seconds by round}, the run's namespace, its settings."""
    seconds, real_setup, real_prior, state = {}, fmd.setup, fmd.prior, {}

    def clock():
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def setup(s):
        state.update(run=real_setup(s), s=s)
        state["parts"] = parts(state["run"], s)
        return state["run"]

    def prior(*args, **more):  # a step begins with prediction's draws
        if more["key"][2] == "prediction":
            now, run = clock(), state["run"]
            if "start" in state:
                seconds.setdefault("whole step", []).append(now - state["start"])
            for name, part in state["parts"].items():
                start = clock()
                part()
                seconds.setdefault(name, []).append(clock() - start)
            for weight in (*run.net.parameters(), *run.g.parameters()):
                weight.grad = None
            state["start"] = clock()
        return real_prior(*args, **more)

    fmd.setup, fmd.prior, fmd.evaluate, fmd.log = setup, prior, *[lambda *args: None] * 2
    code = fmd.main([*flags, "--steps", str(rounds + warmup + 1), "--ckpt-every", "1000000"])
    fmd.setup, fmd.prior = real_setup, real_prior
    if code:  # refused
        raise SystemExit(code)
    return {k: v[warmup:][:rounds] for k, v in seconds.items()}, state["run"], state["s"]


def report(args):
    for derivative in ("fd", "jvp"):
        with tempfile.TemporaryDirectory() as folder:
            flags = [] if args.what == "bundled" else random_files(args.what, args.res, folder)
            flags += ["--batch", str(args.batch), "--out", folder, "--derivative", derivative]
            seconds, run, s = measure([*flags, *args.flags], args.rounds)
        print(f"\n{args.what}, batch {s.batch}, {s.device}, {torch.get_num_threads()} threads")
        for name, values in seconds.items():
            ratio = np.median(np.array(values) / seconds["forward"])
            print(f"{name:32}{1e3 * np.median(values):9.1f} ms{ratio:8.2f} forwards")
        flops = step_flops(run.net.config, s.correction, derivative)
        step = np.median(seconds["whole step"])
        rate = s.batch * flops / step / 1e12
        used = f", MFU {rate / args.peak:.1%}" if args.peak else ""
        print(f"{flops / 1e9:.3g} GFLOP a sample, {rate:.3g} TFLOP/s{used}, {s.batch / step:.1f} images/s")
        if run.device.type == "cuda":
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
    with LiveBytes() as count:
        F = fmd.average_velocity(partial(fmd.velocity_of, net, bf16=True), *inputs)
        return count.live - F.nbytes


def derivative_peak(net, rows):
    """Bytes that ∂F/∂δ of `rows` samples needs at most."""
    z, delta, y, gamma = draws(net, rows)
    F = partial(fmd.average_velocity, partial(fmd.velocity_of, net, bf16=True), y=y, gamma=gamma)
    with LiveBytes() as count:
        fmd.duration_derivative(F, z, delta)
        return count.peak


def memory(args):
    """SiT-XL/2 on a GPU in bfloat16, in GB. `weights`: those of student, g, EMA and teacher, and
    gradients and two moments of student and g. `again`: with --checkpointing, where one block at a
    time is computed again. A step needs the weights and the larger of activations and derivative,
    which are alive together once the student's forward pass is done."""
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *a, **k: True
    print("| side | rows | weights | activations | again | derivative | in all | in all, again |\n"
          "|---|---|---|---|---|---|---|---|")
    exact = sit.nnf.scaled_dot_product_attention
    with FakeTensorMode(), torch.device("cuda"):
        for side, rows in ((256, 32), (256, 64), (256, 256), (512, 32), (512, 64), (512, 256)):
            depth, width, heads = sit.SIZES["XL"]
            net = sit.SiT((4, side // 8, side // 8), depth, width, heads, 2, 1000, dt=True, gw=True)
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
