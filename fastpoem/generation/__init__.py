"""Writing poems with a trained model: settings, the prompt as the model is to read it, choosing tokens, and the text that they spell."""
