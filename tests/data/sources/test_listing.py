"""The files that a source names; the expected lists are written by hand."""

import json
import os
import socket
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.config import DataConfig
from llama_jax.data.prepare.job import prepare
from llama_jax.data.sources import documents as documents_lib
from llama_jax.data.sources import file_kind, folder_walk
from llama_jax.data.sources.documents import list_parts, read_source
from llama_jax.data.sources.folder_walk import ABOUT, DEAD, HIDDEN, OWN, SPECIAL, TWICE
from llama_jax.data.sources.listing import FOLDERS, list_files, named_sources
from llama_jax.data.sources.part import Tally
from llama_jax.errors import UserError
from tests.helpers import one_line_error, run_command, start_train, text_config, write_corpus

KINDS = ("bin", "idx", "crc.json")


def tree(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"the text of {name}")
    return folder


def listed(source, own=(), folder=None):
    """Returns the names of the files, and the counts of those left out."""
    tally = Tally()
    files = list_files(str(source), own, tally)
    base = folder or source
    return [os.path.relpath(path, base) for path in files], dict(tally.left_out)


def test_a_downloaded_folder(tmp_path):
    data = (
        "data/train-0.txt",
        "data/train-1.txt",
        "stories.md",
        "data/readers.txt",
        "noticeable.txt",
    )
    about = ("README.md", "LICENSE", "licence.txt", "README_zh.md", "LICENSE-APACHE", "Notice")
    about += ("dataset_infos.json", "data/x.txt.lock", "SHA256SUMS", "data/train-0.txt.md5")
    about += ("_SUCCESS", "CITATION.cff", "x.txt~", "Thumbs.db", "data/a.incomplete")
    about += ("README.pt-BR.md", "README_zh_CN.md", "README (1).md", "README-\u4e2d\u6587.md")
    about += ("LICENSE-CC-BY-4.0.txt", "UNLICENSE", "datasheet.md", "CODE_OF_CONDUCT.md")
    hidden = (".gitattributes", "data/.train-0.txt.crc", ".DS_Store")
    tree(tmp_path, *data, *about, *hidden, ".git/a", ".git/b", ".cache/huggingface/x.json")
    tree(tmp_path, "__MACOSX/x.txt")
    files, left_out = listed(tmp_path)
    assert files == sorted(data)
    assert left_out == {HIDDEN: len(hidden) + 2, ABOUT: len(about) + 1}


def test_what_is_named_itself_is_read(tmp_path):
    tree(tmp_path, "README.md", ".hidden/a.txt", ".b.txt", "LICENSE", "only/README.md", "c.lock")
    assert listed(tmp_path / "README.md", folder=tmp_path)[0] == ["README.md"]
    assert listed(tmp_path / ".b.txt", folder=tmp_path)[0] == [".b.txt"]
    assert listed(tmp_path / ".hidden")[0] == ["a.txt"]
    assert listed(f"{tmp_path}/*.md", folder=tmp_path)[0] == ["README.md"]
    assert listed(f"{tmp_path}/.*.txt", folder=tmp_path)[0] == [".b.txt"]
    assert listed(tmp_path / "only") == (["README.md"], {})  # the only file


def test_only_hidden_files(tmp_path):
    tree(tmp_path, ".a", ".b/c")
    with pytest.raises(UserError, match="holds no file except hidden ones"):
        listed(tmp_path)
    with pytest.raises(UserError, match="matches only hidden files"):
        listed(f"{tmp_path}/*")


def test_globs_as_a_shell_reads_them(tmp_path):
    tree(tmp_path, "a.txt", ".a.txt", "sub/b.txt", "odd[1]/c.txt", "odd1/d.txt", "x y/e.txt")
    files, left_out = listed(f"{tmp_path}/*", folder=tmp_path)
    assert files == ["a.txt"] and left_out == {HIDDEN: 1, FOLDERS: 4}
    assert listed(f"{tmp_path}/odd[1]/*.txt", folder=tmp_path)[0] == ["odd[1]/c.txt"]
    assert listed(f"{tmp_path}/x y/*", folder=tmp_path)[0] == ["x y/e.txt"]
    assert listed(f"{tmp_path}/[os]*/[bd].txt", folder=tmp_path)[0] == ["odd1/d.txt", "sub/b.txt"]
    with pytest.raises(UserError, match="matches only folders"):
        listed(f"{tmp_path}/o*")


