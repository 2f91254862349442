"""What we run: the models, the tasks, the trainer and the studies."""
