"""A real federation: the server core behind a network, and what runs on a client's machine."""
