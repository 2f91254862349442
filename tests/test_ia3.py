"""(IA)3 against its equations written out, and against PEFT's: outputs, modules and files both ways."""

import json

import peft
import pytest
import torch
from peft.utils import constants
from rankwise import variants
from rankwise.variants.adapter.probe import fill
from rankwise.variants.ia3 import PLACES
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.loop import outputs
from tests.tiny import batch, tiny

K, ROWS, INNER, OUTER = 3, 4, 5, 7
OWN = {"outputs": ["first"], "inputs": ["second"]}


class Two(nn.Module):
    """Two linears with biases, of three sizes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, INNER), nn.Linear(INNER, OUTER)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def two() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Two().double()


def filled(members: int = K) -> variants.Adapter:
    adapter = variants.create("ia3", members=members, **OWN).attach(two(), head=[])
    fill(adapter, 0.3)
    return adapter


def rows(members: int = K) -> Tensor:
    return torch.randn(members * ROWS, 6, generator=torch.Generator().manual_seed(1)).double()


def test_outputs_and_inputs_are_scaled_as_the_equations_say():
    adapter, x = filled(), rows()
    model, plain = adapter.model, two()
    l, ff = adapter.site("first").vector, adapter.site("second").vector
    found = model(x).view(K, ROWS, OUTER)
    for k in range(K):
        for row in range(ROWS):
            h = [(plain.first.weight[o] @ x[k * ROWS + row] + plain.first.bias[o]) * l[k, o] for o in range(INNER)]
            h = [torch.tanh(value) * ff[k, i] for i, value in enumerate(h)]
            y = [sum(w * value for w, value in zip(plain.second.weight[o], h, strict=True)) for o in range(OUTER)]
            torch.testing.assert_close(found[k, row], torch.stack(y) + plain.second.bias, rtol=1e-12, atol=1e-12)


def test_the_change_of_the_weight_and_the_merge_are_exact():
    adapter, x = filled(), rows()
    plain, live = two(), adapter.model(x).view(K, ROWS, OUTER)
    for k in range(K):
        with torch.no_grad():
            for name, old in (("first", plain.first), ("second", plain.second)):
                new = old.weight + adapter.delta(name)[k]
                adapter.merge(k)
                torch.testing.assert_close(adapter.base(name).weight, new, rtol=1e-12, atol=1e-14)
                adapter.unmerge()
            adapter.merge(k)
            assert torch.equal(adapter.base("second").bias, plain.second.bias), "an input's vector leaves the bias alone"
            torch.testing.assert_close(adapter.model(x).view(K, ROWS, OUTER)[k], live[k], rtol=1e-12, atol=1e-12)
            adapter.unmerge()


def test_vectors_start_at_one_do_not_decay_and_are_counted():
    adapter = variants.create("ia3", members=K).attach(tiny("bert"))
    assert all((site.vector == 1).all() for _, site in adapter.named_sites())
    decayed, plain = adapter.parameter_groups()
    assert {id(p) for p in decayed.params} == {id(adapter.heads["classifier"].weight)} and plain.weight_decay == 0
    a_layer = 32 + 32 + 32 + 48  # keys, values, inputs of the attention's and of the feed-forward's output layer
    assert adapter.parameter_counts()["trainable"].tolist() == [2 * a_layer] * K


def test_the_modules_are_pefts():
    targets = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    inputs = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    for kind, (outs, ins) in PLACES.items():
        if kind in targets:
            assert set(outs) | set(ins) == set(targets[kind])
            assert kind == "mt5" or set(ins) == set(inputs[kind])  # whose wi_1 is an output in PEFT too


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_pefts_files_go_both_ways(name, tmp_path):
    with pytest.warns(UserWarning, match="fan_in_fan_out") if name == "gpt2" else torch.no_grad():
        oracle = peft.get_peft_model(tiny(name, torch.float32), peft.IA3Config(task_type="SEQ_CLS")).eval()
    for key, value in oracle.named_parameters():
        if "ia3_l" in key:
            nn.init.normal_(value.data, 1.0, 0.3)
    want = outputs(oracle, batch(0))
    oracle.save_pretrained(tmp_path / "theirs")
    model = tiny(name, torch.float32).eval()
    adapter = variants.load_pretrained(model, tmp_path / "theirs")
    torch.testing.assert_close(outputs(model, batch(0)), want, rtol=1e-5, atol=1e-5)
    by_default = variants.create("ia3").attach(tiny(name))
    assert [n for n, _ in adapter.named_sites()] == [n for n, _ in by_default.named_sites()]
    variants.save_pretrained(adapter, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert theirs.keys() == ours.keys() and all(torch.equal(ours[key], value) for key, value in theirs.items())
    again = peft.PeftModel.from_pretrained(tiny(name, torch.float32), tmp_path / "ours").eval()
    torch.testing.assert_close(outputs(again, batch(0)), want, rtol=1e-5, atol=1e-5)


def test_settings_and_seed_come_back_from_our_own_file(tmp_path):
    adapter = variants.create("ia3", seeds=[4], outputs=["query"], inputs=["layer.1.output.dense"]).attach(tiny("bert"))
    fill(adapter)
    variants.save_pretrained(adapter, tmp_path)
    again = variants.load_pretrained(tiny("bert"), tmp_path)
    assert (again.settings, again.seeds, again.head_names) == (adapter.settings, [4], ["classifier"])
    assert all(torch.equal(value, adapter.state_dict()[key]) for key, value in again.state_dict().items())


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model of type None is not known; name the modules .*outputs = \[...\]"):
        variants.create("ia3").attach(two(), head=[])
    with pytest.raises(ValueError, match=r'"first" stands in both outputs and inputs: leave it out of one'):
        variants.create("ia3", outputs=["first"], inputs=["first"]).attach(two(), head=[])
    with pytest.raises(ValueError, match="scale nothing"):
        variants.create("ia3", outputs=[], inputs=[])
    with pytest.raises(ValueError, match=r'"bert.embeddings.word_embeddings" is no linear module \(Embedding\)'):
        variants.create("ia3", outputs=["word_embeddings"]).attach(tiny("bert"))
    adapter = variants.create("ia3").attach(tiny("bert"))
    variants.save_pretrained(adapter, tmp_path)
    with pytest.raises(ValueError, match="no low-rank update"):
        variants.export_lora(adapter, tmp_path / "lora")
    file, whole = tmp_path / "adapter_model.safetensors", load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.bert.encoder.layer.0.attention.self.key.ia3_l"
    for change, message in (
        ({name: whole[name].mT.contiguous()}, r"key\.ia3_l has shape \(1, 32\) where .* need \(32, 1\)"),
        ({name: None}, r"1 of them, bert\.encoder\.layer\.0\.attention\.self\.key among them: the file is not whole"),
    ):
        save_file({k: v for k, v in (whole | change).items() if v is not None}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            variants.load_pretrained(tiny("bert"), tmp_path)


def test_the_configuration_is_pefts(tmp_path):
    adapter = variants.create("ia3").attach(tiny("gpt2"))
    variants.save_pretrained(adapter, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    read = peft.IA3Config.from_pretrained(tmp_path)
    assert config["fan_in_fan_out"] and read.feedforward_modules < read.target_modules and read.task_type == "SEQ_CLS"
