"""Pictures of data, predictions and progress, by matplotlib."""
