"""The probe of packing: members that share one forward pass must equal members alone, in this very model.

It is made on a copy in float64, or, where several processes share the weights, on the model itself in its own type.
"""

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from rankwise.variants.adapter import experts, initialization
from rankwise.variants.adapter.shards import is_sharded
from rankwise.variants.adapter.step import Calibration, NotPackable, Step, Uncalibrated
from torch import Tensor, nn

# Of outputs in the model's own type, relative and absolute: rounding, far below what a member's update is (`fill`).
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


class Packable(Protocol):
    """What the probe asks of an adapter."""

    method: str
    members: int
    seeds: list[int]
    settings: Any

    def choose(self, model: nn.Module, targets: Any, head: Sequence[str]) -> list[str]: ...
    def _insert(self, model: nn.Module, names: Sequence[str], head: Sequence[str]) -> None: ...
    def begin(self, step: Step, micro_batch: int = 0, training: bool = True) -> None: ...
    def alone(self, member: int) -> "Packable": ...
    def copy_member(self, source: Any, member: int) -> None: ...
    def detach(self) -> nn.Module: ...
    @property
    def is_attached(self) -> bool: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_sites(self) -> Iterator[tuple[str, nn.Module]]: ...


def probe(
    adapter: Packable,
    model: nn.Module,
    targets: Any,
    head: Sequence[str],
    calibration: Calibration | Uncalibrated | None,
) -> None:
    """One forward of up to three members with different rows must equal as many forwards apart.

    Raises:
        NotPackable: it does not, or it cannot be tried.
    """
    members, rows = min(adapter.members, 3), 5
    is_own = is_sharded(model)
    tried = model if is_own else _in_double(model)
    dtype = next(p.dtype for p in tried.parameters() if p.is_floating_point())
    rtol, atol = (ROUNDING[dtype],) * 2 if is_own else (1e-9, 1e-12)
    batch = _for_decoder(model, _rows(_example(model, members * rows, calibration), members * rows, dtype))
    settings = adapter.settings.first_members(members).model_dump(exclude_unset=True)
    packed = type(adapter)(members=members, seeds=adapter.seeds[:members], **settings)
    made, reason = [packed], None
    with _training(tried):
        packed._insert(tried, packed.choose(tried, targets, head), head)
        try:
            fill(packed)
            together = _forward(packed, tried, batch)
            packed.detach()
            for k in range(members):
                alone = packed.alone(k)
                made.append(alone)
                alone._insert(tried, alone.choose(tried, targets, head), head)
                alone.copy_member(packed, k)
                apart = _forward(alone, tried, _slice(batch, k * rows, (k + 1) * rows))
                alone.detach()
                if not torch.allclose(together[k * rows : (k + 1) * rows], apart, rtol=rtol, atol=atol):
                    worst = (together[k * rows : (k + 1) * rows] - apart).abs().max().item()
                    reason = reason or f"the output of a packed member differs from its output alone by {worst:.1e}"
        except Exception as error:
            reason = str(error) or type(error).__name__
        for one in made:
            if one.is_attached:
                one.detach()
    if reason is not None:
        raise NotPackable(f"{type(model).__name__} cannot pack {adapter.method}: {reason}; run its members with K = 1")


def _in_double(model: nn.Module) -> nn.Module:
    """
    Raises:
        NotPackable: the model cannot be copied.
    """
    try:
        double = copy.deepcopy(model).double()
    except Exception as error:
        raise NotPackable(
            f"{type(model).__name__} cannot be copied to probe packing ({error}); run its members with K = 1"
        ) from None
    experts.compute_eagerly(double)
    return double


