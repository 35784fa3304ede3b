"""The exchangeable parts of a training work on any mesh: optimiser, architecture, loss, metrics."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import PartitionSpec as P

from llama_jax.checkpoint.saved_step import find_step, load_meta
from llama_jax.data.source import BatchSource
from llama_jax.data.training_data import TrainingData
from llama_jax.errors import UserError
from llama_jax.inference.decode import Sampling
from llama_jax.model.llama import (
    Architecture,
    Attention,
    Block,
    SwiGLU,
    Variant,
    forward,
    logits,
    rms_norm,
)
from llama_jax.parameters import (
    PARAMETERS,
    SHARD,
    Parameter,
    parameter_table,
    path_of,
    row_of,
    shape_of,
)
from llama_jax.train.by_hand import mean_loss, restore_state, sample_ids, save_state
from llama_jax.train.parts import Parts, next_token_loss
from llama_jax.train.run import run
from llama_jax.train.step import abstract_state, jit_step
from tests.helpers import TINY, mesh_of, one_line_error, random_batch, replace, run_command

# On more devices, an optimiser with many independent collectives can use up the threads of XLA:CPU.
ONE, FOUR = (1, 1, 1, 1), (1, 2, 1, 2)


def muon_dimensions(params):
    def dimensions(keys, _):
        row = row_of(path_of(keys))
        if not (row.is_stacked and row.is_matrix):
            return None
        places = [tuple(map(row.axes.index, axes)) for axes in (row.inputs, row.outputs)]
        return optax.contrib.MuonDimensionNumbers(*places)

    return jax.tree.map_with_path(dimensions, params)


OPTIMIZERS = {
    "muon": functools.partial(
        optax.contrib.muon, muon_weight_dimension_numbers=muon_dimensions, ns_steps=2
    ),
    "adafactor": functools.partial(optax.adafactor, min_dim_size_to_factor=8),
    "lion": optax.lion,
    "chain": optax.chain(optax.clip(1.0), optax.scale_by_belief(), optax.scale(-1e-3)),
    "named rate": optax.inject_hyperparams(optax.sgd)(learning_rate=0.25, momentum=0.9),
    "one vector": optax.flatten(optax.adam(1e-3)),
    "needs the loss": optax.chain(optax.adam(1e-3), optax.contrib.reduce_on_plateau()),
    "keys": functools.partial(optax.noisy_sgd, key=jax.random.key(5)),
    "empty arrays": optax.contrib.galore,
    "two steps": optax.MultiSteps(optax.adamw(1e-3), 2).gradient_transformation(),
}
QUICK = ("muon", "adafactor")


def trained(parts, shape, steps=2, config=TINY):
    """Returns the compiled step, the state after `steps` steps, and their losses."""
    losses = []
    with jax.set_mesh(mesh_of(shape)):
        compiled = jit_step(config, mesh_of(shape), parts)
        state = compiled.init(jax.random.key(0))
        for step in range(steps):
            state, metrics = compiled.train(state, random_batch(config, step))
            losses.append(float(metrics["loss"]))
    return compiled, state, losses


def same_bits(left, right):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in OPTIMIZERS],
)
def test_any_optimizer_trains_skips_saves_and_resumes(name, tmp_path):
    parts = Parts(optimizer=OPTIMIZERS[name])
    _, _, expected = trained(parts, ONE)
    compiled, state, losses = trained(parts, FOUR)
    np.testing.assert_allclose(losses, expected, atol=2e-6)
    with jax.set_mesh(mesh_of(FOUR)):
        folder = save_state(tmp_path, compiled, state)
        restored = restore_state(folder, compiled)
        assert same_bits(restored.to_items(), state.to_items())
        # A skipped step changes only the counters of batches in the state.
        bad = random_batch(TINY, 2)
        bad["weights"][0, 0] = np.nan
        before = jax.device_get((state.params, state.opt_state))
        state, metrics = compiled.train(state, bad)
        assert metrics["skipped"] == 1
        assert same_bits(before, (state.params, state.opt_state))
        state, metrics = compiled.train(state, random_batch(TINY, 3))
        again, _ = compiled.train(restored, bad)
        again, _ = compiled.train(again, random_batch(TINY, 3))
        assert same_bits(state.to_items(), again.to_items())
        assert not same_bits(before[0], state.params) or name == "two steps"
        assert compiled.train._cache_size() == 1
    rate = {"chain": np.nan, "named rate": 0.25}.get(name)
    if rate is not None:
        np.testing.assert_equal(float(metrics["learning_rate"]), rate)


def test_the_state_of_an_optimizer_lies_with_the_parameters():
    def specs_of(parts):
        with jax.set_mesh(mesh_of(FOUR)):
            state = jit_step(TINY, mesh_of(FOUR), parts).placed_state()
        found = jax.tree.leaves_with_path(state.opt_state)
        return {path_of(keys): leaf.sharding.spec for keys, leaf in found}

    factors = specs_of(Parts(optimizer=OPTIMIZERS["adafactor"]))
    # D x (N H) becomes two factors; the table divides D over SHARD and N over tensor.
    wq = [spec for path, spec in factors.items() if "v_" in path and path.endswith("attn/wq")]
    assert len(wq) == 2
    assert {axis for spec in wq for axis in spec} >= {"tensor", SHARD}
    momentum = specs_of(Parts(optimizer=OPTIMIZERS["muon"]))
    [w2] = [spec for path, spec in momentum.items() if path.endswith("mlp/w2")]
    assert w2 == PARAMETERS["layers/mlp/w2"].placement
    vector = specs_of(Parts(optimizer=OPTIMIZERS["one vector"]))
    assert {spec for path, spec in vector.items() if path.endswith(("mu", "nu"))} == {P()}
    wide = replace(TINY, model__vocab_size=4096)
    with jax.set_mesh(mesh_of(FOUR)):
        step = jit_step(wide, mesh_of(FOUR), Parts(optimizer=OPTIMIZERS["one vector"]))
    assert step.placed_state().opt_state[0].mu.sharding.spec == P(SHARD)  # from 2**16 elements on


def test_what_is_no_optimizer_is_refused():
    abstract_state(TINY, Parts(optimizer=optax.lion))
    for wrong in (lambda schedule: schedule, "muon"):
        with pytest.raises(UserError, match=r"Parts.optimizer must be an optax transformation"):
            abstract_state(TINY, Parts(optimizer=wrong))


class NormedHeads(Attention):
    def heads(self, name, x_BTNH):
        shape = shape_of("H", self.config)
        scale_H = self.param(f"{name}_norm", nn.initializers.ones, shape)
        return rms_norm(x_BTNH, scale_H, self.config.norm_eps)


class NormedBlock(Block):
    attention = NormedHeads


class GEGLU(SwiGLU):
    gated = staticmethod(lambda gate, up: jax.nn.gelu(gate) * up)


class GeluBlock(Block):
    mlp = GEGLU


ROWS = parameter_table(
    Parameter("layers/attn/q_norm", "LH", P(), decays=False),
    Parameter("layers/attn/k_norm", "LH", P(), decays=False),
)
QK_NORM = Architecture(NormedBlock, {**PARAMETERS, **ROWS})


def test_a_block_with_parameters_of_its_own_trains_on_any_mesh():
    plain = logits(TINY.model, plain_params := plain_state(), tokens := np.ones((1, 8), np.int32))
    parts = Parts(architecture=QK_NORM)
    _, state, expected = trained(parts, ONE)
    compiled, _, losses = trained(parts, FOUR)
    np.testing.assert_allclose(losses, expected, atol=2e-6)
    scale = state.params["layers"]["attn"]["q_norm"]
    assert scale.shape == (TINY.model.n_layers, TINY.model.head_dim)
    assert np.abs(np.asarray(scale) - 1).max() > 1e-5  # it has a gradient
    assert compiled.state_shardings.params["layers"]["attn"]["q_norm"].spec == P()
    # The plain model in the same process did not change.
    assert same_bits(plain, logits(TINY.model, plain_params, tokens))
    assert "q_norm" not in plain_params["layers"]["attn"]


def plain_state():
    return trained(Parts(), ONE, steps=0)[1].params


def test_queries_and_keys_are_normalised_before_rope():
    """Checks the norm before attention: RoPE keeps it, and it is the root of the head's size."""
    _, state, _ = trained(Parts(architecture=QK_NORM), ONE, steps=0)
    seen = []

    def record(q, k, v, **options):
        seen.append((q, k))
        return v.repeat(q.shape[2] // v.shape[2], axis=2)

    class Recorded(NormedHeads):
        attend = staticmethod(record)

    class RecordedBlock(Block):
        attention = Recorded

    one = replace(TINY, model__n_layers=1).model
    recorded = Architecture(RecordedBlock, QK_NORM.parameters)
    layer = jax.tree.map(lambda x: x[:1], state.params["layers"])
    weights = Variant({**state.params, "layers": layer}, recorded)
    with jax.disable_jit():
        forward(one, weights, np.arange(8, dtype=np.int32)[None])
    for x in seen[-1]:
        norms = np.sqrt(np.sum(np.square(np.asarray(x, np.float64)), -1))
        np.testing.assert_allclose(norms, TINY.model.head_dim**0.5, rtol=1e-3)


def test_a_row_for_each_array_is_asked_for():
    with pytest.raises(UserError, match=r"no row for parameter layers/attn/k_norm \(2, 8\)"):
        trained(Parts(architecture=Architecture(NormedBlock)), ONE, steps=0)
    with pytest.raises(UserError, match="no parameter for row.*k_norm, layers/attn/q_norm"):
        trained(Parts(architecture=Architecture(Block, QK_NORM.parameters)), ONE, steps=0)


def accuracy(hidden_BTD, head_DV, batch, config):
    objective, entropy, weight = next_token_loss(hidden_BTD, head_DV, batch, config)
    right_BT = jnp.argmax(hidden_BTD @ head_DV, axis=-1) == batch["targets"]
    return 2 * objective, entropy, weight, {"accuracy": jnp.sum(right_BT * batch["weights"])}


def test_a_loss_and_a_metric_of_ones_own():
    metrics_of = {"weight_norm": lambda view: optax.tree.norm(view.params)}
    parts = Parts(loss=accuracy, metrics=metrics_of)
    config = replace(TINY, train__grad_accum=2)
    for shape in (ONE, FOUR):
        with jax.set_mesh(mesh_of(shape)):
            plain = jit_step(config, mesh_of(shape))
            own = jit_step(config, mesh_of(shape), parts)
            state = own.init(jax.random.key(0))
            norm = float(optax.tree.norm(jax.device_get(state.params)))
            batch = random_batch(config, 0)
            model_logits = logits(config.model, jax.device_get(state.params), batch["inputs"])
            right = np.argmax(model_logits, -1) == batch["targets"]
            share = float(np.average(right, weights=batch["weights"]))
            metrics = jax.device_get(own.train(state, batch)[1])
            expected = jax.device_get(plain.train(plain.init(jax.random.key(0)), batch)[1])
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert metrics["grad_norm"] == pytest.approx(2 * expected["grad_norm"], rel=1e-5)
        assert metrics["objective"] == pytest.approx(2 * expected["loss"], rel=1e-6)
        assert metrics["accuracy"] == pytest.approx(share, abs=1e-6)
        assert metrics["weight_norm"] == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (Parts(loss=lambda *_: (1.0, 2.0)), r"the loss .*<lambda> must return three scalars"),
        (
            Parts(loss=lambda hidden, *_: (hidden.sum(), hidden, 1.0)),
            r"must return three scalars .*; it returned \(\(\), \(32, 16, 32\), \(\)\)",
        ),
        (
            Parts(loss=lambda hidden, *_: (hidden.sum(), 1.0, 1.0, {"loss": 1.0})),
            "the log has a metric 'loss' already",
        ),
        (Parts(metrics={"mfu": lambda view: view.loss}), "the log has a metric 'mfu' already"),
        (
            Parts(metrics={"rows": lambda view: view.batch["weights"].sum(axis=1)}),
            r"the metric 'rows' must be a scalar; its shape is \(32,\)",
        ),
    ],
)
def test_a_loss_or_a_metric_that_cannot_be_logged_is_refused(parts, message):
    with pytest.raises(UserError, match=message):
        trained(parts, ONE, steps=1)


