"""The counting against closed forms, PyTorch's own FLOP counter, and the same phases on real tensors."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pi_rl.flow.chain import Chain
from pi_rl.planning.counting import Meter, gpu_attention, planning, without_content
from pi_rl.planning.model import build_planned, find_policy, observations
from pi_rl.planning.phases import Count, count_phases, part_of, run_phases
from pi_rl.planning.plan import ALGORITHMS, run_options

FLOAT = 4


def small_run(*extra, algorithm="ppo", device="meta"):
    words = [
        "--env=metaworld:handle-press-v3",
        "--num_envs=6",
        "--rollout_chunks=2",
        "--per_device_train_batch_size=4",
        "--noise=flow_sde",
        *extra,
    ]
    config_class, trainer = ALGORITHMS[algorithm]
    recipe, args, spec = run_options(words, config_class)
    planned = find_policy(recipe, args, spec)
    return build_planned(planned, args, trainer, recipe.peft_config(), gpu=False, device=device), args, spec


def test_bytes_alive_follow_the_life_of_tensors():
    with planning(gpu=False), Meter("cpu") as meter:
        with meter.phase() as count:
            first = torch.zeros(100)
            second = first.view(10, 10) + 1  # a view is no memory, the sum is
            with meter.phase() as inner:
                _ = torch.zeros(1000)
            del first
        assert (inner.before, inner.peak) == (200 * FLOAT, 1200 * FLOAT)
        assert (count.before, count.peak) == (0, 1200 * FLOAT)
        assert meter.live == 1100 * FLOAT
        del second, _
        assert meter.live == 0


def test_the_peak_names_what_is_alive():
    model = nn.Sequential(nn.Linear(8, 1000), nn.Linear(1000, 8))
    with planning(gpu=False) as mode, Meter("cpu", model) as meter:
        without_content(model, mode)
        with torch.no_grad(), meter.phase() as count:
            model(torch.zeros(16, 8))
    largest = count.largest[0]
    assert (largest.label, largest.nbytes) == ("0 addmm", 16 * 1000 * FLOAT)
    assert count.temporary == 16 * (8 + 1000 + 8) * FLOAT


def test_allocations_are_rounded_up_to_the_unit():
    with planning(gpu=False), Meter("cpu", unit=512) as meter:
        kept = [torch.zeros(1), torch.zeros(129)]
        assert meter.live == 512 + 1024
        del kept


def test_flops_of_a_linear_layer_forward_and_backward():
    layer, rows = nn.Linear(32, 16, bias=False), 5
    with planning(gpu=False) as mode, Meter("cpu", layer) as meter:
        without_content(layer, mode)
        with meter.phase() as forward:
            output = layer(torch.zeros(rows, 32))
        with meter.phase() as backward, meter.backward():
            output.sum().backward()
    assert forward.flops == 2 * rows * 32 * 16
    assert (backward.flops, backward.recomputed) == (2 * rows * 32 * 16, 0)  # the input needs no gradient


def test_unknown_content_answers_as_valid_inputs_do():
    with planning(gpu=False), Meter("cpu"):
        mask = torch.ones(4, dtype=torch.bool)
        assert mask.all()
        assert not mask.any()
        assert torch.equal(mask, ~mask)
        assert int(torch.arange(3).max()) == 0


def test_a_tensor_under_two_names_stays_one():
    model = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
    model["two"].weight = model["one"].weight
    with planning(gpu=False) as mode:
        without_content(model, mode)
        meter = Meter("cpu")
        assert model["one"].weight is model["two"].weight
        assert meter.register(dict(model.named_parameters())) == (16 + 4 + 4) * FLOAT


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_a_gpu_keeps_no_matrix_of_attention_weights(kv_heads):
    samples, heads, tokens, size = 2, 4, 256, 16
    with planning(gpu=True), Meter("cpu") as meter:
        query = torch.zeros(samples, heads, tokens, size, requires_grad=True)
        key, value = torch.zeros(2, samples, kv_heads, tokens, size).unbind(0)
        with meter.phase() as count:
            kept = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=kv_heads < heads)
        matrix = samples * heads * tokens * tokens * FLOAT
        assert (count.after - count.before < matrix / 4) == (kv_heads == heads)
        assert kept.shape == query.shape


def test_gpu_attention_puts_pytorchs_own_back():
    original = torch.nn.functional.scaled_dot_product_attention
    with gpu_attention():
        assert torch.nn.functional.scaled_dot_product_attention is not original
    assert torch.nn.functional.scaled_dot_product_attention is original


@pytest.mark.parametrize(
    ("extra", "algorithm"),
    [
        ((), "ppo"),
        (("--critic=expert", "--small_model=pi05", "--noise=flow_noise", "--gradient_checkpointing"), "ppo"),
        (("--lora_rank=4",), "ppo"),
        pytest.param(("--lora_rank=4", "--gradient_checkpointing"), "ppo", marks=pytest.mark.slow),
        pytest.param(("--mdp=two_layer", "--critic=expert"), "ppo", marks=pytest.mark.slow),
        (("--group_size=2", "--no_auto_reset"), "grpo"),
    ],
)
def test_a_plan_counts_what_real_tensors_need(extra, algorithm):
    """Every phase of every variant: the same bytes at the peak, before and after, and the same FLOPs."""
    model, args, spec = small_run(*extra, algorithm=algorithm)
    planned = count_phases(model, args, spec, gpu=False)
    model, args, spec = small_run(*extra, algorithm=algorithm, device="cpu")
    with Meter("cpu", model) as meter:
        real = run_phases(model, args, spec, meter)
    for entry in dataclasses.fields(planned):
        ours, theirs = getattr(planned, entry.name), getattr(real, entry.name)
        if isinstance(ours, Count):
            assert (ours.flops, ours.recomputed) == (theirs.flops, theirs.recomputed), entry.name
            sizes = [(count.before, count.temporary, count.after) for count in (ours, theirs)]
            assert sizes[0] == pytest.approx(sizes[1], rel=0.01, abs=4096), entry.name
        else:
            assert ours == theirs, entry.name
    assert planned.forward.flops > 0
    assert planned.backward.flops > 0
    assert (planned.backward.recomputed > 0) == ("--gradient_checkpointing" in extra)


def test_flops_equal_pytorchs_counter_on_real_tensors():
    model, args, spec = small_run()
    planned = count_phases(model, args, spec, gpu=False)
    model, args, spec = small_run(device="cpu")
    rows, policy = args.per_device_train_batch_size, model.policy
    with torch.no_grad(), FlopCounterMode(display=False) as encode:
        prefix = model("encode", batch=observations(model, spec, args.num_envs))
    chain = Chain(
        torch.zeros(rows, args.denoising_steps + 1, policy.chunk_size, policy.max_action_dim),
        torch.zeros(rows, dtype=torch.int64),
    )
    with FlopCounterMode(display=False) as forward:
        score, _ = model("score", inputs=prefix.index(torch.zeros(rows, dtype=torch.int64)), chain=chain)
    with FlopCounterMode(display=False) as backward:
        score.log_prob.sum().backward()
    assert planned.encode.flops == encode.get_total_flops()
    head = sum(2 * rows * layer.weight.numel() for layer in model.value_head.layers if isinstance(layer, nn.Linear))
    first = 2 * rows * model.value_head.layers[0].weight.numel()
    assert planned.forward.flops == forward.get_total_flops() + head
    assert planned.backward.flops == backward.get_total_flops() + 2 * head - first  # features need no gradient


def test_closed_forms_of_a_small_run():
    model, args, spec = small_run()
    policy = model.policy
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    sizes = policy.policy.config
    planned = count_phases(model, args, spec, gpu=False)
    assert planned.trained_bytes == FLOAT * trained
    assert planned.optimizer == pytest.approx(2 * FLOAT * trained, rel=0.001)
    assert planned.weight_bytes >= FLOAT * sum(part.parameters for part in planned.weights.values())
    tokens = sizes.tokenizer_max_length + len(policy.cameras) * (sizes.image_resolution[0] // sizes.patch_size) ** 2
    kv = sizes.depth * 2 * sizes.head_dim * tokens * FLOAT
    pooled, state = FLOAT * sizes.vlm_width, FLOAT * sizes.max_state_dim
    assert planned.prefix_row == kv + tokens + pooled + state
    assert 0 <= planned.backward.after - planned.forward.before < 1024  # of a micro-batch only a few numbers stay


def test_parts_of_parameters():
    names = {
        "policy.policy.model.paligemma_with_expert.paligemma.model.vision_tower.x": "vision",
        "policy.policy.model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight": (
            "language embedding"
        ),
        "policy.policy.model.paligemma_with_expert.paligemma.model.language_model.layers.0.mlp.up_proj.weight": (
            "language model"
        ),
        "policy.policy.model.paligemma_with_expert.gemma_expert.model.layers.0.mlp.up_proj.weight": "action expert",
        "policy.policy.model.action_out_proj.weight": "action expert",
        "value_head.layers.0.weight": "critic",
        "noise_network.layers.0.weight": "noise network",
    }
    assert {name: part_of(name) for name in names} == names
