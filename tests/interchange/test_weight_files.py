"""The weights of a folder come from the files that transformers would load."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from llama_jax.errors import UserError
from llama_jax.interchange.hf import HfSource, name_of
from llama_jax.interchange.transfer import convert
from llama_jax.interchange.weight_files import open_weights
from tests.helpers import ROOT, random_params
from tests.interchange.test_transfer import GROUPED, Memory, flat, sharded
from tests.reference import mutations

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Returns a folder: `model` in shards, and `other`, another model in a single file."""
    folder = tmp_path_factory.mktemp("folders")
    convert(Memory(GROUPED, random_params(GROUPED.model)), "hf", folder / "model")
    (folder / "model" / SINGLE).unlink()
    sharded(folder / "model")
    convert(Memory(GROUPED, random_params(GROUPED.model, 5)), "hf", folder / "other")
    return folder


@pytest.fixture
def folder(folders, tmp_path):
    """Returns a copy of the model in shards; `other` is its sibling."""
    return shutil.copytree(folders, tmp_path / "folders") / "model"


def index_of(folder):
    return json.loads((folder / INDEX).read_text())


def reindex(folder, **changes):
    values = index_of(folder)
    values["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(values))


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def join(folder):
    """Writes all tensors to one file next to the shards, and returns them."""
    arrays = {}
    for file in shards(folder):
        arrays |= safetensors.numpy.load_file(file)
    safetensors.numpy.save_file(arrays, folder / SINGLE, {"format": "pt"})
    return arrays


def only_single(folder):
    join(folder)
    for file in (*shards(folder), folder / INDEX):
        file.unlink()


def index_of_one_file(folder):
    """Writes an index of the single file, as some tools do."""
    weight_map = dict.fromkeys(join(folder), SINGLE)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def add(file, **tensors):
    arrays = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file({**arrays, **tensors}, file, {"format": "pt"})


def of_mistral(folder):
    other = safetensors.numpy.load_file(folder.parent / "other" / SINGLE)
    renamed = {name.removeprefix("model."): array for name, array in other.items()}
    safetensors.numpy.save_file(renamed, folder / "consolidated.safetensors")


def stale(folder):
    """Adds a shard of an export with another number of files."""
    shutil.copy(folder.parent / "other" / SINGLE, folder / "model-00001-of-00002.safetensors")


def variant(folder):
    shutil.copy(folder.parent / "other" / SINGLE, folder / "model.fp16.safetensors")


def twice_the_same(folder):
    first, last = (shards(folder)[i] for i in (0, -1))
    weight_map = index_of(folder)["weight_map"]
    name = next(name for name in weight_map if weight_map[name] == last.name)
    add(first, **{name: safetensors.numpy.load_file(last)[name]})


def twice(folder, chosen):
    """Stores different values of one tensor in two shards; the index names one of them."""
    first, last = shards(folder)[0], folder / index_of(folder)["weight_map"][UP]
    assert first != last
    add(first, **{UP: np.zeros((48, 32), np.float32)})
    add(last, **{UP: np.ones((48, 32), np.float32)})
    reindex(folder, **{UP: (first, last)[chosen].name})


def named(file):
    def change(folder):
        shutil.move(folder.parent / "other" / SINGLE, folder / "weights.safetensors")
        values = json.loads((folder / "config.json").read_text())
        values["transformers_weights"] = file
        (folder / "config.json").write_text(json.dumps(values))

    return change


def pickle_beside(folder):
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    (folder / "pytorch_model.bin.index.json").write_bytes(b"never read")


READ = {  # transformers reads these, too
    "shards": lambda folder: None,
    "single": only_single,
    "an index of the single file": index_of_one_file,
    "pickles beside": pickle_beside,
    "Mistral's file beside": of_mistral,
    "a stale shard beside": stale,
    "a variant beside": variant,
    "a tensor twice, the same": twice_the_same,
    "a tensor twice, the last one named": lambda folder: twice(folder, 1),
    "a tensor at another place": lambda f: reindex(f, **{UP: shards(f)[0].name}),
    "named by config.json": named("weights.safetensors"),
    "an index named by config.json": named(INDEX),
}


def adapters_beside(folder):
    golden = epath.Path(ROOT) / "tests" / "goldens" / "peft" / "adapter_config.json"
    golden.copy(folder / golden.name)


REFUSED = {
    "single and index": (join, f"has {SINGLE} and {INDEX}: .*move one of the two away"),
    "another single and index": (
        lambda f: shutil.copy(f.parent / "other" / SINGLE, f / SINGLE),
        f"has {SINGLE} and {INDEX}: .*move one of the two away",
    ),
    "a tensor twice, the first one named": (
        lambda folder: twice(folder, 0),
        rf"{UP} is in model-00001\S+ and in model-\S+ with other numbers",
    ),
    "adapters": (adapters_beside, "has config.json and adapter_config.json: "),
    "no index": (lambda f: (f / INDEX).unlink(), f"several safetensors files, but no {INDEX}"),
    "a shard less": (lambda f: shards(f)[1].unlink(), f"lacks {'model-00002'}.*which {INDEX}"),
    "a tensor less": (lambda f: reindex(f, x=shards(f)[0].name), f"lacks x, which {INDEX} names"),
    "the folder": (lambda f: reindex(f, x="."), r"names files outside its folder: \."),
    "above": (lambda f: reindex(f, x=".."), r"names files outside its folder: \.\."),
    "nothing": (lambda f: reindex(f, x=""), "names files outside its folder: "),
    "absolute": (lambda f: reindex(f, x="/etc/passwd"), "outside its folder: /etc/passwd"),
    "backslash": (lambda f: reindex(f, x="..\\a"), "outside its folder: "),
    "zero": (lambda f: reindex(f, x="a\0"), r"lacks 'a\\x00', which"),
    "a number": (lambda f: reindex(f, x=3), "is damaged: it has no weight_map"),
    "not a shard": (lambda f: reindex(f, x="config.json"), "config.json is not a safetensors file"),
    "named elsewhere": (named("../x.safetensors"), "names files outside its folder"),
    "named and missing": (named("x.safetensors"), r"lacks x.safetensors, which config.json \(tr"),
    "named pickle": (named("x.bin"), "names 'x.bin', which is not a safetensors file"),
    "named number": (named(3), "names 3, which is not a safetensors file"),
}


@pytest.mark.parametrize("case", READ)
def test_folders_that_are_read(folder, case):
    READ[case](folder)
    source = HfSource(folder)
    values = random_params(GROUPED.model, 5 if case == "named by config.json" else 0)
    w3 = values["layers"]["mlp"]["w3"]
    if case == "a tensor twice, the last one named":
        w3[1] = 1
    np.testing.assert_array_equal(source.read("layers/mlp/w3", 1), w3[1])
    np.testing.assert_array_equal(source.read("embed", None), values["embed"])


@pytest.mark.parametrize("case", REFUSED)
def test_folders_that_are_refused(folder, case):
    change, message = REFUSED[case]
    change(folder)
    with pytest.raises(UserError, match=message) as caught:
        HfSource(folder)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", [*READ, "a tensor twice, the first one named", "adapters"])
def test_transformers_reads_the_same(folder, case):
    """For a folder that we read, transformers loads equal arrays; for a refused one, others."""
    import transformers

    change = READ.get(case) or REFUSED[case][0]
    change(folder)
    if case == "adapters":
        shutil.copy(epath.Path(ROOT) / "tests/goldens/peft/adapter_model.safetensors", folder)
    state = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    if case == "adapters":
        assert any("lora_A" in name for name in state)
        return
    if case not in READ:  # it reads the last file; the index names the first
        assert (state[UP].numpy() == 1).all()
        return
    source = HfSource(folder)
    for path, arrays in flat(random_params(GROUPED.model)).items():
        for layer in range(len(arrays)) if path.startswith("layers/") else (None,):
            theirs = state[name_of(path, layer)].numpy()
            ours = source.read(path, layer)
            if path != "embed":
                theirs = theirs.T
            np.testing.assert_array_equal(ours.reshape(theirs.shape), theirs, path)


def test_changes_of_the_index_end_in_one_line(folder):
    """400 changes of an index give the right weights or a one-line error."""
    wanted, read = open_weights(epath.Path(folder))[UP].rows(), 0
    for content in mutations.of_json_file((folder / INDEX).read_bytes(), 400):
        (folder / INDEX).write_bytes(content)
        try:
            found = open_weights(epath.Path(folder))[UP].rows()
        except UserError as error:
            assert len(str(error).splitlines()) == 1, content
            continue
        read += 1
        np.testing.assert_array_equal(found, wanted)
    assert read > 20


def test_changes_of_a_header_end_in_one_line(folder):
    """50 changes of a file's header give a model or a one-line error."""
    only_single(folder)
    content = (folder / SINGLE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    for header in mutations.of_json_file(content[8 : 8 + length], 50):
        changed = len(header).to_bytes(8, "little") + header + content[8 + length :]
        (folder / SINGLE).write_bytes(changed)
        try:
            HfSource(folder)
        except UserError as error:
            assert len(str(error).splitlines()) == 1, header


def test_pickles_without_torch(folder, monkeypatch):
    for file in (*shards(folder), folder / INDEX):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(UserError, match=r"pickles .* need torch: pip install '\.\[meta\]'"):
        open_weights(epath.Path(folder))
    old = type("Torch", (), {"__version__": "2.5.1+cpu"})
    monkeypatch.setitem(__import__("sys").modules, "torch", old)
    with pytest.raises(UserError, match=r"need torch 2.6 or newer, not 2.5.1\+cpu"):
        open_weights(epath.Path(folder))
