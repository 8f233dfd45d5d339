# SPDX-License-Identifier: MIT
"""SiT, the transformer that teacher, student and online network share, and the layouts its weights come in.

The network is the Scalable Interpolant Transformer (Ma et al., arXiv 2401.08740), that is DiT's (Peebles and
Xie, arXiv 2212.09748): patches, adaLN-Zero blocks, a linear read-out. Parameter names and shapes are those of
the released files. This file knows nothing of flow maps and holds no convention of time or sign: it maps (x,
t, y) to an array like x, and fmd.py says what t and the output mean (`CONVENTIONS` there).

Two optional inputs turn a teacher into the other two networks of the method, with the embedders the FreeFlow
release adds: `dt` (the integration duration δ) and `gw` (the guidance strength γ). Both are summed into the
conditioning. Their last layers start at zero, so a network started from a teacher's weights starts out as
that teacher.

Letters in shape comments: B batch, C channels, H W height and width, p patch, T = HW/p² tokens, D width, E
embedding.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

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
        for block in self.blocks:
            h = block(h, c)                                     # (B, T, D)
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
# Files: what the released checkpoints look like, read and written
# -----------------------------------------------------------------------------------------------------------

# The FreeFlow release names the scalar embedders' MLPs `projs` where SiT's files say `mlp`.
NAMES = [(f"{e}_embedder.projs.", f"{e}_embedder.mlp.") for e in ("t", "dt", "gw")]


def rename(state, pairs):
    """A state dict with each key that starts with the first name of a pair given the second."""
    def new(key):
        return next((key.replace(a, b, 1) for a, b in pairs if key.startswith(a)), key)
    return {new(key): value for key, value in state.items()}


def released_names(state):
    """Our state dict -> the names of the released file: teachers as in SiT's, students as in FreeFlow's."""
    student = any(key.startswith("dt_embedder.") for key in state)
    return rename(state, [(ours, theirs) for theirs, ours in NAMES]) if student else dict(state)


def from_state_dict(state, heads=None):
    """A SiT with these weights (names of SiT or FreeFlow). Everything but the number of heads is read off the
    shapes; `heads` None takes it from the named size of the same depth and width.

    Raises ValueError, in one line: a missing or unexpected key, a wrong shape or dtype, a non-finite weight,
    or heads that cannot be told. `projectors.*` (REPA's training heads) are dropped, all else must fit."""
    state = {k: v for k, v in rename(state, NAMES).items() if not k.startswith("projectors.")}
    bad = [k for k, v in state.items()
           if not (torch.is_tensor(v) and v.is_floating_point() and v.isfinite().all())]
    if bad:
        raise ValueError(f"not a finite floating point tensor: {bad[0]} (and {len(bad) - 1} more)")
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        side = math.isqrt(state["pos_embed"].shape[1]) * patch
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        classes = len(state["y_embedder.embedding_table.weight"]) - 1
        outputs = len(state["final_layer.linear.weight"]) // patch ** 2
    except (KeyError, ValueError, IndexError, ZeroDivisionError, TypeError) as e:
        raise ValueError(f"not a SiT: its tensors lack or misshape what tells the size ({e})") from None
    heads = heads or next((h for d, w, h in SIZES.values() if (d, w) == (depth, width)), None)
    if heads is None or width % heads or width % 4 or depth > 1000:
        raise ValueError(f"cannot tell the heads of depth {depth}, width {width}; given: {heads}")
    with torch.device("meta"):                                   # shapes only: the weights come from the file
        net = SiT((channels, side, side), depth, width, heads, patch, classes, outputs == 2 * channels,
                  dt="dt_embedder.mlp.0.weight" in state, gw="gw_embedder.mlp.0.weight" in state)
    want = net.state_dict()
    missing, unexpected = sorted(want.keys() - state.keys()), sorted(state.keys() - want.keys())
    shapes = [f"{k} {tuple(state[k].shape)} for {tuple(v.shape)}" for k, v in want.items()
              if k in state and state[k].shape != v.shape]
    if missing or unexpected or shapes:
        raise ValueError(f"weights do not fit: missing {missing[:3]}, unexpected {unexpected[:3]}, "
                         f"shapes {shapes[:3]}")
    net.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
    net.pos_embed.requires_grad_(False)
    return net


def read_file(path):
    """torch.load that executes nothing from the file. Raises ValueError naming the path."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as e:      # a damaged zip or pickle raises a dozen types; all of them mean the same here
        reason = (str(e).splitlines() or ["empty"])[0][:80]
        raise ValueError(f"{path}: not a checkpoint ({type(e).__name__}: {reason})") from None


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
        state, config = file.get("ema", file), file.get("config", {})
        if not (isinstance(state, dict) and isinstance(config, dict)):
            raise ValueError("'ema' and 'config' must be dicts")
        repa = any(str(key).startswith("projectors.") for key in state)
        heads = heads or config.get("heads")
        if not (heads is None or (isinstance(heads, int) and heads > 0)):
            raise ValueError(f"config says heads = {heads!r}")
        info = {k: v for k, v in file.items() if k != "ema"} if state is not file else {}
        return from_state_dict(state, heads), {"convention": "repa" if repa else "sit", **info}
    except (ValueError, AttributeError) as e:
        raise ValueError(f"{path}: {e}") from None
