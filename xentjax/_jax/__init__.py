"""Helpers that know JAX and nothing of losses."""
