"""Every kind of frozen weight: linears, embeddings, convolutions; and what is none of them."""

import json
import re
import warnings
from typing import Any

import peft
import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter import linears
from rankwise.variants.adapter.initialization import generator
from rankwise.variants.adapter.linears import as_stored, find_kind, kind_of, weight_of
from rankwise.variants.adapter.probe import fill
from rankwise.variants.adapter.step import CannotMerge, Step
from rankwise.variants.adapter.targets import resolve
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.contract import SEEDS, of_member, settings
from tests.tiers import quick
from tests.tiny import tiny

WORDS, PAD = 11, 2
TARGETS = ["words", "sound", "image", "out"]
STEPS = 12


class Kinds(nn.Module):
    """An embedding with padding, convolutions with a stride, uneven kernels and padding, and linears, all with biases."""

    def __init__(self, dilation: int = 1):
        super().__init__()
        self.words = nn.Embedding(WORDS, 6, padding_idx=PAD)
        self.sound = nn.Conv1d(6, 6, 3, stride=2, padding=2, dilation=dilation)
        self.image = nn.Conv2d(3, 5, (2, 3), stride=(2, 1), padding=(1, 2), dilation=dilation)
        self.hidden, self.out = nn.Linear(11, 7), nn.Linear(7, 4)

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        features = [torch.tanh(self.sound(self.words(ids).mT)).mean(2), torch.tanh(self.image(pixels)).mean((2, 3))]
        return self.out(torch.tanh(self.hidden(torch.cat(features, 1))))


def kinds(dtype: torch.dtype = torch.float64, **sizes: int) -> Kinds:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Kinds(**sizes).to(dtype).eval()


def inputs(members: int = 1, rows: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(WORDS, (members * rows, 5), generator=random)
    ids[::rows, -1] = PAD
    return ids, torch.randn(members * rows, 3, 6, 7, generator=random).to(dtype)


def lora(members: int = 1, **others: Any) -> Any:
    values = {"rank": [3, 2, 4][:members], "alpha": [7.0, 5.0, 2.0][:members]} | others
    return variants.create("lora", members=members, seeds=SEEDS[:members], **values)


def attached(model: nn.Module, adapter: Any, targets: Any = TARGETS) -> Any:
    adapter.attach(model, targets, head=[], calibration=inputs(adapter.members))
    fill(adapter, spread=0.3)
    return adapter


# -- one weight of each kind -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"), [("words", (6, WORDS)), ("sound", (6, 18)), ("image", (5, 18)), ("hidden", (7, 11))]
)
def test_a_weight_is_a_matrix_and_is_stored_again(name, shape):
    module = kinds().get_submodule(name)
    assert weight_of(module).shape == shape
    assert torch.equal(as_stored(module, weight_of(module)), module.weight)
    torch.testing.assert_close(kind_of(module).squared_row_norms(module), weight_of(module).detach().square().sum(1))


def test_conv1d_is_stored_the_other_way():
    module = tiny("gpt2").transformer.h[0].attn.c_attn
    assert module.weight.shape == (32, 96) and weight_of(module).shape == (96, 32)
    assert torch.equal(as_stored(module, weight_of(module)), module.weight) and kind_of(module).fan_in_fan_out


def test_the_site_acts_as_the_weight_with_the_change_in_it():
    """The definition: base(x) with W + s B A in place of W, and the bias once."""
    model = kinds()
    adapter = attached(model, lora())
    ids, pixels = inputs()
    words, sound, image = (adapter.base(name) for name in ("words", "sound", "image"))
    table = words.weight + adapter.delta("words")[0].mT
    torch.testing.assert_close(model.words(ids), table[ids])
    letters = table[ids].detach().mT  # (N, 6, 5)
    for name, x, want in (
        ("sound", letters, nn.functional.conv1d(letters, changed(adapter, "sound"), sound.bias, 2, 2)),
        ("image", pixels, nn.functional.conv2d(pixels, changed(adapter, "image"), image.bias, (2, 1), (1, 2))),
    ):
        module = model.get_submodule(name)
        torch.testing.assert_close(module(x), want)
        torch.testing.assert_close(module(x[0]), want[0])  # without a batch axis


