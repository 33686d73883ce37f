"""What is changed in a model: stored weights, biases, their form and their order."""
