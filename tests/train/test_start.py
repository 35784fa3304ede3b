"""Runs that begin with given weights: all of them are trained, or adapters on a frozen base."""

import contextlib
import dataclasses
import json
import shutil
import types
import weakref

import flax.linen as nn
import jax
import numpy as np
import pytest
from etils import epath
from jax.sharding import PartitionSpec as P

from llama_jax.checkpoint import saved_step
from llama_jax.checkpoint.fingerprint import fingerprint
from llama_jax.config import LoraConfig
from llama_jax.data.source import BatchSource
from llama_jax.data.training_data import TrainingData
from llama_jax.errors import UserError
from llama_jax.inference.loaded_model import open_model
from llama_jax.interchange import opening
from llama_jax.interchange.loading import load_init
from llama_jax.interchange.opening import open_init, open_source, tokenizer_file
from llama_jax.interchange.transfer import convert
from llama_jax.model.llama import Architecture, Attention, Block, logits
from llama_jax.model.lora import Adapted
from llama_jax.parameters import PARAMETERS, Parameter, parameter_table
from llama_jax.text.tokenizer_files import open_tokenizer
from llama_jax.train import run as run_lib
from llama_jax.train import start
from llama_jax.train.parts import Parts
from llama_jax.train.start import initial_state, with_tokenizer
from llama_jax.train.step import abstract_state, jit_step
from tests.helpers import (
    frozen_base,
    mesh_of,
    outputs_of,
    random_params,
    records,
    replace,
    save_checkpoint,
    shared_step,
    start_train,
    text_config,
)

pytestmark = pytest.mark.usefixtures("shared_steps")

NO_DATA = TrainingData(BatchSource())
LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.2, targets="wq,wo,w2")


@pytest.fixture(scope="module")
def config(corpus):
    return text_config(
        corpus,
        model__dim=128,  # two blocks of NF4
        model__ffn_dim=128,
        mesh__data=4,
        mesh__fsdp=2,
        train__steps=4,
        train__checkpoint_every=2,
        train__eval_every=4,
    )


@pytest.fixture(scope="module")
def params(config):
    """Returns weights as small as trained ones."""
    return jax.tree.map(lambda x: x * np.float32(0.2), random_params(config.model))


@pytest.fixture(scope="module")
def bases(config, params, tokenizer, tmp_path_factory):
    """Writes the same weights as a checkpoint and a Hugging Face folder, and others as `other`."""
    folder = tmp_path_factory.mktemp("bases")
    longer = replace(config, train__seq_len=64)
    save_checkpoint(folder / "ckpt", longer, params, tokenizer.model_bytes)
    convert(open_source("ckpt", epath.Path(folder / "ckpt")), "hf", folder / "hf")
    (folder / "ckpt" / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    other = {**params, "final_norm": params["final_norm"] + np.float32(1e-3)}
    save_checkpoint(folder / "other", config, other, tokenizer.model_bytes)
    (folder / "other" / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    return folder


def equal(left, right):
    for one, two in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)


@contextlib.contextmanager
def opened_sources():
    """Yields a list to which each source that is opened adds a weak reference to itself."""
    references, open_it = [], opening.open_source

    def noted(*arguments, **named):
        source = open_it(*arguments, **named)
        references.append(weakref.ref(source))
        return source

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "open_source", noted)
        yield references


@pytest.mark.parametrize("kind", ["hf", "ckpt"])
def test_full_fine_tuning_starts_from_these_weights_with_fresh_moments(config, params, bases, kind):
    config, mesh = replace(config, init_from=f"{kind}:{bases / kind}"), mesh_of((1, 2, 2, 2))
    with jax.set_mesh(mesh):
        compiled = shared_step(config, mesh)
        saver = types.SimpleNamespace(newest_good_step=lambda: None)
        # None: the start found a step to resume, and so did not open the weights.
        weights = open_init(config) if kind == "hf" else None
        state, meta = initial_state(compiled, saver, NO_DATA, config, weights)
        equal(state.params, params)
        assert meta.base_context == 64
        assert state.frozen is None and int(state.step) == 0
        assert all(not np.asarray(x).any() for x in jax.tree.leaves(state.opt_state))
        assert state.params["embed"].sharding == compiled.state_shardings.params["embed"]


