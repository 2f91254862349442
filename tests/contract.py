"""What every registered method must do.  A method takes part by being registered; exceptions are its class attributes.

Each check is a function of the method's name.  Settings are built from the method's settings class, so that a new
method needs no line here.
"""

import copy
import hashlib
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from rankwise import variants
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.probe import fill
from rankwise.variants.adapter.step import Calibration, Step
from rankwise.variants.adapter.surgery import Adapted
from rankwise.variants.files.state import has_low_rank_form
from torch import Tensor, nn

from tests.loop import Loop, outputs, task_losses
from tests.tiny import batch, packed_batch, tiny

SEEDS = [5, 3, 8]
RATES = [1e-2, 3e-3, 2e-2]
RANKS = ([6, 3, 5], [4, 2, 3], [3, 1, 2])  # of the members, for each setting without a default; later ones are smaller
EXPOSING = {  # settings that make a method show more of itself, where it has them
    "alpha": [7.0, 3.0, 11.0],
    "orthogonality": [0.1, 0.5, 0.3],
    "dropout": 0.2,
    "warmup_steps": 3,
    "final_steps": 4,
    "lr_ratio": 1.7,
}
TARGETS = ["query", "intermediate.dense", "layer.1.output.dense"]  # five sites of BERT, of three shapes
TOTAL = 12


def settings(method: str, **others: Any) -> dict[str, Any]:
    """Settings of the method for three members: its own without a default, and those that expose."""
    fields = variants.method(method).settings.model_fields
    required = [name for name, field in fields.items() if field.is_required()]
    chosen = dict(zip(required, RANKS, strict=False)) | EXPOSING | others
    return {name: value for name, value in chosen.items() if name in fields}


def of_member(values: dict[str, Any], member: int) -> dict[str, Any]:
    """The settings of one member."""
    return {name: value[member] if isinstance(value, list) else value for name, value in values.items()}


def kind(method: str) -> type[Adapter]:
    return variants.method(method).load()


def members_of(method: str) -> int:
    return 3 if kind(method).packable else 1


def create(method: str, members: int | None = None, **others: Any) -> Adapter:
    """An adapter of as many members as the method can pack, or of its first `members`."""
    members = members_of(method) if members is None else members
    values = {k: v[:members] if isinstance(v, list) else v for k, v in settings(method, **others).items()}
    return variants.create(method, members=members, seeds=SEEDS[:members], **values)


def attach(adapter: Adapter, model: nn.Module, targets: Any = "all-linear", fresh_head: bool = True) -> Adapter:
    """Attaches it with what its class says it needs: three batches of each member's own rows, by its seed."""
    batches = [packed_batch(adapter.seeds, 1000 + i) for i in range(3)]
    calibration = None if adapter.needs is None else Calibration(batches, lambda batch: task_losses(adapter, batch))
    return adapter.attach(model, targets, fresh_head=fresh_head, calibration=calibration)


def attached(method: str, members: int | None = None, dtype: torch.dtype = torch.float64, **others: Any) -> Adapter:
    return attach(create(method, members, **others), tiny("bert", dtype), TARGETS)


def rows(adapter: Adapter, step: int = 0) -> dict[str, Tensor]:
    return packed_batch(adapter.seeds, step)


def losses(adapter: Adapter, steps: int = 3, loop: Loop | None = None) -> Tensor:
    loop = loop or Loop(adapter, RATES[: adapter.members], TOTAL)
    return torch.stack([loop.step(rows(adapter, loop.index)) for _ in range(steps)])


def all_trained(adapter: Adapter) -> Step:
    """A step at which every trained tensor has a gradient."""
    return Step(1 if adapter.trains_from_the_start else TOTAL, TOTAL)


def fingerprint(tensors: dict[str, Tensor]) -> dict[str, str]:
    """A hash of the bytes of each tensor."""
    return {n: hashlib.sha256(t.detach().contiguous().view(torch.uint8).numpy()).hexdigest() for n, t in tensors.items()}


def plain(adapter: Adapter) -> Callable[[nn.Module, nn.Module, Tensor], Tensor]:
    """The plain version of a site of a method whose gradient is not exact: `plain` in the test file of its module."""
    module = type(adapter).__module__.rpartition(".")[2]
    return importlib.import_module(f"tests.test_{module}").plain


# -- the checks ----------------------------------------------------------------------------------------------------


