"""The method on one page: PPO on a flow-matching policy, as in πRL (arXiv 2510.25889), with torch and numpy only.

    python scripts/flow_ppo_one_file.py --noise flow_sde      # or flow_noise; 5 or 15 s on one idle CPU core

A flow-matching policy turns noise into an action chunk with K Euler steps of an ODE. The outcome has no tractable
log-probability, which PPO needs, and no exploration noise. The remedy: make denoising steps Gaussian. Their densities
are known, and PPO's ratio becomes that of the denoising chain (`Agent.transition`, `Agent.act`, `Agent.score`).

Equation numbers are the paper's, except for the direction of time: as in π0's code, t runs from 1 (noise) to 0
(action), so τ = 1 − t, and the velocity is u = noise − action. From equal weights `FlowPPOTrainer` makes the same
rollouts and updates; it adds VLAs, simulators, more noises, MDPs and critics, several GPUs and checkpoints.

Shapes: B environments, T chunks per rollout, H actions per chunk (all are executed, hence scored), A numbers in an
action, K denoising steps, F width of an action token, M samples (chunks).
"""

import argparse
import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn


@dataclass
class Config:
    noise: str = "flow_sde"  # noise of a fixed size in one denoising step; or flow_noise: learned, in every step
    seed: int = 0
    iterations: int = 20  # of rollout and update
    num_envs: int = 128  # B
    rollout_chunks: int = 10  # T
    chunk_size: int = 4  # H
    denoising_steps: int = 4  # K
    noise_level: float = 0.5  # a, flow_sde
    noise_std_min: float = 0.16  # bounds of the standard deviation, flow_noise (fine-tuned VLAs: 0.08 and 0.16)
    noise_std_max: float = 0.4
    gamma: float = 0.99  # discount per chunk
    gae_lambda: float = 0.95
    update_epochs: int = 4  # passes over each rollout
    minibatch_size: int = 160  # M
    clip_range: float = 0.2  # of the ratio
    value_clip_range: float = 0.2
    huber_delta: float = 10.0  # of the value loss
    entropy_coefficient: float = 0.0  # for flow_noise: the entropy of noise of a fixed size is constant
    learning_rate: float = 6e-3  # of policy and noise network
    critic_learning_rate: float = 3e-3
    weight_decay: float = 0.0  # of matrices
    max_grad_norm: float = 1.0
    eval_episodes: int = 100
    eval_every: int = 5  # iterations


# ---- environment; random numbers come from keys of what they belong to, so that runs repeat exactly ----
A, TIME_LIMIT, TOLERANCE, CLOSEST, FARTHEST = 2, 20, 0.2, 0.3, 0.8
FPS, FORCE, DRAG = 10, 4.0, 2.0
LOG_2PI = math.log(2.0 * math.pi)
TRAIN, EVAL, RESET, SHUFFLE = 0, 1, 2, 3  # streams of random numbers


def distance(difference: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(difference).mean(axis=-1))


