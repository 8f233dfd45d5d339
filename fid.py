# SPDX-License-Identifier: MIT
"""FID and its relatives in one file, with the numbers of the evaluator that papers on ImageNet use: ADM's, a
TensorFlow graph of 2015.

Two sets of images are compared through the activations of an Inception-v3 classifier. With mean μ and
covariance Σ of 2,048 features over each set, the Frechet inception distance (arXiv 1706.08500) is that of
two Gaussians:

  FID        |μ1 - μ2|² + tr(Σ1 + Σ2 - 2 (Σ1 Σ2)^1/2) of pool_3, the last map's mean over 8x8 pixels
  sFID       the same of 7 channels of a 17x17 map, not pooled: sees layout (arXiv 2103.03841)
  IS         exp E_x KL(p(y|x) | p(y)) with the class probabilities p; has no reference (arXiv 1606.03498)
  precision  share of the samples that lie in the reference's manifold, balls around its features as wide as
             the distance to their 3rd neighbour (arXiv 1904.06991)
  recall     share of the reference that lies in the samples' manifold

All depend on what looks harmless: how images are resized and scaled, a pooling layer's border, the number of
images (FID is biased upwards by about 1/N), their order (IS). Comments marked TF name what this file
reproduces because the graph does it; a cleaner choice would give another number.

  python fid.py SAMPLES REFERENCE                              all metrics the two allow
  python fid.py SAMPLES REFERENCE --metrics fid --json         one, as JSON
  python fid.py IMAGES --save-stats stats.npz                  statistics, a later REFERENCE
  torchrun --nproc_per_node=8 fid.py SAMPLES REFERENCE         the same, to rounding, from many processes

Either is a folder of images (searched to any depth), an .npz with arr_0 (uint8, N x H x W x 3 or 1) or with
mu, sigma (and mu_s, sigma_s for sFID), such as the reference batches of ADM.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import sys
import zipfile
from http.client import HTTPException
from pathlib import Path

import numpy as np
import scipy.linalg
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
    net.Mixed_7c.pool = max_pool                        # TF: the maximum, in the last block alone
    draw = torch.Generator().manual_seed(0)
    for weight in net.parameters():
        if weight.ndim > 1:
            torch.nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=draw)
    return net.eval()                                   # batch norm by its running statistics


def load_inception(weights=None, device="cpu"):
    """-> the network, ready for features(), and which weights it has: "published", "random" or the file.

    weights: a file, "random", or None for the published one, downloaded once. ValueError if unusable."""
    net, told = inception(), "random"
    if weights != "random":
        path = Path(weights) if weights else fetch()
        try:
            data = path.read_bytes()
            told = "published" if hashlib.sha256(data).hexdigest() == SHA256 else str(path)
            if told == "published" or weights:
                state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
                net.load_state_dict(dict(state))        # strict, but for num_batches_tracked
        except Exception as e:                          # a damaged file fails in many ways
            raise ValueError(f"--weights {path}: not the weights of this network ({type(e).__name__}: "
                             f"{' '.join(str(e).split())[:150]}); they are at {URL}") from None
        if told != "published" and not weights:
            raise ValueError(f"{path}: its SHA-256 is not {SHA256}; delete it to fetch {URL} again")
    for unit in net.modules():
        if isinstance(unit, tv.BasicConv2d):            # for speed; moves the features by about 1e-6
            unit.conv, unit.bn = fuse_conv_bn_eval(unit.conv, unit.bn), torch.nn.Identity()
    return net.to(device, memory_format=torch.channels_last).requires_grad_(False), told


def fetch():
    """-> the published weights in torch's hub cache, downloaded by one process of a machine if missing."""
    path, error = Path(torch.hub.get_dir(), "checkpoints", URL.rsplit("/", 1)[1]), None
    if not path.exists() and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(path), hash_prefix=SHA256)
        except (OSError, RuntimeError, HTTPException) as e:
            error = (f"Inception weights: no download ({e}); fetch {URL} by other means (SHA-256 {SHA256}) "
                     f"and put it at {path}, or name it with --weights")
    agree(error)
    return path


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
            x = layer(x)                                                              # last (N, 2048, 8, 8)
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
    """A covariance (d, d) -> F (d, rank) with F F' = sigma, float64: Cholesky's at full rank, else from the
    eigenvectors. Raises ValueError for one that is not symmetric, not finite or has negative eigenvalues."""
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    if not (sigma - sigma.T).abs().max() <= 1e-6 * sigma.abs().max():                 # true for NaN
        raise ValueError("covariance is not symmetric, or not finite")
    F, failed = torch.linalg.cholesky_ex(sigma)
    if failed:
        try:
            w, v = torch.linalg.eigh(sigma)                                           # ascending
        except torch.linalg.LinAlgError:    # its driver may give up on many equal eigenvalues, such as zeros
            w, v = map(torch.from_numpy, scipy.linalg.eigh(sigma.numpy(), driver="evr"))
        if w[0] < -1e-6 * w[-1]:
            raise ValueError(f"covariance has a negative eigenvalue, {w[0]:.3g} (largest {w[-1]:.3g})")
        keep = w > len(w) * torch.finfo(w.dtype).eps * w[-1]                          # the rest is rounding
        F = v[:, keep] * w[keep].sqrt()
    return F


