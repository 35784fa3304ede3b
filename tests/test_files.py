import codecs

import pytest
from etils import epath

from llama_jax.errors import UserError, boundary
from llama_jax.files import parse_json, read_json, write_atomically

MALFORMED = {
    "cut off": (b'{"a": 1', "is not valid JSON"),
    "Latin-1": ('{"a": "\xe9"}'.encode("latin-1"), "is not valid JSON"),
    "a list": (b"[1]", "is not a JSON object, but list"),
    "a string": (b'"text"', "is not a JSON object, but str"),
    "null": (b"null", "is not a JSON object, but NoneType"),
    "empty": (b"", "is not valid JSON"),
    "deep": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "is nested too deeply"),
    "a number of 10,000 digits": (b'{"a": ' + b"9" * 10_000 + b"}", "is not valid JSON"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_json_is_one_line_that_names_the_file(tmp_path, kind):
    content, message = MALFORMED[kind]
    path = epath.Path(tmp_path / "config.json")
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path} {message}") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_json_is_read_in_each_encoding_that_json_has(tmp_path):
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert parse_json('{"a": "é"}'.encode(encoding), "it") == {"a": "é"}
    assert parse_json(codecs.BOM_UTF8 + b"{}", "it") == {}


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none\.json: No such file"):
        read_json(epath.Path(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyError("dim"), "it does not have 'dim'"),
        (TypeError("no\nway"), "it is malformed: no"),
        (OverflowError("too large"), "it is malformed: too large"),
        (AttributeError("no get"), "it is malformed: no get"),
        (IndexError("out of range"), "it is malformed: out of range"),
        (RecursionError(), "it is nested too deeply to be read"),
        (MemoryError(), "it needs more memory than there is"),
        (UserError("clear already"), "clear already"),
    ],
)
def test_the_boundary_of_a_format_gives_one_line(error, message):
    with pytest.raises(UserError) as caught, boundary("it"):
        raise error
    assert str(caught.value) == message


def test_a_file_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    path = epath.Path(tmp_path / "config.json")
    write_atomically(path, b"first")
    write_atomically(path, b"second")
    write = type(path).write_bytes

    def full(self, data):
        write(self, data[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_bytes", full)
    write_atomically(path, b"second")  # as it is: nothing to write
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"third")
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_bytes() == b"second"
