"""`rankwise plan`: every figure beside what a real step takes, the arithmetic that people quote, and its refusals."""

import json

import pytest
import torch
from rankwise.experiments import kinds, sources
from rankwise.experiments.bench import planned
from rankwise.experiments.cli.plan import in_bytes, readable
from rankwise.experiments.plan import shapes, step
from rankwise.experiments.plan.live import Taken, unique_bytes
from rankwise.variants.adapter.kinds.scheme import Scheme
from rankwise.variants.settings import METHODS

from tests import contract, image_models, language_models, small_world
from tests.command import rankwise
from tests.tiers import STAND_INS, quick


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(small_world.model(tmp_path_factory.mktemp("plan") / "model"))


def settings(method: str) -> dict:
    return {key: value[0] if isinstance(value, list) else value for key, value in contract.settings(method).items()}


def test_storages_are_counted_from_their_first_use_to_their_end():
    before = torch.randn(10)
    with Taken([before]) as taken:
        one = torch.zeros(1000)
        view = one.view(10, 100)[3:]
        assert taken.now == 4000
        product = view @ torch.zeros(100, 5)  # 2000 bytes, and 140 of the result
        assert (taken.now, taken.products) == (4140, 2 * 7 * 100 * 5)
        del one, product
        assert taken.now == 4000 and taken.peak == 6140  # the view holds the whole storage
        before.add_(1)
        del view
    assert taken.now == 0 and unique_bytes([before, before[2:]]) == 40


@pytest.mark.parametrize("checkpointing", quick([False, True], [True]))
@pytest.mark.parametrize("method", quick(METHODS, {*STAND_INS, "dylora"}))
def test_the_peak_is_that_of_a_real_step(model, method, checkpointing):
    """On tiny tensors nothing is large enough to hide a forgotten one."""
    members = 3 if METHODS[method].load().packable else 1
    shape = step.Shape(8, 24, members, checkpointing=checkpointing)
    one = {key: value for key, value in settings(method).items()}
    if METHODS[method].load().needs is not None:
        pytest.skip("its ranks come from what it measures: a plan takes equal ones")
    if checkpointing and not METHODS[method].load().checkpointable:
        with pytest.raises(ValueError, match=f"{method} cannot train with gradient checkpointing: plan without it"):
            planned.compared(planned.Case(model, "classification", method, shape), one)
        return
    row = planned.compared(planned.Case(model, "classification", method, shape), one)
    assert row["ratio"] == pytest.approx(1.0, abs=0.06), row


DECODED = ("generation", "choice", "language-modelling")  # kinds of language models


@pytest.mark.parametrize("kind", kinds.names())
def test_every_kind_has_an_example_of_its_shapes(tmp_path, model, kind):
    """A new kind is tried on an encoder of text, where nothing else is said of it."""
    if kinds.get(kind).has_images:
        model = image_models.saved(tmp_path / "vit")
    elif kind in DECODED:
        model = language_models.saved("llama", tmp_path / "llama")
    row = planned.compared(planned.Case(model, kind, "lora", step.Shape(4, 16)), settings("lora"))
    assert row["ratio"] == pytest.approx(1.0, abs=0.06), row


