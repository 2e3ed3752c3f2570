"""Checkpoints: the same function comes back, or an error says why and the model is as it was."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import structlin as sl
from structlin import checkpoint
from structlin.nn import share_router_
from structlin.quantization import quantize_factors_
from structlin.testing import examples


class Model(nn.Module):
    def __init__(self, width=16, tied=True):
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.body = nn.ModuleDict({"a[0]*": nn.Linear(width, width), "b": nn.Linear(width, width, bias=False)})
        self.scale = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, 32, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(7))

    def forward(self, tokens):
        return self.head(self.scale * self.body["b"](torch.tanh(self.body["a[0]*"](self.embed(tokens)))))


def seeded(seed, **how):
    torch.manual_seed(seed)
    return Model(**how)


def structured(seed=0, **how):
    model = seeded(seed, **how)
    sl.to_structured_(model, {"*b": sl.LowRank(rank=4), "head": None, "*": sl.Monarch(nblocks=2)})
    with torch.no_grad():
        model.scale.normal_()
        model.steps.fill_(11)
    return model


def tokens():
    return torch.arange(32).reshape(2, 16)


def fingerprint(model):
    state = model.state_dict(keep_vars=True)
    return str(model), {name: (id(tensor), tensor._version, tensor.dtype) for name, tensor in state.items()}


def refused(folder, message, model=None):
    """`load` must refuse with `message`, in words of ValueError, and leave the model alone."""
    model = model or seeded(5)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message) as error:
        sl.load(model, folder)
    assert fingerprint(model) == before
    return str(error.value)


def edit(folder, **changes):
    """Change the header of a checkpoint in both of its places."""
    header = json.loads((folder / checkpoint.STRUCTURES).read_text()) | changes
    state = load_file(folder / checkpoint.WEIGHTS)
    save_file(state, folder / checkpoint.WEIGHTS, metadata={"structlin": json.dumps(header)})
    (folder / checkpoint.STRUCTURES).write_text(json.dumps(header))


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of `structured()`."""
    sl.save(structured(), tmp_path / "run")
    return tmp_path / "run"


def test_a_dense_model_takes_structures_weights_and_buffers(folder):
    saved, model = structured(), seeded(5)
    assert sl.load(model, folder) is model
    assert str(model) == str(saved)
    for (name, ours), (other, theirs) in zip(model.state_dict().items(), saved.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs)
    assert torch.equal(model(tokens()), saved(tokens()))
    assert model.head.weight is model.embed.weight


def test_a_meta_model_takes_over_the_tensors_with_their_dtype(folder):
    with torch.device("meta"):
        model = Model()
    model.body["b"].requires_grad_(False)
    sl.load(model, folder)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert torch.equal(model(tokens()), structured()(tokens()))
    assert model.head.weight is model.embed.weight
    assert isinstance(model.head.weight, nn.Parameter)
    assert not model.body["b"].down.requires_grad
    assert model.scale.requires_grad
    (model(tokens()).sum() + 0).backward()


def test_meta_dtype_comes_from_the_file_and_own_dtype_stays(tmp_path):
    sl.save(structured().to(torch.bfloat16), tmp_path / "run")
    with torch.device("meta"):
        model = Model()
    sl.load(model, tmp_path / "run", device=torch.device("cpu"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model(tokens()), structured().to(torch.bfloat16)(tokens()))
    model = sl.load(seeded(5), tmp_path / "run")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.scale, structured().scale.bfloat16().float())


def test_a_model_that_is_structured_already_is_filled(folder):
    model = structured(seed=3)
    before = {id(p) for p in model.parameters()}
    sl.load(model, folder)
    assert {id(p) for p in model.parameters()} == before
    assert torch.equal(model(tokens()), structured()(tokens()))


def test_a_model_without_structures_and_a_bare_layer_go_through(tmp_path):
    plain = seeded(0)
    sl.save(plain, tmp_path / "plain")
    assert torch.equal(sl.load(seeded(1), tmp_path / "plain")(tokens()), plain(tokens()))
    layer = sl.StructuredLinear(16, 24, sl.Dyad(4))
    sl.save(layer, tmp_path / "layer")
    again = sl.load(sl.StructuredLinear(16, 24, sl.Dyad(4)), tmp_path / "layer")
    assert torch.equal(again.to_dense().weight, layer.to_dense().weight)


@pytest.mark.parametrize(("spec", "shape"), examples(), ids=str)
def test_every_structure_goes_through(spec, shape, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    sl.to_structured_(model, {"*": spec})
    sl.save(model, tmp_path / "run")
    again = sl.load(nn.Sequential(nn.Linear(shape[1], shape[0])), tmp_path / "run")
    assert again[0].spec == spec
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter)


