"""Modelling code: tasks, heads and sharing schemes. It imports nothing else of the package."""
