import dataclasses
import gc
import json
import shutil
import types

import jax
import numpy as np
import pytest
from etils import epath

from llama_jax.checkpoint import manifest, saved_step
from llama_jax.checkpoint.checkpointer import Checkpointer
from llama_jax.checkpoint.fingerprint import fingerprint
from llama_jax.checkpoint.saved_step import StepMeta, find_step, load_meta, load_params
from llama_jax.errors import UserError
from llama_jax.parallel.sharding import with_shardings
from llama_jax.train.step import abstract_state
from tests.helpers import TINY, mesh_of, random_batch, replace, restored_state, shared_step

CONFIG = replace(TINY, train__keep_checkpoints=2)
META = StepMeta(CONFIG, 0, "data-1", b"\x00tokenizer\xff")


@pytest.fixture(scope="module")
def compiled():
    mesh = mesh_of((1, 2, 1, 2))
    with jax.set_mesh(mesh):
        return mesh, shared_step(CONFIG, mesh)


def trained(compiled, steps):
    mesh, step = compiled
    with jax.set_mesh(mesh):
        state = step.init(jax.random.key(0))
        for index in range(steps):
            state, _ = step.train(state, random_batch(CONFIG, index))
    return state


@pytest.fixture(scope="module")
def saved(compiled, tmp_path_factory):
    """Saves step 3; returns the work directory and the state."""
    workdir = tmp_path_factory.mktemp("saved")
    state = trained(compiled, 3)
    saver = Checkpointer(workdir, CONFIG)
    saver.save(state.to_items(), dataclasses.replace(META, step=3))
    saver.close()
    return workdir, state


def assert_same_bits(left, right):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(left), jax.device_get(right))


def test_what_is_saved_comes_back(saved, compiled):
    workdir, state = saved
    saver = Checkpointer(workdir, CONFIG)
    assert saver.latest_step() == 3
    restored = restored_state(saver, 3, CONFIG, compiled[1].state_shardings)
    saver.close()
    assert_same_bits(restored, state)
    assert jax.tree.map(lambda x: x.dtype, restored) == jax.tree.map(lambda x: x.dtype, state)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 2, 1, 2), (1, 2, 2, 2)])
def test_onto_another_mesh(saved, shape):
    workdir, state = saved
    mesh = mesh_of(shape)
    with jax.set_mesh(mesh):
        step = shared_step(CONFIG, mesh)
        saver = Checkpointer(workdir, CONFIG)
        restored = restored_state(saver, 3, CONFIG, step.state_shardings)
        saver.close()
        assert_same_bits(restored, state)
        assert restored.params["embed"].sharding == step.state_shardings.params["embed"]
        assert restored.skips.total.sharding == step.state_shardings.skips.total
        step.train(restored, random_batch(CONFIG, 3))


def test_a_step_describes_itself(saved):
    workdir, state = saved
    meta = load_meta(workdir / "checkpoints" / "3")
    named = dataclasses.replace(META, step=3, device_kind="cpu", fingerprint=fingerprint(state))
    assert meta == named


def test_only_the_weights(saved):
    workdir, state = saved
    mesh = mesh_of((1, 1, 1, 4))
    with jax.set_mesh(mesh):
        shardings = shared_step(CONFIG, mesh).state_shardings.params
        target = with_shardings(abstract_state(CONFIG).params, shardings)
        params = load_params(find_step(workdir), target)
    assert_same_bits(params, state.params)


def test_find_step_takes_what_users_mean(saved):
    workdir, _ = saved
    step = workdir / "checkpoints" / "3"
    for name in (workdir, workdir / "checkpoints", step):
        assert str(find_step(name)) == str(step)


def test_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="neither a work directory nor a saved step"):
        find_step(tmp_path / "nothing")
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(UserError, match="no complete checkpoint in"):
        find_step(tmp_path)


@pytest.mark.parametrize("name", ["²", "٣", "007", "4x", "-1"])
def test_folders_whose_names_are_no_steps(saved, tmp_path, name):
    workdir = shutil.copytree(saved[0], tmp_path / "run")
    (workdir / "checkpoints" / name).mkdir()
    assert find_step(workdir).name == "3"


def test_what_is_no_work_directory(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match="neither a work directory nor a saved step"):
        find_step(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "4").write_text("a file")
    with pytest.raises(UserError, match="no good checkpoint is left"):
        find_step(tmp_path / "run")


