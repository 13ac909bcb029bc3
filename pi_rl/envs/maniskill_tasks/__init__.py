"""ManiSkill tasks: what a policy must know about each (`table`), and the tasks that ManiSkill itself does not have."""
