"""Training stages: supervised fine-tuning through LeRobot and PPO through ``transformers.Trainer``.

Import from the modules directly, for example ``from pi_rl.trainer.sft import run_sft``.
"""
