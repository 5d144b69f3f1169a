"""The APIs that clients speak: their requests, and answers in their shapes."""
