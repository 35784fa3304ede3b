"""The statements of the README agree with the code."""

import ast
import importlib.metadata
import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from llama_jax.config import Config
from llama_jax.model.cost import parameter_count
from tests.helpers import ROOT
from tests.test_config import load

README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_notebook_runs_and_learns():
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    loss, spec = process.stdout.split(maxsplit=1)
    assert float(loss) < 4 < 5.5  # ln 256 = 5.5 before training
    assert "'tensor'" in spec


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs").glob("*.py")))
def test_the_table_of_configs(name):
    config, _ = load(name)
    model, train = config.model, config.train
    row = re.search(rf"\| `{name}` \|(.*)\|", README)[1]
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[:5] == [
        f"{parameter_count(model):,}",
        *map(str, (model.dim, model.n_layers, model.n_heads, model.ffn_dim)),
    ]
    assert float(cells[5]) == config.optim.peak_lr
    scale = {"M": 1e6, "T": 1e12}[cells[6][-1]]
    assert float(cells[6][:-1]) * scale == pytest.approx(
        train.steps * train.tokens_per_step, rel=0.03
    )
    assert cells[7].startswith(f"{train.global_batch:,} x {train.seq_len:,}")


# These are imported only where they are used, with an error that names the extra of setup.py.
OPTIONAL = {"apache_beam", "lm_eval", "tokenizers", "torch", "tqdm"}


def test_a_plain_install_has_all_that_is_imported():
    needed = (Requirement(text) for text in importlib.metadata.requires("llama_jax"))
    plain = {one.name.lower().replace("_", "-") for one in needed if "extra" not in str(one.marker)}
    packages = importlib.metadata.packages_distributions()
    found = set()
    for folder in ("llama_jax", "configs", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    found.add(node.module.split(".")[0])
    found -= {*sys.stdlib_module_names, *OPTIONAL, "llama_jax", "configs"}
    assert len(found) > 10
    for name in found:
        names = {one.lower().replace("_", "-") for one in packages[name]}
        assert names & plain, f"{name} comes from {names}, which setup.py does not ask for"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_flag_and_file_that_is_named_exists(path):
    text = path.read_text()
    config = Config()
    for group, field in re.findall(r"--config\.([a-z]+)\.([a-z_]+)=", text):
        assert hasattr(getattr(config, group), field), f"{group}.{field}"
    for group, field in re.findall(r"`(model|mesh|data|optim|train|lora)\.(?!py)([a-z_]+)", text):
        assert hasattr(getattr(config, group), field), f"{group}.{field}"
    for name in set(re.findall(r"--config=(\S+\.py)", text)) - {"configs/CONFIG.py"}:
        assert (ROOT / name).exists(), name
    folders = "tests|llama_jax|benchmarks|configs|docs|examples|launch|notebooks"
    for name in re.findall(rf"[`(\s]((?:{folders})/[\w/.]*\w)", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (path.parent / name).exists(), name
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    for name in re.findall(r"(?:`|^)make ([a-z]+)", text, re.M):
        assert name in targets, name