def trace_root(sigma1, sigma2):
    """tr (sigma1 sigma2)^1/2 without the root of a matrix.

    With sigma_i = F_i F_i' the product's eigenvalues are the squared singular values of K = F_1' F_2: the
    answer is their sum, exact for singular covariances too. The eigenvalues of K K' cost a quarter of them,
    but the root of one near zero has half the digits: they serve where 8 are left at the very least."""
    K = factor(sigma1).T @ factor(sigma2)                                             # (rank 1, rank 2)
    if K.shape == sigma1.shape:
        w = torch.linalg.eigvalsh(K @ K.T)                                            # ascending
        error = torch.finfo(w.dtype).eps * w[-1]                                      # of each
        if (error / w.clamp(min=error).sqrt()).sum() < 1e-8 * w.clamp(min=0).sqrt().sum():
            return w.clamp(min=0).sqrt().sum().item()
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

    def radii(x):                                                                     # nearest is x itself
        return torch.cat([squared(u, x).topk(k + 1, largest=False).values[:, k] for u in x.split(rows)])

    def inside(x, centres):
        r = radii(centres)
        return torch.cat([(squared(u, centres) <= r).any(1) for u in x.split(rows)]).double().mean().item()

    if min(len(samples), len(reference)) <= k:
        raise ValueError(f"precision and recall need more than {k} images on each side")
    with plain_float32(samples.device):
        return inside(samples, reference), inside(reference, samples)


# -----------------------------------------------------------------------------------------------------------
# 4. Inputs: what a path holds, and its images in batches. Processes take whole batches in turn: in other
#    company an image's features might round differently.
# -----------------------------------------------------------------------------------------------------------

METRICS = ("fid", "sfid", "is", "pr")
KEYS = {"fid": ("mu", "sigma", POOL), "sfid": ("mu_s", "sigma_s", SPATIAL)}     # of statistics in a file
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm")


@dataclasses.dataclass
class Side:
    """One side of a comparison. batches(size, rank, world, workers) yields (index of the first, images)."""
    path: str
    count: int = None                                   # of images; None: of statistics made elsewhere
    batches: object = None                              # None: there are statistics alone
    stats: dict = dataclasses.field(default_factory=dict)                     # metric: (mu, sigma), see KEYS


def open_side(path, span=None):
    """A folder or .npz -> Side, its images not yet read. Raises ValueError naming the path."""
    path = Path(path)
    if path.is_dir():
        files = sorted(str(f) for f in path.rglob("*") if f.suffix.lower() in SUFFIXES)
        side = Side(str(path), len(files), lambda *a: folder_batches(files, *a))
    elif not path.is_file():
        raise ValueError(f"{path}: no such folder or .npz file")
    else:
        side = Side(str(path))
        with reading(path), zipfile.ZipFile(path) as archive, np.load(path) as data:  # np.load is lazy
            for metric, (mu, sigma, dim) in KEYS.items():
                if mu in data and sigma in data:
                    mean, cov = side.stats[metric] = [data[key].astype(np.float64) for key in (mu, sigma)]
                    if mean.shape != (dim,) or cov.shape != (dim, dim) or not np.isfinite(mean).all():
                        raise ValueError(f"{mu} {mean.shape}, {sigma} {cov.shape}: need {dim} finite numbers")
                    factor(cov)                                                       # raises what is wrong
            if "arr_0" in data:
                with archive.open("arr_0.npy") as f:
                    side.count = array_header(f, span)[0][0]
                side.batches = lambda *a: array_batches(path, span, *a)
            elif side.stats:
                side.count = int(data["count"]) if "count" in data else None
            else:
                raise ValueError(f"holds {', '.join(data) or 'nothing'}; need arr_0, or mu and sigma")
    if side.count in (0, 1):
        raise ValueError(f"{path}: {side.count or 'no'} image(s); a covariance needs at least 2")
    return side


