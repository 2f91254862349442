"""AdamW for K members at once: each with its own rate, its own step count, its own clipping.

The mathematics is torch.optim.AdamW's (Loshchilov & Hutter 2019, alg. 2); what is added is the leading member axis of
every parameter.  The step itself is torch's fused one, member by member.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from variants.base import Group


class MemberAdamW:
    """AdamW over parameters (K, ...).

    learning_rates: (K,) rate of each member; a parameter's is that times its group's `lr_scale` times the schedule's factor.
    weight_decay: decoupled decay; a parameter's is that times its group's `weight_decay`.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        learning_rates: Tensor,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
    ):
        self.groups = list(groups)
        self.params = [p for g in self.groups for p in g.params]
        self.learning_rates = learning_rates
        self.weight_decay, self.betas, self.epsilon = weight_decay, betas, epsilon
        self.first = [torch.zeros_like(p) for p in self.params]
        self.second = [torch.zeros_like(p) for p in self.params]
        self.taken = torch.zeros_like(learning_rates)  # (K,) steps that each member has taken
        self._counters = {p.device: torch.zeros((), dtype=torch.float32, device=p.device) for p in self.params}

    @torch.no_grad()
    def gradient_norms(self) -> Tensor:
        """(K,): the norm of each member's whole gradient."""
        gradients = [p.grad for p in self.params if p.grad is not None]
        if len(self.learning_rates) == 1:
            norms = torch.stack(torch._foreach_norm(gradients))[:, None]
        else:
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients])
        return torch.linalg.vector_norm(norms, dim=0)

    @torch.no_grad()
    def clip(self, norms: Tensor, limit: float) -> None:
        """Shortens each member's gradient to `limit` where its norm is greater; as torch's clip_grad_norm_ does for one."""
        factor = (limit / (norms + 1e-6)).clamp(max=1.0)
        if bool((factor == 1).all()):
            return
        gradients = [p.grad for p in self.params if p.grad is not None]
        if len(factor) == 1:
            torch._foreach_mul_(gradients, factor.item())
            return
        for gradient in gradients:
            gradient.mul_(_along_members(factor.to(gradient.dtype), gradient))

    @torch.no_grad()
    def step(self, factor: float, taken: Tensor | None = None) -> None:
        """One step at `factor` times the rates; members not `taken` (K,) bool keep parameters and averages."""
        everyone = taken is None or bool(taken.all())
        if not everyone and not bool(taken.any()):
            return
        self.taken += 1 if everyone else taken.to(self.taken)
        if self._is_fusable():
            self._step_fused(factor, range(len(self.taken)) if everyone else taken.nonzero()[:, 0].tolist())
            return
        before = None if everyone else [[t.clone() for t in ts] for ts in (self.params, self.first, self.second)]
        self._step_elementwise(factor)
        if before is not None:
            for news, olds in zip((self.params, self.first, self.second), before, strict=True):
                for new, old in zip(news, olds, strict=True):
                    new[~taken] = old[~taken]

    def _is_fusable(self) -> bool:
        """The rates of a member are one number for each group; and one call a member is cheap, as it is not on a GPU."""
        plain = all(s.dim() < 2 for s in (g.lr_scale for g in self.groups) if isinstance(s, Tensor))
        return plain and (len(self.taken) == 1 or self.learning_rates.device.type == "cpu")

    def _step_fused(self, factor: float, members: Sequence[int]) -> None:
        """torch's fused step over the slices of one member after the other: one pass over the memory, few launches."""
        rates, done = (factor * self.learning_rates).tolist(), self.taken.tolist()
        at = 0
        for group in self.groups:
            some = [i for i in range(at, at + len(group.params)) if self.params[i].grad is not None]
            at += len(group.params)
            if not some:
                continue
            scale = torch.as_tensor(group.lr_scale).expand(len(rates)).tolist()
            whole = [
                [self.params[i] for i in some],
                [self.params[i].grad for i in some],
                [self.first[i] for i in some],
                [self.second[i] for i in some],
            ]
            slices = [] if len(rates) == 1 else [[tensor.unbind(0) for tensor in tensors] for tensors in whole]
            for k in members:
                counter = self._counters[self.params[some[0]].device].fill_(done[k])  # the step being taken is counted in it
                torch._fused_adamw_(
                    *(whole if len(rates) == 1 else [[parts[k] for parts in tensors] for tensors in slices]),
                    [],
                    [counter] * len(some),
                    lr=rates[k] * scale[k],
                    beta1=self.betas[0],
                    beta2=self.betas[1],
                    weight_decay=self.weight_decay * group.weight_decay,
                    eps=self.epsilon,
                    amsgrad=False,
                    maximize=False,
                )
            # The fused step tells no version counter that it wrote, and DoRA keeps its norm for as long as those stand still.
            torch.autograd.graph.increment_version([self.params[i] for i in some])

    def _step_elementwise(self, factor: float) -> None:
        """The same for all members at once, also for rates that differ within a member's tensor."""
        beta1, beta2 = self.betas
        steps = self.taken.clamp_min(1)
        correction1, root2 = 1 - beta1**steps, (1 - beta2**steps).sqrt()  # (K,)
        at = 0
        for group in self.groups:
            some = [i for i in range(at, at + len(group.params)) if self.params[i].grad is not None]
            at += len(group.params)
            if not some:
                continue
            params, first, second = ([tensors[i] for i in some] for tensors in (self.params, self.first, self.second))
            gradients = [p.grad for p in params]
            torch._foreach_lerp_(first, gradients, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
            spread = torch._foreach_sqrt(second)
            for p, s in zip(params, spread, strict=True):
                s.div_(_along_members(root2.to(p.dtype), p))
            torch._foreach_add_(spread, self.epsilon)
            change = torch._foreach_div(first, spread)
            scale = torch.as_tensor(group.lr_scale, dtype=self.learning_rates.dtype, device=params[0].device)  # () or (K, ...)
            rates = factor * (_along_members(self.learning_rates, scale) if scale.dim() else self.learning_rates) * scale
            for p, c in zip(params, change, strict=True):
                rate = _along_members(rates, p)
                if group.weight_decay:
                    p.mul_((1 - rate * (self.weight_decay * group.weight_decay)).to(p.dtype))
                c.mul_((rate / _along_members(correction1, p)).to(p.dtype))
            torch._foreach_sub_(params, change)

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, by name."""
        named = {f"first.{i}": t for i, t in enumerate(self.first)} | {f"second.{i}": t for i, t in enumerate(self.second)}
        return {**named, "taken": self.taken}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


def schedule_factor(schedule: str, index: int, total: int, warmup: int) -> float:
    """What step `index` (1-based) of `total` multiplies the rate with: up over `warmup` steps, then down to zero.

    The first step is not lost to a rate of zero, nor is the last: the ramp is index/warmup, the fall starts at 1 on the
    first step after it and would reach 0 one step after the last.
    """
    if index <= warmup:
        return index / warmup
    if schedule == "constant":
        return 1.0
    left = (total - index + 1) / (total - warmup)
    return left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))


def _along_members(values: Tensor, parameter: Tensor) -> Tensor:
    """(K,) or (K, ...) as a factor on a parameter (K, ...)."""
    return values.view(*values.shape, *[1] * (parameter.dim() - values.dim()))
