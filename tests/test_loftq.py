"""LoftQ's start beside its equation, PEFT's decomposition, and the model in full precision that it starts nearer to."""

import copy

import peft
import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter.linears import weight_of
from rankwise.variants.loftq import error_parts
from safetensors.torch import load_file
from torch import nn

from tests import quantised_models
from tests.contract import fingerprint
from tests.tiny import batch, packed_batch

pytestmark = [quantised_models.needed, pytest.mark.filterwarnings("ignore")]
QUERY = "bert.encoder.layer.0.attention.self.query"
TARGETS = ["query", "intermediate.dense", "layer.1.output.dense"]
ROWS = {k: v for k, v in batch(0, 0, rows=6).items() if k != "labels"}


def full(name: str = "bert") -> nn.Module:
    import transformers

    with quantised_models.quiet():
        return transformers.AutoModelForSequenceClassification.from_pretrained(quantised_models.folder(name)).eval()


def distance(model: nn.Module, name: str = "bert") -> float:
    """From the outputs in full precision."""
    return (model(**ROWS).logits - full(name)(**ROWS).logits).norm().item()


def plain(form: str, name: str = "bert", method: str = "lora", **settings) -> tuple[variants.Adapter, nn.Module]:
    model = quantised_models.loaded(name, form)
    return variants.create(method, **settings).attach(model, "all-linear-peft"), model  # the pooler is quantised too


@pytest.mark.parametrize("form", ["nf4", "nf4+dq", "int8"])
def test_the_start_is_the_nearest_to_the_error_at_each_members_rank_and_scale(form):
    model = quantised_models.loaded("bert", form)
    before = fingerprint(dict(model.named_parameters()))
    adapter = variants.create("loftq", members=3, rank=[6, 3, 5], alpha=[7.0, 3.0, 11.0])
    adapter.attach(model, TARGETS, calibration={k: v for k, v in packed_batch([0, 1, 2]).items() if k != "labels"})
    stored = load_file(quantised_models.folder("bert") / "model.safetensors")
    for name, _ in adapter.named_sites():
        error = stored[f"{name}.weight"].double() - weight_of(adapter.base(name)).double()
        squares, vectors = torch.linalg.eigh(error.mT @ error)
        assert squares[-1] > 0
        for k, rank in enumerate([6, 3, 5]):
            V = vectors[:, -rank:]
            assert torch.allclose(adapter.delta(name)[k].double(), error @ V @ V.mT, atol=2e-5), (name, k)
    adapter.detach()
    assert fingerprint(dict(model.named_parameters())) == before


def test_factors_are_pefts_where_alpha_is_the_rank():
    from peft.utils.loftq_utils import _low_rank_decomposition

    error = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
    theirs = _low_rank_decomposition(error, reduced_rank=4)
    (A,), (B,) = error_parts(error, [4], [1.0])
    assert torch.allclose(B @ A, theirs["L"] @ theirs["R"], atol=1e-6)
    assert torch.allclose(A.norm(dim=1), theirs["R"].norm(dim=1), atol=1e-6)
    (A,), (B,) = error_parts(error, [4], [2.5])
    assert torch.allclose(2.5 * B @ A, theirs["L"] @ theirs["R"], atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_start_is_nearer_to_full_precision_and_at_full_rank_it_is_that(name):
    rounded = distance(plain("nf4", name, rank=1)[1], name)
    some = distance(plain("nf4", name, "loftq", rank=24, alpha=48)[1], name)
    whole = distance(plain("nf4", name, "loftq", rank=64, alpha=16)[1], name)
    assert some < 0.8 * rounded and whole < 1e-3 * rounded


def test_a_magnitude_starts_at_the_size_of_the_changed_weight():
    rounded = distance(plain("nf4", rank=1)[1])
    adapter, model = plain("nf4", "bert", "loftq", rank=64, alpha=16, magnitude=True)
    assert distance(model) < 1e-3 * rounded
    site = adapter.site(QUERY)
    assert torch.allclose(site.magnitude[0], full().get_submodule(QUERY).weight.norm(dim=1), rtol=1e-4)


def test_its_file_is_a_plain_lora_over_the_quantised_base(tmp_path):
    adapter, model = plain("nf4", "bert", "loftq", rank=4, alpha=6)
    expected = model(**ROWS).logits
    variants.save_pretrained(adapter, tmp_path)
    again = quantised_models.loaded("bert", "nf4")
    assert variants.load_pretrained(again, tmp_path).method == "loftq"
    assert torch.equal(again(**ROWS).logits, expected)
    dequantised = quantised_models.in_full(quantised_models.loaded("bert", "nf4"))  # as training computes, in evaluation too
    oracle = peft.PeftModel.from_pretrained(dequantised, tmp_path).eval()
    assert oracle.peft_config["default"].init_lora_weights is True
    assert torch.allclose(oracle(**ROWS).logits, expected, rtol=1e-5, atol=1e-5)


def test_without_the_files_it_is_refused_and_without_quantisation_warned_of(tmp_path):
    model = quantised_models.loaded("bert", "nf4")
    model.config._name_or_path = "somebody/bert"
    before = fingerprint(dict(model.named_parameters()))
    with pytest.raises(ValueError, match=r"loftq starts at the error of quantisation, and the files .* 'somebody/bert'"):
        variants.create("loftq", rank=2).attach(model)
    model.files = tmp_path
    with pytest.raises(ValueError, match=r"holds neither model.safetensors nor"):
        variants.create("loftq", rank=2).attach(model)
    assert fingerprint(dict(model.named_parameters())) == before
    model.files = quantised_models.folder("gpt2")
    with pytest.raises(ValueError, match=r"holds no bert.encoder.layer.0.*weight"):
        variants.create("loftq", rank=2).attach(model)
    model.files = quantised_models.folder("bert")
    with pytest.raises(ValueError, match=r"rank = 65 at bert.encoder.layer.0.*has no more ranks than 64"):
        variants.create("loftq", rank=65).attach(model)
    with pytest.warns(UserWarning, match="no target is quantised: it is LoRA here"):
        variants.create("loftq", rank=2).attach(full())


def test_a_copy_of_the_model_knows_its_files():
    model = quantised_models.loaded("bert", "int8")
    model.files = quantised_models.folder("bert")
    adapter = variants.create("loftq", rank=2).attach(copy.deepcopy(model), TARGETS)
    assert adapter.delta(QUERY).any()
