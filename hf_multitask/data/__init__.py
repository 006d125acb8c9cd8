"""From datasets of text and labels to batches: preprocessing, sampling, one index over many datasets, collation."""
