# SPDX-License-Identifier: MIT
"""FID, sFID, Inception Score, precision and recall, with the numbers of ADM's TensorFlow evaluator.

  FID        |μ1 - μ2|² + tr(Σ1 + Σ2 - 2 (Σ1 Σ2)^1/2) of 2,048 Inception features (arXiv 1706.08500)
  sFID       the same of 7 channels of a 17x17 map, which see the layout (arXiv 2103.03841)
  IS         exp E_x KL(p(y|x) | p(y)) of the class probabilities p (arXiv 1606.03498)
  precision  share of the samples inside the manifold of the reference (arXiv 1904.06991)
  recall     share of the reference inside the manifold of the samples

  python fid.py SAMPLES REFERENCE                              every metric that the inputs allow
  python fid.py IMAGES --save-stats stats.npz                  statistics, a REFERENCE for later
  torchrun --nproc_per_node=8 fid.py SAMPLES REFERENCE         the same numbers from 8 processes

Each is a folder of images, at any depth, or an .npz file with arr_0 (uint8, N x H x W x 3 or 1),
or with mu and sigma (and mu_s, sigma_s for sFID), or both. TF marks TensorFlow's quirks.
"""

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
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
POOL, SPATIAL = 2048, 17 * 17 * 7  # numbers of features
KEYS = {"fid": ("mu", "sigma", POOL), "sfid": ("mu_s", "sigma_s", SPATIAL)}  # of an .npz
SUFFIXES = set(".png .jpg .jpeg .jfif .bmp .webp .tif .tiff .ppm .pgm .pbm .pnm".split())
# As torchrun and other launchers set them. A process alone is process 0, whatever RANK says.
WORLD = int(os.environ.get("WORLD_SIZE") or 1)
RANK = int(os.environ.get("RANK") or 0) if WORLD > 1 else 0
LOCAL_RANK = int(os.environ.get("LOCAL_RANK") or 0) if WORLD > 1 else 0


# ---- 1. The network: torchvision's Inception-v3 with other poolings ------------------------------
def replace_pool(block, pool):
    """Feed pool(x) to the block's branch_pool, where x is the input of the block."""
    def keep_pooled(block, inputs):
        block.pooled = pool(inputs[0])
    block.register_forward_pre_hook(keep_pooled)
    block.branch_pool.register_forward_pre_hook(lambda conv, inputs: block.pooled)


def inception():
    """The network in eval mode, random weights, parameters named as in the published file."""
    net = tv.Inception3(1008, aux_logits=False, init_weights=False)
    mean_pool = torch.nn.AvgPool2d(3, 1, 1, count_include_pad=False)  # TF: a corner has 4 pixels
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        replace_pool(net.get_submodule(f"Mixed_{name}"), mean_pool)
    replace_pool(net.Mixed_7c, torch.nn.MaxPool2d(3, 1, 1))  # TF: in this block alone
    draw = torch.Generator().manual_seed(0)
    for weight in (p for p in net.parameters() if p.ndim > 1):
        torch.nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=draw)
    return net.eval()


def load_inception(weights=None, device="cpu"):
    """Return the network and the name of its weights: "published", "random" or a path.
    weights is a file, "random", or None: the published ones, downloaded once into torch's hub cache
    by one process of a machine. Raises ValueError for a bad file."""
    net, name = inception(), str(weights)
    path = weights or Path(torch.hub.get_dir(), "checkpoints", Path(URL).name)
    if weights is None:
        if not path.exists() and LOCAL_RANK == 0:
            with readable(f"{URL} (get it by other means and put it at {path})"):
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(URL, str(path), hash_prefix=SHA256)
        if WORLD > 1:
            dist.barrier()
    if weights != "random":
        with readable(path):
            if hashlib.sha256(Path(path).read_bytes()).hexdigest() == SHA256:
                name = "published"
            elif weights is None:
                raise ValueError(f"delete it, because its SHA-256 is not {SHA256}")
        with readable(path, "not a whole state dict, as torch.save writes it"):
            state = torch.load(path, map_location="cpu", weights_only=True)
        with readable(path):
            missing, others = net.load_state_dict(state, strict=False)
            if missing or others:
                raise ValueError(f"not FID's Inception: lacks {missing[:1]}, has {others[:1]}")
    for unit in net.modules():
        if isinstance(unit, tv.BasicConv2d):  # faster; moves features by about 1e-6
            unit.conv, unit.bn = fuse_conv_bn_eval(unit.conv, unit.bn), torch.nn.Identity()
    return net.to(device, memory_format=torch.channels_last).requires_grad_(False), name


