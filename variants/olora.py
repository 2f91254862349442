"""OLoRA: LoRA that starts at an orthonormal basis of the weight's first columns.

    W = Q R        B = Q_r (O, r)        A = R_r (r, I)

Q_r are the first r columns of Q, R_r the first r rows of R; W - s B A is what stays frozen (variants/residual.py).
Buyukakyuz 2024 (arXiv 2406.01775), alg. 1; PEFT's init_lora_weights = "olora".

Departure: at GPT-2's Conv1D, which stores W transposed, W (O, I) is decomposed as everywhere; PEFT decomposes what is stored.
"""

from collections.abc import Sequence

import torch
from rankwise.variants.residual import ResidualLoRA, Starts
from torch import Tensor


class OLoRA(ResidualLoRA):
    """K members of OLoRA."""

    method = "olora"
    init_lora_weights = "olora"

    def parts(self, W: Tensor, ranks: Sequence[int], scales: Sequence[float]) -> Starts:
        Q, R = torch.linalg.qr(W)
        return [(R[:r], Q[:, :r]) for r in ranks]
