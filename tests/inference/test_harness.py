"""The adapter and the harness's own `hf` model agree on the same weights and tasks."""

import json

import jax
import pytest

pytestmark = pytest.mark.eval

CONTEXT = 96
QUIZ = """\
task: quiz
dataset_path: json
dataset_kwargs: {{data_files: {folder}/quiz.jsonl}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITE = """\
task: write
dataset_path: json
dataset_kwargs: {{data_files: {folder}/quiz.jsonl}}
test_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["a", "\\n\\n"], max_gen_toks: 20}}
metric_list: [{{metric: exact_match}}]
"""
ROLL = """\
task: roll
dataset_path: json
dataset_kwargs: {{data_files: {folder}/quiz.jsonl}}
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""


@pytest.fixture(scope="module")
def models(corpus, tmp_path_factory):
    """Returns the same weights in the adapter and in the harness's model, and their folder."""
    from lm_eval.models.huggingface import HFLM

    from llama_jax.inference.loaded_model import open_model
    from llama_jax.text.tokenizer import Tokenizer
    from tests.helpers import TINY, llama3_tokenizer, random_params, replace, save_checkpoint
    from tests.reference import hf_reference

    folder = tmp_path_factory.mktemp("models")
    model_bytes = llama3_tokenizer(corpus)
    size = Tokenizer(model_bytes).vocab_size
    config = replace(TINY, model__vocab_size=size, train__seq_len=CONTEXT)
    params = random_params(config.model)
    save_checkpoint(folder / "run", config, params, model_bytes)
    (folder / "tokenizer.json").write_bytes(model_bytes)
    import transformers

    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        clean_up_tokenization_spaces=False,
        pad_token="<|eot_id|>",
        **names,
    )
    theirs = hf_reference.build(config.model, params)
    theirs.generation_config.eos_token_id = tokenizer.eos_token_id
    theirs.generation_config.pad_token_id = tokenizer.pad_token_id
    hf = HFLM(pretrained=theirs, tokenizer=tokenizer, max_length=CONTEXT, batch_size=4)
    return open_model(folder / "run", "tensor=2"), hf, folder / "run"


@pytest.fixture(scope="module")
def tasks(corpus, tmp_path_factory):
    """Returns task files with questions from the corpus: multiple choice, free text, rolling."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = []
    for number, path in enumerate(sorted(corpus.iterdir())[:24]):
        words = path.read_text().split()
        choices = [f" {words[n]} é {words[n + 1]}" for n in range(9, 9 + 2 + number % 3)]
        rows.append(
            {
                "question": " ".join(words[: number * 2]) + ("" if number % 4 else " "),
                "choices": choices,
                "answer": number % 2,
                "text": path.read_text(),
            }
        )
    rows[3]["question"] = ""
    (folder / "quiz.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = []
    for name, text in (("quiz", QUIZ), ("write", WRITE), ("roll", ROLL)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
        files.append(str(folder / f"{name}.yaml"))
    return files


def requests_of(tasks):
    """Returns the requests of the tasks by their kind."""
    from llama_jax.inference.harness import find_tasks

    found, manager = find_tasks(tasks)
    kinds = {}
    for task in manager.load(found)["tasks"].values():
        task.build_all_requests(limit=None, rank=0, world_size=1)
        for request in task.instances:
            kinds.setdefault(request.request_type, []).append(request)
    return kinds


def test_the_same_answers_as_the_harness_own_model(models, tasks):
    from llama_jax.inference.harness import HarnessModel

    ours, hf, _ = models
    kinds = requests_of(tasks)
    assert set(kinds) == {"loglikelihood", "loglikelihood_rolling", "generate_until"}
    with jax.set_mesh(ours.mesh):
        adapter = HarnessModel(ours, batch_size=5, quiet=True)
        got = {kind: getattr(adapter, kind)(requests) for kind, requests in kinds.items()}
    want = {kind: getattr(hf, kind)(requests) for kind, requests in kinds.items()}

    assert len(got["loglikelihood"]) > 50
    for (logprob, greedy), (expected, expected_greedy) in zip(
        got["loglikelihood"], want["loglikelihood"], strict=True
    ):
        assert logprob == pytest.approx(expected, abs=1e-4, rel=1e-6)
        assert greedy == expected_greedy
    for total, expected in zip(
        got["loglikelihood_rolling"], want["loglikelihood_rolling"], strict=True
    ):
        assert total == pytest.approx(expected, rel=1e-6)
    assert got["generate_until"] == want["generate_until"]
    assert len(set(got["generate_until"])) > 5


def test_the_same_results_and_table(models, tasks):
    from lm_eval import evaluator

    from llama_jax.inference.harness import find_tasks, run_tasks, table

    ours, hf, _ = models
    results = run_tasks(ours, tasks, batch_size=4, quiet=True)
    found, manager = find_tasks(tasks)
    expected = evaluator.simple_evaluate(
        model=hf, tasks=found, task_manager=manager, log_samples=False
    )
    for task in found:
        for name, value in expected["results"][task].items():
            if isinstance(value, float):
                assert results["results"][task][name] == pytest.approx(value, rel=1e-5), name
    assert {"acc,none", "acc_norm,none"} <= set(results["results"]["quiz"])
    assert "|quiz |" in table(results)


def test_few_shapes_are_compiled(models, tasks):
    from llama_jax.inference import decode, logprobs
    from llama_jax.inference.harness import HarnessModel

    ours, _, _ = models
    kinds = requests_of(tasks)
    programs = (logprobs.token_logprobs, decode._prefill, decode._decode)
    for program in programs:
        program.clear_cache()
    with jax.set_mesh(ours.mesh):
        adapter = HarnessModel(ours, batch_size=7, quiet=True)
        for kind, requests in kinds.items():
            getattr(adapter, kind)(requests)
    # Inputs of up to 96 tokens are padded to 16, 32, 64 or 128.
    assert [program._cache_size() <= 4 for program in programs] == [True] * 3
    lengths = {len(adapter.tok_encode("".join(r.args))) for r in kinds["loglikelihood"]}
    assert len(lengths) > 15


def test_the_command(models, tasks):
    from tests.helpers import one_line_error, run_command

    _, _, folder = models
    flags = (f"--checkpoint={folder}", f"--tasks={tasks[0]}", "--limit=5")
    process = run_command("evaluate", *flags)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("|Tasks|Version|") and "|quiz |" in process.stdout
    process = run_command("evaluate", *flags, "--json", "--num_fewshot=1")
    results = json.loads(process.stdout)
    assert results["n-samples"]["quiz"]["effective"] == 5
    assert results["n-shot"]["quiz"] == 1
    bad = {
        "/nothing.yaml": "cannot read task /nothing.yaml",
        "no_such_task": "unknown task 'no_such_task'",
    }
    for task, message in bad.items():
        process = run_command("evaluate", flags[0], f"--tasks={task}")
        assert message in one_line_error(process)
