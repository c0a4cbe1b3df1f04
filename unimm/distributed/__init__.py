"""Training on many devices: processes and what they agree on, weights in shards, gradients, checkpoints of shards."""