@contextlib.contextmanager
def reading(path):
    """Whatever a damaged or unsuited .npz raises becomes a ValueError of one line that names it."""
    try:
        yield
    except Exception as e:
        said = str(e) if type(e) is ValueError else f"not an .npz, or damaged ({type(e).__name__}: {e})"
        raise ValueError(f"{path}: {' '.join(said.split())}") from None


def array_header(f, span):
    """The head of an .npy stream -> shape, dtype; f is then at the first image."""
    version = np.lib.format.read_magic(f)
    shape, by_columns, dtype = getattr(np.lib.format, f"read_array_header_{version[0]}_0")(f)
    if len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape[1:]:
        raise ValueError(f"arr_0 is {shape}; need N x H x W x 3, or x 1 for grey")
    if by_columns:
        raise ValueError("arr_0 is stored in column order; save np.ascontiguousarray of it")
    if dtype != np.uint8 and not (dtype.kind == "f" and span):
        raise ValueError(f"arr_0 is {dtype}; need uint8, or floats with --range LOW HIGH")
    return shape, dtype


def array_batches(path, span, size, rank, world, workers):
    """Batches of an .npz's arr_0, compressed or not, read in passing: one is in memory at a time."""
    with reading(path), zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as f:
        (count, *shape), dtype = array_header(f, span)
        for start in range(0, count, size):
            n = min(size, count - start)
            data = f.read(n * int(np.prod(shape)) * dtype.itemsize)
            images = np.frombuffer(data, dtype).reshape(n, *shape)
            if start // size % world != rank:
                continue
            if dtype != np.uint8:
                low, high = span
                if not ((low <= images) & (images <= high)).all():                    # false for NaN too
                    raise ValueError(f"arr_0 has NaN or values outside --range {low:g} {high:g}")
                images = ((images - low) * (255 / (high - low)) + 0.5).astype(np.uint8)
            yield start, torch.tensor(images).expand(*images.shape[:3], 3)            # grey: three times


def folder_batches(files, size, rank, world, workers):
    """Batches of image files, decoded by worker processes."""
    starts = range(rank * size, len(files), world * size)
    blocks = [files[start:start + size] for start in starts]
    loader = torch.utils.data.DataLoader(blocks, batch_size=None, collate_fn=decode, num_workers=workers)
    for start, images in zip(starts, loader):
        if isinstance(images, Exception):
            raise images
        yield start, images


def decode(paths):
    """Image files -> (N, H, W, 3) uint8, or (N, 299, 299, 3) float32 if sizes differ, or, for the main
    process to raise, a ValueError. Alpha is dropped and EXIF ignored, as by others."""
    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                if image.mode[0] in "IF":               # convert() would clip them at 255 in silence
                    raise ValueError(f"more than 8 bits a channel, mode {image.mode}")
                images.append(torch.from_numpy(np.array(image.convert("RGB"))))
        except Exception as e:                          # decoders raise anything
            said = " ".join(str(e).split())
            return ValueError(f"{path}: not a readable image ({type(e).__name__}: {said})")
    if len({image.shape for image in images}) == 1:
        return torch.stack(images)
    return torch.cat([resize(image[None]) for image in images])


# -----------------------------------------------------------------------------------------------------------
# 5. The evaluation, by one process or several
# -----------------------------------------------------------------------------------------------------------

