"""What to prune by a formula: magnitude, activation-weighted, Taylor, random; and how scores are ranked."""
