"""Weights in torch's pickles load as in transformers, and never run code (`make parity`)."""

import json
import os
import pickle
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from llama_jax.errors import UserError
from llama_jax.interchange import peft
from llama_jax.interchange.hf import HfSource
from llama_jax.interchange.loading import load_hf
from llama_jax.interchange.meta import MetaSource
from llama_jax.interchange.pickles import load, read_tensors
from llama_jax.interchange.transfer import convert
from llama_jax.parallel.sharding import param_shardings
from llama_jax.train.step import abstract_state
from tests.helpers import mesh_of, random_params, replace
from tests.interchange.test_transfer import GROUPED, Memory, assert_same
from tests.reference import mutations

pytestmark = pytest.mark.parity

NAME = "pytorch_model.bin"
TIED = replace(GROUPED, model__tied_embeddings=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "hf"
    convert(Memory(GROUPED, random_params(GROUPED.model)), "hf", folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """Returns a Hugging Face folder with safetensors, which a test turns into pickles."""
    return shutil.copytree(whole, tmp_path / "hf")


def taken(folder):
    """Removes the folder's safetensors file and returns its tensors."""
    import safetensors.torch

    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    file.unlink()
    return tensors


def save(tensors, folder, name=NAME, **options):
    import torch

    torch.save(tensors, folder / name, **options)


def save_shards(tensors, folder, **options):
    names = sorted(tensors)
    parts, weight_map = [names[0::3], names[1::3], names[2::3]], {}
    for number, part in enumerate(parts):
        file = f"pytorch_model-{number + 1:05d}-of-00003.bin"
        save({name: tensors[name] for name in part}, folder, file, **options)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{NAME}.index.json").write_text(json.dumps(index))


def each(change):
    return lambda tensors: {name: change(tensor) for name, tensor in tensors.items()}


def padded(tensor):
    """Returns the same numbers as a view of every second element of a larger tensor."""
    import torch

    return torch.stack((tensor, torch.zeros_like(tensor)), -1)[..., 0]


def parameters(tensors):
    import torch

    return {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}


def one_storage(tensors):
    """Returns all tensors as views of one storage."""
    import torch

    whole = torch.cat([tensor.flatten() for tensor in tensors.values()])
    views = whole.split([tensor.numel() for tensor in tensors.values()])
    return {n: view.view(t.shape) for (n, t), view in zip(tensors.items(), views, strict=True)}


def with_frequencies(tensors):
    import torch

    more = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    return {**tensors, **more}


def state_dict(tensors):
    """Returns the tensors as a module's state_dict: an ordered dict with version metadata."""
    import torch

    module = torch.nn.ParameterDict({n.replace(".", "/"): t for n, t in tensors.items()})
    state = module.state_dict()
    for name in list(state):
        state[name.replace("/", ".")] = state.pop(name)
    assert state._metadata is not None
    return state


FORMS = {
    "plain": (each(lambda x: x), {}),
    "old format": (each(lambda x: x), {"_use_new_zipfile_serialization": False}),
    "transposed": (each(lambda x: x.t().contiguous().t()), {}),
    "padded": (each(padded), {}),
    "padded, old format": (each(padded), {"_use_new_zipfile_serialization": False}),
    "parameters": (parameters, {}),
    "views": (one_storage, {}),
    "views, old format": (one_storage, {"_use_new_zipfile_serialization": False}),
    "frequencies": (with_frequencies, {}),
    "state": (state_dict, {}),
}


def theirs(folder, dtype="auto"):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()


@pytest.mark.parametrize("form", FORMS)
def test_what_transformers_reads_is_read(folder, form):
    import torch

    change, options = FORMS[form]
    tensors = taken(folder)
    save(change(tensors), folder, **options)
    if form in ("padded", "old format"):
        assert_same(HfSource(folder), random_params(GROUPED.model))
        (folder / NAME).unlink()
        save_shards(change(tensors), folder, **options)
    for name, tensor in theirs(folder).items():
        assert torch.equal(tensor, tensors[name]), name
    assert_same(HfSource(folder), random_params(GROUPED.model))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(folder, dtype):
    import ml_dtypes
    import torch

    tensors = {name: x.to(getattr(torch, dtype)) for name, x in taken(folder).items()}
    save(tensors, folder)
    source = HfSource(folder)
    assert source.description.dtype == dtype
    kind = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(kind), random_params(GROUPED.model))
    assert_same(source, params)
    for name, tensor in theirs(folder).items():
        assert torch.equal(tensor, tensors[name].float()), name  # float32, from config.json


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_a_tied_model_whose_matrix_is_there_twice(tmp_path, options):
    folder, params = tmp_path / "hf", random_params(TIED.model)
    convert(Memory(TIED, params), "hf", folder)
    tensors = taken(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save(tensors, folder, **options)
    assert_same(HfSource(folder), params)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    save(tensors, folder, **options)
    with pytest.raises(UserError, match="lm_head.weight is not the embedding"):
        HfSource(folder)


def test_devices_read_their_parts(folder):
    save_shards(each(padded)(taken(folder)), folder)
    source, params = HfSource(folder), random_params(GROUPED.model)
    mesh = mesh_of((1, 2, 2, 1))
    with jax.set_mesh(mesh):
        shardings = param_shardings(abstract_state(GROUPED).params, mesh)
        loaded = load_hf(folder, source.description.config, shardings)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    part = source.read_part("layers/attn/wq", 1, (slice(3, 9), slice(1, 3), slice(None)))
    np.testing.assert_array_equal(part, params["layers"]["attn"]["wq"][1, 3:9, 1:3])


def test_a_run_begins_with_a_pickle(folder):
    from llama_jax.interchange.loading import load_init
    from llama_jax.interchange.opening import open_init

    save_shards(taken(folder), folder)
    config = replace(HfSource(folder).description.config, init_from=f"hf:{folder}")
    mesh = mesh_of((1, 1, 2, 1))
    with jax.set_mesh(mesh):
        loaded = load_init(
            open_init(config), config, param_shardings(abstract_state(config).params, mesh)
        )
    jax.tree.map(np.testing.assert_array_equal, loaded, random_params(GROUPED.model))


class Malice:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self._path = str(path)

    def __reduce__(self):
        return (open, (self._path, "w"))


def evil_zip(value, file):
    save(value, file.parent, file.name)


def evil_old(value, file):
    save(value, file.parent, file.name, _use_new_zipfile_serialization=False)


def evil_plain(value, file):
    file.write_bytes(pickle.dumps(value, protocol=2))


@pytest.mark.parametrize("write", [evil_zip, evil_old, evil_plain])
@pytest.mark.parametrize("kind", ["hf", "shard", "adapters", "meta"])
def test_code_is_never_run(folder, tmp_path, kind, write):
    made = tmp_path / "made"
    values = {"model.norm.weight": Malice(made)}
    with open(os.devnull) as _:  # plain pickle.loads does create the file
        pickle.loads(pickle.dumps(Malice(made))).close()  # noqa: S301
    assert made.exists()
    made.unlink()
    if kind in ("hf", "shard"):
        save_shards(taken(folder), folder)
        if kind == "hf":
            (folder / f"{NAME}.index.json").unlink()
        file = folder / (NAME if kind == "hf" else "pytorch_model-00002-of-00003.bin")
        read = lambda: HfSource(folder)  # noqa: E731
    elif kind == "adapters":
        file = folder / peft.PICKLE
        read = lambda: peft._entries(epath.Path(folder))  # noqa: E731
    else:
        file = folder / "consolidated.00.pth"
        (folder / "params.json").write_text("{}")
        read = lambda: MetaSource(folder)  # noqa: E731
    write(values, file)
    with pytest.raises(UserError, match="is not a file of weights, or damaged: it asks for") as e:
        read()
    assert "open" in str(e.value) and len(str(e.value).splitlines()) == 1
    assert file.name in str(e.value) and not made.exists()


def others():
    import torch

    one = torch.ones(3)
    return {
        "list": [one],
        "tensor": one,
        "nothing": {},
        "nested": {"state_dict": {"a": one}},
        "number": {"a": one, "step": 3},
        "number as a name": {1: one},
        "sparse": {"a": torch.eye(3).to_sparse()},
        "quantised": {"a": torch.quantize_per_tensor(one, 0.1, 0, torch.qint8)},
        "no memory": {"a": torch.empty(3, device="meta")},
        "float64": {"a": one.double()},
        "int8": {"a": one.to(torch.int8)},
        "complex": {"a": one + 1j},
        "boolean": {"a": one > 0},
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_other_things_than_weights(tmp_path):
    import torch

    file = epath.Path(tmp_path / NAME)
    for kind, value in others().items():
        torch.save(value, file)
        with pytest.raises(UserError) as error:
            read_tensors(file)
        message = str(error.value)
        assert f"{NAME} is not a file of weights" in message or ": a has dtype" in message, kind
        assert len(message.splitlines()) == 1, kind


def test_files_that_are_no_pickles(tmp_path):
    file = epath.Path(tmp_path / NAME)
    for content in (b"", b"hi", b"\x80", b"PK\x03\x04", b"<html>" * 99, bytes(1000)):
        file.write_bytes(content)
        with pytest.raises(UserError, match="is not a file of weights, or damaged") as e:
            load(file)
        assert len(str(e.value).splitlines()) == 1
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="Git LFS"):
        load(file)
    with pytest.raises(UserError, match="copy the folder"):
        load(epath.Path("gs://bucket/pytorch_model.bin"))


@pytest.mark.parametrize("old", [False, True])
def test_changes_of_a_pickle_end_in_one_line(folder, old):
    """300 changes of a file of weights give arrays of the stated shapes or a one-line error."""
    tensors = {"a": next(iter(taken(folder).values())), "b": 3}
    del tensors["b"]
    save(tensors, folder, _use_new_zipfile_serialization=not old)
    file, read = epath.Path(folder / NAME), 0
    for content in mutations.of_bytes(file.read_bytes(), 300):
        file.write_bytes(content)
        try:
            found = read_tensors(file)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            continue
        for entry in found.values():
            assert entry.rows().shape == entry.shape
        read += 1
    assert read < 300
