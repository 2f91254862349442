"""Many adapters on one model: mixed rows equal each adapter alone, in any order; adapters come and go; sums are right."""

import contextlib
import json
import re
import threading
import time
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import pytest
import torch
from rankwise import variants
from rankwise.experiments.bench import mixed
from rankwise.variants.adapter.linears import weight_of
from rankwise.variants.adapter.probe import fill
from rankwise.variants.bank import merging
from rankwise.variants.bank.owners import Owners
from rankwise.variants.bank.updates import Update, weighted_sum, with_direction
from torch import nn

from tests import language_models, quantised_models
from tests.tiny import batch, tiny

KINDS = {  # alpha != r, ranks and targets that differ, each with what PEFT's own sums get wrong
    "lora": ("lora", {"rank": 3, "alpha": 7.0, "rank_pattern": {"query": 2}, "alpha_pattern": {"value": 9.0}}, "all-linear"),
    "rooted": ("lora", {"rank": 4, "alpha": 5.0, "scaling": "alpha/sqrt(r)"}, ["intermediate.dense", "word_embeddings"]),
    "dora": ("dora", {"rank": 2, "alpha": 5.0}, ["query", "value", "intermediate.dense"]),
    "adalora": ("adalora", {"initial_rank": 3, "target_rank": 2, "alpha": 5.0}, "all-linear"),
    "adalora+dora": ("adalora+dora", {"initial_rank": 3, "target_rank": 2, "alpha": 5.0}, ["key", "output.dense"]),
    "head": ("head", {}, "all-linear"),
    "wide": ("lora", {"rank": 24, "alpha": 9.0}, "all-linear"),  # of another rank than the rest by far
}
OWNERS = ["dora", None, "lora", "rooted", "head", "adalora", "adalora+dora", "lora", None, "dora", "dora"]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
rows = {k: v for k, v in batch(0, 0, rows=len(OWNERS)).items() if k != "labels"}


def encoder(dtype=torch.float64):
    """The tiny BERT with biases that are not zero."""
    model = tiny("bert", dtype)
    random = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.add_(torch.randn(parameter.shape, generator=random).to(dtype) * 0.3)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """dtype, name -> a saved adapter, each with a head of its own."""
    root = tmp_path_factory.mktemp("adapters")
    for dtype in TOLERANCE:
        for seed, (name, (method, settings, targets)) in enumerate(KINDS.items()):
            adapter = variants.create(method, **settings).attach(encoder(dtype), targets)
            fill(adapter, 0.2, seed)
            variants.save_pretrained(adapter, root / str(dtype) / name)
    return lambda dtype, name: root / str(dtype) / name


def filled_bank(folders, dtype, names=KINDS):
    model = encoder(dtype).eval()
    bank = variants.Bank(model)
    for name in names:
        bank.load(name, folders(dtype, name))
    return model, bank


@torch.no_grad()
def alone(model, folder, inputs=rows):
    adapter = variants.load_pretrained(model, folder)
    logits = model(**inputs).logits
    adapter.detach()
    return logits


@pytest.mark.parametrize("dtype", TOLERANCE)
@torch.no_grad()
def test_mixed_rows_equal_each_adapter_alone(folders, dtype):
    model = encoder(dtype).eval()
    expected = {None: model(**rows).logits} | {name: alone(model, folders(dtype, name)) for name in KINDS}
    model, bank = filled_bank(folders, dtype)
    uneven = ["wide" if row == 4 else owner for row, owner in enumerate(OWNERS)]
    for owners in (OWNERS, uneven, sorted(OWNERS, key=str)):  # row by row; adapter by adapter; rows that stand together
        logits = bank(rows, adapters=owners).logits
        for row, owner in enumerate(owners):
            torch.testing.assert_close(logits[row], expected[owner][row], rtol=0, atol=TOLERANCE[dtype])
            others = [o for o in expected if o != owner]
            assert min((expected[owner][row] - expected[o][row]).abs().max() for o in others) > 1e-3
    for name in [*KINDS, None]:
        bank.use(name)
        torch.testing.assert_close(model(**rows).logits, expected[name], rtol=0, atol=TOLERANCE[dtype])
        assert bank.active == name
    assert torch.equal(bank(rows, adapters=[None] * len(OWNERS)).logits, expected[None])


