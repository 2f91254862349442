"""`rankwise doctor` on adapters of ten forms that PEFT trained, with facts planted in each file.

One site has chosen singular values, a spike and a dead rank; what doctor says of it is compared with plain numpy of the
numbers that were planted.  Then a NaN is put into another site.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.command import rankwise

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")

DEAD = 2  # the rank that is
SPIKE, REST = 10.0, (0.9, 0.7, 0.5, 0.3, 0.2, 0.1)  # of eight ranks, one of them dead


class Experts(nn.Module):
    """Three experts as one parameter, as a mixture holds them."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 48, 64) / 7)

    def forward(self, x):
        return torch.einsum("ni,eio->no", x, self.up)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.conv = nn.Embedding(60, 48), nn.Conv2d(8, 64, 3, padding=1)
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(48, 64), "k": nn.Linear(48, 40)}) for _ in range(2)])
        self.experts = Experts()

    def forward(self, ids):
        x = self.emb(ids)
        image = self.conv(x.reshape(len(x), 8, 2, 3))
        outputs = [image, self.experts(x), *(layer[name](x) for layer in self.layers for name in "qk")]
        return sum((output**2).mean() for output in outputs)


QK = {"r": 8, "lora_alpha": 12, "target_modules": ["q", "k"]}
SITE = "layers.1.q"
# Form -> PEFT's configuration, the planted site, its scale by hand, and the site that gets the NaN.
FORMS = {
    "LoRA": (peft.LoraConfig(**QK), SITE, 1.5, "layers.0.k"),
    "rsLoRA": (peft.LoraConfig(**QK, use_rslora=True), SITE, 12 / 8**0.5, "layers.0.k"),
    "DoRA": (peft.LoraConfig(**QK, use_dora=True), SITE, 1.5, "layers.0.k"),
    "AdaLoRA": (
        peft.AdaLoraConfig(init_r=8, target_r=4, lora_alpha=12, target_modules=["q", "k"], total_step=10),
        SITE,
        12 / (8 + 1e-5),
        "layers.0.k",
    ),
    "patterns": (
        peft.LoraConfig(**QK | {"r": 3}, rank_pattern={"1.q": 8}, alpha_pattern={"1.q": 20}),
        SITE,
        2.5,
        "layers.0.k",
    ),
    "PiSSA": (peft.LoraConfig(**QK | {"r": 4}, init_lora_weights="pissa"), SITE, 3.0, "layers.0.k"),
    "Conv2d": (peft.LoraConfig(**QK | {"target_modules": ["conv", "k"]}), "conv", 1.5, "layers.0.k"),
    "Embedding": (peft.LoraConfig(**QK | {"target_modules": ["emb", "k"]}), "emb", 1.5, "layers.0.k"),
    "MoE": (
        peft.LoraConfig(**QK | {"target_modules": ["k"]}, target_parameters=["experts.up"]),
        "experts[1]",
        1.5,
        "layers.0.k",
    ),
    "bf16": (peft.LoraConfig(**QK), SITE, 1.5, "layers.0.k"),
}


def fresh(form):
    torch.manual_seed(1)
    return Model().to(torch.bfloat16 if form == "bf16" else torch.float32)


def trained(form, folder):
    """The folder of an adapter after three steps in PEFT."""
    config = FORMS[form][0]
    model = peft.get_peft_model(fresh(form), config, autocast_adapter_dtype=form != "bf16")
    if form == "PiSSA":  # relative to the base itself only after PEFT's own conversion
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(folder.with_name("start"))
        model.peft_config["default"].init_lora_weights = "pissa"
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    generator = torch.Generator().manual_seed(3)
    for step in range(3):
        loss = model(torch.randint(0, 60, (16,), generator=generator))
        if form == "AdaLoRA":  # AdaLoraModel's forward adds its penalty where the model gives a loss; here it does not
            model.base_model.global_step = step
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    start = {"path_initial_model_for_weight_conversion": str(folder.with_name("start"))} if form == "PiSSA" else {}
    model.save_pretrained(folder, **start)
    return folder


def orthonormal(rows, columns, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, columns)))[0]


