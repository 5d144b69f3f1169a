"""The page at `/`: its files, and the routes that hand them out."""
