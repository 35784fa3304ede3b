import codecs
import contextlib
import hashlib
import io
import os
import pwd
import resource
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
from etils import epath

from llama_jax import files
from llama_jax.checkpoint import manifest
from llama_jax.data.prepare.job import prepare
from llama_jax.data.shards.reader import TokenDataset
from llama_jax.errors import UserError, as_user_error
from llama_jax.files import (
    append_jsonl,
    expand,
    expand_place,
    parse_json,
    read_json,
    read_jsonl,
    sha256_of,
    sha256_of_each,
    write_atomically,
)
from tests.helpers import text_config

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
    with pytest.raises(UserError) as caught, as_user_error("it"):
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
    write_atomically(path, b"second")  # the content is unchanged, so nothing is written
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"third")
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_bytes() == b"second"


@pytest.mark.parametrize(
    ("there", "found", "damaged"),
    [
        (b"", [], 0),
        (b'{"step": 1}\n', [1], 0),
        (b'{"step": 1}', [1], 0),
        (b'{"step": 1}\n{"step": 2, "lo', [1], 1),
        (b'{"step": 1}\n' + b"\0" * 4096, [1], 1),
        (b'{"step": 1}\n{"step": 2\xff\n\n', [1], 1),
        (b"\n", [], 0),
        (b'\0\0{"step": 1}\r\n[2]\nnull\n{"loss": 1.0}\n{"step": "3"}\n{"step": true}', [1], 5),
    ],
)
def test_records_are_added_on_a_new_line(tmp_path, there, found, damaged):
    path = epath.Path(tmp_path / "metrics.jsonl")
    path.write_bytes(there)
    append_jsonl(path, [])
    append_jsonl(path, [{"step": 7}, {"step": 8, "text": "\u2028 é \n"}])
    append_jsonl(path, [{"step": 9}])
    records, left_out = read_jsonl(path)
    assert [record["step"] for record in records] == [*found, 7, 8, 9]
    assert left_out == damaged and records[-2]["text"] == "\u2028 é \n"
    assert path.read_bytes().startswith(there)


def test_threads_add_to_one_file(tmp_path):
    path = epath.Path(tmp_path / "metrics.jsonl")

    def add(thread):
        for number in range(100):
            append_jsonl(path, [{"step": number, "text": str(thread) * 1000}])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(8)))
    records, damaged = read_jsonl(path)
    assert (len(records), damaged) == (800, 0)


def test_a_full_disk_leaves_no_part_of_a_record(tmp_path):
    path = epath.Path(tmp_path / "metrics.jsonl")
    append_jsonl(path, [{"step": 1}])
    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            append_jsonl(path, [{"step": 2}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before


def test_files_of_a_user_without_a_name(tmp_path, corpus, monkeypatch):
    """In a container that runs as another user than its image has, the user id has no name."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for _ in range(2):
        append_jsonl(epath.Path(tmp_path / "metrics.jsonl"), [{"step": 1}])
    (tmp_path / "step" / "meta").mkdir(parents=True)
    (tmp_path / "step" / "meta" / "metadata").write_text("{}")
    manifest.write(epath.Path(tmp_path / "step"))
    assert manifest.first_damage(epath.Path(tmp_path / "step")) == ""
    prepare(text_config(corpus, data__workers=1), tmp_path / "shards")
    assert len(TokenDataset.open(epath.Path(tmp_path / "shards"), "train").tokens(0, 10)) == 10


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Returns a home folder, to which HOME points."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_home_stands_for_a_tilde_at_the_beginning_only(home):
    expected = {
        "~": str(home),
        "~/": f"{home}/",
        "~/a b/ü": f"{home}/a b/ü",
        "~root/x": f"{os.path.expanduser('~root')}/x",
        "": "",
        ".": ".",
        "/x/~/y": "/x/~/y",
        "x~": "x~",
        "./~": "./~",
        "gs://bucket/~/x": "gs://bucket/~/x",
        "s3://~/x": "s3://~/x",
        "file:///x/y": "/x/y",
        "FILE://localhost/x": "/x",
    }
    assert {path: expand(path) for path in expected} == expected
    assert expand_place("hf:~/x") == f"hf:{home}/x"
    assert expand_place("ckpt:file:///x") == "ckpt:/x"
    assert expand_place("meta:gs://b/~") == "meta:gs://b/~"
    assert expand_place("other:~/x") == "other:~/x"
    for path in ("~no_such_user", "~no_such_user/x", "file://host/x", "file://", "file://x"):
        with pytest.raises(UserError, match="no home folder ~no_such_user|not file:///FOLDER"):
            expand(path)


def test_a_path_of_a_scheme_that_cannot_be_read():
    assert expand("gs://bucket/x") == "gs://bucket/x"
    for place in ("https://host/x", "hf:hdfs://host/x"):
        with pytest.raises(UserError, match=r"paths of (https|hdfs):// cannot be read"):
            expand_place(place)


def test_the_sha256_of_a_file_that_can_only_be_read(monkeypatch):
    """`hashlib.file_digest` refuses the files of a bucket, which can only be read."""
    content = bytes(range(256)) * 10_000  # longer than one read

    @contextlib.contextmanager
    def opened(path):
        yield types.SimpleNamespace(read=io.BytesIO(content).read)

    monkeypatch.setattr(files, "open_file", opened)
    assert sha256_of("gs://bucket/x") == hashlib.sha256(content).hexdigest()


def test_the_sha256_of_each_file_comes_in_order(tmp_path):
    paths = [tmp_path / str(number) for number in range(50)]
    for path in paths:
        path.write_text(path.name)
    paths[7].unlink()
    found = list(sha256_of_each(paths))
    assert isinstance(found.pop(7), FileNotFoundError)
    del paths[7]
    assert found == [hashlib.sha256(path.name.encode()).hexdigest() for path in paths]


def test_files_are_not_hashed_when_nobody_asks_any_more(monkeypatch):
    seen, closing = [], threading.Event()

    def slow(path):
        seen.append(path)
        if path:
            closing.wait()
        return str(path)

    class Pool(ThreadPoolExecutor):
        def __exit__(self, *error):
            closing.set()
            return super().__exit__(*error)

    monkeypatch.setattr(files, "sha256_of", slow)
    monkeypatch.setattr(files, "_THREADS", 1)
    monkeypatch.setattr(files.concurrent.futures, "ThreadPoolExecutor", Pool)
    digests = sha256_of_each(range(100))
    assert next(digests) == "0"
    digests.close()
    assert seen in ([0], [0, 1])
