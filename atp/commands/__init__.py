"""The commands of the shell, one file each: `add` declares the arguments, `run` does the work."""
