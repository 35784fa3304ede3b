"""A run refuses to resume with changed fields and names them, as docs/reliability.md promises."""

import functools
import json
import shutil

import jax
import pytest
from etils import epath

from llama_jax.checkpoint.checkpointer import Checkpointer
from llama_jax.checkpoint.saved_step import StepMeta
from llama_jax.config import all_fields
from llama_jax.data.batches import SyntheticBatches
from llama_jax.data.prepare.job import prepare
from llama_jax.data.training_data import TrainingData, open_data
from llama_jax.errors import UserError
from llama_jax.text.tokenizer import train_tokenizer
from llama_jax.train import changes
from llama_jax.train import run as run_lib
from llama_jax.train.resume import check_checkpoint, check_workdir
from llama_jax.train.step import abstract_state
from tests.helpers import TINY, field_names, replace, restored_state, text_config, with_adapters
from tests.train.test_run import STEP_FIELDS

pytestmark = pytest.mark.usefixtures("shared_steps")

# These fields of the step may change: they say how it is computed, or what to do about a fault.
FREE = {
    "model__remat": "full",
    "model__scan_unroll": 2,
    "model__attention": "xla",
    "mesh__tensor": 2,
    "dcn__data": 2,
    "train__grad_accum": 2,
    "train__loss_chunk": 16,
    "train__log_every": 7,
    "train__keep_checkpoints": 9,
    "train__max_skipped": 3,
    "train__spike_factor": 6.0,
    "train__norm_stats": True,
}
OF_DATA = {
    "data__source": "other/*.txt",
    "data__text_field": "body",
    "data__tfds_split": "test",
    "data__mixture": "web=1",
    "data__packing": "best_fit",
    "data__validation_fraction": 0.5,
    "data__max_document_bytes": 9,
    "data__separator": "<|endoftext|>",
    "data__template": "alpaca",
}
# Configs for fields that do not fit the other fields of TINY.
BASES = {"data__template": replace(TINY, data__source="a.json", data__packing="best_fit")}
REFUSED = {
    **{name: value for name, value in STEP_FIELDS.items() if name not in FREE},
    "train__seed": 1,
    "train__stages": "until 9: train.z_loss=0.1",
    "data__streaming": True,
    "data__start": "0.5",
    "init_from": "hf:elsewhere",
}


def data_of(fingerprint="tokens", tokenizer=None):
    source = SyntheticBatches(64, 16, 32, 0)
    return TrainingData(source, None, tokenizer, fingerprint)


def check_both(saved, config, tmp_path):
    """Returns the checks against config.json and against the checkpoint, as two functions."""
    (tmp_path / "config.json").write_text(saved.to_json())
    meta = StepMeta(saved, 5, "tokens", b"")

    def by_file():
        check_workdir(config, epath.Path(tmp_path))

    def by_checkpoint():
        return check_checkpoint(meta, "run/5", config, data_of())

    return by_file, by_checkpoint


def test_every_field_of_the_config_is_in_one_list():
    """A field in none of the lists above may change, because it does not affect the run."""
    listed = {*FREE, *OF_DATA, *REFUSED, "branch_from"}  # tests/train/test_origin.py
    rest = {name.replace("__", ".") for name in field_names("__") - listed}
    assert all(name.startswith(changes.FREE) for name in rest), rest


