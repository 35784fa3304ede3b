import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.data.sources import json_values
from llama_jax.data.sources.json_values import list_items

VALUES = st.recursive(
    st.none() | st.booleans() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(values=st.lists(VALUES, max_size=6), indent=st.sampled_from([None, 2]))
def test_the_values_of_a_list(values, indent):
    text = json.dumps(values, indent=indent)
    for chunk in (1, 7, 1 << 16):
        json_values.CHUNK = chunk
        try:
            assert list(list_items(io.StringIO(f"\n {text} "), 10**6)) == values
        finally:
            json_values.CHUNK = 1 << 16


@pytest.mark.parametrize(
    ("text", "before"),
    [
        ("", []),
        ('{"a": 1}', []),
        ('[{"a": 1}, {"b": 2', [{"a": 1}]),
        ('[{"a": 1} {"b": 2}]', [{"a": 1}]),
        ('[{"a": 1},]', [{"a": 1}]),
        ('[{"a": 1}, x]', [{"a": 1}]),
    ],
)
def test_damage_costs_the_rest_and_no_more(text, before):
    found = []
    with pytest.raises(ValueError):
        found.extend([])
        for value in list_items(io.StringIO(text), 100):
            found.append(value)
    assert found == before


def test_only_one_value_is_in_memory():
    class Counted(io.StringIO):
        def read(self, size=-1):
            piece = super().read(size)
            self.taken = getattr(self, "taken", 0) + len(piece)
            return piece

    file = Counted("[" + ",".join(['{"a": "%s"}' % ("x" * 999)] * 1000) + "]")
    next(list_items(file, 10**6))
    assert file.taken == json_values.CHUNK
    # A value without an end raises after the first chunk.
    endless = Counted('["' + "x" * 10**6)
    with pytest.raises(ValueError):
        list(list_items(endless, 1000))
    assert endless.taken == json_values.CHUNK