def body_is_unchanged_at_the_start(method: str) -> None:
    model = tiny("bert").eval()
    body = model.base_model
    inputs = {k: v for k, v in packed_batch(SEEDS[: members_of(method)]).items() if k != "labels"}
    before = body(**inputs).last_hidden_state
    adapter = attach(create(method), model)
    now = model.base_model(**inputs).last_hidden_state
    if adapter.starts_at_identity:
        torch.testing.assert_close(now, before, rtol=1e-12, atol=1e-12)
    else:
        assert not torch.allclose(now, before, rtol=1e-6, atol=1e-6), "it starts where the model is: say so"
    assert not adapter.is_merged


def every_member_gets_its_own_head_start(method: str) -> None:
    adapter = attached(method)
    assert adapter.head_names == ["classifier"]
    for member in range(1, adapter.members):
        assert not torch.equal(adapter.heads["classifier"].weight[0], adapter.heads["classifier"].weight[member])


def the_models_own_head_is_kept_unless_a_fresh_one_is_asked_for(method: str) -> None:
    model = tiny("bert", torch.float32).eval()
    nn.init.normal_(model.classifier.bias)  # of a head that was trained before
    inputs = {k: v for k, v in packed_batch(SEEDS[: members_of(method)]).items() if k != "labels"}
    before = model(**inputs).logits
    own = {name: value.clone() for name, value in model.classifier.named_parameters()}
    adapter = attach(create(method), model, TARGETS, fresh_head=False)
    for name, value in adapter.heads["classifier"].named_parameters():
        assert all(torch.equal(value[member], own[name]) for member in range(adapter.members)), name
    if adapter.starts_at_identity:
        torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-5, atol=1e-5)


def attaching_keeps_the_evaluation_mode(method: str) -> None:
    model = tiny("bert").eval()
    adapter = attach(create(method, dropout=0.5), model)
    fill(adapter)
    assert not any(module.training for module in model.modules())
    adapter.begin(Step(1, TOTAL))
    first = outputs(model, rows(adapter))
    adapter.begin(Step(2, TOTAL))
    rounding = 1e-12 if method == "geolora" else 0  # its decompositions, on an AMD EPYC; dropout would move all by a half
    torch.testing.assert_close(outputs(model, rows(adapter)), first, rtol=rounding, atol=rounding)


def base_is_untouched_bit_for_bit(method: str) -> None:
    model = tiny("bert")
    base = dict(model.named_parameters()) | dict(model.named_buffers())
    before = fingerprint(base)
    adapter = attach(create(method), model)
    owned = {id(p) for p in adapter.parameters()}
    assert not owned & {id(t) for t in base.values()}
    losses(adapter)
    assert fingerprint(base) == before
    assert all(t.grad is None for t in base.values())


def every_owned_tensor_has_a_member_axis_and_trains(method: str) -> None:
    adapter = attached(method)
    before = {name: value.clone() for name, value in adapter.named_parameters()}
    losses(adapter, 3 if adapter.trains_from_the_start else TOTAL)
    for name, value in adapter.named_parameters():
        assert value.shape[0] == adapter.members, name
        assert not torch.equal(value, before[name]), f"{name} did not train"
    grouped = [id(p) for group in adapter.parameter_groups() for p in group.params]
    assert sorted(grouped) == sorted(id(p) for p in adapter.parameters())


