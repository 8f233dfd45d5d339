# SPDX-License-Identifier: MIT
"""FID and its relatives in one file, with the numbers of the evaluator that papers on ImageNet use (ADM's, a
TensorFlow graph of 2015).

Two sets of images are compared through the activations of an Inception-v3 classifier. With mean μ and
covariance Σ of 2,048 features over each set, the Frechet inception distance (arXiv 1706.08500) is that of
two Gaussians:

  FID        |μ1 - μ2|² + tr(Σ1 + Σ2 - 2 (Σ1 Σ2)^1/2)        features: pool_3, the last layer's global mean
  sFID       the same formula (arXiv 2103.03841)              7 channels of a 17x17 map, not pooled: layout
  IS         exp E_x KL(p(y|x) | p(y)) (arXiv 1606.03498)     class probabilities p; no reference
  precision  share of samples among the reference's pool_3    inside some reference image's ball, which
  recall     share of the reference among the samples'        reaches to its 3rd neighbour (arXiv 1904.06991)

All depend on what looks harmless: how images are resized and scaled, a pooling layer's border, the number of
images (FID is biased upwards by about 1/N), their order (IS). Comments marked TF name what this file
reproduces because the graph does it; a cleaner choice would give another number.

  python fid.py SAMPLES REFERENCE                              all metrics the two allow
  python fid.py SAMPLES REFERENCE --metrics fid --json         one, as JSON
  python fid.py IMAGES --save-stats stats.npz                  statistics, a later REFERENCE
  torchrun --nproc_per_node=8 fid.py SAMPLES REFERENCE         the same numbers from many processes

Either is a folder of images (searched to any depth), an .npz with arr_0 (uint8, N x H x W x 3 or 1) or with
mu, sigma (and mu_s, sigma_s for sFID), such as the reference batches of ADM.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from PIL import Image
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import inception as tv
from tqdm import tqdm

URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
       "pt_inception-2015-12-05-6726825d.pth")
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
POOL, SPATIAL = 2048, 17 * 17 * 7                       # features for FID, IS, precision, recall; for sFID


# -----------------------------------------------------------------------------------------------------------
# 1. The network: torchvision's Inception-v3, but for the pooled branches of its mixed blocks
# -----------------------------------------------------------------------------------------------------------

def mean_pool(x):
    """TF: the padding does not count, so a corner is the mean of 4 pixels. (torchvision divides by 9.)"""
    return nnf.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x):
    return nnf.max_pool2d(x, 3, stride=1, padding=1)


class MixedA(tv.InceptionA):
    def _forward(self, x):
        wide = self.branch5x5_2(self.branch5x5_1(x))
        deep = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return [self.branch1x1(x), wide, deep, self.branch_pool(mean_pool(x))]


class MixedC(tv.InceptionC):
    def _forward(self, x):
        wide = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        deep = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        deep = self.branch7x7dbl_5(self.branch7x7dbl_4(deep))
        return [self.branch1x1(x), wide, deep, self.branch_pool(mean_pool(x))]


class MixedE(tv.InceptionE):
    pool = staticmethod(mean_pool)

    def _forward(self, x):
        wide, deep = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return [self.branch1x1(x), self.branch3x3_2a(wide), self.branch3x3_2b(wide),
                self.branch3x3dbl_3a(deep), self.branch3x3dbl_3b(deep), self.branch_pool(self.pool(x))]


def inception():
    """The network with random weights of sane scale (for tests), under the published file's names."""
    blocks = [tv.BasicConv2d, MixedA, tv.InceptionB, MixedC, tv.InceptionD, MixedE, tv.InceptionAux]
    net = tv.Inception3(1008, aux_logits=False, inception_blocks=blocks, init_weights=False)
    net.Mixed_7c.pool = max_pool                        # TF: the last block takes the maximum; see pytorch-fid
    draw = torch.Generator().manual_seed(0)
    for weight in net.parameters():
        if weight.ndim > 1:
            torch.nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=draw)
    return net.eval()                                   # batch norm by its running statistics


