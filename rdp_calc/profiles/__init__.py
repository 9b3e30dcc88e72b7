"""Privacy profiles and their conversions to (epsilon, delta)."""
