"""The first of several processes prepares, the others wait: in threads, each with a client of one store."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from pi_rl.trainer import sft_launch
from pi_rl.trainer.sft_launch import first_prepares


@pytest.fixture
def launch(monkeypatch):
    """Runs ``first_prepares`` in so many threads, ranks in the order given, and returns their futures."""
    monkeypatch.setattr(sft_launch, "_POLL_S", 0.01)
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    local = threading.local()
    monkeypatch.setattr(
        sft_launch,
        "_launcher_store",
        lambda: TCPStore("localhost", server.port, is_master=False, wait_for_workers=False),
    )
    monkeypatch.setattr(sft_launch, "launched_rank", lambda: local.rank)

    def run(prepare, *ranks, then=lambda: None):
        monkeypatch.setenv("WORLD_SIZE", str(len(ranks)))

        def one(rank):
            local.rank = rank
            first_prepares(prepare)
            then()

        with ThreadPoolExecutor(len(ranks)) as pool:
            futures = {rank: pool.submit(one, rank) for rank in ranks}
        return [futures[rank] for rank in sorted(ranks)]

    return run


def test_the_others_wait_for_the_end_of_the_preparation(launch):
    events = []

    def prepare():
        time.sleep(0.2)
        events.append("ready")

    for future in launch(prepare, 2, 1, 0, then=lambda: events.append("goes on")):
        future.result()
    assert events == ["ready", *["goes on"] * 3]


def test_a_failure_of_the_first_ends_all(launch):
    def prepare():
        raise ValueError("no such dataset")

    first, second = launch(prepare, 1, 0)
    with pytest.raises(ValueError, match="no such dataset"):
        first.result()
    with pytest.raises(RuntimeError, match="could not prepare model and data: ValueError: no such dataset"):
        second.result()


def test_a_first_process_that_died_is_noticed(monkeypatch):
    monkeypatch.setattr(sft_launch, "_POLL_S", 0.01)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    client = TCPStore("localhost", server.port, is_master=False, wait_for_workers=False)
    monkeypatch.setattr(sft_launch, "_launcher_store", lambda: client)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(first_prepares, lambda: None)
        time.sleep(0.1)
        assert not waiting.done()
        del server
        with pytest.raises(RuntimeError, match="The first process ended before model and data were ready"):
            waiting.result(timeout=30)


def test_one_process_needs_no_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    done = []
    first_prepares(lambda: done.append(1))
    assert done == [1]
