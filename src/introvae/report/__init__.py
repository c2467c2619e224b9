"""What a person looks at: the pictures and the page of an evaluated run."""
