"""Attention of one new token of each sequence on a GPU, in Triton. Importing this file imports triton.

Keys and values are blocks of (kv_heads, block size, head_dim). A sequence's keys are cut into parts of
SPLIT_KEYS, which different programs read; each program serves all heads that share a KV head, so that
keys are read once. A second kernel merges the parts in order. How a sequence is cut depends on its
length alone: its result is the same bit for bit in any batch, and however much the cache could hold.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLIT_KEYS = 256
TILE_BYTES = 2**14  # of keys that a program reads at once, and as many of values


@triton.jit
def _append(
    k,
    v,
    k_stride,
    v_stride,
    keys,
    values,
    block_stride,
    head_stride,
    key_lengths,
    block_table,
    table_stride,
    block_size,
    HEAD_DIM: tl.constexpr,
    TILE_DIM: tl.constexpr,
):
    """Write one KV head of one sequence's new token to the cache."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    dim = tl.arange(0, TILE_DIM)
    mask = dim < HEAD_DIM
    key = tl.load(key_lengths + sequence).to(tl.int32) - 1
    block = tl.load(block_table + sequence * table_stride + key // block_size).to(tl.int64)
    place = block * block_stride + head * head_stride + (key % block_size) * HEAD_DIM + dim
    new_k = tl.load(k + sequence * k_stride + head * HEAD_DIM + dim, mask=mask)
    new_v = tl.load(v + sequence * v_stride + head * HEAD_DIM + dim, mask=mask)
    tl.store(keys + place, new_k, mask=mask)
    tl.store(values + place, new_v, mask=mask)


@triton.jit
def _part(
    q,
    q_stride,
    keys,
    values,
    block_stride,
    head_stride,
    key_lengths,
    block_table,
    table_stride,
    block_size,
    scale,
    softcap,
    window,
    sums,
    largest,
    weights,
    splits,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    TILE_GROUP: tl.constexpr,
    TILE_DIM: tl.constexpr,
):
    """Online softmax over one part of the keys: weighted sum, largest score, sum of weights."""
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(key_lengths + sequence).to(tl.int32)
    first = tl.maximum(split * SPLIT, length - window)
    last = tl.minimum(split * SPLIT + SPLIT, length)
    if first < last:
        member, dim = tl.arange(0, TILE_GROUP), tl.arange(0, TILE_DIM)
        head = kv_head * GROUP + member
        head_mask, dim_mask = member < GROUP, dim < HEAD_DIM
        mask = head_mask[:, None] & dim_mask[None, :]
        place = sequence * q_stride + head[:, None] * HEAD_DIM + dim[None, :]
        query = tl.load(q + place, mask=mask, other=0.0)
        top = tl.full((TILE_GROUP,), float("-inf"), tl.float32)
        weight_sum = tl.zeros((TILE_GROUP,), tl.float32)
        total = tl.zeros((TILE_GROUP, TILE_DIM), tl.float32)
        for start in range(first, last, TILE):
            key = start + tl.arange(0, TILE)
            key_mask = key < last
            table_place = block_table + sequence * table_stride + key // block_size
            block = tl.load(table_place, mask=key_mask, other=0).to(tl.int64)
            row = block * block_stride + kv_head * head_stride + (key % block_size) * HEAD_DIM
            tile_mask = key_mask[:, None] & dim_mask[None, :]
            tile = tl.load(keys + row[:, None] + dim[None, :], mask=tile_mask, other=0.0)
            score = tl.dot(query, tl.trans(tile), input_precision=PRECISION) * scale
            if HAS_SOFTCAP:
                score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)
            score = tl.where(key_mask[None, :], score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 1))
            shrink = tl.exp(top - new_top)
            weight = tl.exp(score - new_top[:, None])
            weight_sum = weight_sum * shrink + tl.sum(weight, 1)
            tile = tl.load(values + row[:, None] + dim[None, :], mask=tile_mask, other=0.0)
            total = total * shrink[:, None]
            total = tl.dot(weight.to(tile.dtype), tile, total, input_precision=PRECISION)
            top = new_top
        part = (sequence * tl.num_programs(1) * GROUP + head).to(tl.int64) * splits + split
        tl.store(sums + part[:, None] * HEAD_DIM + dim[None, :], total, mask=mask)
        tl.store(largest + part, top, mask=head_mask)
        tl.store(weights + part, weight_sum, mask=head_mask)


