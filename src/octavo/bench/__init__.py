"""A load generator for OpenAI-compatible servers, as a library: client, loads, workloads, traces, metrics, report."""
