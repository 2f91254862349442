"""Which modules of a model an adapter goes into."""

import re
import warnings
from collections.abc import Sequence

from rankwise.variants.adapter import experts
from rankwise.variants.adapter.linears import check_adaptable, find_kind, is_linear, known_kinds
from rankwise.variants.settings import nearest
from torch import nn

KEYWORDS = ("all-linear", "all-linear-peft", "attention", "mlp", experts.KEYWORD)
HEAD_NAMES = ("classifier", "score", "qa_outputs")  # what transformers calls a task head, read off its model classes
PARALLEL = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")  # torch's wrappers


def resolve(model: nn.Module, targets: str | Sequence[str], head: Sequence[str]) -> list[str]:
    """Names of the modules that `targets` means, in the model's order; a module under several paths once.

    Args:
        targets: one or several of: a keyword ("all-linear": every linear of the layers, pooler and head excluded;
            "all-linear-peft": PEFT's rule, which keeps poolers; "attention"; "mlp"), a module's name, the end of its
            name at a dot, or a regular expression that matches a whole name.  A keyword means linears alone; the others mean
            every kind of weight that can be adapted (adapter/linears.py), embeddings and convolutions too.  The keyword
            "experts", and what names an experts' module, means experts in one parameter (adapter/experts.py).
        head: names of the task head's modules, which are trained whole; the end of a name that others have too passes them
            over.

    Raises:
        ValueError: a target that matches no module of a known kind, with the nearest name, or one that cannot be adapted.
    """
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if not wanted:
        raise ValueError('targets = []: name at least one module, or use "all-linear"')
    known = {name: module for name, module in model.named_modules() if find_kind(module) is not None}
    linears = {name: module for name, module in known.items() if is_linear(module)}
    first = {id(module): name for name, module in known.items()}
    paths = {path: first[id(m)] for path, m in model.named_modules(remove_duplicate=False) if id(m) in first}
    mixtures = _mixtures(model, wanted)
    chosen: set[str] = set()
    for target in wanted:
        if target == experts.KEYWORD:
            matches = set(mixtures)
        elif target in KEYWORDS:
            matches = by_keyword(model, target, linears, head)
        else:
            matches = _by_name(target, paths) | _by_expert(target, mixtures)
        if not matches:
            raise ValueError(_no_match(model, target, known))
        inside = {name for name in matches if any(_inside(name, part) for part in head)}
        named = {name for name in inside if not name.endswith(f".{target}")}  # the end of a name means others too
        if named or inside == matches:
            name = min(named or inside)
            raise ValueError(f'target "{name}" belongs to the task head, which is trained whole: leave it out of targets')
        chosen |= matches - inside
    for name in chosen & mixtures.keys():
        check_adaptable(name, mixtures[name])
    for name in chosen - mixtures.keys():
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f'target "{name}" lies in an nn.MultiheadAttention, which reads its weights without calling the module, '
                f"so an adapter there would have no effect: choose other targets"
            )
        if _is_sliced(parent, name.rpartition(".")[2]):
            raise ValueError(
                f'target "{name}" lies in a {type(parent).__name__} that takes slices of its weight without calling the '
                f"module (slow_but_exact with pretraining_tp = {parent.pretraining_tp}), so an adapter there would have no "
                f"effect: load the model with slow_but_exact=False"
            )
        check_adaptable(name, known[name])
    order = [name for name in known if name in chosen]
    return [*order, *(name for name in mixtures if name in chosen and name not in known)]


def _mixtures(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Module]:
    """The experts' matrices by name, if one of the targets says the name of their module."""
    places = [experts.stack_of(stack) for stack in experts.stacks(model)]
    if not any(experts.are_meant(target, place) for target in targets for place in places):
        return {}
    return experts.named(model)


def _by_expert(target: str, mixtures: dict[str, nn.Module]) -> set[str]:
    """Names of experts' matrices that a target means, by their own or by their parameter's."""
    named = {stack: matches(target, stack) for stack in dict.fromkeys(map(experts.stack_of, mixtures))}
    meant = {stack for stack in named if experts.are_meant(target, experts.stack_of(stack))}
    return {name for name in mixtures if (stack := experts.stack_of(name)) in meant and (named[stack] or matches(target, name))}


def _is_sliced(parent: nn.Module, child: str) -> bool:
    """Whether this is an output layer of BLOOM's, whose weight is read in slices where its configuration asks for that."""
    exact = getattr(parent, "slow_but_exact", False) and getattr(parent, "pretraining_tp", 1) > 1
    return bool(exact) and child in ("dense", "dense_4h_to_h")


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
    remedy = '; targets = ["all-linear", "experts"] has the experts too' if experts.stacks(model) else ""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    warnings.warn(
        f'"all-linear" leaves out {sum(stacked.values()) / total:.0%} of the parameters, which are no linear modules but '
        f"stacks of weights ({shown}): no adapter changes those{remedy}",
        stacklevel=3,
    )


def find_head(model: nn.Module) -> list[str]:
    """The task head of a transformers model: what stands outside its base model and is no output layer over the vocabulary.

    BERT's "classifier", BART's and T5's "classification_head", DistilBERT's "pre_classifier" and "classifier", DeBERTa's
    "pooler" and "classifier"; nothing of a language model.  Of other models the modules with a usual name.
    """
    usual = [name for name in HEAD_NAMES if isinstance(getattr(model, name, None), nn.Module)]
    body = getattr(model, getattr(model, "base_model_prefix", None) or "", None)
    if usual and not isinstance(body, nn.Module):
        return usual
    if not isinstance(body, nn.Module) or body is model:
        return []
    output = _output_layer(model)
    outside = [(name, child) for name, child in model.named_children() if child is not body]
    return [
        name
        for name, child in outside
        if any(True for _ in child.parameters()) and (output is None or all(part is not output for part in child.modules()))
    ]


def _by_name(target: str, paths: dict[str, str]) -> set[str]:
    """Names of the modules one of whose paths (path -> name) matches."""
    return {name for path, name in paths.items() if matches(target, path)}


def _no_match(model: nn.Module, target: str, known: dict[str, nn.Module]) -> str:
    stack = next((stack for stack in experts.stacks(model) if matches(target, stack)), None)
    if stack is not None:
        end = ".".join(stack.split(".")[-2:])
        return f'target "{target}" means linears, and {stack} holds experts: name their module too, "{end}"'
    owners = {f"{n}.{key}": m for n, m in model.named_modules() for key, p in m.named_parameters(recurse=False) if p.dim() > 2}
    bare = next((name for name in owners if matches(target, name)), None)
    if bare is not None and not type(owners[bare]).__module__.startswith("torch.nn."):
        return (
            f'target "{target}" matches {bare}, weights in a {type(owners[bare]).__name__} whose forward pass is not known '
            f"(known are experts as transformers marks them, and Llama 4's): name other modules, or use PEFT's "
            f"target_parameters"
        )
    others = [n for n, m in model.named_modules() if n and matches(target, n)]
    if others:
        kind = type(model.get_submodule(others[0])).__name__
        rest = f"not a linear module or of another kind whose weight can be adapted ({known_kinds()}): name such modules only"
        return f'target "{target}" matches {others[0]}, a {kind}, {rest}'
    ends = list(dict.fromkeys([*KEYWORDS, *(n.rpartition(".")[2] for n in known), *known]))
    close = nearest(target, ends)
    closest = close.partition('"')[2].partition('"')[0] if close else ", ".join(ends[len(KEYWORDS) : len(KEYWORDS) + 6])
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
