"""Plans of π0 and π0.5 at their real size, without weights."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pi_rl.planning.cards import ROWS, table
from pi_rl.planning.memory import GB, Machine
from pi_rl.planning.model import estimated_tokens, type_of_name
from pi_rl.planning.plan import Question, make_plan

ROOT = Path(__file__).parents[2]
LAYERS, WIDTH, EXPERT_WIDTH, MLP, EXPERT_MLP, HEADS, HEAD = 18, 2048, 1024, 16384, 4096, 8, 256
IMAGE_TOKENS = 256
SIGLIP_GFLOP = 220  # an image, from the counts that this project began with


@pytest.fixture(scope="module")
def plan():
    """π0 on LIBERO, two cameras, H=50, expert trained, one 24 GB card."""
    words = [
        f"--config={ROOT}/recipes/configs/libero/pi0_long_flow_sde.yaml",
        "--bf16",
        "--gradient_checkpointing",
        "--num_envs=16",
        "--per_device_train_batch_size=8",
        "--global_batch_size=32",
    ]
    return make_plan(words, Question("ppo", Machine(24 * GB, 128 * GB, 0.0), language_tokens=48))


@pytest.mark.slow
def test_parameters_are_those_of_the_published_models(plan):
    parameters = {name: part.parameters for name, part in plan.phases.weights.items()}
    attention = 2 * WIDTH * HEADS * HEAD + 2 * WIDTH * HEAD  # q and o, k and v with one head
    assert parameters["language model"] == LAYERS * (attention + 3 * WIDTH * MLP + 2 * WIDTH) + WIDTH
    assert parameters["language embedding"] == 257_152 * WIDTH
    expert = LAYERS * (2 * EXPERT_WIDTH * HEADS * HEAD + 2 * EXPERT_WIDTH * HEAD + 3 * EXPERT_WIDTH * EXPERT_MLP)
    assert parameters["action expert"] == pytest.approx(expert, rel=0.02)  # norms and projections beside it
    assert plan.phases.parked == 4 * 257_152 * (EXPERT_WIDTH + WIDTH)  # the two unused heads, as they were saved


@pytest.mark.slow
def test_a_prefix_token_takes_18_kilobytes(plan):
    tokens = 2 * IMAGE_TOKENS + 48
    kv = LAYERS * 2 * HEAD * 2 * tokens
    assert kv / tokens == 18_432
    state = 32 * 4
    assert plan.phases.prefix_row == kv + tokens + state  # no pooled output for V_expert


@pytest.mark.slow
def test_flops_agree_with_the_counts_of_the_architecture(plan):
    counted, tokens = plan.phases, 2 * IMAGE_TOKENS + 48
    layer = 2 * tokens * (2 * WIDTH * HEADS * HEAD + 2 * WIDTH * HEAD + 3 * WIDTH * MLP) + 4 * tokens**2 * HEADS * HEAD
    keys = 2 * tokens * 2 * WIDTH * HEAD  # all that is computed of the last layer
    encode = 2 * SIGLIP_GFLOP * 1e9 + (LAYERS - 1) * layer + keys
    assert counted.encode.flops / 16 == pytest.approx(encode, rel=0.02)
    suffix = 51
    expert = 2 * suffix * (2 * EXPERT_WIDTH * HEADS * HEAD + 2 * EXPERT_WIDTH * HEAD + 3 * EXPERT_WIDTH * EXPERT_MLP)
    expert += 4 * suffix * (tokens + suffix) * HEADS * HEAD
    assert counted.forward.flops / 8 == pytest.approx(LAYERS * expert, rel=0.02)
    assert counted.act.flops / 16 == pytest.approx(4 * LAYERS * expert, rel=0.02)
    true_backward = counted.backward.flops - counted.backward.recomputed
    # a repeated layer stops at the last tensor that its backward pass needs
    assert 0.7 < counted.backward.recomputed / counted.forward.flops <= 1
    assert true_backward == pytest.approx(2 * counted.forward.flops, rel=0.1)


@pytest.mark.slow
def test_training_the_expert_fits_a_card_of_24_gigabytes(plan):
    assert plan.memory.fits
    assert plan.memory.device.reserved < 22 * GB


def test_model_types_are_read_off_names():
    names = {"lerobot/pi0_base": "pi0", "outputs/sft/pi05_libero_40": "pi05", "RLinf/Pi0.5-SFT": "pi05", "x/π0": "pi0"}
    assert {name: type_of_name(name) for name in names} == names
    with pytest.raises(ValueError, match="--model_type pi0"):
        type_of_name("someone/smolvla")


def test_estimated_prompts():
    assert estimated_tokens("pi0", ("open_the drawer", "close"), 0) == 4 + 2
    assert estimated_tokens("pi05", ("open the drawer",), 8) == 4 + 9 + 32


@pytest.mark.slow
def test_the_table_in_the_documents_is_what_the_code_plans():
    document = (ROOT / "docs/memory.md").read_text()
    written = re.search(r"\| model \|.*?(?=\n\n)", document, re.DOTALL)
    assert written
    assert written[0] == table()
    assert all(row.command in document for row in ROWS)


@pytest.mark.slow
def test_memory_of_a_real_run_is_within_15_percent():
    command = [sys.executable, str(ROOT / "scripts/benchmark_plan.py")]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    for name in ("weights", "optimiser", "forward: peak", "backward: peak", "step: peak", "peak"):
        assert 0.85 < result[name]["ratio"] < 1.15, (name, result[name])
