"""Several engines behind one server: which of them gets a request, and what each of them is doing."""
