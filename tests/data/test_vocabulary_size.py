"""Models with more rows than their tokenizer has ids work from data to sampling, on any mesh."""

import json
import shutil
import types

import jax
import numpy as np
import pytest
from etils import epath

from llama_jax.checkpoint.saved_step import load_meta
from llama_jax.config import LoraConfig
from llama_jax.data.prepare.job import prepare
from llama_jax.data.shards.layout import read_manifest
from llama_jax.data.shards.reader import TokenDataset
from llama_jax.data.show import summary
from llama_jax.data.show.rows import Screen
from llama_jax.data.training_data import open_data
from llama_jax.errors import UserError
from llama_jax.inference.decode import Sampling, generate
from llama_jax.inference.loaded_model import open_model
from llama_jax.inference.logprobs import token_logprobs
from llama_jax.interchange.hf import HfSource
from llama_jax.interchange.loading import load, load_init
from llama_jax.interchange.opening import open_init, open_source
from llama_jax.interchange.transfer import convert, export_adapters
from llama_jax.model.llama import logits
from llama_jax.parallel.sharding import param_shardings, param_specs
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train import run as run_lib
from llama_jax.train.overview import remarks
from llama_jax.train.step import abstract_state
from tests.data.sources.test_conversations import quiet
from tests.helpers import (
    TINY,
    mesh_of,
    meshes,
    random_params,
    records,
    replace,
    run_command,
    save_checkpoint,
    shared_step,
    text_config,
)
from tests.parallel.test_sharding import abstract_mesh

pytestmark = pytest.mark.usefixtures("shared_steps")

IDS, ROWS = 300, 320  # ids of the tokenizer; rows of the models


