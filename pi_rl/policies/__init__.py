"""The bridge to LeRobot: flow policies, critic, prefix store and checkpoints (import from the modules directly)."""
