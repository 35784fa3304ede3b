import pytest
from etils import epath

from llama_jax.files import write_atomically


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
