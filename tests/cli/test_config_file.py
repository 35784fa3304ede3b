import os

import pytest

from llama_jax.cli.config_file import find_config, load_config_file, shipped_configs
from llama_jax.errors import UserError
from tests.helpers import ROOT

HEAD = """from llama_jax.config import default


def get_config():
    config = default()
"""
TAIL = "    return config\n"  # line 7, after one more line


def refused(path):
    with pytest.raises(UserError) as error:
        load_config_file(str(path))
    return str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.optim.lr = 1", "optim has no field lr; did you mean peak_lr?"),
        ("config['optim']['lr'] = 1", "optim has no field lr; did you mean peak_lr?"),
        ("config.optim.update(lr=1)", "optim has no field lr; did you mean peak_lr?"),
        ("config.update({'optim': {'lr': 1}})", "optim has no field lr; did you mean peak_lr?"),
        ("config.train.steps = config.optim.lr", "optim has no field lr; did you mean peak_lr?"),
        ("o = config.optim; o.wd = 1", "optim has no field wd; did you mean weight_decay?"),
        ("config.dcn.tensr = 2", "dcn has no field tensr; did you mean tensor?"),
        (
            "config.train.peak_lr = 1",
            "train has no field peak_lr; did you mean config.optim.peak_lr?",
        ),
        (
            "config.optimizer.peak_lr = 1",
            "the config has no group optimizer; did you mean config.optim?",
        ),
        ("config.steps = 1", "the config has no field steps; did you mean config.train.steps?"),
        ("config.train.steps = 1.5", "train.steps must be of type int, got 1.5"),
        ("config.train.steps = 'ten'", "train.steps must be of type int, got 'ten'"),
        ("config.data.streaming = 1", "data.streaming must be of type bool, got 1"),
        ("config.train = 3", "train is a group of fields, and cannot be 3"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("{}['x']", "KeyError: x"),
        ("raise ValueError('one\\ntwo')", "ValueError: one"),
        ("raise SystemExit", "SystemExit"),
        ("import nowhere.at_all", "ModuleNotFoundError: No module named 'nowhere'"),
        ("config.train.steps = = 1", "SyntaxError: invalid syntax"),
        ("config.train.steps = (1", "SyntaxError: '(' was never closed"),
    ],
)
def test_a_mistake_in_a_config_file_is_told_with_its_line(line, message, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f"{HEAD}    {line}\n{TAIL}")
    text = refused(path)
    assert text.startswith(f"{path}, line 6: {message}")
    assert len(text) < 250 and "\n" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x = 1\n", "{path} has no function get_config"),
        (b"", "{path} has no function get_config"),
        (b"get_config = 3\n", "{path} has no function get_config"),
        (b"def get_config():\n    pass\n", "{path}: get_config() returned nothing, not a config"),
        (b"def get_config():\n    return {}\n", "{path}: get_config() returned a dict"),
        (
            b"def get_config(size):\n    pass\n",
            "{path}: get_config(size) needs an argument; give it as --config={path}:ARGUMENT",
        ),
        (b"# caf\xe9\n", "{path}: SyntaxError: invalid or missing encoding declaration"),
        (b"x = 1 # \n" * 3 + b"y = '\xff'\n", "{path} is not text in UTF-8"),
        ("x = 1\n".encode("utf-16"), "{path}: SyntaxError"),
        (b"x = 1\0\n", "{path}: SyntaxError: source code string cannot contain null bytes"),
        (b"x = " + b"(" * 5000 + b")" * 5000, "{path}, line 1: SyntaxError: too many nested"),
    ],
)
def test_a_file_that_is_no_config(content, message, tmp_path):
    path = tmp_path / "mine.py"
    path.write_bytes(content)
    assert refused(path).startswith(message.format(path=path))


def test_an_unlocked_config_is_checked_as_well(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f"{HEAD}    config.unlock().optim.lr = 1\n{TAIL}")
    message = "unknown fields of config group optim: lr (optim has no field lr; did you mean"
    assert refused(path).startswith(f"{path}: {message} peak_lr?)")


def test_a_config_may_take_an_argument(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        f"{HEAD}    config.train.steps = int(steps)\n{TAIL}".replace("()", "(steps)", 1)
    )
    assert load_config_file(f"{path}:7").train.steps == 7
    assert refused(f"{path}:seven").startswith(f"{path}, line 6: ValueError: invalid literal")
    assert "get_config() takes no argument '3'" in refused(f"{ROOT}/configs/tiny.py:3")


def test_an_edited_file_is_read_again_whatever_its_time(tmp_path):
    path = tmp_path / "mine.py"
    for steps in (10, 20, 30):
        path.write_text(f"{HEAD}    config.train.steps = {steps}\n{TAIL}")
        os.utime(path, (0, 0))
        assert load_config_file(str(path)).train.steps == steps
    assert os.listdir(tmp_path) == ["mine.py"]


@pytest.mark.parametrize("here", [True, False])
def test_a_shipped_config_is_found_by_its_name(here, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT if here else tmp_path)
    for name in ("tiny", "configs/tiny", "tiny.py", "configs/tiny.py", "./configs/tiny"):
        assert load_config_file(name).train.steps == 850
    (tmp_path / "tiny").mkdir()  # a run's folder of this name does not hide the config
    assert load_config_file("tiny").train.steps == 850


def test_a_config_of_this_folder_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.py").write_text(f"{HEAD}    config.train.steps = 3\n{TAIL}")
    assert load_config_file("tiny").train.steps == 3
    (tmp_path / "tiny.py").write_text(f"{HEAD}    config.train.steps = 4\n{TAIL}")
    assert load_config_file("tiny").train.steps == 4
    assert load_config_file("7b").train.steps == 238_419


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("7B", "7b"),
        ("llama2-7b", "llama2_7b"),
        ("Llama-2-7B", "llama2_7b"),
        ("llama-7b", "7b"),
        ("llama3.1-8b", "llama3_1_8b"),
        ("configs/tinny.py", "tiny"),
        ("configs/65", "65b"),
    ],
)
def test_a_name_that_is_nearly_one_of_a_config(asked, meant, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = refused(asked)
    assert text.startswith(
        f"there is no config {asked}; did you mean --config={meant}? (there are 7b,"
    )
    assert all(name in text for name in shipped_configs())


def test_what_is_no_config_file_at_all(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert "is not a Python file, FILE.py with a function get_config" in refused("README.md")
    (tmp_path / "config.json").write_text("{}")
    assert "(config.json is the record of a run)" in refused(tmp_path / "config.json")
    (tmp_path / "one.py").write_text("")
    assert refused(tmp_path).endswith(f"name one of its files ({tmp_path} has one.py)")
    (tmp_path / "x.py").mkdir()
    assert "is a folder" in refused(tmp_path / "x.py")
    missing = f"there is no config file {tmp_path}/two.py ({tmp_path} has one.py, x.py)"
    assert refused(tmp_path / "two.py") == missing
    assert refused("nothing").startswith("there is no config nothing (there are 7b,")
    assert refused("~no_such_user/x.py").startswith("there is no home folder ~no_such_user")
    (tmp_path / "cut.py").symlink_to(tmp_path / "gone")
    assert "there is no config file" in refused(tmp_path / "cut.py")


def test_an_unreadable_file(tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text(HEAD + TAIL)

    def denied(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(find_config(str(path))[0]), "read_bytes", denied)
    assert refused(path) == f"cannot read {path}: Permission denied"


def test_home_stands_for_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text(HEAD + TAIL)
    assert str(find_config("~/mine.py")[0]) == f"{tmp_path}/mine.py"
