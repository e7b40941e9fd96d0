"""Performance suite: counted floors, and measurements against them."""
