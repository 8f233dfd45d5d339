# SPDX-License-Identifier: MIT
"""SiT, the transformer that teacher, student and online network share; the decoder that makes images of its
latents; the files their weights come in.

The network is the Scalable Interpolant Transformer (Ma et al., arXiv 2401.08740), that is DiT's (Peebles and
Xie, arXiv 2212.09748): patches, adaLN-Zero blocks, a linear read-out. Parameter names and shapes are those of
the released files. This file knows nothing of flow maps and holds no convention of time or sign: it maps (x,
t, y) to an array like x, and fmd.py says what t and the output mean (`CONVENTIONS` there).

Two optional inputs turn a teacher into the other two networks of the method, with the embedders the FreeFlow
release adds: `dt` (the integration duration δ) and `gw` (the guidance strength γ). Both are summed into the
conditioning. Their last layers start at zero, so a network started from a teacher's weights starts out as
that teacher.

Letters in shape comments: B batch, C channels (C' after a layer that changes them), H W height and width, p
patch, T = HW/p² tokens, D width.
"""

import argparse
import hashlib
import math
import zipfile
from collections import OrderedDict
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# Named sizes (depth, width, heads) of DiT and SiT; "SiT-XL/2" is size XL with patch 2. T is ours: the bundled
# teacher.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16), "T": (6, 128, 4)}


# -----------------------------------------------------------------------------------------------------------
# Embeddings
# -----------------------------------------------------------------------------------------------------------

