"""From a model's output to each member's loss and predictions, by kind of task."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def logits(kind: str, output: Any, attention_mask: Tensor) -> Tensor:
    """A model's (K*N, labels) or (K*N, L, labels); for spans (K*N, L, 2), start and end score of each token.

    At a span's padding they are the least number there is, so that a loss, a softmax over the row's tokens, does not depend
    on how far the row is padded (run_qa.py pads every row to one length, and leaves the padding in).
    """
    if kind != "span":
        return output.logits
    both = torch.stack([output.start_logits, output.end_logits], dim=-1)
    return both.masked_fill(attention_mask.unsqueeze(-1) == 0, torch.finfo(both.dtype).min)


def losses(kind: str, logits: Tensor, labels: Tensor, members: int) -> Tensor:
    """(K,): each member's loss, the mean over its own rows, or over its own scored tokens.

    Args:
        kind: "regression" (squared error), "classification", "token-classification" or "span" (cross-entropy; a span's is
            the mean of its start's and its end's, each a choice among the L tokens).
        logits: (K*N, labels) or (K*N, L, labels), each member's rows together.
        labels: (K*N,), (K*N, L) or, for spans, (K*N, 2); -100 is not scored.
    """
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    if kind == "regression":
        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype), reduction="none").view(members, -1).mean(1)
    if kind == "span":  # a row's start and its end are two classifications: (2 K N, L), (2 K N,)
        return losses("classification", logits.mT.flatten(0, 1), labels.flatten(), members)
    if kind == "classification":
        return F.cross_entropy(logits, labels, reduction="none").view(members, -1).mean(1)
    if kind == "token-classification":
        flat = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
        return flat.view(members, -1).sum(1) / counts(kind, labels, members).clamp_min(1)
    raise ValueError(f'kind = "{kind}": should be regression, classification, token-classification or span')


def counts(kind: str, labels: Tensor, members: int) -> Tensor:
    """(K,): over how many rows or scored tokens each member's mean is taken."""
    if kind == "token-classification":
        return (labels.view(members, -1) != -100).sum(1)
    return torch.ones_like(labels.view(members, len(labels) // members, -1)[..., 0]).sum(1)


def predictions(kind: str, logits: Tensor) -> Tensor:
    """A number for each row (regression), the scores of each token (spans), else the likeliest label of each row or token."""
    if kind == "span":
        return logits.float()
    return logits.float().squeeze(-1) if kind == "regression" else logits.argmax(-1)
