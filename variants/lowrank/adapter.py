"""What the low-rank methods share."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jaxtyping import Int
from rankwise.variants.adapter import experts
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.linears import is_linear
from rankwise.variants.adapter.site import Site
from rankwise.variants.adapter.step import Group, Step
from rankwise.variants.adapter.targets import matches
from rankwise.variants.lowrank.magnitude import Decomposed
from rankwise.variants.lowrank.site import LowRank, first_slots
from rankwise.variants.lowrank.slots import Rearranged
from rankwise.variants.settings import nearest, per_member
from torch import Tensor, nn


class LowRankAdapter(Adapter):
    """What the low-rank methods share: ranks and scales of each site by pattern, LoRA+'s faster B, and sizes that change."""

    peft_type: ClassVar[str] = "LORA"  # the form of PEFT's that it is saved in
    init_lora_weights: ClassVar[str | None] = None  # PEFT's word for a start that is taken out of the weight (residual.py)
    only_linear: ClassVar[str | None] = None  # what it does that it can do at linear modules only
    total_steps: int | None = None  # of the run, as last seen, where the method needs to know

    def low_rank_sites(self) -> list[LowRank]:
        """The low-rank sites in order, those inside a magnitude too."""
        return [site.low_rank for _, site in self.named_sites()]

    def resize(self, places: Sequence[Int[Tensor, "K _"] | None]) -> dict[int, Rearranged]:
        """Rearranges the slots of each site (see `LowRank.resize`); None leaves one as it is.

        Returns:
            What was done, by a parameter's id.
        """
        done = {}
        for site, places_here in zip(self.low_rank_sites(), places, strict=True):
            if places_here is not None:
                before = len(site.changes)
                site.resize(places_here)
                done |= {id(parameter): change for parameter, change in site.changes[before:]}
        return done

    def take_changes(self) -> list[tuple[nn.Parameter, Rearranged]]:
        taken = [change for site in self.low_rank_sites() for change in site.changes]
        for site in self.low_rank_sites():
            site.changes.clear()
        return taken

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Each site first takes the size that it has in the state; an optimizer's averages are loaded in that size too."""
        names = {id(module): name for name, module in self.named_modules()}
        places = []
        for site in self.low_rank_sites():
            slots = state_dict.get(f"{names[id(site)]}.slots", site.slots)
            places.append(first_slots(site, slots.shape[1]))
        self.resize(places)
        self.take_changes()
        return super().load_state_dict(state_dict, *args, **kwargs)

    def copy_member(self, source: Adapter, member: int) -> None:
        self.check_alone()
        sizes = [max(site.slots[member].nonzero()[:, 0].tolist(), default=-1) + 1 for site in source.low_rank_sites()]
        self.resize([first_slots(site, size) for site, size in zip(self.low_rank_sites(), sizes, strict=True)])
        self.take_changes()
        super().copy_member(source, member)

    def choose(self, model: nn.Module, targets: str | Sequence[str], head: Sequence[str]) -> list[str]:
        names = super().choose(model, targets, head)
        settings = self.settings
        self.check_patterns({"rank_pattern": settings.rank_pattern, "alpha_pattern": settings.alpha_pattern}, names)
        self.check_kinds(model, names)
        return names

    def check_kinds(self, model: nn.Module, names: Sequence[str]) -> None:
        """
        Raises:
            ValueError: a target that is no linear, where the method needs one.
        """
        reason = f"measures {self.needs}" if self.needs is not None else self.only_linear
        mixtures = experts.stacks(model) if reason is not None else {}
        for name in names:
            if reason is None or experts.stack_of(name) in mixtures:
                continue
            if not is_linear(model.get_submodule(name)):
                kind = type(model.get_submodule(name)).__name__
                raise ValueError(
                    f'target "{name}" is no linear module ({kind}), and {self.method} {reason}, '
                    f"which it can do at linear modules only: choose other targets, or lora"
                )

    def unlike_experts(self) -> str | None:
        if self.settings.get("dropout", 0.0):
            return f"dropout = {self.settings.dropout} cannot act there, in PEFT either: make it 0"
        if self.has_magnitude or self.init_lora_weights is not None or self.peft_type == "VERA":
            return f"PEFT has no form of {self.method}{' with magnitude' if self.has_magnitude else ''} there: take lora"
        return None

    def check_patterns(self, settings: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> None:
        """
        Raises:
            ValueError: a pattern in one of these settings (name -> its patterns) that matches no target.
        """
        for setting, patterns in settings.items():
            for pattern in patterns:
                if not any(matches(pattern, name) for name in names):
                    raise ValueError(
                        f'{setting} = {{"{pattern}": ...}} matches none of the {len(names)} targets'
                        f"{nearest(pattern, [*(n.rpartition('.')[2] for n in names), *names])}"
                    )

    def loaded(self, total_steps: int | None) -> None:
        """The tensors were set from outside, by a start or a file, which is no training."""

    def final_budget(self) -> Tensor | None:
        """(K,) what the schedule ends with, in ranks or parameters as `settings.cost` says; None where nothing is cut."""
        return None

    def make_low_rank(self, name: str, module: nn.Module) -> LowRank:
        """The method's own site, without magnitudes."""
        raise NotImplementedError

    @property
    def has_magnitude(self) -> bool:
        """Whether each site is decomposed into magnitude and direction."""
        return self.settings.magnitude

    def make_site(self, name: str, module: nn.Module) -> Site:
        site = self.make_low_rank(name, module)
        return Decomposed(site, module) if self.has_magnitude else site

    def after_step(self, step: Step) -> None:
        if self.has_magnitude:
            for site in self.sites.values():
                site.parameters_changed()

    def site_ranks(self, name: str, default: list[int] | int) -> list[int]:
        """Rank of the site for each member: that of the first pattern that matches, else the default."""
        patterned = next((r for p, r in self.settings.rank_pattern.items() if matches(p, name)), default)
        return per_member(patterned, self.members, "rank")

    def site_scales(self, name: str, ranks: list[int]) -> list[float]:
        """alpha/r or alpha/sqrt(r) of the site for each member; alpha itself where it has no rank."""
        settings = self.settings
        patterned = next((a for p, a in settings.alpha_pattern.items() if matches(p, name)), settings.alpha)
        power = 1.0 if settings.scaling == "alpha/r" else 0.5
        return [a / max(r, 1) ** power for a, r in zip(per_member(patterned, self.members, "alpha"), ranks, strict=True)]

    def parameter_groups(self) -> list[Group]:
        """A, E and the head's weights; B with its own rate; biases, norms and magnitudes, which do not decay."""
        norms = self.norm_parameters()
        named = [(n.rpartition(".")[2], p) for n, p in self.named_parameters() if p.requires_grad]
        plain = [p for n, p in named if n in ("bias", "magnitude") or id(p) in norms]
        fast = [p for n, p in named if n == "B"]
        rest = [p for n, p in named if n not in ("bias", "magnitude", "B") and id(p) not in norms]
        groups = [Group(rest), Group(fast, lr_scale=self.settings.lr_ratio), Group(plain, weight_decay=0.0)]
        return [group for group in groups if group.params]
