"""What a model says, in parts, whatever the dialect that it is told in."""
