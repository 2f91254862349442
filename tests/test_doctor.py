"""`rankwise doctor` on adapters that PEFT wrote in many forms, on Kohya's and diffusers' files, and on broken ones.

The oracle is dense: PEFT's own get_delta_weight of the loaded file in float64, and numpy's SVD of it.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from rankwise import variants
from rankwise.variants.doctor import criteria, examining, findings, kohya, reading, stored, writing
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from tests.command import rankwise
from tests.tiny import tiny

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")


class Experts(nn.Module):
    """Parameters of 3 experts, as a mixture holds them."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 12, 17)), nn.Parameter(torch.randn(3, 17, 12))

    def forward(self, x):
        return x @ self.up[0] @ self.down[0]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(12, 17), "k": nn.Linear(12, 9)}) for _ in range(2)])
        self.emb, self.conv, self.classifier = nn.Embedding(30, 12), nn.Conv2d(3, 8, 3), nn.Linear(17, 2)
        self.experts = Experts()

    def forward(self, x):
        return self.classifier(self.layers[0]["q"](x))


LINEAR = {"r": 4, "lora_alpha": 6, "target_modules": ["q", "k"]}
FORMS = {
    "lora": peft.LoraConfig(**LINEAR, modules_to_save=["classifier"]),
    "rslora": peft.LoraConfig(**LINEAR, use_rslora=True),
    "dora": peft.LoraConfig(**LINEAR, use_dora=True),
    "adalora": peft.AdaLoraConfig(init_r=5, target_r=2, lora_alpha=8, target_modules=["q", "k"], total_step=10),
    "patterns": peft.LoraConfig(**LINEAR, rank_pattern={"1.k": 2}, alpha_pattern={"0.q": 9}, use_rslora=True),
    "pissa, converted": peft.LoraConfig(**LINEAR, init_lora_weights="pissa"),
    "conv": peft.LoraConfig(r=4, lora_alpha=6, target_modules=["conv"]),
    "embedding": peft.LoraConfig(r=4, lora_alpha=6, target_modules=["emb", "q"]),
    "bf16": peft.LoraConfig(**LINEAR),
    "experts": peft.LoraConfig(**LINEAR, target_parameters=["experts.up", "experts.down"]),
    "bias": peft.LoraConfig(**LINEAR, lora_bias=True),
}
METHODS = {"rslora": "rsLoRA", "dora": "DoRA", "adalora": "AdaLoRA", "patterns": "rsLoRA"}


def fill(model):
    """Trained by chance, its directions of unequal strength."""
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            strength = torch.linspace(1.0, 0.1, parameter.shape[0]).reshape(-1, *[1] * (parameter.dim() - 1))
            parameter.data = (torch.randn(parameter.shape) * 0.3 * (strength if "_A" in name else 1)).to(parameter.dtype)
    return model


def fresh(form):
    torch.manual_seed(5)
    return Model().to(torch.bfloat16 if form == "bf16" else torch.float32)


def made(form, folder):
    """The folder of an adapter that PEFT wrote."""
    model = peft.get_peft_model(fresh(form), FORMS[form], autocast_adapter_dtype=form != "bf16")
    if form == "pissa, converted":
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(folder.with_name("start"))
        model.peft_config["default"].init_lora_weights = "pissa"
        fill(model).save_pretrained(folder, path_initial_model_for_weight_conversion=str(folder.with_name("start")))
    else:
        fill(model).save_pretrained(folder)
    return folder


def dense(form, folder):
    """Site -> dW (O, I) of the folder in PEFT, in float64; experts apart."""
    model = peft.PeftModel.from_pretrained(fresh(form), folder, autocast_adapter_dtype=form != "bf16")
    found = {}
    for name, module in model.base_model.model.named_modules():
        if not hasattr(module, "get_delta_weight") or not (module.lora_A or module.lora_embedding_A):
            continue
        for parameter in module.parameters():
            parameter.data = parameter.data.double()
        delta = module.get_delta_weight("default").detach().numpy()
        if getattr(module, "num_experts", 1) > 1:
            found |= {f"{name}[{e}]": delta[e] for e in range(len(delta))}
        else:
            found[name] = delta.reshape(len(delta), -1)
    return found


def nearest(delta, rank):
    U, sigma, Vt = np.linalg.svd(delta, full_matrices=False)
    return (U[:, :rank] * sigma[:rank]) @ Vt[:rank]