def test_links(tmp_path):
    source = tree(tmp_path / "source", "a/one.txt", "a/b/two.txt")
    tree(tmp_path / "elsewhere", "three.txt", "back/x.txt")
    (source / "again").symlink_to(source / "a")  # would count twice
    (source / "a" / "loop").symlink_to(source)  # would never end
    (source / "copy.txt").symlink_to("a/one.txt")
    (source / "gone.txt").symlink_to(tmp_path / "nothing")
    (source / "self").symlink_to(source / "self")
    (source / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back" / "home").symlink_to(source)
    files, left_out = listed(source)
    names = sorted(name.rsplit("/", 1)[-1] for name in files)
    assert names == ["one.txt", "three.txt", "two.txt", "x.txt"]
    assert left_out == {TWICE: 4, DEAD: 2}
    assert listed(f"{source}/a/one.txt,{source}/copy.txt", folder=source)[0] == ["a/one.txt"]
    assert len(listed(f"{source}/a,{source}/a/b,{source}/a", folder=source)[0]) == 4
    assert len(listed(source / "again")[0]) == 4  # a link as the source is a folder


@pytest.fixture
def special(tmp_path):
    tree(tmp_path, "a.txt")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(tmp_path)  # the path of a socket must be short
        server.bind("socket")
        os.chdir(here)
        yield tmp_path


def test_pipes_and_devices_are_never_opened(special):
    assert listed(special) == (["a.txt"], {SPECIAL: 2})
    assert listed(f"{special}/*", folder=special) == (["a.txt"], {SPECIAL: 2})
    for name in (f"{special}/pipe", f"{special}/socket", "/dev/null"):
        with pytest.raises(UserError, match="is a pipe or a device, not a file"):
            listed(name)


ODD = [
    "a=b.txt",
    "a,b.txt",
    "a;b.txt",
    "a[1].txt",
    "x=1/y=2/c.txt",
    "a b.txt",
    "*.txt",
    "a=1,b=2;c=3.txt",
]
ODD += ["web=x;books=y.txt", "?", "é=ü.txt", " lead.txt", "a,,b.txt", "=.txt", "100%.txt", "~x.txt"]


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("relative", [True, False])
def test_odd_names(tmp_path, monkeypatch, name, relative):
    """An existing name is taken literally: alone, in a list, and in a named source."""
    tree(tmp_path, name, "other.txt")
    monkeypatch.chdir(tmp_path)
    path = name if relative else str(tmp_path / name)

    def read(spec):
        return list(read_source(spec, DataConfig(), Tally()))

    text = f"the text of {name}"
    assert named_sources(path) == {"": path} and read(path) == [text]
    both = sorted([text, "the text of other.txt"])
    for spec in (
        f"{path},other.txt",
        f"other.txt, {path}" if name[0] != " " else f"{path},other.txt",
    ):
        assert named_sources(spec) == {"": spec}
        assert sorted(read(spec)) == both
    named = (
        named_sources(f"one={path}; two=other.txt") if name[0] != " " else {"one": path, "two": ""}
    )
    assert list(named) == ["one", "two"] and read(named["one"]) == [text]


def test_globs_in_folders_with_an_equals_sign(tmp_path, monkeypatch):
    tree(tmp_path, "year=2024/a.jsonl", "year=2025/b.jsonl", "2023/c.jsonl")
    monkeypatch.chdir(tmp_path)
    assert named_sources("year=2024/*.jsonl") == {"": "year=2024/*.jsonl"}
    assert named_sources("year=*/*.jsonl,2023") == {"": "year=*/*.jsonl,2023"}
    assert named_sources("year=2023/*.jsonl") == {"year": "2023/*.jsonl"}
    assert named_sources("new=year=2024/*.jsonl; old=2023") == {
        "new": "year=2024/*.jsonl",
        "old": "2023",
    }


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a=b.txt", r"b.txt does not exist \(a path that has '=' in it is written ./a=b.txt\)"),
        ("./a=b.txt", r"'./a=b.txt' is not NAME=FILES, and there is no such file"),
        ("x.txt,a.txt", "x.txt does not exist"),
        ("stdlib,a.txt", "stdlib does not exist as a file; write it as a source of its own"),
        ("a" * 5000, "does not exist"),
        ("a\0b", "does not exist"),
    ],
)
def test_what_is_missing(tmp_path, monkeypatch, source, message):
    tree(tmp_path, "a.txt")
    monkeypatch.chdir(tmp_path)
    config = text_config("x", data__source=source)
    with pytest.raises(UserError, match=message):
        prepare(config, tmp_path / "out", log=lambda line: None)