@pytest.fixture(scope="module")
def config(corpus, tokenizer, tmp_path_factory):
    """Returns a config of 4 steps on a mesh with tensor=2, with 300 ids and 320 rows."""
    tokenizer.save(path := tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
    return text_config(
        corpus,
        data__tokenizer=str(path),
        model__vocab_size=ROWS,
        mesh__fsdp=2,
        mesh__context=2,
        mesh__tensor=2,
        train__steps=4,
        train__eval_every=4,
        train__checkpoint_every=4,
    )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """Trains from scratch, and returns the work directory."""
    workdir = tmp_path_factory.mktemp("rows") / "run"
    run_lib.train(config, workdir)
    return workdir


# Data.


def test_shards_do_not_depend_on_the_rows(config, tmp_path, tokenizer):
    """With a given tokenizer, shards stay valid when `model.vocab_size` changes."""
    folder = tmp_path / "shards"
    prepare(config, folder, log=quiet)
    assert read_manifest(folder)["vocab_size"] == IDS
    for rows in (IDS, 301, 32_064):
        lines = []
        prepare(replace(config, model__vocab_size=rows), folder, log=lines.append)
        assert lines == [f"{folder} is prepared already"]
    # Older versions, in which ids and rows were equal in number, wrote the same setting.
    assert read_manifest(folder)["settings"]["vocab_size"] == IDS
    with pytest.raises(UserError, match="have a vocabulary of 300, but model.vocab_size is 299"):
        open_data(replace(config, model__vocab_size=299, data__path=str(folder)), epath.Path("x"))


def test_a_trained_tokenizer_may_have_fewer_ids(config, tmp_path):
    config = replace(config, data__tokenizer="", data__tokenizer_size=290)
    prepare(config, tmp_path / "shards", log=quiet)
    assert Tokenizer.load(tmp_path / "shards" / "tokenizer.model").vocab_size == 290
    other = replace(config, data__tokenizer_size=0)
    with pytest.raises(UserError, match="made with another vocab_size"):
        prepare(other, tmp_path / "shards", log=quiet)
    stream = replace(config, data__streaming=True)
    assert open_data(stream, epath.Path(tmp_path / "stream")).tokenizer.vocab_size == 290
    with pytest.raises(UserError, match="data.tokenizer_size=321 is more than model.vocab_size"):
        replace(config, data__tokenizer_size=321)
    with pytest.raises(UserError, match="data.tokenizer_size must be 0 or more"):
        replace(config, data__tokenizer_size=-1)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_tokenizer_of_more_ids_than_rows_says_what_to_do(config, tmp_path, streaming):
    small = replace(config, model__vocab_size=299, data__streaming=streaming)
    with pytest.raises(UserError, match="has 300 ids.* is 299; raise model.vocab_size to 300 or"):
        open_data(small, epath.Path(tmp_path))


def test_a_damaged_shard_is_still_told_by_the_ids(config, tmp_path, tokenizer):
    """The model has a row for the id, but the tokenizer does not know it."""
    prepare(config, tmp_path / "shards", log=quiet)
    dataset = TokenDataset.open(tmp_path / "shards", "train")
    path = tmp_path / "shards" / "train-00000-000.bin"
    tokens = np.frombuffer(path.read_bytes(), "<u2").copy()
    tokens[len(tokens) // 2] = IDS + 5
    path.write_bytes(tokens.tobytes())
    with pytest.raises(UserError, match="holds ids beyond the vocabulary of 300"):
        dataset.tokens(0, 1000)


def test_the_remedy_for_a_vocabulary_that_does_not_divide(config):
    for rows, tensor, remedy in [(509, 2, 512), (32_001, 4, 32_064), (130, 4, 192)]:
        params = abstract_state(replace(config, model__vocab_size=rows)).params
        with pytest.raises(
            UserError, match=f"tensor = {tensor} .*; model.vocab_size={remedy} does"
        ):
            param_specs(params, abstract_mesh(1, 1, 1, tensor))


# Training.


@pytest.mark.parametrize("shape", meshes((1, 2, 2, 2)))
def test_the_loss_is_that_of_a_softmax_over_all_rows(config, run, tokenizer, shape):
    """NumPy in float64, with logits of one device, gives the same; no target is a padding row."""
    params, mesh = random_params(config.model), mesh_of(shape)
    data = open_data(config, epath.Path(run / "data"))
    batch = data.train.rows(0, range(8))
    assert max(batch["targets"].max(), batch["inputs"].max()) < IDS
    scores = np.asarray(logits(config.model, params, batch["inputs"]), np.float64)
    assert scores.shape[-1] == ROWS
    logs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    expected = -np.take_along_axis(logs, batch["targets"][..., None], -1)[..., 0].mean()
    with jax.set_mesh(mesh):
        step = shared_step(config, mesh)
        placed = jax.device_put(params, step.state_shardings.params)
        arrays = {name: jax.device_put(x, step.batch_sharding) for name, x in batch.items()}
        entropy, weight = step.evaluate(placed, arrays)
    assert float(weight) == batch["targets"].size
    np.testing.assert_allclose(float(entropy) / float(weight), expected, rtol=1e-5)


def test_a_run_from_scratch(config, run):
    assert [r["loss"] for r in records(run) if "loss" in r]
    model = open_model(run, "fsdp=2,tensor=2")
    assert model.tokenizer.vocab_size == IDS and model.params["embed"].shape[0] == ROWS


def test_the_sample_after_training_has_no_padding(config, run, monkeypatch, capsys):
    """The sample is limited to ids (see `test_decode`); a mesh that cannot sample fails no run."""
    seen = []

    def spy(*args, **options):
        seen.append(options["n_ids"])
        return generate(*args, **options)

    monkeypatch.setattr("llama_jax.inference.generation.generate", spy)
    sampled = replace(config, train__sample_prompt="def")
    assert int(run_lib.train(sampled, run).step) == 4  # already finished
    assert seen == [IDS]
    assert "no sample after 'def': the mesh has context=2" in capsys.readouterr().out


def test_resuming_with_other_words_for_the_same_tokenizer(config, run, tmp_path):
    workdir = shutil.copytree(run, tmp_path / "run")
    again = replace(config, data__tokenizer="", data__tokenizer_size=IDS)
    assert int(run_lib.train(again, workdir).step) == 4
    with pytest.raises(UserError, match="model.vocab_size is 320, now 384"):
        run_lib.train(replace(config, model__vocab_size=384), workdir)


def test_a_look_at_the_data(run):
    shown = summary.summary(summary.open_prepared(run), 0, Screen(100, False))
    assert "tokens  300 ids" in shown.splitlines()


@pytest.mark.slow  # four programs are compiled
def test_the_commands(run):
    flags = (f"--checkpoint={run}", "--mesh=tensor=2")
    shown = run_command("generate", *flags, "--prompt=def", "--max_tokens=8", devices=2)
    assert shown.returncode == 0, shown.stderr
    scored = run_command("evaluate", *flags, f"--shards={run / 'data'}", "--json", devices=2)
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["results"]["text"]["tokens"] > 0


# Pretrained weights.


@pytest.fixture(scope="module")
def base(config, tokenizer, tmp_path_factory):
    """Returns a Hugging Face folder with 304 rows and 300 ids, and its weights."""
    folder = tmp_path_factory.mktemp("base")
    config = replace(config, model__vocab_size=304, train__seq_len=64)
    params = jax.tree.map(lambda x: x * np.float32(0.2), random_params(config.model))
    save_checkpoint(folder / "ckpt", config, params, tokenizer.model_bytes)
    convert(open_source("ckpt", epath.Path(folder / "ckpt")), "hf", folder / "hf")
    return folder / "hf", params


@pytest.mark.parametrize(
    ("rank", "rows"),
    [
        (2, 304),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in ((0, ROWS), (2, ROWS), (0, 304))),
    ],
)
def test_fine_tuning_and_back(config, base, rows, rank, tmp_path):
    """Fine-tuning keeps the rows of the base; additional rows begin as their mean."""
    folder, params = base
    tuned = replace(
        config,
        init_from=f"hf:{folder}",
        data__tokenizer="",
        model__vocab_size=rows,
        lora=LoraConfig(rank=rank, base_dtype="float32") if rank else LoraConfig(),
    )
    run_lib.train(tuned, tmp_path / "run")
    meta = load_meta(tmp_path / "run" / "checkpoints" / "4")
    assert Tokenizer(meta.tokenizer_model).vocab_size == IDS
    model = open_model(tmp_path / "run", "tensor=2")
    sampling = Sampling(max_tokens=4, temperature=0.0)
    with jax.set_mesh(model.mesh):
        drawn = generate(model.config.model, model.params, [[1, 5]], sampling, context=16, eos_id=2)
        found = np.asarray(logits(model.config.model, model.params, np.array([[1, 5, 9, 200]])))
    assert len(drawn[0]) and found.shape[-1] == rows
    convert(open_source("ckpt", epath.Path(tmp_path / "run")), "hf", tmp_path / "hf")
    exported = HfSource(tmp_path / "hf")
    assert exported.description.config.model.vocab_size == rows
    back = exported.read("embed", None)
    if rank:  # adapters do not change the embedding
        np.testing.assert_array_equal(back[:304], params["embed"])
        mean = params["embed"].mean(0)
        np.testing.assert_allclose(back[304:], np.tile(mean, (rows - 304, 1)), rtol=1e-5, atol=1e-7)
        export_adapters(tmp_path / "run", tmp_path / "peft", f"hf:{folder}")


def test_adapters_warn_of_ids_whose_rows_they_cannot_train(config, base):
    adapted = replace(config, init_from=f"hf:{base[0]}", lora=LoraConfig(rank=2))
    source = open_init(adapted)

    def warnings(ids, config=adapted):
        data = types.SimpleNamespace(
            tokenizer=types.SimpleNamespace(vocab_size=ids), answers=(0, 0)
        )
        return [line for line in remarks(config, data, source) if line.startswith("warning")]

    assert warnings(304) == warnings(306, replace(adapted, lora=LoraConfig())) == []
    (line,) = warnings(306)
    assert "has no rows for the last 2 ids" in line and "lora.rank=0" in line


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 1, 4)])
def test_added_rows_are_the_mean(config, base, shape):
    folder, params = base
    more = replace(config, init_from=f"hf:{folder}")
    mesh = mesh_of(shape)
    with jax.set_mesh(mesh):
        found = load_init(open_init(more), more, shared_step(more, mesh).state_shardings.params)
    for name, axis in (("embed", 0), ("lm_head", 1)):
        array = np.moveaxis(np.asarray(found[name]), axis, 0)
        theirs = np.moveaxis(params[name], axis, 0)
        np.testing.assert_array_equal(array[:304], theirs)
        mean = np.tile(theirs.astype(np.float64).mean(0), (ROWS - 304, 1))
        np.testing.assert_allclose(array[304:], mean, rtol=1e-5, atol=1e-7)
    with pytest.raises(
        UserError, match="model.vocab_size is 304 in the weights, 303 in the config"
    ):
        open_init(replace(more, model__vocab_size=303))


