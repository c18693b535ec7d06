"""What an architecture is: the fields that shape its graphs, read from JSON or off the tensors."""
