import dataclasses
import functools
import importlib.util
import inspect
import json
import math
import re

import jax
import ml_collections
import pytest

from llama_jax import config as config_lib
from llama_jax.config import (
    Config,
    LoraConfig,
    ModelConfig,
    changed_fields,
    field_types,
    from_config_dict,
    from_json,
)
from llama_jax.errors import ANY, UserError
from llama_jax.model.cost import (
    adapter_count,
    attention_flops_per_token,
    flops_by_part,
    flops_per_token,
    parameter_count,
)
from llama_jax.model.weights import abstract_frozen
from llama_jax.train.step import abstract_batch, abstract_state, train_step
from tests.helpers import ROOT, TINY, field_names, replace

# Touvron et al. 2023, table 2, and the exact counts of the released weights.
PAPER = {
    "7b": (4096, 32, 32, 11008, 3.0e-4, 1.0e12, 6_738_415_616),
    "13b": (5120, 40, 40, 13824, 3.0e-4, 1.0e12, 13_015_864_320),
    "33b": (6656, 52, 60, 17920, 1.5e-4, 1.4e12, 32_528_943_616),
    "65b": (8192, 64, 80, 22016, 1.5e-4, 1.4e12, 65_285_660_672),
}

# The released models, with exact counts: dim, layers, heads, kv heads, ffn, vocabulary, context,
# theta, scaling, parameters.
FAMILY = {
    "llama2_7b": (4096, 32, 32, 32, 11008, 32000, 4096, 1e4, 1, 6_738_415_616),
    "llama2_13b": (5120, 40, 40, 40, 13824, 32000, 4096, 1e4, 1, 13_015_864_320),
    "llama2_70b": (8192, 80, 64, 8, 28672, 32000, 4096, 1e4, 1, 68_976_648_192),
    "codellama_7b": (4096, 32, 32, 32, 11008, 32016, 16384, 1e6, 1, 6_738_546_688),
    "codellama_13b": (5120, 40, 40, 40, 13824, 32016, 16384, 1e6, 1, 13_016_028_160),
    "codellama_34b": (8192, 48, 64, 8, 22016, 32000, 16384, 1e6, 1, 33_743_970_304),
    "codellama_70b": (8192, 80, 64, 8, 28672, 32016, 16384, 1e6, 1, 68_976_910_336),
    "llama3_8b": (4096, 32, 32, 8, 14336, 128256, 8192, 5e5, 1, 8_030_261_248),
    "llama3_70b": (8192, 80, 64, 8, 28672, 128256, 8192, 5e5, 1, 70_553_706_496),
    "llama3_1_8b": (4096, 32, 32, 8, 14336, 128256, 131072, 5e5, 8, 8_030_261_248),
    "llama3_1_8b_long": (4096, 32, 32, 8, 14336, 128256, 131072, 5e5, 8, 8_030_261_248),
    "llama3_1_70b": (8192, 80, 64, 8, 28672, 128256, 131072, 5e5, 8, 70_553_706_496),
    "llama3_1_405b": (16384, 126, 128, 8, 53248, 128256, 131072, 5e5, 8, 405_853_388_800),
    "llama3_2_1b": (2048, 16, 32, 8, 8192, 128256, 131072, 5e5, 32, 1_235_814_400),
    "llama3_2_3b": (3072, 28, 24, 8, 8192, 128256, 131072, 5e5, 32, 3_212_749_824),
    "mistral_7b_v0_1": (4096, 32, 32, 8, 14336, 32000, 32768, 1e4, 1, 7_241_732_096),
    "mistral_7b_v0_3": (4096, 32, 32, 8, 14336, 32768, 32768, 1e6, 1, 7_248_023_552),
}

