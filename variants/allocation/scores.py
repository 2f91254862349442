"""What each slot is worth to an allocator.

Legend: K member, R rank slots of a site, S slots of all sites together.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from rankwise.variants.adapter import initialization
from torch import Tensor, nn


class Sensitivity(nn.Module):
    """AdaLoRA's importance: smoothed sensitivity times its smoothed uncertainty, of every element.

        I = |w dL/dw|      Ibar = b1 Ibar + (1 - b1) I      U = b2 U + (1 - b2) |I - Ibar|      s = Ibar U

    Eq. (8) to (10); w is the parameter after the step, the gradient that of the step (the release's order).  Both
    averages start at zero without bias correction.
    """

    def __init__(self, tensors: Sequence[nn.Parameter], beta1: float, beta2: float):
        """
        Args:
            tensors: (K, ...) each; their elements lie one after the other in the averages, (K, P).
        """
        super().__init__()
        self.beta1, self.beta2 = beta1, beta2
        self.shapes = [tensor.shape for tensor in tensors]
        flat = torch.cat([torch.zeros_like(tensor).flatten(1) for tensor in tensors], 1)
        self.sizes = [shape[1:].numel() for shape in self.shapes]
        self.register_buffer("all_smoothed", flat)
        self.register_buffer("all_uncertainty", flat.clone())

    @torch.no_grad()
    def update(self, tensors: Sequence[nn.Parameter], counted: Bool[Tensor, " K"]) -> None:
        """One step.  A tensor without a gradient keeps its averages, and so does a member that is not counted."""
        active = [tensor for tensor in tensors if tensor.grad is not None]
        now = torch.cat([(tensor * tensor.grad).flatten(1) for tensor in active], 1).abs_()  # (K, P)
        finite = now.amax(1).isfinite() & counted  # (K,)
        now.nan_to_num_(0.0, 0.0, 0.0)
        smoothed, uncertainty = self.all_smoothed, self.all_uncertainty
        missing = len(active) < len(tensors)
        if missing:
            has = torch.tensor([tensor.grad is not None for tensor in tensors], device=now.device)
            chosen = has.repeat_interleave(torch.tensor(self.sizes, device=now.device))  # (P,)
            smoothed, uncertainty = smoothed[:, chosen], uncertainty[:, chosen]
        weight = finite[:, None].to(now.dtype)  # 0 for a member that does not count
        smoothed.lerp_(now, (1 - self.beta1) * weight)
        uncertainty.lerp_(now.sub_(smoothed).abs_(), (1 - self.beta2) * weight)
        if missing:
            self.all_smoothed[:, chosen], self.all_uncertainty[:, chosen] = smoothed, uncertainty

    def scores(self) -> list[Tensor]:
        """s of every element, in the tensors' shapes."""
        return self._parts(self.all_smoothed * self.all_uncertainty)

    def smoothed(self, index: int) -> Tensor:
        return self._parts(self.all_smoothed)[index]

    def uncertainty(self, index: int) -> Tensor:
        return self._parts(self.all_uncertainty)[index]

    def score(self, index: int) -> Tensor:
        """s of every element of tensor `index`."""
        return self.scores()[index]

    def _parts(self, flat: Tensor) -> list[Tensor]:
        return [part.view(shape) for part, shape in zip(flat.split(self.sizes, 1), self.shapes, strict=True)]

    def follow(self, tensors: Sequence[nn.Parameter], changes: Mapping[int, Callable[[Tensor], Tensor]]) -> None:
        """The tensors were resized: the averages of each go the same way.  `changes`: id of a parameter -> what was done."""
        flats = []
        for flat in (self.all_smoothed, self.all_uncertainty):
            pairs = zip(tensors, self._parts(flat), strict=True)
            parts = [changes.get(id(tensor), lambda part: part)(part) for tensor, part in pairs]
            flats.append(torch.cat([part.flatten(1) for part in parts], 1))
        self.shapes = [part.shape for part in parts]
        self.sizes = [shape[1:].numel() for shape in self.shapes]
        self.all_smoothed, self.all_uncertainty = flats


class Score(nn.Module):
    """What each slot is worth to the allocator; `sites` are low-rank sites in order."""

    needs_gradient = False

    def __init__(self, sites: Sequence[nn.Module], seeds: Sequence[int], beta1: float, beta2: float):
        super().__init__()
        self.beta1, self.beta2 = beta1, beta2

    def update(self, sites: Sequence[nn.Module], counted: Bool[Tensor, " K"]) -> None:
        """Once a step, with new parameters and gradients still there; a member that is not `counted` keeps its score."""

    def of_slots(self, sites: Sequence[nn.Module]) -> list[Tensor]:
        """(K, R) of each site."""
        raise NotImplementedError

    def follow(self, sites: Sequence[nn.Module], changes: Mapping[int, Callable[[Tensor], Tensor]]) -> None:
        """The sites were resized, and what is kept of each slot too.  `changes`: id of a parameter -> what was done."""


class SensitivityScore(Score):
    """AdaLoRA eq. (7): s of a slot's coefficient, and the means of s over its row of A and its column of B; s = Ibar U."""

    needs_gradient = True

    def __init__(self, sites: Sequence[nn.Module], seeds: Sequence[int], beta1: float, beta2: float):
        super().__init__(sites, seeds, beta1, beta2)
        self.elements = Sensitivity(self._tensors(sites), beta1, beta2)

    @staticmethod
    def _tensors(sites: Sequence[nn.Module]) -> list[nn.Parameter]:
        return [tensor for site in sites for tensor in site.factors()]

    def update(self, sites: Sequence[nn.Module], counted: Bool[Tensor, " K"]) -> None:
        self.elements.update(self._tensors(sites), counted)

    def element_scores(self) -> list[Tensor]:
        return self.elements.scores()

    def of_slots(self, sites: Sequence[nn.Module]) -> list[Tensor]:
        scores, of_sites = iter(self.element_scores()), []
        for site in sites:
            A, B, *coefficient = (next(scores) for _ in site.factors())
            of_sites.append((coefficient[0] if coefficient else 0.0) + A.mean(2) + B.mean(1))
        return of_sites

    def follow(self, sites: Sequence[nn.Module], changes: Mapping[int, Callable[[Tensor], Tensor]]) -> None:
        self.elements.follow(self._tensors(sites), changes)


class SmoothedSensitivity(SensitivityScore):
    """The same with s = Ibar: sensitivity without its uncertainty."""

    def element_scores(self) -> list[Tensor]:
        return [self.elements.smoothed(i) for i in range(len(self.elements.shapes))]


class RawSensitivity(SmoothedSensitivity):
    """The same with s = I of the last step alone: AdaLoRA's ablation "s = I" (table 4)."""

    def __init__(self, sites: Sequence[nn.Module], seeds: Sequence[int], beta1: float, beta2: float):
        super().__init__(sites, seeds, 0.0, beta2)


class Magnitude(Score):
    """|e|: AdaLoRA's ablation "S = |lambda|" (table 4); for slots without a coefficient the norm of their component."""

    def of_slots(self, sites: Sequence[nn.Module]) -> list[Tensor]:
        return [site.E.detach().abs() if site.has_coefficients else component_norms(site) for site in sites]


class Averaged(Score):
    """A value for each slot, smoothed: v <- beta1 v + (1 - beta1) now."""

    def __init__(self, sites: Sequence[nn.Module], seeds: Sequence[int], beta1: float, beta2: float):
        super().__init__(sites, seeds, beta1, beta2)
        for number, site in enumerate(sites):
            self.register_buffer(f"average_{number}", torch.zeros_like(site.slots))  # (K, R)

    def now(self, site: nn.Module) -> Float[Tensor, "K R"]:
        raise NotImplementedError

    @torch.no_grad()
    def update(self, sites: Sequence[nn.Module], counted: Bool[Tensor, " K"]) -> None:
        news = [self.now(site) for site in sites]
        counts = counted & torch.stack([now.isfinite().all(1) for now in news]).all(0)  # (K,)
        for average, now in zip(self.of_slots(sites), news, strict=True):
            average.lerp_(now.nan_to_num(0.0, 0.0, 0.0), (1 - self.beta1) * counts[:, None].to(now.dtype))

    def of_slots(self, sites: Sequence[nn.Module]) -> list[Tensor]:
        return [self.get_buffer(f"average_{number}") for number in range(len(sites))]

    def follow(self, sites: Sequence[nn.Module], changes: Mapping[int, Callable[[Tensor], Tensor]]) -> None:
        for number, site in enumerate(sites):
            if id(site.A) in changes:  # (K, R, I): what is done along its slots is done here
                setattr(self, f"average_{number}", changes[id(site.A)](self.get_buffer(f"average_{number}")))


class NormShare(Averaged):
    """|e||A_i||B_i| / |sum_j e_j B_j A_j|, smoothed: dynamic-rank DoRA (Mao et al. 2024) eq. (7) and (8), in closed form.

    A component B_i A_i is an outer product, so its Frobenius norm is the product of two vector norms, and the norm of the sum
    follows from the Gram matrices A A^T and B^T B (R, R): no (R, O, I) tensor.  The site's scale cancels.
    """

    EPSILON = 1e-8  # the paper names an epsilon and no value

    def now(self, site: nn.Module) -> Float[Tensor, "K R"]:
        A, B, e = site.A.detach(), site.B.detach(), site.coefficients().detach()
        gram = torch.bmm(A, A.mT) * torch.bmm(B.mT, B)  # (K, R, R)
        whole = (gram * e[:, :, None] * e[:, None]).sum((1, 2)).clamp_min(0).sqrt()
        return component_norms(site) / (whole[:, None] + self.EPSILON)


class Gradient(Averaged):
    """|dL/de|, smoothed: what the loss would gain by a coefficient on the slot, zero or not; e = 1 where a slot has none."""

    needs_gradient = True

    def now(self, site: nn.Module) -> Float[Tensor, "K R"]:
        if site.has_coefficients:
            return torch.zeros_like(site.E) if site.E.grad is None else site.E.grad.abs()
        return torch.zeros_like(site.slots) if site.B.grad is None else (site.B.grad * site.B.detach()).sum(1).abs()


class Random(Score):
    """A fixed draw for each slot, by the member's seed: the control of what a score is worth."""

    def __init__(self, sites: Sequence[nn.Module], seeds: Sequence[int], beta1: float, beta2: float):
        super().__init__(sites, seeds, beta1, beta2)
        self.seeds = list(seeds)

    def of_slots(self, sites: Sequence[nn.Module]) -> list[Tensor]:
        draws_of_sites = []
        for site in sites:
            size = site.slots.shape[1]
            draws = [torch.rand(size, generator=initialization.generator(s, site.name, "score")) for s in self.seeds]
            draws_of_sites.append(torch.stack(draws).to(site.slots))
        return draws_of_sites


class Uniform(Score):
    """The first slots of every site alike; what a budget leaves over goes to sites spread evenly over the model."""

    def of_slots(self, sites: Sequence[nn.Module]) -> list[Tensor]:
        golden = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are spread evenly however many are taken (Weyl)
        of_sites = []
        for number, site in enumerate(sites):
            order = torch.arange(site.slots.shape[1], device=site.slots.device, dtype=site.slots.dtype)
            of_sites.append((-order - (number * golden) % 1).expand_as(site.slots))
        return of_sites


def component_norms(site: nn.Module) -> Float[Tensor, "K R"]:
    """|e_i| |A_i| |B_i|: the Frobenius norm of what each slot adds to the weight."""
    A, B = site.A.detach(), site.B.detach()
    return site.coefficients().detach().abs() * A.norm(dim=2) * B.norm(dim=1)


SCORES: dict[str, type[Score]] = {
    "sensitivity": SensitivityScore,
    "smoothed-sensitivity": SmoothedSensitivity,
    "raw-sensitivity": RawSensitivity,
    "magnitude": Magnitude,
    "norm-share": NormShare,
    "gradient": Gradient,
    "random": Random,
    "uniform": Uniform,
}