def test_damaged_steps_are_passed_over_one_after_another(config, monkeypatch):
    steps, damaged = [6, 4], []

    class Saver:
        def newest_good_step(self):
            return next((step for step in steps if step not in damaged), None)

        def folder(self, step):
            return epath.Path(str(step))

        def restore(self, step, targets):
            raise saved_step.DamagedCheckpoint(f"{step} is damaged")

        def mark_damaged(self, step, reason):
            assert reason == f"{step} is damaged"
            damaged.append(step)

    monkeypatch.setattr(start, "_go_on", lambda *_: None)
    mesh = mesh_of((1, 2, 2, 2))
    with jax.set_mesh(mesh):
        _, meta = initial_state(shared_step(config, mesh), Saver(), NO_DATA, config, None)
    assert damaged == steps and meta.step == meta.base_context == 0


@pytest.mark.parametrize(
    "base_dtype",
    ["nf4", *(pytest.param(one, marks=pytest.mark.slow) for one in ("float32", "bfloat16"))],
)
def test_a_base_is_the_same_bits_from_everywhere_on_every_mesh(config, params, bases, base_dtype):
    config = replace(
        config, init_from="hf:there", lora=dataclasses.replace(LORA, base_dtype=base_dtype)
    )
    expected = frozen_base(config, params)
    prints = []
    for kind, shape in [("hf", (1, 1, 1, 1)), ("hf", (2, 1, 2, 1)), ("ckpt", (2, 1, 1, 2))]:
        mesh = mesh_of(shape)
        with jax.set_mesh(mesh):
            places = shared_step(config, mesh).state_shardings.frozen
            source = open_init(replace(config, init_from=f"{kind}:{bases / kind}"))
            base = load_init(source, config, places)
            equal(base, expected)
            prints.append(fingerprint(base))
    assert prints[0] == prints[1] == prints[2]


def test_the_tokenizer_comes_with_the_weights(config, bases, tokenizer, tmp_path):
    folder = epath.Path(tmp_path)
    for kind in ("hf", "ckpt"):
        begun = with_tokenizer(replace(config, init_from=f"{kind}:{bases / kind}"), folder)
        assert begun.data.tokenizer == tokenizer_file(f"{kind}:{bases / kind}")
        assert epath.Path(begun.data.tokenizer).exists()
    nothing = replace(config, init_from=f"hf:{bases}")
    assert with_tokenizer(replace(nothing, data__path="shards"), folder).data.tokenizer == ""
    with pytest.raises(
        UserError, match=r"has no tokenizer in a known format.* --config.data.tokenizer=FILE"
    ):
        with_tokenizer(nothing, folder)
    step = f"ckpt:{bases / 'ckpt' / 'checkpoints' / '0'}"
    begun = with_tokenizer(replace(config, init_from=step), folder)
    assert open_tokenizer(begun.data.tokenizer).fingerprint == tokenizer.fingerprint
    given = replace(config, init_from=f"hf:{bases / 'hf'}", data__tokenizer="mine.model")
    assert with_tokenizer(given, folder) == given
    assert with_tokenizer(config, folder) == config


def test_a_run_goes_on_with_its_own_tokenizer_where_the_weights_are_gone(
    config, tokenizer, tmp_path
):
    gone = replace(config, init_from="hf:/gone")
    with pytest.raises(UserError, match="init_from=hf:/gone: /gone does not exist"):
        with_tokenizer(gone, epath.Path(tmp_path))
    tokenizer.save(tmp_path / "tokenizer.model")
    kept = with_tokenizer(gone, epath.Path(tmp_path)).data.tokenizer
    assert open_tokenizer(kept).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("field", ["tokenizer", "path", "source"])
def test_weights_that_are_not_there_are_missed_before_data_are_prepared(
    config, tokenizer, tmp_path, field
):
    tokenizer.save(tmp_path / "tokenizer.model")
    given = {"tokenizer": str(tmp_path / "tokenizer.model"), "path": "/no/shards"}
    changes = {f"data__{field}": given[field]} if field in given else {}
    wrong = replace(config, init_from="hf:/no/where", **changes)
    with pytest.raises(UserError, match="init_from=hf:/no/where: /no/where does not exist"):
        run_lib.train(wrong, tmp_path / "run")
    assert not (tmp_path / "run" / "data").exists()


# A whole run of adapters.


@pytest.fixture(scope="module")
def adapted(config, bases):
    lora = dataclasses.replace(LORA, base_dtype="nf4")
    return replace(config, init_from=f"ckpt:{bases / 'ckpt'}", lora=lora)