def test_a_module_under_two_names_goes_through(tmp_path):
    def twice():
        model = nn.ModuleDict({"a": nn.Linear(16, 16), "c": nn.Sequential(nn.Linear(16, 16))})
        model["b"], model["d"] = model["a"], model["c"]
        return model

    model = twice()
    sl.to_structured_(model, {"*": sl.LowRank(4)})
    sl.save(model, tmp_path / "run")
    for fresh in (twice(), twice().to("meta")):
        sl.load(fresh, tmp_path / "run")
        assert torch.equal(fresh["b"].down, model["a"].down)
        assert torch.equal(fresh["d"][0].up, model["c"][0].up)
        assert fresh["b"].down is fresh["a"].down
    stored = load_file(tmp_path / "run" / checkpoint.WEIGHTS)
    assert sorted(stored) == ["a.bias", "a.down", "a.up", "c.0.bias", "c.0.down", "c.0.up"]


def test_tied_tensors_are_stored_once_and_tied_again(folder):
    header = json.loads((folder / checkpoint.STRUCTURES).read_text())
    assert header["tied"] == {"head.weight": "embed.weight"}
    assert "head.weight" not in load_file(folder / checkpoint.WEIGHTS)
    for model in (seeded(5, tied=False), seeded(5, tied=False).to("meta")):
        sl.load(model, folder)
        assert model.head.weight is model.embed.weight


def test_tied_buffers_go_through(tmp_path):
    def make(value):
        model = nn.Sequential(nn.Module(), nn.Module())
        model[0].register_buffer("table", torch.full((3,), value))
        model[1].register_buffer("table", model[0].table)
        return model

    sl.save(make(4.0), tmp_path / "run")
    for model in (make(0.0), make(0.0).to("meta")):
        sl.load(model, tmp_path / "run")
        assert model[1].table is model[0].table
        assert model[1].table.tolist() == [4, 4, 4]


def test_a_tie_that_was_not_saved_is_refused(tmp_path):
    sl.save(structured(tied=False), tmp_path / "run")
    message = refused(tmp_path / "run", "does not fit the model")
    assert "head.weight and embed.weight are one tensor in the model, but were saved as two" in message


def test_different_tensors_in_one_memory_are_saved_as_two(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Module(), nn.Module())
    model[1].weight = nn.Parameter(model[0].weight.data)
    base = torch.arange(6.0)
    model[2].register_buffer("part", base[:4])
    model[3].register_buffer("part", base[2:])
    sl.save(model, tmp_path / "run")
    stored = load_file(tmp_path / "run" / checkpoint.WEIGHTS)
    assert {name: tensor.tolist() for name, tensor in stored.items()} == {
        name: tensor.tolist() for name, tensor in model.state_dict().items()
    }


def test_views_that_are_lazy_are_saved_as_what_they_are(tmp_path):
    model = nn.Module()
    value = torch.randn(3, 2, dtype=torch.complex64)
    model.register_buffer("conjugate", value.conj())
    model.register_buffer("negative", value.conj().imag)
    model.register_buffer("transposed", value.T)
    sl.save(model, tmp_path / "run")
    stored = load_file(tmp_path / "run" / checkpoint.WEIGHTS)
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())


def test_a_complex_model_goes_through_and_a_real_one_refuses_it(tmp_path):
    layer = sl.StructuredLinear(16, 16, sl.Monarch(4), dtype=torch.complex64)
    sl.save(layer, tmp_path / "run")
    again = sl.load(sl.StructuredLinear(16, 16, sl.Monarch(4), dtype=torch.complex64), tmp_path / "run")
    assert torch.equal(again.first, layer.first)
    real = sl.StructuredLinear(16, 16, sl.Monarch(4))
    message = refused(tmp_path / "run", "does not fit the model", real)
    assert "first is torch.complex64, which torch.float32 of the model cannot hold" in message


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(4, 4, device="meta"), "weight is not a dense tensor with values"),
        (sl.StructuredLinear(4, 4, sl.LowRank(2), dtype=torch.complex128), "down is complex128, which safetensors"),
    ],
    ids=["meta", "complex128"],
)
def test_what_cannot_be_saved_is_refused_and_the_old_save_stays(folder, module, message):
    with pytest.raises(ValueError, match=message):
        sl.save(module, folder)
    assert torch.equal(sl.load(seeded(5), folder)(tokens()), structured()(tokens()))
    assert os.listdir(folder.parent) == ["run"]


def test_a_save_replaces_its_own_and_leaves_nothing_else_behind(folder):
    sl.save(structured(seed=2), str(folder))
    assert sorted(os.listdir(folder)) == [checkpoint.WEIGHTS, checkpoint.STRUCTURES]
    assert os.listdir(folder.parent) == ["run"]
    assert torch.equal(sl.load(seeded(5), folder)(tokens()), structured(seed=2)(tokens()))


