"""Two processes with half of each parameter: the loss of one, and a save that has everything."""

import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

import hanok
from hanok.attention.base import ForwardBatch

TOKENS = [[5, 9, 200, 31], [7, 8, 11]]


def loss_of(model: hanok.Model) -> torch.Tensor:
    scores = model.decoder.logits(model.decoder(ForwardBatch.of(TOKENS)))
    return -scores.log_softmax(-1)[:, 7].mean()


def train(rank: int, port: int, folder: str) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = hanok.load(hanok.BUNDLED, dtype="float32", weights="copied", attn_implementation="sdpa")
    for block in model.decoder.layers:
        fully_shard(block)
    fully_shard(model.decoder)
    for parameter in model.decoder.parameters():
        parameter.requires_grad_()
    optimizer = torch.optim.SGD(model.decoder.parameters(), lr=0.1)
    loss_of(model).backward()
    optimizer.step()
    model.save(folder)
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="gloo over loopback")
def test_what_two_processes_save_is_what_one_would(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(train, (port, str(tmp_path / "sharded")), nprocs=2)
    model = hanok.load(hanok.BUNDLED, dtype="float32", weights="copied", attn_implementation="sdpa")
    for parameter in model.decoder.parameters():
        parameter.requires_grad_()
    optimizer = torch.optim.SGD(model.decoder.parameters(), lr=0.1)
    loss_of(model).backward()
    optimizer.step()
    model.save(tmp_path / "whole")
    found, expected = (
        load_file(tmp_path / name / "model.safetensors") for name in ("sharded", "whole")
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)
    assert hanok.load(tmp_path / "sharded").generate([5, 9], max_new_tokens=3).token_ids
