"""The ranks of runs and of PEFT's adapter folders."""

import csv
import json

import numpy as np
import pytest
from rankwise.experiments import archive
from rankwise.reports import figures, page, ranks, results, tables
from rankwise.reports.ranks import listing
from safetensors.numpy import save_file

from tests.synthetic_runs import BERT_SITES, write_anatomy, write_json, write_run


@pytest.mark.parametrize(
    ("site", "layer", "module"),
    [
        ("bert.encoder.layer.11.attention.self.query", 11, "attention.self.query"),
        ("deberta.encoder.layer.0.attention.output.dense", 0, "attention.output.dense"),
        ("transformer.h.3.attn.c_attn", 3, "attn.c_attn"),
        ("model.layers.31.mlp.down_proj", 31, "mlp.down_proj"),
        ("albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query", 0, "albert_layers.0.attention.query"),
        ("bert.pooler.dense", None, "bert.pooler.dense"),
        ("albert.encoder.embedding_hidden_mapping_in", None, "albert.encoder.embedding_hidden_mapping_in"),
        ("0", None, "0"),
    ],
)
def test_the_layer_is_the_first_number_of_a_path(site, layer, module):
    assert ranks.split_site(site)[1:] == (layer, module)


def test_labels_are_the_shortest_that_tell_the_modules_apart():
    labels = ranks.module_labels([*BERT_SITES, "bert.pooler.dense"])
    assert {labels[site] for site in BERT_SITES} == {
        "query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense",
    }  # fmt: skip
    assert labels["bert.pooler.dense"] == "pooler.dense"
    gpt2 = [f"transformer.h.0.{kind}" for kind in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert list(ranks.module_labels(gpt2).values()) == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]


def test_encoder_and_decoder_are_told_apart():
    labels = ranks.module_labels(["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q"])
    assert list(labels.values()) == ["encoder: q", "decoder: q"]


def test_sites_are_ordered_by_layer_as_a_number_and_others_come_last():
    sites = ["pooler.dense", "h.10.a", "h.2.b", "h.2.a"]
    assert ranks.site_order(sites) == ["h.2.a", "h.2.b", "h.10.a", "pooler.dense"]  # a came before b


def test_a_run_shows_active_and_nominal(tmp_path):
    found = ranks.read(write_run(tmp_path, method="adalora"))
    assert (found.kind, found.method, found.active, found.nominal) == ("run", "adalora", 288, 432)
    assert found.sites[0].scale == 2.0
    assert found.as_dict()["sites"][0]["site"] == BERT_SITES[0]


def test_an_unfinished_run_shows_the_ranks_so_far_and_says_so(tmp_path):
    path = write_run(tmp_path, method="adalora", finished=False)
    lines = (path / "ranks.jsonl").read_text().splitlines()[:3]
    (path / "ranks.jsonl").write_text("\n".join(lines) + "\n")
    assert ranks.read(path).active == 432
    assert "Not finished: step 18." in tables.rank_table(path).caption


def test_a_run_without_ranks_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match=r"full \(completed\) has no ranks"):
        ranks.read(write_run(tmp_path, method="full"))


