"""AdamW for K members at once: each with its own rate, its own step count, its own clipping.

The mathematics is torch.optim.AdamW's (Loshchilov & Hutter 2019, alg. 2); what is added is the leading member axis of
every parameter, and that parameters may change their size: averages follow, and those of a new slot start as if training
did, with a step count of their own.  The step itself is torch's fused one, member by member, where one rate and one count
hold for a member's whole tensor.
"""

from collections.abc import Callable, Sequence

import torch
from rankwise.variants.adapter.step import Group
from torch import Tensor


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
        self._within = [j for g in self.groups for j in range(len(g.params))]  # place of each in its group
        self.learning_rates = learning_rates
        self.weight_decay, self.betas, self.epsilon = weight_decay, betas, epsilon
        self.first = [torch.zeros_like(p) for p in self.params]
        self.second = [torch.zeros_like(p) for p in self.params]
        self.taken = torch.zeros_like(learning_rates)  # (K,) steps that each member has taken
        self.born: list[Tensor | None] = [None] * len(self.params)  # (K, R..): steps that were taken before a slot was new
        self._counters = {p.device: torch.zeros((), dtype=torch.float32, device=p.device) for p in self.params}

    @torch.no_grad()
    def gradient_norms(self) -> Tensor:
        """(K,): the norm of each member's whole gradient."""
        gradients = [p.grad for p in self.params if p.grad is not None]
        if len(self.learning_rates) == 1:
            norms = torch.stack(torch._foreach_norm(gradients))[:, None]
        else:
            norms = torch.stack([g.reshape(len(g), -1).norm(dim=1) for g in gradients])
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
    def follow(self, changes: Sequence[tuple[Tensor, Callable[[Tensor], Tensor]]]) -> None:
        """Averages follow what was done to their parameters (`Adapter.take_changes`); those of new slots start anew."""
        place = {id(p): i for i, p in enumerate(self.params)}
        for parameter, change in changes:
            i = place[id(parameter)]
            self.first[i], self.second[i] = change(self.first[i]), change(self.second[i])
            new = change.new(parameter.dim())
            born = self.born[i]
            if born is not None:
                born = change(born)
            elif bool(new.any()):
                born = torch.zeros_like(new, dtype=self.taken.dtype)
            self.born[i] = None if born is None else torch.where(new, _along_members(self.taken, born), born)

    @torch.no_grad()
    def step(self, factor: float, taken: Tensor | None = None) -> None:
        """One step at `factor` times the rates; members not `taken` (K,) bool keep parameters and averages."""
        everyone = taken is None or bool(taken.all())
        if not everyone and not bool(taken.any()):
            return
        self.taken += 1 if everyone else taken.to(self.taken)
        self._update(factor, *self._parts(), None if everyone else taken)

    def _update(
        self,
        factor: float,
        whole: Sequence[tuple[Group, list[int]]],
        apart: Sequence[tuple[Group, list[int]]],
        taken: Tensor | None,
    ) -> None:
        """The step of these parameters, see `_parts`; of the members `taken`, or of all."""
        everyone = taken is None
        self._step_fused(factor, whole, range(len(self.taken)) if everyone else taken.nonzero()[:, 0].tolist())
        some = [i for _, indices in apart for i in indices]
        kept = [tensors[i] for tensors in (self.params, self.first, self.second) for i in some]
        before = [] if everyone else [tensor.clone() for tensor in kept]
        self._step_elementwise(factor, apart)
        for new, old in zip(kept, before, strict=False):
            new[~taken] = old[~taken]

    def _is_fusable(self) -> bool:
        """Fuse per member where K launches are cheap: on a CPU, or K = 1."""
        return len(self.taken) == 1 or self.learning_rates.device.type == "cpu"

    def _parts(self) -> tuple[list[tuple[Group, list[int]]], list[tuple[Group, list[int]]]]:
        """For each group its parameters with a gradient: those of one rate and count a member, to be fused; and others."""
        fused, whole, apart, at = self._is_fusable(), [], [], 0
        for group in self.groups:
            scale = group.lr_scale
            plain = fused and not isinstance(scale, list) and not (isinstance(scale, Tensor) and scale.dim() > 1)
            some = [i for i in range(at, at + len(group.params)) if self.params[i].grad is not None]
            at += len(group.params)
            whole.append((group, [i for i in some if plain and self.born[i] is None]))
            apart.append((group, [i for i in some if not plain or self.born[i] is not None]))
        return [(g, indices) for g, indices in whole if indices], [(g, indices) for g, indices in apart if indices]

    def _step_fused(self, factor: float, parts: Sequence[tuple[Group, list[int]]], members: Sequence[int]) -> None:
        """torch's fused step over the slices of one member after the other: one pass over the memory, few launches."""
        rates, done = (factor * self.learning_rates).tolist(), self.taken.tolist()
        for group, some in parts:
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
            # Fused optimizers do not bump version counters, by which DoRA knows that its cached norm is out of date.
            torch.autograd.graph.increment_version([self.params[i] for i in some])

    def _step_elementwise(self, factor: float, parts: Sequence[tuple[Group, list[int]]]) -> None:
        """The same for all members at once, also for rates and counts that differ within a member's tensor."""
        if not parts:
            return
        beta1, beta2 = self.betas
        common = self.taken.clamp_min(1)  # (K,) computed once for all tensors without slots of their own age
        shared = 1 - beta1**common, (1 - beta2**common).sqrt()

        def corrections(i: int) -> tuple[Tensor, Tensor]:
            """(K,) or (K, R..): the bias corrections of both averages."""
            if self.born[i] is None:
                return shared
            counts = (_along_members(self.taken, self.born[i]) - self.born[i]).clamp_min(1)
            return 1 - beta1**counts, (1 - beta2**counts).sqrt()

        def rates_of(lr_scale: float | Tensor, device: torch.device) -> Tensor:
            scale = torch.as_tensor(lr_scale, dtype=self.learning_rates.dtype, device=device)  # () or (K, ...)
            return factor * (_along_members(self.learning_rates, scale) if scale.dim() else self.learning_rates) * scale

        for group, some in parts:
            params, first, second = ([tensors[i] for i in some] for tensors in (self.params, self.first, self.second))
            gradients = [p.grad for p in params]
            corrected = [corrections(i) for i in some]
            torch._foreach_lerp_(first, gradients, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
            spread = torch._foreach_sqrt(second)
            for p, s, (_, root) in zip(params, spread, corrected, strict=True):
                s.div_(_along_members(root.to(p.dtype), p))
            torch._foreach_add_(spread, self.epsilon)
            change = torch._foreach_div(first, spread)
            several = isinstance(group.lr_scale, list)
            together = None if several else rates_of(group.lr_scale, params[0].device)
            for i, p, c, (correction, _) in zip(some, params, change, corrected, strict=True):
                rates = rates_of(group.lr_scale[self._within[i]], p.device) if several else together
                rate = _along_members(rates, p)
                if group.weight_decay:
                    p.mul_((1 - rate * (self.weight_decay * group.weight_decay)).to(p.dtype))
                c.mul_((rate / _along_members(correction, p)).to(p.dtype))
            torch._foreach_sub_(params, change)

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, by name."""
        named = {f"first.{i}": t for i, t in enumerate(self.first)} | {f"second.{i}": t for i, t in enumerate(self.second)}
        named |= {f"born.{i}": t for i, t in enumerate(self.born) if t is not None}
        return {**named, "taken": self.taken}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state` gave, whatever size the parameters had then: the adapter's state brings them back to it."""
        for i in range(len(self.params)):
            self.first[i] = state[f"first.{i}"].to(self.first[i], copy=True)
            self.second[i] = state[f"second.{i}"].to(self.second[i], copy=True)
            born = state.get(f"born.{i}")
            self.born[i] = None if born is None else born.to(self.taken, copy=True)
        self.taken.copy_(state["taken"])


def _along_members(values: Tensor, parameter: Tensor) -> Tensor:
    """(K,) or (K, ...) as a factor on a parameter (K, ...)."""
    return values.view(*values.shape, *[1] * (parameter.dim() - values.dim()))
