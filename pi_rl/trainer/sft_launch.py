"""Several launched processes: the first prepares what all of them need, the others wait for it."""

import os
import time
from collections.abc import Callable
from typing import Any

from pi_rl.trainer.sft import launched_rank

_OUTCOME, _SEEN = "pi_rl_sft_outcome", "pi_rl_sft_seen"
_POLL_S = 0.5


def first_prepares(prepare: Callable[[], None]) -> None:
    """Runs ``prepare`` in the launcher's first process; the others wait for its end, however long it takes.

    They speak through the launcher's key-value store. No other launch has it, so that nothing an earlier run left
    behind is mistaken for an answer, and it is gone when its host is: nobody waits for a process that died.

    Args:
        prepare: Writes and downloads what every process needs. It runs before any process group is joined, whose
            time limits a long download would exceed.

    Raises:
        RuntimeError: In the other processes, if the first one failed or is gone.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        prepare()
        return
    store = _launcher_store()
    if launched_rank() == 0:
        try:
            prepare()
        except BaseException as error:
            store.set(_OUTCOME, f"{type(error).__name__}: {error}")
            raise
        store.set(_OUTCOME, "")
        while store.add(_SEEN, 0) < processes - 1:  # without a launcher's own, the store lives in this process
            time.sleep(_POLL_S)
        return
    try:
        while not store.check([_OUTCOME]):
            time.sleep(_POLL_S)
        failure = store.get(_OUTCOME).decode()
        store.add(_SEEN, 1)
    except RuntimeError as error:
        raise RuntimeError("The first process ended before model and data were ready; see its message.") from error
    if failure:
        raise RuntimeError(f"The first process could not prepare model and data: {failure}")


def _launcher_store() -> Any:
    """The store that the launched processes find each other with."""
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(iter(rendezvous("env://")))
    return store
