"""Files that Git LFS has not fetched are named as such, whichever file they replace."""

import pytest

from llama_jax.errors import UserError
from llama_jax.interchange.hf import HfSource
from llama_jax.text.tokenizer import Tokenizer
from tests.helpers import TINY, llama3_tokenizer
from tests.interchange.test_transfer import exported

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 2184\n"
FILES = ["model.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"]
FILES += ["tokenizer.model", "tokenizer_config.json", "generation_config.json"]
FILES += ["chat_template.jinja", "special_tokens_map.json"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("lfs") / "hf", TINY)


@pytest.mark.parametrize("name", FILES)
def test_in_a_hugging_face_folder(folder, name):
    path = folder / name
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(POINTER)
    try:
        with pytest.raises(UserError) as caught:
            HfSource(folder)
    finally:
        path.unlink() if before is None else path.write_bytes(before)
    assert f"{name} is a pointer of Git LFS, not the file itself; fetch" in str(caught.value)
    assert "git lfs pull" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "x.model"])
def test_as_a_tokenizer(tmp_path, name):
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(UserError, match=rf"{name} is a pointer of Git LFS.*`git lfs pull`"):
        Tokenizer.load(tmp_path / name)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_beside_a_tokenizer(tmp_path, corpus, name):
    (tmp_path / "tokenizer.json").write_bytes(llama3_tokenizer(corpus))
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(UserError, match=rf"{name} is a pointer of Git LFS"):
        Tokenizer.load(tmp_path / "tokenizer.json")


@pytest.mark.parity
@pytest.mark.parametrize("name", ["consolidated.00.pth", "params.json", "tokenizer.model"])
def test_in_metas_folder(tmp_path, name):
    from llama_jax.interchange.meta import MetaSource
    from llama_jax.interchange.transfer import convert
    from tests.helpers import random_params
    from tests.interchange.test_transfer import Memory

    convert(Memory(TINY, random_params(TINY.model)), "meta", tmp_path / "meta")
    (tmp_path / "meta" / name).write_bytes(POINTER)
    with pytest.raises(UserError, match=rf"{name} is a pointer of Git LFS"):
        MetaSource(tmp_path / "meta")
