"""What an answer has to keep to: from what a caller asks for to which tokens may come next."""
