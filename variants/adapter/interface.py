"""The interface that every method implements.

An adapter is K members of one method over one frozen model.  It owns exactly the tensors it trains, each with a leading member
axis K, the task head's among them; K = 1 is a plain run.  The rows of a batch are grouped by member (adapter/rows.py).
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from rankwise import variants  # whose members are imported at their first use
from rankwise.variants.adapter import experts, merging
from rankwise.variants.adapter.draws import Draw, KeyedDropout
from rankwise.variants.adapter.heads import leaves, make_head
from rankwise.variants.adapter.linears import prepare, weight_of
from rankwise.variants.adapter.probe import probe
from rankwise.variants.adapter.site import Site
from rankwise.variants.adapter.step import Calibration, CannotMerge, Group, NotPackable, Step, Uncalibrated
from rankwise.variants.adapter.surgery import Adapted, Surgery, bring, device_of, has_values, key_of, name_of
from rankwise.variants.adapter.targets import find_head, resolve, unwrapped, warn_of_stacked_weights
from rankwise.variants.settings import Settings, check, per_member
from torch import Tensor, nn


class Adapter(nn.Module):
    """K members of one method over one model.

    A method sets the attributes below where it differs, and overrides hooks; each does nothing unless it is overridden, or
    what most methods do:

        choose, make_site                       where sites go, and what stands there: every method writes these two
        place, inserted                         what is measured before the sites are made; what is checked after
        parameter_groups                        which tensors are trained, and at which share of the rate
        begin, prepare, penalty                 before a forward pass; the batch; what is added to the loss
        before_step, after_step, take_changes   around the optimizer's step; what became of the shapes of parameters
        budget, widen                           the total rank that a schedule asks for; the largest size of a run

    All else is given: attaching and detaching, merging (merging.py), members, ranks and counts, by what each site says of
    itself (site.py).  A method whose trained tensors are the model's own (`trains_base`) overrides these too.
    """

    method: ClassVar[str]
    packable: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    trains_base: ClassVar[bool] = False  # the model's own weights are what is trained
    checkpointable: ClassVar[bool] = True  # the model may compute segments again in the backward pass
    adds_tokens: ClassVar[bool] = False  # the layers read tokens beside those of the batch
    trains_from_the_start: ClassVar[bool] = True  # every trained tensor has a gradient at the first step
    exact_gradient: ClassVar[bool] = True  # no term of the forward pass is held constant in the backward pass
    starts_at_identity: ClassVar[bool] = True  # attaching leaves the output of the body as it was
    nested: ClassVar[bool] = False  # trained to be used at every rank of `nested_ranks`, one of them at a time by `at_rank`
    needs: ClassVar[Literal["activations", "gradients"] | None] = None  # what it measures in the model before it trains
    peft_form: ClassVar[str | None] = None  # PEFT's peft_type of its files, where it is no low-rank method (files/peft/)

    def __init__(self, *, members: int = 1, seeds: Sequence[int] | None = None, **settings: Any):
        """
        Args:
            members: K.
            seeds: one for each member, 0 .. K-1 if not given.

        Raises:
            ValueError: settings that are wrong, or lists whose length is not K.
            NotPackable: members > 1 for a method that cannot be packed.
        """
        super().__init__()
        if members < 1:
            raise ValueError(f"members = {members}: an adapter has at least one member")
        if members > 1 and not self.packable:
            raise NotPackable(f"{self.method} trains the model's own tensors, so it has one member: run members apart")
        self.members = members
        self.seeds = per_member(list(range(members)) if seeds is None else list(seeds), members, "seeds")
        self.settings: Settings = check(self.method, settings)
        self.settings.check_members(members)
        self.draw = Draw(self.seeds)
        self.sites = nn.ModuleDict()  # what the method inserts, by module name with "/" for "."
        self.heads = nn.ModuleDict()  # the task head's modules, trained whole, K of them
        self.targets: str | list[str] = []
        self.head_names: list[str] = []
        self.fresh_head = False  # the task head starts anew by the seeds, not from the model's own weights
        self.base_tensors: dict[str, nn.Parameter] = {}  # of the frozen base, that came with the adapter's file
        self._surgery: Surgery | None = None
        self._calibration: Calibration | Uncalibrated | None = Uncalibrated()  # what `attach` was given, while it runs

    # -- hooks -------------------------------------------------------------------------------------------------------

    def choose(self, model: nn.Module, targets: str | Sequence[str], head: Sequence[str]) -> list[str]:
        """Names of the modules to insert a site into."""
        return resolve(model, targets, head)

    def make_site(self, name: str, module: nn.Module) -> Site | None:
        """What to insert at this module, if anything."""
        return None

    def place(self, names: Sequence[str], calibration: Calibration | Uncalibrated | None) -> None:
        """Before the sites of these names are made, with the heads in place: what a method measures in order to start."""

    def inserted(self) -> None:
        """After the sites are made, in the model: what they start with, and settings that only now can be seen not to fit."""

    def parameter_groups(self) -> list[Group]:
        """What the optimizer trains.  Biases and norms do not decay."""
        norms = self.norm_parameters()
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        decayed = [p for n, p in named if not n.endswith("bias") and id(p) not in norms]
        plain = [p for n, p in named if n.endswith("bias") or id(p) in norms]
        return [g for g in (Group(decayed), Group(plain, weight_decay=0.0)) if g.params]

    def begin(self, step: Step, micro_batch: int = 0, training: bool = True) -> None:
        """Before each forward pass: says where training is, which keys every random draw."""
        self.draw.begin(step.index, micro_batch)

    def prepare(self, batch: Any) -> Any:
        """The batch as the model should see it."""
        return batch

    def penalty(self, step: Step) -> Tensor:
        """(K,), added to each member's loss once a step, in training only."""
        return torch.zeros(self.members, device=self.device)

    def before_step(self, step: Step) -> None:
        """Gradients are final: summed over micro-batches, unscaled, clipped."""

    def after_step(self, step: Step) -> None:
        """Parameters are new, gradients are still there."""

    def take_changes(self) -> list[tuple[nn.Parameter, Callable[[Tensor], Tensor]]]:
        """What was done to the shapes of parameters since the last call, in order, for an optimizer to follow.

        Each function does the same rearrangement of slots to any tensor of the parameter's old shape; new slots are zero.
        """
        return []

    def widen(self) -> None:
        """Takes the size at which a step needs most memory, where that is not the one of the start: for a plan of a run."""

    def budget(self, step: Step) -> Tensor | None:
        """(K,) total rank that the schedule asks for after this step; None for a method without a schedule."""
        return None

    def unlike_experts(self) -> str | None:
        """Why no site can stand at an expert's matrix (adapter/experts.py), and the remedy; None where one can."""
        return f"{self.method} has no form there: take lora"

    # -- attaching ---------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next((t.device for t in self.parameters()), torch.device("cpu"))

    @property
    def is_attached(self) -> bool:
        return self._surgery is not None

    @property
    def model(self) -> nn.Module:
        """The model this adapter is attached to.

        Raises:
            ValueError: it is attached to none.
        """
        if self._surgery is None:
            raise ValueError(f"{self.method} is not attached to a model: call attach(model) first")
        return self._surgery.model

    def attach(
        self,
        model: nn.Module,
        targets: str | Sequence[str] = "all-linear",
        *,
        head: Sequence[str] | None = None,
        fresh_head: bool = False,
        calibration: Any = None,
    ) -> "Adapter":
        """Freezes `model` and inserts the method's sites and K heads.

        The model's output is unchanged at first (with `fresh_head` that of its body), but for a method that says otherwise
        (`starts_at_identity`).  On a model that was built on the meta device shapes, ranks and counts are right; nothing can be
        computed there.  While attached, batch norms use their running statistics in training too and never move them; full
        fine-tuning as well.

        Args:
            model: what torch.compile made of a model stands for the model itself.
            targets: see `rankwise.variants.adapter.targets.resolve`.
            head: names of modules that are trained whole; found by their usual names if not given.
            fresh_head: the head is new for this task: each member's starts anew by its seed.  Otherwise every member's starts
                from the weights that the model has.
            calibration: a `Calibration`, for a method that measures the model before it trains (`needs`), or a batch of
                the model's input (dict, tuple or tensor); also for the probe of K > 1 where the input's form is not known
                from the model.

        Raises:
            ValueError: a target that matches nothing, a model that has an adapter already or is wrapped for several devices,
                or no calibration for a method that needs one.
            NotPackable: K > 1, and packed members do not equal members alone in this model.
        """
        if self._surgery is not None:
            raise ValueError(f"{self.method} is attached already: call detach() first")
        model = unwrapped(model)
        if any(isinstance(module, Adapted | KeyedDropout) for module in model.modules()):
            raise ValueError(f"{type(model).__name__} has an adapter already: detach it first")
        if head is None:
            head = find_head(model)
            if head and fresh_head:
                warnings.warn(
                    f"fresh_head: the task head ({', '.join(head)}) starts anew by the seed, not from the weights that the "
                    f"model has: name it in attach(head=[...]) if that is meant",
                    stacklevel=2,
                )
        head = list(head)
        self.fresh_head = fresh_head
        self.targets = targets if isinstance(targets, str) else list(targets)
        self.sites.clear()  # of an earlier model
        self.heads.clear()
        names = self.choose(model, self.targets, head)
        self._check_experts(model, names)
        if calibration is not None and not isinstance(calibration, Calibration | Uncalibrated):
            calibration = Calibration([calibration])
        if self.members > 1 and has_values(model):
            probe(self, model, self.targets, head, calibration)
        self._calibration = calibration
        try:
            self._insert(model, names, head)
            variants.open_door(self)
        except BaseException:  # a failed attach leaves the model as it was
            if self._surgery is not None:
                self.detach()
            raise
        finally:
            self._calibration = Uncalibrated()  # it may hold data, or a trainer
        if self.targets == "all-linear" and self.sites and not self.trains_base:
            warn_of_stacked_weights(model)
        return self

    def _check_experts(self, model: nn.Module, names: Sequence[str]) -> None:
        """
        Raises:
            ValueError: experts among the targets, which this method, or its settings, cannot have there.
        """
        mixtures = experts.stacks(model)
        first = next((name for name in names if experts.stack_of(name) in mixtures), None)
        reason = self.unlike_experts() if first is not None else None
        if reason is not None:
            raise ValueError(f'target "{first}" is an expert of a mixture, and {reason}; or leave the experts out of targets')

    def _insert(self, model: nn.Module, names: Sequence[str], head: Sequence[str]) -> None:
        self.head_names = list(head)
        self._surgery = Surgery(model)
        try:
            self._surgery.freeze()
            self._surgery.key_dropout(self.draw)
            self._surgery.keep_from_fusing()
            for undo in (*prepare(model), *experts.unfold(model, names, self.draw.rows)):
                self._surgery.undo_too(undo)
            for name in head:
                for path, module in leaves(model, name):
                    self._put(path, make_head(path, module, self.draw, self.fresh_head), self.heads)
            self._surgery.watch_rows(self.draw.rows)
            self.place(names, self._calibration)
            for name in names:
                self._put(name, self.make_site(name, model.get_submodule(name)), self.sites)
            self.inserted()
            self._surgery.watch_calls(self.method)
        except BaseException:
            self.detach()
            raise

    def _put(self, name: str, site: Site | None, into: nn.ModuleDict) -> None:
        if site is None:
            return
        base = self._surgery.model.get_submodule(name)
        device = device_of(site if next(base.parameters(), None) is None else base)  # a dropout is where its site was made
        if device.type != "meta" and any(t.is_meta for t in (*site.parameters(), *site.buffers())):
            raise ValueError(
                f"{name}: its weight is not in memory (offloaded), and {self.method} needs its values: load the model without "
                f"offloading, or take a method that does not, such as lora"
            )
        bring(site, device)
        into[key_of(name)] = site
        adapted = Adapted(base, site)
        adapted.training = base.training  # and not of what is inside a body, whose modules may differ
        site.train(base.training)
        self._surgery.replace(name, adapted)

    def detach(self) -> nn.Module:
        """Takes everything out again; the model is bit for bit what it was.  The adapter keeps its trained tensors."""
        model = self.model
        if self.is_merged:
            self.unmerge()
        self._surgery.undo()
        self._surgery = None
        return model

    def when_detached(self, undo: Callable[[], Any]) -> None:
        """Has `detach` call this too, before it puts the model's own modules back."""
        if self._surgery is not None:
            self._surgery.undo_too(undo)

    # -- sites -------------------------------------------------------------------------------------------------------

    def named_sites(self) -> Iterator[tuple[str, Site]]:
        """(module name, site) of what the method inserted, in the model's order."""
        for key, site in self.sites.items():
            yield name_of(key), site

    def named_heads(self) -> Iterator[tuple[str, Site]]:
        """(module name, site) of the task head's modules."""
        for key, site in self.heads.items():
            yield name_of(key), site

    def site(self, name: str) -> Site:
        """The site at that module.

        Raises:
            ValueError: no site has that name.
        """
        key = key_of(name)
        if key not in self.sites:
            raise ValueError(f'no site at "{name}"; there are: {", ".join(n for n, _ in self.named_sites())}')
        return self.sites[key]

    def base(self, name: str) -> nn.Module:
        """The frozen module under the site of that name."""
        return self.model.get_submodule(name).base

    def delta(self, name: str) -> Tensor:
        """(K, O, I): the dense change of that module's weight.

        Raises:
            ValueError: no site has that name, it changes no weight, or it is merged, so that the change is in the weight.
        """
        if self.is_merged:
            raise ValueError(f"{self.method} is merged: call unmerge() before delta()")
        site = self.site(name)
        if not site.has_delta:
            raise ValueError(f"{self.method} changes no weight at {name}")
        return site.delta(self.base(name))

    def changed_weights(self) -> list[str]:
        """Names of the modules whose weight this adapter changes, in the model's order: those that have a `delta`."""
        return [name for name, site in self.named_sites() if site.has_delta]

    def pretrained_weight(self, name: str) -> Tensor:
        """(O, I): the weight of that module without this adapter; while it is merged, with it."""
        return weight_of(self.base(name)).detach()

    def ranked_sites(self) -> list[tuple[str, Site]]:
        """(module name, site) of those that have a rank."""
        return [(name, site) for name, site in self.named_sites() if site.has_rank]

    def ranks(self) -> dict[str, Tensor]:
        """(K,) active rank of each site that has a rank."""
        return {name: site.rank() for name, site in self.ranked_sites()}

    def live_ranks(self) -> dict[str, Tensor]:
        """(K,) slots that act on the output at this moment; differs from `ranks` between two projections."""
        return {name: site.live() for name, site in self.ranked_sites()}

    def nominal_ranks(self) -> dict[str, Tensor]:
        """(K,) rank slots that each member was given at the start, or has now where there are more."""
        return {name: site.nominal() for name, site in self.ranked_sites()}

    def physical_ranks(self) -> dict[str, Tensor]:
        """(K,) rank slots that parameters are held for."""
        return {name: site.physical() for name, site in self.ranked_sites()}

    def scales(self) -> dict[str, Tensor]:
        """(K,) the scale in force (alpha/r) of each site that has a rank."""
        return {name: site.scale for name, site in self.ranked_sites()}

    def parameter_counts(self) -> dict[str, Tensor]:
        """(K,) numbers of parameters without the head: "nominal", "trainable" now and "active"; and "head"."""
        zero = torch.zeros(self.members, dtype=torch.int64)
        counts = {name: zero.clone() for name in ("nominal", "trainable", "active")}
        for _, site in self.named_sites():
            ranks = (site.nominal(), site.physical(), site.rank()) if site.has_rank else (zero, zero, zero)
            for name, rank in zip(counts, ranks, strict=True):
                counts[name] += site.count(rank.cpu())
        return {**counts, "head": sum((p[0].numel() for p in self.heads.parameters()), 0) + zero}

    def norm_parameters(self) -> set[int]:
        """Ids of the trained tensors that belong to a norm of the head."""
        norms = [site for site in self.heads.values() if site.is_norm]
        return {id(p) for site in norms for p in site.parameters()}

    # -- merging ---------------------------------------------------------------------------------------------------

    @property
    def is_merged(self) -> bool:
        return merging.is_merged(self.model)

    def merge(self, member: int = 0) -> None:
        """Writes one member into the model's own weights, and takes the sites out of the way until `unmerge`.

        Raises:
            CannotMerge: a method that cannot be merged, or a weight that is also used elsewhere (tied).
            ValueError: a member that does not exist, or merged already.
        """
        if not 0 <= member < self.members:
            raise ValueError(f"member = {member}: there are {self.members}, counted from 0")
        if self.is_merged:
            raise ValueError(f"{self.method} is merged already: call unmerge() first")
        if not self.mergeable:
            raise CannotMerge(f"{self.method} cannot be merged: its change is not one of the model's weights; keep it attached")
        merging.merge(self._surgery, member)

    def requantise(self) -> merging.Requantisation:
        """Quantises the merged weights again, in the form that the base has, until `unmerge`; what that costs.

        Raises:
            ValueError: not merged, or no weight that is merged was quantised.
        """
        if not self.is_merged or not merging.dequantised(self._surgery):
            raise ValueError(f"{self.method} has no quantised weight that is merged: call merge() over a quantised base first")
        return merging.requantise(self._surgery)

    def unmerge(self) -> None:
        """Restores the weights that `merge` changed, which it set aside, bit for bit."""
        merging.unmerge(self._surgery)

    def without(self, name: str) -> contextlib.AbstractContextManager[None]:
        """The model with one site's change taken out: dW = 0 there, of every member, or of the one that is merged.

        Raises:
            ValueError: no site has that name.
        """
        self.site(name)
        return merging.without(self._surgery, name)

    # -- members ---------------------------------------------------------------------------------------------------

    def alone(self, member: int) -> "Adapter":
        """A new adapter, not attached, with the settings and seed of one member."""
        settings = self.settings.for_member(member).model_dump(exclude_unset=True)
        return type(self)(members=1, seeds=[self.seeds[member]], **settings)

    @torch.no_grad()
    def copy_member(self, source: "Adapter", member: int) -> None:
        """Takes over the state of one member of `source`; both have the same sites, and K = 1 here."""
        self.check_alone()
        packed = source.state_dict()
        for name, tensor in self.state_dict().items():
            value = packed[name][member]
            tensor.copy_(value[tuple(slice(n) for n in tensor.shape[1:])].unsqueeze(0))

    def check_alone(self) -> None:
        """
        Raises:
            ValueError: several members, each of which would become the one that is copied.
        """
        if self.members != 1:
            raise ValueError(f"members = {self.members}: a member is copied into an adapter of one: source.alone(member)")

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickled adapter is attached to nothing: what `attach` did is undone in the original alone."""
        return vars(self) | {"_surgery": None}

    def silent_dropout(self) -> list[str]:
        """Dropout of the model that the last training forward never drew: it sits inside a fused kernel, and is off."""
        calls = self.draw.calls
        quiet = [m.site for m in self.model.modules() if isinstance(m, KeyedDropout) and m.rate > 0 and not calls[m.site]]
        return sorted({*quiet, *self._surgery.silenced})
