"""Everything that attaching changes in a model, and how it is put back."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from rankwise.variants.adapter.draws import Draw, KeyedDropout, Recomputation
from rankwise.variants.adapter.kinds.experts import Stack
from rankwise.variants.adapter.rows import Rows
from torch import Tensor, nn


class Adapted(nn.Module):
    """A frozen module and the site that decides how to use it.  What the base shows, this shows."""

    def __init__(self, base: nn.Module, site: nn.Module):
        super().__init__()
        self.base, self.site = base, site
        self.merged = False
        self.was_called = False  # in any forward pass since it was attached

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.was_called = True
        return self.base(*args, **kwargs) if self.merged else self.site(self.base, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


def key_of(name: str) -> str:
    """A module's name as a key of an nn.ModuleDict, which takes no dot and no name of its own attributes ("keys")."""
    key = name.replace(".", "/")
    return f"{key}/" if hasattr(nn.ModuleDict, key) else key


def name_of(key: str) -> str:
    return key.removesuffix("/").replace("/", ".")


def device_of(base: nn.Module) -> torch.device:
    """Where a module computes: where its parameters are, or where accelerate brings them when they are offloaded."""
    device = next(iter(base.parameters())).device
    execution = getattr(getattr(base, "_hf_hook", None), "execution_device", None)
    return torch.device(execution) if device.type == "meta" and execution is not None else device


def has_values(model: nn.Module) -> bool:
    """Whether a model has values to compute with, in memory or offloaded: one built on the meta device has shapes alone."""
    holders = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    return all(device_of(module).type != "meta" for module in holders)


def bring(site: nn.Module, device: torch.device) -> None:
    """Moves a site to where its module computes: on the meta device what it trains becomes shapes, what it counts by stays."""
    if device.type != "meta":
        site.to(device)
        return
    for module in site.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().to(device), parameter.requires_grad)


class HeldStatistics:
    """A batch norm that uses its running statistics in training too, and never moves them: no adapter's file holds them.

    Its training flag is False during its own forward pass alone, so that `train` and `eval` mean what they did.
    """

    def __init__(self, norm: nn.Module):
        self.training = norm.training
        self.hooks = [
            norm.register_forward_pre_hook(self._before, prepend=True),
            norm.register_forward_hook(self._after, always_call=True),
        ]

    def _before(self, norm: nn.Module, args: tuple) -> None:
        self.training = norm.training
        norm.training = False

    def _after(self, norm: nn.Module, *_: Any) -> None:
        norm.training = self.training

    def undo(self) -> None:
        for hook in self.hooks:
            hook.remove()


class FirstCalls:
    """Says, after the model's first forward pass, which adapted modules it did not call: there an adapter has no effect.

    A module whose weight another one reads without calling it is such a one; so is an expert that no row chose.
    """

    def __init__(self, method: str, model: nn.Module):
        self.method, self.model = method, model
        self.hook = model.register_forward_hook(self._after)

    def _after(self, *_: Any) -> None:
        self.hook.remove()
        adapted = {name: module for name, module in self.model.named_modules() if isinstance(module, Adapted)}
        quiet = [name for name, module in adapted.items() if not module.was_called and not self._was_passed_over(name)]
        if quiet:
            more = f" and {len(quiet) - 5} more" if len(quiet) > 5 else ""
            warnings.warn(
                f"{self.method} has no effect at {len(quiet)} of {len(adapted)} modules, which the model's first forward pass "
                f"did not call: {', '.join(quiet[:5])}{more}. Unless it is an expert that no row chose, its weight is read "
                f"without calling it: leave it out of the targets",
                stacklevel=2,
            )

    def _was_passed_over(self, name: str) -> bool:
        """Whether it is an expert that its module had no token for."""
        return isinstance(stack := self.model.get_submodule(name.rpartition(".")[0]), Stack) and stack.was_called

    def undo(self) -> None:
        self.hook.remove()


def _nothing(*_: Any) -> None:
    """A hook that does nothing; a plain function, which pickles with the model."""


class Surgery:
    """Everything that attach changed in a model, so that detach can put it back."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.kept: list[tuple[Tensor, Tensor]] = []  # (weight, its values from before a merge)
        self.in_full: list[tuple[Adapted, nn.Module]] = []  # (module, its base from before a merge, which cannot hold one)
        self.silenced: list[str] = []  # attention dropout given as a number, which no module draws
        self._undo: list[Any] = []

    def freeze(self) -> None:
        """No parameter is trained, and no norm moves its running statistics."""
        for parameter in self.model.parameters():
            self._undo.append(lambda p=parameter, was=parameter.requires_grad: p.requires_grad_(was))
            parameter.requires_grad_(False)
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                held = HeldStatistics(module)
                self._undo.append(held.undo)

    def replace(self, name: str, new: nn.Module) -> None:
        """Puts `new` at every path that leads to the module called `name`."""
        old, owner = self.model.get_submodule(name), self.model.get_submodule(name.rpartition(".")[0])
        # An expert, of which there are thousands, stands in its stack alone.
        for parent in [owner] if isinstance(owner, Stack) else list(self.model.modules()):
            if isinstance(parent, Adapted):
                continue
            for child, module in list(parent._modules.items()):
                if module is old:
                    parent._modules[child] = new
                    self._undo.append(lambda p=parent, c=child: p._modules.__setitem__(c, old))

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        was = getattr(module, name)
        self._undo.append(lambda: setattr(module, name, was))
        setattr(module, name, value)

    def key_dropout(self, draw: Draw) -> None:
        for name, module in list(self.model.named_modules()):
            if type(module) is nn.Dropout or type(module).__name__ == "StableDropout":
                rate = float(getattr(module, "p", getattr(module, "drop_prob", 0.0)))
                keyed = KeyedDropout(rate, draw, name).train(module.training)
                self._undo.append(lambda m=module, k=keyed: m.train(k.training))
                self.replace(name, keyed)
            for key in ("attention_dropout", "attn_dropout"):
                rate = vars(module).get(key)
                if isinstance(rate, float) and rate > 0:
                    self.set(module, key, 0.0)
                    self.silenced.append(f"{name}.{key}")

        self._undo.append(Recomputation(self.model, draw).undo)

    def keep_from_fusing(self) -> None:
        """Has torch's encoder layers call their modules in evaluation too, where a fused path would read weights alone."""
        for module in self.model.modules():
            if isinstance(module, nn.TransformerEncoderLayer):  # torch leaves the fused path where a hook is attached
                self._undo.append(module.register_forward_hook(_nothing).remove)
            elif isinstance(module, nn.TransformerEncoder):
                self.set(module, "use_nested_tensor", False)  # which only the fused path can read

    def watch_rows(self, rows: Rows) -> None:
        """Has the sites know how many rows each forward pass has, so that they can refuse an input that is not rows."""
        self._undo.extend(hook.remove for hook in rows.watch(self.model))

    def watch_calls(self, method: str) -> None:
        """Warns, once, of adapted modules that the first forward pass does not call."""
        self._undo.append(FirstCalls(method, self.model).undo)

    def undo_too(self, step: Callable[[], Any]) -> None:
        self._undo.append(step)

    def undo(self) -> None:
        for step in reversed(self._undo):
            step()
        self._undo.clear()


def parameter_places(model: nn.Module) -> dict[int, set[str]]:
    """For each parameter, every (path of its module).name under which it is used."""
    places: dict[int, set[str]] = {}
    for path, module in model.named_modules(remove_duplicate=True):
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(id(parameter), set()).add(f"{path}.{name}")
    return places
