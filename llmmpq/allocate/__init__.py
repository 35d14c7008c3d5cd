"""Choose a scheme for every linear under a budget; knows records only, never torch."""