@quantised_models.needed
@pytest.mark.parametrize("form", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_mixed_rows_over_a_quantised_base_equal_each_adapter_alone(form, tmp_path):
    """LoRA and DoRA over the same codes; when both are gone the model answers as before, to the bit.

    All have answered once without an adapter: on some CPUs bitsandbytes repacks a 4-bit weight then, and rounds its scales to
    bf16 for good.  Rows without an adapter are those of the dequantised base: bitsandbytes' own products round.
    """
    for seed, method in enumerate(("lora", "dora")):
        adapter = variants.create(method, rank=2 + seed, alpha=5, seeds=[seed]).attach(quantised_models.loaded("bert", form))
        fill(adapter)
        variants.save_pretrained(adapter, tmp_path / method)
    inputs = {"input_ids": torch.arange(1, 25).view(4, 6), "attention_mask": torch.ones(4, 6, dtype=torch.long)}
    model = quantised_models.loaded("bert", form)
    with torch.no_grad():
        before = model(**inputs).logits
        bank = variants.Bank(model)
        for name in ("lora", "dora"):
            bank.load(name, tmp_path / name)
        mixed_rows = bank(inputs, adapters=["lora", None, "dora", "lora"]).logits
        for name, own in (("lora", [0, 3]), (None, [1]), ("dora", [2])):
            other = quantised_models.loaded("bert", form)
            other(**inputs)
            if name is None:
                variants.create("lora", rank=1, alpha=1).attach(other)  # whose update is zero
            else:
                variants.load_pretrained(other, tmp_path / name)
            expected = other(**inputs).logits[own]
            torch.testing.assert_close(mixed_rows[own], expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
        for name in ("lora", "dora"):
            bank.remove(name)
        assert torch.equal(model(**inputs).logits, before)


@torch.no_grad()
def test_a_16_bit_base_is_rounded_once_as_with_an_adapter_alone(folders):
    model = encoder(torch.bfloat16).eval()
    expected = alone(model, folders(torch.float32, "dora"))
    bank = variants.Bank(model)
    bank.load("dora", folders(torch.float32, "dora"))
    apart = ["dora", None, *["dora"] * 9]  # row by row
    assert (bank(rows, adapters=apart).logits[0] - expected[0]).abs().max() < 1e-5
    assert (bank(rows, adapters=["dora", *[None] * 10]).logits[0] - expected[0]).abs().max() < 1e-5


def test_a_model_whose_adapters_are_gone_is_itself_to_the_bit(folders):
    model = encoder().eval()
    before, plain = {k: v.clone() for k, v in model.state_dict().items()}, model(**rows).logits
    trained = [p.requires_grad for p in model.parameters()]
    _, bank = model, variants.Bank(model)
    bank.load("a", folders(torch.float32, "lora"))
    bank.load("b", folders(torch.float32, "dora"))
    bank.use("b")
    with pytest.raises(ValueError, match="holds a bank of adapters: remove them first"):
        model.save_pretrained("nowhere")
    bank.remove("b")
    assert bank.active is None and bank.names == ["a"] and torch.equal(model(**rows).logits, plain)
    bank.use("a")
    assert not torch.equal(model(**rows).logits, plain)
    bank.remove("a")
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert [p.requires_grad for p in model.parameters()] == trained and torch.equal(model(**rows).logits, plain)
    assert not model._forward_pre_hooks and "save_pretrained" not in vars(model)
    variants.create("lora", rank=2, alpha=2).attach(model).detach()  # free for another adapter


def test_what_cannot_stand_in_a_bank_is_refused_and_leaves_it_as_it_was(folders, tmp_path):
    model, bank = filled_bank(folders, torch.float32, ["lora"])
    bank.use("lora")
    expected = model(**rows).logits
    full = variants.create("full").attach(encoder())
    variants.save_pretrained(full, tmp_path / "full")
    with pytest.raises(ValueError, match="changes the model's own tensors"):
        bank.load("full", tmp_path / "full")
    with pytest.raises(ValueError, match="is no folder"):
        bank.load("other", tmp_path / "missing")
    with pytest.raises(ValueError, match="loaded already"):
        bank.load("lora", folders(torch.float32, "dora"))
    with pytest.raises(ValueError, match='did you mean "lora"'):
        bank.use("lroa")
    with pytest.raises(ValueError, match='no adapter "x"'):
        bank(rows, adapters=["x"] * len(OWNERS))
    with pytest.raises(ValueError, match="2 names, and the batch 11 rows"):
        bank(rows, adapters=["lora", None])
    with pytest.raises(ValueError, match="give a list"):
        bank(rows, adapters="lora")
    with pytest.raises(ValueError, match="has an adapter already"):
        variants.Bank(model)
    assert bank.names == ["lora"] and torch.equal(model(**rows).logits, expected)


def test_an_input_that_is_not_rows_is_refused_where_rows_are_mixed(tmp_path):
    model = encoder().eval()
    adapter = variants.create("lora", rank=2, alpha=3).attach(model, ["position_embeddings", "query"])
    fill(adapter)
    variants.save_pretrained(adapter, tmp_path)
    adapter.detach()
    bank = variants.Bank(model)
    bank.load("a", tmp_path)
    with pytest.raises(ValueError, match=r"position_embeddings got an input of shape \(1, .*cannot be told apart"):
        bank(rows, adapters=["a", *[None] * 10])
    torch.testing.assert_close(bank(rows, adapters=["a"] * 11).logits, alone(encoder().eval(), tmp_path))


@pytest.mark.parametrize("name", ["gpt2", pytest.param("t5", marks=pytest.mark.slow)])
@torch.no_grad()
def test_mixed_rows_generate_what_each_adapter_alone_generates(name, tmp_path):
    model = language_models.made(name)
    methods = {"a": ("lora", {"rank": 3, "alpha": 40.0}), "b": ("dora", {"rank": 2, "alpha": 20.0})}
    for seed, (key, (method, settings)) in enumerate(methods.items()):
        adapter = variants.create(method, **settings).attach(model, "all-linear", head=[])
        fill(adapter, 0.2, seed)
        variants.save_pretrained(adapter, tmp_path / key)
        adapter.detach()
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 67, (5, 6), generator=random)
    mask = torch.ones_like(ids)
    ids[1, :2], mask[1, :2] = 0, 0
    inputs, owners = {"input_ids": ids, "attention_mask": mask}, ["b", "a", None, "b", "a"]
    ways = [{}, {"num_beams": 3, "num_return_sequences": 2}]
    always = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = {}
    for key in (None, "a", "b"):
        adapter = variants.load_pretrained(model, tmp_path / key) if key else None
        expected[key] = [model.generate(**inputs, **always, **way) for way in ways]
        if adapter:
            adapter.detach()
    bank = variants.Bank(model)
    for key in methods:
        bank.load(key, tmp_path / key)
    for number, way in enumerate(ways):
        times = way.get("num_return_sequences", 1)
        made = bank.generate(inputs, adapters=owners, **always, **way)
        for row, owner in enumerate(owners):
            own = slice(row * times, (row + 1) * times)
            assert torch.equal(made[own], expected[owner][number][own])
    assert not torch.equal(expected["a"][0], expected["b"][0])
    turned = bank.generate(inputs, adapters=owners[::-1], **always)  # nothing is left of the owners before
    for row, owner in enumerate(owners[::-1]):
        assert torch.equal(turned[row], expected[owner][0][row])


def test_the_rows_of_beams_stand_behind_each_other():
    owners = Owners()
    owners.mix(["a", "b", None, "a"])
    owners.total = 8
    groups = owners.groups("site", torch.zeros(8, 3))
    assert groups["a"].tolist() == [0, 1, 6, 7] and groups["b"] == slice(2, 4) and set(groups) == {"a", "b"}
    order, counts, places = owners.order(8, torch.device("cpu"))
    assert [order[place] for place in places] == ["a", "a", "b", "b", None, None, "a", "a"] and counts == [4, 2, 2]


def test_calls_from_several_threads_do_not_mix(folders):
    model, bank = filled_bank(folders, torch.float32, ["lora", "dora"])
    names, results = ["lora", "dora", None, "lora"], {}

    def ask(number):
        with torch.no_grad():
            results[number] = bank(rows, adapters=[names[number]] * 11).logits

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, name in enumerate(names):
        bank.use(name)
        assert torch.equal(results[number], model(**rows).logits)


def test_an_adapter_of_pefts_stands_beside_ours(folders, tmp_path):
    import peft

    model = encoder().eval()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["key"],
        use_rslora=True,
        rank_pattern={"1.attention.self.key": 2},
        task_type="SEQ_CLS",
    )
    wrapped = peft.get_peft_model(model, config).eval()
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.2)
    expected = wrapped(**rows).logits
    wrapped.save_pretrained(tmp_path)
    _, bank = filled_bank(folders, torch.float64, ["dora"])
    bank.load("theirs", tmp_path)
    logits = bank(rows, adapters=["theirs", *["dora"] * 10]).logits
    torch.testing.assert_close(logits[0], expected[0], rtol=0, atol=1e-9)


