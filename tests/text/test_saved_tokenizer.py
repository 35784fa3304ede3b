"""The tokenizer inside a saved step is verified like the rest of the step."""

import json

import pytest
from etils import epath

from llama_jax.checkpoint import manifest
from llama_jax.checkpoint.saved_step import find_step, load_meta
from llama_jax.errors import UserError
from llama_jax.text.saved_tokenizer import read_saved
from llama_jax.text.tokenizer_files import open_tokenizer
from tests.helpers import TINY, flip_bit, random_params, save_checkpoint


@pytest.fixture
def folder(tmp_path, tokenizer):
    params = random_params(TINY.model)
    save_checkpoint(tmp_path / "run", TINY, params, tokenizer.model_bytes)
    return find_step(tmp_path / "run")


def test_it_is_the_one_of_the_run(folder, tokenizer):
    assert read_saved(folder) == load_meta(folder).tokenizer_model == tokenizer.model_bytes
    assert open_tokenizer(folder).fingerprint == tokenizer.fingerprint


def test_a_step_of_another_format_is_refused(folder):
    described = {**manifest.read_description(folder), "format_version": 3}
    manifest.amend(folder, "meta/metadata", json.dumps(described).encode())
    with pytest.raises(UserError, match="has format 3, this version reads 2"):
        open_tokenizer(folder)


@pytest.mark.parametrize("name", ["meta/metadata", "tokenizer/metadata"])
def test_damage_is_named(folder, name):
    flip_bit(folder / name, 50)
    with pytest.raises(UserError, match=f"is damaged: {name} holds other bytes than were written"):
        open_tokenizer(folder)


@pytest.mark.parametrize("name", ["manifest.json", "meta/metadata"])
def test_a_missing_file_is_named(folder, name):
    epath.Path(folder / name).unlink()
    with pytest.raises(UserError, match=f"is damaged: {name} is missing"):
        open_tokenizer(folder)
