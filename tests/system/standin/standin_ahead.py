"""What the stand-in's jobs import, as a real one's TensorFlow."""
