"""What a run will need, before it runs: memory, FLOPs and seconds per phase."""
