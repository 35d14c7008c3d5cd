"""What each candidate does to the output of its block: input moments and additive losses."""
