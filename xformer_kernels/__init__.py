"""Fused cross feature attention (XFA): attention over features instead of tokens."""