LETTERS = st.text(st.sampled_from("ab=,;[] *?.é"), min_size=1, max_size=12)


@settings(deadline=None, max_examples=100)
@given(name=LETTERS.filter(lambda name: name.strip() == name and name.strip(".")))
def test_any_name_that_exists(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("names")
    (folder / name).write_text("text")
    spec = f"{folder}/{name}"
    (only,) = named_sources(spec).values()
    assert list(read_source(only, DataConfig(), Tally())) == ["text"]


def shards_of(tmp_path, folder):
    prepare(text_config(write_corpus_in(tmp_path / "corpus")), folder, log=lambda line: None)


def write_corpus_in(folder):
    folder.mkdir(parents=True)
    return write_corpus(folder)


def test_our_own_folders_are_known(tmp_path):
    source = write_corpus_in(tmp_path / "source")
    config = text_config(source)
    expected = listed(source)[0]
    prepare(config, source / "shards", log=lambda line: None)
    two = text_config(source, data__source=f"a={source}/00*.txt; b={source}/01*.txt")
    prepare(two, source / "mixed", log=lambda line: None)
    tree(source, "run/config.json", "run/metrics.jsonl", "run/checkpoints/20/x")
    tree(
        source,
        "begun/plan.json",
        "preparing/goodput.json",
        "killed/plan.json",
        "killed/part-00000.json",
    )
    files, left_out = listed(source, own=(source / "new",))
    assert files == expected and left_out == {
        OWN: 7
    }  # preparing, begun, killed, run, three of shards
    for name, what in (("shards", "token shards"), ("run", "the work directory of a run")):
        with pytest.raises(UserError, match=f"{name} is .*{what}"):
            listed(source / name)
    with pytest.raises(UserError, match="the folder that this run writes to"):
        listed(source, own=(source,))


def test_a_users_folder_that_looks_a_little_like_ours(tmp_path):
    names = ["a/config.json", "b/manifest.json", "b/x.jsonl", "c/metrics.jsonl", "d/plan.json"]
    tree(tmp_path, *names, "d/train.txt", "e/checkpoints/x.txt")
    assert listed(tmp_path) == (sorted([*names, "d/train.txt", "e/checkpoints/x.txt"]), {})


def test_the_output_inside_of_the_source(tmp_path):
    """A second `prepare` reads the same text, and none of the files of the first."""
    source = write_corpus_in(tmp_path / "source")
    first = prepare(text_config(source), source / "out", log=lambda line: None)[0]
    again = prepare(text_config(source), source / "more" / "out2", log=lambda line: None)[0]
    assert first.splits == again.splits
    assert first.left_out == {} and again.left_out == {OWN: [1, f"{source}/out"]}


def test_a_streaming_run_inside_of_its_source(tmp_path):
    """The run can start a second time, and logs that it leaves out its own folder."""
    source = write_corpus_in(tmp_path / "source")
    (source / ".hidden").write_text("x")
    steps = ("--config.data.streaming=True", "--config.train.steps=4")
    outputs = []
    for flags in (steps, (*steps[:1], "--config.train.steps=4")):
        process = start_train(source, source / "run", *flags, devices=1)[0]
        out, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        outputs.append(out)
    assert "data    40 plain text" in outputs[0]
    assert f"left out  1 {HIDDEN}; the first: {source}/.hidden" in outputs[0]
    assert f"left out  1 {OWN}; the first: {source}/run" in outputs[1]


def test_many_files_are_looked_at_at_once(tmp_path, monkeypatch):
    """Buckets answer slowly, so files are checked in parallel: each check waits for another."""
    tree(tmp_path, "a.txt", "b.txt")
    meeting, identify_file = threading.Barrier(2), file_kind.identify_file

    def slow(path, config):
        meeting.wait(60)
        return identify_file(path, config)

    monkeypatch.setattr(documents_lib, "identify_file", slow)
    assert len(list_parts(str(tmp_path), DataConfig())) == 1


def test_an_unreadable_folder_is_one_line(tmp_path, monkeypatch):
    tree(tmp_path, "a/b.txt")

    def refuses(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(folder_walk.os, "scandir", refuses)
    with pytest.raises(UserError, match=f"cannot read {tmp_path}: Permission denied"):
        listed(tmp_path)


def test_a_path_with_an_equals_sign_that_is_gone_later(tmp_path, monkeypatch):
    """Its shards are found in the same folder as when the path existed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x=1.jsonl").write_text(
        "\n".join(json.dumps({"text": f"some words {n} " * 9}) for n in range(60))
    )
    flags = ("--config=configs/tiny.py", "--config.model.vocab_size=280")
    for command, more in (("prepare", ["--output=out"]), ("data", ["--show=out"])):
        source = [f"--config.data.source={tmp_path}/x=1.jsonl"] if command == "prepare" else []
        done = run_command(
            command,
            *(flags if command == "prepare" else ()),
            *source,
            *(flag.replace("=out", f"={tmp_path}/out") for flag in more),
        )
        assert done.returncode == 0, done.stderr
        (tmp_path / "x=1.jsonl").rename(tmp_path / "gone") if command == "prepare" else None
    line = one_line_error(
        run_command(
            "prepare",
            *flags,
            f"--config.data.source={tmp_path}/x=1.jsonl",
            f"--output={tmp_path}/new",
        )
    )
    assert "is not NAME=FILES, and there is no such file" in line


def test_globs_below_folders_with_commas_and_semicolons(tmp_path, monkeypatch):
    monkeypatch.chdir(
        tree(tmp_path, "a,b/1.txt", "a,b/2.txt", "c;d,e/3.txt", "4.txt", "k=v,w/5.txt")
    )
    assert sorted(map(str, list_files("a,b/*.txt"))) == ["a,b/1.txt", "a,b/2.txt"]
    assert sorted(map(str, list_files("4.txt,a,b/[2].txt"))) == ["4.txt", "a,b/2.txt"]
    assert sorted(map(str, list_files("?.txt, c;d,e/*"))) == ["4.txt", "c;d,e/3.txt"]
    assert named_sources("x=c;d,e/*.txt; y=a,b/*") == {"x": "c;d,e/*.txt", "y": "a,b/*"}
    assert named_sources("k=v,w/*.txt") == {"": "k=v,w/*.txt"}
    tree(tmp_path, "x1,y1")  # "x*,y*" also matches this single name
    tree(tmp_path, "x2", "y2")
    assert sorted(map(str, list_files("x*,y*"))) == ["x1,y1", "x2", "y2"]


@pytest.mark.parametrize("source", [",", " ", " , ,"])
def test_a_source_that_names_nothing(source):
    with pytest.raises(UserError, match="data.source='.*' names no file; try stdlib or a path"):
        list_files(source)


def test_shards_that_have_lost_their_manifest_are_no_text(tmp_path):
    names = [f"{split}-00000-000.{kind}" for split in ("train", "validation") for kind in KINDS]
    tree(tmp_path, "a.txt", *(f"shards/{name}" for name in names), "shards/tokenizer.model")
    assert listed(tmp_path) == (["a.txt"], {OWN: 1})
    tree(tmp_path, "text/train-00000-000.txt", "text/train-1-2.bin")
    assert len(listed(tmp_path)[0]) == 3  # names of other tools


def test_names_of_sources_in_buckets():
    spec = "web=gs://bucket/web/*.jsonl.zst; books=gs://bucket/books,gs://other/books"
    found = {"web": "gs://bucket/web/*.jsonl.zst", "books": "gs://bucket/books,gs://other/books"}
    assert named_sources(spec) == found


def test_urls(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text")
    for source in (f"file://{path}", f"file://{tmp_path}", f"file://{tmp_path}/*.txt"):
        assert [str(one) for one in list_files(source)] == [str(path)]
        assert named_sources(f"a={source}") == {"a": source}
    for source in ("https://example.com/a.txt", f"{path},hdfs://host/a"):
        with pytest.raises(UserError, match=r"(https|hdfs)://\S+: paths of (https|hdfs):// cannot"):
            list_files(source)