# Against transformers.


@pytest.mark.parity
def test_an_export_has_the_logits_and_the_loss_of_transformers(run, base, tmp_path):
    """Both a run with padding rows and a model that transformers itself padded agree."""
    import torch
    import transformers

    convert(open_source("ckpt", epath.Path(run)), "hf", tmp_path / "ours")
    padded = transformers.AutoModelForCausalLM.from_pretrained(base[0])
    padded.resize_token_embeddings(305, pad_to_multiple_of=64)
    assert padded.config.vocab_size == ROWS
    padded.save_pretrained(tmp_path / "theirs")
    tokens = np.random.default_rng(0).integers(3, IDS, (2, 17), dtype=np.int32)
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        source = HfSource(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).float()
        ids = torch.from_numpy(tokens).long()
        with torch.no_grad():
            theirs = model(ids, labels=ids)
        config = source.description.config.model
        target = abstract_state(replace(TINY, model=config)).params
        with jax.set_mesh(mesh := mesh_of((1, 2, 1, 2))):
            params = load(
                source, target, param_shardings(target, mesh), lambda _, x: x.astype("f4")
            )
            ours = np.asarray(logits(config, params, tokens[:, :-1]))
            scored, _ = token_logprobs(config, params, tokens[:, :-1], tokens[:, 1:])
        np.testing.assert_allclose(ours, theirs.logits.numpy()[:, :-1], rtol=0, atol=5e-5)
        np.testing.assert_allclose(-np.asarray(scored).mean(), float(theirs.loss), rtol=1e-5)
