"""An adapter that runs the tasks of lm-evaluation-harness (0.4) on models of this library.

https://github.com/EleutherAI/lm-evaluation-harness. It needs `pip install 'llama_jax[eval]'`; no
other module imports the harness.
"""

import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax

# Telemetry makes the Hub's library slow without a network, even for data on the disk.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from lm_eval import evaluator, utils
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from llama_jax.errors import UserError
from llama_jax.inference.decode import Sampling, stream_tokens
from llama_jax.inference.loaded_model import InferenceModel
from llama_jax.inference.logprobs import Scorer, Span

MAX_NEW_TOKENS = 256  # for tasks that give no number; the default of the harness's own models
CHUNK = 16  # number of tokens between two searches for a text that ends an answer
# Number of batches whose spans are sorted by length together.
BATCHES_AT_ONCE = 256


class HarnessModel(TemplateLM):
    """Answers the harness's three kinds of requests; use it inside `jax.set_mesh(model.mesh)`.

    A text is tokenized as by the harness's `hf` model: with BOS, if the tokenizer adds it. Names of
    special tokens in the text are read as plain text.
    """

    def __init__(self, model: InferenceModel, batch_size: int, quiet: bool = False) -> None:
        """Wraps a model.

        Args:
          model: the model.
          batch_size: requests per batch.
          quiet: show no progress bars.
        """
        super().__init__()
        self._model, self._quiet = model, quiet
        self.batch_size = batch_size
        self.max_length = model.context
        self._scorer = Scorer(model.config.model, model.params, model.context, batch_size)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        return self._model.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer in the harness's caches."""
        return self._model.tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Converts a text to token ids.

        Args:
          string: the text.
          add_special_tokens: False: no BOS; True or None: with BOS, if the tokenizer adds it.
          **kwargs: ignored.
        """
        if add_special_tokens is False:
            return self._model.tokenizer.encode(string)
        return self._model.encode(string)

    def _score(self, spans: Sequence[Span], what: str) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = []
        group = BATCHES_AT_ONCE * self.batch_size
        with tqdm(total=len(spans), desc=what, disable=self._quiet) as bar:
            for first in range(0, len(spans), group):
                for score in self._scorer(spans[first : first + group], bar.update):
                    total = float(score.logprobs.sum(dtype="float64"))
                    found.append((total, bool(score.greedy.all())))
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        spans = []
        for _, context, continuation in requests:
            tokens = [*context, *continuation][-(self.max_length + 1) :]
            spans.append(Span(tokens, min(len(continuation), len(tokens) - 1)))
        found = self._score(spans, "log-likelihoods")
        for (text, *_), answer in zip(requests, found, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Computes the log-likelihood of whole texts, in the harness's disjoint windows."""
        spans, owners = [], []
        for number, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(utils.make_disjoint_window, windows):
                spans.append(Span([*context, *continuation], len(continuation)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._score(spans, "texts"), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues contexts until EOS or one of the request's stop texts."""
        ids = [self._model.tokenizer.encode_prompt(request.args[0]) for request in requests]
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="answers", disable=self._quiet) as bar:
            for numbers in groups.values():
                numbers.sort(key=lambda number: -len(ids[number]))
                for first in range(0, len(numbers), self.batch_size):
                    batch = numbers[first : first + self.batch_size]
                    arguments = requests[batch[0]].args[1]
                    texts = self._continue([ids[number] for number in batch], arguments)
                    for number, text in zip(batch, texts, strict=True):
                        answers[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(len(batch))
        return answers

    def _continue(self, prompts: list[list[int]], arguments: dict[str, Any]) -> list[str]:
        until = arguments.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        count = int(arguments.get("max_gen_toks", arguments.get("max_new_tokens", MAX_NEW_TOKENS)))
        if count >= self.max_length:
            raise UserError(
                f"a task asks for {count} new tokens, but the model's context is {self.max_length}"
            )
        temperature = float(arguments.get("temperature", 0.0) or 0.0)
        sampling = Sampling(
            max_tokens=count,
            # Tasks may give a temperature that has no effect because do_sample is false.
            temperature=temperature if arguments.get("do_sample", temperature > 0) else 0.0,
            top_k=int(arguments.get("top_k", 0)),
            top_p=float(arguments.get("top_p", 1.0)),
        )
        room = self.max_length - count
        parts = stream_tokens(
            self._model.config.model,
            self._model.params,
            [prompt[-room:] for prompt in prompts],
            sampling,
            context=self.max_length,
            eos_id=self._model.eos_ids,
            n_ids=self._model.tokenizer.vocab_size,
            chunk=CHUNK,
            rows=self.batch_size,
        )
        tokens: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        for part in parts:
            for row, new in enumerate(part):
                tokens[row] += [token for token in new if token not in self._model.eos_ids]
                texts[row] = self._model.tokenizer.decode(tokens[row])
            running = [
                row
                for row, new in enumerate(part)
                if new
                and new[-1] not in self._model.eos_ids
                and not any(stop in texts[row] for stop in until if stop)
            ]
            if not running:
                break
        for stop in filter(None, until):
            texts = [text.split(stop)[0] for text in texts]
        return texts


def find_tasks(names: Sequence[str]) -> tuple[list[str], TaskManager]:
    """Resolves the names of tasks, and returns them with a manager that can load them.

    Args:
      names: tasks, groups or tags of the harness, or paths of task files; a task file may use
        other files in its folder.

    Raises:
      UserError: a file is missing or names no task, or a name is unknown.
    """
    folders, found, builtin = [], [], False
    for name in names:
        if not name.endswith((".yaml", ".yml")):
            builtin = True
            found.append(name)
            continue
        path = pathlib.Path(name)
        try:
            text = path.read_text()
        except OSError as error:
            raise UserError(f"cannot read task {name}: {error.strerror or error}") from error
        named = re.search(r"^(?:task|group):\s*['\"]?([\w.-]+)", text, re.M)
        if named is None:
            raise UserError(f"{name} names no task; it needs a line such as 'task: my_task'")
        found.append(named[1])
        if str(path.parent) not in folders:
            folders.append(str(path.parent))
    manager = TaskManager(include_path=folders or None, include_defaults=builtin)
    unknown = [name for name in found if not manager.match_tasks([name])]
    if unknown:
        raise UserError(f"unknown task {unknown[0]!r}; `lm_eval ls tasks` lists the harness's own")
    return found, manager


def run_tasks(
    model: InferenceModel,
    names: Sequence[str],
    *,
    batch_size: int,
    num_fewshot: int | None = None,
    limit: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Runs tasks, and returns the harness's own results without the samples.

    Args:
      model: the model.
      names: see `find_tasks`.
      batch_size: requests per batch.
      num_fewshot: number of examples in the context; None: the number of the task.
      limit: largest number of documents per task; None: all.
      quiet: show no progress bars.

    Raises:
      UserError: see `find_tasks`; or the data of a task cannot be read, or a task runs code that
        the model writes.
    """
    found, manager = find_tasks(names)
    with jax.set_mesh(model.mesh):
        try:
            results = evaluator.simple_evaluate(
                model=HarnessModel(model, batch_size, quiet),
                tasks=found,
                task_manager=manager,
                num_fewshot=num_fewshot,
                limit=limit,
                log_samples=False,
                batch_size=batch_size,
            )
        except (OSError, ConnectionError) as error:
            raise UserError(f"the data of {', '.join(names)} cannot be read: {error}") from error
        except ValueError as error:
            if "unsafe" not in str(error).lower():
                raise
            raise UserError(
                f"one of {', '.join(names)} runs code that the model writes; evaluate does not"
            ) from error
    assert results is not None
    return results


def table(results: dict[str, Any]) -> str:
    """Formats the results as the harness's own table, and one of its groups, if any."""
    tables = [utils.make_table(results)]
    if results.get("groups"):
        tables.append(utils.make_table(results, "groups"))
    return "\n".join(tables)


def to_json(results: dict[str, Any]) -> str:
    """Formats the results as the harness's own JSON."""
    return json.dumps(results, indent=2, default=utils.handle_non_serializable, ensure_ascii=False)