def load_inception(weights=None, device="cpu"):
    """-> the network, ready for features(), and what weights it has. weights: a path, "random", or None for
    the published file, downloaded once to torch's hub cache. Raises ValueError or OSError."""
    net, told = inception(), "random"
    if weights != "random":
        path = Path(weights or Path(torch.hub.get_dir(), "checkpoints", URL.rsplit("/", 1)[1]))
        if not weights and not path.exists():
            fetch(path)
        try:
            data = path.read_bytes()
        except OSError as e:
            raise ValueError(f"--weights {path}: {e.strerror}; give the file of {URL}, or random") from None
        published = hashlib.sha256(data).hexdigest() == SHA256
        if not weights and not published:
            raise ValueError(f"{path}: its SHA-256 is not {SHA256}; delete it, to fetch it again from {URL}")
        told = "published" if published else f"{path} (not the published ones)"
        try:
            net.load_state_dict(dict(torch.load(path, map_location="cpu", weights_only=True)))
        except Exception as e:                          # a damaged file fails in many ways
            raise ValueError(f"--weights {path}: not the weights of this network ({type(e).__name__}: "
                             f"{' '.join(str(e).split())[:120]}); they are at {URL}") from None
    for unit in net.modules():
        if isinstance(unit, tv.BasicConv2d):            # for speed; moves the features by 1e-6
            unit.conv, unit.bn = fuse_conv_bn_eval(unit.conv, unit.bn), torch.nn.Identity()
    return net.to(device, memory_format=torch.channels_last).requires_grad_(False), told


def fetch(path):
    """Download the published weights to path, by one process of a machine, and check them."""
    rank, world = processes()
    error = None
    if int(os.environ.get("LOCAL_RANK", rank)) == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(path), hash_prefix=SHA256, progress=True)
        except (OSError, RuntimeError) as e:
            error = (f"Inception weights: no download ({e}); fetch {URL} by other means (SHA-256 {SHA256}) "
                     f"and put it at {path}, or name it with --weights")
    agree(error)


# -----------------------------------------------------------------------------------------------------------
# 2. From images to features
# -----------------------------------------------------------------------------------------------------------

def resize(images, size=299):
    """(N, H, W, C) of any type and size -> (N, 299, 299, C) float32, not rounded: TF's first ResizeBilinear.

    TF: output pixel i samples the input at i * in/out, corner on corner, without the half pixel that
    F.interpolate adds, and takes two neighbours however far it shrinks (no antialias). Horizontally first.
    Bit for bit TF's on a CPU."""
    def taps(n):
        at = torch.arange(size, dtype=torch.float32) * torch.tensor(n / size, dtype=torch.float32)
        low = at.floor().long()
        return [t.to(images.device) for t in (low, (low + 1).clamp(max=n - 1), at - low)]

    low, high, t = taps(images.shape[2])
    left, right = images[:, :, low].float(), images[:, :, high].float()
    images = left + (right - left) * t[:, None]                                       # (N, H, 299, C)
    low, high, t = taps(images.shape[1])
    top, bottom = images[:, low], images[:, high]
    return top + (bottom - top) * t[:, None, None]                                    # (N, 299, 299, C)


