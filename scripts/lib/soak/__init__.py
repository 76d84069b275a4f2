"""What scripts/soak is made of: an application, a load, faults, and a table of what has drifted."""
