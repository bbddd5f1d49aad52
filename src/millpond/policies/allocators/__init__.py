"""Layer budgets: how many of the memory's tokens each layer keeps."""