@contextlib.contextmanager
def plain_float32(device):
    """float32 that is float32: neither TF32 nor autocast, whatever the caller has switched on."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), \
                torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.inference_mode()
def features(net, images):
    """images (N, H, W, 3), uint8 or float in 0..255 -> pool_3 (N, 2048) and spatial (N, 2023), float32.

    TF: (x - 128) / 128, so that 255 becomes 0.992. Spatial is the first 7 channels after "mixed_6/conv", the
    1x1 branch of Mixed_6d, flattened with the channel last as in the reference files."""
    device = net.fc.weight.device
    with plain_float32(device):
        x = ((resize(images.to(device)) - 128) / 128).permute(0, 3, 1, 2)             # (N, 3, 299, 299)
        for name, layer in net.named_children():                                      # in order of execution
            if name == "avgpool":
                break
            x = layer(x)                                                              # ends at (N, 2048, 8, 8)
            if name == "Mixed_6d":                                                    # (N, 768, 17, 17)
                spatial = x[:, :7].permute(0, 2, 3, 1).reshape(len(x), SPATIAL)       # (N, 2023)
        return x.mean((2, 3)), spatial


# -----------------------------------------------------------------------------------------------------------
# 3. The metrics
# -----------------------------------------------------------------------------------------------------------

class Moments:
    """Mean and covariance of rows seen a batch at a time: count, sum and sum of outer products in float64."""

    def __init__(self, dim, device="cpu"):
        zeros = torch.zeros(dim + 1, dim, dtype=torch.float64, device=device)
        self.count, self.sum, self.outer = 0, zeros[0], zeros[1:]

    def add(self, rows):
        """rows: (N, dim), an array or tensor of any float type."""
        rows = torch.as_tensor(rows).to(self.sum)                                     # float64
        self.count += len(rows)
        self.sum += rows.sum(0)
        self.outer.addmm_(rows.T, rows)

    def reduce(self):
        """Sum over the processes of the group, if there is one."""
        if processes()[1] > 1:
            count = self.sum.new_tensor(float(self.count))
            for part in (count, self.sum, self.outer):
                dist.all_reduce(part)
            self.count = int(count)

    def mean_cov(self):
        """-> mu (dim,), sigma (dim, dim) with denominator N - 1, as np.cov. ValueError below 2 rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, got {self.count}")
        mu = self.sum / self.count
        sigma = (self.outer - self.count * torch.outer(mu, mu)) / (self.count - 1)
        return mu.cpu().numpy(), sigma.cpu().numpy()


def factor(sigma):
    """A covariance (d, d) -> F (d, rank) with F Fᵀ = sigma, float64: Cholesky's if it has full rank, else from
    eigenvectors. Raises ValueError for one that is not finite, not symmetric or has negative eigenvalues."""
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    if not sigma.isfinite().all():
        raise ValueError("covariance is not finite")
    if (sigma - sigma.T).abs().max() > 1e-6 * sigma.abs().max():
        raise ValueError("covariance is not symmetric")
    sigma = (sigma + sigma.T) / 2
    F, failed = torch.linalg.cholesky_ex(sigma)
    if failed:
        w, v = torch.linalg.eigh(sigma)                                               # ascending
        if w[0] < -1e-6 * w[-1]:
            raise ValueError(f"covariance has a negative eigenvalue, {w[0]:.3g} (largest {w[-1]:.3g})")
        keep = w > len(w) * torch.finfo(w.dtype).eps * w[-1]                          # the rest is rounding
        F = v[:, keep] * w[keep].sqrt()
    return F


