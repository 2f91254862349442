"""From a model's output to each member's loss and predictions, by kind of task."""

import torch
from torch import Tensor
from torch.nn import functional as F


def losses(kind: str, logits: Tensor, labels: Tensor, members: int) -> Tensor:
    """(K,): each member's loss, the mean over its own rows, or over its own scored tokens.

    Args:
        kind: "regression" (squared error), "classification" or "token-classification" (cross-entropy).
        logits: (K*N, labels) or (K*N, L, labels), each member's rows together.
        labels: (K*N,) or (K*N, L); -100 is not scored.
    """
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    if kind == "regression":
        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype), reduction="none").view(members, -1).mean(1)
    if kind == "classification":
        return F.cross_entropy(logits, labels, reduction="none").view(members, -1).mean(1)
    if kind == "token-classification":
        flat = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
        return flat.view(members, -1).sum(1) / counts(kind, labels, members).clamp_min(1)
    raise ValueError(f'kind = "{kind}": should be regression, classification or token-classification')


def counts(kind: str, labels: Tensor, members: int) -> Tensor:
    """(K,): over how many rows or scored tokens each member's mean is taken."""
    scored = labels.view(members, -1) != -100 if kind == "token-classification" else torch.ones_like(labels).view(members, -1)
    return scored.sum(1)


def predictions(kind: str, logits: Tensor) -> Tensor:
    """A number for each row (regression), else the likeliest label of each row or token."""
    return logits.float().squeeze(-1) if kind == "regression" else logits.argmax(-1)
