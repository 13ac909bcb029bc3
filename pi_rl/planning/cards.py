"""The table of docs/memory.md: what fits on which cards."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pi_rl.planning.memory import GB, Machine
from pi_rl.planning.plan import Plan, Question, make_plan

_COMMON = ("--bf16", "--gradient_checkpointing")
_LORA = ("--lora_rank=32",)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        model: "pi0" or "pi05".
        trained: What is trained, for the reader.
        gpus: Number of cards.
        card_gb: Memory of each.
        rows: Samples of a micro-batch; minibatches of 32 a GPU by accumulation.
        extra: Further options of the run.
    """

    model: str
    trained: str
    gpus: int
    card_gb: int
    rows: int
    extra: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """The run's options: 16 environments and a minibatch of 32 for each GPU."""
        return [
            f"--config=recipes/configs/libero/{self.model}_long_flow_sde.yaml",
            *_COMMON,
            f"--num_envs={16 * self.gpus}",
            f"--per_device_train_batch_size={self.rows}",
            f"--global_batch_size={32 * self.gpus}",
            *self.extra,
        ]

    @property
    def command(self) -> str:
        """What a user types for it."""
        machine = [f"--num_gpus={self.gpus}"] if self.gpus > 1 else []
        return shlex.join(["pi-rl", "plan", *self.words, *machine, f"--device_memory_gb={self.card_gb}"])

    def plan(self) -> Plan:
        """The plan of this row."""
        machine = Machine(self.card_gb * GB, host_memory=128 * GB, disk=0.0, processes=self.gpus)
        return make_plan(self.words, Question("ppo", machine))


ROWS = tuple(
    Row(model, *settings)
    for model in ("pi0", "pi05")
    for settings in (
        ("expert", 1, 24, 8),
        ("expert", 1, 80, 32),
        ("expert + LoRA of the VLM", 1, 80, 8, _LORA),
        ("expert, data parallel", 8, 80, 32),
        ("everything, FSDP", 8, 80, 4, ("--train_vlm",)),
    )
)
"""The lines of the table, in its order."""

_HEAD = (
    "model", "trained", "GPUs", "rows", "weights", "gradients", "optimiser", "other", "rollout", "update", "save",
    "needed", "prefixes (auto)", "TFLOP rollout + update",
)  # fmt: skip


def table(rows: Sequence[Row] = ROWS) -> str:
    """The Markdown table of some rows."""
    lines = [_line(_HEAD), _line(["---"] * len(_HEAD))]
    return "\n".join([*lines, *(_line(_cells(row, row.plan())) for row in rows)])


def _cells(row: Row, plan: Plan) -> Iterator[str]:
    memory, device = plan.memory, plan.memory.device
    flops = plan.flops
    rollout = sum(value for name, value in flops.items() if name.startswith("rollout"))
    yield {"pi0": "π0", "pi05": "π0.5"}[row.model]
    yield row.trained
    yield f"{row.gpus} × {row.card_gb} GB"
    yield str(row.rows)
    held = (sum(device.weights.values()), device.gradients, device.optimizer)
    other = device.chains + device.buckets + device.gathered + device.store
    for nbytes in (*held, other, device.peaks["rollout"], device.peaks["update"], device.peaks["save"]):
        yield f"{nbytes / GB:.1f}"
    yield f"{device.reserved / GB:.1f}{'' if memory.fits else ' (too much)'}"
    yield f"{memory.automatic}, {memory.store_bytes / GB:.1f}"
    yield f"{rollout / 1e12:,.0f} + {(sum(flops.values()) - rollout) / 1e12:,.0f}"


def _line(cells: Sequence[str] | Iterator[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(table())
