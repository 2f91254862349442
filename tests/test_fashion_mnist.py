"""Fashion-MNIST as it is read, and the model that comes with it: out of a package of Debian, out of an ONNX graph."""

import gzip
import hashlib
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rankwise.experiments import sources, tasks
from rankwise.experiments.sources import Carrier, Unavailable, conversion
from rankwise.experiments.tasks import fashion_mnist
from safetensors.numpy import load_file

from tests.test_catalogue import CONTENT, leftovers, make_entry

# -- the task --------------------------------------------------------------------------------------------------------------


def idx(path: Path, values: np.ndarray) -> Path:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A small one: 200 training and 30 test images, of 2 x 3 pixels."""
    random = np.random.default_rng(0)
    for part, count in (("train", 200), ("t10k", 30)):
        idx(tmp_path / f"{part}-images-idx3-ubyte.gz", random.integers(0, 256, (count, 2, 3), dtype=np.uint8))
        idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 10)
    monkeypatch.setattr(sources, "fetch", lambda name: tmp_path)
    monkeypatch.setattr(fashion_mnist, "VALIDATION", 20)
    return tmp_path


def test_images_and_labels_are_read_and_a_tenth_of_each_class_is_kept_out(folder):
    read = {split: fashion_mnist.read(split) for split in ("train", "validation", "test")}
    assert {split: len(examples) for split, examples in read.items()} == {"train": 180, "validation": 20, "test": 30}
    assert np.bincount(read["validation"].labels).tolist() == [2] * 10
    content = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())  # as its authors say: from byte 16
    assert read["test"].first[7].values.tobytes() == content[16 + 7 * 6 : 16 + 8 * 6]
    assert read["test"].first[7].image().getpixel((2, 1)) == (content[16 + 7 * 6 + 5],) * 3
    digests = [{picture.digest for picture in read[split].first} for split in ("train", "validation")]
    assert len(digests[0] | digests[1]) == 200
    assert fashion_mnist.read("validation").labels.tolist() == read["validation"].labels.tolist()


def test_broken_files_are_refused(folder):
    path = folder / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for content, said in (
        (whole[:60], "no whole gzip file"),
        (gzip.compress(b"\0\0\x0d\x01abcd"), "no idx file of bytes"),
        (gzip.compress(gzip.decompress(whole)[:-1]), "179 values where its header says 30 x 2 x 3"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"t10k-images-idx3-ubyte.gz: {said}"):
            fashion_mnist.parse(path)
    idx(path, np.zeros((29, 2, 3), np.uint8))
    with pytest.raises(ValueError, match=r"images of shape \(29, 2, 3\) and labels of shape \(30,\)"):
        fashion_mnist.official.__wrapped__("test", folder)


def test_without_a_package_of_debian_the_hubs_copy_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        Unavailable, match=r'no apt-get here; hub: give its copy as data of your own \(\[\[data\]\] train = "zal'
    ):
        fashion_mnist.read("test")


@pytest.mark.network
def test_the_official_parts_are_fetched_whole(monkeypatch):
    for name in ("RANKWISE_CACHE", "PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    try:
        examples = tasks.get("fashion-mnist").load()
    except Unavailable as error:
        pytest.skip(str(error))
    assert {split: len(one) for split, one in examples.items()} == {"train": 54_000, "validation": 6_000, "test": 10_000}
    assert all(np.bincount(one.labels).tolist() == [len(one) // 10] * 10 for one in examples.values())
    assert examples["test"].first[0].values.shape == (28, 28) and examples["test"].labels[:4].tolist() == [9, 2, 1, 1]


# -- a package of Debian ---------------------------------------------------------------------------------------------------


def make_deb(path: Path, content=CONTENT) -> Carrier:
    files = io.BytesIO()
    with tarfile.open(fileobj=files, mode="w:xz") as tar:
        for name, data in content.items():
            member = tarfile.TarInfo(f"./usr/share/thing/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    archive = b"!<arch>\n"
    for name, data in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", files.getvalue())):
        archive += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    path.write_bytes(archive)
    members = {name: f"usr/share/thing/{name}" for name in CONTENT}
    return Carrier("thing=1.0-1", path.name, hashlib.sha256(archive).hexdigest(), len(archive), members, is_debian=True)


def test_files_come_out_of_a_package_of_debian_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    carrier = make_deb(tmp_path / "thing_1.0-1_all.deb")
    with pytest.raises(Unavailable, match="a package of Debian, and there is no apt-get here"):
        sources.fetch(make_entry(carrier))
    apt = tmp_path / "bin" / "apt-get"  # which copies the package into the folder that it is called in
    apt.parent.mkdir()
    apt.write_text(f'#!/bin/sh\n[ "$*" = "download thing=1.0-1" ] && /bin/cp {tmp_path}/*.deb .\n')
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", str(apt.parent))
    with pytest.raises(Unavailable, match=r"wrong hash of thing_1\.0-1_all\.deb"):
        sources.fetch(make_entry(replace(carrier, sha256="0" * 64)))
    with pytest.raises(Unavailable, match="does not hold what it should"):
        sources.fetch(make_entry(make_deb(tmp_path / "thing_1.0-1_all.deb", {"a.txt": CONTENT["a.txt"]})))
    for odd in (b"!<arch>\nnothing", b"no archive"):
        (tmp_path / "thing_1.0-1_all.deb").write_bytes(odd)
        with pytest.raises(Unavailable, match="does not hold what it should"):
            sources.fetch(make_entry(replace(carrier, sha256=hashlib.sha256(odd).hexdigest())))
    assert leftovers(tmp_path / "cache") == []
    made = sources.fetch(make_entry(make_deb(tmp_path / "thing_1.0-1_all.deb")))
    assert {path.name: path.read_bytes() for path in made.iterdir()} == CONTENT
    apt.write_text("#!/bin/sh\necho 'E: Unable to locate package thing' >&2; exit 100\n")
    with pytest.raises(Unavailable, match="apt-get download failed: Unable to locate package thing"):
        sources.fetch(replace(make_entry(carrier), id="owner/other"))


# -- an ONNX graph ---------------------------------------------------------------------------------------------------------


def test_a_dinov2_comes_out_of_an_onnx_graph_with_every_weight_in_its_place(tmp_path):
    """One block, width 64; the other network's parts and its products without a bias are left where they are."""
    onnx, transformers = pytest.importorskip("onnx"), pytest.importorskip("transformers")
    random = np.random.default_rng(0)

    def drawn(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    attention, mlp = "encoder.layer.0.attention", "encoder.layer.0.mlp"
    linears = [f"{attention}.attention.{one}" for one in ("query", "key", "value")] + [f"{attention}.output.dense"]
    shapes = dict.fromkeys(linears, (64, 64)) | {f"{mlp}.fc1": (128, 64), f"{mlp}.fc2": (64, 128)}
    weights = {f"{name}.weight": drawn(*shape) for name, shape in shapes.items()}
    weights |= {f"{name}.bias": drawn(shape[0]) for name, shape in shapes.items()}
    weights |= {f"encoder.layer.0.norm{n}.{part}": drawn(64) for n in (1, 2) for part in ("weight", "bias")}
    weights |= {f"encoder.layer.0.layer_scale{n}.lambda1": drawn(64) for n in (1, 2)}
    weights |= {"layernorm.weight": drawn(64), "layernorm.bias": drawn(64), "embeddings.cls_token": drawn(1, 1, 64)}
    weights |= {
        f"embeddings.patch_embeddings.projection.{n}": v for n, v in (("weight", drawn(64, 3, 4, 4)), ("bias", drawn(64)))
    }
    first, patches = drawn(1, 1, 64), drawn(1, 9, 64)
    arrays = {f"backbone.{n}": v for n, v in weights.items() if n.removesuffix(".weight") not in shapes}
    arrays |= {
        "onnx::Concat_7": first,
        "onnx::Reshape_9": patches,
        "decoder.final.weight": drawn(3, 64),
        "onnx::MatMul_1": drawn(64, 3),
    }
    nodes = [onnx.helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["y"])]
    for number, name in enumerate(shapes):
        arrays[f"onnx::MatMul_{90 + number}"] = np.ascontiguousarray(weights[f"{name}.weight"].T)
        inputs = [f"backbone.{name}.bias", f"product {number}"][:: 1 if number % 2 else -1]  # in either order
        nodes.append(onnx.helper.make_node("MatMul", ["x", f"onnx::MatMul_{90 + number}"], [f"product {number}"]))
        nodes.append(onnx.helper.make_node("Add", inputs, [f"sum {number}"]))
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in arrays.items()]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], tensors)), tmp_path / "model.onnx")
    out = tmp_path / "out"
    out.mkdir()
    conversion._from_onnx(tmp_path, "model.onnx", out)
    weights["embeddings.position_embeddings"] = np.concatenate([first, patches], axis=1)
    found = load_file(out / "model.safetensors")
    assert found.keys() == weights.keys() and all(np.array_equal(found[name], value) for name, value in weights.items())
    config = json.loads((out / "config.json").read_text())
    assert (config["image_size"], config["patch_size"], config["num_attention_heads"], config["mlp_ratio"]) == (12, 4, 1, 2)
    model, loading = transformers.AutoModel.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert np.array_equal(model.state_dict()["encoder.layer.0.mlp.fc2.weight"].numpy(), weights[f"{mlp}.fc2.weight"])
    assert transformers.AutoImageProcessor.from_pretrained(out, backend="pil").crop_size["height"] == 224