class PointMass:
    """B masses pushed by forces; reaching the goal pays 1 and terminates the episode, the time limit truncates it."""

    def __init__(self, num_envs: int):
        self.x, self.v, self.goal, self.steps = *np.zeros((3, num_envs, A)), np.zeros(num_envs, int)

    def reset(self, rows: np.ndarray, state_ids: np.ndarray) -> None:
        for row, state_id in zip(rows, state_ids, strict=True):
            rng = np.random.default_rng(state_id)
            self.x[row] = rng.uniform(-1, 1, A)
            towards = rng.standard_normal(A)
            self.goal[row] = self.x[row] + towards / distance(towards) * rng.uniform(CLOSEST, FARTHEST)
        self.v[rows], self.steps[rows] = 0.0, 0

    def states(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.concatenate([self.x, self.v, self.goal], axis=1)[rows].astype(np.float32))

    def step_chunk(self, actions: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Executes (n, H, A) actions in n environments; returns rewards, which terminated, which ended at all."""
        reward, terminated, done = np.zeros(len(rows), np.float32), *np.zeros((2, len(rows)), bool)
        for j in range(actions.shape[1]):
            going = np.flatnonzero(~done)  # the rest of a chunk is dropped where the episode ends
            go = rows[going]
            self.v[go] += (FORCE * actions[going, j].clip(-1, 1) - DRAG * self.v[go]) / FPS
            self.x[go] += self.v[go] / FPS
            self.steps[go] += 1
            terminated[going] = distance(self.goal[go] - self.x[go]) < TOLERANCE
            done[going] = terminated[going] | (self.steps[go] >= TIME_LIMIT)
            reward[going] += terminated[going]  # R_t = Σ_j r_{t,j} (section 4.3.1): a chunk is one step of the MDP
        return reward, terminated, done


def training_states(seed: int, iteration: int, rows: np.ndarray, episodes: np.ndarray) -> np.ndarray:
    """Initial states of the rows' next episodes; 0, 1, 2 … are kept for evaluation."""
    rngs = [np.random.default_rng([seed, RESET, iteration, row, episodes[row]]) for row in rows]
    return np.array([1_000_000 + rng.integers(2**30) for rng in rngs], int)


def chunk_noise(c: Config, key: tuple[int, ...], ids: np.ndarray, chunks: np.ndarray) -> tuple[Tensor, Tensor]:
    """For one chunk of each of B episodes: noise (B, K + 1, H, A), and which step flow_sde makes stochastic (B,)."""
    rngs = [np.random.default_rng([*key, 0, *episode]) for episode in zip(ids, chunks, strict=True)]  # 0: task
    noise = np.stack([rng.standard_normal((c.denoising_steps + 1, c.chunk_size, A), np.float32) for rng in rngs])
    step = torch.tensor([rng.random(dtype=np.float32) for rng in rngs]) * c.denoising_steps
    return torch.from_numpy(noise), step.long().clamp(max=c.denoising_steps - 1)


# ---- networks and denoising ----
def mlp(sizes: list[int], activation: type[nn.Module], zero_last: bool = True) -> nn.Sequential:
    layers = [layer for pair in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(*pair), activation())]
    for parameter in layers[-2].parameters() if zero_last else ():
        nn.init.zeros_(parameter)
    return nn.Sequential(*layers[:-1])


