"""A package, so that its `test_contract.py` has a name of its own."""