def trace_root(sigma1, sigma2):
    """tr (sigma1 sigma2)^1/2 without the root of a matrix.

    With sigma_i = F_i F_iᵀ the product has the squared singular values of K = F_1ᵀ F_2 for eigenvalues, so
    their sum is the answer, exact for singular covariances too. Eigenvalues of K Kᵀ cost a quarter of an SVD,
    but the root of one near zero keeps half the digits: they serve where that cannot be seen."""
    K = factor(sigma1).T @ factor(sigma2)                                             # (rank 1, rank 2)
    if K.shape == sigma1.shape:
        w = torch.linalg.eigvalsh(K @ K.T)                                            # ascending
        error = len(w) ** 0.5 * torch.finfo(w.dtype).eps * w[-1]                      # of each
        if (error / w.clamp(min=error).sqrt()).sum() < 1e-9 * w.clamp(min=0).sqrt().sum():
            return w.sqrt().sum().item()
    return torch.linalg.svdvals(K).sum().item()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^1/2), in float64.

    mu (d,), sigma (d, d) symmetric positive semi-definite, of any rank; arrays. Equal arguments may give
    -1e-12: not clipped. Raises ValueError for shapes that differ, an asymmetric or a negative covariance."""
    mu1, mu2, sigma1, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, mu2, sigma1, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != 2 * mu1.shape:
        raise ValueError(f"shapes differ: mu {mu1.shape}, {mu2.shape}; sigma {sigma1.shape}, {sigma2.shape}")
    root = trace_root(sigma1, sigma2)
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root)


def inception_score(logits, split=5000):
    """logits (N, classes), in the samples' order -> mean over splits of exp of the mean KL(p(y|x) | p(y)).

    TF: consecutive splits of 5,000, the last may be short and counts as much. The order matters: splits of a
    set sorted by class see few classes each."""
    scores = []
    for part in logits.double().split(split):
        log_p = part.log_softmax(1)                                                   # (n, classes)
        log_mean = log_p.logsumexp(0) - np.log(len(part))                             # (classes,)
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def precision_recall(samples, reference, k=3, half=False, rows=1000):
    """Features (N, d) of samples and (M, d) of the reference -> precision, recall, both in 0..1.

    A set's manifold is the union of balls around its members, up to each one's k-th neighbour, the border
    included. half: distances in float16, as TF does where they are finite; moves both by about 0.002.
    ValueError for sets of k or fewer."""
    def squared(u, v):
        def expand(u, v):
            return (u.square().sum(1)[:, None] - 2 * u @ v.T + v.square().sum(1)).clamp(min=0)
        d = expand(u.half(), v.half()).float() if half else None
        return d if half and d.isfinite().all() else expand(u, v)

    def radii(x):                                                                     # the nearest is x itself
        return torch.cat([squared(u, x).topk(k + 1, largest=False).values[:, k] for u in x.split(rows)])

    def inside(x, centres):
        r = radii(centres)
        return torch.cat([(squared(u, centres) <= r).any(1) for u in x.split(rows)]).double().mean().item()

    if min(len(samples), len(reference)) <= k:
        raise ValueError(f"precision and recall need more than {k} images on each side")
    with plain_float32(samples.device):
        return inside(samples, reference), inside(reference, samples)


# -----------------------------------------------------------------------------------------------------------
# 4. Inputs: what a path holds, and its images in batches
# -----------------------------------------------------------------------------------------------------------

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm")


@dataclasses.dataclass
class Side:
    """One side of a comparison. batches(size, rank, world, workers) yields (index of the first, images)."""
    path: str
    count: int = None                                   # of images; None: unknown, for statistics made elsewhere
    source: str = ""
    batches: object = None                              # None: there are statistics alone
    stats: dict = dataclasses.field(default_factory=dict)     # "fid": (mu, sigma), "sfid": (mu_s, sigma_s)
    adm: bool = False                                   # images and both kinds of statistics: a batch of ADM's


def open_side(path, span=None):
    """Look into a folder or .npz -> Side. Images are not read yet. Raises ValueError naming path and fix."""
    path = Path(path)
    if path.is_dir():
        files = sorted(str(f) for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
        side = Side(str(path), len(files), "folder", lambda *a: folder_batches(files, *a))
    elif not path.is_file():
        raise ValueError(f"{path}: no such folder or .npz file")
    else:
        side = Side(str(path))
        with reading(path), zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            with np.load(path, allow_pickle=False) as data:                           # reads what is asked for
                for metric, mu, sigma, dim in (("fid", "mu", "sigma", POOL), ("sfid", "mu_s", "sigma_s", SPATIAL)):
                    if mu in names and sigma in names:
                        side.stats[metric] = statistics(data[mu], data[sigma], dim, mu)
                side.count = int(data["count"]) if side.stats and "count" in names else None
            side.source = "statistics" if side.stats else "arr_0"
            if "arr_0" in names:
                with archive.open("arr_0.npy") as f:
                    shape = array_header(f, span)[0]
                side.batches = lambda *a: array_batches(path, span, *a)
                side.count, side.source = shape[0], "arr_0 and statistics" if side.stats else "arr_0"
            elif not side.stats:
                raise ValueError(f"holds {', '.join(sorted(names)) or 'nothing'}; need arr_0, or mu and sigma")
    if side.count is not None and side.count < 2:
        raise ValueError(f"{path}: {side.count or 'no'} image{'s' * (side.count != 1)}; a covariance needs 2")
    return side


@contextlib.contextmanager
def reading(path):
    """Whatever a damaged or unsuited .npz raises becomes a ValueError of one line that names it."""
    try:
        yield
    except zipfile.BadZipFile as e:
        raise ValueError(f"{path}: not an .npz file, or a truncated one ({e})") from None
    except Exception as e:
        said = str(e) if type(e) is ValueError else f"cannot be read ({type(e).__name__}: {e})"
        raise ValueError(f"{path}: {' '.join(said.split())}") from None


def statistics(mu, sigma, dim, name):
    """Checked mean and covariance."""
    if mu.shape != (dim,) or sigma.shape != (dim, dim):
        raise ValueError(f"{name} is {mu.shape} with a covariance {sigma.shape}; need ({dim},), ({dim}, {dim})")
    if not np.isfinite(mu).all():
        raise ValueError(f"{name} is not finite")
    factor(sigma)
    return mu.astype(np.float64), sigma.astype(np.float64)


def array_header(f, span):
    """The head of an .npy stream -> shape, dtype; f is then at the first image."""
    version = np.lib.format.read_magic(f)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, by_columns, dtype = read(f)
    if len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape[1:3]:
        raise ValueError(f"arr_0 is {shape}; need N x H x W x 3 (or 1)")
    if by_columns:
        raise ValueError("arr_0 is stored in column order; save np.ascontiguousarray of it")
    if dtype != np.uint8 and not (dtype.kind == "f" and span):
        raise ValueError(f"arr_0 is {dtype}; need uint8, or floats whose range --range LOW HIGH tells")
    return shape, dtype


def array_batches(path, span, size, rank, world, workers):
    """Batches of an .npz's arr_0, read in passing: one is in memory at a time, compressed or not."""
    with reading(path), zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as f:
        (count, *shape), dtype = array_header(f, span)
        for i, start in enumerate(range(0, count, size)):
            n = min(size, count - start)
            data = f.read(n * int(np.prod(shape)) * dtype.itemsize)
            images = np.frombuffer(data, dtype).reshape(n, *shape)
            if i % world != rank:
                continue
            if dtype != np.uint8:
                low, high = span
                if not ((images >= low) & (images <= high)).all():                    # false for NaN too
                    raise ValueError(f"arr_0 has NaN or values outside --range {low:g} {high:g}")
                images = ((images - low) * (255 / (high - low)) + 0.5).astype(np.uint8)
            yield start, torch.tensor(images).expand(*images.shape[:3], 3)            # grey: three times


