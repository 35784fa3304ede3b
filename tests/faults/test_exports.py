"""Exports, fine-tuning, sampling and evaluation read from a checkpoint exactly what was saved.

Each file of a step is damaged in turn, or replaced by that of another step or run. Every reader
then refuses with one line and leaves no target, or gives exactly the result of the undamaged step.
"""

import shutil

import jax
import pytest
from etils import epath

from llama_jax.checkpoint import manifest
from llama_jax.checkpoint.fingerprint import fingerprint
from llama_jax.checkpoint.saved_step import load_meta
from llama_jax.config import Config, LoraConfig
from llama_jax.errors import UserError
from llama_jax.inference.loaded_model import open_model
from llama_jax.interchange.ckpt import write_adapters
from llama_jax.interchange.formats import paths_and_layers
from llama_jax.interchange.loading import load_init
from llama_jax.interchange.opening import open_init, open_source
from llama_jax.interchange.transfer import convert, export_adapters
from llama_jax.parallel.sharding import param_shardings
from llama_jax.text.tokenizer_files import open_tokenizer
from llama_jax.train.start import with_tokenizer
from llama_jax.train.step import abstract_state
from tests.helpers import (
    TINY,
    flip_bit,
    frozen_base,
    made_state,
    mesh_of,
    random_adapters,
    random_params,
    replace,
)

# Orbax leaves coroutines behind when an array is damaged.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CONFIG = replace(TINY, model__vocab_size=300, model__n_layers=2)
STEPS = (4, 8)


def save(workdir, step, seed, tokenizer):
    from llama_jax.checkpoint.checkpointer import Checkpointer
    from llama_jax.checkpoint.saved_step import StepMeta

    workdir.mkdir(exist_ok=True)
    with Checkpointer(workdir, CONFIG) as saver:
        state = made_state(CONFIG, random_params(CONFIG.model, seed=seed), step)
        saver.save(state.to_items(), StepMeta(CONFIG, step, "made up", tokenizer.model_bytes))
    tokenizer.save(workdir / "tokenizer.model")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer, corpus):
    """Writes a run with steps 4 and 8, one of other weights and tokenizer, and an imported one."""
    from llama_jax.text.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("exports")
    for step in STEPS:
        save(folder / "run", step, step, tokenizer)
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    save(folder / "other", 8, 9, train_tokenizer(texts[:20], 290))
    source = open_source("ckpt", epath.Path(folder / "other"))
    convert(source, "ckpt", folder / "imported")
    return folder


@pytest.fixture
def run(runs, tmp_path):
    return shutil.copytree(runs / "run", tmp_path / "run")


def exported(place, scratch):
    """Returns the files that `convert` writes."""
    target = scratch / "exported"
    try:
        convert(open_source("ckpt", epath.Path(place)), "hf", target)
        return {path.name: path.read_bytes() for path in target.iterdir()}
    finally:
        left = [path.name for path in scratch.glob("exported*")]
        shutil.rmtree(target, ignore_errors=True)
        assert left in ([], ["exported"]), "a partial target is left"


def read(place, scratch):
    """Returns what `convert` reads, without spending the time to write it."""
    source = open_source("ckpt", epath.Path(place))
    arrays = [source.read(*unit).tobytes() for unit in paths_and_layers(CONFIG.model)]
    return arrays, source.description


def begun(place, scratch):
    """Returns the fingerprint of the weights, and the tokenizer, with which a run begins."""
    config = replace(CONFIG, init_from=f"ckpt:{place}", data__source="text")
    config = with_tokenizer(config, epath.Path(scratch))
    mesh = mesh_of((1, 1, 1, 1))
    with jax.set_mesh(mesh):
        params = load_init(
            open_init(config), config, param_shardings(abstract_state(config).params, mesh)
        )
    return fingerprint(params), open_tokenizer(config.data.tokenizer).model_bytes


def opened(place, scratch):
    """Returns a description of the model that `generate` and `evaluate` open."""
    model = open_model(place, "tensor=1")
    return fingerprint(model.params), model.tokenizer.model_bytes, model.config, model.context


READERS = (read, begun, opened)


def outcome(reader, place, scratch):
    """Returns the result of a reader, or `refused` if it raises an error of one line."""
    try:
        return reader(place, scratch)
    except UserError as error:
        assert "\n" not in str(error), error
        return "refused"


def files_of(folder, *items):
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    names = {path: path.relative_to(folder).parts[0] for path in found}
    return [path for path in found if not items or names[path] in items]


