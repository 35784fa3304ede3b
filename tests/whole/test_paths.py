import json
import pathlib

import pytest

from llama_jax.config import Config, DataConfig, from_json
from llama_jax.errors import UserError
from tests.helpers import ROOT, TINY, TINY_FLAGS, one_line_error, replace, run_command


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Returns a home folder, to which HOME points."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_paths_in_a_config_are_expanded_once_for_all(home):
    paths = {name: f"~/{name}" for name in ("path", "tokenizer", "tfds_data_dir")}
    paths |= {"template": "~/t.jinja", "packing": "best_fit"}
    config = replace(TINY, data=DataConfig(source="x", **paths), init_from="hf:~/llama")
    assert config.data.path == f"{home}/path"
    assert config.data.tokenizer == f"{home}/tokenizer"
    assert config.data.tfds_data_dir == f"{home}/tfds_data_dir"
    assert config.data.template == f"{home}/t.jinja"
    assert config.init_from == f"hf:{home}/llama"
    assert "~" not in config.to_json()
    assert from_json(config.to_json()) == config
    values = json.loads(Config().to_json())
    values["data"]["path"] = "~no_such_user/x"
    with pytest.raises(UserError, match=r"^data.path=~no_such_user/x: there is no home folder"):
        from_json(json.dumps(values))


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """Returns a home folder in which a run, shards and text were named with a tilde."""
    home = tmp_path_factory.mktemp("home")
    (home / "text").symlink_to(corpus)
    flags = (*TINY_FLAGS, "--config.data.source=~/text", "--config.train.steps=3")
    prepared = run_command("prepare", *flags, "--output=~/shards", HOME=str(home))
    assert prepared.returncode == 0, prepared.stderr
    flags += ("--config.data.path=~/shards", "--config.data.tokenizer=~/shards/tokenizer.model")
    trained = run_command("train", *flags, "--workdir=~/runs/a", HOME=str(home))
    assert trained.returncode == 0, trained.stderr
    return home


@pytest.mark.parametrize(
    "command",
    [
        ("prepare", "--verify=~/shards"),
        ("checkpoint", "--verify=~/runs/a"),
        ("data", "--show=~/shards", "--plot=~/data.png"),
        ("generate", "--checkpoint=~/runs/a", "--prompts=~/prompts.txt", "--max_tokens=1"),
        ("evaluate", "--checkpoint=~/runs/a", "--shards=~/shards", "--limit=1"),
        ("evaluate", "--checkpoint=~/runs/a", "--text=~/text", "--limit=1"),
        ("convert", "--source=ckpt:~/runs/a", "--target=hf:~/exported"),
        ("train", "--config=~/mine.py", "--workdir=~/runs/b"),
    ],
)
def test_every_command_finds_what_is_in_the_home_folder(run, command):
    (run / "prompts.txt").write_text("abc\n")
    pairs = (flag[2:].split("=") for flag in TINY_FLAGS[1:])
    flags = "".join(f"    {name} = {value or repr('')}\n" for name, value in pairs)
    flags += "    config.data.path = '~/shards'\n    config.train.steps = 3\n"
    (run / "mine.py").write_text(
        "from llama_jax.config import default\n\ndef get_config():\n    config = default()\n"
        f"    config.update(__import__('runpy').run_path({str(ROOT / 'configs/tiny.py')!r})"
        f"['get_config']())\n{flags}    return config\n"
    )
    process = run_command(*command, HOME=str(run))
    assert process.returncode == 0, process.stderr


def test_no_folder_is_named_tilde(run):
    assert json.loads((run / "runs/a/config.json").read_text())["data"]["path"] == f"{run}/shards"
    assert (run / "shards" / "tokenizer.model").exists()
    assert not [path for path in (ROOT, pathlib.Path.cwd()) if (path / "~").exists()]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("generate", "--checkpoint=~/none"), "no checkpoint in {home}/none"),
        (("generate", "--checkpoint=~/runs/a", "--prompts=~/none"), "cannot read --prompts={home}"),
        (("generate", "--checkpoint=x", "--messages=~/none"), "{home}/none"),
        (("generate", "--checkpoint=~no_such_user"), "there is no home folder ~no_such_user"),
        (("convert", "--source=hf:~/none", "--target=ckpt:x"), "{home}/none does not exist"),
        (("convert", "--source=peft:~/none", "--target=ckpt:x"), "{home}/none holds no adapters"),
        (("checkpoint", "--verify=file://x"), "file://x is not file:///FOLDER"),
        (("data", "--show=~/none"), "{home}/none is not a folder"),
        (
            ("train", *TINY_FLAGS, "--workdir=~/c", "--config.init_from=hf:~/none"),
            "{home}/none does not exist",
        ),
        (
            ("train", *TINY_FLAGS, "--workdir=~/c", "--config.data.tokenizer=~/none"),
            "{home}/none",
        ),
    ],
)
def test_what_is_not_in_the_home_folder_is_named_whole(run, command, message):
    process = run_command(*command, HOME=str(run))
    assert message.format(home=run) in one_line_error(process)