@pytest.fixture(scope="module")
def finished(adapted, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lora") / "run"
    with opened_sources() as sources:
        state = run_lib.train(adapted, workdir)
    assert len(sources) == 1
    return workdir, state


def test_the_checkpoint_holds_adapters_and_names_the_base(finished, adapted, bases):
    workdir, state = finished
    folder = saved_step.find_step(workdir)
    saved = saved_step.load_adapters(folder, abstract_state(adapted).params)
    assert set(saved["layers"]["attn"]) == {"wq", "wo"} and set(saved["layers"]) == {"attn", "mlp"}
    equal(saved, state.params)
    meta = saved_step.load_meta(folder)
    assert meta.base == fingerprint(state.frozen)
    assert meta.config.init_from == f"ckpt:{bases / 'ckpt'}"
    assert meta.config.train.seq_len == 16 and meta.base_context == meta.context == 64
    assert not any(name.startswith("frozen") for name in meta.fingerprint)
    # The step holds no other item and no other array.
    items = {path.name for path in folder.iterdir() if path.is_dir()}
    assert items == {"params", "optimizer", "skips", "meta", "tokenizer"}
    for item, tree in (("params", state.params), ("optimizer", (state.step, state.opt_state))):
        described = json.loads((folder / item / "_METADATA").read_text())["tree_metadata"]
        types = [entry["value_metadata"]["value_type"] for entry in described.values()]
        assert types.count("jax.Array") == len(jax.tree.leaves(tree))
        assert set(types) <= {"jax.Array", "None"}


def test_resume_is_bit_exact(finished, adapted, tmp_path, monkeypatch):
    """Dropout resumes too, because its masks depend on the step alone."""
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "4")
    run_loop = run_lib.run_loop

    def released(*arguments):
        """Checks that the base was opened once, and that its source takes no memory in the loop."""
        assert [reference() for reference in sources] == [None]
        return run_loop(*arguments)

    monkeypatch.setattr(run_lib, "run_loop", released)
    with opened_sources() as sources:
        equal(run_lib.train(adapted, workdir), finished[1])
    assert len(sources) == 1
    # A resumed run keeps what the first start learnt about the base.
    assert saved_step.load_meta(saved_step.find_step(workdir)).base_context == 64


