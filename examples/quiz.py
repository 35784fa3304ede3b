"""Fine-tunes the small model of `make train` on questions about the signatures of functions.

It asks the model before and after, about other functions of Python's library than in training.

Example:
  python examples/quiz.py --base=runs/tiny --workdir=runs/quiz
"""

import argparse
import ast
import dataclasses
import json
import pathlib
import random
import subprocess
import sys
import sysconfig
from collections.abc import Iterator

import jax

from llama_jax.cli import command as command_lib
from llama_jax.data.sources.conversations import messages_of
from llama_jax.inference.chat import open_template
from llama_jax.inference.decode import Sampling
from llama_jax.inference.generation import new_texts
from llama_jax.inference.loaded_model import InferenceModel, open_model
from llama_jax.text.chat_template import ChatTemplate

ROOT = pathlib.Path(__file__).parents[1]
ASKED = {
    "method": "Is this function a method?",
    "count": "How many parameters does this function have?",
    "first": "What is the first parameter of this function?",
    "last": "What is the last parameter of this function?",
}


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of the quiz.

    Attributes:
      kind: a key of `ASKED`.
      signature: the signature that the question is about.
      answer: the only correct answer.
    """

    kind: str
    signature: str
    answer: str

    def record(self) -> dict[str, str]:
        """Returns the question in the form of a record of Alpaca's data."""
        return {"instruction": ASKED[self.kind], "input": self.signature, "output": self.answer}


def signatures(folder: pathlib.Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields name and parameters of each function in a folder with one to four plain parameters."""
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if not isinstance(node, ast.FunctionDef):
                continue
            args = node.args
            names = tuple(arg.arg for arg in args.args)
            plain = not (args.vararg or args.kwarg or args.kwonlyargs or args.posonlyargs)
            if plain and 1 <= len(names) <= 4:
                yield node.name, names


def questions(functions: list[tuple[str, tuple[str, ...]]], seed: int) -> list[Question]:
    """Makes one question of each kind for each function, in random order."""
    found = []
    for name, parameters in functions:
        signature = f"def {name}({', '.join(parameters)}):"
        answers = {
            "method": "yes" if parameters[0] == "self" else "no",
            "count": str(len(parameters)),
            "first": parameters[0],
            "last": parameters[-1],
        }
        found += [Question(kind, signature, answer) for kind, answer in answers.items()]
    random.Random(seed).shuffle(found)
    return found


def split(train: int, test: int, seed: int) -> tuple[list[Question], list[Question]]:
    """Makes questions for training and held-out questions; no function is in both.

    Args:
      train: number of questions for training.
      test: number of held-out questions.
      seed: seed of the random order.
    """
    functions = sorted(dict(signatures(pathlib.Path(sysconfig.get_paths()["stdlib"]))).items())
    random.Random(seed).shuffle(functions)
    # Equally many functions for each number of parameters, so that a guess of "how many" fails.
    groups = [[f for f in functions if len(f[1]) == count] for count in (1, 2, 3, 4)]
    mixed = [function for four in zip(*groups, strict=False) for function in four]
    n_train, n_test = train // len(ASKED), test // len(ASKED)
    chosen = mixed[: n_train + n_test]
    return questions(chosen[:n_train], seed), questions(chosen[n_train:], seed)


def answers(model: InferenceModel, template: ChatTemplate, asked: list[Question]) -> list[str]:
    """Returns the greedy answers of a model.

    Args:
      model: the model.
      template: chat template for the questions.
      asked: the questions.
    """
    # The prompts have the form of the records in training, without the answer.
    ids = [template.encode(messages_of(question.record())[:-1]) for question in asked]
    texts = [""] * len(asked)
    with jax.set_mesh(model.mesh):
        sampling = Sampling(max_tokens=16, temperature=0.0)
        for piece in new_texts(model, ids, sampling, chunk=16):
            texts[piece.row] += piece.text
    return [text.strip() for text in texts]


def table(asked: list[Question], before: list[str], after: list[str]) -> str:
    """Formats the number of right answers of each kind, and a few answers.

    Args:
      asked: the questions.
      before: answers before training.
      after: answers after training.
    """
    lines = ["question  asked  right before  right after"]
    for kind in ASKED:
        rows = [n for n, question in enumerate(asked) if question.kind == kind]
        right = [sum(given[n] == asked[n].answer for n in rows) for given in (before, after)]
        lines.append(f"{kind:8}  {len(rows):5}  {right[0]:12}  {right[1]:11}")
    lines += ["", f"{'kind':6}  {'signature':44}  {'before':24}  after"]
    for n in range(min(12, len(asked))):
        shown = " ".join(before[n].split())[:24]
        cells = (f"{asked[n].kind:6}", f"{asked[n].signature[:44]:44}", f"{shown:24}", after[n])
        lines.append("  ".join(cells))
    return "\n".join(lines)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="runs/tiny", help="work directory of the base model")
    parser.add_argument("--workdir", default="runs/quiz", help="work directory of the fine-tuning")
    parser.add_argument("--train", type=int, default=640, help="number of questions for training")
    parser.add_argument("--test", type=int, default=80, help="number of held-out questions")
    options, flags = parser.parse_known_args()
    command_lib.quieten_libraries()
    if not (pathlib.Path(options.base) / "checkpoints").exists():
        sys.exit(f"error: there is no base model in {options.base}; make it with: make train")
    train, test = split(options.train, options.test, seed=0)
    workdir = pathlib.Path(options.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "questions.json"
    path.write_text(json.dumps([question.record() for question in train], indent=1))
    command = [sys.executable, "-m", "llama_jax.train", f"--workdir={workdir}"]
    command += [f"--config={ROOT / 'configs' / 'tiny_quiz.py'}", f"--config.data.source={path}"]
    command += [f"--config.init_from=ckpt:{options.base}", *flags]
    status = subprocess.run(command, check=False).returncode
    if status:
        sys.exit(status)
    print(f"\n{len(train)} questions to train on; {len(test)} held out, on other functions:\n")
    after, before = (open_model(place, "fsdp=1") for place in (workdir, options.base))
    template = open_template(after)  # the template of the training, for both models
    given = (answers(model, template, test) for model in (before, after))
    print(table(test, *given))


if __name__ == "__main__":
    main()