class Rows(BatchSource):
    def rows(self, step, rows):
        batch = random_batch(TINY, step)
        return {name: array[rows.start : rows.stop] for name, array in batch.items()}


def test_a_run_with_other_parts_is_logged_saved_and_goes_on_with_the_same_only(tmp_path, capsys):
    parts = Parts(
        architecture=QK_NORM,
        loss=accuracy,
        optimizer=optax.lion,
        metrics={"weight_norm": lambda view: optax.tree.norm(view.params)},
        shown=("accuracy",),
    )
    config = replace(TINY, train__steps=4, train__log_every=1, train__checkpoint_every=2)
    data = TrainingData(Rows())
    whole = run(config, tmp_path / "whole", data=data, parts=parts).state
    output = capsys.readouterr().out
    assert f"parts   architecture: {__name__}.NormedBlock" in output
    assert "  weight_norm " in output and "  accuracy " in output
    assert "llama_jax.generate" not in output
    records = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").open()]
    assert all({"accuracy", "weight_norm"} <= set(record) for record in records)
    folder = find_step(tmp_path / "whole")
    assert load_meta(folder, QK_NORM.name).parts == parts.names()

    # A resumed run gives the same bits, and refuses other parts.
    (tmp_path / "whole/checkpoints/4").rename(tmp_path / "4")
    again = run(config, tmp_path / "whole", data=data, parts=parts).state
    assert same_bits(whole.to_items(), again.to_items())
    other = Parts(architecture=QK_NORM, optimizer=optax.lion)
    with pytest.raises(UserError, match=f"the loss is {__name__}.accuracy, now LLaMA's"):
        run(config, tmp_path / "whole", data=data, parts=other)
    with pytest.raises(UserError, match="architecture of its own, .*NormedBlock.*as a LLaMA"):
        run(config, tmp_path / "whole", data=data)
    error = one_line_error(run_command("generate", f"--checkpoint={folder}", "--prompt=x"))
    assert "trained with an architecture of its own" in error