def test_another_base_is_refused(finished, adapted, bases, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    other = f"ckpt:{bases / 'other'}"
    message = r"trained on another base than ckpt:\S+other \(other fingerprints: final_norm\)"
    with pytest.raises(UserError, match=message):
        run_lib.train(replace(adapted, init_from=other), workdir)
    with pytest.raises(UserError, match=message):
        open_model(workdir, base=other)
    with pytest.raises(UserError, match=message):
        source = open_source("ckpt", epath.Path(workdir), base=other)
        convert(source, "hf", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    # A missing base is an error that names the flag for its place.
    for open_it in (
        open_model,
        lambda folder, base: open_source("ckpt", epath.Path(folder), 0, base),
    ):
        with pytest.raises(
            UserError, match=r"/gone, the base of \S+/4, does not exist; .*--base=hf:"
        ):
            open_it(workdir, base="hf:/gone")
    # The same weights at another place are the same base.
    with opened_sources() as sources:
        open_model(workdir, base=f"hf:{bases / 'hf'}")
    assert len(sources) == 1


def test_full_fine_tuning_does_not_change_where_it_began(config, bases, tmp_path):
    from llama_jax.train.resume import check_workdir

    first = replace(config, init_from=f"ckpt:{bases / 'ckpt'}")
    (tmp_path / "config.json").write_text(first.to_json())
    check_workdir(first, epath.Path(tmp_path))
    with pytest.raises(UserError, match="init_from is ckpt:"):
        check_workdir(replace(config, init_from=f"ckpt:{bases / 'other'}"), epath.Path(tmp_path))


@pytest.mark.parametrize("target", ["hf", "ckpt"])
def test_converted_adapters_are_merged_into_their_base(finished, adapted, tmp_path, target):
    workdir, _ = finished
    source = open_source("ckpt", epath.Path(workdir))
    described = convert(source, target, tmp_path / "merged", "float32" if target == "hf" else "")
    assert described.config.lora == LoraConfig() and described.config.init_from == ""
    # The base's context, not the shorter sequences of training.
    assert described.config.train.seq_len == 64
    tokens = np.arange(12)[None]
    merged = replace(described.config, init_from=f"{target}:{tmp_path / 'merged'}")
    mesh = mesh_of((1, 1, 1, 1))
    with jax.set_mesh(mesh):
        params = load_init(
            open_init(merged), merged, shared_step(merged, mesh).state_shardings.params
        )
        got = logits(merged.model, params, tokens)
        model = open_model(workdir, "tensor=1")
    assert isinstance(model.params, Adapted) and model.context == 64
    with jax.set_mesh(model.mesh):
        unmerged = logits(merged.model, model.params, tokens)
        none = jax.tree.map(np.zeros_like, jax.device_get(model.params.adapters))
        base = logits(merged.model, dataclasses.replace(model.params, adapters=none), tokens)
    np.testing.assert_allclose(got, unmerged, rtol=0, atol=1e-5)
    assert np.abs(base - unmerged).max() > 1e-3


@pytest.mark.slow  # it starts five processes
def test_two_processes_train_above_nf4_as_one(corpus, tokenizer, tmp_path):
    """Both processes hold blocks of a matrix; each reads as small a part as the source allows."""
    model = {"dim": 256, "ffn_dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4}
    config = text_config(corpus, **{f"model__{name}": size for name, size in model.items()})
    params = jax.tree.map(lambda x: x * np.float32(0.2), random_params(config.model))
    save_checkpoint(tmp_path / "ckpt", config, params, tokenizer.model_bytes)
    convert(open_source("ckpt", epath.Path(tmp_path / "ckpt")), "hf", tmp_path / "hf")
    (tmp_path / "ckpt" / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    fields = {f"model.{name}": size for name, size in model.items()}
    fields |= {"mesh.fsdp": 4, "mesh.tensor": 2}
    fields |= {"lora.rank": 4, "lora.dropout": 0.2, "lora.base_dtype": "nf4"}
    fields |= {"model.compute_dtype": "float32", "train.log_every": 1, "train.steps": 4}
    fields |= {"optim.peak_lr": 1e-2}

    def losses(processes, kind):
        """Returns the losses of a run by step, and the fingerprint of its base."""
        workdir = tmp_path / f"{kind}-{processes}"
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        flags.append(f"--config.init_from={kind}:{tmp_path / kind}")
        started = start_train(corpus, workdir, *flags, processes=processes)
        outputs = outputs_of(started, 300)
        assert [process.returncode for process in started] == [0] * processes, outputs
        lines = (line for line in records(workdir) if "event" not in line)
        found = {one["step"]: one.get("loss", one.get("eval_loss")) for one in lines}
        return found, saved_step.load_meta(saved_step.find_step(workdir)).base

    expected, base = losses(1, "hf")
    assert len(expected) == 4 and expected[3] < expected[1]
    for kind in ("hf", "ckpt"):
        got, same = losses(2, kind)
        assert got == pytest.approx(expected, abs=2e-6)
        assert same == base and base


class ScaledHeads(Attention):
    """An attention with one array that no LLaMA has."""

    def heads(self, name, x_BTNH):
        scale_H = self.param(f"{name}_scale", nn.initializers.ones, (self.config.head_dim,))
        return x_BTNH * scale_H


class ScaledBlock(Block):
    attention = ScaledHeads


ROWS = parameter_table(
    *(Parameter(f"layers/attn/{name}_scale", "LH", P(), decays=False) for name in "qk")
)


def test_a_variant_begins_with_the_weights_of_a_llama_and_its_own_random_ones(bases, config):
    parts = Parts(Architecture(ScaledBlock, {**PARAMETERS, **ROWS}))
    begun = replace(config, init_from=f"ckpt:{bases / 'ckpt'}")
    mesh = mesh_of((4, 2, 1, 1))
    with jax.set_mesh(mesh):
        compiled = jit_step(begun, mesh, parts)
        state = start.first_state(compiled, begun, open_init(begun))
        expected = load_init(open_init(begun), begun, jit_step(begun, mesh).state_shardings.params)
    found = jax.device_get(state.params)
    scale = found["layers"]["attn"].pop("q_scale")
    assert scale.shape == (config.model.n_layers, config.model.head_dim) and (scale == 1).all()
    del found["layers"]["attn"]["k_scale"]
    jax.tree.map(np.testing.assert_array_equal, found, jax.device_get(expected))

    fewer = {path: row for path, row in PARAMETERS.items() if path != "layers/mlp/w3"}
    for rows, lora in ((fewer, LoraConfig()), ({**PARAMETERS, **ROWS}, LORA)):
        parts = Parts(Architecture(ScaledBlock, rows))
        odd = types.SimpleNamespace(parts=parts, init=lambda _: None)
        wrong = dataclasses.replace(begun, lora=lora)
        lacking = "layers/mlp/w3" if rows is fewer else "layers/attn/q_scale, layers/attn/k_scale"
        with pytest.raises(UserError, match=f"ScaledBlock has others: {lacking}"):
            start.first_state(odd, wrong, open_init(begun))
