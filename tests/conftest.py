"""Fixtures for all tests, on 8 fake CPU devices; each worker makes expensive objects once."""

import gc
import hashlib
import os
import shutil
import signal
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
# All workers of this run, and the commands that they start, share one cache of compiled programs.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="llama_jax_xla_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
# A shell starts background jobs with SIGINT ignored, and their child processes inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import pytest

from tests import forks, helpers

# JAX reads this variable when a device is used for the first time.
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {helpers.XLA_FLAGS}"
QUARTERS = 4

gc.set_threshold(*forks.SELDOM)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Returns a folder of 40 small text files."""
    return helpers.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def tokenizer(corpus):
    """Returns a tokenizer of 300 ids, trained on the corpus."""
    from llama_jax.text.tokenizer import train_tokenizer

    return train_tokenizer([path.read_text() for path in sorted(corpus.iterdir())], 300)


@pytest.fixture(scope="session")
def shards(corpus, tmp_path_factory):
    """Returns a folder of prepared shards; tests must not change it (copy it first)."""
    from llama_jax.data.prepare.job import prepare

    folder = tmp_path_factory.mktemp("prepared") / "shards"
    prepare(helpers.text_config(corpus), folder, log=lambda line: None)
    return folder


@pytest.fixture(scope="session")
def two_sources(tmp_path_factory):
    """Returns a folder with the sources `web` and `books`, and their `shards`; do not change it."""
    from llama_jax.data.prepare.job import prepare

    folder = tmp_path_factory.mktemp("two_sources")
    for name, files in (("web", 40), ("books", 15)):
        (folder / name).mkdir()
        helpers.write_corpus(folder / name, files)
    source = f"web={folder / 'web'};books={folder / 'books'}"
    prepare(helpers.text_config(source), folder / "shards", log=lambda line: None)
    return folder


@pytest.fixture(scope="session")
def one_device():
    """Returns a mesh of one device."""
    from llama_jax.config import MeshConfig
    from llama_jax.parallel.mesh import make_mesh

    return make_mesh(MeshConfig(), devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def shared_steps():
    """Lets all runs of this process whose steps are the same program share one compiled step."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("run", "stage_steps"):
            patch.setattr(f"llama_jax.train.{module}.jit_step", helpers.shared_step)
        yield


def pytest_addoption(parser):
    """Defines `--quarter`."""
    parser.addoption(
        "--quarter",
        type=int,
        choices=range(1, QUARTERS + 1),
        help="run the tests of one quarter only; which one a test belongs to is a hash of its name",
    )


def quarter_of(name):
    """Returns the quarter, from 1, of the test with this name (`tests/test_x.py::test_y[z]`)."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % QUARTERS + 1


@pytest.hookimpl(trylast=True)  # after the marks have removed their tests
def pytest_collection_modifyitems(config, items):
    """Keeps only the tests of the chosen quarter, if any, and puts the longest tests first."""
    quarter = config.getoption("quarter")
    if quarter is not None:
        others = [item for item in items if quarter_of(item.nodeid) != quarter]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if quarter_of(item.nodeid) == quarter]
    # If a long test began last, one worker would run it long after the other one is done.
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish():
    """Excludes all imported objects from garbage collection."""
    gc.freeze()


def pytest_unconfigure(config):
    """Removes the shared cache at the end of the run."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
