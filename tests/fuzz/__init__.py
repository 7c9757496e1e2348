"""Random calls of every public function: ``make fuzz``, and a few of them in the tests."""
