"""Datasets of TFDS that the tests build, with flat and nested features."""

import pytest

from llama_jax.config import DataConfig
from llama_jax.data.sources.documents import list_parts, read_source
from llama_jax.data.sources.part import Tally
from llama_jax.errors import UserError


def read(source, **fields):
    """Returns documents and skips; one part and many small parts must give the same."""
    found = []
    for part_bytes in (1 << 30, 100):
        tally = Tally()
        config = DataConfig(part_bytes=part_bytes, **fields)
        found.append((list(read_source(source, config, tally)), dict(tally.skipped)))
    assert found[0] == found[1]
    return found[0]


@pytest.fixture(scope="module", params=["tfrecord", "array_record"])
def tfds_dir(request, tmp_path_factory):
    """Builds a real TFDS dataset of 100 documents, and returns its data_dir."""
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

        class TinyText(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, manager):
                return {"train": self._generate_examples(100), "test": self._generate_examples(3)}

            def _generate_examples(self, count):
                for number in range(count):
                    yield number, {"text": f"document {number}"}

    folder = tmp_path_factory.mktemp("tfds")
    TinyText(data_dir=folder, file_format=request.param).download_and_prepare()
    return folder


def test_tfds(tfds_dir):
    fields = {"tfds_data_dir": str(tfds_dir)}
    texts, skipped = read("tfds:tiny_text", **fields)
    assert sorted(texts) == sorted(f"document {n}" for n in range(100)) and skipped == {}
    assert len(read("tfds:tiny_text", tfds_split="test", **fields)[0]) == 3
    config = DataConfig(source="tfds:tiny_text", part_bytes=100, **fields)
    assert len(list_parts("tfds:tiny_text", config)) > 3


@pytest.mark.parametrize(
    ("source", "fields", "message"),
    [
        ("tfds:no_such_thing", {}, "cannot open the TFDS dataset no_such_thing"),
        ("tfds:tiny_text", {"tfds_split": "dev"}, "data.tfds_split='dev': tiny_text has"),
        ("tfds:tiny_text", {"text_field": "body"}, "has no feature 'body'; it has text"),
    ],
)
def test_tfds_that_is_not_there(tfds_dir, source, fields, message):
    with pytest.raises(UserError, match=message):
        read(source, tfds_data_dir=str(tfds_dir), **fields)


@pytest.fixture(scope="module", params=["tfrecord", "array_record"])
def nested_tfds(request, tmp_path_factory):
    """Builds a TFDS dataset with nested features, and returns its data_dir."""
    import numpy as np
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

        class NestedText(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                text = tfds.features.Text()
                features = tfds.features.FeaturesDict(
                    {
                        "meta": {"text": text, "n": tfds.features.Scalar(np.int32)},
                        "meta.title": text,
                        "turns": tfds.features.Sequence(text),
                        "id": tfds.features.Scalar(np.int32),
                    }
                )
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for n in range(5):
                    meta = {"text": f"document {n}", "n": n}
                    yield n, {"meta": meta, "meta.title": f"t{n}", "turns": ["a"] * n, "id": n}

    folder = tmp_path_factory.mktemp("tfds")
    NestedText(data_dir=folder, file_format=request.param).download_and_prepare()
    return str(folder)


def test_nested_features(nested_tfds):
    found, skipped = read("tfds:nested_text", text_field="meta.text", tfds_data_dir=nested_tfds)
    assert sorted(found) == [f"document {n}" for n in range(5)] and skipped == {}
    found, skipped = read("tfds:nested_text", text_field="meta.title", tfds_data_dir=nested_tfds)
    assert sorted(found) == [f"t{n}" for n in range(5)] and skipped == {}


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("text", "nested_text has no feature 'text'; it has .*meta.text"),
        ("meta", "feature 'meta' of nested_text has no text; name one of .*meta.text"),
        ("meta.n", "feature 'meta.n' of nested_text is Scalar, not text"),
        ("turns", "feature 'turns' of nested_text is Sequence, not text"),
        ("id", "feature 'id' of nested_text is Scalar, not text"),
    ],
)
def test_features_that_hold_no_text(nested_tfds, field, message):
    with pytest.raises(UserError, match=message):
        read("tfds:nested_text", text_field=field, tfds_data_dir=nested_tfds)