def folder_batches(files, size, rank, world, workers):
    """Batches of image files, decoded by worker processes. Every size-th block goes to one process whole: a
    network may round differently in another batch."""
    blocks = [range(i, min(i + size, len(files))) for i in range(0, len(files), size)][rank::world]
    loader = torch.utils.data.DataLoader(files, batch_sampler=blocks, collate_fn=decode, num_workers=workers)
    for block, images in zip(blocks, loader):
        if isinstance(images, Exception):
            raise images
        yield block[0], images


def decode(paths):
    """Image files -> (N, H, W, 3) uint8, or (N, 299, 299, 3) float32 for sizes that differ; a ValueError, for
    the main process to raise, if one cannot be read. Alpha is dropped and EXIF ignored, as elsewhere."""
    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                if image.mode[0] in "IF":               # convert() would clip them to 255, silently
                    return ValueError(f"{path}: more than 8 bits a channel ({image.mode}); convert it first")
                images.append(torch.from_numpy(np.array(image.convert("RGB"))))
        except Exception as e:                          # decoders raise anything
            return ValueError(f"{path}: not a readable image ({type(e).__name__}: {' '.join(str(e).split())})")
    if len({image.shape for image in images}) == 1:
        return torch.stack(images)
    return torch.cat([resize(image[None]) for image in images])


# -----------------------------------------------------------------------------------------------------------
# 5. The evaluation, by one process or several
# -----------------------------------------------------------------------------------------------------------

METRICS, KEYS = ("fid", "sfid", "is", "pr"), {"fid": "mu, sigma", "sfid": "mu_s, sigma_s"}