@contextlib.contextmanager
def readable(name, reason=None):
    """Turn any error in reading a file into a ValueError of one line: its name and the reason."""
    try:
        yield
    except Exception as e:  # a damaged file raises many types
        reason = reason or " ".join(str(e).split())[:200]
        raise ValueError(f"{name}: cannot be read ({type(e).__name__}: {reason})") from None


# ---- 2. From images to features ------------------------------------------------------------------
def resize(images, size=299):
    """Images (N, H, W, C) of any type -> (N, size, size, C) float32, not rounded.
    TF: ResizeBilinear of 2015, bit for bit: pixel i is at i * in/out, not at half a pixel more as in
    F.interpolate, and nothing is smoothed."""
    for axis in (2, 1):  # horizontally first
        length = images.shape[axis]
        position = torch.arange(size).float() * torch.tensor(length / size).float()
        low = position.floor().long().to(images.device)
        high = (low + 1).clamp(max=length - 1)
        start = images.index_select(axis, low).float()
        end = images.index_select(axis, high).float()
        fraction = (position.to(images.device) - low).view(-1, *[1] * (3 - axis))
        images = start + (end - start) * fraction
    return images


@torch.inference_mode()
def features(net, images):
    """Images (N, H, W, 3) in 0..255 -> pool_3 (N, 2048) and spatial (N, 2023), float32.
    TF: the network sees (x - 128) / 128, so 255 becomes 0.992. The spatial features are the first 7
    channels of Mixed_6d, flattened with the channel last as in ADM's reference files."""
    device = net.fc.weight.device
    no_tf32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with no_tf32, torch.autocast(device.type, enabled=False):
        x = ((resize(images.to(device)) - 128) / 128).permute(0, 3, 1, 2)  # (N, 3, 299, 299)
        for name, layer in net.named_children():  # in order of execution
            if name == "avgpool":
                break
            x = layer(x)  # last (N, 2048, 8, 8)
            if name == "Mixed_6d":  # (N, 768, 17, 17)
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        return x.mean((2, 3)), spatial


