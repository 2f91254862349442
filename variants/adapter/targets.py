"""Which modules of a model an adapter goes into."""

import re
import warnings
from collections.abc import Sequence

from rankwise.variants.settings import nearest
from torch import nn

KEYWORDS = ("all-linear", "all-linear-peft", "attention", "mlp")
HEAD_NAMES = ("classifier", "score", "qa_outputs")  # what transformers calls a task head, read off its model classes
PARALLEL = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")  # torch's wrappers


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, or GPT-2's Conv1D, whose weight is stored (in, out)."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    # By name, not by class: variants does not import transformers.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def resolve(model: nn.Module, targets: str | Sequence[str], head: Sequence[str]) -> list[str]:
    """Names of the modules that `targets` means, in the model's order; a module under several paths once.

    Args:
        targets: one or several of: a keyword ("all-linear": every linear of the layers, pooler and head excluded;
            "all-linear-peft": PEFT's rule, which keeps poolers; "attention"; "mlp"), a module's name, the end of its
            name at a dot, or a regular expression that matches a whole name.
        head: names of the task head's modules, which no keyword includes.

    Raises:
        ValueError: a target that matches no linear module, with the nearest name.
    """
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if not wanted:
        raise ValueError('targets = []: name at least one module, or use "all-linear"')
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    first = {id(module): name for name, module in linears.items()}
    paths = {path: first[id(m)] for path, m in model.named_modules(remove_duplicate=False) if id(m) in first}
    found: set[str] = set()
    for target in wanted:
        matches = by_keyword(model, target, linears, head) if target in KEYWORDS else _by_name(target, paths)
        if not matches:
            raise ValueError(_no_match(model, target, linears))
        found |= matches
    for name in found:
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f'target "{name}" lies in an nn.MultiheadAttention, which reads its weights without calling the module, '
                f"so an adapter there would have no effect: choose other targets"
            )
        if any(_inside(name, part) for part in head):
            raise ValueError(f'target "{name}" belongs to the task head, which is trained whole: leave it out of targets')
    return [name for name in linears if name in found]


def by_keyword(model: nn.Module, keyword: str, linears: dict[str, nn.Module], head: Sequence[str]) -> set[str]:
    body = {n for n in linears if not any(_inside(n, part) for part in head) and linears[n] is not _output_layer(model)}
    if keyword == "all-linear-peft":
        return body
    # A layer is what a model repeats: a member of an nn.ModuleList.  A model that has none is taken whole.
    stacks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    layered = {n for n in body if any(n.startswith(stack + ".") for stack in stacks)}
    body = {n for n in layered or body if "pooler" not in n.split(".")}
    attention = {n for n in body if re.search(r"attn|attention", n.lower())}
    return {"all-linear": body, "attention": attention, "mlp": body - attention}[keyword]


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` is `name`, its end at a dot, or a regular expression for it or its end (for it alone after "^")."""
    if name == pattern or name.endswith("." + pattern):
        return True
    try:
        if pattern.startswith("^"):
            return re.fullmatch(pattern, name) is not None
        return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None
    except re.error:
        return False


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, where torch.compile wrapped it, so that names and files are those of the plain model.

    Raises:
        ValueError: a wrapper for several devices, or a part of the model that is compiled apart.
    """
    while type(model).__name__ == "OptimizedModule":
        model = model._orig_mod
    for name, module in model.named_modules():
        kind, where = type(module).__name__, name or "the model"
        if kind in PARALLEL:
            raise ValueError(
                f"{where} is wrapped in {kind}, which keeps its own list of parameters: attach first, wrap afterwards"
            )
        if kind == "OptimizedModule":
            raise ValueError(f"{where} is compiled apart, which changes names below it: attach first, compile afterwards")
    return model


def warn_of_stacked_weights(model: nn.Module) -> None:
    """Warns of weights that "all-linear" cannot mean: stacks of matrices in one parameter, such as fused experts.

    A parameter of three or more axes counts where no module of torch's own holds it, as a convolution would; one with an
    axis of length 1 is no stack but a token or a table of positions.
    """
    owners = [(n, m) for n, m in model.named_modules() if not type(m).__module__.startswith("torch.nn.")]
    stacked = {
        name: sum(
            p.numel() for p in module.parameters(recurse=False) if not p.requires_grad and p.dim() > 2 and min(p.shape) > 1
        )
        for name, module in owners
    }
    names = [name for name, size in stacked.items() if size]
    if not names:
        return
    total = sum(p.numel() for p in model.parameters() if not p.requires_grad)  # of the frozen model, without the adapter
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    warnings.warn(
        f'"all-linear" leaves out {sum(stacked.values()) / total:.0%} of the parameters, which are no linear modules but '
        f"stacks of weights ({shown}): no adapter changes those",
        stacklevel=3,
    )


def find_head(model: nn.Module) -> list[str]:
    """The task head of a transformers model, by its usual names; empty for other models."""
    return [name for name in HEAD_NAMES if isinstance(getattr(model, name, None), nn.Module)]


def _by_name(target: str, paths: dict[str, str]) -> set[str]:
    """Names of the modules one of whose paths (path -> name) matches."""
    return {name for path, name in paths.items() if matches(target, path)}


def _no_match(model: nn.Module, target: str, linears: dict[str, nn.Module]) -> str:
    others = [n for n, m in model.named_modules() if n and matches(target, n)]
    if others:
        kind = type(model.get_submodule(others[0])).__name__
        return f'target "{target}" matches {others[0]}, a {kind}, not a linear module: name linear modules only'
    ends = list(dict.fromkeys([*KEYWORDS, *(n.rpartition(".")[2] for n in linears), *linears]))
    close = nearest(target, ends)
    closest = close.partition('"')[2].partition('"')[0] if close else ", ".join(ends[4:10])
    return f'target "{target}" matches no module; closest: {closest}'


def _inside(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")


def _output_layer(model: nn.Module) -> nn.Module | None:
    """A language model's output layer, which transformers names."""
    get = getattr(model, "get_output_embeddings", None)
    try:
        return get() if get is not None else None
    except (AttributeError, NotImplementedError):
        return None