def processes():
    """-> rank, number of processes in the group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def agree(error):
    """Raise ValueError in every process if any has an error: none is left waiting for another."""
    errors = [error] * processes()[1]
    if len(errors) > 1:
        dist.all_gather_object(errors, error)
    for error in filter(None, errors):
        raise ValueError(error)


def write(path, save):
    """A file whole or not at all: save(file object) into a temporary beside it, fsync, rename. Raises OSError
    naming the file."""
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")     # one left by a kill: overwritten later
    try:
        with open(temporary, "wb") as f:
            save(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:                # torch.save makes the second of the first
        raise OSError(f"{path}: cannot be written ({e.__context__ or e})") from e
    finally:
        temporary.unlink(missing_ok=True)


def measure(side, net, wanted, keep, batch=None, workers=None):
    """One pass over a side's images, shared among the processes -> {metric: Moments} for those wanted, of
    "fid" and "sfid"; and pool_3 (N, 2048) in order, if to keep."""
    (rank, world), device, error = processes(), net.fc.weight.device, None
    batch = batch or (16 if device.type == "cpu" else 128)
    workers = min(8, max(1, os.cpu_count() // world)) if workers is None else workers
    exact = "cpu" if device.type == "mps" else device                                 # MPS has no float64
    moments = {metric: Moments(KEYS[metric][2], exact) for metric in wanted}
    pool = torch.zeros(side.count if keep else 0, POOL, device=device)
    bar = tqdm(side.batches(batch, rank, world, workers), total=-(-side.count // (batch * world)), unit="img",
               unit_scale=batch * world, desc=side.path, disable=rank > 0 or not sys.stderr.isatty())
    try:
        for start, images in bar:
            # the last batch is filled up: in a shorter one rounding would depend on the number of threads
            full = nnf.pad(images, (0, 0, 0, 0, 0, 0, 0, batch - len(images)))
            rows = {metric: x[:len(images)] for metric, x in zip(KEYS, features(net, full))}
            for metric in wanted:
                moments[metric].add(rows[metric])
            if keep:
                pool[start:start + len(images)] = rows["fid"]
    except ValueError as e:
        error = str(e)
    agree(error)
    for m in moments.values():
        m.reduce()
    if keep and world > 1:
        dist.all_reduce(pool)                                                         # others' rows are 0
    if not all(sums.isfinite().all() for sums in (pool, *(m.sum for m in moments.values()))):
        raise ValueError(f"{side.path}: features are not finite; are the weights damaged?")
    return moments, pool


def evaluate(samples, reference=None, metrics=None, device="cpu", batch=None, weights=None, workers=None,
             save_stats=None, half=False, span=None):
    """Two paths -> {"fid", "sfid", "is", "precision", "recall" (the last two in 0..1), "weights", "samples",
    "reference" (what was read), "notes" (warnings)}. In a process group all call it and get the same.

    metrics: some of METRICS; None: all that the two allow. weights: see load_inception. half: see
    precision_recall. span: (low, high) of images stored as floats. Raises ValueError, OSError."""
    sides = {"samples": open_side(samples, span)}
    if reference:
        sides["reference"] = open_side(reference, span)
    a, b = sides["samples"], sides.get("reference")
    adm = b and b.batches and len(b.stats) == 2         # images and both statistics: a batch of ADM's

    def lacks(metric):
        """What a metric misses, or None. Statistics in a file come before its images, as in ADM's code."""
        for side in (a,) if metric == "is" else (a, b):
            if not side:
                return "needs a REFERENCE"
            if not (metric in side.stats if side.stats and metric in KEYS else side.batches):
                return f"{side.path} has no {' and '.join(KEYS.get(metric, ['images'])[:2])}"

    metrics = [m for m in METRICS if b and not lacks(m)] if metrics is None else metrics
    for metric in metrics:
        fault = lacks(metric) if metric in METRICS else f"choose from {','.join(METRICS)}"
        if fault:
            raise ValueError(f"--metrics {metric}: {fault}")
    if not metrics and not save_stats:
        raise ValueError("nothing to compute: give a REFERENCE, --metrics is or --save-stats F.npz")
    if save_stats and (a.stats or not Path(save_stats).parent.is_dir() or Path(save_stats).is_dir()):
        fault = f"{a.path} holds statistics itself" if a.stats else "not a file in an existing folder"
        raise ValueError(f"--save-stats {save_stats}: {fault}")

    result, notes, net, pools = {}, [], None, {}
    for name, side in sides.items():
        keep = "pr" in metrics or ("is" in metrics and side is a)
        wanted = [m for m in KEYS if (m in metrics and m not in side.stats) or (save_stats and side is a)]
        source = ["statistics in the file"] if side.stats else []
        if wanted or keep:
            if net is None:
                net, result["weights"] = load_inception(weights, device)
            moments, pools[name] = measure(side, net, wanted, keep, batch, workers)
            side.stats |= {metric: m.mean_cov() for metric, m in moments.items()}
            source.append("images read")
        result[name] = {"path": side.path, "count": side.count, "source": " and ".join(source)}
        if side.count and side.count < 2048:
            notes.append(f"{side.path}: {side.count} images are few; below 2048 FID is far too high")
    if adm and a.count != 50_000:
        notes.append(f"{a.path}: {a.count} images; published numbers against ADM's batches are of 50000")
    if result.get("weights") == "random":
        notes.append("random weights: THE NUMBERS ARE MEANINGLESS, fit for a trial run")
    elif result.get("weights", "published") != "published":
        notes.append(f"--weights {weights}: not the published file, so numbers are not comparable")
    if save_stats and processes()[0] == 0:
        arrays = {key: a.stats[metric][i] for metric in KEYS for i, key in enumerate(KEYS[metric][:2])}
        write(save_stats, lambda f: np.savez(f, **arrays, count=a.count))

    for metric in KEYS:
        if metric in metrics:
            result[metric] = frechet_distance(*a.stats[metric], *b.stats[metric])
    if "is" in metrics:
        with plain_float32(device):
            logits = pools["samples"] @ net.fc.weight.T                               # TF: without the bias
        result["is"] = inception_score(logits)
        order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))
        mixed = inception_score(logits[order])
        if result["is"] < 0.9 * mixed:
            notes.append(f"{a.path}: sorted by class? IS is {mixed:.2f} in random order: see inception_score")
    if "pr" in metrics:
        result["precision"], result["recall"] = precision_recall(*pools.values(), half=half)
    return result | {"notes": notes}


