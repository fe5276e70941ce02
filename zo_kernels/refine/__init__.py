"""Refinement of aligned chat models: data, losses, optimisers."""