@pytest.mark.network
@pytest.mark.slow
def test_the_converted_dinov2_computes_what_its_graph_computes(monkeypatch):
    """At the last layer norm, by onnx's own slow evaluator."""
    onnx, torch = pytest.importorskip("onnx"), pytest.importorskip("torch")
    from onnx.reference import ReferenceEvaluator
    from rankwise.experiments import models

    for name in ("RANKWISE_CACHE", "PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    task = SimpleNamespace(kind="image-classification", num_labels=10)
    try:
        model, _, info = models.load("dinov2-small-saliency", task)
    except Unavailable as error:
        pytest.skip(str(error))
    assert info.num_parameters == 22_056_192 + 7_690 and info.heads == ("classifier",)
    whole = onnx.load(info.folder.parent / "vit_s_focus.onnx")
    nodes = list(whole.graph.node)
    last = next(i for i, node in enumerate(nodes) if node.op_type == "Add" and "backbone.layernorm.bias" in node.input)
    (output,) = nodes[last].output
    shown = [onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None)]
    graph = onnx.helper.make_graph(nodes[: last + 1], "part", list(whole.graph.input), shown, list(whole.graph.initializer))
    part = onnx.helper.make_model(graph, opset_imports=whole.opset_import, ir_version=whole.ir_version)
    pixels = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
    (expected,) = ReferenceEvaluator(part).run(None, {"input_image": pixels})
    with torch.no_grad():
        found = model.dinov2(pixel_values=torch.from_numpy(pixels)).last_hidden_state
    np.testing.assert_allclose(found.numpy(), expected, atol=5e-5)