def test_a_weight_that_two_modules_share_is_trained_once(tmp_path):
    """GPT-2's output layer is its embedding; at this size the count of the peak is rough."""
    model = language_models.saved("gpt2", tmp_path / "gpt2")
    row = planned.compared(planned.Case(model, "generation", "full", step.Shape(2, 8)), {})
    assert row["planned_optimizer_bytes"] == row["measured_optimizer_bytes"] > 0


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_images_are_as_large_as_a_study_says(tmp_path, name):
    model = image_models.saved(tmp_path / name, name)
    rows = {
        size: planned.compared(
            planned.Case(model, "image-classification", "lora", step.Shape(4, 16, image_size=size)), settings("lora")
        )
        for size in (None, image_models.SIDE, 2 * image_models.SIDE)
    }
    for row in rows.values():
        assert row["ratio"] == pytest.approx(1.0, abs=0.06), row
    assert rows[None]["planned_bytes"] == rows[image_models.SIDE]["planned_bytes"]
    assert rows[2 * image_models.SIDE]["planned_bytes"] > 2 * rows[None]["planned_bytes"]


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_a_step_is_timed_and_planned_beside_it(tmp_path, name):
    """The rate is that of a model of one layer; dinov2's configuration names layers that it does not have."""
    case = planned.Case(image_models.saved(tmp_path / name, name), "image-classification", "lora", step.Shape(4, 16))
    row = planned.compared(case, settings("lora"), is_timed=True)
    assert row["measured_seconds"] > 0 and row["planned_seconds"] > 0
    assert row["seconds_ratio"] == pytest.approx(row["planned_seconds"] / row["measured_seconds"])
    again = planned.compared(case, settings("lora"), is_timed=True, before={**row, "measured_bytes": row["planned_bytes"]})
    assert again["measured_seconds"] == row["measured_seconds"] and again["ratio"] == 1.0  # nothing is measured twice


def test_what_a_step_takes_is_the_sum_of_its_parts(model):
    kind = kinds.get("classification")
    one, packed = (step.cost(model, kind, 3, "lora", {"rank": 4}, step.Shape(8, 24, members)) for members in (1, 5))
    assert (
        packed.trainable == one.trainable and packed.gradients == 5 * one.gradients and packed.optimizer == 2 * packed.gradients
    )
    assert one.gradients == 4 * (one.trainable + one.head) and packed.weights == one.weights
    assert one.peak > one.weights + one.adapter + one.optimizer + one.activations
    pieces = step.cost(model, kind, 3, "lora", {"rank": 4}, step.Shape(8, 24, accumulation=4))
    assert pieces.activations < one.activations and pieces.products == one.products


def test_active_parameters_are_those_at_the_end(model):
    kind = kinds.get("classification")
    pruned = step.cost(model, kind, 3, "adalora", {"initial_rank": 6, "target_rank": 2}, step.Shape(2, 8))
    small = step.cost(model, kind, 3, "adalora", {"initial_rank": 2, "target_rank": 2}, step.Shape(2, 8))
    assert pruned.trainable == 3 * small.trainable and pruned.active == small.active == small.trainable
    budgeted = {"initial_rank": 6, "target_rank": 2, "cost": "parameters", "target_parameters": 1000}
    assert step.cost(model, kind, 3, "adalora", budgeted, step.Shape(2, 8)).active == 1000


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("states", ["8-bit", "32-bit"])
def test_averages_are_counted_as_they_are_stored(tmp_path, states, method):
    """Large enough that tensors reach 4,096 numbers, below which they stay in fp32."""
    model = str(small_world.model(tmp_path / "model"))
    shape = step.Shape(2, 8, members=3 if method == "lora" else 1, optimizer_states=states)
    settings = {"rank": 200} if method == "lora" else {}
    row = planned.compared(planned.Case(model, "classification", method, shape), settings)
    assert row["ratio"] == pytest.approx(1.0, abs=0.06), row
    assert row["planned_optimizer_bytes"] == row["measured_optimizer_bytes"] > 0


@pytest.mark.parametrize("form", [Scheme("nf4"), Scheme("nf4", True), Scheme("int8")], ids=str)
def test_the_peak_over_a_quantised_base_is_that_of_a_real_step(model, form):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    shape = step.Shape(8, 24, precision="bf16", quantization=form)
    row = planned.compared(planned.Case(model, "classification", "lora", shape), settings("lora"))
    assert row["ratio"] == pytest.approx(1.0, abs=0.06), row


