"""What the bare model says of each site before training: its inputs, or the gradients of its weight.

Whatever a member measures depends on its own rows, its own head and its own seed: the members' rows go through the bare
model together, and are separated at each site.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.linears import dtype_of, size_of
from rankwise.variants.adapter.step import Calibration
from torch import Tensor, nn


@contextlib.contextmanager
def measuring(adapter: Adapter, training: bool, hooks: Mapping[str, Callable]) -> Iterator[None]:
    """The bare model in training or evaluation mode, with a forward hook at each of these modules; left as it was."""
    model = adapter.model
    modes = [(module, module.training) for module in model.modules()]
    handles = []
    try:
        model.train(training)
        handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
        adapter.draw.step = None
        adapter.draw.calls.clear()
        for parameter in adapter.heads.parameters():
            parameter.grad = None


def run(adapter: Adapter, calibration: Calibration, number: int) -> Any:
    """One forward pass over the batch of that number: what `loss` says of it, or the model's output.

    Draws are keyed by step 0, which training, whose steps count from 1, never has.
    """
    adapter.draw.begin(0, number)
    batch = calibration.batches[number]
    if calibration.loss is not None:
        return calibration.loss(batch)
    if isinstance(batch, Mapping):
        return adapter.model(**{key: value for key, value in batch.items() if key != "labels"})
    return adapter.model(*batch) if isinstance(batch, tuple | list) else adapter.model(batch)


def gradients(
    adapter: Adapter,
    names: Sequence[str],
    calibration: Calibration,
    of_batch: Callable[[str, Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """(K, O, I) of each site: dL/dW of every member's own loss, the mean over the batches; on the CPU.

    One backward pass serves all members: G_k = g_k^T x_k, from the input x and the output's gradient g of the frozen module.

    Args:
        of_batch: a function of a site and its gradient of one batch; the mean over the batches is then of what it says.
    """
    gradients: dict[str, Tensor] = {}
    totals: dict[str, Tensor] = {}
    K = adapter.members

    def hook(name: str) -> Callable:
        def after(module: nn.Module, args: tuple, y: Tensor) -> Tensor:
            adapter.draw.rows.check(name, args[0])
            x = adapter.draw.rows.by_member(args[0].detach())  # (K, N, I)

            def take(g: Tensor) -> None:
                wide = torch.promote_types(dtype_of(module), torch.float32)
                with torch.autocast(x.device.type, enabled=False):
                    G = torch.bmm(adapter.draw.rows.by_member(g.detach()).mT.to(wide), x.to(wide)).cpu()  # (K, O, I)
                gradients[name] = gradients[name].add_(G) if name in gradients else G

            if not y.requires_grad:  # the model is frozen: its graph begins here
                y = y.detach().requires_grad_().clone()  # a copy, as what follows may write into it
            y.register_hook(take)
            return y

        return after

    with measuring(adapter, True, {name: hook(name) for name in names}), torch.enable_grad():
        for number in range(len(calibration.batches)):
            losses = run(adapter, calibration, number)
            if losses.shape != (K,):
                raise ValueError(
                    f"the loss of a calibration has shape {tuple(losses.shape)}: give one number for each of {K} members"
                )
            losses.sum().backward()
            if of_batch is not None:
                for name in list(gradients):
                    now = of_batch(name, gradients.pop(name))
                    totals[name] = totals[name] + now if name in totals else now
    gradients |= totals
    for name in names:
        G = gradients.get(name)
        if G is None:  # no path leads from this module to the loss
            module = adapter.model.get_submodule(name)
            nothing = torch.zeros(K, *size_of(module))
            gradients[name] = nothing if of_batch is None else of_batch(name, nothing)
        else:
            G.div_(len(calibration.batches))
    return gradients
