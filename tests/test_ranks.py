"""The ranks of runs and of PEFT's adapter folders."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from reports import ranks, tables
from tests.synthetic_runs import BERT_SITES, write_json, write_run


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
    assert json.loads(tables.rank_json(tmp_path))["at_rank_0"] == 2


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

    import variants
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
