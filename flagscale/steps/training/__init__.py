"""What distil-student makes sure of and tells."""
