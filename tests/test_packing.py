"""K packed = K alone, and what cannot be packed says so.  (tests/contract.py has the same for BERT and every method.)"""

from itertools import product

import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter.probe import fill
from rankwise.variants.adapter.step import NotPackable, Step
from rankwise.variants.adapter.targets import find_head
from torch import Tensor, nn

from tests.contract import SEEDS, TARGETS, attach, create, kind, members_of, packed_equals_alone
from tests.loop import Loop, outputs
from tests.tiers import STAND_INS, diagonal, quick
from tests.tiny import LABELS, TINY, packed_batch, tiny

PACKABLE = [name for name in variants.METHODS if kind(name).packable]


class Rows(nn.Module):
    """A model of plain linears; `mix` comes between them and sees all rows."""

    def __init__(self, mix: nn.Module):
        super().__init__()
        self.first, self.mix, self.second = nn.Linear(6, 8), mix, nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.mix(self.first(x)))


class Flip(nn.Module):
    """Turns (rows, features) into (1, rows * features / 2, 2) and back, around a linear."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.reshape(1, -1, 2)).reshape(x.shape)


class Shared(nn.Module):
    """Adds what a linear makes of a table that has no row for each example."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 8))
        self.project = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.table).sum(0)


OTHER_MODELS = [name for name in TINY if name != "bert"]
# Layers that take no keys and values from outside, of which a prefix is made.
UNFIT = {("prefix-tuning", "deberta"), ("prefix-tuning", "albert")}
QUICK = [name for name in STAND_INS if name in PACKABLE]  # one on each of the four


@pytest.mark.parametrize(("method", "model"), quick(product(PACKABLE, OTHER_MODELS), diagonal(QUICK, OTHER_MODELS)))
def test_packed_equals_alone(model, method):
    if (method, model) in UNFIT:
        with pytest.raises(ValueError, match="takes no keys and values from outside"):
            attach(create(method), tiny(model))
        return
    chosen = create(method).choose(tiny(model), TINY[model].targets, find_head(tiny(model)))
    blocked = [name for name in chosen if name.endswith(TINY[model].without_rows or ("nothing",))]
    if not blocked:
        packed_equals_alone(method, model, TINY[model].targets, alone=2)
        return
    with pytest.raises(NotPackable, match="whose first axis is not the") as refusal:
        attach(create(method), tiny(model), TINY[model].targets)
    assert any(name in str(refusal.value) for name in blocked)


@pytest.mark.parametrize("method", [name for name in PACKABLE if variants.METHODS[name].takes_targets])
def test_relative_positions_without_a_batch_axis_are_refused_by_name(method):
    model = tiny("deberta")
    before = list(dict(model.named_modules()))
    with pytest.raises(NotPackable, match=r"(query|key)_proj got an input of shape \(1, 16, 32\)") as refusal:
        attach(create(method), model, "all-linear")
    assert "run its members with K = 1" in str(refusal.value)
    assert list(dict(model.named_modules())) == before
    attach(create(method, 1), model, "all-linear")  # one member alone is fine
    outputs(model, packed_batch([0]))


def test_a_dropout_that_all_rows_share_is_refused_by_name():
    model = tiny("deberta")
    model.deberta.encoder.layer[1].attention.self.pos_dropout.p = 0.1
    with pytest.raises(NotPackable, match=r"layer\.1\.attention\.self\.pos_dropout"):
        create("head").attach(model)


@pytest.mark.parametrize(
    "mix", [nn.BatchNorm1d(8, track_running_stats=False), Flip(), Shared(), nn.Dropout1d(0.5)], ids=lambda m: type(m).__name__
)
def test_what_mixes_rows_is_found_by_the_probe(mix):
    torch.manual_seed(0)
    with pytest.raises(NotPackable, match=r"cannot pack lora: .*; run its members with K = 1"):
        variants.create("lora", rank=2, members=2).attach(Rows(mix))


def test_what_mixes_rows_is_found_though_its_rows_divide_by_the_members():
    model = Rows(Shared())  # six rows of the table, and of the batch: nothing but the numbers can tell
    adapter = variants.create("lora", rank=2, members=3)
    with pytest.raises(NotPackable):
        adapter.attach(model, ["project"], calibration=(torch.randn(6, 6),))


def test_rows_that_do_not_mix_pack():
    variants.create("lora", rank=2, members=2).attach(Rows(nn.LayerNorm(8)))


def test_full_fine_tuning_is_refused_with_the_reason():
    with pytest.raises(NotPackable, match="trains the model's own tensors, so it has one member"):
        variants.create("full", members=2)


