"""The commands of the shell, one file each: `add` declares the arguments, `run` does the work.

`report` and `history` import neither torch nor transformers, so that they answer at once; nor does what they import.
"""
