"""PiSSA: LoRA that starts at the principal part of the weight, and leaves the rest frozen.

    W = U diag(sigma) V^T        B = U_r diag(sigma_r / s)^(1/2)        A = diag(sigma_r / s)^(1/2) V_r^T

U_r, sigma_r and V_r are the r greatest singular values and their vectors, so that s B A is the best approximation of W by a
matrix of rank r, and W - s B A is what stays frozen (variants/residual.py).  Meng et al. 2024 (arXiv 2404.02948), eq. (2) to
(4), where s = 1; the division by s is PEFT's, whose exact SVD (init_lora_weights = "pissa") this is.

Departure: the fast SVD (PEFT's "pissa_niter_16") is not offered, since its draw is stored nowhere and its start cannot be made
again.
"""

from collections.abc import Sequence

import torch
from rankwise.variants.residual import ResidualLoRA, Starts
from torch import Tensor


class PiSSA(ResidualLoRA):
    """K members of PiSSA."""

    method = "pissa"
    init_lora_weights = "pissa"

    def parts(self, W: Tensor, ranks: Sequence[int], scales: Sequence[float]) -> Starts:
        U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
        roots = [(sigma[:r] / s).sqrt() for r, s in zip(ranks, scales, strict=True)]
        return [(root[:, None] * Vt[: len(root)], U[:, : len(root)] * root) for root in roots]
