"""Our reader of safetensors refuses what the library refuses; `STRICTER` lists what it adds."""

import json
import random

import numpy as np
import pytest
import safetensors as library
import safetensors.numpy
from etils import epath

from llama_jax.errors import UserError
from llama_jax.interchange.safetensors import DTYPES, read_header
from tests.reference import mutations


def entry(shape, start, stop, dtype="F32", **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop], **more}


def raw(header, data=b""):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(content).to_bytes(8, "little") + content + data


def text(entries, data=b""):
    """Returns a file with a header written by hand, in which a name may occur twice."""
    parts = ", ".join(f'"{name}": {json.dumps(value)}' for name, value in entries)
    return raw(f"{{{parts}}}".encode(), data)


ONE, TWO = entry([1], 0, 4), entry([1], 4, 8)
W = bytes(range(1, 9))
RIGHT = {
    "one": raw({"a": ONE}, W[:4]),
    "any order": raw({"b": TWO, "a": ONE}, W),
    "nothing": raw({}),
    "metadata": raw({"__metadata__": {"format": "pt"}, "a": ONE}, W[:4]),
    "metadata null": raw({"__metadata__": None, "a": ONE}, W[:4]),
    "metadata last": raw({"a": ONE, "__metadata__": {}}, W[:4]),
    "spaces after": raw(json.dumps({"a": ONE}).encode() + b" \n\t ", W[:4]),
    "not aligned": raw({"a": entry([3], 0, 6, "BF16"), "b": entry([1], 6, 10)}, W + W[:2]),
    "no numbers": raw({"e": entry([0, 3], 0, 0), "a": ONE, "f": entry([0], 4, 4)}, W[:4]),
    "scalar": raw({"a": entry([], 0, 4)}, W[:4]),
    "names": raw({"": ONE, "a\nb\u2028": TWO}, W),
}
WRONG = {
    "equal offsets": raw({"a": ONE, "b": ONE}, W[:4]),
    "overlap": raw({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, W + W[:4]),
    "inside": raw({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, W),
    "empty inside": raw({"a": entry([2], 0, 8), "b": entry([0], 4, 4)}, W),
    "hole": raw({"a": ONE, "b": entry([1], 8, 12)}, W + W[:4]),
    "hole first": raw({"a": TWO}, W),
    "trailing": raw({"a": ONE}, W[:5]),
    "trailing, of nothing": raw({}, b"x"),
    "truncated": raw({"a": ONE}, W[:3]),
    "no data": raw({"a": ONE}),
    "stop before start": raw({"a": entry([1], 4, 0)}, W[:4]),
    "fewer bytes": raw({"a": entry([2], 0, 4)}, W[:4]),
    "more bytes": raw({"a": entry([1], 0, 8)}, W),
    "bytes of no shape": raw({"a": entry([], 0, 8)}, W),
    "bool shape": raw({"a": entry([True], 0, 4)}, W[:4]),
    "float shape": raw({"a": entry([1.0], 0, 4)}, W[:4]),
    "text shape": raw({"a": entry(["1"], 0, 4)}, W[:4]),
    "shape of a number": raw({"a": entry(1, 0, 4)}, W[:4]),
    "shape null": raw({"a": entry(None, 0, 4)}, W[:4]),
    "negative": raw({"a": entry([-1, -1], 0, 4)}, W[:4]),
    "minus zero": raw(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'),
    "exponent": raw(b'{"a":{"dtype":"F32","shape":[1e0],"data_offsets":[0,4]}}', W[:4]),
    "leading zero": raw(b'{"a":{"dtype":"F32","shape":[01],"data_offsets":[0,4]}}', W[:4]),
    "overflow": raw({"a": entry([2**32, 2**32], 0, 0)}),
    "overflow to one": raw({"a": entry([2**63, 2, 1], 0, 0)}),
    "overflow with zero": raw({"a": entry([2**63, 2**63, 0], 0, 0)}),
    "overflow after zero": raw({"a": entry([0, 2**63, 2**63], 0, 0)}),
    "too large": raw({"a": entry([10**30], 0, 0)}),
    "offset too large": raw({"a": entry([1], 0, 10**30)}, W[:4]),
    "negative offset": raw({"a": entry([1], -4, 0)}, W[:4]),
    "three offsets": raw({"a": {**ONE, "data_offsets": [0, 4, 8]}}, W),
    "one offset": raw({"a": {**ONE, "data_offsets": [4]}}, W[:4]),
    "text offsets": raw({"a": {**ONE, "data_offsets": ["0", "4"]}}, W[:4]),
    "float offsets": raw({"a": {**ONE, "data_offsets": [0.0, 4.0]}}, W[:4]),
    "no offsets": raw({"a": {"dtype": "F32", "shape": [1]}}, W[:4]),
    "no dtype": raw({"a": {"shape": [1], "data_offsets": [0, 4]}}, W[:4]),
    "dtype null": raw({"a": entry([1], 0, 4, None)}, W[:4]),
    "dtype of a list": raw({"a": entry([1], 0, 4, ["F32"])}, W[:4]),
    "dtype in small letters": raw({"a": entry([1], 0, 4, "f32")}, W[:4]),
    "unknown dtype": raw({"a": entry([1], 0, 4, "Q4_K")}, W[:4]),
    "entry of a number": raw({"a": 3}, W[:4]),
    "entry null": raw({"a": None}, W[:4]),
    "entry of a text": raw({"a": "F32"}, W[:4]),
    "metadata of numbers": raw({"__metadata__": {"a": 1}, "a": ONE}, W[:4]),
    "metadata of a list": raw({"__metadata__": [], "a": ONE}, W[:4]),
    "metadata of a text": raw({"__metadata__": "pt", "a": ONE}, W[:4]),
    "metadata nested": raw({"__metadata__": {"a": {"b": "c"}}, "a": ONE}, W[:4]),
    "metadata twice": text([("__metadata__", {}), ("__metadata__", {}), ("a", ONE)], W[:4]),
    "twice": text([("a", ONE), ("a", TWO)], W),
    "twice, by an escape": text([("a", ONE), ("\\u0061", TWO)], W),
    "dtype twice": raw(
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', W[:4]
    ),
    "list": raw(b"[]"),
    "null": raw(b"null"),
    "number": raw(b"12"),
    "byte order mark": raw(b"\xef\xbb\xbf" + json.dumps({"a": ONE}).encode(), W[:4]),
    "UTF-16": raw(json.dumps({"a": ONE}).encode("utf-16"), W[:4]),
    "not UTF-8": raw(json.dumps({"a": ONE}).encode().replace(b'"a"', b'"a\xff"'), W[:4]),
    "half a character": raw({"\ud800": ONE}, W[:4]),
    "control character": raw(json.dumps({"a": ONE}).encode().replace(b'"a"', b'"a\n"'), W[:4]),
    "NaN": raw({"a": entry([float("nan")], 0, 4)}, W[:4]),
    "zeros after": raw(json.dumps({"a": ONE}).encode() + b"\0\0", W[:4]),
    "more JSON after": raw(json.dumps({"a": ONE}).encode() + b"{}", W[:4]),
    "comma after": raw(json.dumps({"a": ONE}).encode()[:-1] + b",}", W[:4]),
    "nested": raw(b'{"a":' * 100_000),
    "brackets": raw(b"[" * 100_000),
    "digits": raw(b'{"a":' + b"9" * 10_000 + b"}"),
    "empty": b"",
    "seven bytes": bytes(7),
    "length zero": bytes(8),
    "length one": raw(b"{"),
    "length too large": (2**63).to_bytes(8, "little") + b"{}",
    "length beyond the file": (100).to_bytes(8, "little") + b"{}",
    "length beyond the limit": (100_000_001).to_bytes(8, "little") + b"{}" + bytes(100),
    "pickle": b"\x80\x04K\x01." * 9,
    "zip": b"PK\x03\x04" + bytes(99),
}
STRICTER = {  # only our reader refuses these: see `read_header`
    "twice, the last one right": text([("a", TWO), ("a", ONE)], W[:4]),
    "twice the same": text([("a", ONE), ("a", ONE)], W[:4]),
    "twice in metadata": raw(
        b'{"__metadata__":{"a":"b","a":"c"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        W[:4],
    ),
    "spaces before": raw(b"  " + json.dumps({"a": ONE}).encode(), W[:4]),
    "further field": raw({"a": {**ONE, "scale": 2}}, W[:4]),
    "entry of a list": raw({"a": ["F32", [1], [0, 4]]}, W[:4]),
    "dtype of an object": raw({"a": entry([1], 0, 4, {"F32": None})}, W[:4]),
}


def ours(path):
    """Reads a file with our reader: name -> (shape, code of the dtype, bytes)."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    return {
        name: (list(found.shape), codes[found.dtype], found.rows().tobytes())
        for name, found in read_header(epath.Path(path)).items()
    }


def theirs(content):
    found = library.deserialize(content)
    return {name: (value["shape"], value["dtype"], bytes(value["data"])) for name, value in found}


def refusal(path):
    """Returns the error of our reader, and checks that it is one line with the path."""
    with pytest.raises(UserError) as caught:
        ours(path)
    message = str(caught.value)
    assert str(path) in message and len(message.splitlines()) == 1, message
    return message


@pytest.mark.parametrize("name", RIGHT)
def test_files_that_are_right(tmp_path, name):
    (tmp_path / "x").write_bytes(RIGHT[name])
    assert ours(tmp_path / "x") == theirs(RIGHT[name])


@pytest.mark.parametrize("name", WRONG)
def test_files_that_the_library_refuses(tmp_path, name):
    (tmp_path / "x").write_bytes(WRONG[name])
    if name != "overflow after zero":  # the library reads it, but NumPy cannot hold it
        with pytest.raises(library.SafetensorError):
            library.deserialize(WRONG[name])
    else:
        with pytest.raises(ValueError, match="dimension"):
            safetensors.numpy.load(WRONG[name])
    refusal(tmp_path / "x")


@pytest.mark.parametrize("name", STRICTER)
def test_files_that_only_we_refuse(tmp_path, name):
    (tmp_path / "x").write_bytes(STRICTER[name])
    assert set(theirs(STRICTER[name])) == {"a"}
    refusal(tmp_path / "x")


def made():
    """Returns a file of the library with tensors of all dtypes and several ranks."""
    rng = np.random.default_rng(0)
    arrays = {
        f"model.layers.{number}.w{number}": rng.normal(size=shape).astype(dtype)
        for number, (shape, dtype) in enumerate(
            [
                ((2, 3), "float32"),
                ((4,), "float16"),
                ((3, 1, 2), DTYPES["BF16"]),
                ((0, 2), "float32"),
            ]
        )
    }
    return safetensors.numpy.save(arrays, {"format": "pt"})


def changed_headers(count):
    """Yields files with a changed header that is still well-formed JSON."""
    content = made()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    for values in mutations.of_json(header, count):
        yield raw(values, data)
    rng = random.Random(1)
    for _ in range(count):  # offsets and sizes that are slightly wrong
        values = json.loads(json.dumps(header))
        value = values[rng.choice([name for name in values if name != "__metadata__"])]
        numbers = value[rng.choice(("shape", "data_offsets"))]
        place = rng.randrange(len(numbers))
        numbers[place] = max(0, numbers[place] + rng.choice((-8, -4, -2, -1, 1, 2, 4, 8)))
        yield raw(values, data)


def test_the_library_and_we_accept_the_same(tmp_path):
    """600 changes of a valid file; what only our reader refuses has one of the known reasons."""
    files = [*changed_headers(150), *mutations.of_bytes(made(), 300)]
    path, accepted = tmp_path / "x", 0
    for number, content in enumerate(files):
        path.write_bytes(content)
        try:
            wanted = theirs(content)
        except library.SafetensorError:
            refusal(path)
            continue
        reasons = ("has dtype", "twice", "must have just dtype", "does not begin with {")
        if any(dtype not in DTYPES for _, dtype, _ in wanted.values()):
            assert "has dtype" in refusal(path)
            continue
        try:
            found = ours(path)
        except UserError as error:
            assert any(reason in str(error) for reason in reasons), (number, error)
            continue
        accepted += 1
        assert found == wanted, number
    assert 20 < accepted < len(files) - 300


def test_rows_of_a_tensor(tmp_path):
    array = np.arange(60, dtype=np.float32).reshape(5, 3, 4)
    safetensors.numpy.save_file({"a": array, "b": np.array(7, np.float32)}, tmp_path / "x")
    found = read_header(epath.Path(tmp_path / "x"))
    for rows in (slice(None), slice(1, 3), slice(4, 9), slice(2, 2)):
        np.testing.assert_array_equal(found["a"].rows(rows), array[rows])
    assert found["b"].rows() == 7


def test_files_that_are_not_there(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("none", "folder"):
        assert "cannot read" in refusal(tmp_path / name)
    (tmp_path / "x").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n" * 9)
    assert "Git LFS" in refusal(tmp_path / "x")