def test_the_server_of_the_page_answers_each_row_with_its_adapter(tmp_path, monkeypatch):
    pytest.importorskip("fastapi", reason="fastapi is not installed")
    uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    base = language_models.saved("gpt2", tmp_path / "base")
    model = language_models.made("gpt2")
    for seed, name in enumerate(("a", "b")):
        adapter = variants.create("lora", rank=2, alpha=40.0).attach(model, "all-linear", head=[])
        fill(adapter, 0.2, seed)
        variants.save_pretrained(adapter, tmp_path / name)
        adapter.detach()
    page = Path(variants.__file__).with_name("bank").joinpath("bank.md").read_text(encoding="utf-8")
    script = next(block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "FastAPI" in block)
    assert len([line for line in script.splitlines() if line.strip()]) <= 40
    monkeypatch.setattr("sys.argv", ["serve.py", base, f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}"])
    served: dict = {"__name__": "served"}
    exec(script.replace("max_new_tokens=64", "max_new_tokens=6"), served)
    server = uvicorn.Server(uvicorn.Config(served["app"], port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()

    def post(asked):
        address = server.servers[0].sockets[0].getsockname()
        content = json.dumps(asked).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{address[1]}/", data=content, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["detail"]

    try:
        deadline = time.monotonic() + 60
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        prompts = ["a b", "c d e f g", "b a a"]
        mixed = post({"prompts": prompts, "adapters": ["a", None, "b"]})["answers"]
        alone = {name: post({"prompts": prompts, "adapters": [name] * 3})["answers"] for name in ("a", None, "b")}
        code, error = post({"prompts": prompts, "adapters": ["a", "x", "b"]})
        malformed, _ = post({"prompts": prompts})
    finally:
        server.should_exit = True
        thread.join()
    assert mixed == [alone["a"][0], alone[None][1], alone["b"][2]]
    assert len({str(answers) for answers in alone.values()}) == 3
    assert code == 400 and error.startswith('no adapter "x" in this bank') and malformed == 422


def test_the_bench_measures_mixed_rows_that_equal_pefts(monkeypatch):
    size = mixed.Size(adapters=3, rows_each=2, tokens=(5,), hidden=32, layers=1, heads=4, rank=2, rounds=1)
    lora, dora = mixed.rows(size)
    assert mixed.head(size).startswith("3 adapters x 2 rows")
    assert re.search(r"mixed / one \d+\.\d\d .* PEFT / mixed \d", mixed.line(lora))
    seconds, (low, high) = lora["seconds"], lora["peft/mixed_spread"]
    assert low == lora["peft/mixed"] == pytest.approx(seconds["peft"] / seconds["mixed"]) == high  # of one round
    assert mixed.line(dora).startswith("dora") and "peft" not in mixed.line(dora)
    monkeypatch.setattr(variants.Bank, "mixed", lambda bank, owners: contextlib.nullcontext())  # mixes nothing
    with pytest.raises(RuntimeError, match="mixed rows differ from PEFT's"):
        list(mixed.rows(size))


# -- combining -----------------------------------------------------------------------------------------------------------


def weights_with(dtype, folder):
    """Every weight of the tiny model with that adapter merged into it."""
    model = encoder(dtype).eval()
    adapter = variants.load_pretrained(model, folder)
    adapter.merge()
    return {name.replace(".base.", "."): p.detach().clone() for name, p in model.named_parameters() if ".site." not in name}


HOWS = ["linear", "concatenate", "svd", "ties", "dare"]
FEW = [(kind, HOWS[number % len(HOWS)]) for number, kind in enumerate(KINDS) if kind != "wide"]
REST = [pytest.param(kind, how, marks=pytest.mark.slow) for kind in KINDS for how in HOWS if (kind, how) not in FEW]


@pytest.mark.parametrize(("kind", "how"), [*FEW, *REST])
def test_once_a_and_none_of_another_is_a(folders, tmp_path, kind, how):
    _, bank = filled_bank(folders, torch.float64, [kind, "lora" if kind != "lora" else "adalora"])
    first, other = bank.names
    made = bank.combine({other: 0, first: 1}, how=how)
    made.save(tmp_path / "made")
    assert made.error < 1e-12
    torch.testing.assert_close(
        alone(encoder(torch.float64).eval(), tmp_path / "made"),
        alone(encoder(torch.float64).eval(), folders(torch.float64, kind)),
        rtol=0,
        atol=1e-9,
    )


PAIRS = [("lora", "adalora"), ("lora", "dora"), ("dora", "adalora+dora"), ("rooted", "lora")]
SUMS = [(pair, how) for pair, how in zip(PAIRS, ["linear", "concatenate", "linear", "concatenate"], strict=True)]
OTHERS = [(pair, how) for pair in PAIRS for how in ("linear", "concatenate") if (pair, how) not in SUMS]


@pytest.mark.parametrize(("pair", "how"), [*SUMS, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)])
def test_an_exact_sum_is_the_sum_of_the_merged_changes(folders, tmp_path, pair, how):
    _, bank = filled_bank(folders, torch.float64, pair)
    made = bank.combine({pair[0]: 0.7, pair[1]: -0.4}, how=how)
    made.save(tmp_path / "made")
    plain = {name: p.detach() for name, p in encoder(torch.float64).named_parameters()}
    a, b, both = (weights_with(torch.float64, f) for f in (*(folders(torch.float64, n) for n in pair), tmp_path / "made"))
    for name, weight in plain.items():
        torch.testing.assert_close(both[name], weight + 0.7 * (a[name] - weight) - 0.4 * (b[name] - weight), rtol=0, atol=1e-9)
    assert made.error < 1e-9 and sum(not torch.equal(both[n], plain[n]) for n in plain) > 8


def test_a_linear_sum_takes_the_least_rank_and_a_concatenation_all(folders):
    _, bank = filled_bank(folders, torch.float64, ["lora"])
    bank.load("again", folders(torch.float64, "lora"))
    least, most = (bank.combine({"lora": 0.5, "again": 0.25}, how=how).ranks for how in ("linear", "concatenate"))
    assert all(most[name] == 2 * least[name] for name in least) and set(least.values()) == {2, 3}


def test_a_file_of_a_sum_has_scale_one_at_every_site_for_readers_without_patterns(folders, tmp_path):
    _, bank = filled_bank(folders, torch.float32, ["lora", "rooted"])
    bank.combine({"lora": 0.7, "rooted": 0.3}, how="concatenate").save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] and not config["use_rslora"]
    assert config["rank_pattern"] == config["alpha_pattern"] != {}


def test_a_cut_sum_says_how_much_it_lacks(folders, tmp_path):
    _, bank = filled_bank(folders, torch.float64, ["lora", "adalora"])
    made = bank.combine({"lora": 0.7, "adalora": 0.3}, how="svd", rank=2)
    with pytest.warns(UserWarning, match="differs from the change that was asked for"):
        made.save(tmp_path)
    plain = {name: p.detach() for name, p in encoder(torch.float64).named_parameters()}
    a, b, both = (weights_with(torch.float64, f) for f in (*(folders(torch.float64, n) for n in ("lora", "adalora")), tmp_path))
    for name, rank in made.ranks.items():
        key = f"{name}.weight"
        asked = 0.7 * (a[key] - plain[key]) + 0.3 * (b[key] - plain[key])
        tail = torch.linalg.svdvals(asked)
        assert rank == 2 and made.errors[name] == pytest.approx((tail[2:].norm() / tail.norm()).item(), rel=1e-9)
        assert (both[key] - plain[key] - asked).norm() / asked.norm() == pytest.approx(made.errors[name], rel=1e-6)
    assert 0.01 < made.error < 0.9


def test_a_row_whose_gains_cancel_counts_in_the_error():
    base = nn.Linear(3, 2, bias=False).double()
    A, B = torch.randn(1, 3).double(), torch.randn(2, 1).double()
    gain = torch.tensor([2.0, 3.0]).double()
    updates, weights = [Update(A, B, gain), Update(3 * A, B)], [-1.0, 1.0]  # the first row's diagonal is 1 - (2 - 1) = 0
    total = with_direction(weighted_sum(updates, weights))
    wanted = sum(w * u.dense(base) for u, w in zip(updates, weights, strict=True))
    torch.testing.assert_close(total.dense(base)[1], wanted[1])
    torch.testing.assert_close(total.dense(base)[0], -weight_of(base)[0])
    assert (total.dense(base) - wanted)[0].norm() > 0.01


def slow_ties(vectors, weights, density):
    """Yadav et al., algorithm 1, entry by entry."""
    n, trimmed = len(vectors[0]), []
    for vector in vectors:
        order = sorted(range(n), key=lambda i: -abs(vector[i]))
        kept = set(order[: int(density * n)])
        trimmed.append([vector[i] if i in kept else 0.0 for i in range(n)])
    merged = []
    for i in range(n):
        total = sum(t[i] for t in trimmed)
        agreeing = [w * t[i] for t, w in zip(trimmed, weights, strict=True) if t[i] * total > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return merged


def test_ties_equals_the_papers_algorithm_over_all_weights_together(folders, tmp_path):
    pair, weights = ("lora", "adalora"), [0.8, 0.5]
    _, bank = filled_bank(folders, torch.float64, pair)
    made = bank.combine(dict(zip(pair, weights, strict=True)), how="ties", density=0.3, rank=48)  # full rank: nothing is cut
    made.save(tmp_path)
    assert made.error < 1e-9
    plain = {name: p.detach() for name, p in encoder(torch.float64).named_parameters()}
    a, b, both = (weights_with(torch.float64, f) for f in (*(folders(torch.float64, n) for n in pair), tmp_path))
    keys = [f"{name}.weight" for name in made.ranks]
    vectors = [torch.cat([(merged[k] - plain[k]).flatten() for k in keys]).tolist() for merged in (a, b)]
    found = torch.cat([(both[k] - plain[k]).flatten() for k in keys])
    torch.testing.assert_close(found, torch.tensor(slow_ties(vectors, weights, 0.3)).double(), rtol=0, atol=1e-7)
    assert torch.count_nonzero(found.abs() > 1e-9) < 0.6 * len(found)


def test_ties_agrees_with_pefts_on_one_dense_change():
    from peft.utils.merge_utils import ties

    random = torch.Generator().manual_seed(0)
    changes, weights = [torch.randn(7, 5, generator=random) for _ in range(3)], [0.7, 0.5, -0.3]
    thresholds = [merging.trim_threshold(change.abs().flatten(), 0.4) for change in changes]
    expected = ties(changes, torch.tensor(weights), 0.4)
    torch.testing.assert_close(merging.ties(changes, weights, thresholds), expected)


def test_dare_drops_a_share_and_rescales_the_rest(folders, tmp_path):
    change = torch.arange(1, 40001, dtype=torch.float64).reshape(200, 200)
    dropped = merging.dare(change, 0.3, 5, "a", "site")
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], (change / 0.3)[kept])
    assert abs(kept.double().mean() - 0.3) < 4 * (0.3 * 0.7 / 40000) ** 0.5
    assert torch.equal(dropped, merging.dare(change, 0.3, 5, "a", "site"))
    assert not any(torch.equal(dropped, merging.dare(change, 0.3, *key)) for key in ((6, "a", "site"), (5, "b", "site")))
    _, bank = filled_bank(folders, torch.float64, ["lora", "adalora"])
    exact = bank.combine({"lora": 0.7, "adalora": 0.3}, how="dare", density=1.0, rank=48)  # nothing is dropped: the plain sum
    sums = bank.combine({"lora": 0.7, "adalora": 0.3})
    for name, update in exact._combined.updates.items():
        other = sums._combined.updates[name]
        torch.testing.assert_close(update.B @ update.A, other.B @ other.A, rtol=0, atol=1e-6)


