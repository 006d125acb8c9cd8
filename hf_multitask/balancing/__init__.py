"""Balancing of tasks: how losses and gradients of several tasks make one update."""
