"""What to prune: the network that emits logits, and sampling as pure functions."""