def test_a_field_is_free_acceptable_or_fixed():
    """Fixed: what would make it another model, or other data than the accepted ones."""
    fixed = {n for n in all_fields() if not n.startswith(changes.FREE)} - {*changes.ACCEPTABLE}
    assert fixed == {
        *("model.vocab_size", "model.dim", "model.n_layers", "model.n_heads", "model.n_kv_heads"),
        *("model.ffn_dim", "model.explicit_head_dim", "model.norm_eps", "model.sliding_window"),
        *("model.tied_embeddings", "optim.moment_dtype", "lora.rank", "lora.alpha"),
        *("lora.targets", "lora.base_dtype", "data.streaming", "data.start"),
        *("init_from", "branch_from"),
    }
    assert not [name for name in changes.ACCEPTABLE if name.startswith(changes.FREE)]


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_changes_the_run_is_refused(name, tmp_path):
    saved = with_adapters(TINY) if name.startswith("lora") else TINY
    config = replace(saved, **{name: REFUSED[name]})
    told = replace(config, data__accept_other_data=True)
    was = functools.reduce(getattr, name.split("__"), saved)
    shown = "''" if was == "" else was
    difference = f"{name.replace('__', '.')} is {shown}, now {REFUSED[name]}"
    for each in (config, told):  # the flag that accepts other data does not accept this change
        for check in check_both(saved, each, tmp_path):
            with pytest.raises(UserError) as caught:
                check()
            assert f"({difference})" in str(caught.value)
            assert "accept_other_data" not in str(caught.value)
            dotted, flag = name.replace("__", "."), "--accept_changes="
            if dotted in changes.ACCEPTABLE:
                assert str(caught.value).endswith(f"{flag}{dotted}")
            else:
                assert flag not in str(caught.value)
    assert (tmp_path / "config.json").read_text() == saved.to_json()


@pytest.mark.parametrize("name", [n for n in REFUSED if n.replace("__", ".") in changes.ACCEPTABLE])
def test_an_accepted_change_is_allowed_and_told(name, tmp_path):
    saved = with_adapters(TINY) if name.startswith("lora") else TINY
    config, dotted = replace(saved, **{name: REFUSED[name]}), name.replace("__", ".")
    (tmp_path / "config.json").write_text(saved.to_json())
    meta = StepMeta(saved, 5, "tokens", b"")
    for accept in ([dotted], [dotted.partition(".")[0]]):
        accepted = changes.accepted_fields(accept)
        check_workdir(config, epath.Path(tmp_path), accepted)
        told = check_checkpoint(meta, "run/5", config, data_of(), accept=accepted)
        was = functools.reduce(getattr, name.split("__"), saved)
        assert told == {dotted: (was, REFUSED[name])}


def test_a_base_may_be_elsewhere(tmp_path):
    """A base is identified by its fingerprint: see tests/train/test_start.py."""
    saved = with_adapters(TINY)
    by_file, by_checkpoint = check_both(saved, replace(saved, init_from="hf:moved"), tmp_path)
    by_file()
    assert by_checkpoint() == {"init_from": ("hf:there", "hf:moved")}


@pytest.mark.parametrize("name", OF_DATA)
def test_other_data_needs_a_flag(name, tmp_path):
    base = BASES.get(name, TINY)
    config = replace(base, **{name: OF_DATA[name]})
    for check in check_both(base, config, tmp_path):
        flag = "--config.data.accept_other_data=True"
        if name == "data__mixture":
            flag = "--accept_changes=data.mixture"
        with pytest.raises(UserError, match=f"{flag}$"):
            check()
    told = replace(config, data__accept_other_data=True)
    by_file, by_checkpoint = check_both(base, told, tmp_path)
    by_file()
    assert set(by_checkpoint()) == {name.replace("__", "."), "data.accept_other_data"}


@pytest.mark.parametrize("name", FREE)
def test_what_may_change_is_told(name, tmp_path):
    config = replace(TINY, **{name: FREE[name]})
    by_file, by_checkpoint = check_both(TINY, config, tmp_path)
    by_file()
    group, field = name.split("__")
    changes = by_checkpoint()
    was, now = (getattr(getattr(c, group), field) for c in (TINY, config))
    assert changes == ({} if was == now else {f"{group}.{field}": (was, now)})


def test_all_differences_are_named_at_once():
    config = replace(TINY, train__seq_len=32, train__global_batch=16)
    message = "train.seq_len is 16, now 32; train.global_batch is 32, now 16"
    with pytest.raises(UserError, match=message) as caught:
        check_checkpoint(StepMeta(TINY, 5, "tokens", b""), "run/5", config, data_of())
    print(caught.value)


# Whole runs.


