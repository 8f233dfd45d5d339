# SPDX-License-Identifier: MIT
"""Train the bundled teacher: a class-conditional SiT on MNIST by flow matching (the only script here that
sees data).

    python assets/train_teacher.py               # MNIST through torchvision
    python assets/train_teacher.py --mnist DIR   # DIR holds train-images-idx3-ubyte[.gz] and the labels
"""

import argparse
import gzip
import os
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sit  # noqa: E402


def expanded(text):
    """A path of the command line. After --out=~/ the shell leaves the ~ as it is."""
    return Path(os.path.expanduser(text))


def read_idx(folder, name):
    """An IDX file of bytes, plain or gzipped, as a uint8 array: magic 0, 0, 8, ndim, then ndim big-endian
    sizes."""
    path = Path(folder) / name
    if path.exists():
        raw = path.read_bytes()
    else:
        raw = gzip.decompress(path.with_name(f"{name}.gz").read_bytes())
    sizes = np.frombuffer(raw, ">u4", count=raw[3], offset=4).astype(int)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sizes)


def load_mnist(folder):
    """-> digits (60000, 1, 28, 28) float in [-1, 1], labels (60000,) int64."""
    if folder:
        x = torch.from_numpy(read_idx(folder, "train-images-idx3-ubyte").copy())
        y = torch.from_numpy(read_idx(folder, "train-labels-idx1-ubyte").copy())
    else:
        from torchvision.datasets import MNIST
        data = MNIST(Path(torch.hub.get_dir()) / "mnist", download=True)
        x, y = data.data, data.targets
    return x[:, None].float() / 127.5 - 1, y.long()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mnist", type=expanded, metavar="DIR",
                        help="folder with the IDX files (default: download)")
    parser.add_argument("--out", type=expanded, default=Path("assets/teacher-mnist.pt"))
    parser.add_argument("--init", type=expanded, metavar="F",
                        help="go on from these weights, with a fresh schedule")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak: 200 steps of warm-up, then down to 0")
    parser.add_argument("--size", type=int, nargs=3, default=[6, 128, 4], metavar=("DEPTH", "WIDTH", "HEADS"))
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast, where it is fast")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.init and args.init.resolve() == args.out.resolve():
        parser.error(f"--init {args.init}: would be overwritten; give another --out")

    torch.manual_seed(0)
    x, y = (a.to(args.device) for a in load_mnist(args.mnist))
    depth, width, heads = args.size
    net, ema = (sit.SiT((1, 28, 28), depth, width, heads, 4, 10).to(args.device) for _ in range(2))
    if args.init:
        net.load_state_dict(sit.load(args.init)[0].state_dict())
    ema.load_state_dict(net.state_dict())
    ema.requires_grad_(False)
    if args.compile:
        for block in net.blocks:
            block.compile(dynamic=False)
    opt = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    start, recent = time.time(), []
    for step in tqdm(range(args.steps), mininterval=5):
        for group in opt.param_groups:
            group["lr"] = args.lr * min((step + 1) / 200, (args.steps - step) / max(1, args.steps - 200))
        i = torch.randint(len(x), (args.batch,), device=args.device)
        dropped = torch.rand(args.batch, device=args.device) < 0.1      # 10 % of the rows teach label ∅
        label = torch.where(dropped, 10, y[i])
        n = torch.randn_like(x[i])
        t = torch.rand(args.batch, device=args.device)                  # t = 1 is noise
        x_t = (1 - t).view(-1, 1, 1, 1) * x[i] + t.view(-1, 1, 1, 1) * n
        # With 49 tokens plain attention beats the fused kernels (1.6 times a step in bf16 on a CPU).
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16), sdpa_kernel(SDPBackend.MATH):
            u = net(x_t, t, label)                                      # towards data
        loss = (u - (x[i] - n)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        decay = min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in net.parameters()], 1 - decay)
        recent.append(loss.item())
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            tqdm.write(f"step {step + 1}: loss {np.mean(recent[-500:]):.4f}, {time.time() - start:.0f} s")
            # The config holds the convention: SiT's, in which the weights see 1 - t.
            sit.write(args.out, partial(torch.save, {"ema": ema.state_dict(), "config": ema.config}))


if __name__ == "__main__":
    main()