# ---- 3. The metrics ------------------------------------------------------------------------------
class Moments:
    """Mean and covariance of rows (N, dim) that come in batches, summed in float64."""
    def __init__(self, dim, device="cpu"):
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.count, self.outer = self.sum.new_zeros(()), self.sum.new_zeros(dim, dim)

    def add(self, rows):
        rows = torch.as_tensor(rows).to(self.sum)  # (N, dim), float64
        self.count += len(rows)
        self.sum += rows.sum(0)
        self.outer.addmm_(rows.T, rows)

    def mean_cov(self):
        """Return mu (dim,) and sigma (dim, dim) with denominator N - 1. ValueError below 2 rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, got {self.count:.0f}")
        mu = self.sum / self.count
        sigma = (self.outer - self.count * torch.outer(mu, mu)) / (self.count - 1)
        return mu.cpu().numpy(), sigma.cpu().numpy()


def covariance_factor(mu, sigma):
    """Mean (d,), covariance (d, d), float64 -> factor (d, rank) with factor @ factor.T = sigma.
    Raises ValueError for arguments that are not symmetric, finite or positive semi-definite."""
    rounding = 1e-12 * mu @ mu  # of the sums that sigma comes from
    if not np.abs(sigma - sigma.T).max() <= 1e-6 * np.abs(sigma).max() + rounding < np.inf:  # NaN
        raise ValueError("mean or covariance is not finite, or covariance is not symmetric")
    factor, failed = torch.linalg.cholesky_ex(torch.from_numpy(sigma))
    if failed:  # not of full rank
        w, v = scipy.linalg.eigh(sigma)  # numpy's can fail at equal eigenvalues
        if w[0] < -1e-6 * w[-1] - rounding:
            raise ValueError(f"covariance has a negative eigenvalue, {w[0]:.3g}")
        keep = w > len(w) * np.finfo(w.dtype).eps * w[-1] + rounding
        factor = torch.from_numpy(v[:, keep] * np.sqrt(w[keep]))
    return factor


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|² + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^1/2), in float64, not below 0.
    mu (d,), sigma (d, d) of any rank. With sigma_i = A_i A_i' the trace of the root is the sum of the
    singular values of A_1' A_2. Raises ValueError for what is no mean or covariance."""
    mu1, mu2, sigma1, sigma2 = (np.asarray(a, np.float64) for a in (mu1, mu2, sigma1, sigma2))
    if mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == 2 * mu1.shape:
        raise ValueError(f"shapes differ: {mu1.shape} {sigma1.shape}, {mu2.shape} {sigma2.shape}")
    product = covariance_factor(mu1, sigma1).T @ covariance_factor(mu2, sigma2)  # (rank, rank)
    trace_of_root = torch.linalg.svdvals(product).sum().item()
    return max(0.0, float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2) - 2 * trace_of_root))


def inception_score(logits, split=5000):
    """Logits (N, classes) in the order of the samples -> mean of exp E KL(p(y|x) | p(y)).
    TF: over splits of 5,000, the last of which may be short. A set sorted by class scores low."""
    scores = []
    for log_p in logits.double().log_softmax(1).split(split):  # (n, classes)
        log_mean = log_p.logsumexp(0) - np.log(len(log_p))  # (classes,)
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def precision_recall(samples, reference, k=3):
    """Features of samples (N, d) and reference (M, d) -> precision, recall in 0..1.
    A manifold is the union of closed balls around a set's features, each up to the k-th neighbour.
    Raises ValueError for sets of k or fewer."""
    if min(len(samples), len(reference)) <= k:
        raise ValueError(f"precision and recall need more than {k} images on each side")
    return share_inside(samples, reference, k), share_inside(reference, samples, k)


def share_inside(points, centres, k, rows=1000):
    """Share of the points in a ball around any centre; `rows` rows of distances at a time."""
    def squared_distances(u):
        return (u.square().sum(1)[:, None] - 2 * u @ centres.T + centres.square().sum(1)).clamp(0)
    nearest = [squared_distances(u).topk(k + 1, largest=False).values for u in centres.split(rows)]
    radii = torch.cat(nearest)[:, k]  # column 0 is the centre itself
    inside = [(squared_distances(u) <= radii).any(1) for u in points.split(rows)]
    return torch.cat(inside).double().mean().item()


# ---- 4. Inputs -----------------------------------------------------------------------------------
def contents(path):
    """Folder or .npz -> number of images, {metric: (mu, sigma)} of the file, note on what is skipped,
    and the images of the folder, listed once because it may grow. Raises ValueError, OSError."""
    count, stats, note, files = 0, {}, "", []
    if Path(path).is_dir():
        files, note = image_files(path)
        count = len(files)
    else:
        with readable(path), zipfile.ZipFile(path) as archive, np.load(path) as data:
            for metric, (mu, sigma, dim) in KEYS.items():
                if mu in data and sigma in data:
                    mean, cov = data[mu].astype(np.float64), data[sigma].astype(np.float64)
                    if mean.shape != (dim,) or cov.shape != (dim, dim):
                        raise ValueError(f"{mu} {mean.shape}, {sigma} {cov.shape}; need {dim}")
                    covariance_factor(mean, cov)  # raises ValueError if it is not one
                    stats[metric] = mean, cov
            if "arr_0" in data:
                count = read_shape(archive.open("arr_0.npy"))[0]
    if count < 2 and not stats:
        raise ValueError(f"{path}: {count} images; need 2 images (arr_0) or statistics (mu, sigma). {note}")
    return count, stats, note, files


