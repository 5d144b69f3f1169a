"""A load generator for OpenAI-compatible servers, as a library: client, load, metrics, report."""