@pytest.fixture(scope="module")
def config(corpus):
    return text_config(corpus, model__n_layers=1, train__steps=3, train__checkpoint_every=3)


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("guards") / "run"
    run_lib.train(config, workdir)
    return workdir


@pytest.mark.parametrize("lost", [True, False])
def test_the_checkpoint_knows_its_config_where_the_file_does_not(run, config, tmp_path, lost):
    workdir = shutil.copytree(run, tmp_path / "run")
    other = replace(config, optim__peak_lr=0.5)
    if lost:
        (workdir / "config.json").unlink()
    else:
        (workdir / "config.json").write_text(other.to_json())
    message = r"checkpoints/3 belongs to another run \(optim.peak_lr is 0.01"
    with pytest.raises(UserError, match=message):
        run_lib.train(replace(other, train__log_every=7), workdir)
    if lost:
        assert not (workdir / "config.json").exists()
    else:
        assert (workdir / "config.json").read_text() == other.to_json()


def test_a_run_that_goes_on_writes_its_config(run, config, tmp_path):
    workdir = shutil.copytree(run, tmp_path / "run")
    (workdir / "config.json").unlink()
    changed = replace(config, train__log_every=7)
    run_lib.train(changed, workdir)
    assert (workdir / "config.json").read_text() == changed.to_json()


def test_another_tokenizer_of_the_same_size_is_refused(run, config, corpus, tmp_path):
    """Even where other data are accepted: the same ids would stand for other words."""
    workdir = shutil.copytree(run, tmp_path / "run")
    texts = [path.read_text()[::-1] for path in sorted(corpus.iterdir())]
    train_tokenizer(texts, config.model.vocab_size).save(tmp_path / "other.model")
    told = replace(
        config,
        data__tokenizer=str(tmp_path / "other.model"),
        data__path=str(tmp_path / "shards"),
        data__accept_other_data=True,
    )
    prepare(told, tmp_path / "shards", log=lambda line: None)
    assert open_data(told, epath.Path("unused")).tokenizer is not None
    message = r"another run \(tokenizer's sha256 is \w{16}, now \w{16}"
    with pytest.raises(UserError, match=message) as caught:
        run_lib.train(told, workdir)
    print(caught.value)
    kept = (run / "tokenizer.model").read_bytes()
    assert (workdir / "tokenizer.model").read_bytes() == kept


def test_other_data_are_written_down_with_the_step(run, config, tmp_path, capsys):
    workdir = shutil.copytree(run, tmp_path / "run")
    other = replace(config, data__validation_fraction=0.4, data__path=str(tmp_path / "shards"))
    prepare(other, tmp_path / "shards", log=lambda line: None)
    with pytest.raises(UserError, match=r"validation_fraction is 0.2, now 0.4.*accept_other_data"):
        run_lib.train(other, workdir)
    assert not (workdir / "changes.jsonl").exists()
    run_lib.train(replace(other, data__accept_other_data=True), workdir)
    line = json.loads((workdir / "changes.jsonl").read_text())
    fingerprints = [open_data(c, run / "data").fingerprint for c in (config, other)]
    assert line["step"] == 3
    assert line["changes"]["data fingerprint"] == fingerprints
    assert line["changes"]["data.validation_fraction"] == [0.2, 0.4]
    assert "changed from step 4 on: data.path is '', now" in capsys.readouterr().out


@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
def test_moments_of_another_dtype_are_not_cast(run, config, moment_dtype):
    """Orbax would cast them, so the dtypes of the arrays are checked, whatever the configs say."""
    other = replace(config, optim__moment_dtype=moment_dtype)
    mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])
    place = jax.sharding.NamedSharding(mesh, jax.P())
    shardings = jax.tree.map(lambda _: place, abstract_state(other))
    with Checkpointer(run, other) as saver:
        if moment_dtype == "float32":
            assert int(restored_state(saver, 3, other, shardings).step) == 3
        else:
            with pytest.raises(UserError, match=r"holds an array .*float32.* config .*bfloat16"):
                restored_state(saver, 3, other, shardings)
