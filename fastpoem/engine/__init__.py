"""What runs on the device: flat parameters, precision, the training step."""