def changed(adapter: Any, name: str) -> Tensor:
    """A convolution's kernel with the change in it."""
    weight = adapter.base(name).weight
    return weight + adapter.delta(name)[0].view(weight.shape)


def test_dilation_is_the_bases():
    model = kinds(dilation=2)
    adapter = attached(model, lora(), ["sound", "image"])
    ids, pixels = inputs()
    letters = model.words(ids).detach().mT
    sound, image = adapter.base("sound"), adapter.base("image")
    want = nn.functional.conv1d(letters, changed(adapter, "sound"), sound.bias, 2, 2, 2)
    torch.testing.assert_close(model.sound(letters), want)
    want = nn.functional.conv2d(pixels, changed(adapter, "image"), image.bias, (2, 1), (1, 2), 2)
    torch.testing.assert_close(model.image(pixels), want)


def test_padding_may_be_a_word():
    model = nn.Sequential(nn.Conv1d(3, 5, 4, padding="same", dilation=2)).double()
    x = torch.randn(4, 3, 9, dtype=torch.float64)
    adapter = lora(2).attach(model, "0", head=[], calibration=x)
    fill(adapter, spread=0.3)
    base = adapter.base("0")
    kernels = base.weight + adapter.delta("0").view(2, *base.weight.shape)
    want = [nn.functional.conv1d(x[2 * k : 2 * k + 2], kernels[k], base.bias, padding="same", dilation=2) for k in range(2)]
    torch.testing.assert_close(model(x), torch.cat(want))


def test_attaching_changes_nothing_and_the_start_is_pefts():
    model = kinds()
    before = model(*inputs())
    adapter = lora().attach(model, TARGETS, head=[])
    assert torch.equal(model(*inputs()), before)
    words, image = adapter.site("words"), adapter.site("image")
    assert not words.A.any() and image.A.any() and not image.B.any()
    normal = torch.empty(6, 3).normal_(generator=generator(SEEDS[0], "words", "A"))
    assert torch.equal(words.B[0], normal.double())
    assert image.A.abs().max() <= 18**-0.5 and image.A.abs().max() > 0.9 * 18**-0.5  # Kaiming with a = sqrt(5)


def test_a_padding_token_gives_no_gradient_to_a():
    model = kinds()
    adapter = attached(model, lora(), "words")
    model(*inputs())[0].sum().backward()
    gradient = adapter.site("words").A.grad[0]
    assert not gradient[:, PAD].any() and gradient.any()


def test_parameters_are_counted():
    adapter = lora(3).attach(kinds(), TARGETS, head=[], calibration=inputs(3))
    sizes = (WORDS + 6) + (18 + 6) + (18 + 5) + (7 + 4)
    assert adapter.parameter_counts()["trainable"].tolist() == [sizes * rank for rank in (3, 2, 4)]


# -- every method that can -----------------------------------------------------------------------------------------------

LOW_RANK = [
    name
    for name in variants.METHODS
    if hasattr(variants.method(name).load(), "peft_type") and variants.method(name).load().needs is None
]
TAKE_ALL = [name for name in LOW_RANK if variants.method(name).load().only_linear is None]


def train(adapter: Any, model: nn.Module, ids: Tensor, pixels: Tensor) -> Any:
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.05)
    for index in range(1, STEPS + 1):
        step = Step(index, STEPS, learning_rates=torch.full((adapter.members,), 0.05))
        adapter.begin(step)
        outputs = model(ids, pixels).view(adapter.members, -1)
        (outputs.square().mean(1) + adapter.penalty(step)).sum().backward()
        adapter.before_step(step)
        optimizer.step()
        adapter.after_step(step)
        adapter.take_changes()
        optimizer.zero_grad()
    return adapter