def test_bits_of_a_quantised_weight_are_those_of_the_paper():
    """Dettmers et al. 2023, sec. 3: 0.5 bits a weight for the scales of blocks of 64, 0.127 with double quantization."""
    kind, plain = kinds.get("classification"), step.Shape(1, 8, precision="bf16")
    dense = step.cost("all-MiniLM-L6-v2", kind, 3, "lora", {"rank": 8}, plain).weights
    linears = 6 * (4 * 384**2 + 2 * 384 * 1536)
    for form, bits in ((Scheme("nf4"), 4.5), (Scheme("nf4", True), 4.127), (Scheme("int8"), 8.067)):
        shape = step.Shape(1, 8, precision="bf16", quantization=form)
        packed = step.cost("all-MiniLM-L6-v2", kind, 3, "lora", {"rank": 8}, shape).weights
        assert 8 * (packed - dense + 2 * linears) / linears == pytest.approx(bits, abs=0.01)
    with pytest.raises(ValueError, match="trains the base's own weights"):
        step.cost("all-MiniLM-L6-v2", kind, 3, "full", {}, step.Shape(1, 8, quantization=Scheme("nf4")))


# -- the arithmetic that practitioners quote ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("targets", "rank", "parameters"), [(["q_proj"], 8, 2_097_152), (["q_proj", "v_proj"], 8, 4_194_304)])
def test_lora_of_llama_7b_has_the_parameters_that_are_quoted(targets, rank, parameters):
    from rankwise import variants

    model = shapes.build("llama-7b", kinds.get("generation"), 0, "bf16")
    total = sum(p.numel() for p in model.parameters())
    assert total == 6_738_415_616
    adapter = variants.create("lora", rank=rank).attach(model, targets, head=[])
    assert int(adapter.parameter_counts()["trainable"]) == parameters
    # Full fine-tuning with AdamW in fp32: weights, gradients, two averages; about 108 GB, not 280.
    assert 16 * total == pytest.approx(108e9, rel=0.01)


@pytest.mark.parametrize(
    ("size", "sites", "rank", "parameters", "share"),
    [
        (1024, 1, 8, 16_384, 1.5625e-2),
        (4096, 1, 8, 65_536, 3.90625e-3),
        (12_288, 96, 16, 37_748_736, None),  # GPT-3's queries alone: not 1.4M, as is said
    ],
)
def test_lora_of_square_matrices_has_the_parameters_that_are_quoted(size, sites, rank, parameters, share):
    from rankwise import variants

    with torch.device("meta"):
        model = torch.nn.ModuleDict({f"q{i}": torch.nn.Linear(size, size, bias=False) for i in range(sites)})
    adapter = variants.create("lora", rank=rank).attach(model, head=[])
    assert int(adapter.parameter_counts()["trainable"]) == parameters
    assert share is None or parameters / size**2 == pytest.approx(share)


@pytest.mark.slow
def test_what_a_rank_and_a_base_in_four_bits_take_of_large_models():
    """Twice the rank at query and value of 7B costs 67 MB, not 8 GB; of 8 GB, 13B in 4 bits leaves less than one."""
    kind = kinds.get("generation")
    shape = step.Shape(1, 8, precision="bf16", targets=["q_proj", "v_proj"])
    low, high = (step.cost("llama-7b", kind, 0, "lora", {"rank": rank}, shape) for rank in (8, 16))
    parts = [cost.adapter + cost.gradients + cost.optimizer for cost in (low, high)]
    assert parts[1] - parts[0] == pytest.approx(16 * 4_194_304, rel=1e-3)
    assert high.peak - low.peak < 70e6
    packed = step.Shape(1, 8, precision="bf16", targets=["q_proj"], quantization=Scheme("nf4", True))
    found = step.cost("llama-13b", kind, 0, "lora", {"rank": 8}, packed)
    assert found.weights == pytest.approx(7.2e9, rel=0.01) and 8e9 - found.peak < 1e9


@pytest.mark.parametrize(("name", "billions"), [("llama-13b", 13.016), ("llama-70b", 68.977), ("mistral-7b", 7.242)])
def test_shapes_that_travel_have_the_published_sizes(name, billions):
    model = shapes.build(name, kinds.get("generation"), 0, "bf16")
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.001)


@pytest.mark.parametrize("name", [name for name, entry in sources.CATALOGUE.items() if entry.kind == "model"])
@pytest.mark.slow
def test_a_model_of_the_catalogue_is_planned_before_it_is_fetched(name, tmp_path, monkeypatch):
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path))
    kind = "image-classification" if "dinov2" in name else "generation" if "LM" in name.partition("-")[0] else "classification"
    assert step.cost(name, kinds.get(kind), 2, "lora", {"rank": 2}, step.Shape(1, 16)).trainable > 0


