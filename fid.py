# SPDX-License-Identifier: MIT
"""Frechet distances between sets of feature vectors, from streamed moments (arXiv 1706.08500)."""

import numpy as np
import scipy.linalg


class Moments:
    """Mean and covariance of rows seen a batch at a time: count, sum and sum of outer products in float64."""

    def __init__(self, dim):
        self.count, self.sum, self.outer = 0, np.zeros(dim), np.zeros((dim, dim))

    def add(self, rows):
        """rows: (N, dim), any float type."""
        rows = np.asarray(rows, dtype=np.float64)
        self.count += len(rows)
        self.sum += rows.sum(0)
        self.outer += rows.T @ rows

    def mean_cov(self):
        """-> mu (dim,), sigma (dim, dim) with denominator N - 1, as np.cov. ValueError below 2 rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, got {self.count}")
        mu = self.sum / self.count
        return mu, (self.outer - self.count * np.outer(mu, mu)) / (self.count - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^1/2), in float64.

    mu (d,), sigma (d, d) symmetric positive semi-definite, of any rank. With sigma_i = F_i F_i^T the trace of
    the root is the sum of the singular values of F_1^T F_2: all symmetric problems, exact for singular
    covariances too, where the usual square root of the product loses half its digits. Raises ValueError for
    shapes that differ, an asymmetric or a negative covariance."""
    mu1, mu2, sigma1, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, mu2, sigma1, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != 2 * mu1.shape:
        raise ValueError(f"shapes differ: mu {mu1.shape}, {mu2.shape}; sigma {sigma1.shape}, {sigma2.shape}")
    factors = []
    for sigma in (sigma1, sigma2):
        if not np.allclose(sigma, sigma.T, rtol=1e-5, atol=1e-6 * np.abs(sigma).max(initial=1e-30)):
            raise ValueError("covariance is not symmetric")
        w, v = scipy.linalg.eigh((sigma + sigma.T) / 2)
        if w[0] < -1e-6 * max(w[-1], 1e-30):
            raise ValueError(f"covariance has a negative eigenvalue, {w[0]:.3g} (largest {w[-1]:.3g})")
        factors.append(v * np.sqrt(w.clip(0)))
    root = scipy.linalg.svdvals(factors[0].T @ factors[1]).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root)
