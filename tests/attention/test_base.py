"""A batch: its tensors say what its host's view says, and go where it goes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hanok.attention.base import ForwardBatch

META = torch.device("meta")  # a device that is not the CPU, wherever the tests run


@settings(max_examples=60)
@given(
    shape=st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 5), st.integers(1, 4), st.integers(-1, 2)),
        min_size=1,
        max_size=4,
    ),
    trains=st.booleans(),
)
def test_tensors_say_what_the_host_knows(
    shape: list[tuple[int, int, int, int]], trains: bool
) -> None:
    past, new, num_blocks, adapters = (list(item) for item in zip(*shape, strict=True))
    tokens = [[10 * number + n for n in range(count)] for number, count in enumerate(new)]
    blocks = [tuple(range(7 * i, 7 * i + count)) for i, count in enumerate(num_blocks)]
    whole = [p + n + 3 for p, n in zip(past, new, strict=True)]
    with torch.set_grad_enabled(trains):
        batch = ForwardBatch.of(
            tokens, past=past, blocks=blocks, sequence_lengths=whole, adapters=adapters
        )
    starts = batch.query_starts.tolist()
    own = batch.sequence_of_tokens().tolist()
    for number, count in enumerate(new):
        mine = slice(starts[number], starts[number + 1])
        assert batch.token_ids[mine].tolist() == tokens[number]
        assert batch.positions[mine].tolist() == list(range(past[number], past[number] + count))
        assert own[mine] == [number] * count
        if max(adapters) >= 0:
            assert batch.adapters is not None
            assert batch.adapters[mine].tolist() == [adapters[number]] * count
        row = batch.block_table[number].tolist()
        assert tuple(row[: num_blocks[number]]) == blocks[number]
        assert set(row[num_blocks[number] :]) <= {blocks[number][-1]}
    assert (batch.adapters is None) is (max(adapters) < 0)
    assert starts[-1] == len(batch.token_ids)
    assert [starts[i] + n - 1 for i, n in enumerate(new)] == batch.last_tokens()
    host = batch.host
    assert batch.key_lengths.tolist() == [p + n for p, n in zip(past, new, strict=True)]
    assert (host.query_lengths, host.key_lengths) == (tuple(new), tuple(batch.key_lengths.tolist()))
    assert tuple(batch.sequence_lengths.tolist()) == host.sequence_lengths == tuple(whole)
    assert {batch.token_ids.dtype, batch.positions.dtype} == {torch.int64}
    lengths = (batch.query_starts, batch.key_lengths, batch.sequence_lengths, batch.block_table)
    assert {item.dtype for item in lengths} == {torch.int32}


@pytest.mark.parametrize("is_complete", [False, True])
def test_a_batch_goes_to_a_device_whole(is_complete: bool) -> None:
    batch = ForwardBatch.of([[5, 6], [7]], past=[3, 0], adapters=[-1, 2])
    with torch.no_grad():
        other = ForwardBatch.of([[5, 6], [7]], past=[3, 0], adapters=[-1, 2])
    moved = (batch if is_complete else other).to(META)
    assert moved.adapters is not None
    tensors = (moved.token_ids, moved.positions, moved.adapters, moved.query_starts)
    tensors += (moved.key_lengths, moved.sequence_lengths, moved.block_table)
    assert {item.device for item in tensors} == {META}
    assert moved.host == batch.host
    assert batch.to(torch.device("cpu")) is batch


def test_what_is_recorded_has_no_host() -> None:
    batch = ForwardBatch(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), None)
    with pytest.raises(RuntimeError, match="no host's view"):
        batch.last_tokens()


def test_slots_are_the_blocks_of_sequences_that_have_one() -> None:
    assert ForwardBatch.of([[1], [2]], slots=[4, 1]).host.slots == (4, 1)
    assert ForwardBatch.of([[1], [2]]).host.blocks == ((0,), (1,))
