"""What training did to the weights, measured or cut after it."""
