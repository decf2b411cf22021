"""What `atp eval` needs besides measuring: which tasks, which figures, what changed, and which gates that fails."""
