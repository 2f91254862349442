"""Troubles that people report about tools of this kind: each is mended by its kind, not at one spot."""

import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from rankwise import variants
from rankwise.variants import native
from rankwise.variants.adapter.probe import fill
from torch import nn
from torch.utils.checkpoint import checkpoint

SIZES = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIZES |= {"max_position_embeddings": 64, "num_labels": 3, "pad_token_id": 0}
IDS, LABELS = torch.randint(3, 60, (4, 7), generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])


def bert(dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, hidden_dropout_prob=dropout))


def gradients(prepare=lambda model: None, method: str = "lora", **settings) -> torch.Tensor:
    model = bert()
    adapter = variants.create(method, **settings).attach(model, head=["classifier"])
    fill(adapter)
    prepare(model)
    model.train()
    adapter.begin(variants.Step(1, total=10))
    (model(input_ids=IDS, labels=LABELS).loss + adapter.penalty(variants.Step(1, total=10)).sum()).backward()
    return torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None])


def by_hand(model: nn.Module) -> None:
    for layer in model.bert.encoder.layer:
        layer.forward = lambda *args, run=layer.forward, **kwargs: checkpoint(run, *args, use_reentrant=False, **kwargs)


@pytest.mark.parametrize(
    "door",
    [lambda m: m.gradient_checkpointing_enable(),
     lambda m: m.gradient_checkpointing_enable({"use_reentrant": False}),
     by_hand],
    ids=["default", "not reentrant", "by hand"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_activations_computed_again_draw_the_same_dropout(method, door):
    settings = {"initial_rank": 4, "target_rank": 2} if method == "adalora" else {"rank": 4}
    plain, again = (gradients(prepare, method, **settings, dropout=0.2) for prepare in (lambda model: None, door))
    assert torch.allclose(plain, again, rtol=1e-4, atol=1e-7)


def test_a_layer_that_is_called_several_times_asks_for_the_keyed_recomputation():
    torch.manual_seed(0)
    config = transformers.AlbertConfig(**SIZES, embedding_size=16, hidden_dropout_prob=0.1)
    model = transformers.AlbertForSequenceClassification(config)
    adapter = variants.create("lora", rank=2, dropout=0.2).attach(model, head=["classifier"])
    layer = model.albert.encoder.albert_layer_groups[0]
    layer.forward = lambda *args, run=layer.forward, **kwargs: checkpoint(run, *args, use_reentrant=False, **kwargs)
    model.train()
    adapter.begin(variants.Step(1, total=10))
    loss = model(input_ids=IDS, labels=LABELS).loss
    with pytest.raises(ValueError, match=r"context_fn=adapter\.draw\.recompute_contexts"):
        loss.backward()


def test_two_passes_in_one_step_of_trainer_draw_apart(tmp_path):
    model = bert(0.3)
    adapter = variants.create("lora", rank=4).attach(model, head=["classifier"])
    apart = []

    class Twice(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **_):
            one, two = model(**inputs), model(**inputs)
            apart.append((one.logits - two.logits).abs().max().item())
            return (one.loss + two.loss) / 2

    data = [{"input_ids": row, "labels": int(row.sum()) % 3} for row in IDS.repeat(4, 1)]
    optimizer = torch.optim.AdamW(variants.torch_groups(adapter, lr=1e-2))
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=2, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    callback = variants.AdapterCallback(adapter)
    Twice(model, arguments, train_dataset=data, optimizers=(optimizer, None), callbacks=[callback]).train()
    assert len(apart) == 4 and min(apart) > 0


def test_the_compiled_passes_leave_traced_and_foreign_tensors_alone():
    x = torch.randn(4, 8)
    assert native.usable(x) == (native.library() is not None)

    class Own(torch.Tensor):
        pass

    assert not native.usable(x.as_subclass(Own)) and not native.usable(x.to("meta"))
    seen = []
    torch.func.vmap(lambda row: seen.append(native.usable(row)) or row)(x)
    torch.jit.trace(lambda row: seen.append(native.usable(row)) or row + 1, x, check_trace=False)
    assert not any(seen)


def test_an_adapted_model_can_be_traced():
    model = bert(0.0).eval()
    adapter = variants.create("lora", rank=2).attach(model, head=["classifier"])
    fill(adapter)
    model.config.return_dict = False
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, IDS, check_trace=False)
    assert torch.allclose(traced(IDS)[0], model(IDS)[0], atol=1e-5)


OFFLOADED = """
import sys, tempfile, torch, transformers
from rankwise import variants
torch.manual_seed(0)
folder = tempfile.mkdtemp()
sizes = dict(vocab_size=67, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(folder)
places = {"embeddings": "cpu", "encoder.layer.0": "cpu", "encoder.layer.1": "disk", "pooler": "disk"}
model = transformers.AutoModel.from_pretrained(folder, device_map=places, offload_folder=tempfile.mkdtemp()).eval()
ids = torch.arange(3, 17).view(2, 7)
before = model(input_ids=ids)[0]
try:
    variants.create(sys.argv[1], rank=4).attach(model, targets=["query"], head=[])
    print("same", torch.allclose(model(input_ids=ids)[0], before, atol=1e-5))
except ValueError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize(("method", "said"), [("lora", "same True"), ("dora", "refused: encoder.layer.1")])
def test_a_base_that_is_partly_on_disk_works_or_is_refused(method, said):
    done = subprocess.run([sys.executable, "-c", OFFLOADED, method], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert said in done.stdout


def test_batch_norms_of_the_frozen_base_do_not_move():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = 3 * torch.randn(12, 6) + 1
    adapter = variants.create("lora", rank=2).attach(model, targets=["0", "2"], head=[])
    in_training = model.train()(x)
    assert torch.equal(in_training, model.eval()(x))  # rows do not see each other, and both modes are one function
    adapter.detach()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model[1].training and model.train()[1].training


def test_a_fused_encoder_layer_calls_the_adapter_in_evaluation():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True), 2)
    adapter = variants.create("lora", rank=4).attach(model, targets=["linear1", "linear2"], head=[])
    fill(adapter)
    x = torch.randn(2, 5, 32)
    trained = model.train()(x).detach()
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), trained, atol=1e-5)


def head_of(model: nn.Module) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapter = variants.create("lora", rank=2).attach(model, fresh_head=True)
    names = list(adapter.head_names)
    assert bool(names) == any("task head" in str(one.message) for one in said)  # its fresh start is said
    return names


@pytest.mark.parametrize("method", ["lora", "head", "full"])
@pytest.mark.filterwarnings("error")
def test_a_head_that_was_trained_before_is_kept(method):
    model = bert(0.0).eval()
    nn.init.normal_(model.classifier.weight)
    nn.init.normal_(model.classifier.bias)
    before = model(input_ids=IDS).logits
    variants.create(method, **({"rank": 2} if method == "lora" else {})).attach(model)
    assert torch.allclose(model(input_ids=IDS).logits, before, atol=1e-6)


def test_the_head_is_what_stands_outside_the_base_model():
    common = {"vocab_size": 67, "pad_token_id": 0, "num_labels": 3}
    bart = transformers.BartConfig(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, eos_token_id=2,
                                   decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, bos_token_id=1,
                                   max_position_embeddings=64, **common)  # fmt: skip
    distil = transformers.DistilBertConfig(dim=32, n_layers=1, n_heads=4, hidden_dim=48, **common)
    assert head_of(transformers.BartForSequenceClassification(bart)) == ["classification_head"]
    assert head_of(transformers.DistilBertForSequenceClassification(distil)) == ["pre_classifier", "classifier"]
    assert head_of(bert()) == ["classifier"]
    llama = transformers.LlamaConfig(**{k: v for k, v in SIZES.items() if k != "num_labels"})
    assert head_of(transformers.LlamaForCausalLM(llama)) == []
    assert head_of(transformers.BartForConditionalGeneration(bart)) == []


def test_a_compiled_model_is_unwrapped_and_a_spread_one_refused(tmp_path):
    adapter = variants.create("lora", rank=2).attach(torch.compile(bert(), backend="eager"), targets=["query"], head=[])
    assert all(name.startswith("bert.") for name, _ in adapter.named_sites())
    variants.save_pretrained(adapter, tmp_path)
    variants.load_pretrained(bert(), tmp_path)
    with pytest.raises(ValueError, match=r"wrapped in DataParallel.*attach first, wrap afterwards"):
        variants.create("lora", rank=2).attach(nn.DataParallel(bert()), head=[])


def test_fused_experts_that_all_linear_leaves_out_are_said():
    config = transformers.MixtralConfig(vocab_size=67, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                        num_key_value_heads=2, intermediate_size=48, num_local_experts=4)  # fmt: skip
    with pytest.warns(UserWarning, match=r"leaves out \d\d% of the parameters.*stacks of weights .*experts"):
        variants.create("lora", rank=2).attach(transformers.MixtralForCausalLM(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        variants.create("lora", rank=2).attach(bert(), head=["classifier"])


@pytest.mark.parametrize("method", ["adalora", "truncated"])
def test_an_attach_that_fails_after_its_sites_are_in_leaves_the_model_as_it_was(method):
    """On a model without values: what these methods read of their sites comes after the sites."""
    model = bert().to("meta")
    kinds = [type(module) for module in model.modules()]
    adapter = variants.create(method, initial_rank=3, target_rank=2)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        adapter.attach(model, ["query"], head=[])
    assert [type(module) for module in model.modules()] == kinds
    assert all(parameter.requires_grad for parameter in model.parameters())
    variants.create("lora", rank=2).attach(model, ["query"], head=[])
