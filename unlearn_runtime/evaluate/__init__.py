"""What a run or a baseline reached: accuracies, distance to retraining, and how well its models can be told apart."""