def read_shape(f):
    """Read the header of arr_0 -> (N, H, W, C); f is then at the first image."""
    form = np.lib.format
    readers = {1: form.read_array_header_1_0, 2: form.read_array_header_2_0, 3: form.read_array_header_2_0}
    shape, by_columns, dtype = readers[form.read_magic(f)[0]](f)  # 3 is 2 with names in UTF-8
    if len(shape) != 4 or shape[3] not in (1, 3) or by_columns or dtype != np.uint8:
        raise ValueError(f"arr_0 is {dtype} {shape}; need uint8 N x H x W x 3 (grey: x 1) in row order")
    return shape


def array_batches(path, size, count):
    """Yield the `count` images of arr_0, compressed or not, as (size, H, W, 3); one batch is in memory at
    a time. Raises ValueError for a bad file, and for one that was replaced since they were counted."""
    with readable(path), zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as f:
        images, *shape = read_shape(f)
        if images != count:
            raise ValueError(f"arr_0 had {count} images and now has {images}")
        for start in range(0, count, size):
            n = min(size, count - start)
            data = bytearray(f.read(n * int(np.prod(shape))))
            yield torch.frombuffer(data, dtype=torch.uint8).view(n, *shape).expand(-1, -1, -1, 3)


def image_files(folder):
    """Folder -> its images at any depth, sorted, and a note on its other files. Links are followed,
    each folder is read once, hidden names are left out. Raises OSError for an unreadable folder."""
    def fail(error):  # os.walk alone would go on
        raise error
    images, others, seen = [], [], set()
    for top, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        if os.path.realpath(top) in seen:  # by a link, perhaps in a circle
            folders[:], names = [], []
        seen.add(os.path.realpath(top))
        for path in (Path(top, name) for name in names if name[0] != "."):
            is_image = path.suffix.lower() in SUFFIXES and path.is_file()
            (images if is_image else others).append(str(path))
    note = f"{folder}: skipped {len(others)} files that are no images, such as {min(others, default='')}"
    return sorted(images), note if others else ""


def decode(paths):
    """Image files -> (N, H, W, 3) uint8, or (N, 299, 299, 3) float32 if their sizes differ.
    Alpha is dropped and EXIF ignored. Raises ValueError for a file that is not an 8-bit image."""
    images = []
    for path in paths:
        with readable(path), Image.open(path) as image:
            raw = [tile[3] for tile in image.tile[:1]]  # such as RGB;16B
            bits = getattr(image, "tag_v2", {}).get(258, [])  # of a TIFF, whose planes lack it
            if image.mode[0] in "IF" or ";16" in str(raw) or max(bits, default=8) > 8:
                raise ValueError(f"more than 8 bits a channel, {image.mode} {raw} {bits}")
            images.append(torch.from_numpy(np.array(image.convert("RGB"))))
    if len({image.shape for image in images}) == 1:
        return torch.stack(images)
    return torch.cat([resize(image[None]) for image in images])


def decode_ahead(blocks, workers):
    """Yield decode(block) in order. Threads do, because PIL decodes outside of Python's lock."""
    Image.init()  # threads would race to load its formats
    with ThreadPoolExecutor(workers) as pool:
        ahead = [pool.submit(decode, block) for block in blocks[:workers]]
        for block in blocks[workers:]:
            ahead.append(pool.submit(decode, block))  # few, so that memory holds them
            yield ahead.pop(0).result()
        yield from (future.result() for future in ahead)


