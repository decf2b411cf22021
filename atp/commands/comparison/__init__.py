"""The parts of `atp compare`: the plan of runs, one run as a process, the journal of rows, and what is made of them."""
