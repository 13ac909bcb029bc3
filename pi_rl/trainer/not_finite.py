"""NaN and infinity: an update with one is refused on all processes together, and the state before it is kept."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pi_rl.policies.flow_policy import Prefix
from pi_rl.rl.buffer import Minibatch
from pi_rl.trainer.checkpoint_folders import newest_checkpoint
from pi_rl.trainer.checkpointing import CheckpointedTrainer
from pi_rl.trainer.disk import NotWritten
from pi_rl.trainer.metrics import MetricStore
from pi_rl.trainer.processes import all_succeed, first_decides

FIRST_RATIO_LIMIT, LIVE_RATIO_LIMIT = 0.05, 0.5
CAUSES = (
    "Usual causes: learning_rate too high (lower it, or max_grad_norm), noise too small for the likelihood (raise "
    "noise_level or noise_std_min), rewards or observations of the simulator that are not finite."
)


class FiniteTrainer(CheckpointedTrainer):
    """A trainer that never steps with a gradient that is not finite.

    What is wrong on one process makes the loss there NaN, hence the gradient that all processes share: all of them
    refuse the same update, before the optimiser's step, and end together.
    """

    metrics: MetricStore
    _encodes_again: bool
    _problem: Exception | None = None

    def guard(self, loss: Tensor, log_prob: Tensor, values: Tensor | None, batch: Minibatch, tick: int) -> None:
        """Refuses the update at a value that is not finite, and when sampling and scoring disagree.

        Args:
            loss: Of a micro-batch, a scalar.
            log_prob: Of its samples, scored.
            values: The critic's, if there is one.
            batch: The micro-batch.
            tick: Its number in the iteration.
        """
        if not torch.isfinite(loss):
            parts = {
                "log-probs": log_prob,
                "values": values,
                "rollout log-probs": batch.log_prob,
                "advantages": batch.advantages,
                "returns": batch.returns,
                "prefix": batch.inputs.kv if isinstance(batch.inputs, Prefix) else None,
            }
            broken = [name for name, tensor in parts.items() if tensor is not None and not tensor.isfinite().all()]
            weights = [name for name, p in self.actor_critic.named_parameters() if not p.isfinite().all()]
            named = [*broken, *(f"parameter {name}" for name in weights[:1])]
            self.refuse_update(
                FloatingPointError(
                    f"The loss is {loss.item()} in iteration {self.iteration}, tick {tick}; not finite: "
                    f"{', '.join(named) or 'only the loss itself'}. {CAUSES}"
                )
            )
        if tick == 0:
            error = (log_prob.detach() - batch.log_prob).exp().sub(1).abs().max()
            self.metrics.add({"policy/ratio_error_first": error}, 1)
            if error > self._first_ratio_limit():
                self.refuse_update(
                    RuntimeError(
                        f"The first minibatch's probability ratio is off by {error.item():.3g} before any update "
                        f"(allowed: {self._first_ratio_limit()}). Sampling and scoring disagree: check that the "
                        "policy runs in the same precision and attention implementation in both."
                    )
                )

    def _first_ratio_limit(self) -> float:
        """A reduced-precision VLM that encodes again in batches of another size rounds differently."""
        policy = self.actor_critic.policy
        reduced = self.args.bf16 or any(parameter.dtype != torch.float32 for parameter in policy.parameters())
        return LIVE_RATIO_LIMIT if self._encodes_again and reduced else FIRST_RATIO_LIMIT

    def refuse_update(self, problem: Exception) -> None:
        """Notes what is wrong with a micro-batch; the first of an update counts.

        The loss has to be passed through :meth:`poisoned`, so that every process refuses the update.
        """
        self._problem = self._problem or problem

    def poisoned(self, loss: Tensor) -> Tensor:
        """The loss; NaN, and with it every gradient, once an update was refused."""
        return loss if self._problem is None else loss * torch.nan

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self._check_gradients()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:
            self._check_gradients()  # without clipping
        return super()._get_grad_norm(model, grad_norm)

    def _check_gradients(self) -> None:
        """Raises on all processes, before gradients are clipped, which would spread a NaN over all of them."""
        named = {name: p.grad for name, p in self.actor_critic.named_parameters() if p.grad is not None}
        norm = torch.nn.utils.get_total_norm(list(named.values()))
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if torch.isfinite(norm):
            return
        bad = [name for name, gradient in named.items() if not self._finite([gradient])]
        kept = self._keep_state()
        local, self._problem = self._problem, None
        problem = local or FloatingPointError(
            f"The gradient is not finite in iteration {self.iteration}, "
            + (f"first that of {bad[0]} ({len(bad)} of {len(named)})." if bad else "its norm overflows.")
            + f" {CAUSES}"
        )

        def report() -> None:
            if local is not None:
                raise type(local)(f"{local} {kept}")

        all_succeed(report)
        raise type(problem)(f"{problem} {kept}")

    def first_not_finite(self) -> str | None:
        """Name of the first trained parameter that is not finite; the same on all processes."""
        trained = {name: p for name, p in self.actor_critic.named_parameters() if p.requires_grad}
        if self._finite(list(trained.values())):
            return None
        return next(name for name, parameter in trained.items() if not self._finite([parameter]))

    def _finite(self, tensors: list[Any]) -> bool:
        """Whether tensors, or this process's parts of sharded ones, are finite on all processes that share them."""
        local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        broken = not torch.stack([part.detach().isfinite().all() for part in local]).all()
        return not self.agree(broken)

    def check_parameters(self) -> None:
        """Refuses parameters that are not finite: they are never written to a checkpoint.

        Raises:
            FloatingPointError: Naming the first, and the newest checkpoint there is.
        """
        name = self.first_not_finite()
        if name is not None:
            raise FloatingPointError(
                f"The parameter {name} is not finite after {self.state.global_step} optimiser steps; it is not "
                f"saved. {CAUSES} {first_decides(self._newest)}"
            )

    def _newest(self) -> str:
        last = newest_checkpoint(Path(self.args.output_dir))
        return "There is no checkpoint." if last is None else f"{last} is the newest checkpoint."

    def _keep_state(self) -> str:
        """Saves the state before a refused update, unless it is saved; says where it is.

        Counters are those of the last completed iteration, weights and optimiser as the iteration's earlier updates
        have left them: a resumed run collects the rollout again.
        """
        if self._last_end is None:
            return "No iteration was complete, so there is nothing to resume."
        if self.first_not_finite() is not None:
            return first_decides(self._newest)
        self.rewind()
        try:
            kept = self.checkpoint_of_last_iteration(delete_old=False)
        except NotWritten as error:
            return f"The state before it could not be kept: {error}"
        return f"The update was not made; {kept} holds the state before it, to be resumed with other settings."

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the policy folder, if its parameters are finite; all processes call it, the first writes.

        Args:
            output_dir: The folder; the run's by default.
            _internal_call: Of ``Trainer.save_model``.

        Raises:
            FloatingPointError: If a parameter is not finite.
            NotWritten: If the disk refuses.
        """
        self.check_parameters()
        super().save_model(output_dir, _internal_call)