# As published: weights, rate, sequence length, batch, epochs x records or steps, warm-up, clipping.
FINETUNED = {
    # github.com/tatsu-lab/stanford_alpaca, README.
    "alpaca_7b": ("7b", 2e-5, 512, 128, 3 * 52_002 // 128, 0.03, 1.0),
    # github.com/lm-sys/FastChat, README; 70,000 conversations.
    "vicuna_7b": ("7b", 2e-5, 2048, 128, 3 * 70_000 // 128, 0.03, 1.0),
    # arXiv:2305.14314, appendix B.
    "guanaco_7b_qlora": ("7b", 2e-4, 512, 16, 1875, 0.0, 0.3),
    "guanaco_65b_qlora": ("65b", 1e-4, 512, 16, 1875, 0.0, 0.3),
}
# Rows that hold 128 records; the docstrings of the configs have the arithmetic.
PACKED = {"alpaca_7b": 40, "vicuna_7b": 80}


def load(name):
    path = ROOT / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_config_dict(module.get_config()), module.__doc__


@pytest.mark.parametrize("name", PAPER)
def test_configs_are_those_of_the_paper(name):
    config, _ = load(name)
    dim, heads, layers, ffn, peak_lr, tokens, parameters = PAPER[name]
    model = config.model
    assert (model.dim, model.n_heads, model.n_layers, model.ffn_dim) == (dim, heads, layers, ffn)
    assert model.n_kv_heads == heads
    assert model.vocab_size == 32_000
    assert config.optim.peak_lr == peak_lr
    assert (config.optim.beta1, config.optim.beta2, config.optim.weight_decay) == (0.9, 0.95, 0.1)
    assert (config.optim.warmup_steps, config.optim.final_lr_fraction) == (2000, 0.1)
    assert config.train.tokens_per_step == 2048 * 2048
    assert config.train.steps * config.train.tokens_per_step == pytest.approx(tokens, rel=1e-5)
    assert parameter_count(model) == parameters


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_is_as_released(name):
    config, _ = load(name)
    dim, layers, heads, kv_heads, ffn, vocab, context, theta, scaling, parameters = FAMILY[name]
    model = config.model
    assert (model.dim, model.n_layers, model.ffn_dim) == (dim, layers, ffn)
    assert (model.n_heads, model.n_kv_heads, model.vocab_size) == (heads, kv_heads, vocab)
    assert config.train.seq_len == context
    assert (model.rope_theta, model.rope_scaling_factor) == (theta, scaling)
    assert (model.rope_low_freq_factor, model.rope_high_freq_factor) == (1, 4)
    assert model.rope_original_context == 8192
    assert model.norm_eps == 1e-5
    assert model.sliding_window == (4096 if name == "mistral_7b_v0_1" else 0)
    assert model.tied_embeddings == name.startswith("llama3_2")
    assert parameter_count(model) == parameters
    assert config.train.tokens_per_step == 4 * 2**20


def test_the_long_context_of_llama_3_1_comes_in_stages():
    config, _ = load("llama3_1_8b_long")
    stages = [stage.config for stage in config.stages]
    shapes = [(one.train.seq_len >> 10, one.train.global_batch) for one in stages]
    assert shapes == [(8, 512), (16, 256), (32, 128), (64, 64), (128, 32)]
    assert {one.train.tokens_per_step for one in stages} == {4 * 2**20}
    # The first stage is the pretraining of Llama 3, the last one the released Llama 3.1.
    assert stages[0].model == load("llama3_8b")[0].model
    assert stages[-1].model == load("llama3_1_8b")[0].model
    assert [one.model.rope_is_stretched for one in stages] == [False, True, True, True, True]
    assert max(one.train.global_batch * one.train.loss_chunk for one in stages) == 2**16
    ends = [15e12, 15.2e12, 15.4e12, 15.6e12]
    assert [stage.stop for stage in config.stages[:-1]] == [-(-int(n) // 2**22) for n in ends]
    total = config.total(lambda one: one.train.tokens_per_step, config.train.steps)
    assert total == pytest.approx(15.8e12, rel=1e-6)


@pytest.mark.parametrize("name", FINETUNED)
def test_fine_tuning_follows_its_recipe(name):
    config, _ = load(name)
    base, peak_lr, seq_len, batch, steps, warmup, clip_norm = FINETUNED[name]
    train, optim, data = config.train, config.optim, config.data
    assert config.init_from == f"hf:llama-{base}"
    assert parameter_count(config.model) == PAPER[base][-1]
    assert (train.seq_len, train.steps) == (seq_len, steps)
    assert train.global_batch == PACKED.get(name, batch)
    assert (optim.peak_lr, optim.warmup_steps) == (peak_lr, int(warmup * steps))
    assert (optim.beta1, optim.beta2, optim.eps) == (0.9, 0.999, 1e-8)
    assert (optim.weight_decay, optim.clip_norm) == (0.0, clip_norm)
    qlora = name.endswith("_qlora")
    assert optim.final_lr_fraction == (1 if qlora else 0)  # constant, or cosine to zero
    assert data.template == ("alpaca" if name == "alpaca_7b" else "vicuna")
    assert data.packing == "best_fit"
    expected = LoraConfig()
    if qlora:  # adapters on all matrices
        # The paper has rank 64 for 65B too.
        rank, dropout = (64, 0.1) if base == "7b" else (16, 0.05)
        expected = LoraConfig(rank, 16.0, dropout, base_dtype="nf4")
    assert config.lora == expected


@pytest.mark.parametrize("name", [*PAPER, *FAMILY, *FINETUNED])
def test_each_config_makes_a_train_step(name):
    """Traces the shapes of the initial state and of one step on it; nothing is allocated."""
    config, _ = load(name)
    state = dataclasses.replace(abstract_state(config), frozen=abstract_frozen(config))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    model, lora = config.model, config.lora
    assert count == (adapter_count(model, lora) if lora.rank else parameter_count(model))
    batch = abstract_batch(config)
    assert ("segment_ids" in batch) == (name in FINETUNED)
    after, metrics = jax.eval_shape(functools.partial(train_step, config=config), state, batch)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs").glob("*.py")))
def test_numbers_in_a_config_docstring_are_derived_from_it(name):
    config, doc = load(name)
    count = parameter_count(config.model)
    assert f"{count:,} parameters" in doc
    assert f"{config.train.tokens_per_step:,} tokens a step" in doc
    assert f"{config.train.steps:,} steps" in doc
    assert f"--config=configs/{name}.py" in doc


@pytest.mark.parametrize("tied", [False, True])
def test_parameter_count_counts_the_parameters(tied):
    config = replace(TINY, model__n_kv_heads=2, model__tied_embeddings=tied)
    leaves = jax.tree.leaves(abstract_state(config).params)
    assert parameter_count(config.model) == sum(math.prod(leaf.shape) for leaf in leaves)


def test_flops_per_token_by_hand():
    model = ModelConfig(vocab_size=10, dim=8, n_layers=3, n_heads=2, n_kv_heads=1, ffn_dim=5)
    per_layer = 8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 5
    matrices = 3 * per_layer + 8 * 10
    # Scores and weighted values: 2 products x 2 FLOPs x 3 passes x T/2 keys on average x D.
    attention = 3 * 2 * 2 * 3 * (16 / 2) * 8
    assert flops_per_token(model, LoraConfig(), 16) == 6 * matrices + attention
    assert flops_by_part(model, LoraConfig(), 16) == {
        "attention projections": 6 * 3 * (8 * 8 * 2 + 8 * 4 * 2),
        "attention scores": attention,
        "MLP": 6 * 3 * 3 * 8 * 5,
        "output head": 6 * 8 * 10,
    }


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_six_per_weight_that_is_multiplied(tied):
    model = replace(TINY, model__tied_embeddings=tied, model__n_kv_heads=2).model
    norms = (2 * model.n_layers + 1) * model.dim
    looked_up = 0 if tied else model.vocab_size * model.dim
    weights = parameter_count(model) - norms - looked_up
    products = flops_per_token(model, LoraConfig(), 16) - attention_flops_per_token(model, 16)
    assert products == 6 * weights


def test_the_window_of_the_profile():
    assert replace(TINY, train__profile_steps="4,6").train.profile_window == range(4, 7)
    assert replace(TINY, train__profile_steps="20,99").train.profile_window == range(20, 100)
    assert not TINY.train.profile_window


def test_json_gives_the_config_back():
    config = replace(TINY, model__remat="save:q,attn_context", optim__peak_lr=1.5e-5)
    assert from_json(config.to_json()) == config


def test_json_of_an_older_version_has_defaults_for_newer_fields():
    values = json.loads(TINY.to_json())
    for field in ("scaling", "beta_fast", "beta_slow", "truncate", "attention_factor"):
        del values["model"][f"rope_{field}"]
    del values["data"]["packing"], values["dcn"], values["lora"], values["init_from"]
    assert from_json(json.dumps(values)) == TINY
    values["model"]["rope_scaling_factor"] = 8.0  # stands for Llama 3.1's kind, the only one then
    model = from_json(json.dumps(values)).model
    assert (model.rope_scaling, model.rope_is_stretched) == ("llama3", True)


def test_config_dict_gives_the_config_back_and_is_locked():
    values = config_lib.default()
    assert from_config_dict(values) == Config()
    with pytest.raises(AttributeError, match=r"Did you mean .*peak_lr"):
        values.optim.peek_lr = 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"init_from": 3}', "init_from must be of type str"),
        ('{"model": 3}', "config group model is not a mapping"),
        (TINY.to_json().replace('"peak_lr"', '"peek_lr"'), "optim: peek_lr"),
        (TINY.to_json().replace('"optim"', '"optimizer"'), "unknown config groups: optimizer"),
        (re.sub(r'"optim": \{.*?\}', '"optim": 3', TINY.to_json(), flags=re.S), "optim"),
        (TINY.to_json().replace('"dim": 32', '"dim": "32"'), "model.dim"),
        (TINY.to_json().replace('"dim": 32', '"dim": 32.5'), "model.dim"),
        (TINY.to_json().replace('"steps": 20', '"steps": true'), "train.steps"),
        (
            re.sub(r'"peak_lr": [^,]*', '"peak_lr": Infinity', TINY.to_json()),
            "optim.peak_lr must be",
        ),
    ],
)
def test_json_that_is_no_config(text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        from_json(text)


INVALID = [
    ("init_from", "hf", "init_from must be FORMAT:DIR"),
    ("init_from", "npz:there", "FORMAT one of hf, meta, ckpt, got 'npz:there'"),
    ("lora__rank", -1, "lora.rank must be 0 or more, got -1"),
    ("lora__rank", 4, "try --config.init_from=hf:DIR"),
    ("lora__base_dtype", "nf4", "lora.base_dtype has no effect: lora.rank is 0"),
    ("lora__targets", "wq", "lora.targets has no effect"),
    ("lora__alpha", 0.0, "lora.alpha"),
    ("lora__dropout", 1.0, "lora.dropout"),
    ("lora__targets", "wq,w4", "lora.targets must be some of wq,wk,wv,wo,w1,w2,w3"),
    ("lora__targets", "wq,wq", "each once"),
    ("lora__targets", "", "lora.targets"),
    ("lora__base_dtype", "int8", "lora.base_dtype"),
    ("model__dim", 0, "model.dim"),
    ("model__n_heads", 3, "n_heads=3"),
    ("model__n_kv_heads", 3, "n_kv_heads=3"),
    ("model__compute_dtype", "float16", "compute_dtype"),
    ("model__attention", "fast", "attention"),
    ("model__remat", "some", "remat"),
    ("model__remat", "save:q,nothing", "'nothing'"),
    ("model__remat", "save:q;offload:nothing", "'nothing'"),
    ("model__remat", "keep:q", "neither save:NAME"),
    ("model__norm_eps", 0.0, "norm_eps"),
    ("model__explicit_head_dim", -2, "explicit_head_dim"),
    ("model__explicit_head_dim", 7, "even head size"),
    ("model__rope_scaling_factor", 0.5, "rope_scaling_factor"),
    ("model__rope_low_freq_factor", 0.0, "rope_low_freq_factor"),
    ("model__rope_low_freq_factor", 4.0, "less than rope_high_freq_factor"),
    ("model__rope_original_context", 0, "rope_original_context"),
    ("model__rope_scaling", "ntk", "rope_scaling must be one of"),
    ("model__rope_beta_slow", 0.0, "rope_beta_slow"),
    ("model__rope_beta_fast", 1.0, "less than rope_beta_fast"),
    ("model__rope_attention_factor", -1.0, "rope_attention_factor"),
    ("mesh__data", 0, "data"),
    ("mesh__data", -1, "one mesh axis"),
    ("dcn__data", 0, "dcn.data must be positive or -1, got 0"),
    ("data__source", "", "data.source must be non-empty, such as stdlib or a path"),
    ("data__text_field", "", "text_field"),
    ("data__template", "alpaca", "data.template needs data.packing=best_fit"),
    ("data__validation_fraction", 1.0, "validation_fraction"),
    ("data__shard_tokens", 0, "shard_tokens"),
    ("optim__peak_lr", -1.0, "peak_lr"),
    ("optim__peak_lr", math.nan, "peak_lr"),
    ("optim__beta2", 1.5, "beta2"),
    ("optim__weight_decay", -0.1, "weight_decay"),
    ("optim__clip_norm", 0.0, "clip_norm"),
    ("optim__moment_dtype", "int8", "moment_dtype"),
    ("optim__warmup_steps", 20, "warmup_steps=20"),
    ("optim__warmup_steps", -1, "warmup_steps"),
    ("optim__schedule", "poly", "optim.schedule must be one of cosine, linear, constant, wsd, inv"),
    ("optim__decay_steps", -1, "optim.decay_steps must be 0 or more"),
    ("optim__decay_shape", "cosine", "optim.decay_shape must be one of 1-sqrt, linear"),
    ("train__grad_accum", 3, "grad_accum=3"),
    ("train__seq_len", 0, "seq_len"),
    ("train__z_loss", -1.0, "z_loss"),
    ("train__seed", -1, "seed"),
    ("train__log_every", 0, "log_every"),
    ("train__max_skipped", 0, "train.max_skipped"),
    ("train__spike_factor", 0.5, "train.spike_factor must be 0 or at least 1, got 0.5"),
    ("train__spike_factor", math.nan, "train.spike_factor"),
    ("train__max_rewinds", -1, "train.max_rewinds"),
    ("train__rewind_steps", 0, "train.rewind_steps"),
    ("train__keep_every", -1, "keep_every"),
    ("train__keep_best", -1, "keep_best"),
    ("train__max_failed_saves", -1, "max_failed_saves"),
    ("train__step_timeout", -1, "step_timeout"),
    ("train__save_timeout", -1, "save_timeout"),
    ("train__profile_steps", "10", "such as 10,15, got '10'"),
    ("train__profile_steps", "1,2,3", "such as 10,15"),
    ("train__profile_steps", "0,2", "two steps in 1..20"),
    ("train__profile_steps", "6,4", "the first not after the last"),
    ("train__profile_steps", "21,22", "two steps in 1..20"),
]


@pytest.mark.parametrize(("name", "value", "message"), INVALID)
def test_a_value_out_of_range_is_an_error_that_names_it(name, value, message):
    with pytest.raises(UserError, match=re.escape(message)):
        replace(TINY, **{name: value})


WIDE = ("train.seed", "data.shard_tokens", "data.part_bytes")
FIELD_TYPES = config_lib.field_types()
GROUPS = [one.type for one in dataclasses.fields(Config)]
# Values that no field accepts.
ODD = {
    int: (10**30, -(10**30), 2**63, -2, True, 1.0, "1", None),
    float: (math.nan, math.inf, -math.inf, 1e39, 1e-40, 1e-50, -1.0, True, 10**30, "1", None),
    bool: (0, 1.0, "true", None),
    str: (0, 1.0, True, b"x", None),
}


@pytest.mark.parametrize("name", FIELD_TYPES)
def test_an_odd_value_of_any_field_is_an_error_that_names_it(name):
    group, _, field = name.rpartition(".")
    odd = ODD[FIELD_TYPES[name]]
    if FIELD_TYPES[name] is int and name not in WIDE:
        odd += (2**31,)
    for value in odd:
        values = config_lib.default().to_dict()
        (values[group] if group else values)[field] = value
        with pytest.raises(UserError, match=rf"\b{field}\b") as error:
            from_config_dict(ml_collections.ConfigDict(values))
        assert len(str(error.value)) < 300 and "\n" not in str(error.value), value
        # A program may give a float field an int.
        if type(value) is FIELD_TYPES[name]:
            with pytest.raises(UserError, match=rf"\b{field}\b"):
                replace(Config(), **{name.replace(".", "__"): value})


@pytest.mark.parametrize("value", [1.0, 1 - 1e-9])
@pytest.mark.parametrize("name", ["optim__beta1", "optim__beta2", "lora__dropout"])
def test_one_is_no_beta_and_no_dropout_nor_is_what_rounds_to_it(name, value):
    """AdamW divides by 1 - beta, dropout by 1 - rate, in float32."""
    with pytest.raises(UserError, match=name.partition("__")[2]):
        replace(TINY, **{name: value})


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"train__steps": 50, "optim__warmup_steps": 80}, "optim.warmup_steps=5"),
        ({"train__steps": 1, "optim__warmup_steps": 80}, "optim.warmup_steps=0"),
        (
            {"optim__schedule": "wsd", "optim__warmup_steps": 10, "optim__decay_steps": 11},
            "optim.decay_steps=10",
        ),
        ({"optim__schedule": "wsd", "optim__warmup_steps": 17}, "optim.decay_steps=3"),
        (
            {"optim__schedule": "wsd", "optim__warmup_steps": 20, "optim__decay_steps": 1},
            "optim.warmup_steps=2",
        ),
        ({"train__grad_accum": 12, "train__global_batch": 32}, "train.grad_accum=4"),
        ({"model__n_heads": 12, "model__n_kv_heads": 8, "model__dim": 48}, "model.n_kv_heads=4"),
        ({"model__dim": 33}, "model.dim=32"),
        ({"model__explicit_head_dim": 7}, "model.explicit_head_dim=8"),
        ({"model__vocab_size": 100, "data__tokenizer_size": 200}, "model.vocab_size=200"),
        ({"train__profile_steps": "30,40"}, "train.profile_steps=2,5"),
    ],
)
def test_fields_that_do_not_fit_each_other_come_with_a_flag_that_mends_them(changes, flag):
    with pytest.raises(UserError, match=re.escape(f"set --config.{flag}")):
        made(changes)
    name, _, value = flag.partition("=")
    value = FIELD_TYPES[name](value)
    assert made({**changes, name.replace(".", "__"): value})


