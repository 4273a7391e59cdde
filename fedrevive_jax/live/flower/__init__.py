"""Flower as a link: what runs inside its ServerApp and ClientApp, and the processes around them."""