def flips(path):
    """Yields after flipping one bit of the file: near its beginning, its middle and its end."""
    data = path.read_bytes()
    for place in (len(data) // 9, len(data) // 2, len(data) - 1):
        flip_bit(path, 8 * place + place % 8)
        yield f"bit {8 * place + place % 8}"
        path.write_bytes(data)


def flip(path):
    """Yields after flipping one bit in the middle of the file. See `flips`."""
    flip_bit(path, 8 * (path.stat().st_size // 2))
    yield "bit in the middle"
    flip_bit(path, 8 * (path.stat().st_size // 2))


def cuts(path):
    data = path.read_bytes()
    for cut in (data[: len(data) // 2], b"", data + b"\0"):
        path.write_bytes(cut)
        yield f"{len(cut)} bytes"
    path.unlink()
    yield "deleted"
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("reader", "harms"),
    [
        (read, (flips, cuts)),
        (opened, (flip,)),
        *(pytest.param(one, (flips, cuts), marks=pytest.mark.slow) for one in (begun, opened)),
    ],
)
def test_damage_of_any_file_is_refused_or_does_not_matter(
    run, tmp_path, monkeypatch, reader, harms
):
    """For a step's own folder, large files are compared by their arrays alone."""
    monkeypatch.setattr(manifest, "QUICK_BYTES", 0)
    step = run / "checkpoints" / "8"
    good = reader(step, tmp_path)
    assert good != "refused" and reader(run, tmp_path) == good
    wrong, refused = [], set()
    files = files_of(step, "params", "meta", "tokenizer", "manifest.json")
    assert len(files) > 12
    for path in files:
        for harm in harms:
            for what in harm(path):
                found = outcome(reader, step, tmp_path)
                if found == "refused":
                    refused.add(path.relative_to(step).as_posix())
                elif found != good:
                    wrong.append(f"{path.relative_to(step)}, {what}")
    assert wrong == []
    # Damage to the files with the numbers and the descriptions is always refused.
    largest = max(files, key=lambda path: path.stat().st_size).relative_to(step).as_posix()
    assert {largest, "meta/metadata", "tokenizer/metadata", "manifest.json"} <= refused


@pytest.mark.parametrize("reader", READERS)
def test_in_a_work_directory_a_damaged_newest_step_is_never_read(run, tmp_path, reader, capsys):
    older = reader(run / "checkpoints" / "4", tmp_path)
    newest = run / "checkpoints" / "8"
    for path in files_of(newest):
        if reader is not read and path.name not in ("metadata", "manifest.json", "_METADATA"):
            continue  # whether damage is noticed here does not depend on the reader
        for what in flip(path) if reader is not read else flips(path):
            found = outcome(reader, run, tmp_path)
            said = capsys.readouterr().err
            if reader is opened:  # it uses the step before, like a run that goes on
                assert found == older and "warning: " in said and "8 is damaged: " in said, what
            else:
                assert found == "refused", (path, what)


@pytest.mark.parametrize("reader", READERS)
def test_files_of_another_step_or_run_are_refused(runs, run, tmp_path, reader):
    """These files are undamaged, and often of the same size."""
    step = run / "checkpoints" / "8"
    good = reader(step, tmp_path)
    for other in (run / "checkpoints" / "4", runs / "other" / "checkpoints" / "8"):
        for name in ("params", "meta", "tokenizer", "manifest.json"):
            shutil.move(step / name, tmp_path / "kept")
            copy = shutil.copytree if (other / name).is_dir() else shutil.copy
            copy(other / name, step / name)
            assert outcome(reader, step, tmp_path) == "refused", (other, name)
            shutil.rmtree(step / name) if (step / name).is_dir() else (step / name).unlink()
            shutil.move(tmp_path / "kept", step / name)
    assert reader(step, tmp_path) == good


def test_the_tokenizer_beside_the_checkpoints_is_that_of_the_newest(run, tmp_path):
    begun(run, tmp_path)
    for what in flips(run / "tokenizer.model"):
        assert outcome(begun, run, tmp_path) == "refused", what
        assert outcome(begun, run / "checkpoints" / "8", tmp_path) != "refused"


def test_imported_weights_are_verified_too(runs, tmp_path):
    run = shutil.copytree(runs / "imported", tmp_path / "run")
    step = run / "checkpoints" / "0"
    meta = load_meta(step)
    params = jax.device_get(open_model(step, "tensor=1").params)
    assert meta.fingerprint == fingerprint(jax.tree.map(jax.numpy.asarray, {"params": params}))
    for reader in READERS:
        good = reader(step, tmp_path)
        assert good != "refused"
        path = max(files_of(step, "params"), key=lambda path: path.stat().st_size)
        found = [outcome(reader, step, tmp_path) for _ in flips(path)]
        # The last bytes may belong to a node that the database no longer refers to.
        assert found[:2] == ["refused"] * 2 and found[2] in ("refused", good), reader


def test_a_step_without_a_manifest_is_refused(run, tmp_path):
    step = run / "checkpoints" / "8"
    (step / "manifest.json").unlink()
    assert {outcome(reader, step, tmp_path) for reader in READERS} == {"refused"}


def test_adapters_and_the_base_below_them(runs, tmp_path):
    base = shutil.copytree(runs / "run", tmp_path / "base")
    lora = LoraConfig(rank=2, alpha=4.0, targets="wq,w2", base_dtype="float32")
    place = base / "checkpoints" / "8"
    config: Config = replace(CONFIG, init_from=f"ckpt:{place}", lora=lora)
    source = open_source("ckpt", epath.Path(place))
    prints = fingerprint(
        jax.tree.map(jax.numpy.asarray, frozen_base(config, random_params(CONFIG.model, seed=8)))
    )
    described = source.description
    described = type(described)(config, "float32", described.files)
    (tmp_path / "lora").mkdir()
    write_adapters(epath.Path(tmp_path / "lora"), described, random_adapters(config), prints)
    step = tmp_path / "lora" / "checkpoints" / "0"

    def as_peft(place, scratch):
        target = scratch / "peft"
        try:
            export_adapters(epath.Path(place), target)
            return {path.name: path.read_bytes() for path in target.iterdir()}
        finally:
            shutil.rmtree(target, ignore_errors=True)
            assert not list(scratch.glob("peft*"))

    for folder, readers in ((step, (as_peft, exported, opened)), (place, (exported, opened))):
        for reader in readers:
            good = reader(step, tmp_path)
            largest = max(files_of(folder, "params"), key=lambda path: path.stat().st_size)
            for path in (largest, folder / "meta" / "metadata", folder / "tokenizer" / "metadata"):
                found = [outcome(reader, step, tmp_path) for _ in flips(path)]
                assert found[:2] == ["refused"] * 2, (path, reader)
                assert found[2] in ("refused", good), (path, reader)
            assert reader(step, tmp_path) == good