def test_warm_up_and_decay_must_fit_into_the_run():
    wsd = replace(
        TINY, optim=config_lib.OptimConfig(warmup_steps=5, schedule="wsd", decay_steps=15)
    )
    with pytest.raises(UserError) as error:
        replace(wsd, optim__decay_steps=16)
    assert str(error.value) == (
        "optim.warmup_steps=5 and optim.decay_steps=16 are more than train.steps=20; set "
        "--config.optim.decay_steps=15"
    )
    with pytest.raises(UserError) as error:
        replace(TINY, optim=config_lib.OptimConfig(warmup_steps=17, schedule="wsd"))
    assert "optim.decay_steps=4 (its default, a fifth of train.steps) are" in str(error.value)
    # A run that has another schedule now may already have the decay of a later one.
    replace(TINY, optim__decay_steps=1000)


@pytest.mark.parametrize(("given", "steps", "length"), [(0, 20, 4), (0, 3, 1), (7, 20, 7)])
def test_the_length_of_the_decay(given, steps, length):
    assert config_lib.OptimConfig(decay_steps=given).decay_length(steps) == length


def made(changes):
    """Returns the tiny config with all changes made at once."""
    values = json.loads(TINY.to_json())
    for name, value in changes.items():
        group, _, field = name.partition("__")
        values[group][field] = value
    return from_json(json.dumps(values))


