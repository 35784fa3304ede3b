"""The weights that a config names are opened only if they fit its model."""

import pytest
from etils import epath

from llama_jax.config import LoraConfig
from llama_jax.errors import UserError
from llama_jax.interchange.opening import open_adapters, open_base, open_init
from tests.helpers import TINY, random_adapters, random_params, replace, save_checkpoint

ROWS = TINY.model.vocab_size


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Returns the config of a run that begins with saved weights of the same model."""
    folder = tmp_path_factory.mktemp("base") / "ckpt"
    save_checkpoint(folder, TINY, random_params(TINY.model), b"")
    return replace(TINY, init_from=f"ckpt:{folder}")


def open_below(config):
    return open_base(config, "runs/lora/checkpoints/4")


@pytest.mark.parametrize("open_it", [open_init, open_below])
def test_weights_of_another_model_are_refused(config, open_it):
    other = replace(config, model__rope_theta=5e5, model__dim=64)
    message = "another model: model.dim is 32 in the weights, 64 in the config; model.rope_theta is"
    with pytest.raises(UserError, match=message):
        open_it(other)
    fewer = replace(config, model__vocab_size=ROWS - 1)
    with pytest.raises(
        UserError, match=f"vocab_size is {ROWS} in the weights, {ROWS - 1} in the config"
    ):
        open_it(fewer)


@pytest.mark.parametrize("open_it", [open_init, open_below])
def test_weights_of_fewer_rows_are_opened_as_they_are(config, open_it):
    more = replace(config, model__vocab_size=ROWS + 8)
    assert open_it(more).description.config.model.vocab_size == ROWS


def test_adapters_have_a_base_of_their_own_rows(config, tmp_path):
    """The base includes the rows that the run added to the weights."""
    run = replace(config, model__vocab_size=ROWS + 8, lora=LoraConfig(rank=2))
    save_checkpoint(tmp_path / "run", run, random_adapters(run), b"")
    step = epath.Path(tmp_path / "run" / "checkpoints" / "0")
    _, _, origin = open_adapters("ckpt", step)
    assert origin.read("embed", None).shape[0] == ROWS + 8