@triton.jit
def _merge(
    sums,
    largest,
    weights,
    key_lengths,
    window,
    output,
    splits,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE_DIM: tl.constexpr,
):
    """Merge the parts of one head of one sequence, the first one first."""
    sequence = tl.program_id(0)
    row = (sequence * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    length = tl.load(key_lengths + sequence).to(tl.int32)
    first = tl.maximum(0, length - window) // SPLIT
    last = (length + SPLIT - 1) // SPLIT
    dim = tl.arange(0, TILE_DIM)
    mask = dim < HEAD_DIM
    top = tl.load(largest + row * splits + first)
    weight_sum = tl.load(weights + row * splits + first)
    total = tl.load(sums + (row * splits + first) * HEAD_DIM + dim, mask=mask, other=0.0)
    for split in range(first + 1, last):
        part = row * splits + split
        part_top = tl.load(largest + part)
        new_top = tl.maximum(top, part_top)
        shrink, factor = tl.exp(top - new_top), tl.exp(part_top - new_top)
        weight_sum = weight_sum * shrink + tl.load(weights + part) * factor
        part_sum = tl.load(sums + part * HEAD_DIM + dim, mask=mask, other=0.0)
        total = total * shrink + part_sum * factor
        top = new_top
    result = (total / weight_sum).to(output.dtype.element_ty)
    tl.store(output + row * HEAD_DIM + dim, result, mask=mask)


def append(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, key_lengths: Tensor, block_table: Tensor
) -> None:
    """Write each sequence's new key and value as the last of its `key_lengths`.

    k, v: (sequences, kv_heads, head_dim)   keys, values: (blocks, kv_heads, block size, head_dim)
    key_lengths: (sequences,)   block_table: (sequences, blocks of each), both int32 or int64
    """
    sequences, kv_heads, head_dim = k.shape
    with torch.cuda.device_of(k):
        _append[(sequences, kv_heads)](
            k,
            v,
            k.stride(0),
            v.stride(0),
            keys,
            values,
            keys.stride(0),
            keys.stride(1),
            key_lengths,
            block_table,
            block_table.stride(0),
            keys.shape[2],
            HEAD_DIM=head_dim,
            TILE_DIM=triton.next_power_of_2(head_dim),
            num_warps=1,
            enable_fp_fusion=True,
        )


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    key_lengths: Tensor,
    block_table: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attend with one query for each sequence, (sequences, heads, head_dim), over all its keys.

    keys, values: (blocks, kv_heads, block size, head_dim), contiguous; the rest as for `append`. A
    sequence has at least one key and at most as many as its blocks hold.
    """
    sequences, heads, head_dim = q.shape
    kv_heads, block_size = keys.shape[1], keys.shape[2]
    group, capacity = heads // kv_heads, block_table.shape[1] * block_size
    splits = triton.cdiv(capacity, SPLIT_KEYS)
    sums, largest, weights = (
        torch.empty(sequences, heads, splits, *last, dtype=torch.float32, device=q.device)
        for last in ((head_dim,), (), ())
    )
    output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tile_dim = max(16, triton.next_power_of_2(head_dim))
    with torch.cuda.device_of(q):
        _part[(sequences, kv_heads, splits)](
            q,
            q.stride(0),
            keys,
            values,
            keys.stride(0),
            keys.stride(1),
            key_lengths,
            block_table,
            block_table.stride(0),
            block_size,
            scale,
            softcap if softcap is not None else 1.0,
            window if window is not None else capacity,
            sums,
            largest,
            weights,
            splits,
            GROUP=group,
            HEAD_DIM=head_dim,
            HAS_SOFTCAP=softcap is not None,
            PRECISION="ieee" if q.dtype is torch.float32 else "tf32",
            SPLIT=SPLIT_KEYS,
            TILE=max(16, min(64, TILE_BYTES // (tile_dim * q.element_size()))),
            TILE_GROUP=max(16, triton.next_power_of_2(group)),
            TILE_DIM=tile_dim,
            num_warps=4,
            enable_fp_fusion=True,
            num_stages=2,
        )
        _merge[(sequences, heads)](
            sums,
            largest,
            weights,
            key_lengths,
            window if window is not None else capacity,
            output,
            splits,
            HEAD_DIM=head_dim,
            SPLIT=SPLIT_KEYS,
            TILE_DIM=tile_dim,
            num_warps=2,
            enable_fp_fusion=True,
        )
    return output