def sinusoids(t, dim=256, max_period=10000):
    """(B,) -> (B, dim): cos(t w_k) then sin(t w_k), w_k from 1 down to 1/max_period. t is not scaled."""
    k = torch.arange(dim // 2, device=t.device, dtype=torch.float32)
    freqs = torch.exp(-math.log(max_period) / (dim // 2) * k)
    args = t.float()[:, None] * freqs                   # (B, dim/2)
    return torch.cat([args.cos(), args.sin()], dim=1)   # (B, dim)


def position_table(width, rows, cols):
    """(1, rows*cols, width): fixed 2-D sin-cos positions, tokens row by row. Half the width encodes the
    column, half the row, in that order: the DiT and MAE code puts w first."""
    freqs = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    args = [axis.reshape(-1, 1) * freqs for axis in (col, row)]                    # 2 x (T, width/4)
    return torch.cat([f(a) for a in args for f in (torch.sin, torch.cos)], dim=1).float()[None]


class ScalarEmbedder(nn.Module):
    """(B,) -> (B, D): 256 sinusoids through a two-layer MLP. Embeds t, δ and γ."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        return self.mlp(sinusoids(t).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """(B,) int64 -> (B, D). Row `classes` is the null class ∅. For label dropout the caller passes ∅."""

    def __init__(self, classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, y):
        return self.embedding_table(y)


class PatchEmbedder(nn.Module):
    """(B, C, H, W) -> (B, T, D): one linear map per p x p patch, tokens row by row."""

    def __init__(self, channels, patch, width):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


# -----------------------------------------------------------------------------------------------------------
# Transformer
# -----------------------------------------------------------------------------------------------------------

def modulate(x, shift, scale):
    """adaLN: x (B, T, D) scaled and shifted by per-sample vectors (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                      # 3 x (B, heads, T, D/heads)
        x = F.scaled_dot_product_attention(q, k, v)               # (B, heads, T, D/heads)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))      # (B, T, D)


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """adaLN-Zero block: attention and MLP, with shifts, scales and gates made from the conditioning."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)  # each (B, D)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))                # (B, T, D)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))              # (B, T, D)


class FinalLayer(nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)                                  # each (B, D)
        return self.linear(modulate(self.norm_final(x), shift, scale))                        # (B, T, p*p*C')


class SiT(nn.Module):
    """SiT(x, t, y[, dt][, gw]) -> array like x.

    depth, width, heads: the transformer; patch: side of a patch; channels, height, width of the input:
    `shape`; classes: number of labels, the null class not counted; learn_sigma: 2C output channels, of which
    the first C are returned (the published SiT files have them, REPA's and students do not); dt, gw: add that
    embedder."""

    def __init__(self, shape, depth, width, heads, patch, classes, learn_sigma=False, dt=False, gw=False):
        super().__init__()
        channels, rows, cols = shape
        self.config = dict(shape=list(shape), depth=depth, width=width, heads=heads, patch=patch,
                           classes=classes, learn_sigma=learn_sigma, dt=dt, gw=gw)
        self.x_embedder = PatchEmbedder(channels, patch, width)
        positions = position_table(width, rows // patch, cols // patch)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.t_embedder = ScalarEmbedder(width)
        self.y_embedder = LabelEmbedder(classes, width)
        self.dt_embedder = ScalarEmbedder(width) if dt else None
        self.gw_embedder = ScalarEmbedder(width) if gw else None
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch * patch * channels * (1 + learn_sigma))
        self.checkpointing = False          # True: save memory, run each block again in the backward pass
        self.initialize()

    def initialize(self):
        """DiT's initialisation. Gates and read-out start at zero, so every block starts as the identity."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.config["width"], -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for embedder in filter(None, (self.t_embedder, self.dt_embedder, self.gw_embedder)):
            nn.init.normal_(embedder.mlp[0].weight, std=0.02)
            nn.init.normal_(embedder.mlp[2].weight, std=0.02)
        # FreeFlow: the two added embedders say nothing at first, so a student starts as its teacher
        zero = [e.mlp[2] for e in (self.dt_embedder, self.gw_embedder) if e is not None]
        zero += [b.adaLN_modulation[1] for b in self.blocks]
        for m in zero + [self.final_layer.adaLN_modulation[1], self.final_layer.linear]:
            nn.init.zeros_(m.weight)
            nn.init.zeros_(m.bias)

    def forward(self, x, t, y, dt=None, gw=None):
        """x (B, C, H, W); t, dt, gw (B,) float; y (B,) int64 in [0, classes], `classes` being ∅."""
        c = self.t_embedder(t) + self.y_embedder(y)             # (B, D)
        if self.dt_embedder is not None:
            c = c + self.dt_embedder(dt)                        # (B, D)
        if self.gw_embedder is not None:
            c = c + self.gw_embedder(gw)                        # (B, D)
        h = self.x_embedder(x) + self.pos_embed                 # (B, T, D)
        recompute = self.checkpointing and torch.is_grad_enabled()
        for block in self.blocks:                               # (B, T, D)
            h = checkpoint(block, h, c, use_reentrant=False) if recompute else block(h, c)
        h = self.final_layer(h, c)                              # (B, T, p*p*C')
        h = self.unpatchify(h)                                  # (B, C', H, W)
        return h[:, :self.config["shape"][0]]                   # (B, C, H, W)

    def unpatchify(self, h):
        """(B, T, p*p*C') -> (B, C', H, W); within a token the order is row, column, channel."""
        _, rows, cols = self.config["shape"]
        p = self.config["patch"]
        h = h.view(len(h), rows // p, cols // p, p, p, -1)      # (B, H/p, W/p, p, p, C')
        return h.permute(0, 5, 1, 3, 2, 4).reshape(len(h), -1, rows, cols)


# -----------------------------------------------------------------------------------------------------------
# SD-VAE decoder: latents to pixels (Rombach et al., arXiv 2112.10752, with the weights of sd-vae-ft-ema or
# -mse). Parameter names are those of diffusers' AutoencoderKL; its encoder is not needed here.
# -----------------------------------------------------------------------------------------------------------

SCALE = 0.18215                         # SiT's latents are the VAE's times this: about unit variance
VAE_WIDTHS = (512, 512, 256, 128)       # channels by level, from latents to pixels


def group_norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


def conv3(inputs, outputs):
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)


class ResBlock(nn.Module):
    """(B, C, H, W) -> (B, C', H, W). The input is added, through a 1x1 convolution where C' is not C."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm1, self.conv1 = group_norm(inputs), conv3(inputs, outputs)
        self.norm2, self.conv2 = group_norm(outputs), conv3(outputs, outputs)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))       # (B, C', H, W)
        h = self.conv2(F.silu(self.norm2(h)))       # (B, C', H, W)
        return self.conv_shortcut(x) + h            # (B, C', H, W)


class PixelAttention(nn.Module):
    """(B, C, H, W) -> (B, C, H, W): one head of attention among all pixels, added to the input."""

    def __init__(self, channels):
        super().__init__()
        self.group_norm = group_norm(channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        h = self.group_norm(x).flatten(2).mT[:, None]                                     # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))      # (B, 1, HW, C)
        return x + self.to_out[0](h).mT.reshape(x.shape)                                  # (B, C, H, W)


class Decoder(nn.Module):
    """Latents as SiT makes them (it divides by SCALE itself) -> images, about in [-1, 1]: (B, 4, H, W) ->
    (B, 3, 8H, 8W). widths: channels by level; every level but the last doubles the side."""

    def __init__(self, widths=VAE_WIDTHS):
        super().__init__()
        self.post_quant_conv = nn.Conv2d(4, 4, 1)
        d = self.decoder = nn.Module()      # bare modules: prefixes of the parameters' names, here decoder.
        d.conv_in = conv3(4, widths[0])
        d.mid_block = nn.Module()
        d.mid_block.resnets = nn.ModuleList(ResBlock(widths[0], widths[0]) for _ in range(2))
        d.mid_block.attentions = nn.ModuleList([PixelAttention(widths[0])])
        d.up_blocks = nn.ModuleList(nn.Module() for _ in widths)
        for level, width, before in zip(d.up_blocks, widths, (widths[0], *widths)):
            level.resnets = nn.ModuleList(ResBlock(c, width) for c in (before, width, width))
            double = OrderedDict(up=nn.Upsample(scale_factor=2), conv=conv3(width, width))
            level.upsamplers = nn.ModuleList([nn.Sequential(double)] if level is not d.up_blocks[-1] else [])
        d.conv_norm_out, d.conv_out = group_norm(widths[-1]), conv3(widths[-1], 3)

    def forward(self, latents):
        d = self.decoder
        h = d.conv_in(self.post_quant_conv(latents / SCALE))                        # (B, C, H, W)
        first, second = d.mid_block.resnets
        h = second(d.mid_block.attentions[0](first(h)))                             # (B, C, H, W)
        for level in d.up_blocks:
            for block in (*level.resnets, *level.upsamplers):
                h = block(h)                        # three times (B, C', H, W), then (B, C', 2H, 2W)
        return d.conv_out(F.silu(d.conv_norm_out(h)))                               # (B, 3, 8H, 8W)


# -----------------------------------------------------------------------------------------------------------
# Files: what the released checkpoints look like, read and written
# -----------------------------------------------------------------------------------------------------------

# For 256 x 256 pixels where the name says no side. Sources: issue 42 of SiT's repository (where its files are
# now), REPA's utils.py, commit 88a8120 of FreeFlow's files.
HUB = "https://huggingface.co/"
RELEASED = {
    "SiT-S/2": HUB + "nyu-visionx/SiT-collections/resolve/main/SiT-S-2-256.pt",
    "SiT-B/2": HUB + "nyu-visionx/SiT-collections/resolve/main/SiT-B-2-256.pt",
    "SiT-L/2": HUB + "nyu-visionx/SiT-collections/resolve/main/SiT-L-2-256.pt",
    "SiT-XL/2": HUB + "nyu-visionx/SiT-collections/resolve/main/SiT-XL-2-256.pt",
    "SiT-XL/2-512": HUB + "nyu-visionx/SiT-collections/resolve/main/SiT-XL-2-512.pt",
    "SiT-XL/2-REPA": "https://www.dl.dropboxusercontent.com/scl/fi/cxedbs4da5ugjq5wg3zrg/last.pt"
                     "?rlkey=8otgrdkno0nd89po3dpwngwcc&st=apcc645o&dl=0",
    "FreeFlow-XL/2-512": HUB + "nyu-visionx/FreeFlow/resolve/main/FreeFlow_512.pt",
    "sd-vae-ft-ema": HUB + "stabilityai/sd-vae-ft-ema/resolve/main/diffusion_pytorch_model.bin",
    "sd-vae-ft-mse": HUB + "stabilityai/sd-vae-ft-mse/resolve/main/diffusion_pytorch_model.bin",
}


def fetch(source):
    """A local path for a file's path (returned as it is), a name in RELEASED or a URL. The last two are
    downloaded once, with a progress bar, into torch hub's cache, where they appear whole or not at all. Of
    many processes, let one call it first. Raises ValueError, in one line with the URL and the place for the
    file."""
    if Path(source).is_file():
        return Path(source)
    url = RELEASED.get(source, str(source))
    if "://" not in url:
        raise ValueError(f"{source}: no such file, nor a released one ({', '.join(RELEASED)})")
    # many files are a last.pt somewhere: kept under the name above, else with their URL's digest
    file = Path(urlsplit(url).path)
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    name = source.replace("/", "-") + file.suffix if source in RELEASED else f"{digest}-{file.name}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path))          # to a temporary beside it, then moved
            if not zipfile.is_zipfile(path):    # torch.hub does not notice a connection that ended early
                path.unlink()
                raise OSError("what came is cut short or no checkpoint")
    except (OSError, HTTPException, ValueError) as e:
        raise ValueError(f"{source}: cannot download {url} ({reason(e)}); put the file at {path}") from None
    return path


# The FreeFlow release names the scalar embedders' MLPs `projs` where SiT's files say `mlp`; the first SD-VAE
# files name the attention's maps as below, where diffusers now says to_q, to_k, to_v and to_out.0.
NAMES = [(f"{e}_embedder.projs.", f"{e}_embedder.mlp.") for e in ("t", "dt", "gw")]
ATTENTION = "decoder.mid_block.attentions.0."
OLD_NAMES = [(f"{ATTENTION}{old}.", f"{ATTENTION}{new}.") for old, new in
             (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))]


def rename(state, pairs):
    """A state dict with each key that starts with the first name of a pair given the second."""
    def new(key):
        return next((key.replace(a, b, 1) for a, b in pairs if key.startswith(a)), key)
    return {new(key): value for key, value in state.items()}


def released_names(state):
    """Our state dict -> the names of the released file: teachers as in SiT's, students as in FreeFlow's."""
    student = any(key.startswith("dt_embedder.") for key in state)
    return rename(state, [(ours, theirs) for theirs, ours in NAMES]) if student else dict(state)


def reason(e):
    """An exception in one line."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:150]}"


def verify(want, state):
    """That a dict of tensors has the names and shapes of another, holds floats, and these are finite. Raises
    ValueError, in one line."""
    missing, unexpected = sorted(want.keys() - state.keys()), sorted(state.keys() - want.keys())
    kinds = [k for k, v in state.items() if not (torch.is_tensor(v) and v.is_floating_point())]
    shapes = [f"{k} {tuple(state[k].shape)} for {tuple(v.shape)}" for k, v in want.items()
              if k in state and k not in kinds and state[k].shape != v.shape]
    if missing or unexpected or kinds or shapes:
        raise ValueError(f"weights do not fit: missing {missing[:3]}, unexpected {unexpected[:3]}, "
                         f"not floating point {kinds[:3]}, shapes {shapes[:3]}")
    # aminmax takes a sixth of the time of isfinite().all(): 0.2 s for XL/2 on two cores
    bad = [k for k, v in state.items()
           if not (v.numel() and torch.stack(v.float().aminmax()).isfinite().all())]
    if bad:
        raise ValueError(f"not finite: {bad[0]} (and {len(bad) - 1} more)")


def fill(net, state):
    """`net`, built on the meta device, with these weights, in float32 and on the device of `state`. Raises
    ValueError as `verify` does."""
    verify(net.state_dict(), state)
    net.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
    return net


def from_state_dict(state, heads=None):
    """A SiT with these weights (names of SiT or FreeFlow). Everything but the number of heads is read off the
    shapes; `heads` None takes it from the named size of the same depth and width. `projectors.*` (REPA's
    training heads) are dropped, all else must fit: ValueError as `fill` says, or if heads cannot be told."""
    state = {k: v for k, v in rename(state, NAMES).items() if not k.startswith("projectors.")}
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        side = math.isqrt(state["pos_embed"].shape[1]) * patch
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        classes = len(state["y_embedder.embedding_table.weight"]) - 1
        outputs = len(state["final_layer.linear.weight"]) // patch ** 2
    except (KeyError, ValueError, IndexError, ZeroDivisionError, TypeError, AttributeError) as e:
        raise ValueError(f"not a SiT: its tensors lack or misshape what tells the size ({e})") from None
    heads = heads or next((h for d, w, h in SIZES.values() if (d, w) == (depth, width)), None)
    if not isinstance(heads, int) or heads < 1 or width % heads or width % 4 or depth > 1000:
        raise ValueError(f"cannot tell the heads of depth {depth}, width {width}; given: {heads}")
    with torch.device("meta"):                                   # shapes only: the weights come from the file
        net = SiT((channels, side, side), depth, width, heads, patch, classes, outputs == 2 * channels,
                  dt="dt_embedder.mlp.0.weight" in state, gw="gw_embedder.mlp.0.weight" in state)
    return fill(net, state)


def read_file(path):
    """torch.load that executes nothing from the file. Tensors are mapped, not copied, where the format
    allows: what is not used takes no memory, processes share the rest. Raises ValueError naming the path."""
    if Path(path).suffix == ".safetensors":
        raise ValueError(f"{path}: safetensors files are not read: take the .bin or .pt of the same release")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):     # SiT's train.py saves its flags
            mmap = zipfile.is_zipfile(path)
            if mmap and zipfile.ZipFile(path).testzip():                        # torch compares no checksums
                raise ValueError("a checksum is wrong")
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as e:      # a damaged zip or pickle raises a dozen types; all of them mean the same here
        raise ValueError(f"{path}: not a checkpoint ({reason(e)})") from None


def load(path, heads=None):
    """A SiT from a file: a raw state dict, or {"ema": state dict[, "config"][, "convention"]} as ours and
    SiT's are.

    -> (net, info): what the file says besides the weights, with info["convention"] "sit" or "repa"
    (fmd.CONVENTIONS), the file's own word, else "repa" where it has REPA's projectors. Raises ValueError
    naming the path and the fault."""
    file = read_file(path)
    try:
        if not isinstance(file, dict):
            raise ValueError(f"holds a {type(file).__name__}, not a dict of tensors")
        state = file.get("ema", file)
        net = from_state_dict(state, heads or file.get("config", {}).get("heads"))
        repa = any(key.startswith("projectors.") for key in state)
        info = {k: v for k, v in file.items() if k != "ema"} if state is not file else {}
        return net, {"convention": "repa" if repa else "sit", **info}
    except (ValueError, AttributeError) as e:                      # the second: something else for a dict
        raise ValueError(f"{path}: {e}") from None


def load_decoder(path, widths=VAE_WIDTHS):
    """The Decoder from a file of diffusers' AutoencoderKL, a dict of tensors (.bin or .pt), whose `encoder.*`
    and `quant_conv.*` are dropped; all else must fit. Raises ValueError naming the path and the fault."""
    file = read_file(path)
    try:
        state = {k: v for k, v in rename(file, OLD_NAMES).items()
                 if not k.startswith(("encoder.", "quant_conv."))}
        for k, v in state.items():        # older still: the attention's linear maps are 1x1 convolutions
            if k.startswith(ATTENTION) and v.shape[2:] == (1, 1):
                state[k] = v.flatten(1)
        with torch.device("meta"):
            net = Decoder(widths)
        return fill(net, state)
    except (ValueError, AttributeError) as e:
        raise ValueError(f"{path}: {e}") from None
