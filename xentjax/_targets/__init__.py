"""The truth: targets, their mass, and the functions from targets to targets."""
