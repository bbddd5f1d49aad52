"""What several policies score by, each beside a bound of the bytes that it takes."""
