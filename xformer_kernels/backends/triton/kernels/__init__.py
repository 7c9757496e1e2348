"""Device code: what a program owns, reads and writes."""
