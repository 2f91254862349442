"""What every method stands on: the interface, surgery on the model, heads, frozen weights, rows, draws."""