def plant(form, folder):
    """Puts chosen factors into the planted site; its singular values, the greatest first, and (O, I)."""
    _, site, scale, _ = FORMS[form]
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    module = site.split("[")[0]
    own = {name: value for name, value in tensors.items() if name.startswith(f"base_model.model.{module}.lora_")}
    a = next(name for name in own if "lora_A" in name or "lora_embedding_A" in name)
    b = next(name for name in own if "lora_B" in name or "lora_embedding_B" in name)
    A, B = own[a], own[b]
    rank, O, I = 8, len(B), A[0].numel()
    sigma = np.insert(np.array([SPIKE, *REST]), DEAD, 0.0)  # (R,), in the order of the file's ranks
    U, V = orthonormal(O, rank, 1), orthonormal(I, rank, 2)
    E = next((name for name in own if "lora_E" in name), None)
    if E is None:
        U, V = U * np.sqrt(sigma / scale), V * np.sqrt(sigma / scale)
        U[:, DEAD] = 1.0  # the rank is dead all the same: its row of A is zero
    else:
        tensors[E] = torch.from_numpy(sigma / scale).to(tensors[E].dtype).view(tensors[E].shape)
    if form == "MoE":
        expert, experts = 1, 3
        A, B = A.clone(), B.clone()
        A[expert * rank : (expert + 1) * rank] = torch.from_numpy(V.T)
        B[:, expert::experts] = torch.from_numpy(U)
        tensors[a], tensors[b] = A, B
    else:
        tensors[a] = torch.from_numpy(np.ascontiguousarray(V.T)).to(A.dtype).view(A.shape)
        tensors[b] = torch.from_numpy(U).to(B.dtype).view(B.shape)
    save_file(tensors, path, {"format": "pt"})
    return sigma[sigma > 0], (O, I)


@pytest.mark.parametrize("form", FORMS)
def test_what_was_planted_is_said(form, tmp_path, capsys):
    _, site, scale, other = FORMS[form]
    folder = trained(form, tmp_path / "adapter")
    sigma, (O, I) = plant(form, folder)
    assert rankwise("doctor", folder, "--json", "--energy", 0.999, "--sv-ratio", 25, "--sv-fro", 0.995) == 0
    said = json.loads(capsys.readouterr().out)
    (found,) = [one for one in said["sites"] if one["site"] == site]
    near = {"rel": 2e-2} if form == "bf16" else {"rel": 2e-6}
    assert found["shape"] == [O, I] and found["scale"] == pytest.approx(scale)
    assert found["singular_values"] == pytest.approx(sigma, **near)
    assert (found["rank"], found["live"]) == (8, 7)
    shares = sigma / sigma.sum()
    assert found["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), **near)
    assert found["stable_rank"] == pytest.approx((sigma**2).sum() / sigma[0] ** 2, **near)
    assert found["energies"] == pytest.approx(sigma**2 / (sigma**2).sum(), rel=4e-2 if form == "bf16" else 1e-5)
    assert found["norm"] == pytest.approx(np.linalg.norm(sigma), **near)
    edge = np.linalg.norm(sigma) / 7**0.5 * (1 + (7 / O) ** 0.5) * (1 + (7 / I) ** 0.5)
    assert found["mp_edge"] == pytest.approx(edge, **near)
    assert found["spikes"] == int((sigma > edge).sum()) == 1
    kept = np.cumsum(sigma**2) / (sigma**2).sum()
    expected = {
        "exact": 7,
        "energy": int((kept < 0.999).sum()) + 1,
        "sv_fro": int((kept < 0.995**2).sum()) + 1,
        "sv_ratio": int((sigma > sigma[0] / 25).sum()),
        "mp": 1,
    }
    for name, rank in expected.items():
        made = said["criteria"][name]
        assert made["ranks"][site] == rank, name
        left = np.linalg.norm(sigma[rank:]) / np.linalg.norm(sigma)
        assert made["errors"][site] == pytest.approx(left, rel=5e-2 if form == "bf16" else 1e-5, abs=1e-12)
    findings = {(one["rule"], one["site"]) for one in said["findings"] if one["level"] != "note"}
    assert findings == {("dead-ranks", site)}
    (dead,) = [one["message"] for one in said["findings"] if one["rule"] == "dead-ranks"]
    assert dead.startswith("1 of 8 ranks are dead (") and f"zero at {DEAD})" in dead

    assert rankwise("doctor", folder, "--fix", tmp_path / "cut", "--by", "exact", "--json") == 0
    fixed = json.loads(capsys.readouterr().out)["fixed"]
    assert fixed["ranks"][site] == 7 and fixed["measured"] <= fixed["bound"]
    assert fixed["measured"] < (5e-3 if form == "bf16" else 1e-6)

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    next(value for name, value in tensors.items() if f"{other}.lora_A" in name)[1, 2] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    assert rankwise("doctor", folder, "--json") == 1
    said = json.loads(capsys.readouterr().out)
    assert [(f["rule"], f["site"]) for f in said["findings"] if f["level"] == "error"] == [("not-finite", other)]
    assert "A holds 1 of " in next(f["message"] for f in said["findings"] if f["rule"] == "not-finite")


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_wrong_with_what_peft_trained(form, tmp_path, capsys):
    folder = trained(form, tmp_path / "adapter")
    assert rankwise("doctor", folder, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert [f for f in said["findings"] if f["level"] != "note"] == []
