"""The truth: what targets are, their mass, and the functions from targets to targets."""