def processes():
    """-> rank, number of processes in the group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def agree(error):
    """Raise ValueError in all processes if there is an error in any: none is left waiting for another."""
    errors = [error] * processes()[1]
    if len(errors) > 1:
        dist.all_gather_object(errors, error)
    for error in filter(None, errors):
        raise ValueError(error)


def write(path, save):
    """A file whole or not at all: save(file object) into a temporary beside it, fsync, rename."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            save(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def measure(side, net, wanted, keep, batch, workers):
    """One pass over a side's images -> {"fid", "sfid": Moments} as wanted, pool_3 (N, 2048) if to keep."""
    rank, world = processes()
    device, error = net.fc.weight.device, None
    if workers is None:
        workers = min(8, max(1, (os.cpu_count() or 1) // world))
    exact = "cpu" if device.type == "mps" else device                                 # MPS has no float64
    moments = {name: Moments(POOL if name == "fid" else SPATIAL, exact) for name in wanted}
    pool = torch.zeros(side.count if keep else 0, POOL, device=device)
    bar = tqdm(total=side.count, desc=side.path, unit=" images", disable=rank > 0 or not sys.stderr.isatty())
    try:
        for start, images in side.batches(batch, rank, world, workers):
            rows = dict(zip(("fid", "sfid"), features(net, images)))
            if not rows["fid"].isfinite().all():
                raise ValueError(f"{side.path}: features are not finite; are the weights damaged?")
            for name, m in moments.items():
                m.add(rows[name])
            if keep:
                pool[start:start + len(images)] = rows["fid"]
            bar.update(min(len(images) * world, side.count - bar.n))
    except ValueError as e:
        error = str(e)
    bar.close()
    agree(error)
    for m in moments.values():
        m.reduce()
    if keep and world > 1:
        dist.all_reduce(pool)                                                         # others' rows are 0
    return moments, pool


def evaluate(samples, reference=None, metrics=None, device="cpu", batch=16, weights=None, workers=None,
             save_stats=None, half=False, span=None):
    """Paths -> {"fid", "sfid", "is", "precision", "recall", "samples", "reference", "weights", "notes"}: the
    metrics (0..1 for the last two), what was read, and warnings. In a process group all call it, and get the
    same. metrics: some of fid, sfid, is, pr; None: all that the two allow. weights: see load_inception. span:
    (low, high) of float images. half: see precision_recall. Raises ValueError, OSError."""
    a, b = open_side(samples, span), open_side(reference, span) if reference else None

    def lacks(metric):
        """What a metric misses, None if nothing: statistics, which come before images, or images."""
        for side in (a,) if metric == "is" else (a, b):
            if not side:
                return "needs a REFERENCE"
            if not (metric in side.stats if side.stats and metric in KEYS else side.batches):
                return f"{side.path} has {side.source}, but no {KEYS.get(metric, 'images')}"

    metrics = [m for m in METRICS if b and not lacks(m)] if metrics is None else metrics
    for metric in metrics:
        fault = lacks(metric) if metric in METRICS else f"choose from {','.join(METRICS)}"
        if fault:
            raise ValueError(f"--metrics {metric}: {fault}")
    if not metrics and not save_stats:
        raise ValueError("nothing to compute: give a REFERENCE, --metrics is or --save-stats FILE")
    if save_stats and (a.stats or not Path(save_stats).parent.is_dir()):
        fault = f"{a.path} has statistics already" if a.stats else "no such folder"
        raise ValueError(f"--save-stats {save_stats}: {fault}")

    result, notes, net, pools = {}, [], None, []
    for side in filter(None, (a, b)):
        wanted = [m for m in KEYS if (m in metrics and m not in side.stats) or (save_stats and side is a)]
        keep = "pr" in metrics or ("is" in metrics and side is a)
        pools.append(None)
        if wanted or keep:
            if net is None:
                net, result["weights"] = load_inception(weights, device)
            moments, pools[-1] = measure(side, net, wanted, keep, batch, workers)
            side.stats |= {metric: m.mean_cov() for metric, m in moments.items()}
            side.source += f", {side.count} images read"
            if side.count < 2048:
                notes.append(f"{side.path}: {side.count} images are few: below 2048 FID is far too high")
    if result.get("weights", "published") != "published":
        notes.append(f"MEANINGLESS NUMBERS, fit for a trial run: the weights are {result['weights']}"
                     if weights == "random" else f"not comparable with others' numbers: weights {weights}")
    if b and b.adm and a.count != 50_000:
        notes.append(f"{a.path}: {a.count} images; numbers against an ADM reference batch are of 50000")
    if save_stats and processes()[0] == 0:
        (mu, sigma), (mu_s, sigma_s) = a.stats["fid"], a.stats["sfid"]
        write(save_stats, lambda f: np.savez(f, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, count=a.count))

    for metric in KEYS:
        if metric in metrics:
            result[metric] = frechet_distance(*a.stats[metric], *b.stats[metric])
    if "is" in metrics:
        with plain_float32(device):
            logits = pools[0] @ net.fc.weight.T                                       # TF: without the bias
        result["is"] = inception_score(logits)
        mixed = inception_score(logits[torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))])
        if result["is"] < 0.9 * mixed:
            notes.append(f"{a.path}: sorted by class? In random order IS is {mixed:.2f}, see inception_score")
    if "pr" in metrics:
        result["precision"], result["recall"] = precision_recall(*pools, half=half)
    return result | {"samples": [a.path, a.source], "reference": b and [b.path, b.source], "notes": notes}