@pytest.mark.filterwarnings("ignore:.*after_step was never called")  # fill() moves what is not trained yet
@pytest.mark.parametrize("method", quick(TAKE_ALL))
def test_members_train_together_as_alone(method):
    """With dropout, and ranks, scales and allocation of each member's own."""
    values = settings(method)
    values |= {"rank": [4, 2, 3]} if "rank" in values else {}  # more than 4 is no rank of the smallest weight
    model, rows = kinds().train(), 4
    packed = variants.create(method, members=3, seeds=SEEDS, **values)
    ids, pixels = inputs(3, rows)
    packed.attach(model, TARGETS, head=[], calibration=(ids, pixels))
    fill(packed)
    starts = [packed.alone(k) for k in range(3)]
    models = [kinds().train() for _ in starts]
    for k, (alone, own) in enumerate(zip(starts, models, strict=True)):
        alone.attach(own, TARGETS, head=[])
        alone.copy_member(packed, k)
    before = {
        name: site.low_rank.B.detach().clone() for name, site in packed.named_sites()
    }  # the factor that every method trains
    train(packed, model, ids, pixels)
    after = {name: site.low_rank.B for name, site in packed.named_sites()}
    assert all(B.shape != before[name].shape or B.ne(before[name]).any() for name, B in after.items())
    for k, (alone, own) in enumerate(zip(starts, models, strict=True)):
        mine = slice(k * rows, (k + 1) * rows)
        train(alone, own, ids[mine], pixels[mine])
        for name in TARGETS:
            torch.testing.assert_close(packed.delta(name)[k], alone.delta(name)[0], rtol=1e-9, atol=1e-12)
        assert {n: int(r[k]) for n, r in packed.ranks().items()} == {n: int(r) for n, r in alone.ranks().items()}


@pytest.mark.parametrize("member", [0, 2])
@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_a_merged_member_acts_the_same_and_is_taken_out_bit_for_bit(method, member):
    model = kinds()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = attached(model, variants.create(method, members=3, seeds=SEEDS, **settings(method)))
    ids, pixels = inputs(3)
    want = model(ids, pixels)[4 * member : 4 * member + 4]
    adapter.merge(member)
    torch.testing.assert_close(model(ids, pixels)[4 * member : 4 * member + 4], want)
    adapter.unmerge()
    adapter.detach()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_16_bit_base_keeps_its_output_type_and_trains_in_fp32():
    model = kinds(torch.bfloat16)
    adapter = attached(model, lora())
    ids, pixels = inputs(dtype=torch.bfloat16)
    assert adapter.site("words").A.dtype == torch.float32
    assert model.words(ids).dtype == model.image(pixels).dtype == torch.bfloat16


