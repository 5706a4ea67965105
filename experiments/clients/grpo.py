"""GRPO with tunix: a small pretrained Llama learns from its own samples to tell stories full of exclamation marks.

    python experiments/clients/grpo.py

The model is tunix's own Llama 3 with the weights of stories260K, the policy a `jlora.nnx` module on it, the reference the
model itself. Prints the mean reward of every step, and fails where it does not grow. A minute on two cores.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import optax
import stories
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig

import jlora
import jlora.nnx

METHODS = {
    "lora": lambda steps: jlora.LoRA(rank=4),
    "adalora": lambda steps: jlora.AdaLoRA(rank=4, target=2, steps=steps, final_steps=steps // 3),
}


def train(method: str = "lora", steps: int = 15, learning_rate: float = 5e-3):
    """Trains; the policy, its base and the mean reward of each step."""
    base = stories.load()
    policy = jlora.nnx.adapt(base, {jlora.ALL_LINEAR: METHODS[method](steps)}, **base.get_model_input())
    tx = jlora.nnx.on_state(jlora.optimizer(policy.adapted(), optax.adam, learning_rate))
    cluster = rl_cluster.RLCluster(
        actor=policy,
        reference=base,
        tokenizer=stories.Tokenizer(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(
                (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT), stories.mesh()
            ),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=tx,
                eval_every_n_steps=10**6,
                max_steps=steps,
                mini_batch_size=4,
                train_micro_batch_size=4,
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=24, max_prompt_length=16, kv_cache_size=64, temperature=1.0
            ),
        ),
    )
    rewards: list[float] = []

    def reward(prompts, completions, **_):
        marks = [text.count("!") for text in completions]
        rewards.append(float(np.mean(marks)))
        return [float(count) for count in marks]

    learner = GRPOLearner(
        rl_cluster=cluster, algo_config=GRPOConfig(num_generations=8, num_iterations=1, beta=0.02), reward_fns=reward
    )
    learner.train([{"prompts": np.array(stories.PROMPTS)}] * steps)
    return policy, base, rewards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=sorted(METHODS), default="lora")
    parser.add_argument("--steps", type=int, default=15)
    arguments = parser.parse_args()
    begun = time.perf_counter()
    policy, _, rewards = train(arguments.method, arguments.steps)
    print("mean reward by step:", " ".join(f"{reward:.2f}" for reward in rewards))
    first, last = np.mean(rewards[:5]), np.mean(rewards[-5:])
    print(f"{first:.2f} exclamation marks a story at first, {last:.2f} at last; {time.perf_counter() - begun:.0f} s")
    if arguments.method == "adalora":
        print("ranks:", jlora.ranks(policy.adapted()))
    assert last > first + 0.5, "the reward did not grow"


if __name__ == "__main__":
    main()
