"""Tests run on 8 fake CPU devices; what is dear to make is made once per worker."""

import os
import shutil
import signal
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
# One cache for this run: its workers and the commands that it starts share compiled programs.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="llama_jax_xla_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
# Shells start what they put in the background deaf to Ctrl-C, and so all that this starts in turn.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import pytest

from tests import helpers

# `make parity` and `make slow` compile as a run does; JAX reads it with the first use of a device.
QUICK = os.environ.get("TEST_XLA_FLAGS", helpers.QUICK)
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {QUICK}"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of 40 small text files."""
    return helpers.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def tokenizer(corpus):
    """A tokenizer of 300 ids, trained on the corpus."""
    from llama_jax.data.tokenizer import train_tokenizer

    return train_tokenizer([path.read_text() for path in sorted(corpus.iterdir())], 300)


@pytest.fixture(scope="session")
def shards(corpus, tmp_path_factory):
    """A folder of prepared shards; tests must not change it (copy it first)."""
    from llama_jax.data.prepare import prepare

    folder = tmp_path_factory.mktemp("prepared") / "shards"
    prepare(helpers.text_config(corpus), folder, log=lambda line: None)
    return folder


@pytest.fixture(scope="session")
def one_device():
    """A mesh of one device."""
    from llama_jax.config import MeshConfig
    from llama_jax.mesh import make_mesh

    return make_mesh(MeshConfig(), devices=jax.devices()[:1])


def pytest_unconfigure(config):
    """Removes the shared cache at the end of the run."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
