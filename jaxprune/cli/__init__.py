"""The `jaxprune` command: options, one file per group of commands, and what they show."""