class Agent(nn.Module):
    """Policy, in the place of a VLA's action expert; critic V(s), of V_vlm (section 4.3.2); Flow-Noise's network."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        sizes = [3 * A + config.chunk_size * A + 8, 64, 64, config.chunk_size * 32]
        self.tokens, self.action_out = mlp(sizes, nn.SiLU, zero_last=False), mlp([32, A], nn.SiLU)
        self.value_head = nn.Sequential(mlp([3 * A, 64, 64, 1], nn.ReLU), nn.Flatten(0))
        if config.noise == "flow_noise":
            self.noise_network = mlp([32, 128, 64, 32, A], nn.Tanh)

    def velocity(self, state: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(M, 3 A), (M, H, A), (M, 1, 1) → velocity (M, H, A) and action tokens (M, H, F)."""
        angles, sigma = t.flatten(1) * (math.pi * 2.0 ** torch.arange(4.0)), 0.5
        inputs = torch.cat([state, x.flatten(1), angles.sin(), angles.cos()], dim=1)
        tokens = nn.functional.silu(self.tokens(inputs)).unflatten(1, (x.shape[1], -1))
        # The velocity of actions N(offset, σ²). Untrained, offset = 0: something to learn from without demonstrations.
        offset = self.action_out(tokens)
        slope = (t - (1.0 - t) * sigma**2) / (t.square() + (sigma * (1.0 - t)).square())
        return slope * (x - (1.0 - t) * offset) - offset, tokens

    def transition(self, state: Tensor, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Denoising step k (M,) of M chains: the ODE's next x; mean and standard deviation of the stochastic one."""
        c, K = self.config, self.config.denoising_steps
        t, t_next = ((K - i[:, None, None]) / K for i in (k, k + 1))
        delta, (u, tokens) = t - t_next, self.velocity(state, x, t)
        ode = x - delta * u  # Eq. 6
        if c.noise == "flow_noise":  # Eq. 4: the mean is the ODE's; log σ is learned, between two bounds
            fraction = 0.5 * (1.0 + torch.tanh(self.noise_network(tokens)))
            low, high = math.log(c.noise_std_min), math.log(c.noise_std_max)
            return ode, ode, (low + (high - low) * fraction).exp().clamp(c.noise_std_min, c.noise_std_max)
        # Eq. 7–9: an SDE with the ODE's marginals; σ² = a² t / (1 − t), and the score is −(predicted noise) / t. The
        # paper prints τ where t belongs. At t = 1, where σ is infinite, 1 − t_next replaces 1 − t, which makes std a.
        predicted_noise = x + (1.0 - t) * u
        variance_over_t = c.noise_level**2 / torch.where(t >= 1.0, 1.0 - t_next, 1.0 - t)
        mean = ode - 0.5 * delta * variance_over_t * predicted_noise
        return ode, mean, (variance_over_t * t * delta).sqrt()

    @torch.no_grad()
    def act(self, state: Tensor, noise: Tensor, step: Tensor | None) -> Tensor:
        """Chains (M, K + 1, H, A) from noise[:, 0], x at t = 1, to actions; the other noise enters the steps.

        flow_sde makes one `step` (M,) of each chain stochastic; the ODE steps belong to the environment, so to speak
        (section 4.2.3), and an update costs one network call instead of flow_noise's K. None stands for the pure ODE.
        """
        x = [noise[:, 0]]
        for k in range(self.config.denoising_steps):
            following, mean, std = self.transition(state, x[-1], torch.full((len(state),), k))
            if step is not None:
                noisy = (step == k) | (self.config.noise == "flow_noise")
                following = torch.where(noisy[:, None, None], mean + std * noise[:, k + 1], following)
            x.append(following)
        return torch.stack(x, dim=1)

    def score(self, state: Tensor, chain: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Log-prob and entropy, (M,) each, of given chains under the present weights; differentiable."""
        every = [torch.full_like(step, k) for k in range(self.config.denoising_steps)]
        steps = every if self.config.noise == "flow_noise" else [step]  # Eq. 5, the joint log-prob, or that of Eq. 9
        rows, log_prob, entropy = torch.arange(len(state)), torch.zeros(len(state)), torch.zeros(len(state))
        for k in steps:
            _, mean, std = self.transition(state, chain[rows, k], k)
            squares = ((chain[rows, k + 1] - mean) / std).square()
            log_prob = log_prob + (-0.5 * squares - std.log() - 0.5 * LOG_2PI).sum(dim=(1, 2))  # over H · A numbers
            entropy = entropy + (std.log() + 0.5 * (1.0 + LOG_2PI)).mean(dim=(1, 2))
        return log_prob, entropy / len(steps)


# ---- rollout, advantages and loss ----
@torch.no_grad()
def collect(agent: Agent, env: PointMass, iteration: int) -> dict[str, Tensor]:
    """T chunks in each of B environments, entries (T, B, …); what ends starts over at once from a new state."""
    c, rows, rollout = agent.config, np.arange(len(env.x)), []
    ids, chunks, episodes, done = *np.full((3, len(rows)), -1), np.ones(len(rows), bool)
    for _ in range(c.rollout_chunks):
        chunks, new = chunks + 1, np.flatnonzero(done)
        chunks[new], episodes[new] = 0, episodes[new] + 1
        ids[new] = training_states(c.seed, iteration, new, episodes)
        env.reset(new, ids[new])
        state = env.states(rows)
        noise, step = chunk_noise(c, (c.seed, TRAIN, iteration), ids, chunks)
        chain = agent.act(state, noise, step)
        log_prob, _ = agent.score(state, chain, step)
        reward, terminated, done = env.step_chunk(chain[:, -1].numpy(), rows)
        # V of what follows, before any reset: a time limit, unlike success, is not the end of the task
        value, next_value = agent.value_head(state), agent.value_head(env.states(rows))
        rollout.append((state, chain, step, log_prob, value, reward, terminated, done, next_value))
    names = ("state", "chain", "step", "log_prob", "value", "reward", "terminated", "done", "next_value")
    columns = zip(names, zip(*rollout, strict=True), strict=True)
    return {name: torch.stack([torch.as_tensor(entry) for entry in column]) for name, column in columns}


def gae(rollout: dict[str, Tensor], gamma: float, gae_lambda: float) -> Tensor:
    """Advantages (T, B) (Eq. 13): success cuts the value of what follows, any end of an episode cuts the sum."""
    advantages, following = torch.zeros_like(rollout["value"]), torch.zeros_like(rollout["value"][0])
    for t in reversed(range(len(advantages))):
        next_value = torch.where(rollout["terminated"][t], 0.0, rollout["next_value"][t])
        td_error = rollout["reward"][t] + gamma * next_value - rollout["value"][t]
        advantages[t] = following = td_error + gamma * gae_lambda * torch.where(rollout["done"][t], 0.0, following)
    return advantages


def ppo_loss(agent: Agent, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of M samples, and what to print of it."""
    c, advantage, returns, old = agent.config, batch["advantage"], batch["return"], batch["value"]
    log_prob, entropy = agent.score(batch["state"], batch["chain"], batch["step"])
    log_ratio = (log_prob - batch["log_prob"]).clamp(-20.0, 20.0)
    ratio = log_ratio.exp()  # Eq. 15
    clipped = ratio.clamp(1.0 - c.clip_range, 1.0 + c.clip_range)
    policy_loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()  # Eq. 14
    value = agent.value_head(batch["state"])
    near = old + (value - old).clamp(-c.value_clip_range, c.value_clip_range)
    errors = [nn.functional.huber_loss(v, returns, reduction="none", delta=c.huber_delta) for v in (value, near)]
    value_loss = torch.maximum(*errors).mean()
    kl, clip_fraction = (log_ratio.expm1() - log_ratio).mean(), (ratio != clipped).float().mean()
    figures = {"policy_loss": policy_loss, "value_loss": value_loss, "approx_kl": kl, "clip_fraction": clip_fraction}
    return policy_loss - c.entropy_coefficient * entropy.mean() + value_loss, figures


# ---- evaluation and training ----
def evaluate(agent: Agent) -> float:
    """Success rate of the deterministic policy, one episode from each of the fixed initial states."""
    c, running, chunk, successes = agent.config, np.arange(agent.config.eval_episodes), 0, 0
    env = PointMass(len(running))
    env.reset(running, running)
    while len(running):
        noise, _ = chunk_noise(c, (0, EVAL), running, np.full(len(running), chunk))
        chain = agent.act(env.states(running), noise, None)
        _, terminated, done = env.step_chunk(chain[:, -1].numpy(), running)
        successes, chunk, running = successes + terminated.sum(), chunk + 1, running[~done]
    return float(successes / c.eval_episodes)


def train(agent: Agent) -> list[dict[str, float]]:
    """Trains the agent; returns the figures that it prints."""
    c, env, history = agent.config, PointMass(agent.config.num_envs), []
    updates = c.iterations * c.update_epochs * math.ceil(c.rollout_chunks * c.num_envs / c.minibatch_size)
    groups = []
    for name, parameter in agent.named_parameters():
        rate = c.critic_learning_rate if name.startswith("value_head") else c.learning_rate
        groups.append({"params": parameter, "lr": rate, "weight_decay": c.weight_decay * (parameter.ndim > 1)})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5 * (1.0 + math.cos(math.pi * (n / updates))))
    print(f"untrained: deterministic success {evaluate(agent):.2f}")
    for iteration in range(c.iterations):
        rollout = collect(agent, env, iteration)
        advantages = gae(rollout, c.gamma, c.gae_lambda)
        exact = advantages.double()
        normalized = ((exact - exact.mean()) / (exact.std(correction=0) + 1e-8)).float()
        batch = rollout | {"advantage": normalized, "return": advantages + rollout["value"]}
        seed = np.random.SeedSequence([c.seed, SHUFFLE, iteration, 0]).generate_state(1)[0]
        generator, figures = torch.Generator().manual_seed(int(seed)), []
        for _ in range(c.update_epochs):
            for indices in torch.randperm(advantages.numel(), generator=generator).split(c.minibatch_size):
                loss, parts = ppo_loss(agent, {name: x.flatten(0, 1)[indices] for name, x in batch.items()})
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), c.max_grad_norm)
                optimizer.step()
                schedule.step()
                figures.append(parts)
        row = {name: torch.stack([parts[name] for parts in figures]).mean().item() for name in figures[0]}
        first = rollout["done"] & (rollout["done"].cumsum(0) == 1)  # later episodes end within the rollout if short
        row["success"] = rollout["terminated"][first].float().mean().item()
        if (iteration + 1) % c.eval_every == 0:
            row["deterministic_success"] = evaluate(agent)
        print(f"{iteration + 1:3d}: " + ", ".join(f"{name} {value:.3f}" for name, value in row.items()), flush=True)
        history.append(row)
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Config):
        allowed = ("flow_sde", "flow_noise") if field.name == "noise" else None
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default, choices=allowed)
    config = Config(**vars(parser.parse_args()))
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    train(Agent(config))
