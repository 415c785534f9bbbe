"""A small HTTP/1.1 server on h11 and Trio: bounded in every direction, testable on any clock."""
