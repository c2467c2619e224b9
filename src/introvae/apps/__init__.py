"""What people use a trained model for: to find what does not belong, and to explore what it has learned."""