def test_a_model_whose_input_is_unknown_asks_for_a_batch():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.config = nn.Linear(4, 3), object()

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.first(left) * self.first(right)

    with pytest.raises(NotPackable, match="calibration"):
        variants.create("lora", rank=2, members=2).attach(Two())
    batch = {"left": torch.randn(4, 4), "right": torch.randn(4, 4)}
    variants.create("lora", rank=2, members=2).attach(Two(), calibration=batch)


@pytest.mark.parametrize("method", PACKABLE)
def test_every_site_refuses_an_input_that_is_not_the_members_rows(method):
    adapter = attach(create(method), tiny("bert"))
    adapter.draw.rows.total = 12
    sites = [*adapter.named_sites(), *((name.replace("/", "."), site) for name, site in adapter.heads.items())]
    for name, site in sites:
        base = adapter.base(name)
        if isinstance(base, nn.Linear | nn.LayerNorm):
            features = base.weight.shape[-1]
            good, bad = torch.randn(12, 2, features).double(), torch.randn(6, 4, features).double()
            site(base, good)
            with pytest.raises(ValueError, match=rf"{name} got an input of shape \(6, 4, .*first axis is not the 12 rows"):
                site(base, bad)


def test_no_rows_are_expected_between_forward_passes():
    adapter = create("lora").attach(tiny("bert"))
    outputs(adapter.model, packed_batch(SEEDS))
    assert adapter.draw.rows.total is None
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        outputs(adapter.model, {"input_ids": torch.full((3, 4), 10**6)})
    assert adapter.draw.rows.total is None


def test_rows_that_do_not_divide_by_the_members_are_refused():
    adapter = create("lora").attach(tiny("bert"))
    with pytest.raises((ValueError, RuntimeError)):
        outputs(adapter.model.eval(), packed_batch([0, 1], rows=2))


@pytest.mark.parametrize("method", quick(PACKABLE))
def test_a_member_that_diverges_leaves_the_others_alone(method):
    def run(spoil: bool) -> Tensor:
        adapter = attach(create(method, warmup_steps=1), tiny("bert"), TARGETS)
        loop = Loop(adapter, 1e-2, total=8)
        for i in range(8):
            if spoil and i == 2:
                with torch.no_grad():
                    for parameter in adapter.parameters():
                        parameter[1] = torch.nan
            history = loop.step(packed_batch(SEEDS, i))
        assert history[1].isfinite() != spoil
        return history[[0, 2]]

    # LAPACK's decompositions of equal matrices may differ by rounding with where they lie in memory (seen on an AMD EPYC).
    rtol = 1e-9 if method == "geolora" else 0
    torch.testing.assert_close(run(True), run(False), rtol=rtol, atol=0)


def test_the_probe_leaves_the_model_and_the_global_generator_as_they_were():
    model = tiny("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    adapter = create("adalora+dora").attach(model)
    assert torch.equal(torch.rand(1), expected)
    adapter.detach()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_copy_member_takes_one_member_out():
    for method in PACKABLE:
        packed = attach(create(method), tiny("bert"), TARGETS)
        fill(packed)
        inputs = packed_batch(SEEDS)
        together = outputs(packed.model.eval(), inputs).view(3, -1, LABELS)
        for member in range(members_of(method)):
            alone = attach(packed.alone(member), tiny("bert").eval(), TARGETS)
            alone.copy_member(packed, member)
            own = {k: v.view(3, -1, *v.shape[1:])[member] for k, v in inputs.items()}
            torch.testing.assert_close(outputs(alone.model, own), together[member], rtol=1e-10, atol=1e-12)


def test_the_head_is_found_on_every_tiny_model():
    assert {name: find_head(tiny(name)) for name in TINY} == {
        "bert": ["classifier"],
        "deberta": ["pooler", "classifier"],  # both stand outside the base model and start at random
        "gpt2": ["score"],
        "llama": ["score"],
        "albert": ["classifier"],
    }


def test_budgets_are_each_members_own():
    adapter = variants.create(
        "adalora", members=3, initial_rank=[6, 4, 5], target_rank=[2, 4, 1], warmup_steps=2, final_steps=3
    ).attach(tiny("bert"))
    loop = Loop(adapter, 1e-2, total=10)
    for i in range(10):
        loop.step(packed_batch([0, 1, 2], i))
        assert sum(adapter.ranks().values()).tolist() == adapter.budget(Step(i + 1, 10)).tolist()
    assert sum(adapter.ranks().values()).tolist() == [24, 48, 12]
    assert sum(adapter.live_ranks().values()).tolist() == [24, 48, 12]
