"""The state of a run is whole or not there."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from softsphere_lab.errors import LabError
from softsphere_lab.records.checkpoint import Checkpoint, CheckpointOfRank


def test_a_spoiled_state_is_named_and_what_would_do(tmp_path):
    file = tmp_path / "run.pt"
    file.write_bytes(b"half a file")
    with pytest.raises(LabError, match=r"run\.pt cannot be read .* delete it"):
        Checkpoint(file).load()


@pytest.mark.parametrize("wanted", [True, False])
def test_a_state_in_which_one_number_is_another_is_not_taken(tmp_path, wanted):
    """Also where PyTorch was told to write no checksums."""
    file, weights = tmp_path / "run.pt", torch.linspace(1, 2, 1000)
    torch.serialization.set_crc32_options(wanted)
    try:
        Checkpoint(file).save({"weights": weights})
    finally:
        torch.serialization.set_crc32_options(True)
    content = bytearray(file.read_bytes())
    at = content.index(weights.numpy().tobytes()[:64])
    content[at + 100] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(LabError, match=r"run\.pt cannot be read .* delete it"):
        Checkpoint(file).load()


def test_states_of_several_runs_come_and_go_without_minding_each_other(tmp_path):
    states = [Checkpoint(tmp_path / "unfinished" / f"{i}.pt") for i in range(2)]

    def come_and_go(state: Checkpoint) -> None:
        for epoch in range(200):
            state.save({"epoch": epoch})
            assert state.load()["epoch"] == epoch
            state.remove()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(come_and_go, states))


def test_of_several_processes_the_first_one_alone_keeps_a_state(tmp_path):
    (tmp_path / "unfinished").mkdir()
    file = tmp_path / "unfinished" / "run.pt"
    first, other = (CheckpointOfRank(file, rank) for rank in range(2))
    other.save({"step": 3})
    assert not file.exists()
    first.save({"step": 3})
    drawn = torch.rand(())
    for each in (first, other):
        state = each.load()
        assert state is not None and state["step"] == 3
        assert torch.equal(torch.rand(()), drawn)


def test_a_run_goes_on_with_fewer_gpus_than_where_it_was_saved(tmp_path, monkeypatch):
    states, cuda = [torch.ones(16, dtype=torch.uint8) * i for i in range(3)], torch.cuda
    monkeypatch.setattr(cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(cuda, "get_rng_state_all", lambda: states)
    Checkpoint(tmp_path / "of-three.pt").save({"epoch": 1})
    found = []
    monkeypatch.setattr(cuda, "device_count", lambda: 1)
    monkeypatch.setattr(cuda, "set_rng_state_all", found.extend)
    assert Checkpoint(tmp_path / "of-three.pt").load()["epoch"] == 1
    assert len(found) == 1 and torch.equal(found[0], states[0])
