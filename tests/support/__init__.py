"""What several tests share: models, servers, shards, real processes and the reading of runs."""
