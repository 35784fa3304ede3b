"""`verify` finds every changed or missing file in a folder of shards."""

import shutil

from llama_jax.data.shards.layout import verify


def test_every_file_is_verified(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    assert verify(folder) == []
    paths = [path for path in sorted(folder.iterdir()) if path.name != "manifest.json"]
    kinds = {path.name.partition(".")[2] for path in paths}
    assert kinds == {"bin", "idx", "crc.json", "model"}
    for path in paths:
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        assert verify(folder) == [path.name]
        path.unlink()
        assert verify(folder) == [path.name]
        path.write_bytes(content)
    assert verify(folder) == []
