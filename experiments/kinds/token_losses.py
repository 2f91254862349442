"""The loss of every scored token of a language model, without the logits of any other.

    hidden states of the scored tokens (S, H)  ->  the model's own head, a chunk at a time  ->  losses (S,)

Logits of all tokens, (rows, length, vocabulary) in float32, would be the largest tensor of a step: 8 rows of 512 tokens and a
vocabulary of 150,000 are 2.5 GB, and a loss holds three such tensors.  Here the model's body runs once, and only the hidden
states of tokens that are scored go on.  What follows the body (the output layer, Gemma's soft cap, Cohere's and Granite's
scales, BART's bias) is the model's own code: its forward pass is called with the body's part in it already done.

The loss of a token depends on the hidden state of that token alone.  So its gradient is taken together with the loss, while
the chunk's logits are there, and multiplied by the incoming one later: exact, and no chunk is computed twice.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from rankwise.experiments.data.encoded import IGNORED
from rankwise.experiments.kinds.interface import at_least_fp32
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK = 1 << 24  # logits at a time: 64 MB in float32


def token_losses(model: Any, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """(rows, L): the cross-entropy of each labelled token; 0 where the label is -100.

    labels: (rows, L), of a decoder the token at each place, which the place before predicts; of an encoder-decoder the target.

    Raises:
        ValueError: the model is not of transformers' form, a body with an output layer after it.
    """
    is_seq2seq = model.config.is_encoder_decoder
    targets = labels if is_seq2seq else F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    scored = targets != IGNORED
    if is_seq2seq:
        inputs = {**inputs, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels)}
    body, head = model.get_decoder(), model.get_output_embeddings()
    if body is model or head is None:
        raise ValueError(f"{type(model).__name__} has no body with an output layer after it, so it is no language model")
    losses = torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
    if any(parameter.requires_grad for parameter in head.parameters()):
        # Members own rows, and a site counts them: every row gives as many tokens, its scored ones first.
        order = scored.int().argsort(dim=1, descending=True, stable=True)[:, : max(1, int(scored.sum(1).max()))]  # (rows, T)
        with _changed_states(body, lambda states: states.gather(1, order[..., None].expand(-1, -1, states.shape[-1]))):
            logits = at_least_fp32(model(**inputs, use_cache=False).logits)  # (rows, T, V)
        chosen = targets.gather(1, order)
        found = F.cross_entropy(logits.flatten(0, 1), chosen.flatten(), ignore_index=IGNORED, reduction="none")
        return losses.to(found.dtype).scatter(1, order, found.view(chosen.shape))
    kept: list[Any] = []
    with _changed_states(body, lambda states: states[:, :1], kept):
        model(**inputs, use_cache=False)
    (output,) = kept
    states, right = output.last_hidden_state[scored], targets[scored]  # (S, H), (S,)
    chunk = max(1, CHUNK // head.weight.shape[0])
    found = _TokenLosses.apply(states, right, lambda part: _logits(model, body, type(output), part), chunk)
    return losses.to(found.dtype).index_put(torch.nonzero(scored, as_tuple=True), found)


def all_token_losses(model: Any, inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, int]:
    """(rows*L,): losses of every token, and the bytes of one chunk of logits; `token_losses` where nothing is left out.

    What is scored depends on values; a plan has shapes alone (experiments/plan/step.py), and counts the most there can be.
    """
    if model.config.is_encoder_decoder:
        inputs = {**inputs, "decoder_input_ids": labels}
    body, head = model.get_decoder(), model.get_output_embeddings()
    kept: list[Any] = []
    with _changed_states(body, lambda states: states[:, :1], kept):
        model(**inputs, use_cache=False)
    (output,) = kept
    states, vocabulary = output.last_hidden_state.flatten(0, 1), head.weight.shape[0]
    chunk = max(1, CHUNK // vocabulary)
    losses = _TokenLosses.apply(states, labels.flatten(), lambda part: _logits(model, body, type(output), part), chunk)
    return losses, min(chunk, len(states)) * vocabulary * max(4, states.element_size())


class _TokenLosses(torch.autograd.Function):
    """Losses (S,) of hidden states (S, H) against tokens (S,), `chunk` of them at a time."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, tokens: Tensor, head: Callable[[Tensor], Tensor], chunk: int) -> Tensor:
        is_training = ctx.needs_input_grad[0]
        losses = states.new_empty(len(states), dtype=torch.promote_types(states.dtype, torch.float32))
        gradients = torch.empty_like(states) if is_training else None
        for at in range(0, len(states), chunk):
            part = slice(at, at + chunk)
            with torch.set_grad_enabled(is_training):
                own = states[part].detach().requires_grad_(is_training)
                loss = F.cross_entropy(at_least_fp32(head(own)), tokens[part], reduction="none")
                if gradients is not None:
                    (gradients[part],) = torch.autograd.grad(loss.sum(), own)
            losses[part] = loss.detach()
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * incoming[:, None].to(gradients.dtype), None, None, None


@contextmanager
def _changed_states(body: nn.Module, change: Callable[[Tensor], Tensor], kept: list[Any] | None = None) -> Iterator[None]:
    """While what follows `body` sees its last hidden states changed; its own output goes into `kept`."""

    def hook(_: nn.Module, args: tuple, output: Any) -> Any:
        if kept is not None:
            kept.append(output)
        return type(output)(last_hidden_state=change(output.last_hidden_state))

    handle = body.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _logits(model: Any, body: nn.Module, form: type, states: Tensor) -> Tensor:
    """(S, V): what the model's forward pass makes of hidden states (S, H) after its body.

    form: of the body's output.
    """
    given = vars(body).get("forward")  # set where someone wrapped the module (accelerate)
    token = torch.zeros(1, 1, dtype=torch.int64, device=states.device)
    body.forward = lambda *_, **__: form(last_hidden_state=states[None])
    try:
        if model.config.is_encoder_decoder:
            output = model.forward(encoder_outputs=(states[None, :1],), decoder_input_ids=token, use_cache=False)
        else:
            output = model.forward(input_ids=token, use_cache=False)
    finally:
        del body.forward
        if given is not None:
            body.forward = given
    return output.logits[0]
