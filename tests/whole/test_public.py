"""`import llama_jax` gives the public names, and does not import JAX or print anything."""

import subprocess
import sys

import llama_jax
from tests.helpers import ROOT

IMPORT = """
import sys
import llama_jax
early = sorted({"jax", "numpy", "tensorflow", "flax", "optax"} & set(sys.modules))
assert not early, early
config = llama_jax.Config()
assert "jax" not in sys.modules
from llama_jax import *
assert jit_step is llama_jax.jit_step and "tensorflow" not in sys.modules
assert set(llama_jax.__all__) <= set(dir(llama_jax))
try:
    llama_jax.jit_stop
except AttributeError as error:
    print(error)
"""


def run_python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT
    )


def test_names_are_imported_when_they_are_used():
    process = run_python(IMPORT)
    assert process.stderr == ""
    assert process.stdout == "module 'llama_jax' has no attribute 'jit_stop'\n"


def test_there_are_as_many_names_as_a_notebook_needs_and_each_is_documented():
    assert 20 <= len(llama_jax.__all__) <= 30
    for name in llama_jax.__all__:
        value = getattr(llama_jax, name)
        assert (callable(value) and value.__doc__) or name == "PARAMETERS"


TRAIN = """
import sys
import llama_jax as lj
config = lj.Config(
    lj.ModelConfig(vocab_size=300, dim=16, n_layers=1, n_heads=2, n_kv_heads=2, ffn_dim=16),
    data=lj.DataConfig(source=sys.argv[1], workers=1),
    optim=lj.OptimConfig(warmup_steps=1),
    train=lj.TrainConfig(steps=2, seq_len=16, global_batch=8),
)
if __name__ == "__main__":
    lj.run(config, sys.argv[2])
    lj.open_model(sys.argv[2])
    assert "tensorflow" in sys.modules
"""


def test_a_library_user_sees_no_noise(tmp_path):
    """Checks that neither TensorFlow (data) nor orbax (checkpoints) prints anything."""
    script = tmp_path / "script.py"
    script.write_text(TRAIN)
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 400)
    arguments = [str(tmp_path / "text.txt"), str(tmp_path / "run")]
    process = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, cwd=ROOT
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert "finished at step 2" in process.stdout
