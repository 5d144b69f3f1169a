"""HTTP, text, server-sent events and metrics. Knows no tensor."""
