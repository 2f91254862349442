"""Adapters on disk: what is saved comes back, whole or not at all, and what is wrong is refused in a line."""

import json
import re
import resource
import stat

import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.probe import fill
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.loop import Loop, outputs
from tests.tiers import quick
from tests.tiny import batch, packed_batch, tiny

# Triplets are cut by hand here, which AdaLoRA warns of; PEFT warns of its own AdaLoRA files.
pytestmark = pytest.mark.filterwarnings("ignore:.*was trained but after_step", "ignore:The following rank_pattern")
TARGETS = ["query", "value", "intermediate.dense"]
LOW_RANK = {"rank": 3, "alpha": 7, "dropout": 0.1, "lr_ratio": 4.0}
SVD = {"initial_rank": 5, "target_rank": 2, "alpha": 7, "warmup_steps": 2, "final_steps": 3, "interval": 2, "beta1": 0.8}
CASES = {
    "lora": ("lora", LOW_RANK | {"initialization": "gaussian"}),
    "rslora": ("lora", LOW_RANK | {"scaling": "alpha/sqrt(r)", "rank_pattern": {"query": 5}, "alpha_pattern": {"value": 2}}),
    "dora": ("dora", LOW_RANK | {"rank_pattern": {"query": 1}}),
    "adalora": ("adalora", SVD | {"penalty_form": "paper", "orthogonality": 0.1}),
    "adalora-uneven": ("adalora", SVD | {"rank_pattern": {"query": 3, "value": 8}, "alpha_pattern": {"value": 2}}),
    "adalora+dora": ("adalora+dora", SVD | {"rank_pattern": {"query": 3}}),
    "lora-magnitude": ("lora", LOW_RANK | {"magnitude": True}),
    "allocated": ("allocated", SVD | {"rank_pattern": {"query": 3, "value": 8}, "scaling": "alpha/sqrt(r)"}),
    "doublet": ("allocated", SVD | {"form": "doublet", "alpha_pattern": {"value": 2}}),
    "doublet-magnitude": ("allocated", SVD | {"form": "doublet", "magnitude": True}),
    "grown": ("allocated", SVD | {"initial_rank": 2, "direction": "grow", "most_rank": 4, "target_rank": 3}),
    "truncated": ("truncated", {"initial_rank": 5, "target_rank": 2, "alpha": 7, "dropout": 0.1}),
    "head": ("head", {}),
    "bitfit": ("bitfit", {}),
    "full": ("full", {}),
}
LOW_RANK_CASES = [case for case in CASES if case not in ("head", "bitfit", "full")]


def make(case: str, dtype: torch.dtype = torch.float32, **more) -> Adapter:
    name, settings = CASES[case]
    adapter = variants.create(name, **settings | more).attach(tiny("bert", dtype).eval(), targets=TARGETS)
    change(adapter)
    return adapter


def change(adapter: Adapter) -> None:
    """Nothing trivial; triplets cut by chance, all of the first site's, and one that was cut acts again."""
    fill(adapter, spread=0.3)
    random = torch.Generator().manual_seed(1)
    for index, (_, site) in enumerate(adapter.named_sites()):
        inner = getattr(site, "inner", site)
        if hasattr(inner, "kept"):
            inner.kept.logical_and_(torch.rand(inner.kept.shape, generator=random) < (0.6 if index else -1))
            inner.project()
            if index == 1:
                with torch.no_grad():
                    (inner.E if hasattr(inner, "E") else inner.B[:, 0])[:, 0] = 0.7
                    inner.kept[:, 0] = False


