"""What scripts/fuzz is made of: the target, a run of it, and the corpus that a run leaves."""
