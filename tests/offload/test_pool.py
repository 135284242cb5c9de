"""A staging pool is a constant amount of memory: it lends what it has and makes others wait."""

import threading

import pytest
import torch

from hf_speed.errors import ConfigError, OffloadError
from hf_speed.offload import StagingPool
from hf_speed.offload.pool import GRAIN_BYTES


def test_buffers_are_equal_aligned_and_apart() -> None:
    pool = StagingPool(10 * GRAIN_BYTES + 1, num_buffers=4)
    assert (pool.buffer_bytes, pool.peak_bytes) == (2 * GRAIN_BYTES, 8 * GRAIN_BYTES)
    buffers = [pool.take() for _ in range(4)]
    assert pool.num_free == 0
    assert pool.try_take() is None
    for index, buffer in enumerate(buffers):
        assert buffer.shape == (pool.buffer_bytes,)
        assert buffer.data_ptr() % 4096 == 0
        buffer.fill_(index)
    assert [int(buffer.float().mean()) for buffer in buffers] == [0, 1, 2, 3]
    for buffer in buffers:
        pool.give(buffer)
    with pool.borrow() as again:
        assert again.data_ptr() == buffers[-1].data_ptr()
        assert pool.num_free == 3
    assert pool.num_free == 4


def test_a_take_waits_for_a_give() -> None:
    pool = StagingPool(GRAIN_BYTES, num_buffers=1, timeout_s=20)
    buffer = pool.take()
    taken: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: taken.append(pool.take()))
    thread.start()
    thread.join(timeout=0.1)
    assert thread.is_alive()
    pool.give(buffer)
    thread.join(timeout=20)
    assert taken[0].data_ptr() == buffer.data_ptr()


def test_what_cannot_be_says_so() -> None:
    with pytest.raises(
        ConfigError, match=r"offload.staging_bytes=1000 is too little for 8 buffers"
    ):
        StagingPool(1000)
    with pytest.raises(ConfigError, match="too little for 0 buffers"):
        StagingPool(1 << 20, num_buffers=0)
    pool = StagingPool(2 * GRAIN_BYTES, num_buffers=2, timeout_s=0.05)
    held = [pool.take(), pool.take()]
    with pytest.raises(OffloadError, match=r"all 2 staging buffers of 32768 bytes were held for 0"):
        pool.take()
    pool.give(held[0])
    for stranger in (held[0], torch.zeros(3)):
        with pytest.raises(OffloadError, match="a StagingPool that had not lent it"):
            pool.give(stranger)
    pool.close()
    with pytest.raises(OffloadError, match="this StagingPool is closed"):
        pool.take()