def same_up_to_transpose(one, other, atol):
    """An embedding's and an expert's dW is that of the weight, which is the transpose of ours where PEFT says so."""
    np.testing.assert_allclose(one if one.shape == other.shape else one.T, other, atol=atol, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_what_peft_wrote_is_measured_as_its_dense_update_and_cut_to_the_nearest(form, tmp_path):
    folder = made(form, tmp_path / "adapter")
    expected = dense(form, folder)
    adapter = reading.read(folder)
    total = 3 if form == "conv" else 9
    one = examining.examine(adapter, total=total)
    assert [f for f in one.findings if f.level != "note"] == []
    assert (adapter.form, adapter.method) == ("PEFT", METHODS.get(form, "LoRA"))
    assert {site.site.name for site in one.sites} == set(expected)
    pool = []
    for site in one.sites:
        delta = expected[site.site.name]
        sigma = np.linalg.svd(delta, compute_uv=False)[: site.site.rank]
        pool += [(value, site.site.name) for value in sigma]
        np.testing.assert_allclose(site.update.singular_values, sigma[: len(site.update.singular_values)], rtol=1e-6)
        assert site.update.stable_rank == pytest.approx((sigma**2).sum() / sigma[0] ** 2, rel=1e-6)
        assert site.update.update_norm == pytest.approx(np.linalg.norm(delta), rel=1e-6)
        assert site.spikes == (sigma > criteria.mp_edge(sigma, delta.shape)).sum()
        same_up_to_transpose(np.matmul(*adapter.factors(site.site)), delta, 1e-6)
        for name, made_ in one.suggestions.items():
            left = np.linalg.norm(delta - nearest(delta, made_.ranks[site.site.name])) / np.linalg.norm(delta)
            assert made_.errors[site.site.name] == pytest.approx(left, abs=2e-7), name
    kept = [name for _, name in sorted(pool, reverse=True)[:total]]
    assert dict(one.suggestions["total"].ranks) == {name: kept.count(name) for name in expected}

    cut = writing.truncated(adapter, one.suggestions["total"].ranks, tmp_path / "cut")
    now = dense(form, tmp_path / "cut")
    wanted = {name: nearest(delta, kept.count(name)) for name, delta in expected.items()}
    for name, delta in wanted.items():
        if name in now:
            same_up_to_transpose(now[name], delta, 1e-2 if form == "bf16" else 2e-6)
        else:
            assert kept.count(name) == 0
    lost = sum(np.linalg.norm(expected[n] - now.get(n, 0 * expected[n])) ** 2 for n in expected) ** 0.5
    whole = sum(np.linalg.norm(delta) ** 2 for delta in expected.values()) ** 0.5
    assert cut.measured == pytest.approx(lost / whole, rel=1e-6)
    assert cut.measured <= cut.bound <= one.suggestions["total"].error + (0.05 if form == "bf16" else 1e-5)


def test_nothing_is_lost_by_exact_and_all_but_the_update_is_as_it_was(tmp_path):
    folder = made("dora", tmp_path / "adapter")
    one = examining.examine(reading.read(folder))
    cut = writing.truncated(one.adapter, one.suggestions["exact"].ranks, tmp_path / "cut")
    assert cut.measured < 1e-6
    before, after = (load_file(at / "adapter_model.safetensors") for at in (folder, tmp_path / "cut"))
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) == ("magnitude" in name), name


def test_a_base_that_was_changed_is_said_and_not_cut(tmp_path, capsys):
    fill(peft.get_peft_model(fresh("lora"), FORMS["pissa, converted"])).save_pretrained(tmp_path / "pissa")
    one = examining.examine(reading.read(tmp_path / "pissa"))
    assert [finding.rule for finding in one.findings] == ["base-changed"]
    assert rankwise("doctor", tmp_path / "pissa", "--fix", tmp_path / "cut", "--by", "energy") == 2
    assert "init_lora_weights = 'pissa'" in capsys.readouterr().err
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize("method", ["adalora", "adalora+dora", "dylora"])
def test_our_own_files_are_read(method, tmp_path):
    settings = {"rank": 4} if method == "dylora" else {"initial_rank": 4, "target_rank": 2}
    adapter = variants.create(method, **settings).attach(tiny("bert"))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0, 0.3)
    variants.save_pretrained(adapter, tmp_path)
    found = reading.read(tmp_path)
    assert found.method == method
    for site in found.sites:
        low_rank = adapter.site(site.name).low_rank
        expected = low_rank.delta(adapter.base(site.name))[0].detach().double().numpy()
        np.testing.assert_allclose(np.matmul(*found.factors(site)), expected, atol=1e-5)


