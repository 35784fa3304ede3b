import binascii
import concurrent.futures
import json

import numpy as np
import pytest

from llama_jax.data.shards import block_checksums
from llama_jax.data.shards.block_checksums import Blocks, BlockSums, decode_sums, encode_sums
from llama_jax.errors import UserError

SIZE, BLOCK = 1000, 64


@pytest.fixture
def data():
    return np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)


@pytest.fixture
def checks(data):
    sums = BlockSums(BLOCK)
    sums.add(data.tobytes())
    return decode_sums(encode_sums({"bin": sums}, BLOCK), {"bin": SIZE}, "x.crc.json")["bin"]


def test_a_checksum_is_that_of_every_crc32():
    sums = BlockSums()
    sums.add(b"123456789")
    assert sums.hex() == "cbf43926"  # the standard check value of CRC-32
    assert BlockSums().hex() == ""


@pytest.mark.parametrize("piece", [1, 7, BLOCK, 100, SIZE])
def test_blocks_do_not_depend_on_how_a_file_is_written(data, piece):
    sums, content = BlockSums(BLOCK), data.tobytes()
    for start in range(0, SIZE, piece):
        sums.add(content[start : start + piece])
    expected = [binascii.crc32(content[at : at + BLOCK]) for at in range(0, SIZE, BLOCK)]
    assert sums.hex() == "".join(f"{one:08x}" for one in expected)


def test_only_what_is_not_checked_yet_is_asked_for(data, checks):
    assert checks.unchecked(70, 80) == (64, 128)
    assert checks.unchecked(60, 70) == (0, 128)
    assert checks.unchecked(990, SIZE) == (960, SIZE)
    assert checks.unchecked(128, 128) is None
    assert checks.check(data[64:128], 64) is None
    assert checks.unchecked(64, 128) is None and checks.unchecked(70, 80) is None
    assert checks.unchecked(63, 80) == (0, 128)
    assert checks.check(data, 0) is None
    assert checks.unchecked(0, SIZE) is None


def test_a_damaged_block_is_never_remembered_as_good(data, checks):
    bad = data.copy()
    bad[130] ^= 4
    for _ in range(2):
        assert checks.check(bad, 0) == 128
        assert checks.unchecked(0, 128) is None
        assert checks.unchecked(128, 130) == (128, 192)
    assert checks.check(data[128:192], 128) is None
    assert checks.unchecked(128, 192) is None


def test_a_block_of_another_place_is_damage(data, checks):
    assert checks.check(data[64:128], 0) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_bytes": 0}, "blocks of 0 bytes"),
        ({"block_bytes": -64}, "blocks of -64 bytes"),
        ({"block_bytes": 60}, "blocks of 60 bytes"),
        ({"block_bytes": "64"}, "block_bytes of x.crc.json must be of type int"),
        ({"block_bytes": 128}, "16 checksums for 8 blocks"),
        ({"bin": "00" * 4}, "1 checksums for 16 blocks"),
        ({"bin": "xyz"}, "x.crc.json is malformed"),
        ({"bin": "00"}, "x.crc.json is malformed"),
        ({"bin": None}, "x.crc.json is malformed"),
    ],
)
def test_malformed_checksums(data, change, message):
    sums = BlockSums(BLOCK)
    sums.add(data.tobytes())
    described = json.loads(encode_sums({"bin": sums}, BLOCK)) | change
    with pytest.raises(UserError, match=message):
        decode_sums(json.dumps(described).encode(), {"bin": SIZE}, "x.crc.json")
    with pytest.raises(UserError, match="does not have 'mask'"):
        decode_sums(encode_sums({"bin": sums}, BLOCK), {"bin": SIZE, "mask": 9}, "x.crc.json")


def test_threads_share_what_is_checked():
    whole = np.random.default_rng(1).integers(0, 256, 200_000, np.uint8)
    sums = BlockSums()
    sums.add(whole.tobytes())
    of_crc = np.frombuffer(bytes.fromhex(sums.hex()), ">u4")
    checks = Blocks(of_crc, block_checksums.BLOCK_BYTES, len(whole))

    def read(start):
        span = checks.unchecked(start, start + 1000)
        return span is None or checks.check(whole[slice(*span)], span[0]) is None

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(0, 199_000, 500)))
    assert checks.unchecked(0, len(whole)) is None
