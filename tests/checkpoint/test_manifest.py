import json

import pytest
from etils import epath

from llama_jax import files
from llama_jax.checkpoint import manifest
from llama_jax.errors import UserError
from llama_jax.files import encode_entries, sha256_of
from llama_jax.text.saved_tokenizer import MANIFEST
from tests.helpers import flip_bit


@pytest.fixture
def folder(tmp_path):
    """Writes files of several sizes into several folders, and their manifest."""
    folder = epath.Path(tmp_path) / "7"
    for name, size in (("a", 3), ("d/b", 1000), ("d/e/c", 0), ("meta/metadata", 40)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(i % 251 for i in range(size)))
    manifest.write(folder)
    return folder


def test_it_lists_every_file(folder):
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert list(listed) == ["a", "d/b", "d/e/c", "meta/metadata"]
    assert listed["d/b"]["bytes"] == 1000 and listed["d/e/c"]["bytes"] == 0
    assert manifest.first_damage(folder) == ""
    manifest.write(folder)  # a second call does not list the manifest in itself
    assert manifest.first_damage(folder) == ""


def test_every_bit_of_every_file(folder):
    names = [*json.loads((folder / "manifest.json").read_text())["files"], "manifest.json"]
    for name in names:
        path = folder / name
        good = path.read_bytes()
        # Flip every seventh bit, so that each bit of a byte has its turn.
        for position in range(0, len(good) * 8, 7):
            bad = bytearray(good)
            bad[position // 8] ^= 1 << position % 8
            path.write_bytes(bad)
            assert manifest.first_damage(folder).startswith(name), (name, position)
        path.write_bytes(good)
    assert manifest.first_damage(folder) == ""


def test_missing_cut_and_grown(folder):
    data = (folder / "d" / "b").read_bytes()
    (folder / "d" / "b").unlink()
    assert manifest.first_damage(folder) == "d/b is missing"
    (folder / "d" / "b").write_bytes(data[:10])
    assert manifest.first_damage(folder) == "d/b has 10 bytes, 1000 were written"
    (folder / "d" / "b").write_bytes(data + b"\0")
    assert manifest.first_damage(folder) == "d/b has 1001 bytes, 1000 were written"
    (folder / "d" / "b").write_bytes(bytes(1000))
    assert manifest.first_damage(folder) == "d/b holds other bytes than were written"


def test_a_file_that_cannot_be_read(folder, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files, "sha256_of", fail)
    assert manifest.first_damage(folder) == "a cannot be read: Input/output error"


def test_a_quick_check_reads_small_files_only(folder, monkeypatch):
    monkeypatch.setattr(manifest, "QUICK_BYTES", 100)
    (folder / "d" / "b").write_bytes(bytes(1000))
    assert manifest.first_damage(folder, quick=True) == ""
    (folder / "a").write_bytes(b"xyz")
    assert manifest.first_damage(folder, quick=True) == "a holds other bytes than were written"


def test_the_parts_are_the_whole(folder):
    for name in ("a", "d/b", "meta/metadata"):
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(bytes(255 - b for b in good))
        found = [manifest.first_damage(folder, (index, 3)) for index in range(3)]
        assert sorted(map(bool, found)) == [False, False, True], name
        (folder / name).write_bytes(good)


def test_without_a_manifest(folder):
    (folder / "manifest.json").unlink()
    assert manifest.first_damage(folder) == "manifest.json is missing"
    with pytest.raises(UserError, match="manifest.json is not as it was written"):
        manifest.amend(folder, "meta/metadata", b"{}")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"files": 3}', '{"files": {"../x": {}}}', "\udcff"]
)
def test_a_manifest_that_is_none(folder, text):
    (folder / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    assert manifest.first_damage(folder) == "manifest.json is not as it was written"


def test_names_do_not_leave_the_folder(folder):
    """No file is opened that a forged manifest names outside the folder."""
    (folder.parent / "secret").write_text("x")
    entry = {"bytes": 1, "sha256": sha256_of(folder.parent / "secret")}
    (folder / "manifest.json").write_text(encode_entries({"../secret": entry}))
    assert manifest.first_damage(folder) == "../secret is missing"


def test_an_amended_file_is_verified_at_every_moment(folder, monkeypatch):
    """Killed at any moment in between, the step is undamaged, and the next try completes it."""
    name, seen = "meta/metadata", []
    old, new = (folder / name).read_bytes(), b'{"eval_loss": 2.5}'
    replace_file = manifest._replace

    def noted(path, data):
        replace_file(path, data)
        seen.append(((folder / name).read_bytes(), manifest.first_damage(folder)))
        if len(seen) in (1, 3):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "_replace", noted)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                manifest.amend(folder, name, new)
        manifest.amend(folder, name, new)
    assert seen[:3] == [(old, ""), (old, ""), (new, "")] and set(seen[3:]) == {(new, "")}
    # Only the intended content is accepted now.
    assert '"before"' not in (folder / MANIFEST).read_text()
    (folder / name).write_bytes(old)
    assert manifest.first_damage(folder) != ""


def test_damage_is_found_while_a_file_is_amended(folder, monkeypatch):
    name = "meta/metadata"
    replace_file = manifest._replace

    def killed(path, data):
        replace_file(path, data)
        raise KeyboardInterrupt

    monkeypatch.setattr(manifest, "_replace", killed)
    with pytest.raises(KeyboardInterrupt):
        manifest.amend(folder, name, b"new")
    monkeypatch.undo()
    flip_bit(folder / name, 5)
    assert manifest.first_damage(folder) == f"{name} holds other bytes than were written"
    with pytest.raises(UserError, match=f"{name} holds other bytes than were written"):
        manifest.amend(folder, name, b"newer")
    flip_bit(folder / name, 5)
    flip_bit(folder / MANIFEST, 900)
    assert manifest.first_damage(folder) == "manifest.json is not as it was written"
    with pytest.raises(UserError, match="manifest.json is not as it was written"):
        manifest.amend(folder, name, b"newer")