def detach_restores_everything(method: str) -> None:
    model = tiny("bert").eval()
    first_layer = next(module for module in model.modules() if isinstance(module, nn.ModuleList))[0]
    first_layer.train()  # flags that differ from module to module
    model.base_model.embeddings.requires_grad_(False)

    def everything() -> tuple:
        modules = {n: (type(m), id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in named(model)}
        parameters = {n: (id(p), p.requires_grad, p.dtype) for n, p in model.named_parameters()}
        config = {n: {k: v for k, v in vars(m).items() if isinstance(v, int | float | str)} for n, m in named(model)}
        return modules, parameters, config, fingerprint(model.state_dict())

    def named(module: nn.Module) -> list[tuple[str, nn.Module]]:
        return list(module.named_modules())

    torch.manual_seed(0)
    before, output = everything(), outputs(model.eval(), batch(0))
    first_layer.train()
    adapter = attach(create(method), model, TARGETS)
    losses(adapter)
    if adapter.mergeable:
        adapter.merge(adapter.members - 1)  # detach takes a merge back as well
    assert adapter.detach() is model
    assert everything() == before
    assert torch.equal(outputs(model.eval(), batch(0)), output)


def a_detached_adapter_attaches_to_another_model(method: str) -> None:
    adapter = attached(method)
    first = losses(adapter, 8)
    adapter.detach()
    attach(adapter, tiny("bert"), TARGETS)
    assert torch.equal(losses(adapter, 8), first)


def a_checkpoint_gives_the_same_next_steps(method: str) -> None:
    adapter = attached(method)
    loop = Loop(adapter, RATES[: adapter.members], TOTAL)
    losses(adapter, 6, loop)
    state = loop.state()
    expected = losses(adapter, 3, loop)
    final = {n: v.clone() for n, v in adapter.state_dict().items()}
    again = attached(method)
    resumed = Loop(again, RATES[: again.members], TOTAL)
    resumed.load(state)
    assert torch.equal(losses(again, 3, resumed), expected)
    for name, value in again.state_dict().items():
        assert torch.equal(value, final[name]), name
    assert {n: r.tolist() for n, r in again.ranks().items()} == {n: r.tolist() for n, r in adapter.ranks().items()}


def packed_equals_alone(method: str, model: str = "bert", targets: Any = "all-linear", total: int = 20, alone: int = 3) -> None:
    values = settings(method, warmup_steps=4, final_steps=5, interval=3, rank_pattern={"value|value_proj|c_fc|v_proj": 3})
    members = members_of(method)

    def run(adapter: Adapter, seeds: list[int], rates: list[float]) -> tuple[Tensor, dict[str, Tensor]]:
        attach(adapter, tiny(model), targets)
        loop = Loop(adapter, rates, total, clip=0.5)
        history = torch.stack([loop.step(packed_batch(seeds, i)) for i in range(total)])
        final = adapter.budget(Step(total, total))
        assert final is None or (sum(adapter.ranks().values()) == final).all()
        adapter.model.eval()
        with torch.no_grad():
            return history, outputs(adapter.model, packed_batch(seeds, total)).unflatten(0, (len(seeds), -1))

    # GeoLoRA's decompositions turn with the rounding of where a matrix lies in memory, and AdamW makes whole steps of what is
    # small: 3e-7 after 20 steps on an AMD EPYC, where other processors are below 1e-9.
    rounding = 1e-5 if method == "geolora" else 1e-9
    seeds = SEEDS[:members]
    several = {k: v[:members] if isinstance(v, list) else v for k, v in values.items()}
    adapter = variants.create(method, members=members, seeds=seeds, **several)
    packed, predictions = run(adapter, seeds, RATES[:members])
    ranks = adapter.ranks()
    for k, seed in enumerate(seeds[-alone:], start=max(0, members - alone)):
        single = variants.create(method, seeds=[seed], **of_member(values, k))
        alone, prediction = run(single, [seed], [RATES[k]])
        torch.testing.assert_close(packed[:, k], alone[:, 0], rtol=rounding, atol=0)
        torch.testing.assert_close(predictions[k], prediction[0], rtol=rounding, atol=rounding / 10)
        assert {n: r[k].item() for n, r in ranks.items()} == {n: r.item() for n, r in single.ranks().items()}
    assert members == 1 or len({tuple(row.tolist()) for row in packed.T}) == members, "two members trained the same"


def merged_equals_unmerged(method: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 6e-2)):
        adapter = attached(method, dtype=dtype)
        if not adapter.mergeable:
            return
        fill(adapter)
        adapter.model.eval()
        inputs = rows(adapter)
        n = len(inputs["labels"]) // adapter.members
        live = outputs(adapter.model, inputs).float()
        weights = fingerprint({n: p for n, p in adapter.model.named_parameters() if ".site." not in n})
        for member in range(adapter.members):
            adapter.merge(member)
            own = slice(member * n, (member + 1) * n)
            merged = outputs(adapter.model, inputs).float()[own]
            scale = live[own].abs().max().item()
            torch.testing.assert_close(merged, live[own], rtol=tolerance, atol=tolerance * scale)
            adapter.unmerge()
            unmerged = fingerprint({n: p for n, p in adapter.model.named_parameters() if ".site." not in n})
            assert unmerged == weights, f"unmerge did not restore every bit in {dtype}"
        assert torch.equal(outputs(adapter.model, inputs).float(), live)


