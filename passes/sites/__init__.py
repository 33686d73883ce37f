"""Which weights can be pruned: candidates, where they are stored, and who reads them."""