# -- PEFT's files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_peft_loads_ours_with_equal_outputs(method, tmp_path):
    model = kinds(torch.float32)
    adapter = attached(model, variants.create(method, **of_member(settings(method, dropout=0.0), 0)))
    want = model(*inputs(dtype=torch.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the budget of an untrained AdaLoRA
        variants.save_pretrained(adapter, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    rank = len(tensors["base_model.model.out.lora_A.weight"])
    assert tensors["base_model.model.words.lora_embedding_A"].shape == (rank, WORDS)
    assert tensors["base_model.model.words.lora_embedding_B"].shape == (6, rank)
    assert tensors["base_model.model.image.lora_A.weight"].shape == (rank, 3, 2, 3)
    assert tensors["base_model.model.image.lora_B.weight"].shape == (5, rank, 1, 1)
    assert tensors["base_model.model.sound.lora_A.weight"].shape == (rank, 6, 3)
    assert tensors["base_model.model.sound.lora_B.weight"].shape == (6, rank, 1)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    theirs = peft.PeftModel.from_pretrained(kinds(torch.float32), tmp_path).eval()
    torch.testing.assert_close(theirs(*inputs(dtype=torch.float32)), want)
    ours = kinds(torch.float32)
    again = variants.load_pretrained(ours, tmp_path)
    torch.testing.assert_close(ours(*inputs(dtype=torch.float32)), want)
    assert again.ranks() == adapter.ranks()


@pytest.mark.parametrize("rooted", [False, True])
def test_ours_loads_pefts_with_equal_outputs(rooted, tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=TARGETS, init_lora_weights=False, use_rslora=rooted)
    theirs = peft.get_peft_model(kinds(torch.float32), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = kinds(torch.float32)
    adapter = variants.load_pretrained(ours, tmp_path)
    assert list(adapter.ranks()) == TARGETS
    torch.testing.assert_close(ours(*inputs(dtype=torch.float32)), theirs(*inputs(dtype=torch.float32)))
    fresh = kinds(torch.float32)
    assert not torch.allclose(ours(*inputs(dtype=torch.float32)), fresh(*inputs(dtype=torch.float32)), atol=1e-3)


def test_a_dilation_that_peft_forgets_is_said_and_a_file_trained_so_is_refused(tmp_path):
    adapter = attached(kinds(torch.float32, dilation=2), lora(), "image")
    with pytest.warns(UserWarning, match="other outputs until it is merged there: PEFT's A has no dilation"):
        variants.save_pretrained(adapter, tmp_path / "ours")
    model = kinds(torch.float32, dilation=2)
    variants.load_pretrained(model, tmp_path / "ours")
    torch.testing.assert_close(model(*inputs(dtype=torch.float32)), adapter.model(*inputs(dtype=torch.float32)))
    config = peft.LoraConfig(r=3, target_modules=["image"])
    peft.get_peft_model(kinds(torch.float32, dilation=2), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"image was another function in PEFT: .*dilation"):
        variants.load_pretrained(kinds(torch.float32, dilation=2), tmp_path / "theirs")


# -- magnitudes at every kind ---------------------------------------------------------------------------------------------


def test_a_magnitude_scales_each_row_of_the_changed_weight_and_not_the_bias():
    """The definition, of three members: m / |W + dW| times W + dW in place of W; |W + dW| is constant in the backward pass."""
    model, rows = kinds(), 4
    adapter = attached(model, lora(3, magnitude=True))
    ids, pixels = inputs(3, rows)
    letters = torch.tanh(torch.randn(3 * rows, 6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    given = {"words": ids, "sound": letters, "image": pixels}
    found = {name: model.get_submodule(name)(x) for name, x in given.items()}
    sum(y.square().sum() for y in found.values()).backward()
    for name, x in given.items():
        site, base = adapter.site(name), adapter.base(name)
        for k, scale in enumerate((7 / 3, 5 / 2, 2 / 4)):
            A, B, m = (t[k].detach().requires_grad_() for t in (site.inner.A, site.inner.B, site.magnitude))
            whole = weight_of(base) + scale * B @ A
            W = (m / whole.detach().norm(dim=1))[:, None] * whole
            mine = x[k * rows : (k + 1) * rows]
            if name == "words":
                want = nn.functional.embedding(mine, W.mT)
            elif name == "sound":
                want = nn.functional.conv1d(mine, W.view(base.weight.shape), base.bias, 2, 2)
            else:
                want = nn.functional.conv2d(mine, W.view(base.weight.shape), base.bias, (2, 1), (1, 2))
            torch.testing.assert_close(found[name][k * rows : (k + 1) * rows], want)
            torch.testing.assert_close(adapter.delta(name)[k], W - weight_of(base))
            want.square().sum().backward()
            torch.testing.assert_close(site.magnitude.grad[k], m.grad)
            torch.testing.assert_close(site.inner.B.grad[k], B.grad)
            expected = A.grad.clone()
            expected[:, PAD] *= 0 if name == "words" else 1  # a padding token gives A no gradient, as in PEFT
            torch.testing.assert_close(site.inner.A.grad[k], expected)


@pytest.mark.parametrize("method", ["dora", "adalora+dora"])
def test_a_dora_goes_to_peft_and_back_at_every_kind(method, tmp_path):
    model = kinds(torch.float32)
    adapter = attached(model, variants.create(method, **of_member(settings(method, dropout=0.0), 0)))
    want = model(*inputs(dtype=torch.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        variants.save_pretrained(adapter, tmp_path / "ours")
    tensors = load_file(tmp_path / "ours/adapter_model.safetensors")
    shapes = {"words": (6,), "sound": (1, 6, 1), "image": (1, 5, 1, 1), "out": (4,)}
    assert {n: tuple(tensors[f"base_model.model.{n}.lora_magnitude_vector"].shape) for n in shapes} == shapes
    oracle = peft.PeftModel.from_pretrained(kinds(torch.float32), tmp_path / "ours").eval()
    torch.testing.assert_close(oracle(*inputs(dtype=torch.float32)), want)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.2).add_(0.05)
    oracle.save_pretrained(tmp_path / "theirs")
    for folder, expected in (("ours", want), ("theirs", oracle(*inputs(dtype=torch.float32)))):
        fresh = kinds(torch.float32)
        variants.load_pretrained(fresh, tmp_path / folder)
        torch.testing.assert_close(fresh(*inputs(dtype=torch.float32)), expected)


def test_a_dora_of_pefts_starts_where_ours_does_and_trains_alike():
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=TARGETS, use_dora=True)
    oracle, model = peft.get_peft_model(kinds(torch.float32), config), kinds(torch.float32)
    adapter = variants.create("dora", rank=3, alpha=7).attach(model, TARGETS, head=[])
    theirs = {n.removeprefix("base_model.model."): p for n, p in oracle.named_parameters() if p.requires_grad}
    pairs = []
    for name, site in adapter.named_sites():
        magnitude = theirs[f"{name}.lora_magnitude_vector.default.weight"]
        torch.testing.assert_close(magnitude.detach().flatten(), site.magnitude[0].detach())
        pairs.append((site.magnitude, magnitude))
        for part in "AB":
            key = f"{name}.lora_embedding_{part}.default" if name == "words" else f"{name}.lora_{part}.default.weight"
            pairs.append((getattr(site.inner, part), theirs[key]))
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine[0].view(other.shape))
    ids, pixels = inputs(dtype=torch.float32)
    optimizers = [torch.optim.AdamW([pair[which] for pair in pairs], lr=1e-2, eps=1e-4) for which in (0, 1)]
    for _ in range(5):
        for one, optimizer in zip((model, oracle), optimizers, strict=True):
            one(ids, pixels).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for mine, other in pairs:
        torch.testing.assert_close(mine[0].flatten(), other.flatten(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(model(ids, pixels), oracle(ids, pixels), rtol=1e-4, atol=1e-5)


# -- targets and refusals --------------------------------------------------------------------------------------------------


def test_all_linear_means_linears_and_a_name_or_expression_any_kind():
    model = kinds()
    assert resolve(model, "all-linear", []) == ["hidden", "out"]
    assert resolve(model, "words", []) == ["words"] and resolve(model, "image|out", []) == ["image", "out"]
    assert resolve(tiny("bert"), "word_embeddings", []) == ["bert.embeddings.word_embeddings"]


@pytest.mark.parametrize("method", ["pissa", "vera", "eva", "gora"])
def test_methods_that_need_linears_say_so(method):
    adapter = variants.create(method, **of_member(settings(method), 0))
    with pytest.raises(ValueError, match=rf'target "words" is no linear module .* {re.escape(method)} .* linear modules only'):
        adapter.attach(kinds(), TARGETS, head=[], calibration=inputs())


class Packed(nn.Linear):
    """Two weights in a byte, as bitsandbytes' 4-bit layers store them."""

    def __init__(self, dtype: torch.dtype = torch.uint8, shape: tuple[int, int] = (64, 1)):
        super().__init__(16, 8)
        self.weight = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)


class Scaled(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 4


STRANGE = [
    (Packed(), r'"0" is a Packed whose weight is \(64, 1\) of torch.uint8, and only \(8, 16\) of float16'),
    (Packed(torch.int8, (8, 16)), "whose weight is .* of torch.int8.*without quantisation"),
    (Packed(torch.float8_e4m3fn, (8, 16)), "whose weight is .* of torch.float8_e4m3fn"),
    (Packed(torch.float32, (16, 8)), r"whose weight is \(16, 8\) of torch.float32, and only \(8, 16\)"),
    (nn.LazyLinear(8), "without a weight to adapt"),
    (nn.Bilinear(16, 16, 8), "matches 0, a Bilinear, not a linear module"),
    (nn.Conv3d(2, 2, 3), "matches 0, a Conv3d, not a linear module"),
    (nn.Conv1d(4, 4, 3, groups=2), "with groups = 2, and only groups = 1"),
    (nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), 'with padding_mode = "circular"'),
    (nn.Conv2d(4, 4, 3, groups=2), "with groups = 2, and only groups = 1"),
    (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), 'with padding_mode = "reflect"'),
    (nn.Embedding(4, 4, max_norm=1.0), "with max_norm = 1.0"),
    (Scaled(4, 4), "a forward pass of its own"),
]


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "eva", "random-rank", "truncated"])
@pytest.mark.parametrize(("module", "words"), STRANGE, ids=lambda value: type(value).__name__)
def test_what_is_no_known_kind_is_refused_in_one_line(method, module, words):
    model = nn.Sequential(module)
    with pytest.raises(ValueError, match=words) as error:
        variants.create(method, **of_member(settings(method), 0)).attach(model, ["0"], head=[])
    assert "\n" not in str(error.value) and model[0] is module


def test_refusals_name_every_kind_that_there_is(monkeypatch, tmp_path):
    """A new kind is one line in KINDS, and messages list it too."""
    config = peft.LoraConfig(r=3, target_modules=["0"])
    peft.get_peft_model(nn.Sequential(nn.Conv3d(2, 3, 2)), config).save_pretrained(tmp_path)
    monkeypatch.setattr(linears, "KINDS", (*linears.KINDS, TransposedKind()))
    model, names = nn.Sequential(nn.Conv3d(2, 3, 2)), ", ".join(type(kind).__name__ for kind in linears.KINDS)
    with pytest.raises(ValueError, match=rf"matches 0, a Conv3d, not a linear module or of another kind .* \({names}\)"):
        lora().attach(model, ["0"], head=[])
    with pytest.raises(ValueError, match=f"0 is a Conv3d: only adapters of {names} can be loaded"):
        variants.load_pretrained(model, tmp_path)


def test_full_fine_tuning_of_a_quantised_model_is_refused():
    with pytest.raises(ValueError, match=r"0.weight is of torch.uint8, and full trains floating-point weights only"):
        variants.create("full").attach(nn.Sequential(Packed()), head=[])


def test_a_quantised_linear_is_refused_under_all_linear_too():
    with pytest.raises(ValueError, match="without quantisation"):
        lora().attach(nn.Sequential(nn.Linear(4, 16), Packed()), head=[])


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_weight_that_is_computed_cannot_be_merged(method):
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
    nn.utils.parametrizations.weight_norm(model[0])
    adapter = variants.create(method, rank=2, alpha=5).attach(model, ["0"], head=[])
    fill(adapter)
    x = torch.randn(4, 8)
    want = model(x)
    with pytest.raises(CannotMerge, match=r"the weight of a ParametrizedLinear is computed .*remove_parametrizations"):
        adapter.merge()
    assert not adapter.is_merged and torch.equal(model(x), want)


def test_an_adapted_module_is_of_its_bases_kind():
    model = kinds()
    before = [type(find_kind(module)) for module in model.children()]
    lora().attach(model, TARGETS, head=[])
    assert [type(find_kind(module)) for module in model.children()] == before


class Transposed(nn.Module):
    """What CONTRIBUTING's recipe for a kind of weight is tried with: a linear whose weight is stored (I, O)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features))
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class TransposedKind(linears.Kind):
    def holds(self, module):
        return isinstance(module, Transposed)

    def shape(self, module):
        return tuple(module.weight.shape)

    def matrix(self, weight):
        return weight.mT

    def stored(self, matrix, module):
        return matrix.mT


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_a_kind_of_weight_is_one_class_and_one_line(method, monkeypatch):
    monkeypatch.setattr(linears, "KINDS", (TransposedKind(), *linears.KINDS))
    model = nn.Sequential(Transposed(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    before = model[0].weight.detach().clone()
    settings = {"initial_rank": 3, "target_rank": 2} if method == "adalora" else {"rank": [3, 2, 1]}
    x = torch.randn(12, 5, dtype=torch.float64)
    adapter = variants.create(method, members=3, alpha=7, **settings)
    adapter.attach(model, "all-linear", head=[], calibration=x)  # the probe passes: packed equals alone
    assert [name for name, _ in adapter.named_sites()] == ["0", "2"]
    fill(adapter)
    y = model.eval()(x)
    for member in range(3):
        adapter.merge(member)
        own = slice(4 * member, 4 * member + 4)
        torch.testing.assert_close(model(x)[own], y[own])
        adapter.unmerge()
    assert torch.equal(model[0].weight, before)