def gradients_are_finite_and_not_all_zero(method: str) -> None:
    adapter = attached(method)
    fill(adapter)
    step = all_trained(adapter)
    adapter.begin(step)
    (task_losses(adapter, rows(adapter)) + adapter.penalty(step)).sum().backward()
    for name, value in adapter.named_parameters():
        assert value.grad is not None and value.grad.isfinite().all(), name
        for member in range(adapter.members):
            assert value.grad[member].any(), f"{name} of member {member} gets no gradient"


def gradient_is_exact_or_that_of_the_plain_version(method: str) -> None:
    adapter = attached(method, dropout=0.0)
    fill(adapter)
    adapter.model.eval()
    inputs = rows(adapter)

    def loss() -> Tensor:
        step = all_trained(adapter)
        adapter.begin(step)
        return (task_losses(adapter, inputs) + adapter.penalty(step)).sum()

    def gradients() -> dict[str, Tensor]:
        adapter.zero_grad()
        loss().backward()
        return {name: value.grad.clone() for name, value in adapter.named_parameters()}

    found = gradients()
    if adapter.exact_gradient:
        random = torch.Generator().manual_seed(0)
        for name, value in adapter.named_parameters():  # central differences along a random direction of each tensor
            direction = torch.randn(value.shape, generator=random, dtype=value.dtype)
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    value.add_(direction, alpha=sign * 1e-5)
                    ends.append(loss().item())
                    value.add_(direction, alpha=-sign * 1e-5)
            numeric, analytic = (ends[0] - ends[1]) / 2e-5, (found[name] * direction).sum().item()
            # 1e-4: a tensor of missing slots moves into places that have no gradient but curve the penalty
            assert abs(numeric - analytic) <= 1e-6 + 1e-4 * abs(analytic), (name, numeric, analytic)
    else:
        reference = plain(adapter)
        for module in list(adapter.model.modules()):
            if isinstance(module, Adapted) and any(module.site is site for _, site in adapter.named_sites()):
                module.forward = lambda x, m=module: reference(m.site, m.base, x)
        for name, value in gradients().items():
            torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


def autocast_in_bf16_gives_nearly_the_same_gradients(method: str) -> None:
    adapter = attached(method, dtype=torch.float32)
    fill(adapter, 0.02)

    def gradients(enabled: bool) -> Tensor:
        adapter.zero_grad()
        adapter.begin(Step(1, TOTAL))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = task_losses(adapter, rows(adapter)).sum()
        loss.backward()
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in adapter.parameters())
        return torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None])

    torch.testing.assert_close(
        nn.functional.cosine_similarity(gradients(True), gradients(False), dim=0), torch.tensor(1.0), atol=5e-3, rtol=0
    )


def ranks_stay_within_the_budget(method: str) -> None:
    adapter = attached(method)
    loop = Loop(adapter, RATES[: adapter.members], TOTAL)
    budgets = []
    for index in range(1, TOTAL + 1):
        loop.step(rows(adapter, index))
        ranks, nominal, budget = adapter.ranks(), adapter.nominal_ranks(), adapter.budget(Step(index, TOTAL))
        assert ranks.keys() == nominal.keys() == adapter.live_ranks().keys()
        for name, rank in ranks.items():
            assert rank.shape == (adapter.members,)
            assert (rank >= 0).all() and (rank <= nominal[name]).all()
        if budget is not None:
            assert (sum(ranks.values()) == budget).all(), (index, sum(ranks.values()), budget)
            budgets.append(budget)
    if budgets:
        assert ((budgets[-1] - budgets[0]).sign() == adapter.budget_moves).all(), (budgets[0], budgets[-1])


def a_seed_reproduces_exactly_and_another_differs(method: str) -> None:
    def run(seeds: list[int]) -> Tensor:
        torch.manual_seed(sum(seeds))  # nothing may depend on the global generator
        members = len(seeds)
        values = {k: v[:members] if isinstance(v, list) else v for k, v in settings(method).items()}
        adapter = attach(variants.create(method, members=members, seeds=seeds, **values), tiny("bert"), TARGETS)
        loop = Loop(adapter, RATES[:members], TOTAL)
        return torch.stack([loop.step(packed_batch([0] * members, i)) for i in range(3)])

    members = members_of(method)
    first = run(SEEDS[:members])
    assert torch.equal(run(SEEDS[:members]), first)
    other = run([seed + 1 for seed in SEEDS[:members]])
    assert (other != first).all()


