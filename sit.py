# SPDX-License-Identifier: MIT
"""SiT, the transformer of teacher, student and online network; the decoder of its latents; the files
that hold their weights.

The network is the Scalable Interpolant Transformer (Ma et al., arXiv 2401.08740), which has DiT's
architecture (arXiv 2212.09748). Names and shapes are those of the released files. `SiT(x, t, y)` is a
velocity in the time and direction of fmd.py: t = 1 is noise, t = 0 is data, and the velocity points to
data. Released files differ in this; see `convention`. Two optional inputs make a student or an online
network of a teacher, as in the released FreeFlow weights: the duration `delta` and the guidance
strength `gamma`. The last layers of their embedders are zero-initialised, so that the network starts
as the teacher.

Shapes: B batch, C channels (C' after a change), H W height, width, p patch side, T tokens, D width.
"""

import argparse
import contextlib
import hashlib
import math
import os
import re
import uuid
import zipfile
from collections import OrderedDict
from functools import partial
from http.client import HTTPException
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as nnf
from torch.autograd.forward_ad import make_dual, unpack_dual
from torch.utils.checkpoint import checkpoint

# (depth, width, heads); SiT-XL/2 is size XL with patch 2. T is ours, for MNIST.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16),
         "T": (6, 128, 4)}


class Linear(nn.Linear):
    """nn.Linear, with two products instead of three where fmd.duration_derivative differentiates it. Its
    x then carries a derivative x'. torch computes W x, W x' and W' x, although W' is zero."""
    def forward(self, x):
        x, x_dot = unpack_dual(x)
        out = nnf.linear(x, self.weight, self.bias)
        return out if x_dot is None else make_dual(out, nnf.linear(x_dot, self.weight))


