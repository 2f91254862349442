"""EVA against the SVD written out, and against PEFT's release where that is right."""

import copy

import pytest
import rankwise.variants.eva as eva_module
import torch
from peft import LoraConfig
from peft.tuners.lora.config import EvaConfig
from peft.tuners.lora.eva import get_eva_state_dict
from peft.utils.incremental_pca import IncrementalPCA
from rankwise import variants
from rankwise.variants.eva import Exact, Incremental, top_directions
from torch import Tensor, nn

from tests.tiny import packed_batch, tiny

SEEDS = [5, 3, 8]
# Sites whose inputs are all different: PEFT breaks ties of equal inputs in an order of its own.
TARGETS = ["query", "attention.output.dense", "intermediate.dense", "layer.1.output.dense"]
ROWS = {"rows": 16, "length": 9}


def batches(seeds: list[int], count: int, labels: bool = False) -> list[dict[str, Tensor]]:
    found = [packed_batch(seeds, 50 + i, **ROWS) for i in range(count)]
    for one in found:
        for k, seed in enumerate(seeds):  # padding of each member's own
            one["attention_mask"][ROWS["rows"] * k + seed, seed:] = 0
    return found if labels else [{k: v for k, v in one.items() if k != "labels"} for one in found]


def eva(seeds: list[int], count: int = 4, model: nn.Module | None = None, **settings) -> variants.Adapter:
    values = {"rank": 3, "alpha": 7.0} | settings
    adapter = variants.create("eva", members=len(seeds), seeds=seeds, **values)
    return adapter.attach(model or tiny("bert"), TARGETS, calibration=variants.Calibration(batches(seeds, count)))


def inputs(seed: int, count: int, masked: bool = True) -> dict[str, list[Tensor]]:
    """The rows (N, I) of each batch that every site of a bare model sees, in evaluation mode, padding left out."""
    model = tiny("bert").eval()
    found: dict[str, list[Tensor]] = {}
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith(tuple(TARGETS))]
    current: dict[str, Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, n=name: current.update({n: args[0].detach()}))
    for one in batches([seed], count):
        with torch.no_grad():
            model(**one)
        for name, x in current.items():
            rows = [x[i, t] for i in range(len(x)) for t in range(x.shape[1]) if one["attention_mask"][i, t] or not masked]
            found.setdefault(name, []).append(torch.stack(rows))
    return found


def ratios(rows: Tensor, kind: str, count: int) -> tuple[Tensor, Tensor]:
    """xi and the directions of all rows at once, by one dense SVD."""
    centred = rows - rows.mean(0)
    _, sigma, V = torch.linalg.svd(centred, full_matrices=False)
    whole = (sigma**2).sum() if kind == "release" else (len(rows) - 1) * sigma[:count].sum()
    return (sigma**2 / whole)[:count], V[:count]


def placed(xi: dict[str, Tensor], budget: int) -> dict[str, int]:
    """One rank after the other to the greatest xi left."""
    left = sorted(((-x.item(), i, name) for i, (name, values) in enumerate(xi.items()) for x in values))
    return {name: sum(other == name for _, _, other in left[:budget]) for name in xi}


@pytest.mark.parametrize("kind", ["release", "paper"])
def test_exact_eva_is_the_svd_of_all_inputs_for_every_member(kind):
    ranks, rho = [3, 2, 5], 1.7
    adapter = eva(SEEDS, decomposition="exact", ratio=kind, rank=ranks, alpha=[7.0, 3.0, 11.0], rho=rho)
    for k, (seed, rank) in enumerate(zip(SEEDS, ranks, strict=True)):
        found = {name: ratios(torch.cat(rows), kind, round(rho * rank)) for name, rows in inputs(seed, 4).items()}
        expected = placed({name: xi for name, (xi, _) in found.items()}, rank * len(found))
        assert {name: r[k].item() for name, r in adapter.ranks().items()} == expected
        assert len(set(expected.values())) > 1 and max(expected.values()) <= round(rho * rank)
        for name, (_, V) in found.items():
            site, r = adapter.site(name), expected[name]
            cosines = nn.functional.cosine_similarity(site.A[k, :r], V[:r]).abs()
            torch.testing.assert_close(cosines, torch.ones(r, dtype=cosines.dtype), rtol=0, atol=1e-9)
            assert (site.A[k, r:] == 0).all() and (site.B[k] == 0).all()
            assert site.scale[k].item() == pytest.approx([7.0, 3.0, 11.0][k] / rank)


def test_rho_of_one_is_uniform():
    assert {r.item() for r in eva([5], rho=1.0).ranks().values()} == {3}


def test_the_incremental_svd_is_exact_where_nothing_is_cut_off():
    X = torch.randn(60, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9) + 3
    whole, parts = (kind(8, 0.99, lambda: torch.Generator().manual_seed(1)) for kind in (Exact, Incremental))
    for rows in X.split([17, 5, 22, 16]):  # 5 are fewer than the directions, and wait
        whole.update(rows)
        parts.update(rows)
    whole.finish("here")
    parts.finish("here")
    xi, V = ratios(X, "release", 8)
    for one in (whole, parts):
        torch.testing.assert_close(one.worth("release"), xi, rtol=1e-9, atol=0)
        torch.testing.assert_close((one.directions * V).sum(1).abs(), torch.ones(8, dtype=V.dtype), rtol=0, atol=1e-9)
    assert parts.seen == whole.seen == 60