def test_an_interrupted_save_does_not_count(saved, compiled, tmp_path):
    workdir = shutil.copytree(saved[0], tmp_path / "run")
    half = workdir / "checkpoints" / "4.orbax-checkpoint-tmp-1"
    shutil.copytree(workdir / "checkpoints" / "3", half)
    assert find_step(workdir).name == "3"
    saver = Checkpointer(workdir, CONFIG)
    assert saver.latest_step() == 3
    saver.close()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model__n_layers", 3, "holds an array"),
        ("model__dim", 16, "holds an array"),
        ("model__tied_embeddings", True, "holds 12 arrays, this config has 11"),
        ("optim__moment_dtype", "bfloat16", "holds an array .*float32.* this config .*bfloat16"),
    ],
)
def test_arrays_of_another_config_are_refused(saved, tmp_path, field, value, message):
    workdir = shutil.copytree(saved[0], tmp_path / "run")
    other = replace(CONFIG, **{field: value})
    mesh = mesh_of((1, 1, 1, 1))
    with jax.set_mesh(mesh):
        saver = Checkpointer(workdir, other)
        with pytest.raises(UserError, match=message):
            restored_state(saver, 3, other, shared_step(other, mesh).state_shardings)
        saver.close()


def test_a_missing_item_is_a_clear_error(saved, compiled, tmp_path):
    workdir = shutil.copytree(saved[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "3" / "optimizer")
    saver = Checkpointer(workdir, CONFIG)
    with pytest.raises(UserError, match=r"3/optimizer"):
        restored_state(saver, 3, CONFIG, compiled[1].state_shardings)
    saver.close()
    shutil.rmtree(workdir / "checkpoints" / "3" / "meta")
    with pytest.raises(UserError, match=r"3 is damaged: meta/\w+\S* is missing"):
        load_meta(workdir / "checkpoints" / "3")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # from orbax itself
def test_a_truncated_array_is_a_clear_error(saved, compiled, tmp_path):
    workdir = shutil.copytree(saved[0], tmp_path / "run")
    data = max(
        (path for path in (workdir / "checkpoints" / "3" / "params").rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    saver = Checkpointer(workdir, CONFIG)
    with pytest.raises(UserError, match=r"3/params cannot be read"):
        restored_state(saver, 3, CONFIG, compiled[1].state_shardings)
    saver.close()
    gc.collect()  # so that orbax's abandoned coroutines complain here


def with_meta(saved, tmp_path, change):
    """Changes the description of a step, as if it had been written so, and returns the folder."""
    workdir = shutil.copytree(saved[0], tmp_path / "run")
    folder = epath.Path(workdir / "checkpoints" / "3")
    described = manifest.read_description(folder)
    change(described)
    manifest.amend(folder, "meta/metadata", json.dumps(described).encode())
    return folder


def test_another_format_is_refused(saved, tmp_path):
    folder = with_meta(saved, tmp_path, lambda meta: meta.update(format_version=3))
    with pytest.raises(UserError, match="has format 3, this version reads 2"):
        load_meta(folder)


@pytest.mark.parametrize("field", ["base_context", "eval_loss", "fingerprint"])
def test_a_step_of_an_early_version_is_refused(saved, tmp_path, field):
    folder = with_meta(saved, tmp_path, lambda meta: meta.pop(field))
    with pytest.raises(UserError, match=f"by an early version .* wrote no {field}, and cannot be"):
        load_meta(folder)


def test_an_import_without_fingerprints_is_refused(saved, tmp_path):
    folder = with_meta(saved, tmp_path, lambda meta: meta.update(fingerprint={}))
    mesh = mesh_of((1, 1, 1, 1))
    with jax.set_mesh(mesh), pytest.raises(UserError, match="early version .* no fingerprint"):
        shardings = shared_step(CONFIG, mesh).state_shardings.params
        load_params(folder, with_shardings(abstract_state(CONFIG).params, shardings))


def test_weights_alone_are_not_trained_on(saved, compiled, tmp_path):
    from llama_jax.train.start import initial_state

    workdir = shutil.copytree(saved[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "3" / "optimizer")
    manifest.write(epath.Path(workdir / "checkpoints" / "3"))  # as if the step never had one
    with Checkpointer(workdir, CONFIG) as saver:
        data = types.SimpleNamespace(train=None, fingerprint="data-1")
        with pytest.raises(UserError, match="3 has weights but no optimiser state"):
            initial_state(compiled[1], saver, data, CONFIG, None)


def test_files_of_another_tokenizer_are_kept(tmp_path):
    meta = dataclasses.replace(META, tokenizer_files={"tokenizer.json": b"{\xff}"})
    saved_step.save_meta(tmp_path, meta)
    manifest.write(epath.Path(tmp_path))
    assert load_meta(tmp_path) == meta


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "additional_chat_templates/../x.jinja", "x.py", "..", ""]
)
def test_no_file_of_a_checkpoint_leaves_its_folder(tmp_path, name):
    """Files are exported by their names, so a foreign checkpoint must not choose the place."""
    saved_step.save_meta(tmp_path, dataclasses.replace(META, tokenizer_files={name: b"x"}))
    manifest.write(epath.Path(tmp_path))
    with pytest.raises(UserError, match="holds a file .*, which is not a tokenizer file"):
        load_meta(tmp_path)
