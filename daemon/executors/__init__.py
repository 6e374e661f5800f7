"""Ways to run a trainer."""