# -----------------------------------------------------------------------------------------------------------
# 6. The command line
# -----------------------------------------------------------------------------------------------------------

def parse(argv):
    parser = argparse.ArgumentParser(prog="fid.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     epilog=__doc__[__doc__.index("  python fid.py"):],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"fid.py: {message}\n")
    add = parser.add_argument
    add("samples", metavar="SAMPLES", help="folder of images or .npz")
    add("reference", metavar="REFERENCE", nargs="?", help="folder of images or .npz, such as an ADM batch")
    add("--metrics", type=lambda text: text.split(","), help="of fid,sfid,is,pr (default: all that is possible)")
    add("--save-stats", metavar="F.npz", help="write the statistics of SAMPLES")
    add("--weights", metavar="F", help="Inception weights: a file, or random (default: the published, fetched)")
    add("--range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="of images stored as floats; rounded to 8 bits")
    add("--adm-half", action="store_true", help="precision and recall from float16 distances, as ADM's")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:N or mps")
    add("--batch", type=int, default=16, help="images at a time (16)")
    add("--workers", type=int, help="processes that decode images (default: one a core, 8 at most)")
    add("--json", action="store_true", help="print one line of JSON")
    args = parser.parse_args(argv)
    kind, _, index = args.device.partition(":")
    rules = [("batch", args.batch >= 1, "must be at least 1"),
             ("workers", args.workers is None or args.workers >= 0, "must be 0 or more"),
             ("range", not args.range or -np.inf < args.range[0] < args.range[1] < np.inf, "must be LOW HIGH"),
             ("device", kind in ("cpu", "cuda", "mps") and (index.isdigit() or not index), "choose cpu or cuda"),
             ("device", kind != "cuda" or int(index or 0) < torch.cuda.device_count(), "no such GPU: use cpu"),
             ("device", kind != "mps" or torch.backends.mps.is_available(), "not here: use cpu")]
    for name, fine, fix in rules:
        if not fine:
            raise ValueError(f"--{name} {vars(args)[name]}: {fix}")
    return args


def main(argv=None):
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    joined = world > 1 and not dist.is_initialized()
    try:
        args = parse(argv)
        device = args.device
        if device == "cuda" and world > 1:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        if joined:
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        result = evaluate(args.samples, args.reference, args.metrics, device, args.batch, args.weights,
                          args.workers, args.save_stats, args.adm_half, args.range)
    except (ValueError, OSError) as e:
        if rank == 0:
            print(f"fid.py: {e}", file=sys.stderr)
        return 2
    finally:
        if joined and dist.is_initialized():
            dist.destroy_process_group()
    if rank == 0:
        for note in result["notes"]:
            print(f"note: {note}", file=sys.stderr)
        print(json.dumps(result) if args.json else table(result))
    return 0


def table(result):
    sides = [f"{name:10} {': '.join(result[name])}" for name in ("samples", "reference") if result[name]]
    values = [f"{name:10} {value:.6g}" for name, value in result.items() if type(value) is float]
    return "\n".join(sides + [f"{'weights':10} {result.get('weights', 'not needed')}"] + values)


if __name__ == "__main__":
    sys.exit(main())
