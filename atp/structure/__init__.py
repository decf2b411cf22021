"""What can be pruned: discovery of a live model, groups and spaces, the budget."""
