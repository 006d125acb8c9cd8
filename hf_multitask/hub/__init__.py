"""Sharing a model: pushing it to the Hub, its model card, and code that travels along."""