# ---- 5. The evaluation. Each process takes whole batches in turn ---------------------------------
def measure(path, files, count, stats, metrics, net, batch=None):
    """Read the images of a path, of a folder its files, once. Add to stats those of metrics in KEYS, and
    return pool_3 (count, 2048) in order, empty unless "is" or "pr" is in metrics. Raises ValueError."""
    device = net.fc.weight.device
    batch = min(batch or (128 if device.type == "cuda" else 16), count)
    workers = min(8, max(1, os.cpu_count() // WORLD))
    starts = range(RANK * batch, count, WORLD * batch)
    if files:
        batches = decode_ahead([files[start:start + batch] for start in starts], workers)
    else:
        batches = (x for i, x in enumerate(array_batches(path, batch, count)) if i % WORLD == RANK)
    moments = {metric: Moments(KEYS[metric][2], device) for metric in KEYS if metric in metrics}
    pool = torch.zeros(count if metrics & {"is", "pr"} else 0, POOL, device=device)
    for start, images in tqdm(zip(starts, batches), path, len(starts), disable=RANK > 0 or None):
        n = len(images)
        images = nnf.pad(images, (0, 0, 0, 0, 0, 0, 0, batch - n))  # rounding depends on the size
        rows = dict(zip(KEYS, features(net, images)))
        for metric in moments:
            moments[metric].add(rows[metric][:n])
        if len(pool):
            pool[start:start + n] = rows["fid"][:n]
    if WORLD > 1:
        dist.all_reduce(pool)  # others' rows are 0
        for moment in moments.values():
            for value in vars(moment).values():
                dist.all_reduce(value)
    if not all(moment.sum.isfinite().all() for moment in moments.values()):
        raise ValueError(f"{path}: features are not finite; are the weights damaged?")
    stats |= {metric: moment.mean_cov() for metric, moment in moments.items()}
    return pool


def evaluate(samples, reference=None, metrics=None, device="cpu", batch=None, weights=None,
             save_stats=None):
    """Compare two paths -> {"fid", "sfid", "is", "precision", "recall", and what was compared}.
    metrics: some of "fid", "sfid", "is", "pr"; None: all that the inputs allow. All processes call
    it and get the same. Raises ValueError, OSError."""
    inputs = [contents(samples), contents(reference) if reference else (0, {}, "", [])]
    if WORLD > 1:  # others may have listed a folder later
        dist.broadcast_object_list(inputs)
    (count_a, stats_a, note_a, files_a), (count_b, stats_b, note_b, files_b) = inputs
    allowed = [m for m in KEYS if (count_a or m in stats_a) and (count_b or m in stats_b)]
    allowed += ["is"] * (count_a > 0) + ["pr"] * (count_a > 0 and count_b > 0)
    if metrics is None:
        metrics = allowed if reference else []
    if not set(metrics) <= set(allowed):
        raise ValueError(f"--metrics {','.join(metrics)}: these inputs allow {allowed}")
    if save_stats and not count_a:
        raise ValueError(f"--save-stats {save_stats}: {samples} has no images")
    temporary = f"{save_stats}.tmp"  # so that the file is whole or not there
    read = filter(None, (samples, reference, weights, *files_a, *files_b))
    if save_stats and {*map(os.path.realpath, (save_stats, temporary))} & {*map(os.path.realpath, read)}:
        raise ValueError(f"--save-stats {save_stats}: would replace an input")
    if not metrics and not save_stats:
        raise ValueError("nothing to compute: give a REFERENCE, --metrics is or --save-stats F")
    from_a = set(metrics) - set(stats_a) | set(KEYS if save_stats else ())  # as in ADM's code
    from_b = set(metrics) - set(stats_b) - {"is"}
    notes = sorted({note_a, note_b} - {""})
    result = {"samples": samples, "images": count_a, "reference": reference}
    if min(count_a or 2048, count_b or 2048) < 2048:
        notes.append(f"few images ({count_a}, {count_b}): below 2048 FID is far too high")
    if count_b and stats_b and count_a not in (0, 50_000):
        notes.append(f"{samples}: {count_a} images; published numbers against ADM's file use 50000")
    if from_a or from_b:
        net, result["weights"] = load_inception(weights, device)
        if result["weights"] != "published":
            notes.append(f"--weights {weights}: not the published, THE NUMBERS ARE MEANINGLESS")
    if from_a:
        pool_a = measure(samples, files_a, count_a, stats_a, from_a, net, batch)
    if from_b:
        pool_b = measure(reference, files_b, count_b, stats_b, from_b, net, batch)
    if save_stats and RANK == 0:
        arrays = {name: x for m in KEYS for name, x in zip(KEYS[m], stats_a[m])}
        try:
            with open(temporary, "wb") as file:
                np.savez(file, **arrays)
            os.replace(temporary, save_stats)
        finally:
            Path(temporary).unlink(missing_ok=True)
    result |= {m: frechet_distance(*stats_a[m], *stats_b[m]) for m in KEYS if m in metrics}
    if "is" in metrics:
        logits = pool_a @ net.fc.weight.T  # TF: without the bias
        order = torch.randperm(count_a, generator=torch.Generator().manual_seed(0))
        result["is"] = inception_score(logits)
        if result["is"] < 0.9 * inception_score(logits[order]):
            notes.append(f"{samples}: sorted by class? IS is higher in random order")
    if "pr" in metrics:
        result["precision"], result["recall"] = precision_recall(pool_a, pool_b)
    return result | {"notes": notes}


# ---- 6. Processes and the command line -----------------------------------------------------------
def join(device):
    """Join the other processes. Return this one's torch.device for "cpu", "cuda" (one GPU each) or
    "cuda:N". Raises ValueError for a device that is not there."""
    name = f"cuda:{LOCAL_RANK}" if device == "cuda" else device
    if name not in ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]:
        raise ValueError(f"--device {device}: must be cpu, cuda or cuda:N of a GPU that is here")
    device = torch.device(name)
    if WORLD > 1 and device.type == "cuda":
        torch.cuda.set_device(device)
    if WORLD > 1 and not dist.is_initialized():  # hours: others wait for process 0
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(hours=2))
    return device


