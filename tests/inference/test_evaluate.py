import json
import math
import shutil

import jax
import numpy as np
import pytest

from llama_jax.data.shards.layout import encode_manifest
from llama_jax.model.llama import logits
from llama_jax.text.tokenizer import Tokenizer
from tests.helpers import (
    TINY,
    llama3_tokenizer,
    one_line_error,
    random_params,
    replace,
    run_command,
    save_checkpoint,
)

CONFIG = replace(TINY, model__vocab_size=300, train__seq_len=64)


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    params = random_params(CONFIG.model)
    return save_checkpoint(folder, CONFIG, params, tokenizer.model_bytes)


def evaluate(*flags, **kwargs):
    process = run_command("evaluate", *flags, **kwargs)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_perplexity_of_files_on_a_mesh(checkpoint, tokenizer, tmp_path):
    text = "jcagbb jffgi dbe\nijaib é"
    (tmp_path / "a.txt").write_text(text)
    tokens = [1, *tokenizer.encode(text)]
    assert 10 < len(tokens) < 64
    row = logits(CONFIG.model, random_params(CONFIG.model), np.array([tokens]))[0]
    logprobs = jax.nn.log_softmax(row)[np.arange(len(tokens) - 1), tokens[1:]]
    flags = (f"--checkpoint={checkpoint}", f"--text={tmp_path / 'a.txt'}", "--json")
    one = json.loads(evaluate(*flags))
    assert one["context"] == 64 and one["stride"] == 32
    results = one["results"]["text"]
    assert results["nll"] == pytest.approx(-float(logprobs.sum()), rel=1e-5)
    assert results["bytes"] == len(text.encode()) and results["words"] == 5
    bits = results["nll"] / results["bytes"] / math.log(2)
    assert results["bits_per_byte"] == pytest.approx(bits)
    mesh = json.loads(evaluate(*flags, "--mesh=data=2,tensor=2", devices=4))
    assert mesh["results"]["text"] == pytest.approx(results, rel=1e-5)


def test_several_sources_in_a_table(checkpoint, corpus):
    source = f"--text=one={corpus}/00*.txt; two={corpus}/01*.txt"
    process = run_command("evaluate", f"--checkpoint={checkpoint}", source, "--limit=3")
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert lines[0].split("  ")[-1] == "bits per byte"
    rows = {
        line.split()[0]: [float(n.replace(",", "")) for n in line.split()[1:]] for line in lines[1:]
    }
    assert list(rows) == ["one", "two", "all"]
    assert rows["one"][0] == rows["two"][0] == 3
    assert [a + b for a, b in zip(rows["one"][:4], rows["two"][:4], strict=True)] == rows["all"][:4]
    # The last line of the log counts all tokens.
    assert f"{rows['all'][1]:,.0f} tokens, " in process.stderr.splitlines()[-1]


def test_shards_give_what_their_texts_give(checkpoint, shards, corpus):
    flags = (f"--checkpoint={checkpoint}", "--json")
    splits = [
        json.loads(evaluate(*flags, f"--shards={shards}", f"--split={split}"))["results"]["text"]
        for split in ("train", "validation")
    ]
    whole = json.loads(evaluate(*flags, f"--text={corpus}"))["results"]["text"]
    for column in ("documents", "tokens", "words", "bytes", "nll"):
        assert sum(row[column] for row in splits) == pytest.approx(whole[column], rel=1e-6)


def test_a_checkpoint_with_a_tokenizer_json(corpus, tmp_path):
    model_bytes = llama3_tokenizer(corpus)
    config = replace(CONFIG, model__vocab_size=Tokenizer(model_bytes).vocab_size)
    save_checkpoint(tmp_path / "run", config, random_params(config.model), model_bytes)
    flags = (f"--checkpoint={tmp_path / 'run'}",)
    found = json.loads(evaluate(*flags, f"--text={corpus}", "--json"))["results"]["text"]
    texts = [path.read_text() for path in corpus.iterdir()]
    assert found["tokens"] == sum(len(Tokenizer(model_bytes).encode(text)) for text in texts)
    written = run_command("generate", *flags, "--prompt=é 🦙", "--max_tokens=5")
    assert written.returncode == 0 and written.stdout.startswith("é 🦙")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "give one of --text=FILES, --shards=DIR and --tasks=NAMES"),
        (("--text=a", "--shards=b"), "give one of --text"),
        (("--text=a",), "--checkpoint is missing"),
        (("--checkpoint=/nothing", "--text=a"), "no checkpoint in /nothing"),
        (("--checkpoint={run}", "--text=/nothing"), "/nothing does not exist"),
        (("--checkpoint={run}", "--shards=/nothing"), "/nothing"),
        (("--checkpoint={run}", "--text={corpus}", "--stride=65"), "--stride must be in 1..64"),
        (("--checkpoint={run}", "--text={corpus}", "--stride=-1"), "--stride must be in 1..64"),
        (("--checkpoint={run}", "--text={corpus}", "--batch_size=0"), "--batch_size must be"),
        (("--checkpoint={run}", "--text={corpus}", "--limit=0"), "--limit must be at least 1"),
        (("--checkpoint={run}", "--text={empty}"), "there is no text to evaluate"),
        (("--checkpoint={run}", "--shards={other}"), "use another tokenizer than the checkpoint"),
    ],
)
def test_bad_input(checkpoint, corpus, shards, tmp_path, flags, message):
    places = {"run": checkpoint, "corpus": corpus, "empty": tmp_path / "e.txt", "other": "-"}
    places["empty"].write_text("")
    if "other" in "".join(flags):
        places["other"] = tmp_path / "other"
        shutil.copytree(shards, places["other"])
        manifest = json.loads((places["other"] / "manifest.json").read_text())
        tokenizer = Tokenizer(llama3_tokenizer(corpus))
        manifest["tokenizer_sha256"] = tokenizer.fingerprint
        tokenizer.save(places["other"] / "tokenizer.model")
        (places["other"] / "manifest.json").write_bytes(encode_manifest(manifest))
    process = run_command("evaluate", *(flag.format(**places) for flag in flags))
    assert message in one_line_error(process)


def test_tasks_without_the_harness(checkpoint):
    """A failing import of the harness is also reported in one line."""
    process = run_command(
        "evaluate", f"--checkpoint={checkpoint}", "--tasks=/x.yaml", PYTHONPATH=_broken(checkpoint)
    )
    assert "--tasks needs lm-evaluation-harness: pip install" in one_line_error(process)


def _broken(folder):
    """Returns a folder with a package `lm_eval` that cannot be imported."""
    package = folder.parent / "broken" / "lm_eval"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("raise ImportError('not here')")
    return str(package.parent)
