"""Methods that insert no low-rank update: the head only, the biases only (BitFit), every parameter (full fine-tuning)."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from rankwise.variants.adapter import initialization
from rankwise.variants.adapter.draws import Draw
from rankwise.variants.adapter.heads import leaves
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.kinds.interface import trained_dtype
from rankwise.variants.adapter.kinds.quantised import scheme_of
from rankwise.variants.adapter.linears import as_matrix
from rankwise.variants.adapter.site import Site
from rankwise.variants.adapter.step import Group
from rankwise.variants.adapter.surgery import Adapted, Surgery, key_of
from rankwise.variants.adapter.targets import resolve
from torch import Tensor, nn


class HeadOnly(Adapter):
    """K task heads on the frozen model: what the pre-trained features alone are worth."""

    method = "head"

    def choose(self, model: nn.Module, targets: str | Sequence[str], head: Sequence[str]) -> list[str]:
        if not head:
            raise ValueError(f"head: {type(model).__name__} has no task head to train; give attach(head=[names])")
        return []


class BiasSite(Site):
    """y = base(x) + d with d (K, O), which is the base with another bias."""

    def __init__(self, name: str, base: nn.Module, draw: Draw):
        super().__init__()
        self.name, self._draw = name, draw
        start = torch.zeros(len(draw.seeds), *base.bias.shape, dtype=trained_dtype(base.bias.dtype))
        self.bias = nn.Parameter(start)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        y = base(x)
        self._draw.rows.check(self.name, y)
        rows = self._draw.rows.by_member(y)  # (K, N, O)
        return self._draw.rows.as_input(rows + self.bias[:, None], y).to(y.dtype)

    def merged(self, base: nn.Module, member: int) -> dict[str, Tensor]:
        return {"bias": base.bias + self.bias[member]}

    def count(self, ranks: Tensor) -> Tensor:
        return torch.full_like(ranks, self.bias.shape[1])


class BitFit(Adapter):
    """BitFit: train the biases and nothing else.  Zaken et al. 2022, sec. 3.

    Each bias is the frozen one plus a trained difference, so that members can share the frozen model; for AdamW's
    steps, which do not depend on where a parameter starts, that is the same.  Biases do not decay.
    """

    method = "bitfit"

    def choose(self, model: nn.Module, targets: str | Sequence[str], head: Sequence[str]) -> list[str]:
        inside_head = {path for name in head for path, _ in leaves(model, name)}
        names = [n for n, m in model.named_modules() if getattr(m, "bias", None) is not None and n not in inside_head]
        names = [n for n in names if isinstance(model.get_submodule(n).bias, nn.Parameter)]
        # An nn.MultiheadAttention reads its output layer's tensors without calling it: a site there would never act.
        names = [n for n in names if not isinstance(model.get_submodule(n.rpartition(".")[0]), nn.MultiheadAttention)]
        if not names:
            raise ValueError(f"bitfit: no module of {type(model).__name__} has a bias to train: choose another method")
        return names

    def make_site(self, name: str, module: nn.Module) -> Site:
        return BiasSite(name, module, self.draw)


class FullFineTuning(Adapter):
    """Every parameter of the model, as tensors of this adapter with a leading axis of 1.

    The model's parameters are replaced by trained copies, which share their memory with the adapter's tensors; detach
    puts the original parameters back.  A parameter used at several places (tied) stays one.
    """

    method = "full"
    packable = False
    trains_base = True

    def choose(self, model: nn.Module, targets: str | Sequence[str], head: Sequence[str]) -> list[str]:
        scheme = scheme_of(model)
        if scheme is not None:
            raise ValueError(
                f"{type(model).__name__} is quantised ({scheme}), and {self.method} trains floating-point weights only: "
                f"load the model without quantisation, or take a low-rank method, such as lora"
            )
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                raise ValueError(
                    f"{name} is of {parameter.dtype}, and {self.method} trains floating-point weights only: load the model "
                    f"without quantisation"
                )
        return []

    def _insert(self, model: nn.Module, names: Sequence[str], head: Sequence[str]) -> None:
        self.head_names = list(head)
        self._surgery = Surgery(model)
        self._merged = False
        self._originals: dict[str, nn.Parameter] = {}
        self._owned: dict[str, nn.Parameter] = {}
        try:
            self._replace_parameters(model, head)
        except BaseException:
            self.detach()
            raise

    def _replace_parameters(self, model: nn.Module, head: Sequence[str]) -> None:
        self._surgery.freeze()
        self._surgery.key_dropout(self.draw)
        self._surgery.watch_rows(self.draw.rows)
        in_head = {f"{path}.{key}" for h in head for path, m in leaves(model, h) for key in dict(m.named_parameters())}
        places = list(model.named_parameters(remove_duplicate=False))
        trained = {id(old) for name, old in places if name in in_head or self.trains(name)}  # a tied one by any of its names
        self._undecayed: set[int] = set()  # ids of the adapter's tensors that are biases or a norm's
        lives: dict[int, nn.Parameter] = {}
        for path, module in list(model.named_modules()):
            for key, old in list(module.named_parameters(recurse=False)):
                name = f"{path}.{key}" if path else key
                if id(old) not in trained:
                    self._put_parameter(module, key, old, in_full_precision(old))
                    continue
                if id(old) not in lives:
                    lives[id(old)] = self._take(name, old, head=name in in_head, is_norm=isinstance(module, nn.LayerNorm))
                    if key == "bias" or "norm" in type(module).__name__.lower():
                        self._undecayed.add(id(self._owned[name]))
                self._put_parameter(module, key, old, lives[id(old)])
                self._originals[name] = old

        for path in dict.fromkeys(path for h in head for path, _ in leaves(model, h)):
            base = model.get_submodule(path)
            self._surgery.replace(path, Adapted(base, FullPrecision()).train(base.training))

    def trains(self, name: str) -> bool:
        """Whether the model's parameter of that name is trained; the head is in any case."""
        return True

    def trained_names(self) -> set[str]:
        """Names of the model's parameters that are trained, a tied one by each of its own."""
        return set(self._originals)

    def _put_parameter(self, module: nn.Module, key: str, old: nn.Parameter, new: nn.Parameter) -> None:
        module._parameters[key] = new
        self._surgery.undo_too(lambda: module._parameters.__setitem__(key, old))

    def delta(self, name: str) -> Tensor:
        """(1, O, I): the change of that module's weight."""
        old = self._originals.get(f"{name}.weight")
        if old is None:
            raise ValueError(f'no module "{name}" with a weight in {type(self.model).__name__}')
        module = self.model.get_submodule(name)
        change = module.weight.detach() - old
        return as_matrix(module, change)[None]

    def changed_weights(self) -> list[str]:
        """The linears of the layers, which are what other methods adapt; the rest is trained too."""
        return resolve(self.model, "all-linear", self.head_names)

    def pretrained_weight(self, name: str) -> Tensor:
        old = self._originals[f"{name}.weight"].detach()
        return as_matrix(self.model.get_submodule(name), old)

    @contextlib.contextmanager
    def without(self, name: str) -> Iterator[None]:
        """The model with that module's weight as it was before training; its bias stays."""
        if f"{name}.weight" not in self._originals:
            raise ValueError(f'no module "{name}" with a weight in {type(self.model).__name__}')
        live = self.model.get_submodule(name).weight
        trained = live.data
        try:
            live.data = self._originals[f"{name}.weight"].data.to(trained)
            yield
        finally:
            live.data = trained

    def _take(self, name: str, old: nn.Parameter, head: bool, is_norm: bool) -> nn.Parameter:
        """A trained copy for the model, whose memory and gradient are those of a tensor (1, ...) of this adapter."""
        values = old.detach().to(trained_dtype(old.dtype) if old.is_floating_point() else old.dtype, copy=True)
        into = self.heads if head else self.sites
        path, _, key = name.rpartition(".")
        holder = key_of(path or "model")
        if holder not in into:
            into[holder] = Tensors()
        if head and self.fresh_head and not is_norm:
            random = initialization.generator(self.seeds[0], "head", path)
            values.copy_(torch.zeros(old.shape) if key == "bias" else initialization.head(old.shape, random))
        known = into[holder]._parameters.get(key)
        owned = nn.Parameter(values[None]) if known is None else known
        into[holder].register_parameter(key, owned)
        self._owned[name] = owned
        live = nn.Parameter(owned.detach()[0])

        def hand_over(parameter: nn.Parameter) -> None:
            gradient = parameter.grad[None]
            owned.grad = gradient if owned.grad is None else owned.grad + gradient
            parameter.grad = None

        live.register_post_accumulate_grad_hook(hand_over)
        return live

    def parameter_groups(self) -> list[Group]:
        """All tensors; biases and norms do not decay."""
        decayed = [p for p in self.parameters() if id(p) not in self._undecayed]
        plain = [p for p in self.parameters() if id(p) in self._undecayed]
        return [g for g in (Group(decayed), Group(plain, weight_decay=0.0)) if g.params]

    @property
    def is_merged(self) -> bool:
        return self._merged

    def merge(self, member: int = 0) -> None:
        """The trained weights are the model's own already."""
        if member:
            raise ValueError(f"member = {member}: there is 1, counted from 0")
        self._merged = True

    def unmerge(self) -> None:
        self._merged = False


def in_full_precision(frozen: nn.Parameter) -> nn.Parameter:
    """A frozen parameter in the type of those that are trained beside it: itself, where that is its own."""
    dtype = trained_dtype(frozen.dtype)
    return frozen if dtype == frozen.dtype else nn.Parameter(frozen.detach().to(dtype), requires_grad=False)


class FullPrecision(Site):
    """Runs a module of the head outside autocast, as every other method's head runs."""

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return base(x.to(base.weight.dtype))


class Tensors(Site):
    """Trained tensors of one module, each (1, ...)."""

    def count(self, ranks: Tensor) -> Tensor:
        return torch.full_like(ranks, sum(p[0].numel() for p in self.parameters()))