def test_blocks_of_nf4_must_divide_the_inputs():
    wide = replace(TINY, model__dim=64, model__ffn_dim=48, init_from="hf:there", lora__rank=2)
    with pytest.raises(
        UserError, match=r"blocks of 64 inputs, which do not divide model.ffn_dim = 48"
    ):
        replace(wide, lora__base_dtype="nf4")


def test_head_size_must_be_even():
    with pytest.raises(UserError, match="even head size"):
        ModelConfig(dim=9, n_heads=3, n_kv_heads=3)


def test_difference_names_what_changed():
    other = replace(TINY, optim__peak_lr=0.5, train__seed=7, init_from="hf:there")
    found = changed_fields(TINY, other)
    assert found == {
        "optim.peak_lr": (1e-2, 0.5),
        "train.seed": (0, 7),
        "init_from": ("", "hf:there"),
    }
    assert changed_fields(TINY, dataclasses.replace(TINY)) == {}


def test_the_fields_are_those_of_the_config():
    assert set(field_types()) == field_names(".")
    assert (field_types()["train.steps"], field_types()["init_from"]) == (int, str)


@pytest.mark.parametrize("name", FIELD_TYPES)
def test_a_field_has_a_meaning_and_a_number_has_a_check(name):
    """A number for which any value is right would be an exception here."""
    found = config_lib.all_fields()[name]
    check, meaning = found.metadata["check"], found.metadata["meaning"]
    assert meaning.endswith(".") and meaning == " ".join(meaning.split())
    assert check is not ANY or found.type in (bool, str)
    assert check.holds(found.default)


@pytest.mark.parametrize("group", [*filter(dataclasses.is_dataclass, GROUPS), Config])
def test_help_lists_the_fields_of_a_group(group):
    text = inspect.getdoc(group)
    _, _, listed = text.partition("\n\nAttributes:\n")
    names = re.findall(r"^  (\w+) \(\w+[^)]", listed, re.M)
    assert names == [one.name for one in dataclasses.fields(group)]
    assert max(map(len, text.splitlines())) < 100


def test_help_has_the_type_check_default_and_meaning_of_a_field():
    text = inspect.getdoc(config_lib.TrainConfig)
    assert "\n  seq_len (int, positive; default 2_048): Tokens per sequence.\n" in text
    assert "\n  sample_prompt (str; default ''): Print a continuation of this text" in text