def settings_round_trip(method: str) -> None:
    adapter = create(method)
    dumped = adapter.settings.model_dump(mode="json")
    assert variants.check(method, dumped) == adapter.settings
    short = adapter.settings.model_dump(exclude_unset=True)
    assert variants.check(method, short) == adapter.settings
    for member in range(adapter.members):
        assert adapter.alone(member).settings == variants.check(method, of_member(settings(method), member))


def parameter_counts_match_a_hand_count(method: str) -> None:
    adapter = attached(method)
    counts = adapter.parameter_counts()
    for member in range(adapter.members):
        single = variants.create(method, seeds=[SEEDS[member]], **of_member(settings(method), member))
        attach(single, tiny("bert"), TARGETS)
        head = sum(p.numel() for p in single.heads.parameters())
        body = sum(p.numel() for p in single.parameters()) - head
        assert head == 32 * 3 + 3 == counts["head"][member]
        assert counts["trainable"][member] == counts["active"][member] == body


def a_peft_folder_gives_the_same_output(method: str, folder: Any) -> None:
    adapter = attached(method, dtype=torch.float32)
    losses(adapter, 8)
    adapter.model.eval()
    inputs = rows(adapter)
    n = len(inputs["labels"]) // adapter.members
    live = outputs(adapter.model, inputs)
    for member in range(adapter.members):
        variants.save_pretrained(adapter, folder / str(member), member=member)
        model = tiny("bert", torch.float32).eval()
        variants.load_pretrained(model, folder / str(member))
        own = {key: value[member * n : (member + 1) * n] for key, value in inputs.items()}
        torch.testing.assert_close(
            outputs(model, own), live[member * n : (member + 1) * n], rtol=1e-5, atol=1e-5 * live.abs().max().item()
        )


def peft_gives_the_same_output(method: str, folder: Any) -> None:
    """Of what is saved, and of what is exported as a LORA; what is written in our own format PEFT does not know."""
    from peft import PeftModel

    adapter = attached(method, dtype=torch.float32)
    losses(adapter, 8)
    adapter.model.eval()
    inputs, member = rows(adapter), adapter.members - 1
    n = len(inputs["labels"]) // adapter.members
    own = {key: value[member * n :] for key, value in inputs.items()}
    live = outputs(adapter.model, inputs)[member * n :]
    for write in (variants.save_pretrained, *([variants.export_lora] if has_low_rank_form(adapter) else [])):
        write(adapter, folder / write.__name__, member=member)
        if not (folder / write.__name__ / "adapter_config.json").is_file():
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The following rank_pattern")  # of its own AdaLoRA files
            oracle = PeftModel.from_pretrained(tiny("bert", torch.float32), folder / write.__name__).eval()
        torch.testing.assert_close(outputs(oracle, own), live, rtol=1e-5, atol=1e-5 * live.abs().max().item())


def two_adapters_do_not_share_a_model(method: str) -> None:
    adapter = attached(method)
    other = create("head", 1)
    try:
        other.attach(adapter.model)
    except ValueError as error:
        assert "detach it first" in str(error)
    else:
        raise AssertionError("a second adapter was attached")


def a_copy_of_the_model_is_independent(method: str) -> None:
    adapter = attached(method)
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    twin = copy.deepcopy(adapter.model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in adapter.state_dict().items())


CHECKS: dict[str, Callable] = {
    check.__name__: check
    for check in (
        body_is_unchanged_at_the_start,
        every_member_gets_its_own_head_start,
        the_models_own_head_is_kept_unless_a_fresh_one_is_asked_for,
        attaching_keeps_the_evaluation_mode,
        base_is_untouched_bit_for_bit,
        every_owned_tensor_has_a_member_axis_and_trains,
        detach_restores_everything,
        a_detached_adapter_attaches_to_another_model,
        a_checkpoint_gives_the_same_next_steps,
        packed_equals_alone,
        merged_equals_unmerged,
        gradients_are_finite_and_not_all_zero,
        gradient_is_exact_or_that_of_the_plain_version,
        autocast_in_bf16_gives_nearly_the_same_gradients,
        ranks_stay_within_the_budget,
        a_seed_reproduces_exactly_and_another_differs,
        settings_round_trip,
        parameter_counts_match_a_hand_count,
        a_peft_folder_gives_the_same_output,
        peft_gives_the_same_output,
        two_adapters_do_not_share_a_model,
        a_copy_of_the_model_is_independent,
    )
}
