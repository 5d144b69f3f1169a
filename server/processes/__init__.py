"""Several server processes on one port, with one process that starts them and the engines."""
