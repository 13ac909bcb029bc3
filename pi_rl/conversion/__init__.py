"""Policy folders between LeRobot's layout, openpi's and RLinf's, and between merged weights and LoRA adapters."""