# -- Kohya's and diffusers' files ------------------------------------------------------------------------------------------


def kohya_file(path, kind=torch.float32):
    """A linear, a 3 x 3 convolution, a Tucker one and a text encoder's linear without alpha; and their dense updates."""
    torch.manual_seed(3)
    shapes = {
        "lora_unet_mid_q": ((4, 12), (17, 4), None, 6.0),
        "lora_unet_conv_1": ((4, 3, 3, 3), (8, 4, 1, 1), None, 2.0),
        "lora_unet_conv_2": ((4, 3, 1, 1), (8, 4, 1, 1), (4, 4, 3, 3), 8.0),
        "lora_te1_text_model_k": ((2, 12), (9, 2), None, None),
    }
    tensors, expected = {}, {}
    for name, (down, up, mid, alpha) in shapes.items():
        A, B = (torch.randn(shape).to(kind) for shape in (down, up))
        tensors |= {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}
        dense = B.double().flatten(1) @ A.double().flatten(1)
        if mid is not None:
            tensors[f"{name}.lora_mid.weight"] = M = torch.randn(mid).to(kind)
            dense = torch.einsum("or,rsxy,si->oixy", B.double().flatten(1), M.double(), A.double().flatten(1)).flatten(1)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
        expected[name] = (dense * (1.0 if alpha is None else alpha / down[0])).numpy()
    save_file(tensors, path, {"ss_network_dim": "4"})
    return expected


def test_kohya_s_file_is_read_and_cut_in_its_own_names(tmp_path, capsys):
    expected = kohya_file(tmp_path / "one.safetensors")
    adapter = reading.read(tmp_path / "one.safetensors")
    assert adapter.form == "Kohya"
    for site in adapter.sites:
        np.testing.assert_allclose(np.matmul(*adapter.factors(site)), expected[site.name], atol=1e-5)
    assert (
        rankwise("doctor", tmp_path / "one.safetensors", "--fix", tmp_path / "cut", "--by", "total", "--total", 7, "--json")
        == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert {f["rule"] for f in said["findings"]} == {"alpha-missing", "scales-differ", "one-site-rules"}
    tensors = load_file(tmp_path / "cut" / "adapter.safetensors")
    lost = 0.0
    for name, delta in expected.items():
        rank = said["criteria"]["total"]["ranks"][name]
        cut = np.zeros_like(delta)
        if rank:
            A, B, alpha = (tensors[f"{name}.{end}"].double() for end in ("lora_down.weight", "lora_up.weight", "alpha"))
            assert len(A) == rank
            cut = (B.flatten(1) @ A.flatten(1) * (alpha / rank)).numpy()
            assert A.shape[2:] == ((3, 3) if "conv" in name else ())
        np.testing.assert_allclose(cut, nearest(delta, rank), atol=1e-5)
        lost += np.linalg.norm(delta - cut) ** 2
    whole = sum(np.linalg.norm(delta) ** 2 for delta in expected.values())
    assert said["fixed"]["measured"] == pytest.approx((lost / whole) ** 0.5)
    with safe_open(tmp_path / "cut" / "adapter.safetensors", "pt") as file:
        assert file.metadata() == {"ss_network_dim": "4"}


def test_diffusers_scale_is_that_of_its_metadata_and_is_kept(tmp_path):
    torch.manual_seed(1)
    A, B = torch.randn(4, 12), torch.randn(9, 4)
    names = ["unet.mid.attn.to_q", "unet.down.attn.to_q", "text_encoder.layers.0.k"]
    metadata = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"down.attn.to_q": 2}}
    tensors = {f"{name}.lora_{f}.weight": t * (1 + i) for i, name in enumerate(names) for f, t in (("A", A), ("B", B))}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors", {kohya.METADATA: json.dumps(metadata)})
    adapter = reading.read(tmp_path)
    assert {site.name: site.scale for site in adapter.sites} == dict(zip(names, (2.0, 0.5, 1.0), strict=True))
    one = examining.examine(adapter, total=5)
    cut = writing.truncated(adapter, one.suggestions["total"].ranks, tmp_path / "cut")
    again = reading.read(cut.file)
    assert {site.name: site.scale for site in again.sites} == {
        s.name: s.scale for s in adapter.sites if one.suggestions["total"].ranks[s.name]
    }
    assert cut.measured == pytest.approx(one.suggestions["total"].error, rel=1e-5)