def forward(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return outputs(model, batch(0))


def loaded(folder, dtype: torch.dtype = torch.float32) -> Adapter:
    return variants.load_pretrained(tiny("bert", dtype).eval(), folder)


# -- what is saved comes back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", quick([torch.float32, torch.float64], [torch.float32]))
@pytest.mark.parametrize("case", CASES)
def test_a_saved_adapter_comes_back(case, dtype, tmp_path):
    adapter = make(case, dtype, seeds=[17])
    variants.save_pretrained(adapter, tmp_path / "a")
    again = loaded(tmp_path / "a", dtype)
    assert (forward(adapter.model) - forward(tiny("bert", dtype).eval())).abs().max() > 0.05, "the adapter acts"
    assert torch.allclose(forward(again.model), forward(adapter.model), rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)
    assert type(again) is type(adapter) and again.settings == adapter.settings and again.seeds == [17]
    assert again.head_names == adapter.head_names
    assert again.targets == adapter.targets or case not in LOW_RANK_CASES
    for counted in ("ranks", "live_ranks", "nominal_ranks", "scales"):
        assert getattr(again, counted)() == getattr(adapter, counted)(), counted
    assert all(p.dtype == dtype for p in again.parameters())


@pytest.mark.parametrize("case", [c for c in CASES if c not in ("adalora+dora", "allocated", "grown")])
def test_every_tensor_that_acts_comes_back_bit_for_bit(case, tmp_path):
    """Triplets in a LORA are stored as products, exact to rounding."""
    adapter = make(case)
    variants.save_pretrained(adapter, tmp_path / "a")
    theirs = loaded(tmp_path / "a").state_dict()
    for name, mine in adapter.state_dict().items():
        if "score" in name or "step" in name:
            continue
        acts = torch.ones_like(mine, dtype=torch.bool)
        if name.endswith((".A", ".B")):
            site = adapter.get_submodule(name.rpartition(".")[0])
            acting = site.E != 0 if hasattr(site, "E") else (site.B != 0).any(1)
            alive = acting | getattr(site, "kept", acting)
            acts = (alive[:, :, None] if name.endswith("A") else alive[:, None]).expand(mine.shape)
        if name.endswith(".E"):
            assert torch.allclose(mine, theirs[name], rtol=1.2e-7, atol=0)  # scaled for PEFT and back
        else:
            assert torch.equal(mine[acts], theirs[name][acts]), name


def test_triplets_that_do_not_act_start_anew(tmp_path):
    adapter = make("adalora")
    variants.save_pretrained(adapter, tmp_path)
    again = loaded(tmp_path)
    fresh = variants.create("adalora", **CASES["adalora"][1]).attach(tiny("bert", torch.float32), targets=TARGETS)
    number = 0
    for name, site in again.named_sites():
        dead = ~(adapter.site(name).kept | (adapter.site(name).E != 0))[0]
        assert (site.E[0, dead] == 0).all()
        assert torch.equal(site.A[0, dead], fresh.site(name).A[0, dead])
        number += dead.sum().item()
        assert torch.equal(site.kept, adapter.site(name).kept)
    assert number > 5


@pytest.mark.parametrize("case", LOW_RANK_CASES)
def test_an_untrained_adapter_comes_back(case, tmp_path):
    name, settings = CASES[case]
    adapter = variants.create(name, **settings).attach(tiny("bert", torch.float32).eval(), targets=TARGETS)
    variants.save_pretrained(adapter, tmp_path)
    again = loaded(tmp_path)
    assert again.ranks() == adapter.ranks() and min(r.item() for r in again.ranks().values()) > 0
    assert torch.equal(forward(again.model), forward(adapter.model))


OWN_FILES = [c for c in CASES if c not in ("full", "grown")]


@pytest.mark.parametrize("case", quick(OWN_FILES, ["lora", "adalora+dora", "doublet-magnitude", "truncated"]))
def test_each_member_of_a_pack_has_its_own_file(case, tmp_path):
    name, settings = CASES[case]
    if "initial_rank" in settings:
        settings = settings | {"initial_rank": [5, 3, 6], "target_rank": [2, 3, 1], "alpha": [7, 3, 20]}
    elif "rank" in settings:
        settings = settings | {"rank": [3, 1, 4], "alpha": [7, 3, 20]}
    base = tiny("bert", torch.float64).eval()
    pack = variants.create(name, members=3, seeds=[5, 9, 2], **settings).attach(base, targets=TARGETS)
    change(pack)
    with torch.no_grad():
        together = outputs(base, packed_batch([0, 0, 0])).view(3, 4, -1)
    for member in range(3):
        variants.save_pretrained(pack, tmp_path / str(member), member=member)
        alone = loaded(tmp_path / str(member), torch.float64)
        assert alone.members == 1 and alone.seeds == [pack.seeds[member]]
        assert torch.allclose(forward(alone.model), together[member], rtol=0, atol=1e-12)
        assert {n: r.item() for n, r in alone.ranks().items()} == {n: r[member].item() for n, r in pack.ranks().items()}
    with pytest.raises(ValueError, match="member = 3: there are 3"):
        variants.save_pretrained(pack, tmp_path / "3", member=3)


@pytest.mark.parametrize("case", LOW_RANK_CASES)
def test_peft_loads_equal_outputs(case, tmp_path):
    from peft import PeftModel

    adapter = make(case)
    variants.save_pretrained(adapter, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == ("ADALORA" if case in ("adalora", "adalora-uneven") else "LORA")
    oracle = PeftModel.from_pretrained(tiny("bert", torch.float32), tmp_path).eval()
    torch.testing.assert_close(forward(oracle), forward(adapter.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "allocated"])
def test_a_site_at_rank_0_is_left_out_and_comes_back(method, tmp_path):
    from peft import PeftModel

    settings = SVD if method in ("adalora", "allocated") else {"rank": 4, "alpha": 3}
    adapter = variants.create(method, **settings).attach(tiny("bert", torch.float32).eval(), targets=TARGETS)
    fill(adapter, 0.3)
    variants.truncate(adapter, total_rank=4)
    ranks = {name: rank.item() for name, rank in adapter.ranks().items()}
    empty = [name for name, rank in ranks.items() if not rank]
    assert empty and sum(ranks.values()) == 4
    variants.save_pretrained(adapter, tmp_path)
    tensors = "".join(load_file(tmp_path / "adapter_model.safetensors"))
    assert all((f"{name}.lora_" in tensors) == (method in ("dora", "adalora")) for name in empty)
    again = loaded(tmp_path)
    assert type(again) is type(adapter) and {name: rank.item() for name, rank in again.ranks().items()} == ranks
    torch.testing.assert_close(forward(again.model), forward(adapter.model), rtol=0, atol=1e-5)
    oracle = PeftModel.from_pretrained(tiny("bert", torch.float32), tmp_path).eval()
    torch.testing.assert_close(forward(oracle), forward(adapter.model), rtol=0, atol=1e-5)
    for folder in (tmp_path / "once", tmp_path / "twice"):  # what came back is saved as it was
        variants.save_pretrained(again, folder)
        again = loaded(folder)
        assert {name: rank.item() for name, rank in again.ranks().items()} == ranks


@pytest.mark.parametrize("case", ["lora", "rslora", "dora", "adalora", "adalora+dora", "doublet", "truncated"])
def test_sites_that_grew_or_shrank_and_scales_that_changed_come_back(case, tmp_path):
    from peft import PeftModel

    adapter = make(case)
    sites = adapter.low_rank_sites()
    sizes = [site.slots.shape[1] for site in sites]
    places: list[Tensor | None] = [None] * len(sites)
    places[2] = torch.tensor([[*range(sizes[2]), -1, -1]])  # grown by two
    places[3] = torch.arange(1, sizes[3])[None]  # without its first slot
    adapter.resize(places)
    adapter.take_changes()
    with torch.no_grad():
        for index in (2, 4):
            sites[index].scale.mul_(1.37)
        grown = sites[2]
        grown.slots.fill_(1)
        grown.A[:, -2:], grown.B[:, :, -2:] = 0.3, torch.randn(grown.B[:, :, -2:].shape)
        if hasattr(grown, "kept"):
            grown.kept[:, -2:] = True
        if hasattr(grown, "E"):
            grown.E[:, -2:] = 0.6
    variants.save_pretrained(adapter, tmp_path)
    again = loaded(tmp_path)
    assert type(again) is type(adapter) and again.settings == adapter.settings
    torch.testing.assert_close(forward(again.model), forward(adapter.model), rtol=0, atol=1e-5)
    for counted in ("ranks", "live_ranks", "physical_ranks", "scales"):
        assert getattr(again, counted)() == getattr(adapter, counted)(), counted
    oracle = PeftModel.from_pretrained(tiny("bert", torch.float32), tmp_path).eval()
    torch.testing.assert_close(forward(oracle), forward(adapter.model), rtol=0, atol=1e-5)
    variants.export_lora(adapter, tmp_path / "plain")
    torch.testing.assert_close(forward(loaded(tmp_path / "plain").model), forward(adapter.model), rtol=0, atol=1e-5)
    loop = Loop(again, total=7)
    for step in range(7):  # training goes on in the new sizes, allocations and all
        assert loop.step(batch(0, step)).isfinite().all()


def test_conv1d_and_a_head_inside_a_folder_of_a_folder(tmp_path):
    adapter = variants.create("lora", rank=3, alpha=7).attach(tiny("gpt2", torch.float32).eval())
    fill(adapter, spread=0.3)
    variants.save_pretrained(adapter, tmp_path / "new" / "folder")
    config = json.loads((tmp_path / "new" / "folder" / "adapter_config.json").read_text())
    again = variants.load_pretrained(tiny("gpt2", torch.float32).eval(), tmp_path / "new" / "folder")
    assert torch.equal(forward(again.model), forward(adapter.model))
    assert config["fan_in_fan_out"] and config["modules_to_save"] == ["score"] and config["task_type"] == "SEQ_CLS"
    assert list(config) == sorted(config) and "rankwise" not in config


def test_an_alpha_that_was_edited_by_hand_is_obeyed(tmp_path):
    for case in ("lora", "dora", "adalora", "adalora+dora"):
        adapter = make(case)
        variants.save_pretrained(adapter, tmp_path / case)
        path = tmp_path / case / "adapter_config.json"
        config = json.loads(path.read_text())
        config["lora_alpha"] *= 2
        config["alpha_pattern"] = {key: 2 * value for key, value in config.get("alpha_pattern", {}).items()}
        path.write_text(json.dumps(config))
        again = loaded(tmp_path / case)
        name, site = list(adapter.named_sites())[1]
        double, inner = again.site(name), getattr(site, "inner", site)
        mine = torch.bmm(inner.B * inner.coefficients()[:, None], inner.A)
        inner = getattr(double, "inner", double)
        assert torch.allclose(torch.bmm(inner.B * inner.coefficients()[:, None], inner.A), 2 * mine, atol=1e-5), case


# -- which modules -----------------------------------------------------------------------------------------------------


class Nested(nn.Module):
    """Names that are ends of each other, keywords, and attributes of an nn.ModuleDict."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 5)
        self.mlp = nn.Linear(5, 4)
        self.keys = nn.Linear(4, 4)
        self.block = nn.ModuleDict({"lin": nn.Linear(4, 5), "mlp": nn.Linear(5, 4), "back": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.keys(torch.tanh(self.mlp(torch.tanh(self.lin(x)))))
        return self.block["back"](self.block["mlp"](torch.tanh(self.block["lin"](x))))


def nested() -> Nested:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Nested()


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_only_the_sites_that_were_trained_are_adapted_where_names_end_alike(method, tmp_path):
    from peft import PeftModel

    settings = {"rank": 2} if method == "lora" else {"initial_rank": 2, "target_rank": 1}
    adapter = variants.create(method, **settings, alpha=3, rank_pattern={"^lin": 3} if method == "lora" else {})
    adapter.attach(nested(), targets=["^lin", "^mlp", "keys", "back"])
    assert set(adapter.ranks()) == {"lin", "mlp", "keys", "block.back"}
    fill(adapter, spread=0.5)
    variants.save_pretrained(adapter, tmp_path)
    again = variants.load_pretrained(nested(), tmp_path)
    assert again.ranks() == adapter.ranks()
    oracle = PeftModel.from_pretrained(nested(), tmp_path)
    assert sorted(oracle.base_model.targeted_module_names) == sorted(adapter.ranks())
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(again.model(x), adapter.model(x), atol=1e-6)
    assert torch.allclose(oracle(x), adapter.model(x), atol=1e-6)


def test_a_head_whose_name_ends_like_another_module_loads_in_peft(tmp_path):
    """DistilBERT: PEFT takes pre_classifier for a part of the head, and asks for its values."""
    from peft import PeftModel
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    def distil() -> nn.Module:
        config = DistilBertConfig(vocab_size=64, dim=16, n_layers=1, n_heads=2, hidden_dim=24, num_labels=3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return DistilBertForSequenceClassification(config).eval()

    adapter = variants.create("lora", rank=2, alpha=4).attach(distil(), head=["classifier"])
    fill(adapter, spread=0.3)
    variants.save_pretrained(adapter, tmp_path)
    oracle = PeftModel.from_pretrained(distil(), tmp_path).eval()
    again = variants.load_pretrained(distil(), tmp_path)
    assert again.head_names == ["classifier"]
    assert torch.allclose(forward(oracle), forward(adapter.model), atol=1e-6)
    assert torch.equal(forward(again.model), forward(adapter.model))


def test_without_a_trained_head_the_models_own_stays(tmp_path):
    from peft import PeftModel

    adapter = variants.create("lora", rank=2, alpha=4).attach(tiny("bert", torch.float32).eval(), head=[])
    fill(adapter, spread=0.3)
    variants.save_pretrained(adapter, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] is None
    assert torch.equal(forward(loaded(tmp_path).model), forward(adapter.model))
    oracle = PeftModel.from_pretrained(tiny("bert", torch.float32), tmp_path).eval()
    assert torch.allclose(forward(oracle), forward(adapter.model), atol=1e-5)


# -- formats that are not PEFT's -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["full", "bitfit"])
def test_what_has_no_low_rank_form_says_so(case, tmp_path):
    adapter = make(case)
    with pytest.raises(ValueError, match=rf"{case} changes the model's own tensors.*cannot be written as LoRA"):
        variants.export_lora(adapter, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    variants.save_pretrained(adapter, tmp_path / "a")
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "rankwise"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["adapter_model.safetensors"]


@pytest.mark.parametrize("case", [*LOW_RANK_CASES, "head"])
def test_an_exported_lora_has_the_same_output(case, tmp_path):
    adapter = make(case)
    variants.export_lora(adapter, tmp_path)
    again = loaded(tmp_path)
    assert torch.allclose(forward(again.model), forward(adapter.model), atol=1e-5)
    has_magnitude = any(hasattr(site, "magnitude") for _, site in adapter.named_sites())
    assert again.method == ("head" if case == "head" else "dora" if has_magnitude else "lora")


def test_an_untrained_adalora_exports_to_a_lora_that_does_nothing(tmp_path):
    base = tiny("bert", torch.float32).eval()
    adapter = variants.create("adalora", **CASES["adalora"][1]).attach(base, targets=TARGETS, head=[])
    variants.export_lora(adapter, tmp_path)
    assert torch.equal(forward(loaded(tmp_path).model), forward(tiny("bert", torch.float32).eval()))


# -- whole or not at all ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["lora", "full"])
def test_a_full_disk_leaves_the_old_adapter(case, tmp_path):
    folder = tmp_path / "a"
    old = make("lora")
    variants.save_pretrained(old, folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    new = make(case)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            variants.save_pretrained(new, folder)
        with pytest.raises(OSError, match="File too large"):
            variants.save_pretrained(new, tmp_path / "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"], "nothing half-written"


def test_saving_again_replaces_the_adapter_and_nothing_else(tmp_path):
    variants.save_pretrained(make("lora"), tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.partial" / "left by a save that was killed").touch()
    variants.save_pretrained(make("full"), tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter_model.safetensors", "notes.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert loaded(tmp_path / "a").method == "full"
    (tmp_path / "umask").touch()
    mode = stat.S_IMODE((tmp_path / "umask").stat().st_mode)
    assert stat.S_IMODE((tmp_path / "a" / "adapter_model.safetensors").stat().st_mode) == mode


def test_saving_needs_an_attached_adapter_and_a_folder(tmp_path):
    adapter = make("lora")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file: give a folder"):
        variants.save_pretrained(adapter, tmp_path / "file")
    adapter.detach()
    with pytest.raises(ValueError, match="not attached to a model: call attach"):
        variants.save_pretrained(adapter, tmp_path / "a")


# -- what is wrong is refused ------------------------------------------------------------------------------------------------


def refused(folder, model: nn.Module | None = None) -> str:
    """The message; the model is as it was."""
    model = tiny("bert", torch.float32).eval() if model is None else model
    modules = dict(model.named_modules())
    values = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    with pytest.raises(ValueError) as caught:
        variants.load_pretrained(model, folder)
    assert dict(model.named_modules()) == modules
    for name, value in model.named_parameters():
        assert torch.equal(value, values[name][0]) and value.requires_grad == values[name][1], name
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


def edit(folder, tensors=None, metadata=None, **config) -> None:
    """Changes a saved folder: tensors takes the dict of tensors, metadata the "rankwise" object."""
    path = folder / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        facts = dict(file.metadata())
    values = load_file(path)
    if tensors is not None:
        tensors(values)
    if metadata is not None:
        told = json.loads(facts["rankwise"])
        metadata(told)
        facts["rankwise"] = json.dumps(told)
    save_file(values, path, metadata=facts)
    if (folder / "adapter_config.json").exists():
        told = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(told | config))


def test_a_pickle_is_not_opened(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "is a pickle, which can run any code" in refused(tmp_path) and "safe_serialization=True" in refused(tmp_path)


@pytest.mark.parametrize("case", ["lora", "full"])
def test_a_cut_off_file_is_refused(case, tmp_path):
    variants.save_pretrained(make(case), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = path.read_bytes()
    for length in (0, 5, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "cut off or no safetensors file" in refused(tmp_path), length
    path.write_bytes(b"\x80\x04" + whole)
    assert "cut off or no safetensors file" in refused(tmp_path)


def test_missing_files_are_named(tmp_path):
    assert "is no folder" in refused(tmp_path / "nowhere")
    assert "adapter_model.safetensors is missing" in refused(tmp_path)
    variants.save_pretrained(make("lora"), tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(text[:40])
    assert "is no JSON" in refused(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    assert "holds a list, not an object" in refused(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe\x00")
    assert "is no text" in refused(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    assert "adapter_config.json is missing" in refused(tmp_path)


UNSUPPORTED = [
    ({"peft_type": "LOKR"}, "peft_type = 'LOKR'"),
    ({"bias": "lora_only"}, "bias = 'lora_only'"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4' changes the base weight"),
    ({"lora_bias": True}, "lora_bias"),
    ({"target_parameters": ["experts.up"]}, "target_parameters"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
    ({"use_qalora": True}, "use_qalora"),
    ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
    ({"kasa_config": {"beta": 1}}, "kasa_config"),
]


@pytest.mark.parametrize(("change", "words"), UNSUPPORTED, ids=[next(iter(change)) for change, _ in UNSUPPORTED])
def test_what_is_not_supported_is_named(change, words, tmp_path):
    variants.save_pretrained(make("lora"), tmp_path)
    edit(tmp_path, **change)
    assert words in refused(tmp_path)


def test_unknown_keys_are_tolerated(tmp_path):
    variants.save_pretrained(make("lora"), tmp_path)
    edit(tmp_path, from_the_future={"a": 1}, peft_version="9.9", megatron_core="megatron.core", loftq_config={})
    assert loaded(tmp_path).method == "lora"


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


def drop(key: str):
    return lambda tensors: tensors.pop(key)


def put(key: str, value: Tensor):
    return lambda tensors: tensors.__setitem__(key, value)


WRONG_TENSORS = [
    ("lora", drop(f"{QUERY}.lora_B.weight"), "query lacks lora_B"),
    ("dora", drop(f"{QUERY}.lora_magnitude_vector"), "query lacks lora_magnitude_vector"),
    ("adalora", drop(f"{QUERY}.lora_E"), "query lacks lora_E"),
    ("lora", put(f"{QUERY}.lora_magnitude_vector", torch.ones(32)), "has lora_magnitude_vector"),
    ("lora", put(f"{QUERY}.lora_A.weight", torch.ones(3, 31)), r"shape \(3, 31\) where .* needs \(3, 32\)"),
    ("lora", put(f"{QUERY}.lora_A.weight", torch.ones(2, 32)), r"lora_B has shape \(32, 3\) where .* needs \(32, 2\)"),
    ("adalora", put(f"{QUERY}.lora_E", torch.ones(4, 1)), r"lora_E has shape \(4, 1\)"),
    ("lora", drop("base_model.model.classifier.weight"), "classifier.weight is missing"),
    ("lora", put("base_model.model.classifier.weight", torch.ones(2, 32)), r"shape \(2, 32\) where the model needs \(3, 32\)"),
    ("lora", put("base_model.model.nowhere.lora_A.weight", torch.ones(2, 2)), "nowhere is no module of Bert"),
    ("lora", put("base_model.model.bert.embeddings.LayerNorm.lora_A.weight", torch.ones(2, 2)), "is a LayerNorm: only"),
    (
        "lora",
        put("base_model.model.bert.embeddings.word_embeddings.lora_embedding_A", torch.ones(2, 2)),
        "lacks lora_embedding_B",
    ),
    ("lora", put(f"{QUERY}.lora_B.bias", torch.ones(32)), "lora_bias is not supported"),
    ("lora", put("base_model.model.bert.pooler.dense.weight", torch.ones(32, 32)), "belongs to no adapter and to no head"),
    ("lora", put("model.weight", torch.ones(2)), "does not start with base_model.model."),
    ("lora", lambda tensors: tensors.clear(), "a foreign file"),
    ("full", drop("bert.pooler.dense.bias"), "bert.pooler.dense.bias is missing"),
    ("full", put("bert.extra", torch.ones(2)), "bert.extra is not in Bert"),
    ("bitfit", put("bert.pooler.dense.bias", torch.ones(3)), r"shape \(3,\) where"),
]


@pytest.mark.parametrize(("case", "change", "words"), WRONG_TENSORS)
def test_tensors_that_are_wrong_are_named(case, change, words, tmp_path):
    variants.save_pretrained(make(case), tmp_path)
    edit(tmp_path, change)
    assert re.search(words, refused(tmp_path))


WRONG_CONFIG = [
    ("lora", {"r": 4}, "query has rank 3 in adapter_model.safetensors and 4 in adapter_config.json"),
    ("lora", {"r": None}, "r = None is no number"),
    ("lora", {"rank_pattern": {"query": 7}}, "and 7 in"),
    ("lora", {"rank_pattern": {"(": 7}}, "is no regular expression"),
    ("lora", {"rank_pattern": [7]}, "is no object of patterns"),
    ("lora", {"alpha_pattern": {"query": "much"}}, "alpha_pattern = {'query': 'much'} is no object of patterns with numbers"),
    ("lora", {"modules_to_save": "classifier"}, "is no list of names"),
    ("lora", {"modules_to_save": []}, "belongs to no adapter and to no head"),
    ("lora", {"lora_alpha": -2}, "lora.alpha = -2: should be greater than 0"),
    ("lora", {"lora_dropout": 1.5}, "lora.dropout = 1.5"),
    ("adalora", {"rank_pattern": None}, "holds 0"),
    ("adalora", {"rank_pattern": {}}, "holds 0"),
    ("adalora", {"init_r": 6}, "is no list of init_r = 6 truth values"),
    ("adalora", {"rank_pattern": "all"}, "is no object of modules with lists"),
    ("adalora+dora", {"r": 5}, "in the metadata"),
]


@pytest.mark.parametrize(("case", "change", "words"), WRONG_CONFIG)
def test_a_configuration_that_contradicts_the_tensors_is_refused(case, change, words, tmp_path):
    variants.save_pretrained(make(case), tmp_path)
    edit(tmp_path, **change)
    if case == "lora" and {"lora_dropout", "lora_alpha"} & set(change):
        edit(tmp_path, metadata=lambda facts: facts.update(settings={"rank": 3, "alpha": 1.5}))
    if "lora_dropout" in change:
        edit(tmp_path, lora_alpha=6)
    assert words in refused(tmp_path)


def test_a_rank_pattern_that_contradicts_the_tensors_is_refused(tmp_path):
    variants.save_pretrained(make("adalora"), tmp_path)
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    name = next(iter(pattern))
    edit(tmp_path, rank_pattern=pattern | {name: [True] * 5})
    assert "keeps 5 of 5 triplets" in refused(tmp_path)
    edit(tmp_path, rank_pattern=pattern | {name: [1, 0, 0, 0, 0]})
    assert "truth values" in refused(tmp_path)
    edit(tmp_path, rank_pattern=pattern | {"elsewhere.lora_E": [False] * 5})
    assert "names elsewhere.lora_E" in refused(tmp_path)


WRONG_FACTS = [
    ("lora", {"schema": 2}, "schema 2.*of another version of rankwise"),
    ("full", {"method": "soup"}, "'soup' is of another version"),
    ("lora", {"settings": None}, "settings = None in its metadata is no dict"),
    ("lora", {"settings": {"rnak": 3}}, "did you mean .rank."),
    ("adalora", {"kept": {}}, "is None, not 5 bits"),
    ("adalora+dora", {"folded": {}}, "without its singular values"),
]


@pytest.mark.parametrize(("case", "change", "words"), WRONG_FACTS)
def test_metadata_that_is_wrong_is_refused(case, change, words, tmp_path):
    variants.save_pretrained(make(case), tmp_path)
    edit(tmp_path, metadata=lambda facts: facts.update(change))
    model = tiny("bert", torch.float32).eval()
    with pytest.raises(ValueError, match=words):
        variants.load_pretrained(model, tmp_path)


def test_a_model_that_has_an_adapter_or_another_shape_is_refused(tmp_path):
    adapter = make("lora")
    variants.save_pretrained(adapter, tmp_path)
    with pytest.raises(ValueError, match="has an adapter already: detach it first"):
        variants.load_pretrained(adapter.model, tmp_path)
    assert "is no module of GPT2ForSequenceClassification" in refused(tmp_path, tiny("gpt2", torch.float32))


def test_a_diverged_member_is_not_folded(tmp_path):
    adapter = make("adalora+dora")
    with torch.no_grad():
        next(adapter.named_sites())[1].inner.E[0, 1] = float("nan")
    with pytest.raises(ValueError, match="singular values that are not finite: this member diverged"):
        variants.save_pretrained(adapter, tmp_path / "a")
    assert not list(tmp_path.iterdir())
