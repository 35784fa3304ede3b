import json
import os

import pytest
from etils import epath

from llama_jax.checkpoint import retention
from tests.helpers import TINY, replace


@pytest.fixture
def directory(tmp_path):
    return epath.Path(tmp_path)


def make(directory, losses):
    """Saves steps 10, 20, .. with these validation losses."""
    for number, loss in enumerate(losses, start=1):
        meta = directory / str(10 * number) / "meta"
        meta.mkdir(parents=True)
        (meta / "metadata").write_text(json.dumps({"eval_loss": loss}))


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"keep_checkpoints": 2}, [50, 60]),
        ({"keep_checkpoints": 9}, [10, 20, 30, 40, 50, 60]),
        ({"keep_checkpoints": 1, "keep_every": 20}, [20, 40, 60]),
        ({"keep_checkpoints": 1, "keep_every": 7}, [60]),
        ({"keep_checkpoints": 1, "keep_best": 1}, [30, 60]),
        ({"keep_checkpoints": 1, "keep_best": 2, "keep_every": 50}, [10, 30, 50, 60]),
    ],
)
def test_what_is_kept(directory, changes, kept):
    make(directory, [2.0, 3.0, 1.0, None, float("nan"), 2.5])
    train = replace(TINY, **{f"train__{name}": value for name, value in changes.items()}).train
    for step in retention.dispensable_steps(directory, train):
        retention.remove(directory / str(step))
    assert retention.saved_steps(directory) == kept
    assert len(list(directory.iterdir())) == len(kept)


def test_in_an_object_store_the_manifest_makes_a_step(directory, monkeypatch):
    """Folders cannot be renamed there: a step without a manifest is being written or deleted."""
    monkeypatch.setattr(retention, "is_object_store", lambda _: True)
    make(directory, [2.0, 1.0, 3.0])
    (directory / "10" / "manifest.json").write_text("")
    (directory / "20" / "manifest.json").write_text("")
    assert retention.saved_steps(directory) == [10, 20]
    # A kill comes before the removal.
    monkeypatch.setattr(type(directory), "rmtree", lambda self: None)
    retention.remove(directory / "10")
    assert retention.saved_steps(directory) == [20] and (directory / "10").exists()


def test_what_can_be_rewound_to():
    """A run may rewind to regular steps and to saves after a rewind, not to the saves of a stop."""
    train = replace(TINY, train__checkpoint_every=10).train
    rewinds = [[35, 10], [57, 50]]
    fit = [s for s in range(1, 71) if retention.can_rewind_to(s, train, rewinds)]
    assert fit == [10, 35, 40, 50, 57, 60, 70]
    assert retention.can_rewind_to(20, train, []) and not retention.can_rewind_to(35, train, [])
    assert not retention.can_rewind_to(57, train, [[57, 50], [80, 50]])


@pytest.mark.parametrize(
    ("newest", "kept"),
    [
        # A bad stretch that the next log shows begins after 85; 60 is the newest regular step at
        # least 20 (rewind_steps) before that.
        (90, [60, 70, 80, 85, 90]),
        (85, [60, 70, 80, 85]),
        (75, [50, 60, 70, 75]),
    ],
)
def test_what_a_rewind_may_need_is_kept(directory, newest, kept):
    make(directory, [2.0] * 9)
    for step in (75, 85):  # saved because of a stop
        (directory / str(step)).mkdir()
    for step in (70, 80, 85, 90):
        if step > newest:
            retention.remove(directory / str(step))
    changes = {"max_rewinds": 1, "rewind_steps": 20, "max_skipped": 3, "log_every": 2}
    fields = {"checkpoint_every": 10, "keep_checkpoints": 2, **changes}
    train = replace(TINY, **{f"train__{name}": value for name, value in fields.items()}).train
    steps = retention.saved_steps(directory)
    gone = retention.dispensable_steps(directory, train)
    assert [step for step in steps if step not in gone] == kept


def test_a_step_that_cannot_say_its_loss_is_no_best(directory):
    make(directory, [2.0, 1.0, 3.0])
    (directory / "20" / "meta" / "metadata").write_text("{")
    train = replace(TINY, train__keep_checkpoints=1, train__keep_best=1).train
    assert retention.dispensable_steps(directory, train) == [20]