def test_folders_are_made_and_an_empty_one_or_a_link_is_used(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("empty", "link", "new/deep"):
        sl.save(structured(), tmp_path / name)
        assert torch.equal(sl.load(seeded(5), tmp_path / name)(tokens()), structured()(tokens()))
    assert (tmp_path / "link").is_symlink()


def test_a_relative_folder_is_the_one_below(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sl.save(structured(), "run")
    os.chdir("run")
    sl.save(structured(seed=2), ".")
    assert torch.equal(sl.load(seeded(5), tmp_path / "run")(tokens()), structured(seed=2)(tokens()))


@pytest.mark.parametrize("names", [["notes.txt"], ["model.safetensors"], ["structures.json", "optimizer.pt"]])
def test_a_folder_with_other_files_is_not_replaced(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("precious")
    with pytest.raises(ValueError, match=r"holds more than a checkpoint.*choose another folder") as error:
        sl.save(structured(), tmp_path)
    assert names[-1] in str(error.value)
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    assert all((tmp_path / name).read_text() == "precious" for name in names)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("precious")
    with pytest.raises(ValueError, match="is a file; a checkpoint is a folder"):
        sl.save(structured(), tmp_path / "run")
    assert (tmp_path / "run").read_text() == "precious"


@pytest.mark.parametrize("step", ["save_file", "rename"])
def test_a_save_that_fails_leaves_the_old_one(folder, monkeypatch, step):
    def fail(*arguments, **named):
        raise OSError(28, "No space left on device")

    def rename(self, target):
        return fail() if self.name.endswith(".tmp") else real(self, target)

    real = Path.rename
    if step == "rename":
        monkeypatch.setattr(Path, "rename", rename)
    else:
        monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        sl.save(structured(seed=2), folder)
    monkeypatch.undo()
    assert os.listdir(folder.parent) == ["run"]
    assert torch.equal(sl.load(seeded(5), folder)(tokens()), structured()(tokens()))


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.STRUCTURES])
def test_a_folder_that_is_no_whole_checkpoint_is_refused(folder, name):
    (folder / name).unlink()
    refused(folder, f"is not a checkpoint: it has no {name}")
    refused(folder / "nowhere", f"is not a checkpoint: it has no {checkpoint.WEIGHTS}")


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_a_truncated_weights_file_is_refused(folder, kept):
    path = folder / checkpoint.WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    refused(folder, "is damaged: ")


@pytest.mark.parametrize("text", [b"", b'{"format": 1', b"\xff\xfe", b"nonsense"])
def test_damaged_structures_are_refused(folder, text):
    (folder / checkpoint.STRUCTURES).write_bytes(text)
    refused(folder, "is damaged: ")


def test_weights_that_others_wrote_are_refused(folder):
    path = folder / checkpoint.WEIGHTS
    save_file(load_file(path), path)
    refused(folder, "disagree; they come from different saves")
    torch.save(structured().state_dict(), path)
    refused(folder, "is damaged: ")


def test_files_of_two_saves_are_refused(folder, tmp_path):
    other = seeded(1)
    sl.to_structured_(other, {"*b": sl.LowRank(rank=4)})
    sl.save(other, tmp_path / "other")
    (tmp_path / "other" / checkpoint.STRUCTURES).replace(folder / checkpoint.STRUCTURES)
    refused(folder, "structures.json and the header of model.safetensors disagree; they come from different saves")


def test_a_newer_format_is_refused_with_the_version_that_wrote_it(folder):
    edit(folder, format=3, structlin="9.8.7")
    refused(folder, r"has format 3, written by structlin 9\.8\.7; this is structlin .* install a newer one")


def test_an_unknown_structure_is_refused_by_layer(folder):
    edit(folder, structures={"body.b": {"structure": "monrach", "nblocks": 2}})
    refused(folder, "layer 'body.b': unknown structure 'monrach'; did you mean 'monarch'?")


def test_every_tensor_that_does_not_fit_is_named(folder):
    state = load_file(folder / checkpoint.WEIGHTS)
    with safe_open(folder / checkpoint.WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    del state["body.b.down"]
    state["extra"] = torch.zeros(2)
    state["scale"] = torch.zeros(3)
    state["steps"] = torch.tensor(7.5)
    save_file(state, folder / checkpoint.WEIGHTS, metadata=metadata)
    message = refused(folder, "does not fit the model:")
    assert message.splitlines()[1:] == [
        "  body.b.down is missing",
        "  extra is not in the model",
        "  scale is [3], the model wants [16]",
        "  steps is torch.float32, which torch.int64 of the model cannot hold",
    ]


def test_a_model_of_another_width_or_without_the_layer_is_refused(folder):
    message = refused(folder, "does not fit the model:", seeded(5, width=32))
    assert "body.a[0]*.first is [2, 2, 4, 8], the model wants [2, 2, 8, 16]" in message
    assert "embed.weight is [32, 16], the model wants [32, 32]" in message
    without = seeded(5)
    without.body["b"] = nn.Identity()
    refused(folder, "the model has no linear layer 'body.b', which was saved as low_rank:rank=4", without)
    refused(folder, re.escape("nblocks=2 does not"), seeded(5, width=15))


def test_a_model_with_other_structures_is_refused(folder):
    model = seeded(5)
    sl.to_structured_(model, {"*b": sl.Dyad(4)})
    refused(folder, "body.b is dyad:nblocks=4, saved low_rank:rank=4", model)
    sl.save(seeded(5), folder)
    refused(folder, "body.b is dyad:nblocks=4, saved dense", model)


def test_a_layer_that_conversion_refuses_leaves_the_model_alone(folder):
    model = seeded(5)
    model.body["b"].register_forward_hook(lambda module, inputs, output: output)
    refused(folder, "cannot convert the model:\n  body.b .* has hooks", model)


def test_no_pickle_is_written_or_read(folder):
    assert (folder / checkpoint.WEIGHTS).read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x04")
    source = Path(checkpoint.__file__).read_text()
    assert "torch.load" not in source
    assert "import pickle" not in source


def test_what_could_not_be_loaded_again_is_not_saved_over_what_can(tmp_path):
    def converted():
        model = nn.Sequential(nn.Linear(16, 16))
        sl.to_structured_(model, {"*": sl.Monarch(nblocks=4)})
        return model

    model = converted()
    sl.save(model, tmp_path / "made")
    quantized, partly, weighted = converted(), converted(), converted()
    quantize_factors_(quantized)
    sl.normalise_(partly)
    parametrize.remove_parametrizations(partly[0], "first")
    parametrizations.weight_norm(weighted[0], "second")
    for odd, said in (
        (quantized, "0: first is parametrized by LowBit, which a checkpoint does not keep"),
        (partly, "0: is normalised, but for first"),
        (weighted, "0: second is parametrized by _WeightNorm"),
    ):
        with pytest.raises(ValueError, match=said):
            sl.save(odd, tmp_path / "made")
    loaded = sl.load(nn.Sequential(nn.Linear(16, 16)), tmp_path / "made")
    assert torch.equal(loaded[0].first, model[0].first)


def test_a_model_that_is_one_layer_keeps_its_gains_and_its_guide(tmp_path):
    for change in (sl.normalise_, lambda layer: sl.guide_(layer, 10)):
        layer = sl.StructuredLinear(16, 16, sl.Monarch(nblocks=4))
        change(layer)
        sl.save(layer, tmp_path / "layer")
        loaded = sl.load(sl.StructuredLinear(16, 16, sl.Monarch(nblocks=4)), tmp_path / "layer")
        assert loaded.state_dict().keys() == layer.state_dict().keys()
        x = torch.randn(3, 16)
        assert torch.equal(loaded(x), layer(x))


def test_layers_that_share_a_router_do_so_when_they_are_loaded(tmp_path):
    def dense():
        return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))

    model = dense()
    sl.to_structured_(model, {"*": sl.btt_moe(experts=4)})
    share_router_(model)
    nn.init.normal_(model[0].router.weight)
    sl.save(model, tmp_path / "shared")
    assert json.loads((tmp_path / "shared" / checkpoint.STRUCTURES).read_text())["follows"] == {"1": "0"}
    loaded = sl.load(dense(), tmp_path / "shared")
    assert loaded[1].router is loaded[0].router
    assert not loaded[1].leads
    x = torch.randn(5, 16)
    assert torch.equal(loaded(x), model(x))


def test_buffers_that_are_not_saved_need_values_of_their_own(tmp_path):
    def table():
        model = nn.Sequential(nn.Linear(16, 16))
        model.register_buffer("angles", torch.arange(4.0), persistent=False)
        return model

    model = table()
    sl.to_structured_(model, {"0": sl.Monarch(nblocks=4)})
    sl.save(model, tmp_path / "made")
    assert sl.load(table(), tmp_path / "made").angles.tolist() == [0, 1, 2, 3]
    with torch.device("meta"):
        empty = table()
    with pytest.raises(ValueError, match="angles is a buffer on the meta device that no checkpoint holds"):
        sl.load(empty, tmp_path / "made")
    assert type(empty[0]) is nn.Linear
