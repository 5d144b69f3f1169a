"""One device's share of the work: caches, graphs, step inputs, sampling."""