# -- the command -------------------------------------------------------------------------------------------------------------

FIELDS = {"method", "trainable_parameters", "active_parameters", "weights_bytes", "adapter_bytes", "gradient_bytes"}
FIELDS |= {"optimizer_bytes", "activation_bytes", "logits_bytes", "peak_bytes", "fits", "seconds_per_step"}


def test_the_command_says_what_fits_and_what_a_rank_costs(model, capsys):
    words = (
        "plan",
        "--model",
        model,
        "--kind",
        "classification",
        "--batch-size",
        4,
        "--length",
        16,
        "--json",
        "--precision",
        "fp32",
    )
    assert rankwise(*words, "--memory", "50MB", "--curve", "lora") == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == ["full", "lora", "adalora", "dora"] and set(rows["lora"]) >= FIELDS
    assert all(row["fits"] and row["seconds_per_step"] > 0 for row in rows.values())
    curve = {point["rank"]: point for point in found["curve"]}
    assert curve[8]["trainable_parameters"] == rows["lora"]["trainable_parameters"]
    assert curve[8]["peak_bytes"] == pytest.approx(rows["lora"]["peak_bytes"], rel=0.02)
    largest = rows["lora"]["largest_batch"]
    kind = kinds.get("classification")
    for batch, fits in ((largest - 1, True), (int(1.02 * largest), False)):
        cost = step.cost(model, kind, 2, "lora", {"rank": 8, "alpha": 16.0}, step.Shape(batch, 16))
        assert (cost.peak <= 50 * 10**6) is fits
    assert rankwise(*words[:-3], "--no-time", "--methods", "lora,dora", "--precision", "bf16") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Nothing was trained or downloaded" in shown and "bf16" in shown and "adalora" not in shown


def test_averages_in_eight_bits_are_a_quarter_and_offloaded_ones_are_not_on_the_device(model, capsys):
    from rankwise.experiments.training.stored_states import STORED

    words = ("plan", "--model", model, "--kind", "classification", "--methods", "lora", "--rank", 200, "--batch-size", 2)
    words += ("--length", 8, "--no-time", "--precision", "fp32")
    found = {}
    for states in STORED:
        assert rankwise(*words, "--json", "--optimizer-states", states) == 0
        found[states] = json.loads(capsys.readouterr().out)["rows"][0]
    assert found["offloaded"]["optimizer_bytes"] == 0
    assert 0.25 < found["8-bit"]["optimizer_bytes"] / found["32-bit"]["optimizer_bytes"] < 0.27
    assert found["8-bit"]["peak_bytes"] < found["32-bit"]["peak_bytes"]
    assert rankwise(*words, "--optimizer-states", "8-bit") == 0
    assert "fp32, averages in 8 bits" in " ".join(capsys.readouterr().out.split())


STUDY = """
name = "x"
model = "{model}"
tasks = ["glue/stsb"]
quick = true
pack = 4
[training]
max_length = 16
[budget]
equal = "parameters"
parameters = 6000
[defaults]
learning_rate = 1e-3
[[methods]]
method = "adalora"
cost = "parameters"
[[methods]]
method = "lora"
[[methods]]
method = "lora"
label = "learned"
ranks_of = "adalora"
"""


def test_a_study_is_planned_with_the_ranks_of_its_budget(model, tmp_path, capsys):
    file = tmp_path / "x.toml"
    file.write_text(STUDY.format(model=model))
    assert rankwise("plan", file, "--no-time", "--json") == 0
    captured = capsys.readouterr()
    rows = {row["method"]: row for row in json.loads(captured.out)["rows"]}
    assert 5000 < rows["lora"]["trainable_parameters"] <= 6000 and rows["lora"]["members"] == 4
    assert rows["adalora"]["active_parameters"] == 6000 < rows["adalora"]["trainable_parameters"]
    assert rows["learned"]["peak_bytes"] == rows["lora"]["peak_bytes"]
    assert "learned takes the ranks of adalora's run: planned with equal ones" in captured.err


