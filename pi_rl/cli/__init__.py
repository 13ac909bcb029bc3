"""The command `pi-rl`; each subcommand is a module that is imported when it is called."""