# -----------------------------------------------------------------------------------------------------------
# 6. The command line
# -----------------------------------------------------------------------------------------------------------

def parse(argv):
    usage = __doc__.index("  python fid.py")
    parser = argparse.ArgumentParser(prog="fid.py", description=__doc__[:usage].strip(), allow_abbrev=False,
                                     epilog=__doc__[usage:],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"fid.py: {message}\n")
    add = parser.add_argument
    add("samples", metavar="SAMPLES", help="folder of images or .npz")
    add("reference", metavar="REFERENCE", nargs="?", help="the same")
    add("--metrics", type=lambda text: text.split(","), help="of fid,sfid,is,pr (default: all the two allow)")
    add("--save-stats", metavar="F.npz", help="write the statistics of SAMPLES")
    add("--weights", metavar="F", help="Inception weights: a file, or random (default: published, fetched)")
    add("--range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="of images stored as floats")
    add("--adm-half", action="store_true", help="precision and recall by float16 distances, as ADM's")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:N or mps")
    add("--batch", type=int, help="images at a time (default: 16 on a CPU, else 128)")
    add("--workers", type=int, help="processes that decode images (default: one a core, at most 8)")
    add("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    kind, _, index = args.device.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    known, (low, high) = kind in there and (index or "0").isdecimal(), args.range or (0, 1)
    rules = [("batch", args.batch is None or args.batch >= 1, "must be at least 1"),
             ("workers", args.workers is None or args.workers >= 0, "must be 0 or more"),
             ("range", -np.inf < low < high < np.inf, "must be LOW HIGH"),
             ("device", known, "choose cpu, cuda, cuda:N or mps"),
             ("device", known and there[kind] > int(index or 0), "not here: use cpu")]
    for name, fine, fix in rules:
        if not fine:
            value = vars(args)[name]
            raise ValueError(f"--{name} {' '.join(map(str, value)) if name == 'range' else value}: {fix}")
    return args


def main(argv=None):
    rank, local, world = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    joins = world > 1 and not dist.is_initialized()
    try:
        args = parse(argv)
        device = f"cuda:{local}" if args.device == "cuda" else args.device
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        if joins:
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        result = evaluate(args.samples, args.reference, args.metrics, device, args.batch, args.weights,
                          args.workers, args.save_stats, args.adm_half, args.range)
    except (ValueError, OSError) as e:
        if rank == 0:
            print(f"fid.py: {e}", file=sys.stderr)
        return 2
    if joins:
        dist.destroy_process_group()
    if rank == 0:
        for note in result["notes"]:
            print(f"note: {note}", file=sys.stderr)
        if args.json:
            print(json.dumps(result))
            return 0
        for name in ("samples", "reference"):
            if name in result:
                path, count, source = result[name].values()
                print(f"{name:10} {path}: {count or 'unknown number of'} images ({source})")
        print(f"{'weights':10} {result.get('weights', 'not needed')}")
        for name in ("fid", "sfid", "is", "precision", "recall"):
            if name in result:
                print(f"{name:10} {result[name]:.5f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