@contextlib.contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """While every module of the model trains."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, was in modes:
            module.training = was


def fill(adapter: Packable, spread: float = 0.1, seed: int = 0) -> None:
    """Moves every trained tensor by N(0, spread^2), inside the slots that exist, so that nothing is trivial."""
    random = initialization.generator(seed, "fill")
    with torch.no_grad():
        for parameter in adapter.parameters():
            noise = torch.empty(parameter.shape).normal_(0, spread, generator=random)
            parameter.add_(noise.to(parameter))
        for _, site in adapter.named_sites():
            site.clear_missing_slots()


def _forward(adapter: Packable, model: nn.Module, batch: Any) -> Tensor:
    adapter.begin(Step(1, 10**9))  # long enough for every schedule
    with torch.no_grad():
        output = model(**batch) if isinstance(batch, Mapping) else model(*batch)
    if isinstance(output, Tensor):
        return output
    return next(t for t in (output.values() if isinstance(output, Mapping) else output) if isinstance(t, Tensor))


def _example(model: nn.Module, rows: int, calibration: Calibration | Uncalibrated | None) -> Any:
    """A batch that the model takes: the first of the given ones, or random tokens, pixels or features."""
    if isinstance(calibration, Calibration) and len(calibration.batches):
        first = calibration.batches[0]
        return {k: v for k, v in first.items() if k != "labels"} if isinstance(first, Mapping) else first
    device = next(model.parameters()).device
    random = initialization.generator(0, "probe")
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if main == "input_ids" and hasattr(config, "vocab_size"):
        ids = torch.randint(config.vocab_size, (rows, 7), generator=random)
        return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    if main == "pixel_values" and hasattr(config, "num_channels"):
        return _pixels(model, rows, random, device)
    first = next((m for m in model.modules() if isinstance(m, nn.Linear)), None)
    if config is None and first is not None:
        return (torch.randn(rows, first.in_features, generator=random, dtype=torch.float64).to(device),)
    raise NotPackable(f"{type(model).__name__}: the form of its input cannot be told: pass attach(calibration=a batch)")


def _pixels(model: nn.Module, rows: int, random: torch.Generator, device: torch.device) -> dict[str, Any]:
    """Random images; of few patches where the model takes them, because DINOv2's own size has 1,369."""
    config = model.config
    size, patch = getattr(config, "image_size", None) or 64, getattr(config, "patch_size", None)
    size = size if isinstance(size, int) else size[0]

    def made(side: int, **how: Any) -> dict[str, Any]:
        pixels = torch.randn(rows, config.num_channels, side, side, generator=random, dtype=torch.float64)
        return {"pixel_values": pixels.to(device), **how}

    if isinstance(patch, int) and size > 3 * patch:
        takes = "interpolate_pos_encoding" in inspect.signature(type(model).forward).parameters
        few = made(3 * patch, **({"interpolate_pos_encoding": True} if takes else {}))
        one = few | {"pixel_values": few["pixel_values"][:1].to(next(model.parameters()).dtype)}
        with contextlib.suppress(Exception), torch.no_grad():  # of another size than its positions, windows or stages take
            model(**one)
            return few
    return made(size)


def _for_decoder(model: nn.Module, batch: Any) -> Any:
    """With what the decoder of an encoder-decoder reads, where the batch says nothing of it: the source again."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or "input_ids" not in batch:
        return batch
    return {"decoder_input_ids": batch["input_ids"], **batch}


def _rows(batch: Any, rows: int, dtype: torch.dtype = torch.float64) -> Any:
    """The batch with exactly `rows` rows, repeated from its start where it has fewer, floats in that type."""

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        value = value[torch.arange(rows, device=value.device) % value.shape[0]]
        return value.to(dtype) if value.is_floating_point() else value

    if isinstance(batch, Mapping):
        return {k: cut(v) for k, v in batch.items()}
    return tuple(cut(v) for v in (batch if isinstance(batch, tuple | list) else (batch,)))


def _slice(batch: Any, start: int, stop: int) -> Any:
    def cut(value: Any) -> Any:
        return value[start:stop] if isinstance(value, Tensor) and value.dim() else value

    return {k: cut(v) for k, v in batch.items()} if isinstance(batch, Mapping) else tuple(cut(v) for v in batch)
