"""Tools that tell whether multi-task training is worth it: before a training, and after it."""
