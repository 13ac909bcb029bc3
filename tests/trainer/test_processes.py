"""Two gloo processes that tell each other what they decide, what fails and what files hold."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pi_rl.trainer.processes import all_succeed, first_decides, process_count, reachable

CPU = torch.device("cpu")


def fail(message):
    raise ValueError(message)


def message_of(call):
    with pytest.raises(ValueError, match=".") as caught:
        call()
    return str(caught.value)


def exchange(rank, store, folder):
    """What each process asserts; every assertion fails in the process that runs it and so ends the test."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    assert process_count() == 2
    assert first_decides(lambda: f"process {rank}") == "process 0"
    assert message_of(lambda: first_decides(lambda: fail(f"of {rank}"))) == "of 0"
    assert all_succeed(lambda: rank) == rank
    reported = message_of(lambda: all_succeed(lambda: rank if rank == 0 else fail("no disk")))
    assert "no disk" in reported
    assert reported == "no disk" or reported.startswith("Process 1 on ")

    own = Path(folder) / f"computer{rank}"
    os.chdir(own)
    content = (Path(folder) / "computer0" / "run" / "sub" / "weights.bin").read_bytes()
    with reachable("run", CPU) as found:  # the second process has other bytes under that path
        assert (found == Path("run")) == (rank == 0)
        assert (found / "sub" / "weights.bin").read_bytes() == content
        assert (found / "empty").read_bytes() == b""
    assert found.exists() == (rank == 0)
    with reachable(Path(folder) / "computer0" / "run", CPU) as found:  # a path that both can read
        assert found == Path(folder) / "computer0" / "run"
    assert "does not exist" in message_of(lambda: reachable("nowhere", CPU).__enter__())
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    for rank in range(2):
        folder = tmp_path / f"computer{rank}" / "run"
        (folder / "sub").mkdir(parents=True)
        (folder / "empty").touch()
        generator = torch.Generator().manual_seed(rank)
        weights = torch.randint(
            256, (33 * 2**20 + 5,), dtype=torch.uint8, generator=generator
        )  # travels in two pieces
        (folder / "sub" / "weights.bin").write_bytes(weights.numpy().tobytes())
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path / "store"), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(outputs)


def test_one_process_decides_and_reads_for_itself(tmp_path):
    assert process_count() == 1
    assert first_decides(lambda: 3) == all_succeed(lambda: 3) == 3
    with reachable(tmp_path, CPU) as folder:
        assert folder == tmp_path


if __name__ == "__main__":
    exchange(int(sys.argv[1]), *sys.argv[2:])
