"""Random calls of every public function, judged by the one rule: ``make fuzz``, and examples of it in the tests."""