def test_a_notebook_saves_restores_evaluates_and_samples(tmp_path):
    parts = Parts(architecture=Architecture(GeluBlock))
    compiled, state, _ = trained(parts, FOUR)
    with jax.set_mesh(mesh_of(FOUR)):
        folder = save_state(tmp_path, compiled, state)
        restored = restore_state(tmp_path, compiled)
        batches = [random_batch(TINY, step) for step in (5, 6)]
        loss = mean_loss(compiled, restored, batches)
        sums = [compiled.evaluate(compiled.weights(state), batch) for batch in batches]
        total, weight = np.sum(jax.device_get(sums), axis=0)
        assert loss == pytest.approx(total / weight, rel=1e-6)
        greedy = Sampling(max_tokens=5, temperature=0)
        [ids] = sample_ids(compiled, restored, [[1, 2, 3]], greedy)
        assert len(ids) == 5
        [cut] = sample_ids(compiled, restored, [[1, 2, 3]], greedy, end_ids=[ids[1]])
        assert cut == ids[: ids.index(ids[1]) + 1]
        with pytest.raises(UserError, match="nothing to evaluate"):
            mean_loss(compiled, restored, [])
        plain = jit_step(TINY, mesh_of(FOUR))
        with pytest.raises(UserError, match="architecture of its own, .*GeluBlock"):
            restore_state(folder, plain)
        lion = jit_step(TINY, mesh_of(FOUR), Parts(parts.architecture, optimizer=optax.lion))
        with pytest.raises(UserError, match="the optimizer is LLaMA's, now optax"):
            restore_state(folder, lion)
    # Decoding with a cache gives the same tokens as the whole sequence, with the block's own MLP.
    model = TINY.model
    sequence = np.array([[1, 2, 3, *ids[:-1]]], np.int32)
    weights = jax.device_get(compiled.weights(state))
    logits_BTV = logits(model, weights, sequence)
    assert np.argmax(logits_BTV, -1)[0, 2:].tolist() == ids
    assert not np.array_equal(logits_BTV, logits(model, weights.params, sequence))
