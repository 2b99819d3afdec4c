"""The HTTP API: jobs, datasets, models, predictions and the web page. Imports no TensorFlow."""