# ---- Embeddings ----------------------------------------------------------------------------------
def sinusoids(t, dim=256, max_period=10000):
    """(B,) -> (B, dim): cos(t w_k), then sin(t w_k), with w_k from 1 down to 1/max_period."""
    k = torch.arange(dim // 2, device=t.device, dtype=torch.float32)
    freqs = torch.exp(-math.log(max_period) / (dim // 2) * k)
    args = t.float()[:, None] * freqs                   # (B, dim/2)
    return torch.cat([args.cos(), args.sin()], dim=1)   # (B, dim)


def position_table(width, rows, cols):
    """(1, rows*cols, width): fixed 2-D sin-cos positions, tokens row by row. The first half of the
    width encodes the column, the second the row, as in the DiT and MAE code."""
    freqs = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    x, y = col.reshape(-1, 1) * freqs, row.reshape(-1, 1) * freqs       # each (T, width/4)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()[None]


class ScalarEmbedder(nn.Module):
    """(B,) -> (B, D): 256 sinusoids through a two-layer MLP. Embeds t, δ and γ."""
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(Linear(256, width), nn.SiLU(), Linear(width, width))

    def forward(self, t):
        return self.mlp(sinusoids(t).to(self.mlp[0].weight.dtype))


def named(**layers):
    """Layers in sequence under the names of the released files."""
    return nn.Sequential(OrderedDict(layers))


# ---- Transformer ---------------------------------------------------------------------------------
def modulate(x, shift, scale):
    """adaLN: x (B, T, D) scaled and shifted by per-sample vectors (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x):
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                      # 3 x (B, heads, T, D/heads)
        x = nnf.scaled_dot_product_attention(q, k, v)             # (B, heads, T, D/heads)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))      # (B, T, D)


class Block(nn.Module):
    """adaLN-Zero block: shifts, scales and gates of attention and MLP come from the conditioning."""
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = named(fc1=Linear(width, 4 * width), act=nn.GELU(approximate="tanh"),
                         fc2=Linear(4 * width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))

    def forward(self, x, c):
        modulation = self.adaLN_modulation(c)                           # (B, 6 D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
        h = self.attn(modulate(self.norm1(x), shift1, scale1))          # (B, T, D)
        x = x + gate1[:, None] * h
        h = self.mlp(modulate(self.norm2(x), shift2, scale2))           # (B, T, D)
        return x + gate2[:, None] * h


class FinalLayer(nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)         # each (B, D)
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (B, T, p*p*C')


class SiT(nn.Module):
    """SiT(x, t, y[, delta][, gamma]) -> the velocity towards data at time t, like x.

    shape: (C, H, W) of the input. classes: the number of labels without the null class. learn_sigma:
    the read-out has 2C channels, and the first C are returned (SiT's files; not REPA's; a student
    keeps its teacher's). delta, gamma: add that input. convention: the clock and sign that the weights
    were trained with. "sit": their time is 1 - t, their output points to data; "repa": their time is
    t, their output points to noise."""
    def __init__(self, shape, depth, width, heads, patch, classes, learn_sigma=False, delta=False,
                 gamma=False, convention="sit"):
        super().__init__()
        channels, rows, cols = shape
        self.config = dict(shape=list(shape), depth=depth, width=width, heads=heads, patch=patch,
                           classes=classes, learn_sigma=learn_sigma, delta=delta, gamma=gamma,
                           convention=convention)
        self.x_embedder = named(proj=nn.Conv2d(channels, width, kernel_size=patch, stride=patch))
        positions = position_table(width, rows // patch, cols // patch)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.t_embedder = ScalarEmbedder(width)
        self.y_embedder = named(embedding_table=nn.Embedding(classes + 1, width))   # the last is ∅
        self.dt_embedder = ScalarEmbedder(width) if delta else None     # FreeFlow's names
        self.gw_embedder = ScalarEmbedder(width) if gamma else None
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch * patch * channels * (1 + learn_sigma))
        self.checkpointing = False      # True: recompute each block in the backward pass
        self.initialize()

    def initialize(self):
        """DiT's: gates and read-out start at zero, so that every block starts as the identity."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.config["width"], -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        zero = [self.final_layer.linear]
        for layer in (*self.blocks, self.final_layer):
            zero.append(layer.adaLN_modulation[1])
        for embedder in filter(None, (self.t_embedder, self.dt_embedder, self.gw_embedder)):
            nn.init.normal_(embedder.mlp[0].weight, std=0.02)
            nn.init.normal_(embedder.mlp[2].weight, std=0.02)
            if embedder is not self.t_embedder:     # FreeFlow: the added ones start at zero
                zero.append(embedder.mlp[2])
        for m in zero:
            nn.init.zeros_(m.weight)

    def forward(self, x, t, y, delta=None, gamma=None):
        """x (B, C, H, W); t, delta, gamma (B,) float; y (B,) int64 in [0, classes], the last being ∅."""
        repa = self.config["convention"] == "repa"
        c = self.t_embedder(t if repa else 1 - t)               # (B, D)
        c = c + self.y_embedder(y)                              # (B, D)
        if self.dt_embedder is not None:
            c = c + self.dt_embedder(delta)                     # (B, D)
        if self.gw_embedder is not None:
            c = c + self.gw_embedder(gamma)                     # (B, D)
        h = self.x_embedder(x)                                  # (B, D, H/p, W/p)
        h = h.flatten(2).transpose(1, 2) + self.pos_embed       # (B, T, D), tokens row by row
        for block in self.blocks:                               # (B, T, D)
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, c, use_reentrant=False)
            else:
                h = block(h, c)
        h = self.final_layer(h, c)                              # (B, T, p*p*C')
        (C, H, W), p = self.config["shape"], self.config["patch"]
        h = h.unflatten(2, (p, p, -1))                          # (B, T, p, p, C')
        h = h.unflatten(1, (H // p, W // p))                    # (B, H/p, W/p, p, p, C')
        h = h.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)    # (B, C', H, W)
        velocity = (-h if repa else h)[:, :C]                   # (B, C, H, W)
        return velocity.to(x.dtype)                             # autocast may compute in bfloat16


def start_from(net, **inputs):
    """A trainable copy of the network with added inputs, whose embedders give 0 at first."""
    new = SiT(**net.config | inputs)
    new.load_state_dict(new.state_dict() | net.state_dict())    # the new embedders keep theirs
    return new.to(net.pos_embed.device)


# ---- SD-VAE decoder: latents to pixels (Rombach et al., arXiv 2112.10752) ------------------------
# Parameter names are those of diffusers' AutoencoderKL. Its encoder is not needed here.
SCALE = 0.18215                         # SiT's latents are the VAE's times this
VAE_WIDTHS = (512, 512, 256, 128)       # channels by level, from latents to pixels
group_norm = partial(nn.GroupNorm, 32, eps=1e-6)
conv3 = partial(nn.Conv2d, kernel_size=3, padding=1)


class ResBlock(nn.Module):
    """(B, C, H, W) -> (B, C', H, W). Where C' differs from C, a 1x1 convolution maps the input."""
    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm1, self.conv1 = group_norm(inputs), conv3(inputs, outputs)
        self.norm2, self.conv2 = group_norm(outputs), conv3(outputs, outputs)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x):
        h = self.conv1(nnf.silu(self.norm1(x)))     # (B, C', H, W)
        h = self.conv2(nnf.silu(self.norm2(h)))     # (B, C', H, W)
        return self.conv_shortcut(x) + h            # (B, C', H, W)


class PixelAttention(nn.Module):
    """(B, C, H, W) -> (B, C, H, W): one head of attention among all pixels, added to the input."""
    def __init__(self, channels):
        super().__init__()
        self.group_norm = group_norm(channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        h = self.group_norm(x).flatten(2).mT[:, None]                   # (B, 1, HW, C)
        q, k, v = self.to_q(h), self.to_k(h), self.to_v(h)
        h = nnf.scaled_dot_product_attention(q, k, v)                   # (B, 1, HW, C)
        return x + self.to_out[0](h).mT.reshape(x.shape)                # (B, C, H, W)


class Decoder(nn.Module):
    """SiT's latents (B, 4, H, W) -> images (B, 3, 8H, 8W), about in [-1, 1]. widths: channels by
    level. Every level except the last doubles the side."""
    def __init__(self, widths=VAE_WIDTHS):
        super().__init__()
        self.post_quant_conv = nn.Conv2d(4, 4, 1)
        d = self.decoder = nn.Module()      # a prefix of the parameters' names
        d.conv_in = conv3(4, widths[0])
        d.mid_block = nn.Module()
        d.mid_block.resnets = nn.ModuleList(ResBlock(widths[0], widths[0]) for _ in range(2))
        d.mid_block.attentions = nn.ModuleList([PixelAttention(widths[0])])
        d.up_blocks = nn.ModuleList(nn.Module() for _ in widths)
        for level, width, before in zip(d.up_blocks, widths, (widths[0], *widths)):
            level.resnets = nn.ModuleList(ResBlock(c, width) for c in (before, width, width))
            level.upsamplers = nn.ModuleList()
            if level is not d.up_blocks[-1]:
                level.upsamplers.append(named(up=nn.Upsample(scale_factor=2), conv=conv3(width, width)))
        d.conv_norm_out, d.conv_out = group_norm(widths[-1]), conv3(widths[-1], 3)

    def forward(self, latents):
        d = self.decoder
        h = d.conv_in(self.post_quant_conv(latents / SCALE))            # (B, C, H, W)
        first, second = d.mid_block.resnets
        h = second(d.mid_block.attentions[0](first(h)))                 # (B, C, H, W)
        for level in d.up_blocks:
            for layer in (*level.resnets, *level.upsamplers):
                h = layer(h)            # three times (B, C', H, W), then (B, C', 2H, 2W)
        return d.conv_out(nnf.silu(d.conv_norm_out(h)))                 # (B, 3, 8H, 8W)


def to_uint8(x, decoder=None):
    """Pixels in [-1, 1], or latents (N, C, H, W) -> (N, H, W, C) uint8, rounded like DiT's."""
    if decoder is not None:
        x = torch.cat([decoder(part) for part in x.split(8)])
    return (127.5 * x + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().cpu()


# ---- Files: the layouts of the released weights, read and written --------------------------------
# Of images of 256 x 256 where the name gives no side. Sources: issue 42 of SiT's repository, REPA's
# utils.py, commit 88a8120 of FreeFlow's files.
HUB = "https://huggingface.co/"
SIT_FILES = HUB + "nyu-visionx/SiT-collections/resolve/main/"
RELEASED = {
    **{f"SiT-{size}/2": f"{SIT_FILES}SiT-{size}-2-256.pt" for size in ("S", "B", "L", "XL")},
    "SiT-XL/2-512": SIT_FILES + "SiT-XL-2-512.pt",
    "SiT-XL/2-REPA": "https://www.dl.dropboxusercontent.com/scl/fi/cxedbs4da5ugjq5wg3zrg/last.pt"
                     "?rlkey=8otgrdkno0nd89po3dpwngwcc&st=apcc645o&dl=0",
    "FreeFlow-XL/2-512": HUB + "nyu-visionx/FreeFlow/resolve/main/FreeFlow_512.pt",
    "sd-vae-ft-ema": HUB + "stabilityai/sd-vae-ft-ema/resolve/main/diffusion_pytorch_model.bin",
    "sd-vae-ft-mse": HUB + "stabilityai/sd-vae-ft-mse/resolve/main/diffusion_pytorch_model.bin",
}


class FileError(ValueError):
    """A file cannot be used. The message is one line, with the file and the reason."""


@contextlib.contextmanager
def usable(path, kind):
    """Turns whatever a file of another kind raises into a FileError."""
    try:
        yield
    except FileError:
        raise
    except Exception as e:
        raise FileError(f"{path}: not {kind} ({reason(e)})") from None


def reason(e):
    """An exception in one line."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"


def fetch(source):
    """A path (from the working folder or this file's), a name of RELEASED or a URL -> a local path. The
    last two are downloaded once, to torch hub's cache, and kept if they can be read. FileError has the
    URL and the file's place."""
    for path in (Path(source), Path(__file__).parent / source):
        if path.is_file():
            return path
    url = RELEASED.get(str(source), str(source))
    if "://" not in url:
        raise FileError(f"{source}: no such file, nor a released one ({', '.join(RELEASED)})")
    name = f"{str(source).replace('/', '-')}.pt"
    if source not in RELEASED:      # many files are called last.pt
        digest = hashlib.sha256(url.encode()).hexdigest()[:8]
        name = f"{digest}-{Path(url.split('?')[0]).name}"
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if not path.exists():
        part = path.with_name(f"{name}.{uuid.uuid4().hex}.part")    # others may download it, too
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(part))
            read_file(part)         # a server that stops early raises nothing
            part.replace(path)
        except (OSError, HTTPException, ValueError) as e:
            part.unlink(missing_ok=True)
            raise FileError(f"{source}: cannot download {url} ({reason(e)}); "
                            f"put the file at {path}") from None
    return path


def read_file(path, mapped=False):
    """torch.load that runs nothing from the file. The tensors are copies in memory, so that a file may
    be overwritten while it is in use. mapped: they stay in the file until they are read, and no checksum
    is compared; a checkpoint of many GB is then not read by each process of a machine. Raises FileError."""
    if not Path(path).is_file():
        raise FileError(f"{path}: no such file")
    with open(path, "rb") as file:
        start = file.read(16)
    try:
        whole = zipfile.is_zipfile(path)
        if not whole and start[:1] != b"\x80":          # nor torch's older format
            raise ValueError("it ends early" if start[:2] == b"PK" else "neither zip nor pickle")
        if whole and not mapped and zipfile.ZipFile(path).testzip():
            raise ValueError("damaged: a checksum is wrong")            # torch.load compares none
        with torch.serialization.safe_globals([argparse.Namespace]):    # SiT saves its flags
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as e:      # a damaged zip or pickle raises a dozen types
        found = re.search(r"GLOBAL (\S+)", str(e))      # torch has it behind a page of advice
        cause = f"it holds a Python object, {found[1]}; save tensors alone" if found else reason(e)
        raise FileError(f"{path}: not a checkpoint ({cause}; the file starts with {start})") from None


def write(path, save):
    """Write a file whole or not at all: save(file) into a temporary beside it, fsync, rename. Raises
    OSError with the path."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as e:       # torch.save makes one of an OSError
        raise OSError(f"cannot write {path}: {e.__context__ or e}") from None
    finally:
        temporary.unlink(missing_ok=True)


# FreeFlow's files name the scalar embedders' MLPs `projs` where SiT's say `mlp`. The first SD-VAE files
# name the attention's linear maps as below.
FREEFLOW_NAMES = {f"{e}_embedder.projs.": f"{e}_embedder.mlp." for e in ("t", "dt", "gw")}
ATTENTION = "decoder.mid_block.attentions.0."
OLD_VAE_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_VAE_NAMES = {f"{ATTENTION}{old}.": f"{ATTENTION}{new}." for old, new in OLD_VAE_NAMES.items()}


def rename(state, prefixes):
    """A state dict with old prefixes of its keys replaced; prefixes: {old: new}."""
    for old, new in prefixes.items():
        state = {new + key.removeprefix(old) if key.startswith(old) else key: value
                 for key, value in state.items()}
    return state


def released_names(state):
    """A student's state dict in the names of the released FreeFlow files."""
    return rename(state, {ours: theirs for theirs, ours in FREEFLOW_NAMES.items()})


def our_names(state):
    """A state dict of teacher or student, as it was saved -> in the names of SiT above, without REPA's
    training heads. Prefixes of wrappers, such as DDP's `module.`, are removed. Raises ValueError."""
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}     # torch.compile's
    first = "x_embedder.proj.weight"
    prefixes = [key.removesuffix(first) for key in state if key.endswith(first)]
    if len(prefixes) != 1:
        raise ValueError(f"one key should end in {first}, {len(prefixes)} do: {list(state)[:3]}")
    state = rename(state, {prefixes[0]: ""})
    state = rename(state, FREEFLOW_NAMES)
    return {k: v for k, v in state.items() if not k.startswith("projectors.")}


def fill(net, state):
    """Give `net`, built on the meta device, these weights in float32 and freeze it. Raises ValueError
    where names or shapes differ, or a value is not finite."""
    ours = net.state_dict()
    missing = [k for k in ours if k not in state]
    unexpected = [k for k in state if k not in ours]
    if missing or unexpected:
        raise ValueError(f"{len(missing)} keys are missing {missing[:3]}, "
                         f"{len(unexpected)} unexpected {unexpected[:3]}")
    net.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
    for name, value in net.state_dict().items():
        if not value.isfinite().all():
            raise ValueError(f"{name} is not finite")
    return net.requires_grad_(False)


def from_state_dict(state, heads=None, convention="sit"):
    """A SiT with these weights, in the names of SiT or FreeFlow. The shapes give its size; the named
    size of the same depth and width gives `heads` None. Raises ValueError, KeyError."""
    state = our_names(state)
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    if "pos_embed" not in state:
        raise ValueError("pos_embed is missing, the fixed table of positions, which tells the image's side; "
                         "save the whole state dict, not the trainable parameters alone")
    side = math.isqrt(state["pos_embed"].shape[1]) * patch
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    classes = len(state["y_embedder.embedding_table.weight"]) - 1
    learn_sigma = len(state["final_layer.linear.weight"]) == 2 * channels * patch ** 2
    heads = heads or {size[:2]: size[2] for size in SIZES.values()}.get((depth, width))
    if not heads:
        raise ValueError(f"no named size has depth {depth} and width {width}, so the number of heads is "
                         'unknown: put {"config": {"heads": N}} into the file, or call sit.load(heads=N)')
    if heads < 1 or width % heads or classes < 1:
        raise ValueError(f"{heads} heads and {classes} classes at width {width}")
    with torch.device("meta"):
        net = SiT((channels, side, side), depth, width, heads, patch, classes, learn_sigma,
                  "dt_embedder.mlp.0.weight" in state, "gw_embedder.mlp.0.weight" in state, convention)
    return fill(net, state)


def find_convention(path, file, state):
    """-> "sit" or "repa", and why, from a file's path and content and the state dict in it."""
    stated = (file | file.get("config", {})).get("convention")
    if stated:
        return stated, "stated in the file"
    if any("projectors." in key for key in state):
        return "repa", "the file has REPA's projectors"
    if re.search(r"(?<![a-z])repa(?![a-z])", Path(path).name.lower()):
        return "repa", "REPA is a word of the file's name"      # the rule of FreeFlow's sampler
    return "sit", "nothing in the file or its name says REPA"


def load(path, heads=None, convention=None):
    """A file -> a SiT; and what the file holds beside its weights, with `why` it has its convention. The
    file is a raw state dict or, as ours and SiT's, {"ema": state dict, ...}; "model" or "state_dict"
    may stand for "ema". Raises FileError."""
    file, why = read_file(path), "asked for"
    with usable(path, "a SiT"):
        entries = [file[k] for k in ("ema", "model", "state_dict") if isinstance(file.get(k), dict)]
        state = entries[0] if entries else file
        if convention is None:
            convention, why = find_convention(path, file, state)
        if convention not in ("sit", "repa"):
            raise ValueError(f"convention {convention} is neither sit nor repa")
        net = from_state_dict(state, heads or file.get("config", {}).get("heads"), convention)
        flags = file.get("args")
        flags = flags if isinstance(flags, dict) else getattr(flags, "__dict__", {})
        if flags.get("num_classes") == net.config["classes"] + 1:
            raise ValueError("no null class: trained without label dropout, it cannot be guided")
        for flag, known in (("path_type", "linear"), ("prediction", "velocity")):   # REPA's: "v"
            if not known.startswith(str(flags.get(flag) or known).lower()):
                raise ValueError(f"trained with --{flag.replace('_', '-')} {flags[flag]}: only {known} is "
                                 "a teacher here")
        info = {k: v for k, v in file.items() if entries and v is not state}
        return net, info | {"why": why}


def load_decoder(path, widths=VAE_WIDTHS):
    """The Decoder from a file of diffusers' AutoencoderKL (.bin or .pt), without `encoder.*` and
    `quant_conv.*`. Raises FileError."""
    file = read_file(path)
    with usable(path, "an SD-VAE decoder"):
        state = {k: v for k, v in rename(file, OLD_VAE_NAMES).items()
                 if not k.startswith(("encoder.", "quant_conv."))}
        for key, value in state.items():    # in the oldest files these are 1x1 convolutions
            if key.startswith(ATTENTION) and value.ndim == 4:
                state[key] = value.flatten(1)
        with torch.device("meta"):
            net = Decoder(widths)
        return fill(net, state)