@pytest.mark.parametrize("task", ["squad/v1", "e2e-nlg", "metamathqa", "commonsense", "alpaca-mmlu"])
def test_a_task_whose_rows_are_counted_when_it_is_read_is_planned_before(task, tmp_path, capsys):
    kind = "llama" if task != "squad/v1" else "bert"
    where = language_models.saved(kind, tmp_path / kind) if kind == "llama" else small_world.model(tmp_path / kind)
    lines = [f'name = "planned"\nmodel = "{where}"\ntasks = ["{task}"]\nseeds = 1\nquick = true']
    lines += ["[training]\nbatch_size = 4\nmax_length = 24", '[[methods]]\nmethod = "lora"\nrank = 2\nlearning_rate = 1e-3']
    (tmp_path / "study.toml").write_text("\n".join(lines))
    assert rankwise("plan", tmp_path / "study.toml", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["method"] == "lora" and row["peak_bytes"] > row["weights_bytes"] > 0


def test_no_terms_are_asked_for_where_no_data_is_read(capsys):
    assert rankwise("plan", "fair", "--no-time", "--json", "--methods", "head") == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 4


def test_a_study_of_images_is_planned_with_their_size(tmp_path, capsys):
    assert rankwise("plan", "dinov2", "--no-time", "--methods", "head") == 0
    assert "16 images of 56 x 56 pixels a member at a time" in " ".join(capsys.readouterr().out.split())
    model = image_models.saved(tmp_path / "vit")
    words = ("plan", "--model", model, "--kind", "image-classification", "--methods", "head", "--no-time")
    assert rankwise(*words) == 0
    assert "8 images as large as its configuration says" in " ".join(capsys.readouterr().out.split())
    assert rankwise(*words, "--length", 16) == 2
    assert "--length 16: rows of kind = image-classification have no tokens: take it out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "no/such-model"], "no/such-model: its configuration is not here, and nothing is downloaded"),
        (["--memory", "24"], "--memory 24: give a number with its unit"),
        (["--memory", "0GB"], "--memory 0GB: give"),
        (["--batch-size", "4"], "--batch-size has no effect without --model"),
        (["placing", "--model", "llama-7b"], "--model llama-7b: a study, placing, is given too"),
        (["--model", "llama-7b", "--kind", "poetry"], 'kind = "poetry"'),
        (["--model", "llama-7b", "--methods", "lora,lorax"], '"lorax" is not in'),
        (["--model", "llama-7b", "--quantization", "nf5"], "--quantization nf5: give nf4 or int8"),
        (["--model", "llama-7b", "--double-quantization"], "has no effect with no quantization"),
        (["--model", "llama-7b", "--optimizer-states", "4-bit"], "--optimizer-states 4-bit: give 32-bit, 8-bit or offloaded"),
        (["--optimizer-states", "8-bit"], "--optimizer-states has no effect without --model"),
        (["--precision", "fp8"], "--precision fp8: give fp32 or bf16"),
        (["--model", "all-MiniLM-L6-v2", "--no-time"], "it is an encoder, whose tokens see those after them"),
    ],
)
def test_what_cannot_be_planned_is_one_line(words, said, capsys):
    assert rankwise("plan", *words) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_sizes_are_read_and_written_in_units():
    assert in_bytes("24GB") == 24 * 10**9 and in_bytes("1.5 GiB") == 3 * 2**29 and in_bytes("512MB") == 512 * 10**6
    assert readable(134_000_000_000) == "134 GB" and readable(5_310_000) == "5.31 MB" and readable(7) == "7 B"


def test_a_rank_curve_is_of_a_method_with_one_rank(model, capsys):
    words = ("plan", "--model", model, "--kind", "classification", "--length", 16, "--no-time", "--curve", "adalora")
    assert rankwise(*words) == 2
    assert "adalora: a curve of ranks is of a method that has one rank from start to end" in capsys.readouterr().err
