"""Several models behind one server: each has engines and routes of its own, which are there while it is loaded."""
