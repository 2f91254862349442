"""One training step on tensors that have shapes and no values: which bytes are alive, and how many products are taken.

The model is built on the meta device and the adapter attached to it, as before a run.  Then forward and backward pass run
on fake tensors: torch goes through the same operations, saves the same tensors for the backward pass and frees them at the
same moments, and computes nothing.  So activations are not estimated by a formula of one architecture; checkpointing,
packing and every method's own tensors are in them.  The optimizer's averages are two numbers in fp32 for each trained one, or
what is stored of them in 8 bits (training/stored_states.py), of which one parameter's are whole at a time.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from rankwise import variants
from rankwise.experiments import models
from rankwise.experiments.plan import shapes
from rankwise.experiments.plan.live import Taken, unique_bytes
from rankwise.experiments.training import first_token
from rankwise.experiments.training.evaluation import autocast
from rankwise.experiments.training.stored_states import STORED, StoredAdamW
from rankwise.variants import native
from rankwise.variants.adapter.kinds.scheme import Scheme
from rankwise.variants.adapter.step import Step
from rankwise.variants.adapter.surgery import Surgery
from rankwise.variants.settings import method
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

MOMENTS = 2  # AdamW's averages of each trained number, in its own type
STEP = Step(2, 10**6)  # past the first, when the optimizer's averages are there


@dataclass(frozen=True)
class StepCost:
    """What one training step of K members takes.

    trainable, active, head: parameters of one member, without the head and the head's.  The rest in bytes but products:
    weights: of the frozen model, or of the one that is trained. adapter: tensors of the K members, averages of a rank
    allocator's scores among them. gradients, optimizer: of all that is trained, on the model's device. activations: what is
    kept between forward and backward pass, of one micro-batch. logits: the most that the loss reads at one time. peak: the
    most at one moment. products: floating-point operations of forward and backward pass, each multiplication and each
    addition as one.
    """

    trainable: int
    active: int
    head: int
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    peak: int
    products: int


@dataclass(frozen=True)
class Shape:
    """The rows of a step: of one member, cut into micro-batches, each of so many tokens, or pixels a side.

    image_size: None where it is that of the model's configuration. optimizer_states: as a study has them.
    """

    rows: int
    length: int
    members: int = 1
    accumulation: int = 1
    checkpointing: bool = False
    precision: str = "fp32"
    quantization: Scheme | None = None
    targets: str | list[str] | tuple[str, ...] = "all-linear"
    image_size: int | None = None
    optimizer_states: str = "32-bit"

    @property
    def micro_rows(self) -> int:
        return -(-self.rows // self.accumulation)

    def size(self, kind: Any) -> int | None:
        """Of a row, as `Kind.example` takes it."""
        return self.image_size if kind.has_images else self.length


def cost(model_id: str, kind: Any, num_labels: int, name: str, settings: dict[str, Any], shape: Shape) -> StepCost:
    """What a step of a method on a model takes.

    kind: the task's (experiments/kinds). settings: of the method, of one member.

    Raises:
        ValueError: the model's configuration is not at hand, or the method cannot be attached to it.
    """
    trains_base = method(name).load().trains_base
    model = shapes.build(model_id, kind, num_labels, "fp32" if trains_base else shape.precision)
    if trains_base and shape.quantization is not None:
        raise ValueError(
            f"{name} trains the base's own weights, and these are quantised ({shape.quantization}): plan without it"
        )
    packed = None if shape.quantization is None else _packed(model, kind, shape.quantization)
    adapter = variants.create(name, members=shape.members, **settings)
    last = first_token.last_layer(model)
    if last is not None and not adapter.adds_tokens:  # as a run does, where it gives the same logits
        first_token.shorten(last, adapter.draw)
    targets = shape.targets if isinstance(shape.targets, str) else list(shape.targets)
    calibration = variants.Uncalibrated() if getattr(adapter, "reads_values", False) else None
    adapter.attach(model, targets, head=kind.head_names(model), calibration=calibration)
    counts = {what: int(count[0]) for what, count in adapter.parameter_counts().items()}
    counts["active"] = _active_at_the_end(adapter, counts["active"])
    adapter.widen()
    if trains_base:  # its trained copies are counted as the model's own, which is what they are in all but place
        names = adapter.trained_names()
        adapter.detach()
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name in names)
        Surgery(model).key_dropout(adapter.draw)
    if shape.checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ValueError(f"{type(model).__name__} does not support gradient checkpointing: plan without it")
        if not adapter.checkpointable:
            raise ValueError(f"{name} cannot train with gradient checkpointing: plan without it")
        keyed = {"use_reentrant": False, "context_fn": adapter.draw.recompute_contexts}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keyed)
    found = _on_fake_tensors(model, adapter, trains_base, kind, num_labels, shape, counts)
    if packed is None:
        return found
    saved = packed.dense - packed.stored
    return replace(found, weights=found.weights - saved, peak=found.peak - saved + packed.largest)


@dataclass(frozen=True)
class Packed:
    """Bytes of the weights that are quantised: dense, as the model has them, and stored; of the largest one dense."""

    dense: int
    stored: int
    largest: int


BLOCK, OUTER_BLOCK = 64, 256  # elements of a 4-bit weight that share a scale, and scales that share one in turn


def _packed(model: nn.Module, kind: Any, form: Scheme) -> Packed:
    """What quantising a model's linears saves (variants/adapter/kinds/quantised.py has the layouts).

    One weight at a time is dense again, for a product or its backward pass.
    """
    kept = models.unquantised(model, kind)
    dense = stored = largest = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or any(name == one or name.startswith(f"{one}.") for one in kept):
            continue
        count, rows = module.weight.numel(), module.out_features
        if form.name == "int8":
            own = count + 4 * rows
        else:
            blocks = -(-count // BLOCK)
            scales = 4 * blocks if not form.is_double else blocks + 4 * -(-blocks // OUTER_BLOCK) + 4
            own = -(-count // 2) + scales
        size = count * module.weight.element_size()
        dense, stored, largest = dense + size, stored + own, max(largest, size)
    return Packed(dense, stored, largest)


def _active_at_the_end(adapter: Any, now: int) -> int:
    """Parameters of member 0 when the schedule of its ranks is over; those of now where it has none.

    Which sites keep them is not known before: a rank counts as the mean one.
    """
    total = adapter.budget(Step(STEP.total, STEP.total))
    kept = getattr(adapter.settings, "target_parameters", None)
    if total is None and kept is None:
        return now
    sites = [site for _, site in adapter.ranked_sites()]
    ranks, none = [site.rank().cpu() for site in sites], [torch.zeros_like(site.rank().cpu()) for site in sites]
    fixed = sum(int(site.count(zero)[0]) for site, zero in zip(sites, none, strict=True))
    others = now - sum(int(site.count(rank)[0]) for site, rank in zip(sites, ranks, strict=True))
    if total is None:
        return others + fixed + int(kept)
    each = sum(int(site.count(zero + 1)[0]) for site, zero in zip(sites, none, strict=True)) - fixed
    return others + fixed + round(each / len(sites) * int(total[0]))


def _on_fake_tensors(
    model: nn.Module, adapter: Any, trains_base: bool, kind: Any, num_labels: int, shape: Shape, counts: dict[str, int]
) -> StepCost:
    own_modules = {} if trains_base else {id(module): module for module in adapter.modules()}
    modules = {id(module): module for module in model.modules()}
    with FakeTensorMode(allow_non_fake_inputs=True), native.pretending():
        _give_shapes_a_device([*(modules | own_modules).values()])
        own = [tensor for module in own_modules.values() for tensor in tensors_of(module)]
        frozen = [tensor for key, module in modules.items() if key not in own_modules for tensor in tensors_of(module)]
        # Each once: an output layer may be the embedding.
        trained = list({id(tensor): tensor for tensor in (*own, *frozen) if tensor.requires_grad}.values())
        batch = kind.example(model.config, num_labels, shape.members * shape.micro_rows, shape.size(kind))
        labels = batch.pop("labels")
        model.train()
        with unset_fake_temporarily():  # what is drawn for a step has values
            adapter.begin(STEP, 0, training=True)
        batch = adapter.prepare(batch)
        with Taken([*frozen, *own]) as taken:
            with autocast(torch.device("cpu"), shape.precision):
                losses, logits = kind.example_losses(model, batch, labels, shape.members)
            loss = losses.sum() if trains_base else (losses + adapter.penalty(STEP)).sum()
            after_forward = taken.now
            loss.backward()
        gradients = sum(p.grad.untyped_storage().nbytes() for p in trained if p.grad is not None)
    weights, adapters = unique_bytes(frozen), unique_bytes(own)
    if trains_base:  # its trained copies: the model gets its own back when it is detached
        kept = [tensor for tensor in frozen if isinstance(tensor, nn.Parameter) and not tensor.requires_grad]
        adapters = weights - unique_bytes(kept)
    optimizer, opened = _averages(shape.optimizer_states, trained, 1 if trains_base else shape.members)
    return StepCost(
        trainable=counts["trainable"],
        active=counts["active"],
        head=counts["head"],
        weights=weights,
        adapter=adapters,
        gradients=gradients,
        optimizer=optimizer,
        activations=after_forward,
        logits=logits,
        peak=weights + adapters + optimizer + max(taken.peak, gradients + opened),
        products=taken.products * shape.accumulation,
    )


def _averages(states: str, trained: Iterable[Tensor], members: int) -> tuple[int, int]:
    """Bytes of the optimizer's averages between steps, and what opening those of one parameter takes, at most."""
    kind = STORED[states]
    if not issubclass(kind, StoredAdamW):
        return MOMENTS * sum(p.numel() * p.element_size() for p in trained), 0
    total = most = 0
    for p in trained:
        average = torch.empty(members, p.numel() // members, dtype=p.dtype, device="meta")
        with Taken([average]) as taken:
            opened = average.clone(), average.clone()
            stored = [kind.store(one, is_second) for is_second, one in enumerate(opened)] if kind.on_device else []
        total += unique_bytes(tensor for parts in stored for tensor in parts.values())
        most = max(most, taken.peak)
    return total, most


def tensors_of(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a module, not of those inside it."""
    return [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]


def _give_shapes_a_device(modules: Iterable[nn.Module]) -> None:
    """Puts a fake tensor of the CPU in the place of each meta tensor, so that torch takes the kernels it would take."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # id -> what had it, and still has, and what comes in its place
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in made:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    new = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
                    made[id(tensor)] = tensor, new
                tensors[name] = made[id(tensor)][1]