def test_a_deletion_that_is_interrupted_leaves_no_step(directory, monkeypatch):
    make(directory, [1.0, 2.0])

    def killed(self, **_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(directory), "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            retention.remove(directory / "10")
    assert retention.saved_steps(directory) == [20]
    assert retention.remove_leftovers(directory) == ["10.deleting"]
    assert [path.name for path in directory.iterdir()] == ["20"]


def test_only_what_is_unfinished_is_cleaned(directory):
    make(directory, [1.0])
    unfinished = [
        "5.saving",
        "5.saving.orbax-checkpoint-tmp",
        "6.orbax-checkpoint-tmp-17",
        "7.deleting",
        "7.deleting.1",
    ]
    mine = ["5.saving-copy", "5.saving.tar", "7.deleting.not", "8.damaged", "9.mine", "notes"]
    for name in (*unfinished, *mine):
        (directory / name / "params").mkdir(parents=True)
    assert retention.remove_leftovers(directory) == unfinished
    left = sorted(path.name for path in directory.iterdir())
    assert left == ["10", *mine]


def test_pipes_are_no_steps_and_block_nothing(directory):
    make(directory, [1.0])
    os.mkfifo(directory / "12")
    os.mkfifo(directory / "13.saving")
    assert retention.saved_steps(directory) == [10]
    assert retention.files_named_like_steps(directory) == ["12"]
    assert retention.remove_leftovers(directory) == ["13.saving"]
    assert sorted(path.name for path in directory.iterdir()) == ["10", "12"]


def test_setting_aside_keeps_what_was_set_aside_before(directory):
    for name in ("10.damaged", "10.damaged.1"):
        make(directory, [1.0])
        assert retention.set_aside(directory / "10").name == name
    assert retention.saved_steps(directory) == []
    assert retention.saved_steps(directory / "nothing") == []


def test_a_link_is_removed_and_not_what_it_names(directory, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    make(directory, [1.0, 2.0])
    make(epath.Path(elsewhere), [3.0])
    (directory / "10").rename(elsewhere / "20")
    for name, place in (("10", "20"), ("20/params", "10")):
        os.symlink(elsewhere / place, directory / name)
    (directory / "10.deleting").mkdir()  # the rest of an interrupted removal
    assert retention.remove(directory / "10") == [str(elsewhere / "20")]
    assert retention.remove(directory / "20") == [str(elsewhere / "10")]
    assert sorted(path.name for path in directory.iterdir()) == ["10.deleting"]
    assert retention.saved_steps(epath.Path(elsewhere)) == [10, 20]
    for step in ("10", "20"):
        assert (elsewhere / step / "meta" / "metadata").exists()


def test_what_cannot_be_cleaned_is_said_and_the_rest_is_removed(directory, monkeypatch):
    for name in ("5.saving", "6.saving", "7.deleting"):
        (directory / name).mkdir()
    rmtree = type(directory).rmtree

    def refuse(self, **options):
        if self.name == "6.saving":
            raise PermissionError(1, "Operation not permitted")
        rmtree(self, **options)

    monkeypatch.setattr(type(directory), "rmtree", refuse)
    said = []
    assert retention.remove_leftovers(directory, said.append) == ["5.saving", "7.deleting"]
    (line,) = said
    assert line.startswith("warning: ") and "6.saving is left over" in line
    assert retention.remove_leftovers(directory) == []


@pytest.mark.parametrize("rewinds", [None, 3, "x", [3], [[1]], [["1", 2]], [[1, 2, 3]], {"a": 1}])
def test_a_step_with_strange_rewinds(directory, rewinds):
    make(directory, [1.0, 2.0])
    (directory / "20" / "meta" / "metadata").write_text(json.dumps({"rewinds": rewinds}))
    train = replace(
        TINY, train__keep_checkpoints=1, train__max_rewinds=1, train__checkpoint_every=10
    ).train
    assert retention.dispensable_steps(directory, train) == []
