"""The local trainer: batches, objectives, optimizer, measurement, evaluation."""
