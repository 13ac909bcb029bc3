"""From counts to memory and seconds: sums, shares and the closed forms of collectives."""

import math

import pytest

from pi_rl.planning.assumptions import Assumptions
from pi_rl.planning.counting import Count
from pi_rl.planning.memory import GB, Machine, choose_tier, plan_memory
from pi_rl.planning.phases import Phases, Weights
from pi_rl.planning.plan import Question, make_plan
from pi_rl.planning.scaling import all_gather_seconds, all_reduce_seconds, plan_time
from pi_rl.trainer.flow_ppo_config import FlowPPOConfig

BILLION = 10**9


def phases(**changed):
    static = 8 * BILLION
    base = {
        "weights": {
            "language model": Weights(3 * BILLION, 6 * BILLION),
            "action expert": Weights(BILLION // 2, 2 * BILLION, BILLION // 2, 2 * BILLION),
        },
        "optimizer": 4 * BILLION,
        "encode": Count(flops=10**13, before=static, peak=static + 3 * BILLION, operations=10),
        "act": Count(flops=10**12, before=static, peak=static + BILLION, operations=10),
        "forward": Count(flops=10**12, before=11 * BILLION, peak=12 * BILLION, operations=10),
        "backward": Count(flops=2 * 10**12, before=12 * BILLION, peak=13 * BILLION, operations=10),
        "evaluate": Count(before=static, peak=static + 2 * BILLION),
        "rollout_rows": 16,
        "update_rows": 8,
        "gathered": BILLION // 10,
        "prefix_row": 10**7,
        "observation_row": 10**6,
        "chunk_row": 10**5,
        "checkpoint": 10 * BILLION,
        "unit_bytes": BILLION // 2,
        "root_bytes": BILLION // 4,
    }
    return Phases(**{**base, **changed})


def config(**changed):
    settings = {
        "num_envs": 16,
        "rollout_chunks": 10,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "noise": "flow_sde",
        "use_cpu": True,
        "n_action_steps": 5,
        "eval_episodes": 0,
    }
    return FlowPPOConfig(**{**settings, **changed})


def planned(machine, args=None, found=None, live=False):
    return plan_memory(found or phases(), args or config(), machine, Assumptions(), live=live, simulators=GB)


def machine(**changed):
    return Machine(**{"device_memory": 24 * GB, "host_memory": 64 * GB, "disk": 0.0, **changed})


def test_a_device_holds_what_the_phases_need():
    plan = planned(machine())
    device = plan.device
    store, chains = 160 * 10**7, 160 * 10**5
    assert plan.tier == "device"
    assert device.store == plan.store_bytes == store
    held = 8 * BILLION + 4 * BILLION + store + chains
    assert device.peaks["rollout"] == held + 3 * BILLION
    assert device.peaks["update"] == held + 2 * BILLION + 2 * BILLION + BILLION // 10
    assert device.peaks["evaluation"] == held + 3 * BILLION  # encoding, as in the rollout
    assert device.peak == device.peaks["update"]
    assert device.reserved == pytest.approx(device.peak * 1.05 + 0.8 * GB)
    assert plan.fits
    smaller = planned(machine(device_memory=18 * GB))  # a quarter of the device is left free
    assert smaller.tier == "host"
    assert smaller.fits
    assert not planned(machine(device_memory=14 * GB)).fits


def test_a_live_prefix_stores_observations():
    plan = planned(machine(), live=True)
    assert (plan.tier, plan.automatic) == ("observations", "observations")
    assert plan.device.store == plan.store_bytes == 160 * 10**6


def test_recomputing_keeps_observations_and_encodes_in_the_update():
    found = phases(encode=Count(flops=10**13, before=8 * BILLION, peak=14 * BILLION, operations=10))
    stored, recomputed = (planned(machine(), config(prefix_storage=tier), found) for tier in ("host", "recompute"))
    assert recomputed.store_bytes == recomputed.device.store == 160 * 10**6
    assert "prefixes" not in recomputed.host
    more = recomputed.device.peaks["update"] - stored.device.peaks["update"]
    assert recomputed.device.updating == 3 * BILLION  # 6 for the rollout's 16 rows, half of it for 8
    assert more == 160 * 10**6 + 3 * BILLION - stored.device.updating


def test_host_storage_leaves_the_device():
    plan = planned(machine(), config(prefix_storage="host"))
    assert (plan.tier, plan.automatic) == ("host", "device")
    assert (plan.device.store, plan.host["prefixes"]) == (0, 160 * 10**7)
    assert sum(plan.device.peaks.values()) < sum(planned(machine()).device.peaks.values())


@pytest.mark.parametrize(
    ("room", "tier"),
    [((5, 0, 0), "device"), ((4, 5, 9), "host"), ((4, 4, 5), "disk"), ((4, 4, 4), "recompute"), ((-1, -1, 0), None)],
)
def test_the_fastest_tier_with_room(room, tier):
    assert choose_tier(5, *room) == (tier or "recompute")


def test_sharding_divides_what_training_holds():
    whole, shared = (planned(machine(processes=8, sharded=sharded)).device for sharded in (False, True))
    assert shared.gradients * 8 == whole.gradients
    assert shared.optimizer * 8 == whole.optimizer
    assert sum(shared.weights.values()) * 8 == sum(whole.weights.values())
    assert (shared.gathered, whole.gathered) == (BILLION + BILLION // 4, 0)
    assert (shared.buckets, whole.buckets) == (0, 2 * BILLION)


def test_disk_holds_the_checkpoints_that_are_kept():
    plan = planned(machine(), config(save_every_iterations=10, save_total_limit=2))
    assert plan.disk == {"policy": 10 * BILLION, "checkpoints": 3 * 14 * BILLION}


def test_collectives_are_rings_within_and_between_nodes():
    rates = Assumptions().changed({"latency_us": 0, "node_gb_s": 100, "network_gb_s": 10})
    assert all_gather_seconds(GB, 1, rates) == 0
    assert all_gather_seconds(GB, 8, rates) == pytest.approx(7 / 8 / 100)
    assert all_gather_seconds(GB, 64, rates) == pytest.approx(7 / 8 / 100 + 7 / 8 / 8 / 10)
    assert all_reduce_seconds(GB, 64, rates) == 2 * all_gather_seconds(GB, 64, rates)
    slow = Assumptions().changed({"latency_us": 10})
    assert all_gather_seconds(0, 64, slow) == pytest.approx(6 * 10e-6)


def spec():
    from pi_rl.envs.registry import check_name_and_options

    return check_name_and_options("metaworld:handle-press-v3", {})


def seconds(processes=1, found=None, tier="device", sharded=False, **assumed):
    where = machine(processes=processes, sharded=sharded)
    return plan_time(found or phases(), config(), spec(), where, Assumptions().changed(assumed), tier)


def test_seconds_are_counts_over_rates():
    time = seconds(peak_tflops=100, vlm_efficiency=0.5, expert_efficiency=0.1, kernel_us=0, step_ms=2, picture_ms=5)
    turns, micro_batches = 10, 4 * 160 / 8
    assert time.phases["simulation"] == pytest.approx(turns * (5 * 2e-3 + 5e-3))
    assert time.phases["rollout: VLM"] == pytest.approx((turns + 1) * 10 / 50)
    assert time.phases["rollout: denoising"] == pytest.approx(turns * 1 / 10)
    assert time.phases["update: expert and heads"] == pytest.approx(micro_batches * 3 / 10)
    assert time.efficiency == 1
    assert time.seconds == pytest.approx(sum(time.phases.values()))
    assert time.samples_per_second == pytest.approx(160 / time.seconds)
    assert time.env_steps_per_second == pytest.approx(160 * 5 / time.seconds)


def test_small_passes_cost_their_kernels():
    assert seconds(kernel_us=1e6).phases["rollout: denoising"] == pytest.approx(10 * 10)


def test_recomputing_prefixes_costs_the_vlm_again():
    rates = {"peak_tflops": 100, "vlm_efficiency": 0.5}
    prefixes = seconds(tier="recompute", **rates).phases["update: prefixes"]
    assert prefixes == pytest.approx(4 * 160 / 16 * 10 / 50)
    assert seconds(tier="host", host_copy_gb_s=10).phases["update: prefixes"] == pytest.approx(80 * 0.1 / 10)


def test_more_processes_do_more_and_wait_more():
    one, eight, many = (seconds(processes) for processes in (1, 8, 64))
    assert one.efficiency == 1 > eight.efficiency > many.efficiency
    assert eight.samples_per_second == pytest.approx(8 * one.samples_per_second * eight.efficiency)
    alone = seconds(64, straggler_spread=0, latency_us=0, node_gb_s=1e9, network_gb_s=1e9)
    assert alone.efficiency == pytest.approx(1, abs=1e-6)
    waiting = seconds(64, straggler_spread=0.1).phases
    rollout = sum(value for name, value in waiting.items() if name.startswith(("rollout", "simulation")))
    assert waiting["waiting for the slowest process"] == pytest.approx(rollout * 0.1 * math.sqrt(2 * math.log(64)))


def test_gradients_travel_once_per_step_and_sharded_ones_per_micro_batch():
    rates = Assumptions()
    steps = 4 * 160 / 32
    travel = seconds(8).phases["gradients between processes"]
    assert travel == pytest.approx(steps * all_reduce_seconds(2 * GB, 8, rates))
    sharded = seconds(8, sharded=True).phases
    assert sharded["gradients between processes"] == pytest.approx(4 * steps * all_gather_seconds(2 * GB, 8, rates))
    assert sharded["weights between processes"] > 0 == seconds(8).phases["weights between processes"]


@pytest.mark.parametrize(
    ("name", "value"), [("speed", 1), ("node_gb_s", -1), ("node_gb_s", "fast"), ("kernel_us", True)]
)
def test_assumptions_are_numbers_that_exist(name, value):
    with pytest.raises(ValueError, match=name):
        Assumptions().changed({name: value})


def test_every_assumption_has_a_source():
    assert all(entry["source"] for entry in Assumptions().described())


SMALL = ("--env=metaworld:handle-press-v3", "--num_envs=8", "--rollout_chunks=4", "--noise=flow_sde")


def test_processes_share_environments_and_batch():
    words = [*SMALL, "--per_device_train_batch_size=4", "--global_batch_size=16"]
    where = machine(processes=2)
    plan = make_plan(words, Question("ppo", where))
    assert plan.phases.rollout_rows == 4
    assert plan.args.gradient_accumulation_steps == 2
    assert plan.arithmetic.startswith("each of 2 processes: 4 envs x 4 chunks")
    with pytest.raises(ValueError, match="--num_envs 9"):
        make_plan(words, Question("ppo", machine(processes=3)))
    with pytest.raises(ValueError, match="global_batch_size=16 is not a multiple of 32"):
        make_plan(words, Question("ppo", machine(processes=8)))


def test_flops_of_an_iteration_add_up():
    plan = make_plan([*SMALL, "--per_device_train_batch_size=8"], Question("ppo", machine()))
    counted, flops = plan.phases, plan.flops
    assert flops["rollout: prefix"] == 5 * counted.encode.flops  # four chunks and the value of what follows
    assert flops["rollout: denoising"] == 4 * counted.act.flops
    assert flops["update: forward"] == 16 * counted.forward.flops
    assert flops["update: backward"] == 16 * counted.backward.flops
    assert "update: prefix" not in flops
    assert "update: activations recomputed" not in flops