def adapter(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter_config.json", config)
    save_file({f"base_model.model.{k}": np.zeros(shape, np.float32) for k, shape in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    return folder


def test_lora_rank_alpha_and_scale_follow_the_patterns(tmp_path):
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "rank_pattern": {"k": 2, "layers.5.k": 0},
              "alpha_pattern": {r"layers\.0\.q": 6}}  # fmt: skip
    tensors = {"m.layers.0.q.lora_A.weight": (8, 5), "m.layers.0.q.lora_B.weight": (7, 8),
               "m.layers.0.k.lora_A.weight": (2, 5), "m.layers.0.k.lora_B.weight": (7, 2)}  # fmt: skip
    found = {site.site: site for site in ranks.read(adapter(tmp_path, config, tensors)).sites}
    q, k, absent = found["m.layers.0.q"], found["m.layers.0.k"], found["layers.5.k"]
    assert (q.active, q.nominal, q.alpha, q.scale) == (8, 8, 6.0, 0.75)
    assert (k.active, k.nominal, k.alpha, k.scale) == (2, 2, 16.0, 8.0)
    assert (absent.active, absent.scale) == (0, None)


def test_rslora_divides_by_the_root(tmp_path):
    tensors = {"l.lora_A.weight": (4, 5), "l.lora_B.weight": (7, 4)}
    found = ranks.read(adapter(tmp_path, {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": True}, tensors))
    assert found.sites[0].scale == 3.0


def test_adalora_counts_rows_and_knows_modules_at_rank_0(tmp_path):
    kept = {"h.0.a.lora_E": [True, False, True], "h.1.a.lora_E": [False, False, False], "h.2.a.lora_E": [False] * 3}
    config = {"peft_type": "ADALORA", "r": 8, "init_r": 3, "target_r": 1, "lora_alpha": 24, "rank_pattern": kept}
    tensors = {}
    for name, rank in (("h.0.a", 2), ("h.1.a", 0)):  # h.2.a has no tensors at all
        tensors |= {f"{name}.lora_A": (rank, 5), f"{name}.lora_B": (7, rank), f"{name}.lora_E": (rank, 1)}
    found = ranks.read(adapter(tmp_path, config, tensors))
    assert [(site.site, site.active, site.nominal) for site in found.sites] == [
        ("h.0.a", 2, 3),
        ("h.1.a", 0, 3),
        ("h.2.a", 0, 3),
    ]
    assert found.sites[0].scale == pytest.approx(8.0, rel=1e-5)  # alpha / (init_r + 1e-5), whatever was kept
    assert "2 of them are at rank 0" in tables.rank_table(tmp_path).caption[0]
    assert listing.as_dict(tmp_path)["at_rank_0"] == 2


def test_peft_wrote_it_and_it_is_read(tmp_path):
    """LoRA, DoRA and AdaLoRA folders as PEFT itself writes them."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")

    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"q": torch.nn.Linear(5, 7)}) for _ in range(2)])

        def forward(self, x):
            return self.layers[0]["q"](x) + self.layers[1]["q"](x)

    configs = {
        "lora": peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q"], rank_pattern={"1.q": 2}),
        "dora": peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q"], rank_pattern={"1.q": 2}, use_dora=True),
        "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=8, target_modules=["q"], total_step=10),
    }
    expected = {"lora": [3, 2], "dora": [3, 2], "adalora": [4, 4]}
    for name, config in configs.items():
        peft.get_peft_model(Tiny(), config).save_pretrained(tmp_path / name)
        found = ranks.read(tmp_path / name)
        assert found.method == name
        assert [site.site for site in found.sites] == ["layers.0.q", "layers.1.q"]
        assert [site.active for site in found.sites] == expected[name]


def test_a_pickle_is_refused_with_the_reason(tmp_path):
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA", "r": 8, "lora_alpha": 8})
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=r"is a pickle, which can run code .* safe_serialization=True"):
        ranks.read(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 60, -4])
def test_a_cut_off_weight_file_is_refused(tmp_path, keep):
    folder = adapter(tmp_path, {"peft_type": "LORA", "r": 4, "lora_alpha": 6},
                     {"l.lora_A.weight": (4, 5), "l.lora_B.weight": (7, 4)})  # fmt: skip
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"is not a whole safetensors file .* save the adapter again"):
        ranks.read(folder)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, {}, "peft_type 'PREFIX_TUNING' has no ranks to read"),
        ({"format": "rankwise"}, {}, "full fine-tuning, BitFit and head only have none"),
        ({"peft_type": "LORA", "r": 4, "lora_alpha": 6}, {"head.weight": (2, 3)}, "holds no lora_A"),
        ({"peft_type": "LORA", "r": 4, "lora_alpha": 6}, {"l.lora_A.weight": (4, 5)}, "come in pairs"),
        ({"peft_type": "LORA", "r": 4, "lora_alpha": 6}, {"l.lora_A.weight": (4, 5), "l.lora_B.weight": (7, 3)}, "of one rank"),
        (
            {"peft_type": "LORA", "lora_alpha": 6},
            {"l.lora_A.weight": (4, 5), "l.lora_B.weight": (7, 4)},
            "r is None, not a number",
        ),
    ],
)
def test_a_foreign_adapter_is_refused_with_the_rule(tmp_path, config, tensors, message):
    with pytest.raises(ValueError, match=message) as error:
        ranks.read(adapter(tmp_path, config, tensors))
    assert "\n" not in str(error.value)


def test_stacked_updates_of_experts_are_refused_and_a_plain_parameter_is_read(tmp_path):
    """As PEFT 0.21 writes them: of 4 experts at r = 2; the second parameter of a module stands under `base_layer`."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
    of = "layers.0.mlp.experts"
    for name in (of, f"{of}.base_layer"):
        factors = {f"{name}.lora_A.weight": (8, 5), f"{name}.lora_B.weight": (7, 8)}
        folder = adapter(tmp_path / name, config | {"target_parameters": ["experts.down_proj"]}, factors)
        with pytest.raises(
            ValueError, match=r"layers\.0\.mlp\.experts has factors of 8 rows where r is 2: target_parameters \(experts"
        ):
            ranks.read(folder)
    plain = {"layers.0.q.lora_A.weight": (2, 5), "layers.0.q.lora_B.weight": (7, 2)}
    (site,) = ranks.read(adapter(tmp_path / "plain", config | {"target_parameters": ["q.weight"]}, plain)).sites
    assert (site.site, site.active, site.scale) == ("layers.0.q", 2, 3.0)


def test_full_fine_tuning_is_refused_with_the_reason(tmp_path):
    save_file({"w": np.zeros((2, 3), np.float32)}, tmp_path / "adapter_model.safetensors", {"format": "rankwise"})
    with pytest.raises(ValueError, match="full fine-tuning or BitFit, which have no ranks"):
        ranks.read(tmp_path)
    save_file({"w": np.zeros((2, 3), np.float32)}, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"has no adapter_config\.json; copy"):
        ranks.read(tmp_path)


def test_a_folder_that_is_neither_says_what_it_holds(tmp_path):
    with pytest.raises(ValueError, match=r"neither a run .* nor an adapter folder"):
        ranks.read(tmp_path)
    run = write_run(tmp_path)
    with pytest.raises(ValueError, match=f"it holds runs, give one of them: {run.name}"):
        ranks.read(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        ranks.read(tmp_path / "nowhere")


def test_adalora_with_dora_shows_the_ranks_it_kept_and_not_those_of_the_folded_file(tmp_path):
    import torch
    from rankwise import variants

    from tests.tiny import tiny

    adapter = variants.create("adalora+dora", initial_rank=4, target_rank=1).attach(tiny("bert"))
    with torch.no_grad():
        for place, triplets in enumerate(adapter.triplets()):
            triplets.E.fill_(0.5)
            triplets.kept.zero_()
            triplets.kept[0, : place % 3] = True
            triplets.project()
    variants.save_pretrained(adapter, tmp_path / "adapter")
    found = ranks.read(tmp_path / "adapter")
    assert found.method == "adalora+dora"
    assert {s.site: s.active for s in found.sites} == {n: int(r) for n, r in adapter.ranks().items()}
    assert {s.nominal for s in found.sites} == {4} and 0 in {s.active for s in found.sites}


# -- what the tensors say --------------------------------------------------------------------------------------------------


def healthy(random=None):
    """Two modules of rank 4 with a generic A and B."""
    random = random or np.random.default_rng(0)
    shapes = {f"m.layers.{i}.{kind}.lora_{factor}.weight": shape for i in range(2) for kind in "qk"
              for factor, shape in (("A", (4, 9)), ("B", (7, 4)))}  # fmt: skip
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 6}


def written(folder, tensors, **config):
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter_config.json", CONFIG | config)
    save_file({f"base_model.model.{name}": np.ascontiguousarray(t) for name, t in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    return ranks.read(folder)


def test_an_adapter_s_ranks_are_those_of_its_dense_update(tmp_path):
    tensors = healthy()
    found = written(tmp_path, tensors)
    assert found.faults == ()
    for site in found.sites:
        A, B = (tensors[f"{site.site}.lora_{factor}.weight"].astype(np.float64) for factor in "AB")
        sigma = np.linalg.svd(1.5 * B @ A)[1][:4]
        shares = sigma / sigma.sum()
        assert site.effective_rank == pytest.approx(np.exp(-sum(p * np.log(p) for p in shares)))
        assert site.stable_rank == pytest.approx((sigma**2).sum() / sigma[0] ** 2)
        assert site.energy_rank == next(k for k in range(1, 5) if (sigma[:k] ** 2).sum() >= 0.95 * (sigma**2).sum())
        assert site.singular_values == pytest.approx(tuple(sigma))
        assert (site.parameters, site.share, site.relative_norm) == (64, 0.25, None)


SITE = "m.layers.1.k"


def planted(what):
    """Tensors with one fault, the configuration's changes, and what must be said of it."""
    tensors, config = healthy(), {}
    A, B = tensors[f"{SITE}.lora_A.weight"], tensors[f"{SITE}.lora_B.weight"]
    if what == "NaN":
        A[1, 2] = np.nan
    elif what == "infinity":
        B[3, 0] = np.inf
    elif what == "dead row of A":
        A[[1, 3]] = 0
    elif what == "dead column of B":
        B[:, 2] = 0
    elif what == "zero module":
        B[:] = 0
    elif what == "no rank with both":
        A[:2], B[:, 2:] = 0, 0
    elif what == "dependent":
        A[3] = 2 * A[0] - A[1]
    elif what == "equal columns":
        B[:, 1] = -3 * B[:, 0]
    elif what == "rank_pattern that matches nothing":
        config["rank_pattern"] = {"v_proj": 2}
    elif what == "alpha_pattern that matches nothing":
        config["alpha_pattern"] = {r"layers\.7\.q": 3}
    elif what == "rank_pattern against the tensors":
        config["rank_pattern"] = {"1.k": 2}
    elif what == "r against the tensors":
        tensors[f"{SITE}.lora_A.weight"], tensors[f"{SITE}.lora_B.weight"] = A[:3], B[:, :3]
    elif what == "NaN in the head":
        tensors["classifier.weight"] = np.array([[1.0, np.nan]], np.float32)
    return tensors, config


FAULTS = {
    "NaN": f"{SITE}: A holds 1 of 36 numbers that are NaN",
    "infinity": f"{SITE}: B holds 1 of 28 numbers that are infinite",
    "dead row of A": f"{SITE}: 2 of 4 ranks are dead (row of A zero at 1, 3)",
    "dead column of B": f"{SITE}: 1 of 4 ranks are dead (column of B zero at 2)",
    "zero module": f"{SITE}: dW is zero (B is all zero)",
    "no rank with both": f"{SITE}: dW is zero (no rank has both factors)",
    "dependent": f"{SITE}: the 4 live ranks of A span 3 dimensions up to rounding (f32)",
    "equal columns": f"{SITE}: the 4 live ranks of B span 3 dimensions",
    "rank_pattern that matches nothing": 'rank_pattern = {"v_proj": 2} matches none of the 4 modules',
    "alpha_pattern that matches nothing": "alpha_pattern = ",
    "rank_pattern against the tensors": f'{SITE}: rank_pattern["1.k"] is 2, its tensors have rank 4',
    "r against the tensors": f"{SITE}: r is 4, its tensors have rank 3",
    "NaN in the head": "base_model.model.classifier.weight holds 1 numbers that are not finite",
}


@pytest.mark.parametrize("what", FAULTS)
def test_what_is_wrong_with_a_foreign_adapter_is_named(tmp_path, what):
    tensors, config = planted(what)
    found = written(tmp_path, tensors, **config)
    (fault,) = found.faults
    assert FAULTS[what] in fault
    assert f"Warning: {fault}." in tables.rank_table(tmp_path).caption
    assert found.as_dict()["faults"] == [fault]
    json.dumps(found.as_dict(), allow_nan=False)


def test_rows_that_bfloat16_rounded_apart_are_dependent_and_its_bits_are_read(tmp_path):
    import torch
    from safetensors.torch import save_file as save_torch

    random = torch.Generator().manual_seed(1)
    A, B = torch.randn(4, 64, generator=random), torch.randn(48, 4, generator=random)
    A[2] = 0.7 * A[0]
    write_json(tmp_path / "adapter_config.json", CONFIG)
    tensors = {f"base_model.model.l.0.q.lora_{name}.weight": t.bfloat16() for name, t in (("A", A), ("B", B))}
    save_torch(tensors, tmp_path / "adapter_model.safetensors")
    found = ranks.read(tmp_path)
    (fault,) = found.faults
    assert "the 4 live ranks of A span 3 dimensions up to rounding (bf16)" in fault
    dense = (
        1.5
        * tensors["base_model.model.l.0.q.lora_B.weight"].double()
        @ tensors["base_model.model.l.0.q.lora_A.weight"].double()
    )
    assert found.sites[0].singular_values[0] == pytest.approx(float(torch.linalg.svdvals(dense)[0]))


def test_adalora_s_patterns_are_held_against_its_tensors(tmp_path):
    random = np.random.default_rng(2)
    tensors = {}
    for name, rank in (("h.0.a", 2), ("h.1.a", 2), ("h.2.a", 3)):
        tensors |= {f"{name}.lora_A": random.normal(size=(rank, 5)), f"{name}.lora_B": random.normal(size=(7, rank)),
                    f"{name}.lora_E": random.normal(size=(rank, 1))}  # fmt: skip
    tensors["h.2.a.lora_E"][1] = 0
    pattern = {"h.0.a.lora_E": [True, False, True], "h.1.a.lora_E": [True, True, True], "h.3.a.lora_E": [True, False, False]}
    config = {"peft_type": "ADALORA", "r": 8, "init_r": 3, "target_r": 1, "lora_alpha": 24, "rank_pattern": pattern}
    found = written(tmp_path, tensors, **config, alpha_pattern={"a": 3})
    said = "\n".join(found.faults)
    for words in (
        "h.1.a: rank_pattern keeps 3 triplets, its tensors hold 2",
        "rank_pattern keeps 1 triplets of h.3.a, which the file has no tensors for",
        "h.2.a: rank_pattern does not name it",
        "alpha_pattern has no effect in AdaLoRA",
        "h.2.a: 1 of 3 ranks are dead (E zero at 1)",
    ):
        assert words in said
    assert len(found.faults) == 5
    A, B, E = (tensors[f"h.0.a.lora_{name}"] for name in "ABE")
    sigma = np.linalg.svd(24 / (3 + 1e-5) * B @ (E * A))[1]
    assert found.sites[0].singular_values == pytest.approx(tuple(sigma[:2]))


def test_our_own_and_peft_s_adapters_are_without_fault_once_trained(tmp_path):
    import torch
    from rankwise import variants

    from tests.tiny import tiny

    for name, given in (("lora", {"rank": 3, "alpha": 4, "rank_pattern": {"layer.0.attention.self.query": 5}}),
                        ("adalora", {"initial_rank": 4, "target_rank": 2})):  # fmt: skip
        adapter = variants.create(name, **given).attach(tiny("bert"))
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=random)
            if name == "adalora":
                for place, site in enumerate(adapter.triplets()):
                    site.kept[0, place % 3 + 1 :] = False
                    site.project()
        variants.save_pretrained(adapter, tmp_path / name)
        found = ranks.read(tmp_path / name)
        assert found.faults == () and found.active == sum(int(rank) for rank in adapter.ranks().values())
        for site in found.sites:
            sigma = torch.linalg.svdvals(adapter.delta(site.site)[0].detach().double())
            length = len(site.singular_values)
            assert length == site.active
            assert site.singular_values == pytest.approx(sigma[:length].tolist(), rel=1e-4)


# -- runs and studies ------------------------------------------------------------------------------------------------------


@pytest.fixture
def examined(tmp_path):
    for method in ("full", "lora", "adalora"):
        for seed in (0, 1):
            write_anatomy(write_run(tmp_path / "study", method=method, seed=seed), knocked=method == "adalora")
    return tmp_path / "study"


def test_a_run_shows_what_became_of_its_weights(examined):
    folder = next(path for path in examined.iterdir() if '"adalora"' in (path / "config.json").read_text())
    found = ranks.read(folder)
    stored = json.loads((folder / "sites.json").read_text())["sites"]
    for site in found.sites:
        for key in ("parameters", "effective_rank", "stable_rank", "energy_rank", "relative_norm", "importance", "intruders"):
            assert getattr(site, key) == stored[site.site][key]
        assert site.loss_increase == pytest.approx(site.importance, abs=1e-12)
    assert found.evaluated == "128 rows of the validation split"
    assert {"effective", "|dW|/|W|", "importance", "loss without"} <= set(tables.rank_table(folder).columns)
    assert [row["step"] for row in found.as_dict()["trajectory"]][-1] == 540
    (folder / "sites.json").write_text('{"schema": 1')
    with pytest.raises(ValueError, match=r"sites\.json is not strict JSON"):
        ranks.read(folder)


def test_the_caption_counts_intruders_as_the_runs_did(examined):
    def caption() -> str:
        return " ".join({table.name: table for table in listing.shown(examined)}["anatomy"].caption)

    assert "top 10 left singular vectors of W + dW those whose |cosine| with every one of W is below 0.5 (Shutt" in caption()
    folder = next(path for path in examined.iterdir() if path.is_dir())
    stored = json.loads((folder / "sites.json").read_text())
    write_json(folder / "sites.json", {**stored, "intruders": {"looked_at": 7, "cosine": 0.35}})
    assert "the top 7 left" in caption() and "below 0.35" in caption() and "; or of the top" in caption()
    write_json(folder / "sites.json", {**stored, "intruders": {"looked_at": 7}})
    with pytest.raises(ValueError, match=r"sites\.json.*cosine"):
        caption()


def test_full_fine_tuning_with_its_spectrum_is_shown(examined):
    folder = next(path for path in examined.iterdir() if '"full"' in (path / "config.json").read_text())
    found = ranks.read(folder)
    assert found.method == "full" and found.sites[0].nominal == 384 and len(found.sites[0].singular_values) == 16


def test_a_study_is_shown_with_its_tables_and_every_run(examined, tmp_path):
    made = {table.name: table for table in listing.shown(examined)}
    assert list(made) == ["ranks", "anatomy", "stability", "knock-out"]
    rows = {row[0]: row for row in made["anatomy"].rows}
    assert rows["full"][:5] == ("full", 2, 36, "13,824", "13,824") and rows["adalora"][3:5] == ("288", "432")
    assert rows["lora"][5] == "6.40" and rows["lora"][10] == "2.00"
    assert [row[0] for row in made["stability"].rows] == ["adalora"]
    ((label, n, *_, harmless, rho, _, _),) = made["knock-out"].rows
    assert (label, n, rho.mean, rho.n) == ("adalora", 2, pytest.approx(1.0), 2) and harmless.endswith(" %")
    whole = listing.as_dict(examined)
    (part,) = whole["parts"]
    assert sorted((run["setting"], run["seed"]) for run in part["runs"]) == [
        (setting, seed) for setting in ("adalora", "full", "lora") for seed in (0, 1)
    ]
    json.dumps(whole, allow_nan=False)
    lines = list(csv.DictReader(listing.as_csv(examined).splitlines()))
    assert len(lines) == 6 * 36
    assert {line["site"] for line in lines if line["setting"] == "lora"} == set(BERT_SITES)
    names = [drawing.name for drawing in listing.drawings(examined)]
    assert names == ["rank-map", "side-by-side", "stability", "budget", "ranks-over-time", "importance", "spectra", "knock-out"]
    with pytest.raises(ValueError, match="is a study, of many allocations"):
        listing.drawings(examined, tmp_path)


def test_a_setting_s_name_is_no_formula_in_the_csv(tmp_path):
    for setting in ("=1+1", "lora"):
        write_run(tmp_path / "study", setting=setting)
    lines = list(csv.DictReader(listing.as_csv(tmp_path / "study").splitlines()))
    assert {line["setting"] for line in lines} == {"'=1+1", "lora"}


def test_the_report_holds_these_tables_and_a_study_without_them_does_not(examined, tmp_path, figures_undrawn):
    text = page.write(examined, tmp_path / "report").read_text()
    for words in ("## What became of the weights", "## What each site is worth", "## The allocation at another seed"):
        assert words in text
    assert "What each site is worth" in (tmp_path / "report" / "report.html").read_text()
    assert (tmp_path / "report" / "tables" / "knock-out.csv").is_file()
    for path in examined.iterdir():
        (path / "sites.json").unlink()
        (path / "knockout.json").unlink(missing_ok=True)
    bare = page.write(examined, tmp_path / "bare").read_text()
    assert "What became" not in bare and "The allocation at another seed" in bare


def test_finished_runs_are_copied_with_these_files(examined, tmp_path):
    results.archive_finished(examined, tmp_path / "out")
    names = [set(files) for files in archive.read(tmp_path / "out" / archive.NAME).values()]
    assert (
        len(names) == len(list(examined.iterdir()))
        and all("sites.json" in found for found in names)
        and sum("knockout.json" in found for found in names) == 2
    )


def test_one_run_is_drawn_and_two_are_laid_side_by_side(examined):
    folders = {json.loads((p / "config.json").read_text())["method"]: p for p in examined.iterdir()}
    assert [drawing.name for drawing in listing.drawings(folders["lora"])] == ["rank-map", "spectra"]
    (drawing,) = listing.drawings(folders["lora"], folders["adalora"])
    assert isinstance(drawing, figures.Drawing) and drawing.title.startswith("lora and adalora")