def test_subspace_iteration_finds_the_top_directions_of_a_wide_matrix():
    random = torch.Generator().manual_seed(0)
    X = torch.randn(300, 40, generator=random, dtype=torch.float64) @ torch.diag(0.7 ** torch.arange(40).double())
    V, values = top_directions(X, 4, torch.Generator().manual_seed(1))
    _, expected, vectors = torch.linalg.svd(X, full_matrices=False)
    torch.testing.assert_close(values, expected[:4], rtol=1e-8, atol=0)
    torch.testing.assert_close((V * vectors[:4]).sum(1).abs(), torch.ones(4, dtype=V.dtype), rtol=0, atol=1e-6)
    assert (V.gather(1, V.abs().argmax(1, keepdim=True)) > 0).all()


def test_a_site_that_settled_is_left_alone_and_all_settled_ends_the_pass():
    count = []
    adapter = variants.create("eva", rank=2, tau=0.5)
    model = tiny("bert")
    model.register_forward_hook(lambda *_: count.append(1))
    adapter.attach(model, TARGETS, calibration=variants.Calibration(batches([5], 12)))
    assert 2 <= len(count) < 12
    count.clear()
    adapter.detach()
    variants.create("eva", rank=2, tau=1.0).attach(model, TARGETS, calibration=variants.Calibration(batches([5], 5)))
    assert len(count) == 5  # never equal to the last bit


def test_too_few_rows_are_refused():
    few = variants.Calibration([{k: v[:1, :4] for k, v in batches([5], 1)[0].items()}])
    with pytest.raises(ValueError, match=r"the calibration has 4 rows at .*, fewer than the 6 directions"):
        variants.create("eva", rank=3).attach(tiny("bert"), TARGETS, calibration=few)


def test_padding_is_left_out_and_tokens_without_a_label_where_asked():
    plain = eva([5], decomposition="exact")
    padded = [{k: nn.functional.pad(v, (0, 3)) for k, v in one.items()} for one in batches([5], 4)]
    more = variants.create("eva", rank=3, alpha=7.0, seeds=[5], decomposition="exact")
    more.attach(tiny("bert"), TARGETS, calibration=variants.Calibration(padded))
    for (name, a), (_, b) in zip(plain.named_sites(), more.named_sites(), strict=True):
        torch.testing.assert_close(a.A, b.A, rtol=0, atol=1e-9, msg=name)
    labelled = [{**one, "labels": one["input_ids"].where(one["input_ids"] % 3 > 0, -100)} for one in batches([5], 4)]
    less = variants.create("eva", rank=3, alpha=7.0, seeds=[5], decomposition="exact", tokens="labelled")
    less.attach(tiny("bert"), TARGETS, calibration=variants.Calibration(labelled))
    name = "bert.encoder.layer.0.intermediate.dense"
    rows = []
    for X, one in zip(inputs(5, 4)[name], labelled, strict=True):
        rows.append(X[one["labels"][one["attention_mask"].bool()] != -100])
    _, V = ratios(torch.cat(rows), "release", 6)
    r = less.ranks()[name].item()
    cosines = nn.functional.cosine_similarity(less.site(name).A[0], V[:r]).abs()
    torch.testing.assert_close(cosines, torch.ones(r, dtype=V.dtype), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="needs labels of each token"):
        variants.create("eva", rank=3, tokens="labelled").attach(
            tiny("bert"), TARGETS, calibration=variants.Calibration(batches([5], 2, labels=True))
        )


@pytest.mark.parametrize("rho, tau", [(2.0, 0.9), (1.7, 0.99), (1.0, 0.95)])
def test_ranks_and_starts_are_pefts(monkeypatch, rho, tau):
    """peft 0.21.2, in fp32, over batches that are enough for it to settle in the first pass; both without their shortcut."""
    monkeypatch.setattr(IncrementalPCA, "_svd_fn_lowrank", lambda self, X: torch.linalg.svd(X, full_matrices=False))
    monkeypatch.setattr(eva_module, "ROUNDS", 100)
    model = tiny("bert", torch.float32).eval()
    data = batches([5], 40)
    config = LoraConfig(r=3, target_modules=TARGETS, init_lora_weights="eva", eva_config=EvaConfig(rho=rho, tau=tau))
    theirs = get_eva_state_dict(copy.deepcopy(model), data, config, show_progress_bar=False)
    adapter = variants.create("eva", rank=3, alpha=7.0, rho=rho, tau=tau)
    adapter.attach(model, TARGETS, calibration=variants.Calibration(data))
    assert {name: r.item() for name, r in adapter.ranks().items()} == {name: len(A) for name, A in theirs.items()}
    assert rho == 1 or len({len(A) for A in theirs.values()}) > 1
    for name, A in theirs.items():
        torch.testing.assert_close(adapter.site(name).A[0], A.float(), rtol=0, atol=2e-3)


def test_equal_inputs_tie_and_the_first_site_gets_the_greater_rank():
    adapter = variants.create("eva", rank=2, alpha=7.0, total_rank=7, seeds=[5])
    adapter.attach(
        tiny("bert"),
        [f"layer.0.attention.self.{n}" for n in ("query", "key", "value")],
        calibration=variants.Calibration(batches([5], 4)),
    )
    assert [r.item() for r in adapter.ranks().values()] == [3, 2, 2]


def test_packed_is_alone_though_members_look_for_different_numbers_of_directions():
    ranks = [3, 2, 5]
    packed = eva(SEEDS, 6, rank=ranks, alpha=[7.0, 3.0, 11.0])
    for k, seed in enumerate(SEEDS):
        single = eva([seed], 6, rank=ranks[k], alpha=[7.0, 3.0, 11.0][k])
        for name, site in single.named_sites():
            r = single.ranks()[name].item()
            assert packed.ranks()[name][k].item() == r
            torch.testing.assert_close(packed.site(name).A[k, :r], site.A[0], rtol=0, atol=1e-9)
