"""The modules that adapter_config.json names are those that PEFT's own matching finds."""

import random
import re

import pytest

from llama_jax.config import MATRICES
from llama_jax.errors import UserError
from llama_jax.interchange import peft_targets
from llama_jax.interchange.peft_targets import AdapterSpec, module_of, targets_of

LAYERS = 4
ALL = {(name, layer) for name in MATRICES for layer in range(LAYERS)}
PLAIN = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}


def named(changes):
    return targets_of({**PLAIN, **changes}, LAYERS)


def of(*names):
    return {(name, layer) for name in names for layer in range(LAYERS)}


FORMS = {
    "list": (["q_proj", "v_proj"], of("wq", "wv")),
    "one": (["down_proj"], of("w2")),
    "twice": (["down_proj", "down_proj"], of("w2")),
    "with the parent": (["self_attn.q_proj", "mlp.up_proj"], of("wq", "w3")),
    "of another family": (["query_key_value", "o_proj"], of("wo")),
    "full names": ([f"model.layers.{i}.self_attn.q_proj" for i in range(LAYERS)], of("wq")),
    "some full names": (["model.layers.1.mlp.up_proj", "2.mlp.up_proj"], {("w3", 1), ("w3", 2)}),
    "part of a name": (["proj", "q_proj"], of("wq")),
    "all-linear": ("all-linear", ALL),
    "All-Linear": ("All-Linear", ALL),
    "expression": (r".*\.(q|k)_proj", of("wq", "wk")),
    "expression of the parent": (r".*(self_attn|mlp)\..*_proj", ALL),
    "expression without .*": (r"q_proj|x.*", None),
    "name as an expression": ("q_proj", None),
    "lazy": (r".*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?", of("wq", "w2")),
    "layers": (r"model\.layers\.[0-2]\..*v_proj", of("wv") - {("wv", 3)}),
    "look ahead": (r"(?!.*\.k_proj).*self_attn\..*_proj", of("wq", "wv", "wo")),
    "back reference": (r".*\.(s|m)elf_(a)t\w*\.\w_proj", of("wq", "wk", "wv", "wo")),
    "flags": (r"(?i).*\.O_PROJ", of("wo")),
    "head": (["q_proj", "lm_head"], "lm_head"),
    "embedding": (["embed_tokens"], "model.embed_tokens"),
    "norm": (r".*(q_proj|norm)", "norm"),
    "parents": (r".*self_attn.*", "self_attn"),
    "everything": (r".*", "model"),
    "nothing": ([], None),
    "silent": (None, of("wq", "wv")),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    targets, wanted = FORMS[form]
    if isinstance(wanted, set):
        assert set(named({"target_modules": targets})) == wanted
        return
    with pytest.raises(UserError, match=f"must be some of q_proj.*{wanted or ''}"):
        named({"target_modules": targets})


PARTS = {
    "all": ({"layers_to_transform": [3, 2, 1, 0]}, of("wq", "wv")),
    "more": ({"layers_to_transform": list(range(40))}, of("wq", "wv")),
    "one": ({"layers_to_transform": 2}, {("wq", 2), ("wv", 2)}),
    "none": ({"layers_to_transform": []}, of("wq", "wv")),
    "named": ({"layers_to_transform": [0, 1], "layers_pattern": "layers"}, None),
    "list": ({"layers_to_transform": [0, 1], "layers_pattern": ["h", "layers"]}, None),
    "other": ({"layers_to_transform": [0, 1], "layers_pattern": ["blocks"]}, set()),
    "excluded": ({"exclude_modules": ["v_proj", "lm_head"]}, of("wq")),
    "excluded by an expression": ({"exclude_modules": r".*\.[1-9]\..*"}, {("wq", 0), ("wv", 0)}),
}


@pytest.mark.parametrize("part", PARTS)
def test_layers_and_exclusions(part):
    changes, wanted = PARTS[part]
    if wanted is None:
        wanted = {(name, layer) for name, layer in of("wq", "wv") if layer < 2}
    if wanted:
        assert set(named(changes)) == wanted
    else:
        with pytest.raises(UserError, match="must be some of"):
            named(changes)


def test_ranks_and_alphas_by_pattern():
    assert set(named({"rank_pattern": {".*": 4}}).values()) == {AdapterSpec(4, 16.0)}
    assert set(named({"rank_pattern": {"k_proj": 4}}).values()) == {AdapterSpec(8, 16.0)}
    both = named({"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"self_attn.v_proj": 2.5}})
    assert {(name, target) for (name, _), target in both.items()} == {
        ("wq", AdapterSpec(4, 16.0)),
        ("wv", AdapterSpec(8, 2.5)),
    }
    first = named({"rank_pattern": {r"layers\.0\..*": 2, "q_proj": 4, "model.*": 6}})
    assert (first["wq", 0].rank, first["wq", 1].rank, first["wv", 1].rank) == (2, 4, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": "("}, r"expression '\(' is malformed: missing \)"),
        ({"target_modules": 3}, "target_modules must be a list of names, got 3"),
        ({"target_modules": [3]}, r"target_modules must be a list of names, got \[3\]"),
        ({"target_modules": {"q_proj": 1}}, "target_modules must be a list of names"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform must be of type int, got '0'"),
        ({"layers_to_transform": True}, "layers_to_transform must be of type int, got True"),
        ({"layers_to_transform": [0], "target_modules": ".*"}, "layers_to_transform needs a list"),
        ({"layers_to_transform": [0], "layers_pattern": "(("}, "is malformed"),
        ({"rank_pattern": {"*": 3}}, "is malformed: nothing to repeat"),
        ({"rank_pattern": {"q_proj": "3"}}, r"rank_pattern\['q_proj'\] must be of type int"),
        ({"rank_pattern": [3]}, r"rank_pattern must be numbers by module, got \[3\]"),
        ({"r": True}, "r must be of type int, got True"),
        ({"lora_alpha": None}, "lora_alpha must be of type float, got None"),
    ],
)
def test_values_that_are_no_targets(changes, message):
    with pytest.raises(UserError, match=message):
        named(changes)


def test_an_expression_that_never_ends(monkeypatch):
    monkeypatch.setattr(peft_targets, "MATCH_SECONDS", 1)
    for changes in ({"target_modules": r"((\w|.)*)*x"}, {"rank_pattern": {r"((\w|.)*)*x": 1}}):
        with pytest.raises(UserError, match="takes more than 1 s of processor time"):
            named(changes)


def generated(count):
    """Yields random configs with lists and expressions made of parts of module names."""
    rng = random.Random(0)
    modules = [module_of(name, layer) for name in MATRICES for layer in range(LAYERS)]
    letters = [*"qkvo", "gate", "up", "down"]
    for _ in range(count):
        picked = rng.sample(letters, rng.randrange(1, 5))
        tails = [name.split(".", rng.randrange(5))[-1] for name in rng.sample(modules, 3)]
        lists = [f"{letter}_proj" for letter in picked] + rng.choice(([], tails, ["proj", "x", ""]))
        some = "|".join(picked)
        expressions = [
            rf".*\.({some})_proj",
            rf"model\.layers\.({rng.randrange(4)}|{rng.randrange(4)})\..*\.(?:{some})_proj$",
            rf".*?(?:self_attn|{rng.choice(('mlp', 'x'))}).*?(?:{some})_proj.*?",
            rf"^(?!.*layers\.[{rng.randrange(4)}-9]).*({some})_proj",
            rf"(.+\.)*[a-{rng.choice('gkqz')}]\w*_proj",
            rf"({rng.choice(tails)})",
            rng.choice(("all-linear", "ALL-LINEAR")),
        ]
        values = {"r": 8, "lora_alpha": 16, "rank_pattern": {}, "alpha_pattern": {}}
        values["target_modules"] = rng.choice((lists, lists, *expressions))
        if isinstance(values["target_modules"], list) and rng.random() < 0.5:
            layers = rng.sample(range(6), rng.randrange(0, 5))
            values["layers_to_transform"] = rng.choice((layers, layers, rng.randrange(4)))
            if layers and rng.random() < 0.7:
                patterns = ("layers", ["layers"], ["h", "layers"], "model.layers", "h", "a|layers")
                values["layers_pattern"] = rng.choice(patterns)
        if rng.random() < 0.4:
            out = ([f"{picked[0]}_proj"], ["mlp"], rf".*\.{rng.randrange(4)}\..*", ["x", *tails])
            values["exclude_modules"] = rng.choice(out)
        for name in ("rank_pattern", "alpha_pattern"):
            for _ in range(rng.randrange(3)):
                key = rng.choice((f"{rng.choice(letters)}_proj", rng.choice(tails), r".*attn\..*"))
                values[name][key] = rng.randrange(1, 9)
        yield values


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:The following:RuntimeWarning")
def test_the_same_modules_and_ranks_as_peft():
    """120 random configs give the modules, ranks and alphas of PEFT on a LLaMA and a Mistral."""
    import peft
    import transformers

    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    ours = {module_of(name, layer): (name, layer) for name, layer in ALL}
    same = refused = 0
    for number, values in enumerate(generated(120)):
        kind = ("Llama", "Mistral")[number % 2]
        config = getattr(transformers, f"{kind}Config")(**sizes)
        base = getattr(transformers, f"{kind}ForCausalLM")(config)
        known = {name for name, _ in base.named_modules()}
        assert known - {""} == {*ours, *peft_targets._AROUND, "lm_head"} | {
            f"model.layers.{layer}{module}"
            for layer in range(LAYERS)
            for module in peft_targets._INSIDE
        }
        try:
            model = peft.get_peft_model(base, peft.LoraConfig(**values, task_type="CAUSAL_LM"))
        except (ValueError, re.error) as error:
            with pytest.raises(UserError):
                targets_of(values, LAYERS)
            refused += 1
            assert "arget" in str(error), error
            continue
        layers = {
            name.removeprefix("base_model.model."): module
            for name, module in model.named_modules()
            if hasattr(module, "lora_A")
        }
        wanted = {
            ours[name]: AdapterSpec(module.r["default"], module.lora_alpha["default"])
            for name, module in layers.items()
        }
        assert targets_of(values, LAYERS) == wanted, values
        same += 1
    assert same > 50 and refused > 5, (same, refused)