def parse(argv):
    parser = argparse.ArgumentParser(prog="fid.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"fid.py: {message}\n")
    add, path = parser.add_argument, os.path.expanduser  # a shell leaves the ~ of --weights=~/F
    add("samples", metavar="SAMPLES", type=path, help="folder of images or .npz")
    add("reference", metavar="REFERENCE", type=path, nargs="?", help="the same")
    add("--metrics", type=lambda text: text.split(","), help="of fid,sfid,is,pr (default: all)")
    add("--save-stats", metavar="F.npz", type=path, help="write the statistics of SAMPLES")
    add("--weights", metavar="F", type=path,
        help="Inception weights: a file, or random (default: downloaded)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda[:N]")
    add("--batch", type=int, help="images at a time (default: 128 on CUDA, 16 on a CPU)")
    add("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    file = args.save_stats
    if args.batch is not None and args.batch < 1:
        parser.error(f"--batch {args.batch}: must be at least 1")
    if file is not None and (Path(file).is_dir() or not os.access(Path(file).parent, os.W_OK)):
        parser.error(f"--save-stats {file}: not a file in a folder that can be written")
    return args


def main(argv=None):
    """The command line. Return the exit code; leave the streams and torch.distributed as they were."""
    args, result, joining = parse(argv), None, not dist.is_initialized()
    as_json = vars(args).pop("json")
    try:
        args.device = join(args.device)
        result = evaluate(**vars(args))
    except (ValueError, OSError) as e:
        print("fid.py:", *str(e).split(), file=sys.stderr)  # in one line
        return 2
    finally:  # after an error NCCL could wait here for processes that wait for us
        if joining and dist.is_initialized() and (result or args.device.type == "cpu"):
            dist.destroy_process_group()
    if RANK == 0:
        for note in result["notes"]:
            print("note:", note, file=sys.stderr)
        if as_json:
            print(json.dumps(result))
        for name in ("fid", "sfid", "is", "precision", "recall"):
            if name in result and not as_json:
                print(f"{name:10} {result[name]:.5f}")
    return 0


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # not None, as after >&-
        sys.stdout.reconfigure(errors="replace")  # --help holds more than ASCII
    sys.exit(main())
