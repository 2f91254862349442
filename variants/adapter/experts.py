r"""Experts whose weights are one parameter (E, ...) of their module, as those of Mixtral, Qwen3-MoE, GPT-OSS and Llama 4 are.

    y_e = act(x W_up,e^T) W_down,e^T  for the tokens x that are routed to expert e

A site is one expert's matrix, ".experts.gate_up_proj.3": experts differ in use, so ranks are placed between them as between
layers.  A target means them where it says the name of their module: "experts.down_proj" all of a parameter,
"experts.down_proj.3" one, "experts" (a keyword) all of the model; "down_proj" means linears alone, as ever.  A pattern of ranks
means sites: r"experts\.down_proj\.\d+".

While an adapter is attached their module computes x W_e^T and the update of x expert by expert, and never makes W + dW, as
PEFT does of all experts.  That takes the place of whichever `experts_implementation` the model has ("eager", "batched_mm",
"grouped_mm", ...), all of which compute the same.  It costs what "eager" does, and the two thin products of each site; on a GPU
many small kernels where "grouped_mm" has few.  With K members each expert takes the rows of every member, filled with zeros to
those of the member that has most.

Known are the modules that transformers' `use_experts_implementation` has marked, by what that promises of them, and Llama 4's,
whose experts all take all tokens.  An expert that no token is routed to gets a gradient of zero, as in PEFT.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from rankwise.variants.adapter.kinds.experts import Expert, Matrix, Stack
from rankwise.variants.adapter.rows import Rows
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

KEYWORD = "experts"
MARKS = ("num_experts", "has_bias", "is_transposed", "_apply_gate")  # of the decorator


def parameters(module: nn.Module) -> dict[str, bool]:
    """The parameters of a module that hold experts' matrices, in its order -> whether they are used as (E, I, O); else none."""
    if all(hasattr(module, mark) for mark in MARKS):
        names, is_transposed = (_upper(module), "down_proj"), bool(module.is_transposed)
    elif type(module).__name__ == "Llama4TextExperts":  # by name, not by class: variants does not import transformers
        names, is_transposed = ("gate_up_proj", "down_proj"), True
    else:
        return {}
    held = [name for name, value in {**module._parameters, **module._modules}.items() if name in names]
    if any(not isinstance(part := getattr(module, name), Stack) and part.dim() != 3 for name in held) or len(held) < 2:
        return {}  # quantised, or sliced
    return dict.fromkeys(held, is_transposed)


def _upper(module: nn.Module) -> str:
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"


