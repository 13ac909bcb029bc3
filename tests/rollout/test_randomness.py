"""Random numbers belong to (seed, stream, episode, chunk) and to nothing else."""

import numpy as np
import torch

from pi_rl.envs.registry import check_name_and_options
from pi_rl.envs.vector_env import EVAL_STATES, TRAIN_STATE_OFFSET
from pi_rl.rollout.evaluator import evaluation_ids
from pi_rl.rollout.randomness import chunk_noise, training_state_ids


def spec_of(tasks):
    return check_name_and_options(f"metaworld:{','.join(('reach-v3', 'push-v3', 'door-open-v3')[:tasks])}", {})


def draw(ids, chunks, key=(7, 0, 3)):
    return chunk_noise(key, np.array(ids), np.array(chunks), denoising_steps=4, chunk_shape=(5, 4))


def test_a_row_does_not_depend_on_its_batch():
    together = draw([[0, 5], [1, 9], [0, 6]], [2, 0, 1])
    alone = draw([[1, 9]], [0])
    assert torch.equal(together.x_init[1:2], alone.x_init)
    assert torch.equal(together.eps[1:2], alone.eps)
    assert torch.equal(together.uniform[1:2], alone.uniform)


def test_every_part_of_the_key_matters():
    reference = draw([[0, 5]], [2]).x_init
    for other in (draw([[1, 5]], [2]), draw([[0, 4]], [2]), draw([[0, 5]], [3]), draw([[0, 5]], [2], key=(7, 0, 4))):
        assert not torch.equal(reference, other.x_init)


def test_the_noise_is_standard_normal():
    noise = draw([[0, state] for state in range(400)], [0] * 400)
    numbers = torch.cat([noise.x_init.flatten(), noise.eps.flatten()])
    assert abs(numbers.mean()) < 4 / len(numbers) ** 0.5
    assert abs(numbers.std() - 1) < 4 / (2 * len(numbers)) ** 0.5
    assert 0.4 < noise.uniform.mean() < 0.6


def test_training_never_resets_to_an_evaluation_state():
    states = training_state_ids(0, 3, np.arange(64), np.zeros(64, int))
    assert len(set(states.tolist())) == 64
    assert states.min() >= TRAIN_STATE_OFFSET
    assert evaluation_ids(spec_of(2), 200)[:, 1].max() < EVAL_STATES <= TRAIN_STATE_OFFSET


def test_evaluation_states_are_shared_equally_by_tasks():
    ids = evaluation_ids(spec_of(3), 12)
    assert sorted(map(tuple, ids.tolist())) == [(task, state) for task in range(3) for state in range(4)]
