"""What a model attends to, its features, and what tells its classes apart."""