def lycoris(path, change):
    """A LoCon file that is changed."""
    kohya_file(path)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path


Q = "lora_unet_mid_q"


def replaced_by(**parts):
    """Another kind of update in place of the one of `lora_unet_mid_q`; its alpha stays, as LyCORIS has one too."""

    def change(t):
        for end in ("lora_down.weight", "lora_up.weight"):
            del t[f"{Q}.{end}"]
        t |= {f"{Q}.{name}": torch.randn(shape) for name, shape in parts.items()}

    return change


KINDS = {
    "LoHa": replaced_by(hada_w1_a=(17, 4), hada_w1_b=(4, 12), hada_w2_a=(17, 4), hada_w2_b=(4, 12)),
    "LoKr": replaced_by(lokr_w1=(2, 2), lokr_w2=(9, 6)),
    "OFT": replaced_by(oft_blocks=(3, 4, 4)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_updates_are_said_and_a_file_of_nothing_else_is_refused(kind, tmp_path, capsys):
    mixed = lycoris(tmp_path / "mixed.safetensors", KINDS[kind])
    assert rankwise("doctor", mixed, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert [f["rule"] for f in said["findings"] if f["level"] != "note"] == ["acts-otherwise"]
    assert Q not in {site["site"] for site in said["sites"]} and len(said["sites"]) == 3
    alone = tmp_path / "alone.safetensors"
    save_file({name: value for name, value in load_file(mixed).items() if name.startswith(Q)}, alone)
    assert rankwise("doctor", alone) == 2
    said = capsys.readouterr().err
    assert "LoHa, LoKr, OFT or whole differences" in said and len(said.splitlines()) == 1


FAULTS = {
    "an alpha of no number": (lambda t: t.update({f"{Q}.alpha": torch.zeros(0)}), "its alpha has shape (0,)"),
    "a core of another rank": (
        lambda t: t.update({"lora_unet_conv_2.lora_mid.weight": torch.ones(4, 3, 3, 3)}),
        "their Tucker core (4, 3, 3, 3), which is not (4, 4, h, w)",
    ),
    "no up": (lambda t: t.pop(f"{Q}.lora_up.weight"), "B is missing (it has A)"),
    "alpha alone": (lambda t: (t.pop(f"{Q}.lora_up.weight"), t.pop(f"{Q}.lora_down.weight")), "A and B are missing"),
    "an alpha of NaN": (lambda t: t.update({f"{Q}.alpha": torch.tensor(float("nan"))}), "alpha is nan"),
    "an integer type": (lambda t: t.update({f"{Q}.lora_up.weight": torch.ones(17, 4, dtype=torch.int8)}), "stored as I8"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_faults_of_kohya_s_files_are_errors(what, tmp_path, capsys):
    change, message = FAULTS[what]
    assert rankwise("doctor", lycoris(tmp_path / "one.safetensors", change), "--json") == 1
    found = [f for f in json.loads(capsys.readouterr().out)["findings"] if f["level"] == "error"]
    assert len(found) == 1 and message in found[0]["message"], found


def test_metadata_of_the_wrong_type_and_a_whole_model_are_refused(tmp_path, capsys):
    tensors = {"unet.a.to_q.lora_A.weight": torch.randn(4, 12), "unet.a.to_q.lora_B.weight": torch.randn(9, 4)}
    save_file(tensors, tmp_path / "a.safetensors", {kohya.METADATA: json.dumps({"unet.lora_alpha": "x"})})
    assert rankwise("doctor", tmp_path / "a.safetensors") == 2
    assert "lora_alpha = 'x' is no number" in capsys.readouterr().err
    save_file({"model.layers.0.q.weight": torch.randn(4, 4)}, tmp_path / "b.safetensors")
    assert rankwise("doctor", tmp_path / "b.safetensors") == 2
    assert "holds no low-rank update" in capsys.readouterr().err


# -- broken files ----------------------------------------------------------------------------------------------------------

SITE = "layers.1.k"
KEY = f"base_model.model.{SITE}.lora_"


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    return made("lora", tmp_path_factory.mktemp("healthy") / "adapter")


def changed(healthy, folder, tensors=None, **config):
    """A copy of an adapter, changed."""
    shutil.copytree(healthy, folder)
    path, settings = folder / "adapter_model.safetensors", json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    if tensors is not None:
        now = load_file(path)
        tensors(now)
        save_file(now, path)
    return folder


def nan(t):
    t[f"{KEY}A.weight"][1, 2] = float("nan")


def dead(t):
    t[f"{KEY}B.weight"][:, 1] = 0
    t[f"{KEY}A.weight"][3] = 0


def dependent(t):
    t[f"{KEY}A.weight"][3] = 2 * t[f"{KEY}A.weight"][0] - t[f"{KEY}A.weight"][1]


def untrained(t):
    t[f"{KEY}B.weight"].zero_()


def missing(t):
    del t[f"{KEY}B.weight"]


def unequal(t):
    t[f"{KEY}B.weight"] = t[f"{KEY}B.weight"][:, :3].contiguous()


def headless(t):
    del t["base_model.model.classifier.weight"], t["base_model.model.classifier.bias"]


def stray(t):
    t["base_model.model.other.thing"] = torch.ones(2)


def bad_head(t):
    t["base_model.model.classifier.weight"][0, 0] = float("inf")


def loud(t):
    t[f"{KEY}B.weight"].mul_(50)


def gone(t):
    del t[f"{KEY}A.weight"], t[f"{KEY}B.weight"]


def without_ranks(t):
    t[f"{KEY}A.weight"], t[f"{KEY}B.weight"] = torch.zeros(0, 12), torch.zeros(9, 0)


BROKEN = {
    "site gone": (gone, {}, "site-missing", "note", "k has tensors in 1 of 2 layers of layers, and none in 1"),
    "target gone": (None, {"target_modules": ["q", "k", "v"]}, "site-missing", "note", "target_modules names v"),
    "no ranks": (without_ranks, {}, "rank-contradiction", "error", "its tensors have rank 0"),
    "one of two heads": (None, {"modules_to_save": ["classifier", "lm_head"]}, "head-unmatched", "warning", "lm_head"),
    "trained biases": (
        lambda t: t.update({"base_model.model.layers.0.q.base_layer.bias": torch.ones(17)}),
        {"bias": "all"},
        "whole-tensors",
        "note",
        "biases are trained beside the updates (1 tensors, layers.0.q.base_layer.bias among them)",
    ),
    "NaN": (nan, {}, "not-finite", "error", "A holds 1 of 48 numbers that are NaN"),
    "dead ranks": (dead, {}, "dead-ranks", "warning", "2 of 4 ranks are dead (row of A zero at 3; column of B zero at 1)"),
    "dependent": (dependent, {}, "dependent-ranks", "warning", "live ranks of A span 3 dimensions"),
    "never trained": (untrained, {}, "zero-update", "warning", "dW is zero (B is all zero)"),
    "missing factor": (missing, {}, "missing-factor", "error", "B is missing (it has A)"),
    "factors of two ranks": (unequal, {}, "factors-do-not-fit", "error", "A has shape (4, 12) and B (9, 3)"),
    "missing head": (headless, {}, "head-missing", "error", "modules_to_save names classifier"),
    "stray tensor": (stray, {}, "stray-tensor", "warning", "other.thing"),
    "head not finite": (bad_head, {}, "not-finite", "error", "classifier.weight holds 1 numbers that are not finite"),
    "one site rules": (loud, {}, "one-site-rules", "note", "of the energy of all updates is here"),
    "alpha of 0": (None, {"lora_alpha": 0}, "scale-zero", "error", "alpha is 0"),
    "negative alpha": (None, {"alpha_pattern": {"1.k": -6}}, "scale-negative", "warning", "alpha is -6"),
    "huge alpha": (
        None,
        {"alpha_pattern": {"1.k": 400}},
        "scale-large",
        "warning",
        "the scale alpha/r is 100 (alpha 400, r 4)",
    ),
    "other rank": (None, {"rank_pattern": {"1.k": 3}}, "rank-contradiction", "error", "its tensors have rank 4"),
    "pattern": (None, {"alpha_pattern": {"v": 3}}, "pattern-without-effect", "warning", "matches none of the 4 modules"),
    "magnitude": (None, {"use_dora": True}, "magnitude-missing", "error", "the file has no magnitude of this site"),
    "another function": (None, {"use_qalora": True}, "acts-otherwise", "warning", "use_qalora"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_said_with_rule_level_site_and_remedy(what, healthy, tmp_path, capsys):
    tensors, config, rule, level, message = BROKEN[what]
    folder = changed(healthy, tmp_path / "adapter", tensors, **config)
    code = rankwise("doctor", folder, "--json", "--sarif", tmp_path / "out.sarif")
    said = json.loads(capsys.readouterr().out)
    found = [f for f in said["findings"] if f["rule"] == rule]
    assert found and all(f["level"] == level and f["remedy"] for f in found), said["findings"]
    assert any(message in f["message"] for f in found)
    assert any(f["site"] in (SITE, None) for f in found)
    assert code == (1 if level == "error" else 0)
    (run,) = json.loads((tmp_path / "out.sarif").read_text())["runs"]
    assert [(r["ruleId"], r["level"]) for r in run["results"]] == [(f["rule"], f["level"]) for f in said["findings"]]
    for result in run["results"]:
        assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
    others = {f["rule"] for f in said["findings"] if f["level"] != "note"} - {rule}
    assert not others, others


def test_sarif_has_what_2_1_0_requires(healthy, tmp_path):
    """OASIS sarif-schema-2.1.0: what is required, the levels that there are, and URIs."""
    from urllib.parse import unquote, urlsplit

    folder = changed(healthy, tmp_path / "an adapter #1", nan, lora_alpha=-6)
    assert rankwise("doctor", folder, "--sarif", tmp_path / "out.sarif") == 1
    log = json.loads((tmp_path / "out.sarif").read_text())
    assert log["version"] == "2.1.0" and log["$schema"].endswith("sarif-2.1.0.json")
    (run,) = log["runs"]
    driver = run["tool"]["driver"]
    assert driver["name"] and len({rule["id"] for rule in driver["rules"]}) == len(driver["rules"]) == 2
    for rule in driver["rules"]:
        assert rule["shortDescription"]["text"] and rule["help"]["text"]
        assert rule["defaultConfiguration"]["level"] in ("none", "note", "warning", "error")
    assert len(run["results"]) == 5  # a NaN, and four sites of a negative scale
    for result in run["results"]:
        assert result["message"]["text"] and result["level"] in ("none", "note", "warning", "error")
        uri = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        parts = urlsplit(uri)
        assert not parts.fragment and " " not in uri
        assert unquote(parts.path) == str(folder / "adapter_model.safetensors")


def test_a_classifier_of_peft_s_lacks_no_head(healthy, tmp_path, capsys):
    """PEFT names classifier and score in every one."""
    folder = changed(healthy, tmp_path / "adapter", modules_to_save=["classifier", "score"], task_type="SEQ_CLS")
    assert rankwise("doctor", folder) == 0
    assert "No finding: nothing is wrong" in capsys.readouterr().out


def test_a_healthy_adapter_has_no_finding(healthy, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # a narrower table is cut into parts
    assert rankwise("doctor", healthy) == 0
    out = capsys.readouterr().out
    assert "No finding: nothing is wrong" in out and "sv_ratio" in out and SITE in out
    row = next(line for line in out.splitlines() if line.startswith(SITE))
    energies = np.square(examining.examine(reading.read(healthy)).sites[2].update.singular_values)
    assert f" {' '.join(f'{100 * share:.3g}' for share in energies / energies.sum())} " in row


def cut_short(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut_short, "is not a whole safetensors file"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is no JSON"),
        (lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}'), "peft_type 'IA3'"),
        (lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": "x"}'), "'x'"),
        (lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"), "is a pickle"),
        (lambda folder: save_file({"a.lokr_w1": torch.ones(2, 2)}, folder / "adapter_model.safetensors"), "LoKr"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_what_cannot_be_read_is_refused(change, message, healthy, tmp_path, capsys):
    folder = changed(healthy, tmp_path / "adapter")
    change(folder)
    assert rankwise("doctor", folder) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--by", "energy"], "no effect without --fix"),
        (["--fix", "cut"], "name it with --by"),
        (["--fix", "cut", "--by", "enrgy"], 'no such criterion; did you mean "energy"?'),
        (["--energy", "1.5"], "energy = 1.5: give a share"),
        (["--sv-ratio", "1"], "sv_ratio = 1.0"),
        (["--total", "17"], "total = 17: the sites have 16 ranks"),
    ],
)
def test_settings_out_of_range_are_refused(words, message, healthy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert rankwise("doctor", healthy, *words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_dead_and_dependent_ranks_go_by_exact_and_a_broken_site_is_not_cut(healthy, tmp_path, capsys):
    for number, change in enumerate((dead, dependent, untrained)):
        folder = changed(healthy, tmp_path / f"{number}", change)
        assert rankwise("doctor", folder, "--fix", tmp_path / f"cut{number}", "--by", "exact", "--json") == 0
        fixed = json.loads(capsys.readouterr().out)["fixed"]
        assert fixed["ranks"][SITE] == (2, 3, 0)[number] and fixed["measured"] < 1e-6
    folder = changed(healthy, tmp_path / "nan", nan)
    assert rankwise("doctor", folder, "--fix", tmp_path / "cut-nan", "--by", "energy") == 2
    assert f"{SITE} holds numbers that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "cut-nan").exists()


def test_a_negative_scale_stays_negative(healthy, tmp_path):
    folder = changed(healthy, tmp_path / "adapter", lora_alpha=-6)
    adapter = reading.read(folder)
    cut = writing.truncated(adapter, {site.name: 4 for site in adapter.sites}, tmp_path / "cut")
    assert cut.measured < 1e-6 and {site.scale for site in reading.read(tmp_path / "cut").sites} == {-1.5}


def test_a_fix_takes_the_place_of_a_fix_only(healthy, tmp_path, capsys):
    assert rankwise("doctor", healthy, "--fix", tmp_path / "cut", "--by", "energy") == 0
    assert rankwise("doctor", healthy, "--fix", tmp_path / "cut", "--by", "total", "--total", 3) == 0
    assert "3 ranks by total" in capsys.readouterr().out
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert rankwise("doctor", healthy, "--fix", tmp_path / "mine", "--by", "energy") == 2
    assert rankwise("doctor", healthy, "--fix", healthy, "--by", "energy") == 2


def test_figures_are_drawn(healthy, tmp_path):
    assert rankwise("doctor", healthy, "--figures", tmp_path) == 0
    assert (tmp_path / "doctor.svg").stat().st_size > 5000 and (tmp_path / "doctor.png").is_file()


# -- beside the base's weights ---------------------------------------------------------------------------------------------


def test_drift_and_relative_norm_are_those_of_the_base(tmp_path, capsys):
    folder = made("dora", tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"{KEY}magnitude_vector"] *= torch.linspace(0.5, 1.1, 9)
    save_file(tensors, path)
    base = fresh("dora")
    weights = {name.replace("layers.", "outer.layers."): value for name, value in base.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    assert rankwise("doctor", folder, "--base", tmp_path, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    expected = dense("dora", folder)
    for site in said["sites"]:
        W = base.get_submodule(site["site"]).weight.detach().double()
        assert site["relative_norm"] == pytest.approx(np.linalg.norm(expected[site["site"]]) / float(W.norm()), rel=1e-5)
        greatest = 0.5 if site["site"] == SITE else 0.0
        assert site["magnitude_drift"]["greatest"] == pytest.approx(greatest, abs=1e-5)
    mean = float((torch.linspace(0.5, 1.1, 9) - 1).abs().mean())
    assert [s["magnitude_drift"]["mean"] for s in said["sites"] if s["site"] == SITE] == pytest.approx([mean], rel=1e-4)
    assert not [f for f in said["findings"] if f["rule"] == "magnitude-drift"] or mean > 0.25
    tensors[f"{KEY}magnitude_vector"] *= 2
    save_file(tensors, path)
    del weights["outer.layers.0.q.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    assert rankwise("doctor", folder, "--base", tmp_path) == 0
    out = capsys.readouterr().out
    assert f"{SITE}: magnitudes are " in out and "layers.0.q: no weight of this site" in out and "drift" in out
    assert rankwise("doctor", folder, "--base", folder) == 2
    assert rankwise("doctor", folder) == 0 and "give the base with --base" in " ".join(capsys.readouterr().out.split())


# -- the criteria ----------------------------------------------------------------------------------------------------------


def test_criteria_by_hand():
    sigma = np.array([10.0, 5.0, 1.0, 0.9])  # squares 100, 25, 1, 0.81: 126.81 in all
    one = criteria.Spectrum("a", sigma, (40, 30))
    other = criteria.Spectrum("b", np.array([4.0, 0.5]), (7, 9))
    made = criteria.suggestions([one, other], energy=0.95, sv_fro=0.9, sv_ratio=10, total=3)
    assert made["exact"].ranks == {"a": 4, "b": 2}
    assert made["energy"].ranks == {"a": 2, "b": 1}  # 125/126.81 = 0.986, 16/16.25 = 0.985
    assert made["sv_fro"].ranks == {"a": 2, "b": 1}  # 10/11.26 = 0.888
    assert made["sv_ratio"].ranks == {"a": 2, "b": 2}  # 1.0 is not above 10/10
    assert made["total"].ranks == {"a": 2, "b": 1}
    assert made["total"].error == pytest.approx(((1 + 0.81 + 0.25) / (126.81 + 16.25)) ** 0.5)
    assert made["total"].parameters == 2 * 70 + 16
    assert made["mp"].ranks["b"] == 2  # nothing of b stands out: it is left whole
    assert criteria.mp_edge(sigma, (40, 30)) == pytest.approx(126.81**0.5 / 2 * (1 + 0.1**0.5) * (1 + (4 / 30) ** 0.5))
    assert criteria.ratio_rank(sigma, 11) == 3 and criteria.share_rank(sigma, 0.88) == 1


def test_noise_stays_below_the_edge_and_a_planted_direction_stands_out():
    random = np.random.default_rng(0)
    for O, I, R in ((64, 48, 8), (300, 40, 16), (40, 300, 4)):
        for _ in range(20):
            B, A = random.normal(size=(O, R)), random.normal(size=(R, I))
            noise = writing.best(B, A)[1]
            assert criteria.spikes(noise, (O, I)) == 0
        planted = np.linalg.svd(
            B @ A + 3 * noise[0] * np.outer(B[:, 0], A[0]) / np.linalg.norm(B[:, 0]) / np.linalg.norm(A[0])
        )[1]
        assert criteria.spikes(planted[:R], (O, I)) == 1


@pytest.mark.parametrize("kind", ["F64", "F32", "F16", "BF16"])
def test_numbers_are_rounded_as_torch_does_and_read_back(kind, tmp_path):
    random = np.random.default_rng(1)
    values = random.normal(size=(7, 5)) * 10.0 ** random.integers(-3, 3, (7, 5))
    values[0, :2] = 1 + 2.0**-8, 1 + 3 * 2.0**-8  # halfway between two numbers of bfloat16: one goes down, one up
    types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    bits = torch.tensor([1, 2, 3], dtype=torch.int8)
    raw = stored.Raw("I8", (3,), bits.numpy().tobytes())
    stored.write(tmp_path / "f.safetensors", {"a": raw, "x": stored.rounded(values, kind)}, {"k": "v"})
    found = load_file(tmp_path / "f.safetensors")
    assert torch.equal(
        found["x"],
        torch.from_numpy(values).float().to(types[kind]) if kind == "BF16" else torch.from_numpy(values).to(types[kind]),
    )
    assert torch.equal(found["a"], bits)
    assert np.array_equal(stored.Stored(tmp_path / "f.safetensors")["x"][0], found["x"].double().numpy())
    if kind == "F16":
        with pytest.raises(ValueError, match="does not fit into f16"):
            stored.rounded(np.array([1e6]), kind)


def test_every_rule_says_what_helps():
    assert all(rule.level in ("error", "warning", "note") and rule.meaning and rule.remedy for rule in findings.RULES.values())


# -- rankwise export --to kohya --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["rslora", "adalora", "patterns", "conv", "bf16"])
def test_export_to_kohya_has_the_same_updates(form, tmp_path, capsys):
    folder = made(form, tmp_path / "adapter")
    assert rankwise("export", folder, "--to", "kohya", "--prefix", "lora_te", "--out", tmp_path / "out") == 0
    tensors = load_file(tmp_path / "out" / "adapter.safetensors")
    expected = dense(form, folder)
    assert {name.split(".")[0] for name in tensors} == {"lora_te_" + name.replace(".", "_") for name in expected}
    for name, delta in expected.items():
        flat = "lora_te_" + name.replace(".", "_")
        A, B, alpha = (tensors[f"{flat}.{end}"].double() for end in ("lora_down.weight", "lora_up.weight", "alpha"))
        np.testing.assert_allclose((alpha / len(A) * B.flatten(1) @ A.flatten(1)).numpy(), delta, atol=1e-6)


@pytest.mark.parametrize("form", ["lora", "dora", "embedding", "experts", "bias"])
def test_export_to_kohya_refuses_what_has_no_place_there(form, tmp_path, capsys):
    folder = made(form, tmp_path / "adapter")
    assert rankwise("export", folder, "--to", "kohya", "--prefix", "lora_te", "--out", tmp_path / "out") == 2
    assert "no exact form in Kohya's format" in capsys.readouterr().err
    assert rankwise("export", folder, "--to", "kohya", "--out", tmp_path / "out") == 2
    assert "--prefix" in capsys.readouterr().err and not (tmp_path / "out").exists()
