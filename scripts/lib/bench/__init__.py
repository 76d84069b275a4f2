"""What scripts/bench is made of: a world, candidates in it, tests on them, and a report."""
