"""Token shards: their manifest, the order of their samples, and the reader."""