def test_arguments_of_combine_that_make_no_sense_are_refused(folders):
    _, bank = filled_bank(folders, torch.float32, ["lora", "dora", "rooted"])
    for fault, weights, arguments in (
        ("no adapter", {"x": 1}, {}),
        ("is nan: give a finite number", {"lora": float("nan")}, {}),
        ("whose weight is not 0", {"lora": 0}, {}),
        ("whose weight is not 0", {}, {}),
        ("is none of linear, concatenate", {"lora": 1}, {"how": "cat"}),
        ('rank = 3 has no effect on how = "linear"', {"lora": 1}, {"rank": 3}),
        ("at least 1", {"lora": 1}, {"how": "svd", "rank": 0}),
        ('density = 0.5 has no effect on how = "svd"', {"lora": 1}, {"how": "svd", "density": 0.5}),
        ("above 0 and at most 1", {"lora": 1}, {"how": "dare", "density": 0}),
        ("no file holds both", {"dora": 1, "rooted": 1}, {}),
    ):
        with pytest.raises(ValueError, match=fault):
            bank.combine(weights, **arguments)


def test_heads_are_summed_from_the_models_own(folders, tmp_path):
    _, bank = filled_bank(folders, torch.float64, ["lora", "head"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bank.combine({"lora": 0.7, "head": 0.6}, how="linear").save(tmp_path)
    plain = dict(encoder(torch.float64).named_parameters())
    a, b, both = (weights_with(torch.float64, f) for f in (*(folders(torch.float64, n) for n in ("lora", "head")), tmp_path))
    for key in ("classifier.weight", "classifier.bias"):
        expected = plain[key] + 0.7 * (a[key] - plain[key]) + 0.6 * (b[key] - plain[key])
        torch.testing.assert_close(both[key], expected, rtol=0, atol=1e-12)