def stacks(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Of each parameter that holds experts' matrices its whole name -> (its module, its name there)."""
    found = [(path, module, name) for path, module in model.named_modules() for name in parameters(module)]
    return {f"{path}.{name}" if path else name: (module, name) for path, module, name in found}


def stack_of(site: str) -> str:
    """The name of the parameter that an expert's site is a part of."""
    return site.rpartition(".")[0]


def is_expert(module: nn.Module) -> bool:
    """Whether a module, adapted or not, is one expert's matrix."""
    return isinstance(getattr(module, "base", module), Matrix)


def named(model: nn.Module) -> dict[str, nn.Module]:
    """The experts' matrices by name; modules of the model where an adapter is attached to it, else made for this call."""
    found: dict[str, nn.Module] = {}
    for stack, (module, name) in stacks(model).items():
        found |= {f"{stack}.{index}": expert for index, expert in enumerate(_experts(module, name))}
    return found


def _experts(module: nn.Module, name: str) -> Iterator[nn.Module]:
    held = getattr(module, name)
    return iter(held if isinstance(held, Stack) else Stack(held, parameters(module)[name]))


def are_meant(target: str, module_name: str) -> bool:
    """Whether a target says the name of the experts' module, without which it means linears alone."""
    return target == KEYWORD or module_name.rpartition(".")[2] in target


# -- in place of the parameters ----------------------------------------------------------------------------------------


def unfold(model: nn.Module, names: Sequence[str], rows: Rows) -> list[Callable[[], Any]]:
    """Has the modules of these experts' matrices hold one module for each expert, and call it; what undoes it.

    Raises:
        ValueError: experts that are spread over several devices, or not in memory.
    """
    found = stacks(model)
    touched = {id(found[stack][0]): (stack, found[stack][0]) for name in names if (stack := stack_of(name)) in found}
    undoing = []
    for stack, module in touched.values():
        fault = _fault(module)
        if fault is not None:
            raise ValueError(f"{stack} {fault}")
        if not isinstance(getattr(module, stack.rpartition(".")[2]), Stack):
            undoing.append(_unfold(module, rows))
    return undoing


def _fault(module: nn.Module) -> str | None:
    if getattr(module, "_is_expert_parallel", False):
        return "is split over several devices by expert: load the model without expert parallelism"
    if hasattr(module, "_hf_hook") and any(parameter.is_meta for parameter in module.parameters()):
        return "is not in memory (offloaded): load the model without offloading, or leave its experts out of targets"
    return None


def _unfold(module: nn.Module, rows: Rows) -> Callable[[], None]:
    own, modules, held = module._parameters, dict(module._modules), parameters(module)
    module._parameters = {name: value for name, value in own.items() if name not in held}
    for name, is_transposed in held.items():
        module._modules[name] = Stack(own[name], is_transposed)
        module._modules[name].train(module.training)
    place = "_old_forward" if "_old_forward" in vars(module) else "forward"  # the former where accelerate has wrapped it
    before = vars(module).get(place)
    setattr(module, place, functools.partial(routed if hasattr(module, "_apply_gate") else dense, module, rows))

    def undo() -> None:
        delattr(module, place)
        if before is not None:
            setattr(module, place, before)
        module._modules, module._parameters = modules, own

    return undo


def routed(module: nn.Module, rows: Rows, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What every `experts_implementation` of transformers computes: hidden_states (T, I), the others (T, k); (T, I).

    Raises:
        ValueError: there are several members, and the tokens cannot be as many of each.
    """
    tokens, k = top_k_index.shape
    K, E, device = rows.members, module.num_experts, hidden_states.device
    rows.check_divisible("an experts module", hidden_states)
    names = list(parameters(module))
    up, down = (getattr(module, name) for name in names)
    biases = [getattr(module, f"{name}_bias") if module.has_bias else None for name in names]
    up.was_called = down.was_called = True
    owners = torch.arange(tokens, device=device).div(max(tokens // K, 1), rounding_mode="floor").repeat_interleave(k)
    groups = top_k_index.reshape(-1) * K + owners  # of each pair of a token and an expert
    order, counts = groups.argsort(stable=True), numbers(groups, E, K)
    weights, result, start = top_k_weights.reshape(-1), torch.zeros_like(hidden_states), 0
    for e, (upper, lower, sizes) in enumerate(zip(up, down, counts, strict=True)):
        if not sum(sizes) and not torch.is_grad_enabled():
            continue
        pairs = order[start : start + sum(sizes)]
        start += sum(sizes)
        chosen = pairs // k
        x, places = spread(hidden_states[chosen], sizes)
        with rows.apart(len(x)):
            y = _biased(upper(x), biases[0], e)
            y = module._apply_gate(y) if names[0] == "gate_up_proj" else module.act_fn(y)
            y = _biased(lower(y), biases[1], e)
        if getattr(module, "has_post_expert_norm", False):
            y = module.post_expert_norm(y)
        y = y if places is None else y[places]
        result.index_add_(0, chosen, (y * weights[pairs, None]).to(result.dtype))
    return result


def numbers(groups: Tensor, E: int, K: int) -> list[list[int]]:
    """How many tokens each expert has of each member; where tensors have no values (experiments/plan) as many as the others."""
    if not isinstance(groups, FakeTensor):
        return torch.bincount(groups, minlength=E * K)[: E * K].view(E, K).tolist()
    each, more = divmod(len(groups) // K, E)
    return [[each + (e < more)] * K for e in range(E)]


def dense(module: nn.Module, rows: Rows, hidden_states: Tensor) -> Tensor:
    """Llama 4's: hidden_states (E*T, I), all tokens for each expert, those of the other experts times zero; (E*T, I)."""
    up, down = (getattr(module, name) for name in parameters(module))
    up.was_called = down.was_called = True
    parts = hidden_states.view(module.num_experts, -1, hidden_states.shape[-1])
    results = []
    for upper, lower, x in zip(up, down, parts, strict=True):
        rows.check_divisible("an experts module", x)
        with rows.apart(len(x)):
            gate, value = upper(x).chunk(2, dim=-1)
            results.append(lower(value * module.act_fn(gate)))
    return torch.cat(results)


def _biased(y: Tensor, biases: Tensor | None, expert: int) -> Tensor:
    return y if biases is None else y + biases[expert]


def spread(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """(K*M, I): the rows x of the members, one member's after the other, filled with zeros to M each, the most that one has
    (or 1); and where the rows of x are there, None where nothing was filled."""
    most = max(*sizes, 1) if len(sizes) > 1 else max(sizes[0], 1)
    if sum(sizes) == most * len(sizes):
        return x, None
    places = torch.cat([torch.arange(size) + k * most for k, size in enumerate(sizes)]).to(x.device)
    return x.new_zeros(most * len(sizes), x.shape[1]).index_copy(0, places, x), places


def compute_eagerly(model: nn.Module) -> None:
    """Has experts without an adapter compute in any type: transformers' "grouped_mm" knows no float64."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None) not in (None, "eager"):
            config._experts_implementation = "eager"


# -- names and files ---------------------------------------------------------------------------------------------------


def folded(model: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    """Names (key in a model's state -> name without an adapter), those of each stack of experts as the one of its parameter."""
    held = {f"{path}." for path, module in model.named_modules(remove_duplicate=False) if isinstance(module, Stack)}
    if not held:
        return dict(names)
    result = {}
    for key, name in names.items():
        stack = next((path for path in _prefixes(name) if path in held), None)
        if stack is None:
            result[key] = name
        elif name == f"{stack}0.stack":
            result[key] = stack.removesuffix(".")
    return result


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:length]) + "." for length in range(1, len(parts)))


def merged(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of experts, by name, with the member in them that is merged into the model."""
    whole = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Stack):
            experts = [getattr(expert, "base", expert) for expert in module]
            if any(not isinstance(expert, Expert) for expert in experts):
                whole[path] = torch.stack([expert.weight.detach() for expert in experts])
    return whole
