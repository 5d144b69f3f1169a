"""The architectures that the decoder has, a file for each family."""
